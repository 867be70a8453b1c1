"""UDP ASSOCIATE and UDP over TCP, in a service on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.errors import BypassDenied, DialRefused, GostnetError
from gostnet.core.flow import Flow, Network
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.router import ServiceRouter
from gostnet.testing import datagrams_pair
from gostnet.testing.memory import MemoryDatagrams
from gostnet.wire.socks_addr import decode_address, encode_address
from gostnet.wire.udp_frames import encode_tun_frames

from ..vectors import Names, Peer, UdpPeer, closed_port, echo_server, router, served
from .kit import Failing, Observed, opened, request

ASSOCIATE, UDP_TUN = 0x03, 0xF3
ZERO = Endpoint("0.0.0.0", 0)


def packet(data: bytes, target: Endpoint, frag: int = 0) -> bytes:
    return bytes((0, 0, frag)) + encode_address(target) + data


async def associate(address: Endpoint) -> tuple[Peer, Endpoint]:
    """Return the control connection and the address that the handler names."""
    peer = await Peer.connect(address)
    await peer.send(b"\x05\x01\x00" + request(ASSOCIATE, ZERO))
    size = 22 if ":" in address.host else 10
    reply = await peer.exactly(2 + size)
    assert reply[:5] == b"\x05\x00\x05\x00\x00", reply
    return peer, decode_address(reply[5:])


class Way:
    """A way out whose associations are the test's."""

    def __init__(self) -> None:
        self.inside: MemoryDatagrams | None = None

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        raise AssertionError("nobody connects")

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        assert target is None
        assert flow.network == "udp"
        outside, self.inside = datagrams_pair()
        return outside

    async def next(self) -> list[tuple[bytes, Endpoint]]:
        assert self.inside is not None
        return [(bytes(datagram.data), datagram.peer) for datagram in await self.inside.receive()]


# ---- UDP ASSOCIATE ------------------------------------------------------------------------------
def test_datagrams_go_to_their_targets_and_back() -> None:
    async def main() -> None:
        handler = Observed(udp=True)
        async with echo_server() as one, echo_server() as two, served(handler) as address:
            control, relay = await associate(address)
            with control, UdpPeer() as client:
                assert relay.host == "127.0.0.1", "the client's own way to the proxy"
                for port in (one, two, one):
                    target = Endpoint("127.0.0.1", port)
                    await client.send(packet(b"hello", target), relay)
                    assert await client.receive() == (packet(b"hello", target), relay)
            flow, error = await handler.end()
            assert error is None
            assert flow.connected
            assert flow.network == "udp"
            assert flow.packets == 6
            assert (flow.meter.up, flow.meter.down) == (15, 15)

    run(main())


def test_names_are_resolved_for_each_datagram_and_answers_come_from_addresses() -> None:
    async def main() -> None:
        names = Names()
        async with echo_server() as port, served(Observed(udp=True), ServiceRouter(Direct(names))) as address:
            control, relay = await associate(address)
            with control, UdpPeer() as client:
                for name in ("nowhere.example", "localhost"):
                    await client.send(packet(b"hi", Endpoint(name, port)), relay)
                assert await client.receive() == (packet(b"hi", Endpoint("127.0.0.1", port)), relay)
        assert names.asked == ["nowhere.example", "localhost"]

    run(main())


def test_ipv6_clients_and_targets() -> None:
    async def main() -> None:
        async with echo_server("::1") as port, served(Observed(udp=True), host="::1") as address:
            control, relay = await associate(address)
            with control, UdpPeer("::1") as client:
                assert relay.host == "::1"
                target = Endpoint("::1", port)
                await client.send(packet(b"six", target), relay)
                assert await client.receive() == (packet(b"six", target), relay)

    run(main())


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 60_000])
def test_datagrams_of_every_size_are_passed_on_whole(size: int) -> None:
    """GOST cuts at 4096."""

    async def main() -> None:
        async with echo_server() as port, served(Observed(udp=True)) as address:
            control, relay = await associate(address)
            with control, UdpPeer() as client:
                sent = packet(bytes(size), Endpoint("127.0.0.1", port))
                await client.send(sent, relay)
                assert await client.receive() == (sent, relay)

    run(main())


ODD = [
    b"",
    b"\0",
    b"\0\0\0",
    b"\0\0\0\x01\x7f\0\0",
    b"\0\0\0\x02\x7f\0\0\x01\0\x50data",
    b"\0\0\0\x03\xffshort",
    b"\0\0\0\x03\x02\xff\xfe\0\x50data",
    b"\0\0\0\x03\x03a\nb\0\x50data",
    b"\0\0\0\x03\x00\0\x50data",
    packet(b"no port", Endpoint("127.0.0.1", 0)),
    packet(b"no route", Endpoint("240.0.0.1", 9)),
    packet(b"broadcast", Endpoint("255.255.255.255", 9)),
    packet(b"no such name", Endpoint("nowhere.example", 9)),
]


def test_no_single_datagram_ends_the_association() -> None:
    """GOST's client-to-target direction dies of the first of these."""

    async def main() -> None:
        async with echo_server() as port, served(Observed(udp=True)) as address:
            control, relay = await associate(address)
            with control, UdpPeer() as client:
                closed = packet(b"nobody", Endpoint("127.0.0.1", closed_port()))
                for odd in (*ODD, closed, closed):
                    await client.send(odd, relay)
                    good = packet(b"good", Endpoint("127.0.0.1", port))
                    await client.send(good, relay)
                    assert await client.receive() == (good, relay), odd

    run(main())


def test_only_the_address_of_the_client_is_listened_to() -> None:
    async def main() -> None:
        way = Way()
        async with served(Observed(udp=True), way) as address:
            control, relay = await associate(address)
            with control, UdpPeer("127.0.0.2") as stranger, UdpPeer() as client:
                await stranger.send(packet(b"let me in", Endpoint("192.0.2.1", 53)), relay)
                await client.send(packet(b"mine", Endpoint("192.0.2.1", 53)), relay)
                assert [data for data, _ in await way.next()] == [b"mine"]

    run(main())


def test_answers_go_to_the_port_that_sent_last() -> None:
    async def main() -> None:
        way = Way()
        source = Endpoint("192.0.2.2", 443)  # what the pair says for its other end
        async with served(Observed(udp=True), way) as address:
            control, relay = await associate(address)
            with control, UdpPeer() as first, UdpPeer() as second:
                for client in (first, second, first):
                    await client.send(packet(b"q", Endpoint("192.0.2.1", 53)), relay)
                    await way.next()
                    assert way.inside is not None
                    await way.inside.send([Datagram(b"a", source)])
                    assert await client.receive() == (packet(b"a", source), relay)

    run(main())


def test_answers_before_any_question_have_nowhere_to_go() -> None:
    async def main() -> None:
        way = Way()
        async with served(Observed(udp=True), way) as address:
            control, relay = await associate(address)
            with control, UdpPeer() as client:
                assert way.inside is not None
                await way.inside.send([Datagram(b"unasked", ZERO)])
                await client.send(packet(b"q", Endpoint("192.0.2.1", 53)), relay)
                await way.next()
                await way.inside.send([Datagram(b"asked", ZERO)])
                data, _ = await client.receive()
                assert data.endswith(b"asked")

    run(main())


class Bypass:
    """Refuses one port in UDP."""

    def __init__(self, port: int) -> None:
        self.port = port

    def contains(self, network: Network, target: Endpoint) -> bool:
        return network == "udp" and target.port == self.port


@pytest.mark.parametrize("command", [ASSOCIATE, UDP_TUN])
def test_the_bypass_decides_about_each_datagram(command: int) -> None:
    async def main() -> None:
        async with echo_server() as secret, echo_server() as port:
            bad, good = Endpoint("127.0.0.1", secret), Endpoint("127.0.0.1", port)
            async with served(Observed(udp=True), router(bypass=Bypass(secret))) as address:
                if command == UDP_TUN:
                    with await opened(address, ZERO, UDP_TUN) as peer:
                        await peer.send(encode_tun_frames([(b"no", bad), (b"yes", good)]))
                        answer = encode_tun_frames([(b"yes", good)])
                        assert await peer.exactly(len(answer)) == answer
                    return
                control, relay = await associate(address)
                with control, UdpPeer() as client:
                    await client.send(packet(b"no", bad), relay)
                    await client.send(packet(b"yes", good), relay)
                    assert await client.receive() == (packet(b"yes", good), relay)

    run(main())


def test_the_association_lives_as_long_as_the_control_connection_and_no_longer() -> None:
    async def main() -> None:
        handler = Observed(udp=True)
        way = Way()
        async with served(handler, way) as address:
            control, relay = await associate(address)
            with control, UdpPeer() as client:
                await control.send(b"this means nothing")
                await client.send(packet(b"q", Endpoint("192.0.2.1", 53)), relay)
                assert len(await way.next()) == 1
                control.shut()
                assert await control.rest() == b""
                _, error = await handler.end()
                assert error is None
                assert way.inside is not None
                assert list(await way.inside.receive()) == [], "the way out is closed with it"
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                    again.bind(tuple(relay))  # the port is free

    run(main())


def test_the_control_connection_ends_with_the_way_out() -> None:
    """GOST leaves the client with a connection that carries nothing."""

    async def main() -> None:
        way = Way()
        async with served(Observed(udp=True), way) as address:
            control, _ = await associate(address)
            with control:
                assert way.inside is not None
                way.inside.abort()
                assert await control.rest() == b""

    run(main())


def test_a_service_that_stops_ends_its_associations() -> None:
    async def main() -> None:
        way = Way()
        async with served(Observed(udp=True), way) as address:
            control, relay = await associate(address)
        with control:
            assert await control.rest() == b""
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                again.bind(tuple(relay))

    run(main())


@pytest.mark.parametrize(
    ("public", "told"), [("", "127.0.0.1"), ("203.0.113.9", "203.0.113.9"), ("proxy.example", "127.0.0.1")]
)
def test_the_public_address_is_told_if_it_is_one(public: str, told: str) -> None:
    async def main() -> None:
        async with served(Observed(udp=True, public_addr=public), Way()) as address:
            control, relay = await associate(address)
            with control:
                assert relay.host == told

    run(main())


def test_ports_are_taken_from_the_range_until_it_is_used_up() -> None:
    async def main() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            for _ in range(50):
                taken.close()
                taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                taken.bind(("127.0.0.1", 0))
                low = taken.getsockname()[1]
                if low < 65530 and all(_free(port) for port in range(low + 1, low + 4)):
                    break
            handler = Observed(udp=True, udp_port_min=low, udp_port_max=low + 3)
            with taken:
                async with served(handler, Way()) as address:
                    controls = [await associate(address) for _ in range(3)]
                    assert {relay.port for _, relay in controls} == {low + 1, low + 2, low + 3}
                    with await Peer.connect(address) as peer:
                        await peer.send(b"\x05\x01\x00" + request(ASSOCIATE, ZERO))
                        assert await peer.rest() == bytes.fromhex("0500" + "05010001000000000000")
                    assert "Address already in use" in str(await handler.failure())
                    for control, _ in controls:
                        control.close()

    run(main())


def _free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Hosts:
    """Knows one name."""

    def lookup(self, host: str, family: int = 0) -> list[str]:
        return ["192.0.2.7"] if host == "known.example" else []


@pytest.mark.parametrize("wanted", [False, True])
def test_names_in_answers_become_addresses_where_that_is_asked_for(wanted: bool) -> None:
    class Chain(Way):
        """As a chain whose far end tells names; the router in front has a table of hosts."""

    async def main() -> None:
        way = Chain()
        egress = ServiceRouter(way, hosts=Hosts())
        async with served(Observed(udp=True, udp_resolve_domain=wanted), egress) as address:
            control, relay = await associate(address)
            with control, UdpPeer() as client:
                await client.send(packet(b"q", Endpoint("192.0.2.1", 53)), relay)
                await way.next()
                assert way.inside is not None
                way.inside.local = Endpoint("known.example", 53)
                await way.inside.send([Datagram(b"a", ZERO)])
                source = Endpoint("192.0.2.7" if wanted else "known.example", 53)
                assert await client.receive() == (packet(b"a", source), relay)

    run(main())


def test_names_in_answers_that_nobody_knows_cost_their_datagram_only() -> None:
    async def main() -> None:
        way = Way()
        egress = ServiceRouter(way, resolver=Names())
        async with served(Observed(udp=True, udp_resolve_domain=True), egress) as address:
            control, relay = await associate(address)
            with control, UdpPeer() as client:
                await client.send(packet(b"q", Endpoint("192.0.2.1", 53)), relay)
                await way.next()
                assert way.inside is not None
                for host in ("nowhere.example", "localhost"):
                    way.inside.local = Endpoint(host, 53)
                    await way.inside.send([Datagram(host.encode(), ZERO)])
                assert await client.receive() == (packet(b"localhost", Endpoint("127.0.0.1", 53)), relay)

    run(main())


@pytest.mark.parametrize(("error", "code"), [(DialRefused("no"), 1), (BypassDenied("no"), 2)])
@pytest.mark.parametrize("command", [ASSOCIATE, UDP_TUN])
def test_a_way_out_that_fails_is_replied_to(command: int, error: GostnetError, code: int) -> None:
    """GOST closes a UDP-TUN without a reply then (SK09)."""

    async def main() -> None:
        handler = Observed(udp=True)
        async with served(handler, Failing(error)) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00" + request(command, ZERO))
                assert await peer.rest() == bytes((5, 0, 5, code)) + bytes.fromhex("0001000000000000")
            assert await handler.failure() is error

    run(main())


# ---- UDP over TCP -------------------------------------------------------------------------------
def test_frames_go_to_their_targets_and_back() -> None:
    async def main() -> None:
        handler = Observed(udp=True)
        async with echo_server() as one, echo_server() as two, served(handler) as address:
            with await opened(address, ZERO, UDP_TUN) as peer:
                for batch in (
                    [(b"one", Endpoint("127.0.0.1", one))],
                    [(bytes(60_000), Endpoint("127.0.0.1", two))],
                    [(b"last", Endpoint("127.0.0.1", two))],
                ):
                    frames = encode_tun_frames(batch)
                    await peer.send(frames)
                    assert await peer.exactly(len(frames)) == frames
                peer.shut()
                assert await peer.rest() == b""
            _, error = await handler.end()
            assert error is None

    run(main())


def test_the_reply_tells_the_zero_address_of_the_family_that_was_asked_for() -> None:
    async def main() -> None:
        async with served(Observed(udp=True)) as address:
            for target, size in ((ZERO, 10), (Endpoint("::", 0), 22)):
                with await Peer.connect(address) as peer:
                    await peer.send(b"\x05\x01\x00" + request(UDP_TUN, target))
                    reply = await peer.exactly(2 + size)
                    bound = decode_address(reply[5:])
                    assert bound.host == target.host
                    assert bound.port

    run(main())


def test_odd_frames_cost_themselves_only() -> None:
    async def main() -> None:
        async with echo_server() as port, served(Observed(udp=True)) as address:
            good = encode_tun_frames([(b"good", Endpoint("127.0.0.1", port))])
            odd: Sequence[bytes] = (
                b"\0\0\xff\x01\x7f\0\0\x01" + port.to_bytes(2, "big"),
                b"\0\1\xff\x03\x03a\nb\0\x50Z",
                encode_tun_frames([(b"x", Endpoint("nowhere.example", 9))]),
                encode_tun_frames([(b"x", Endpoint("127.0.0.1", closed_port()))]),
                encode_tun_frames([(b"x", Endpoint("127.0.0.1", 0))]),
            )
            with await opened(address, ZERO, UDP_TUN) as peer:
                for frame in odd:
                    await peer.send(frame + good)
                    assert await peer.exactly(len(good)) == good, frame

    run(main())


def test_a_stream_that_is_no_frames_is_closed() -> None:
    async def main() -> None:
        handler = Observed(udp=True)
        async with served(handler) as address:
            with await opened(address, ZERO, UDP_TUN) as peer:
                await peer.send(b"GET / HTTP/1.1\r\n\r\n")
                assert await peer.rest() == b""
            assert "address type" in str(await handler.failure())

    run(main())


def test_many_at_once_keep_their_answers_apart() -> None:
    async def main() -> None:
        async with echo_server() as port, served(Observed(udp=True)) as address:
            target = Endpoint("127.0.0.1", port)

            async def one(number: int) -> None:
                control, relay = await associate(address)
                with control, UdpPeer() as client:
                    for turn in range(5):
                        data = packet(f"{number}.{turn}".encode(), target)
                        await client.send(data, relay)
                        assert await client.receive() == (data, relay)

            async with asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(one(number))

    run(main())
