"""The verb doctor: what services need, what is printed, and what is the exit status for."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from gostnet import cli
from gostnet.app import doctor
from gostnet.app.daemon import assemble
from gostnet.app.doctor import Report, as_json, as_text, needs_of
from gostnet.config.argv import parse_args
from gostnet.config.load import Loader
from gostnet.core.errors import KernelError
from gostnet.kernel import capabilities, netns
from gostnet.kernel.capabilities import CAPABILITIES, Capability, Finding, Missing, examine

KNOWN = {of.name for of in CAPABILITIES}


def capability(attempt: Callable[[], str], *, private: bool = False) -> Capability:
    return Capability("it", "something", "nothing happens", "wait for it", attempt, private)


def needs(*words: str) -> doctor.Needs:
    return needs_of(assemble(Loader(parse_args(["doctor", *words])).load()).services)


@pytest.mark.parametrize(
    ("words", "expected", "unneeded"),
    [
        (["-L", "socks5://:1080"], set(), KNOWN),
        (["-L", "red://:12345"], set(), KNOWN),
        (["-L", "red://:12345?capture=lan0"], {"nft-owner", "nft-redirect"}, {"nft-tproxy", "policy-routing", "tcx"}),
        (["-L", "red://:12345?capture=lan0&tproxy=true"], {"nft-tproxy", "nft-socket"}, {"nft-redirect"}),
        (["-L", "redu://:12345?capture=local"], {"raw-sockets", "nft-tproxy", "policy-routing"}, {"nft-socket"}),
        (
            ["-L", "red://:1?capture=local&direct.names=true", "-L", "dns://:53", "-F", "http://h:1?bypass=a.test"],
            {"nft-timeouts", "nft-redirect"},
            {"nft-masquerade"},
        ),
        (["-L", "tun://:8421?net=192.168.123.1/24"], {"tun"}, {"tap", "nft-owner", "nft-masquerade"}),
        (["-L", "tun://:8421?net=192.168.123.1/24&masquerade=true"], {"nft-masquerade", "nft-clamp"}, {"nft-tproxy"}),
        (["-L", "http://[::1]:8080"], {"ipv6"}, {"net-admin"}),
    ],
)
def test_what_services_need(words: list[str], expected: set[str], unneeded: set[str]) -> None:
    found = set(needs(*words))
    assert expected <= found <= KNOWN
    assert not found & unneeded


def test_every_capability_says_what_a_user_has_to_know() -> None:
    assert len(KNOWN) == len(CAPABILITIES)
    for of in CAPABILITIES:
        assert all((of.uses, of.without, of.get)), of.name


@pytest.mark.parametrize(
    ("failure", "detail"),
    [
        (Missing("is not there"), "is not there"),
        (PermissionError(1, "x"), "Operation not permitted"),
        (KernelError("open", 2), "open: No such file or directory"),
    ],
)
def test_a_trial_that_fails_is_a_no_with_its_reason(failure: Exception, detail: str) -> None:
    def attempt() -> str:
        raise failure

    (finding,) = examine([capability(attempt)])
    assert (finding.state, finding.detail) == ("no", detail)


def test_what_needs_a_place_of_its_own_is_not_tried_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise KernelError("make a network namespace", 1)

    monkeypatch.setattr(netns, "anonymous", refuse)
    tried: list[str] = []

    def attempt() -> str:
        tried.append("!")
        return ""

    of = capability(attempt, private=True)
    monkeypatch.setattr(capabilities, "_mark", lambda: "")
    assert examine([of])[0].state == "unknown"

    def unprivileged() -> str:
        raise PermissionError(1, "x")

    monkeypatch.setattr(capabilities, "_mark", unprivileged)
    assert examine([of])[0] == Finding(of, "no", "needs CAP_NET_ADMIN")
    assert not tried


def test_the_report_of_what_is_missing() -> None:
    missing = Finding(capability(lambda: ""), "no", "because")
    report = Report([missing], {"it": ["web"]}, configured=True)
    assert not report.healthy
    line, last = as_text(report).splitlines()
    assert line == ("no   it  something [needed by web]: because; without it: nothing happens; to get it: wait for it")
    assert last == "missing for this configuration: it"
    assert Report([missing], {}, configured=True).healthy
    assert Report([missing]).healthy
    assert not Report([missing], leftovers=["ip rule 1"]).healthy
    data = json.loads(as_json(report))
    assert data["ok"] is False
    assert data["capabilities"][0]["neededBy"] == ["web"]


def test_a_configuration_with_errors_is_not_examined(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "-L", "red://:1?capture=lan0&direct=sometimes"]) == 1
    assert "direct" in capsys.readouterr().err
