"""The verb doctor on a real kernel: it tries everything, touches nothing, and finds what is in the way."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gostnet.testing.namespaces import Network, write_sysctl
from gostnet.testing.processes import Process, gostnet
from gostnet.testing.state import diff, snapshot

pytestmark = pytest.mark.netns

_PR_CAPBSET_DROP = 24


def examined(network: Network, *words: str, place: str = "gateway") -> tuple[dict[str, Any], int]:
    """Return what doctor says in a namespace, and its exit status."""
    with gostnet("doctor", "--json", *words, place=network[place]) as process:
        status = process.wait(30)
        return json.loads(process.output), status


def test_a_capture_works_where_doctor_says_so_and_nothing_is_touched(three: Network, unchanged: Any) -> None:
    before = snapshot()
    with unchanged(three["gateway"]):
        report, status = examined(three, "-L", "red://:12345?capture=lan0", "-L", "redu://:12346?capture=lan0,local")
    assert (status, report["ok"]) == (0, True)
    states = {of["name"]: of["state"] for of in report["capabilities"]}
    for name in ("nft-owner", "nft-redirect", "nft-tproxy", "nft-fib", "policy-routing", "tun", "splice", "clsact"):
        assert states[name] == "yes", name
    needed = {of["name"]: of["neededBy"] for of in report["capabilities"] if of["neededBy"]}
    assert len(needed["nft-owner"]) == 2
    assert len(needed["nft-redirect"]) == 1
    assert (report["leftovers"], report["hindrances"]) == ([], [])
    assert not [line for line in diff(before, snapshot()) if "doctor" in line]


def test_settings_that_are_in_the_way_are_named(three: Network) -> None:
    write_sysctl(three["gateway"], "net.ipv4.ip_forward", 0)
    write_sysctl(three["gateway"], "net.ipv6.conf.lo.disable_ipv6", 1)
    report, _ = examined(
        three, "-L", "tun://:8421?net=192.168.123.1/24", "-L", "red://:12345?capture=lan0,nowhere0&tproxy=true"
    )
    text = "\n".join(report["hindrances"])
    assert "net.ipv4.ip_forward is 0" in text
    assert "disable_ipv6 is 1" in text
    assert "no interface 'nowhere0'" in text
    assert "'lan0'" not in text


def test_leftovers_of_a_dead_instance_are_a_failure(three: Network, peer: Callable[[str], str]) -> None:
    ip = peer("ip")
    rule = ["-n", three["gateway"], "rule"]
    arguments = ["fwmark", "0x2000000/0x3000000", "lookup", "18300", "priority", "18300", "protocol", "250"]
    subprocess.run([ip, *rule, "add", *arguments], check=True)
    report, status = examined(three)
    assert status == 1
    assert len(report["leftovers"]) == 1
    assert "18300" in report["leftovers"][0]
    subprocess.run([ip, *rule, "del", *arguments], check=True)
    assert examined(three)[1] == 0


def test_a_live_instance_is_no_leftover(three: Network, daemon: Callable[..., Process]) -> None:
    daemon(three["gateway"], "-L", "red://:12345?capture=lan0&tproxy=true")
    report, status = examined(three)
    assert (report["leftovers"], status) == ([], 0)


def test_without_privileges_it_says_what_is_missing() -> None:
    libc = ctypes.CDLL(None)

    def drop() -> None:
        for number in range(64):
            libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)

    found = subprocess.run(
        [sys.executable, "-m", "gostnet", "doctor", "-L", "red://:12345?capture=lan0"],
        preexec_fn=drop,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert found.returncode == 1, found.stderr
    lines = found.stdout.splitlines()
    assert any(line.startswith("no   net-admin") and "[needed by" in line for line in lines)
    assert any(line.startswith("yes  splice") for line in lines)
    assert lines[-1].startswith("missing for this configuration: net-admin")
