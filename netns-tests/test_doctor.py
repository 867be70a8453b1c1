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

from gostnet.kernel import netns
from gostnet.kernel.forwarding import closed_chains
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


FIREWALLS = [
    ("ip filter FORWARD", "add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }", True),
    ("ip6 filter F", "add chain ip6 filter F { type filter hook forward priority 0; policy drop; }", True),
    (
        "inet firewalld filter_FORWARD",
        "add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; policy accept; };"
        "add rule inet firewalld filter_FORWARD ct state established accept;"
        "add rule inet firewalld filter_FORWARD counter reject",
        True,
    ),
    (
        "inet f c",
        "add chain inet f c { type filter hook forward priority 0; }; add rule inet f c counter log drop",
        True,
    ),
    (
        "inet f c",
        "add chain inet f c { type filter hook forward priority 0; }; add rule inet f c tcp dport 1 drop",
        False,
    ),
    ("inet f c", "add chain inet f c { type filter hook forward priority 0; }; add rule inet f c accept", False),
    ("inet f c", "add chain inet f c { type filter hook input priority 0; policy drop; }", False),
    ("bridge f c", "add chain bridge f c { type filter hook forward priority 0; policy drop; }", False),
]


def test_chains_that_are_closed_to_what_is_forwarded_are_found(peer: Callable[[str], str]) -> None:
    nft = peer("nft")
    for chain, script, closed in FIREWALLS:
        family, table, name = chain.split()
        with netns.anonymous() as place, netns.inside(place):
            subprocess.run([nft, f"add table {family} {table}; {script}"], check=True)
            found = [of.words for of in closed_chains()]
        assert found == ([f"chain {name} of the nftables table {family} {table}"] if closed else []), script


def test_a_closed_forward_chain_is_named_where_something_is_forwarded(two: Network, peer: Callable[[str], str]) -> None:
    with netns.inside(two["server"]):
        subprocess.run([peer("nft"), f"add table ip filter; {FIREWALLS[0][1]}"], check=True)
    forward = {
        "name": "forward",
        "addr": ":81",
        "handler": {"type": "tcp", "metadata": {"engine": "kernel"}},
        "listener": {"type": "tcp"},
        "forwarder": {"nodes": [{"name": "t", "addr": "192.0.2.1:80"}]},
    }
    tun = ("-L", "tun://:8421?net=192.168.123.1/24&masquerade=true", "-L", "socks5://:1080")
    report, _ = examined(two, "-C", json.dumps({"services": [forward]}), *tun, place="server")
    first, second = report["hindrances"]
    assert first.startswith("service forward: what comes to port 81 is forwarded by this host, and chain FORWARD of")
    assert "what peers send to other networks" in second


def test_low_ports_are_tried(two: Network, peer: Callable[[str], str]) -> None:
    def state(*words: str) -> tuple[str, list[str], int]:
        bounds = "--bounding-set=-net_bind_service"
        command = [peer("setpriv"), bounds, sys.executable, "-m", "gostnet", "doctor", "--json", *words]
        with Process(command, two["client"]) as process:
            status = process.wait(30)
            (found,) = [of for of in json.loads(process.output)["capabilities"] if of["name"] == "low-ports"]
            return found["state"], found["neededBy"], status

    assert state("-L", "socks5://:1023", "-L", "socks5://:1024") == ("no", ["service-0"], 1)
    write_sysctl(two["client"], "net.ipv4.ip_unprivileged_port_start", 0)
    assert state("-L", "socks5://:1023")[0] == "yes"


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
