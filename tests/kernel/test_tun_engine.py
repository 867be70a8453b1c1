"""The engine's programs on made-up frames, and its maps; traffic is in netns-tests/test_tun_engine.py."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import KernelError
from gostnet.core.packets import Way
from gostnet.core.resources import Address, Link, Route
from gostnet.kernel import netns, tun_engine, tun_programs
from gostnet.kernel.bpf import Assembly, Direction, Verdict, attached, attachment_problem
from gostnet.kernel.netlink import RouteNetlink
from gostnet.kernel.tun_engine import TunEngine
from gostnet.kernel.tun_programs import ENDS, TAKES
from gostnet.testing import netlink as testing_netlink

pytestmark = pytest.mark.skipif(bool(attachment_problem()), reason=attachment_problem() or "programs can be attached")

PORT = 8421
PEER = Endpoint("10.0.0.2", 5000)
OTHER = Endpoint("10.0.0.3", 5000)
PEER6 = Endpoint("2001:db8::2", 5000)
OTHER6 = Endpoint("2001:db8::3", 5000)
OURS = {4: "10.0.0.1", 6: "2001:db8::1"}

OVER = pytest.mark.parametrize(("peer", "other"), [(PEER, OTHER), (PEER6, OTHER6)], ids=["over-ipv4", "over-ipv6"])


@pytest.fixture
def place() -> Iterator[netns.Namespace]:
    """A namespace with a TUN device and an Ethernet device, both up."""
    from gostnet.core.packets import Medium
    from gostnet.dataplane.tun_device import open_device

    with netns.anonymous() as namespace, netns.inside(namespace):
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            pytest.skip("/dev/net/tun cannot be used")
        fds = [open_device("vpn0")[0], open_device("eth7", Medium.ETHERNET)[0]]
        with RouteNetlink() as kernel:
            kernel.put_link(Link("vpn0", 1420))
            kernel.put_link(Link("eth7", 1500))
            kernel.put_address(Address("eth7", "10.0.0.1/24"))
            kernel.put_address(Address("eth7", "2001:db8::1/64"))
        yield namespace
        for fd in fds:
            os.close(fd)


def inner4(source: str, destination: str, payload: bytes = b"x" * 30) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, 253, 0)
    return head + ip_address(source).packed + ip_address(destination).packed + payload


def inner6(source: str, destination: str, payload: bytes = b"x" * 30) -> bytes:
    head = struct.pack(">IHBB", 6 << 28, len(payload), 253, 64)
    return head + ip_address(source).packed + ip_address(destination).packed + payload


def frame(
    inner: bytes,
    *,
    peer: Endpoint = PEER,
    to: str = "",
    port: int = PORT,
    checksum: int = 0,
    fragment: int = 0x4000,
    protocol: int = 17,
    version: int = 0x45,
) -> bytes:
    """Return what a peer sends; `fragment` and `version` for IPv4 only."""
    to = to or OURS[6 if ":" in peer.host else 4]
    udp = struct.pack(">HHHH", peer.port, port, 8 + len(inner), checksum)
    ends = ip_address(peer.host).packed + ip_address(to).packed
    if ":" in peer.host:
        return (
            bytes(12) + b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, 8 + len(inner), protocol, 64) + ends + udp + inner
        )
    head = struct.pack(">BBHHHBBH", version, 0, 28 + len(inner), 0, fragment, 64, protocol, 0)
    return bytes(12) + b"\x08\0" + head + ends + udp + inner


@OVER
def test_what_a_peer_has_sent_this_way_is_stripped_and_counted(
    place: netns.Namespace, peer: Endpoint, other: Endpoint
) -> None:
    with TunEngine("vpn0", PORT) as engine:
        assert engine.learn([ip_address("192.168.0.2"), ip_address("fd00::2")], peer, takes=True)
        for inner in (inner4("192.168.0.2", "192.168.0.1"), inner6("fd00::2", "fd00::1")):
            verdict, left = engine._receiver.run(frame(inner, peer=peer))
            assert verdict == Verdict.REDIRECT
            assert left[14:] == inner
            assert engine.moved() == (0, len(inner))


REFUSED = {
    "from a stranger": frame(inner4("192.168.0.2", "192.168.0.1"), peer=OTHER),
    "from another port": frame(inner4("192.168.0.2", "192.168.0.1"), peer=Endpoint(PEER.host, 5001)),
    "to another port": frame(inner4("192.168.0.2", "192.168.0.1"), port=PORT + 1),
    "to another host": frame(inner4("192.168.0.2", "192.168.0.1"), to="10.0.0.9"),
    "from a socket": frame(inner4("192.168.0.2", "192.168.0.1"), checksum=0x1234),
    "a fragment": frame(inner4("192.168.0.2", "192.168.0.1"), fragment=0x2000),
    "a later fragment": frame(inner4("192.168.0.2", "192.168.0.1"), fragment=5),
    "TCP": frame(inner4("192.168.0.2", "192.168.0.1"), protocol=6),
    "options outside": frame(inner4("192.168.0.2", "192.168.0.1"), version=0x46),
    "a registration": frame(b"GOST" + bytes(32)),
    "no packet": frame(b"\xff" * 60),
    "a wrong length": frame(inner4("192.168.0.2", "192.168.0.1") + b"more"),
    "a wrong length of IPv6": frame(inner6("fd00::2", "fd00::1")[:-1]),
    "too short": frame(b"\x45" + bytes(10)),
    "ARP": bytes(12) + b"\x08\x06" + bytes(60),
    "IPv6 outside": bytes(12) + b"\x86\xdd" + inner6("fd00::2", "fd00::1"),
    "from a stranger by IPv6": frame(inner4("192.168.0.2", "192.168.0.1"), peer=OTHER6),
    "from another port by IPv6": frame(inner4("192.168.0.2", "192.168.0.1"), peer=Endpoint(PEER6.host, 5001)),
    "to another port by IPv6": frame(inner4("192.168.0.2", "192.168.0.1"), peer=PEER6, port=PORT + 1),
    "to another host by IPv6": frame(inner4("192.168.0.2", "192.168.0.1"), peer=PEER6, to="2001:db8::9"),
    "from a socket by IPv6": frame(inner4("192.168.0.2", "192.168.0.1"), peer=PEER6, checksum=0x1234),
    "a fragment by IPv6": frame(inner4("192.168.0.2", "192.168.0.1"), peer=PEER6, protocol=44),
    "a registration by IPv6": frame(b"GOST" + bytes(32), peer=PEER6),
    "a wrong length by IPv6": frame(inner6("fd00::2", "fd00::1") + b"more", peer=PEER6),
    "too short by IPv6": frame(b"\x45" + bytes(10), peer=PEER6),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_everything_else_is_left_alone(place: netns.Namespace, refused: bytes) -> None:
    with TunEngine("vpn0", PORT) as engine:
        assert engine.learn([ip_address("192.168.0.2"), ip_address("fd00::2")], PEER, takes=True)
        assert engine.learn([ip_address("192.168.0.3"), ip_address("fd00::3")], PEER6, takes=True)
        assert engine._receiver.run(refused) == (Verdict.NEXT, refused)
        assert engine.moved() == (0, 0)


@OVER
def test_sources_are_checked_where_that_is_asked_for(place: netns.Namespace, peer: Endpoint, other: Endpoint) -> None:
    ways = [Way(ip_network("10.1.0.0/16"), ip_address("192.168.0.2"))]
    with TunEngine("vpn0", PORT, strict=True, ways=ways) as engine:
        assert engine.learn([ip_address("192.168.0.2"), ip_address("fd00::2")], peer, takes=True)
        assert engine.learn([ip_address("192.168.0.3")], other, takes=True)
        run = engine._receiver.run
        for good in ("192.168.0.2", "10.1.2.3"):
            assert run(frame(inner4(good, "192.168.0.1"), peer=peer))[0] == Verdict.REDIRECT
        assert run(frame(inner6("fd00::2", "fd00::1"), peer=peer))[0] == Verdict.REDIRECT
        for bad in ("192.168.0.3", "192.168.0.9", "10.2.2.3"):
            assert run(frame(inner4(bad, "192.168.0.1"), peer=peer))[0] == Verdict.DROP
        assert run(frame(inner6("fd00::3", "fd00::1"), peer=peer))[0] == Verdict.DROP
        # An address that another peer registers is that one's from then on.
        assert engine.learn([ip_address("192.168.0.2")], other, takes=True)
        assert run(frame(inner4("192.168.0.2", "192.168.0.1"), peer=peer))[0] == Verdict.DROP
        engine.forget(ip_address("fd00::2"))
        assert run(frame(inner6("fd00::2", "fd00::1"), peer=peer))[0] == Verdict.DROP


def test_a_link_local_peer_is_known_by_its_device_too(place: netns.Namespace) -> None:
    index = socket.if_nametoindex("eth7")
    with TunEngine("vpn0", PORT) as engine:
        peer = Endpoint(f"fe80::2%{index}", 5000)
        assert engine.learn([ip_address("192.168.0.2")], peer, takes=True, source=f"fe80::1%{index}")
        (ends,) = engine._counts.keys()
        assert ends == ENDS.pack(ip_address("fe80::2").packed, b"\x13\x88", index, ip_address("fe80::1").packed)
        assert engine.learn([ip_address("192.168.0.2")], Endpoint("fe80::2%eth7", 5000), takes=True, source="fe80::1")
        assert not engine.learn([], Endpoint("fe80::2%99", 5000), takes=True, source="fe80::1")
        # A test run's packets come in by the loopback device.
        assert (
            engine._receiver.run(frame(inner4("192.168.0.2", "1.1.1.1"), peer=Endpoint("fe80::2", 5000), to="fe80::1"))[
                0
            ]
            == Verdict.NEXT
        )


@pytest.mark.parametrize("over", [4, 6])
def test_packets_that_do_not_fit_are_left_to_the_pump(place: netns.Namespace, over: int) -> None:
    with TunEngine("vpn0", PORT) as engine:
        assert engine.learn([ip_address("192.168.0.2")], PEER if over == 4 else PEER6, takes=True)
        ((_, route),) = engine._routes.items()
        assert tun_programs.ROUTE.unpack(route)[2] == 1500 - {4: 20, 6: 40}[over] - 8


def test_a_peer_may_come_by_the_other_ip_version(place: netns.Namespace) -> None:
    inner = inner4("192.168.0.2", "192.168.0.1")
    with TunEngine("vpn0", PORT) as engine:
        for peer, before in ((PEER, PEER6), (PEER6, PEER), (PEER, PEER6)):
            assert engine.learn([ip_address("192.168.0.2")], peer, takes=True)
            assert list(engine.peers) == [peer]
            assert engine._receiver.run(frame(inner, peer=peer))[0] == Verdict.REDIRECT
            assert engine._receiver.run(frame(inner, peer=before))[0] == Verdict.NEXT
        assert engine.moved() == (0, 3 * len(inner))


def test_what_was_counted_stays_when_our_address_changes(place: netns.Namespace) -> None:
    inner = inner4("192.168.0.2", "192.168.0.1")
    with TunEngine("vpn0", PORT) as engine:
        for ours in ("10.0.0.1", "10.0.0.9", "10.0.0.1"):
            assert engine.learn([ip_address("192.168.0.2")], PEER, takes=True, source=ours)
            assert engine._receiver.run(frame(inner, to=ours))[0] == Verdict.REDIRECT
        assert len(engine._counts.keys()) == 1
        assert engine.moved() == (0, 3 * len(inner))


def test_an_address_whose_new_peer_cannot_be_served_leads_nowhere(place: netns.Namespace) -> None:
    for single in (False, True):
        with TunEngine("vpn0", PORT, single=single) as engine:
            assert engine.learn([ip_address("192.168.0.2")], PEER, takes=True)
            assert not engine.learn([ip_address("192.168.0.2")], Endpoint("127.0.0.1", 1), takes=True)
            assert "no way to 127.0.0.1" in engine.reason
            assert engine._routes.keys() == []


def test_packets_go_to_a_peer_that_has_not_asked_only_by_a_network_card(place: netns.Namespace) -> None:
    """The device here is a TAP, behind which is another machine of this host: its packets have no checksums."""
    with TunEngine("vpn0", PORT) as engine:
        for takes, sent in ((False, 0), (True, TAKES)):
            assert engine.learn([ip_address("192.168.0.2")], PEER, takes=takes, anyway=True)
            ((_, route),) = engine._routes.items()
            assert tun_programs.ROUTE.unpack(route)[3] == sent


def test_programs_that_are_taken_off_are_noticed(place: netns.Namespace) -> None:
    with TunEngine("vpn0", PORT) as engine:
        assert engine.learn([ip_address("192.168.0.2")], PEER, takes=True)
        index = socket.if_nametoindex("eth7")
        engine._links[index].detach()
        assert attached(index, Direction.INGRESS) == []
        assert engine.learn((), PEER, takes=True)
        assert len(attached(index, Direction.INGRESS)) == 1
        assert engine.problem() == ""
        engine._sender.detach()
        assert engine.problem() == "its program has been taken off the device"


def test_a_peer_that_is_forgotten_is_a_stranger_and_what_it_moved_still_counts(place: netns.Namespace) -> None:
    with TunEngine("vpn0", PORT) as engine:
        engine.learn([ip_address("192.168.0.2")], PEER, takes=True)
        packet = inner4("192.168.0.2", "192.168.0.1")
        engine._receiver.run(frame(packet))
        engine.forget_peer(PEER)
        engine.forget_peer(PEER)
        assert engine._receiver.run(frame(packet))[0] == Verdict.NEXT
        assert engine.moved() == (0, len(packet))
        assert engine.moved() == (0, 0)
        assert list(engine.peers) == []
        assert engine._routes.keys() == engine._counts.keys() == []


def test_a_peer_without_addresses_goes_when_another_takes_them(place: netns.Namespace) -> None:
    with TunEngine("vpn0", PORT) as engine:
        engine.learn([ip_address("192.168.0.2")], PEER, takes=True)
        engine.learn([ip_address("192.168.0.2")], OTHER, takes=False)
        assert list(engine.peers) == [OTHER]
        assert len(engine._routes.keys()) == len(engine._counts.keys()) == 1


def test_the_one_peer_of_a_point_to_point_service(place: netns.Namespace) -> None:
    with TunEngine("vpn0", PORT, single=True, strict=True) as engine:
        for peer in (PEER, OTHER):
            assert engine.learn([], peer, takes=True)
            assert list(engine.peers) == [peer]
            assert engine._routes.keys() == [bytes(20)]
        assert engine._receiver.run(frame(inner4("1.2.3.4", "5.6.7.8"), peer=OTHER))[0] == Verdict.REDIRECT
        assert engine._receiver.run(frame(inner4("1.2.3.4", "5.6.7.8")))[0] == Verdict.NEXT
        engine.forget_peer(OTHER)
        assert engine._routes.keys() == []


def test_which_peers_are_served(place: netns.Namespace) -> None:
    with RouteNetlink() as kernel:
        kernel.put_route(Route("10.9.0.0/16", device="vpn0"))
    with TunEngine("vpn0", PORT) as engine:
        addresses = [ip_address("192.168.0.2")]
        assert engine.learn(addresses, PEER, takes=True)
        for host in ("::1", "127.0.0.1", "10.9.1.1", "203.0.113.1"):  # this host, in the tunnel, no way
            assert not engine.learn(addresses, Endpoint(host, 1), takes=True), host
        assert list(engine.peers) == [PEER]


@pytest.mark.parametrize("single", [False, True])
def test_a_peer_that_cannot_be_reached_is_still_heard(place: netns.Namespace, single: bool) -> None:
    """It does not know, and goes on sending; once there is a way again packets go there again."""
    with TunEngine("vpn0", PORT, single=single) as engine, RouteNetlink() as kernel:
        addresses = [ip_address("192.168.0.2")]
        assert engine.learn(addresses, PEER, takes=True)
        routes = dict(engine._routes.items())
        kernel.put_route(Route(f"{PEER.host}/32", device="vpn0"))
        assert not engine.learn((), PEER, takes=True)
        assert [tun_programs.ROUTE.unpack(value)[3] for value in dict(engine._routes.items()).values()] == [0]
        assert engine._receiver.run(frame(inner4("192.168.0.2", "192.168.0.1")))[0] == Verdict.REDIRECT
        kernel.drop_route(Route(f"{PEER.host}/32", device="vpn0"))
        assert engine.learn((), PEER, takes=True)
        assert dict(engine._routes.items()) == routes


def test_full_maps_leave_peers_to_the_pump(place: netns.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun_engine, "MOST_PEERS", 1)
    with TunEngine("vpn0", PORT) as engine:
        assert engine.learn([ip_address("192.168.0.2")], PEER, takes=True)
        assert not engine.learn([ip_address("192.168.0.3")], OTHER, takes=True)
        assert list(engine.peers) == [PEER]


def test_why_it_cannot_be_had_is_said_and_nothing_stays(
    place: netns.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(KernelError, match="missing0"):
        TunEngine("missing0", PORT)
    monkeypatch.setattr(tun_engine, "attachment_problem", lambda: "no programs here")
    with pytest.raises(KernelError, match="no programs here"):
        TunEngine("vpn0", PORT)
    assert sorted(os.listdir("/proc/self/fd")) == before
    with testing_netlink.Netlink(testing_netlink.ROUTE):
        assert socket.if_nametoindex("vpn0")


@pytest.mark.parametrize("which", ["sending", "receiving"])
def test_a_program_that_the_kernel_refuses_is_told_and_nothing_stays(
    place: netns.Namespace, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    def wrong(*_: object, **__: object) -> Assembly:
        code = Assembly()
        code.leave()  # without an answer
        return code

    monkeypatch.setattr(tun_engine, which, wrong)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(KernelError, match="the verifier says"):
        TunEngine("vpn0", PORT)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert attached(socket.if_nametoindex("vpn0"), Direction.EGRESS) == []
