"""The kernel's state as text: what it sees, and what it leaves out."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gostnet.kernel import bpf, netns
from gostnet.testing.clients import echo
from gostnet.testing.namespaces import Network, Topology, row, write_sysctl
from gostnet.testing.processes import run_program
from gostnet.testing.servers import serving_in_thread
from gostnet.testing.state import State, await_same, diff, snapshot

pytestmark = pytest.mark.netns


class Place:
    """A namespace with a veth to another, and its state at the start."""

    def __init__(self, network: Network, peer: Callable[[str], str]) -> None:
        self.network = network
        self.name = network["a"]
        self._peer = peer
        self.before: State = snapshot(self.name)

    def ip(self, words: str) -> None:
        run_program([self._peer("ip"), *words.split()], self.name)

    def nft(self, text: str) -> None:
        for _ in range(2):  # a block's end needs a semicolon before another block's end
            text = text.replace("} }", "}; }")
        run_program([self._peer("nft"), text], self.name)

    def changes(self) -> list[str]:
        return diff(self.before, snapshot(self.name))


@pytest.fixture
def place(build: Callable[[Topology], Network], peer: Callable[[str], str]) -> Place:
    return Place(build(row("a", "b")), peer)


@pytest.mark.parametrize(
    ("do", "undo", "seen"),
    [
        ("route add 192.0.2.0/24 via 10.99.1.2", "route del 192.0.2.0/24", "routes: v4 table 254 192.0.2.0/24"),
        (
            "route add local default dev lo table 99 proto 250",
            "route del local default dev lo table 99",
            "routes: v4 table 99 default/0 proto 250",
        ),
        (
            "-6 route add blackhole 2001:db8::/32 table 7",
            "-6 route del blackhole 2001:db8::/32 table 7",
            "routes: v6 table 7 2001:db8::/32",
        ),
        (
            "route add 192.0.2.0/24 nexthop via 10.99.1.2 weight 3 nexthop dev wan0",
            "route del 192.0.2.0/24",
            "multipath [('wan0', 2, '10.99.1.2', None)",
        ),
        ("rule add fwmark 0x1/0xff table 99 pref 77", "rule del pref 77", "fwmark 1 fwmask 255 priority 77"),
        ("-6 rule add iif wan0 table 99 pref 77", "-6 rule del pref 77", "rules: v6 table 99"),
        ("addr add 192.0.2.7/32 dev lo", "addr del 192.0.2.7/32 dev lo", "addresses: lo 192.0.2.7/32"),
        ("link set wan0 mtu 1400", "link set wan0 mtu 1500", "links: wan0 up kind veth mtu 1400"),
        ("link set wan0 promisc on", "link set wan0 promisc off", "promisc"),
        ("link set wan0 group 5", "link set wan0 group 0", "group 5"),
        ("tuntap add dev tun9 mode tun", "tuntap del dev tun9 mode tun", "links: tun9 kind tun"),
    ],
)
def test_change_by_ip_is_seen_and_its_undoing_too(place: Place, do: str, undo: str, seen: str) -> None:
    place.ip(do)
    changes = place.changes()
    assert any(line.startswith("+") and seen in line for line in changes), changes
    place.ip(undo)
    assert await_same(place.before, place.name, timeout=5.0) == []


@pytest.mark.parametrize(
    ("ruleset", "seen"),
    [
        ("table inet t { }", "nft: table inet t"),
        ("table ip t { chain c { } }", "nft: chain ip t c"),
        ("table inet t { chain c { type filter hook forward priority 5; policy drop; } }", "priority 5 type filter"),
        ("table inet t { chain c { tcp dport 443 counter accept; } }", "nft: rule inet t c 1: meta"),
        ("table inet t { set s { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 } } }", "element inet t s"),
        ("table inet t { map m { type inet_service : verdict; elements = { 80 : accept } } }", "nft: set inet t m"),
        ("table inet t { counter k { } }", "nft: object inet t k"),
        ('table inet t { chain c { type filter hook input priority 0; comment "x"; } }', "nft: chain inet t c hook"),
        ("table netdev t { chain c { type filter hook ingress device wan0 priority 0; } }", "dev wan0"),
        ("table bridge t { chain c { } }", "nft: table bridge t"),
        ("table arp t { chain c { } }", "nft: table arp t"),
    ],
)
def test_change_by_nft_is_seen_and_its_undoing_too(place: Place, ruleset: str, seen: str) -> None:
    place.nft(ruleset)
    changes = place.changes()
    assert any(seen in line for line in changes), changes
    place.nft("flush ruleset")
    assert place.changes() == []


def test_order_of_rules_counts_and_counters_do_not(place: Place) -> None:
    ruleset = (
        "table inet t { chain c { type filter hook output priority 0; counter; tcp dport 1 drop; udp dport 2 drop; } }"
    )
    place.nft(ruleset)
    before = snapshot(place.name)
    target_place, target = place.network["b"], place.network.address("b")
    with serving_in_thread(target_place, [target]) as servers:
        echo(place.name, servers.endpoint("echo/tcp"), b"counted")
    assert diff(before, snapshot(place.name)) == []
    place.nft("flush ruleset")
    place.nft(ruleset.replace("tcp dport 1 drop; udp dport 2 drop;", "udp dport 2 drop; tcp dport 1 drop;"))
    assert len(diff(before, snapshot(place.name))) == 4


def test_sysctls_and_files_are_seen(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    before = snapshot(place.name, files=[str(path)])
    path.write_text("nameserver 192.0.2.1\n")
    write_sysctl(place.name, "net/ipv4/conf/wan0/accept_local", 1)
    changes = diff(before, snapshot(place.name, files=[str(path)]))
    assert "- sysctls: net/ipv4/conf/wan0/accept_local = 0" in changes
    assert "+ sysctls: net/ipv4/conf/wan0/accept_local = 1" in changes
    assert f"- files: {path}: No such file or directory" in changes
    assert f"+ files: {path}: b'nameserver 192.0.2.1\\n'" in changes
    assert len(changes) == 4


def test_snapshot_works_while_a_loop_runs_and_in_any_thread(place: Place) -> None:
    found: list[State] = []
    thread = threading.Thread(target=lambda: found.append(snapshot(place.name)))
    thread.start()
    thread.join()
    assert diff(place.before, found[0]) == []


def test_snapshot_of_many_routes_is_whole(place: Place) -> None:
    batch = "\n".join(f"route add blackhole 10.{i // 256}.{i % 256}.0/24 table 9" for i in range(3000))
    file = Path(f"/tmp/{place.name}.routes")
    file.write_text(batch)
    try:
        place.ip(f"-batch {file}")
    finally:
        file.unlink()
    assert sum("table 9 " in line for line in snapshot(place.name).sections["routes"]) == 3000


def test_await_same_waits_for_the_undoing(place: Place) -> None:
    with netns.socket_in(place.name, socket.AF_INET, socket.SOCK_DGRAM):
        place.ip("route add 192.0.2.0/24 via 10.99.1.2")
        assert await_same(place.before, place.name, timeout=0.0) != []
        timer = threading.Timer(0.1, place.ip, ["route del 192.0.2.0/24"])
        timer.start()
        assert await_same(place.before, place.name, timeout=10.0) == []
        timer.join()


@pytest.mark.skipif(bool(bpf.attachment_problem()), reason=bpf.attachment_problem() or "tcx is there")
def test_linked_program_is_seen_and_its_end_too(place: Place) -> None:
    code = bpf.Assembly()
    code.leave(bpf.Verdict.NEXT)
    with netns.inside(place.name), bpf.load(code, "seen") as program:
        link = program.attach("wan0", bpf.Direction.INGRESS)
    with link:
        (line,) = place.changes()
        assert line.startswith("+ bpf: wan0 ingress program ")
    assert not place.changes()
