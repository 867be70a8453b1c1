"""What `check` finds in files that a configuration names."""

from __future__ import annotations

from pathlib import Path

import pytest

from gostnet.app.checking import check_loaded
from gostnet.config.argv import parse_args
from gostnet.config.load import Loader
from gostnet.testing.certificates import Authority

from .test_daemon import run

CASES = [
    ("certFile: none.pem, keyFile: good.key", "certFile", "cannot read 'none.pem': No such file or directory"),
    ("certFile: good.crt, keyFile: good.crt", "keyFile", "holds a certificate, not a private key"),
    ("certFile: good.crt, keyFile: other.key", "keyFile", "does not belong to the certificate"),
    ("caFile: good.key", "caFile", "holds a private key, not a certificate"),
    ("options: {cipherSuites: [AES]}", "options.cipherSuites[0]", "is not the name of a cipher suite"),
]


@pytest.mark.parametrize("verb", [["check"], []])
def test_bad_certificates_are_found_before_anybody_asks_for_tls(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stem in ("good", "other"):
        Authority().issue("a.test").save(tmp_path, stem)
    path = tmp_path / "c.yaml"
    services = [
        f"- name: s{index}\n  addr: 127.0.0.1:0\n  handler: {{type: socks5, tls: {{{words}}}}}\n"
        f"  listener: {{type: tls, tls: {{{words}}}}}\n"
        for index, (words, _, _) in enumerate(CASES)
    ]
    path.write_text("services:\n" + "".join(services))
    done = run(*verb, "-C", str(path))
    assert done.returncode == 1
    said = done.stdout + done.stderr
    for index, (_, key, message) in enumerate(CASES):
        for block in ("handler", "listener"):
            where = f"services[{index}].{block}.tls.{key}: "
            assert any(where in line and message in line for line in said.splitlines()), (where, said)


def test_good_certificates_are_no_finding(tmp_path: Path) -> None:
    certificate, key = Authority().issue("a.test").save(tmp_path)
    done = run("check", "-L", f"socks5+tls://:1080?cert={certificate}&key={key}&ca={certificate}")
    assert (done.returncode, done.stdout) == (0, "0 errors, 0 warnings\n")


TEXTS = [
    (
        "tap://AEAD_AES_128_GCN:pw@:0?net=10.9.0.1/24",
        "-L#1:7: error: services[0].handler.auth.username: 'AEAD_AES_128_GCN' is not a cipher such as AEAD_AES_128_GCM;"
        " did you mean 'aead_aes_128_gcm'? [tap.cipher]",
    ),
    (
        "tungo://:0?net=10.9.0.1/24&tungo.multicastGroups=224.0.0.251,10.0.0.1",
        "-L#1:28: error: services[0].handler.metadata.tungo.multicastGroups: '10.0.0.1' is not a multicast address such"
        " as 224.0.0.251 [config.value]",
    ),
    (
        "tun://:8421/SERVER?net=10.9.0.1/24",
        "-L#1:13: error: services[0].forwarder.nodes[0].addr: 'SERVER' has no port, and a tunnel has no usual one;"
        " write it, as in SERVER:8421 [address]",
    ),
    (
        "tap://:0/SERVER:0?net=10.9.0.1/24",
        "-L#1:10: error: services[0].forwarder.nodes[0].addr: 'SERVER:0' has no port, and a tunnel has no usual one;"
        " write it, as in SERVER:8421 [address]",
    ),
    (
        "tun://:0?net=10.9.0.1/24&tun.token=12345678901234567",
        "-L#1:26: warning: services[0].handler.metadata.tun.token: only its first 16 bytes count [config.value]",
    ),
    (
        "tun://:0?net=10.9.0.1/24&tun.mtu=9",
        "-L#1:26: error: services[0].listener.metadata.tun.mtu: 9 is not between 68 and 65535 [config.value]",
    ),
    (
        "tap://:0?net=10.9.0.1/24&tap.bridge.ports=eth7",
        "-L#1:26: error: services[0].listener.metadata.tap.bridge.ports: needs `bridge`: ports of what [tap.bridge]",
    ),
]


@pytest.mark.parametrize(("url", "said"), TEXTS)
def test_what_no_tunnel_can_do_is_found_under_the_key_that_was_written(url: str, said: str) -> None:
    loaded = Loader(parse_args(["check", "-L", url])).load()
    assert [str(finding) for finding in check_loaded(loaded, strict=True, building=True)] == [said]


@pytest.mark.parametrize(("url", "said"), [TEXTS[0], TEXTS[-1]])
def test_a_start_says_the_same_as_check(url: str, said: str) -> None:
    for verb in (["check"], []):
        done = run(*verb, "-L", url)
        assert (done.returncode, (done.stdout + done.stderr).splitlines()[0]) == (1, said)


def test_what_only_building_shows_is_found_by_check_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"log: {{output: {tmp_path}/made/gost.log}}\nloggers:\n- {{name: l, log: {{output: {tmp_path}/made/l.log}}}}\n"
        "services:\n- name: s\n  logger: l\n  addr: 127.0.0.1:0\n  handler: {type: socks5}\n  listener:\n"
        "    type: tun\n"
    )
    done = run("check", "-C", str(path))
    assert done.returncode == 1
    assert done.stdout.startswith(f"{path}:8:19: error: services[0].handler.type: handler 'socks5' cannot work on")
    assert list(tmp_path.iterdir()) == [path]


def test_a_tunnel_target_of_an_address_without_a_port_is_shown_with_its_brackets(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "services:\n- name: s\n  addr: :9000\n  handler: {type: tun}\n  listener: {type: tun, metadata: {net:"
        " 10.9.0.1/24}}\n  forwarder:\n    nodes:\n    - {name: n, addr: '2001:db8::1'}\n"
        "    - {name: m, addr: '[2001:db8::1]:8421'}\n"
    )
    done = run("check", "-C", str(path))
    assert "write it, as in [2001:db8::1]:9000" in done.stdout
    assert done.stdout.endswith("1 errors, 0 warnings\n")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("tcp://:0/192.0.2.1:80?engine=kernel", ""),
        ("tcp://:0/192.0.2.1:80?engine=splice", ""),
        ("socks5://:0?engine=native", ""),
        ("socks5://:0?engine=kernel", "services[0].metadata.engine: 'kernel' is for port forwards"),
    ],
)
def test_engine_of_the_command_line_is_for_service_and_handler(url: str, said: str) -> None:
    done = run("check", "-L", url)
    assert done.returncode == (1 if said else 0)
    assert said in done.stdout
