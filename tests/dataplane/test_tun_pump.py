"""The pump in C between a device and a UDP socket. The device is a pair of sockets, the test is the kernel."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.batches import SOL_UDP, UDP_SEGMENT
from gostnet.core.errors import ConnError
from gostnet.core.packets import Way
from gostnet.core.tasks import Scope, run
from gostnet.core.udp_socket import UdpSocket, listen_udp
from gostnet.dataplane.native import library, tun_pump
from gostnet.dataplane.native.tun_pump import SERVER, SINGLE, STRICT, Counts, TunPump
from gostnet.dataplane.tcp_runs import PLAIN
from gostnet.dataplane.tun_device import TunDevice

from .segments import ENDS, TIMESTAMPS, checksum, payload_of, segment, train, valid

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=library.load()[1] or "the library is there")

VERSIONS = pytest.mark.parametrize("version", [4, 6])
NEEDS_CSUM = 1
GSO = {4: 1, 6: 4}
FIN, PUSH, ACK, CWR = 0x01, 0x08, 0x10, 0x80
DATAGRAM, SEGMENTS, STREAM = socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM


def virtio(kind: int = 0, size: int = 0, start: int = 0, *, flags: int = 0, header: int = 0, offset: int = 0) -> bytes:
    return struct.pack("=BBHHHH", flags, kind, header, size, start, offset)


def address(text: str) -> bytes:
    return ip_address(text).packed


class Kernel:
    """The far end of the device."""

    def __init__(self) -> None:
        self.sock, self.near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (self.sock, self.near):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.sock.settimeout(5)
        self.near.setblocking(False)

    def route(self, packet: bytes, header: bytes = PLAIN) -> None:
        """Let the device have a packet."""
        self.sock.send(header + packet)

    def take(self) -> tuple[bytes, bytes]:
        """Return what has been written to the device: header and packet."""
        data = self.sock.recv(70000)
        return data[:10], data[10:]

    def nothing(self) -> bool:
        self.sock.settimeout(0)
        try:
            return not self.sock.recv(70000)
        except BlockingIOError:
            return True
        finally:
            self.sock.settimeout(5)


class Peer:
    """A UDP socket on loopback, closed behind each test."""

    open: ClassVar[list[Peer]] = []

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.sock.bind((host, 0))
        self.sock.settimeout(5)
        self.open.append(self)

    @property
    def name(self) -> Any:
        return self.sock.getsockname()

    def send(self, to: Any, packets: Iterable[bytes]) -> None:
        """Send packets of one size as a train, the last one may be shorter."""
        packets = list(packets)
        control = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", len(packets[0])))] if len(packets) > 1 else []
        self.sock.sendmsg([b"".join(packets)], control, 0, to)

    def take(self, count: int = 1) -> list[bytes]:
        return [self.sock.recv(70000) for _ in range(count)]


class Place:
    """A pump with its two ends."""

    def __init__(self, kernel: Kernel, device: TunDevice, carrier: UdpSocket, pump: TunPump) -> None:
        self.kernel = kernel
        self.device = device
        self.carrier = carrier
        self.pump = pump
        self.address = carrier.sock.getsockname()

    async def counted(self, wanted: Callable[[Counts], bool]) -> Counts:
        """Return the counts once they are as wanted: the thread counts behind what it does."""
        for _ in range(5000):
            if wanted(counts := self.pump.counts()):
                return counts
            await asyncio.sleep(0.001)
        raise AssertionError(str(counts))


@asynccontextmanager
async def pumping(
    flags: int = SERVER, ways: Iterable[Way] = (), *, server: Peer | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Place]:
    """Yield a pump that is a server, or a client of `server`."""
    found, reason = library.load()
    assert found is not None, reason
    kernel = Kernel()
    if server is not None:
        sock = socket.socket(server.sock.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.connect(server.name)
        carrier = UdpSocket(sock, peer=Endpoint.from_sockaddr(server.name))
    else:
        carrier = UdpSocket(listen_udp(Endpoint(host, 0)))
    device = TunDevice(os.dup(kernel.near.fileno()), "fake", 1400, joins=True)
    kernel.near.close()
    pump = TunPump(found, device, carrier, flags, ways)
    try:
        yield Place(kernel, device, carrier, pump)
    finally:
        pump.close()
        device.abort()
        carrier.abort()
        kernel.sock.close()


@pytest.fixture(autouse=True)
def offload(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A pair of sockets has no offload; what was asked of it is noted."""
    asked: list[int] = []

    def ask(_: int, features: int) -> bool:
        asked.append(features)
        return True

    monkeypatch.setattr(tun_pump, "set_offload", ask)
    yield asked
    while Peer.open:
        Peer.open.pop().sock.close()


def aloud(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine as a test."""
    import functools
    import inspect

    @functools.wraps(test)
    def wrapped(**arguments: Any) -> None:
        run(test(**arguments))

    wrapped.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return wrapped


# ---- where packets go ------------------------------------------------------------------------------
def plain(destination: str, payload: bytes = b"x" * 30, source: str = "") -> bytes:
    """Return a packet of an experimental protocol."""
    there = address(destination)
    here = address(source or ("10.9.9.9" if len(there) == 4 else "fd09::9"))
    if len(there) == 4:
        return b"\x45\0" + (20 + len(payload)).to_bytes(2, "big") + bytes(4) + b"\x40\xfd\0\0" + here + there + payload
    return b"\x60\0\0\0" + len(payload).to_bytes(2, "big") + b"\xfd\x40" + here + there + payload


@aloud
async def test_packets_go_to_the_peer_that_has_their_destination() -> None:
    ways = [
        Way(ip_network("10.1.0.0/16"), ip_address("10.0.0.2")),
        Way(ip_network("10.1.128.0/17"), ip_address("10.0.0.3")),
        Way(ip_network("10.1.128.4/32"), ip_address("10.0.0.4")),
        Way(ip_network("fd00::/15"), ip_address("fd00::2")),
        Way(ip_network("10.7.0.0/16")),
    ]
    one, two = Peer(), Peer()
    async with pumping(ways=ways) as place:
        pump, kernel = place.pump, place.kernel
        for text in ("10.0.0.2", "fd00::2"):
            assert pump.learn(address(text), one.name)
        assert pump.learn(address("10.0.0.3"), two.name)
        # To the first, to the second, and to nobody: a network whose peer is not there, another IP version's form.
        wanted: list[tuple[Peer | None, str]] = [
            (one, "10.0.0.2"), (one, "10.1.2.3"), (two, "10.1.200.1"), (None, "10.1.128.4"), (None, "10.7.0.1"),
            (None, "10.0.0.9"), (one, "fd00::2"), (one, "fd00:ffff::1"), (None, "fd02::1"), (None, "::ffff:10.0.0.2"),
            (two, "10.0.0.3"), (one, "10.0.0.2"),
        ]  # fmt: skip
        for number, (_, destination) in enumerate(wanted):
            kernel.route(plain(destination, bytes([number]) * (30 + number)))
        for peer in (one, two):
            for number, (owner, destination) in enumerate(wanted):
                if owner is peer:
                    assert peer.take() == [plain(destination, bytes([number]) * (30 + number))]
        sizes = [len(plain(to)) + number for number, (owner, to) in enumerate(wanted) if owner]
        counts = await place.counted(lambda counts: counts.packets_up == 7)
        assert counts == Counts(up=sum(sizes), packets_up=7)
        assert pump.counts_of(two.name) == Counts(up=sizes[2] + sizes[5], packets_up=2)
        assert pump.counts_of(("127.0.0.1", 9)) is None

        pump.learn(address("10.0.0.2"), two.name)  # it has moved
        kernel.route(plain("10.0.0.2", b"moved"))
        assert two.take() == [plain("10.0.0.2", b"moved")]
        kernel.route(plain("10.1.2.3", b"behind it"))
        assert two.take() == [plain("10.1.2.3", b"behind it")]
        pump.forget(address("10.0.0.2"))
        pump.forget(address("10.0.0.77"))
        kernel.route(plain("10.0.0.2", b"lost"))
        kernel.route(plain("10.0.0.3", b"marker"))
        assert two.take() == [plain("10.0.0.3", b"marker")]
        for text in ("fd00::2", "10.0.0.3"):
            pump.forget(address(text))
        assert pump.counts_of(one.name) is None, "a peer without addresses is none"


@aloud
async def test_many_peers_are_found_and_forgotten() -> None:
    async with pumping() as place:
        peers = [Peer() for _ in range(3)]
        number = {address(f"10.{i >> 8}.{i & 255}.1"): peers[i % 3] for i in range(3000)}
        for key, peer in number.items():
            assert place.pump.learn(key, peer.name)
        for key in list(number)[1000:2000]:
            place.pump.forget(key)
            del number[key]
        for key in random.Random(1).sample(list(number), 200):
            place.kernel.route(packet := plain(str(ip_address(key)), os.urandom(20)))
            assert number[key].take() == [packet]


@aloud
async def test_a_single_peer_has_everything() -> None:
    one, two = Peer(), Peer()
    async with pumping(SERVER | SINGLE) as place:
        place.kernel.route(plain("10.0.0.2", b"too early"))
        await asyncio.sleep(0)
        place.pump.learn(b"", one.name)
        place.kernel.route(plain("192.0.2.1", b"any"))
        while one.take() != [plain("192.0.2.1", b"any")]:
            pass  # the early one may have waited
        one.send(place.address, [plain("192.0.2.1", b"its own address is not asked for")])
        assert place.kernel.take()[1] == plain("192.0.2.1", b"its own address is not asked for")
        place.pump.learn(b"", two.name)
        place.kernel.route(plain("192.0.2.1", b"the other"))
        assert two.take() == [plain("192.0.2.1", b"the other")]
        place.pump.forget(b"")
        place.kernel.route(plain("192.0.2.1", b"nobody"))
        two.send(place.address, [plain("192.0.2.1", b"still taken")])
        assert place.kernel.take()[1] == plain("192.0.2.1", b"still taken")
        place.pump.learn(b"", one.name)
        place.kernel.route(plain("192.0.2.1", b"again"))
        while one.take() != [plain("192.0.2.1", b"again")]:
            pass
        assert place.pump.counts_of(two.name) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@aloud
async def test_a_client_sends_all_to_its_server(host: str) -> None:
    server = Peer(host)
    async with pumping(0, server=server) as place:
        packets = [plain("10.0.0.2", b"a" * 100), plain("fd00::2", b"b"), plain("10.0.0.2", b"c" * 1400)]
        for packet in packets:
            place.kernel.route(packet)
        assert server.take(3) == packets
        for packet in packets:
            server.send(place.address, [packet])
            assert place.kernel.take() == (PLAIN, packet)
        total = sum(map(len, packets))
        counts = await place.counted(lambda counts: counts.packets_down == 3)
        assert counts == Counts(total, total, 3, 3)


@aloud
async def test_peers_over_ipv6_and_over_mapped_ipv4() -> None:
    one, two = Peer("::1"), Peer()
    async with pumping(host="::") as place:
        port = place.address[1]
        one.send(("::1", port), [b"GOST one" + bytes(13)])
        two.send(("127.0.0.1", port), [b"GOST two" + bytes(13)])
        left: list[Any] = []
        while len(left) < 2:
            left += await place.pump.receive()
        for number, (_, peer) in enumerate(sorted(left)):
            place.pump.learn(address(f"10.0.0.{number}"), peer)
        for number, peer in enumerate((one, two)):
            place.kernel.route(plain(f"10.0.0.{number}"))
            assert peer.take() == [plain(f"10.0.0.{number}")]


# ---- out: what is cut ------------------------------------------------------------------------------
def unfinished(version: int, payload: bytes, **more: Any) -> bytes:
    """Return a segment as the stack hands it to a device: in place of the checksum the sum of the pseudo header."""
    packet = bytearray(segment(version, payload, **more))
    start = (packet[0] & 15) * 4 if version == 4 else 40
    ends = bytes(packet[12:20] if version == 4 else packet[8:40])
    total = checksum(ends + struct.pack(">IHH", (len(packet) - start) & 0xFFFF, 0, 6)) ^ 0xFFFF
    packet[start + 16 : start + 18] = total.to_bytes(2, "big")
    return bytes(packet)


@VERSIONS
@pytest.mark.parametrize(
    ("total", "size"),
    [(60000, 1348), (1349, 1348), (4044, 1348), (5001, 537), (1000, 1348), (48 * 300, 48), (65000, 9000)],
)
@pytest.mark.parametrize("options", [b"", TIMESTAMPS])
@aloud
async def test_a_run_of_the_device_becomes_segments_of_their_own(
    version: int, total: int, size: int, options: bytes
) -> None:
    chance = random.Random(total)
    payload = chance.randbytes(total)
    start = 2**32 - 3000  # wraps
    flags = ACK | PUSH | FIN | CWR
    more = {"ip_options": b"\x94\x04\0\0"} if version == 4 and total == 5001 else {}
    packet = unfinished(version, payload, sequence=start, flags=flags, options=options, identification=65530, **more)
    tcp = len(packet) - total - 20 - len(options)
    peer = Peer()
    async with pumping() as place:
        place.pump.learn(packet[16:20] if version == 4 else packet[24:40], peer.name)
        header = virtio(GSO[version] | 0x80, size, tcp, flags=NEEDS_CSUM, header=tcp + 20 + len(options), offset=16)
        place.kernel.route(packet, header)
        count = -(-total // size)
        found = peer.take(count)
        assert b"".join(map(payload_of, found)) == payload
        for number, part in enumerate(found):
            assert valid(part), number
            assert len(payload_of(part)) == min(size, total - number * size)
            assert int.from_bytes(part[tcp + 4 : tcp + 8], "big") == (start + number * size) % 2**32
            wanted = ACK | (CWR if not number else 0) | (PUSH | FIN if number == count - 1 else 0)
            assert part[tcp + 13] == wanted
            assert part[tcp + 20 : tcp + 20 + len(options)] == options
            if version == 4:
                assert int.from_bytes(part[4:6], "big") == (65530 + number) & 0xFFFF
        counts = await place.counted(lambda counts: counts.packets_up == count)
        assert counts == Counts(up=sum(map(len, found)), packets_up=count)


@aloud
async def test_checksums_that_are_still_to_be_made_are_made() -> None:
    server = Peer()
    async with pumping(0, server=server) as place:
        for version, start in ((4, 20), (6, 40)):
            for size in (0, 1, 2, 999, 1348):
                packet = unfinished(version, os.urandom(size), sequence=5)
                place.kernel.route(packet, virtio(start=start, flags=NEEDS_CSUM, offset=16))
                (found,) = server.take()
                assert valid(found)
                assert payload_of(found) == payload_of(packet)
        # UDP: a sum of 0 would say that there is none (RFC 768).
        data = bytearray(segment(4, b"", 0)[:20] + bytes(8) + b"\0\0")
        data[20:24] = b"\xff\xff\0\0"
        place.kernel.route(bytes(data), virtio(start=20, flags=NEEDS_CSUM, offset=6))
        assert server.take()[0][26:28] == b"\xff\xff"


@aloud
async def test_packets_of_one_size_leave_as_trains_and_arrive_in_order() -> None:
    chance = random.Random(3)
    server = Peer()
    async with pumping(0, server=server) as place:
        packets = []
        for number in range(2000):
            size = chance.choice([100, 100, 100, 1400, 1400, 1400, 1400, 21, chance.randrange(21, 9000)])
            packets.append(plain("10.0.0.2", number.to_bytes(4, "big") + bytes(size)))
        found: list[bytes] = []
        for start in range(0, len(packets), 50):
            for packet in packets[start : start + 50]:
                place.kernel.route(packet)
            found += server.take(50)
        assert found == packets


# ---- in: what is joined ----------------------------------------------------------------------------
def parts_of(header: bytes, packet: bytes) -> list[bytes]:
    """Cut what has been written as the kernel would, and return the payloads; assert that it may be."""
    assert valid(packet)
    payload = payload_of(packet)
    flags, kind, length, size, start, offset = struct.unpack("=BBHHHH", header)
    assert (flags, start, offset) == (0, 0, 0)
    if not kind:
        return [payload]
    assert kind == GSO[packet[0] >> 4]
    assert length == len(packet) - len(payload)
    assert size < len(payload) <= 64 * size
    return [payload[at : at + size] for at in range(0, len(payload), size)]


@VERSIONS
@pytest.mark.parametrize("sizes", [(1348,) * 40, (1000, 1000), (1001,) * 20, (999, 999, 998), (1, 1, 1, 1), (1347, 3)])
@aloud
async def test_segments_in_a_row_are_one_packet(version: int, sizes: tuple[int, ...]) -> None:
    server = Peer()
    async with pumping(0, server=server) as place:
        packets = train(version, sizes)
        server.send(place.address, packets)
        header, whole = place.kernel.take()
        assert parts_of(header, whole) == [payload_of(packet) for packet in packets]
        counts = await place.counted(lambda counts: counts.packets_down == len(sizes))
        assert counts.down == sum(map(len, packets))


@VERSIONS
@aloud
async def test_damage_stays_visible(version: int) -> None:
    server = Peer()
    for odd in (0, 1):
        async with pumping(0, server=server) as place:
            for where in (0, 3, 4):
                packets = train(version, (700 + odd,) * 5)
                damaged = bytearray(packets[where])
                damaged[-5] ^= 0x10
                packets[where] = bytes(damaged)
                server.send(place.address, packets)
                header, whole = place.kernel.take()
                assert header != PLAIN
                assert not valid(whole)


@VERSIONS
@aloud
async def test_what_is_no_plain_run_passes_as_it_is(version: int) -> None:
    server = Peer()
    base = train(version, (500, 500))
    second = 1000 + 500
    others = [
        segment(version, bytes(500), second + 1),
        segment(version, bytes(500), second, port=1001),
        segment(version, bytes(500), second, ack=8),
        segment(version, bytes(500), second, window=501),
        segment(version, bytes(500), second, flags=ACK | FIN),
        segment(version, bytes(500), second, flags=ACK | 0x40),
        segment(version, bytes(500), second, options=TIMESTAMPS[:-1] + b"\0"),
        segment(version, bytes(500), second, options=b""),
        segment(version, bytes(500), second, tos=1),
        segment(version, bytes(501), second),
        segment(version, b"", second),
        base[1] + b"more than it says",
        base[1][:-1],
    ]
    if version == 4:
        others += [
            segment(4, bytes(500), second, fragment=0x2000),
            segment(4, bytes(500), second, fragment=0x4001),
            segment(4, bytes(500), second, ip_options=b"\x01\x01\x01\0"),
            base[1][:10] + b"\xde\xad" + base[1][12:],  # a wrong sum of the header would be made right
        ]
    async with pumping(0, server=server) as place:
        for other in others:
            server.send(place.address, [base[0]])
            server.send(place.address, [other])
            assert place.kernel.take() == (PLAIN, base[0])
            assert place.kernel.take() == (PLAIN, other)


@VERSIONS
@aloud
async def test_random_flows_come_out_in_order_and_whole(version: int) -> None:
    chance = random.Random(version)
    server = Peer()
    async with pumping(0, server=server) as place:
        for _ in range(60):
            flows = {port: [chance.randrange(2**32), b""] for port in (1000, 1001, 1002)}
            packets = []
            for _ in range(chance.randrange(1, 12)):
                port = chance.choice(list(flows))
                size = chance.choice([1348, 537, 1, 100])
                for _ in range(chance.randrange(1, 9)):
                    length = chance.choice([size, size, size, size, max(1, size // 2)])
                    payload = chance.randbytes(length)
                    flags = chance.choice([ACK, ACK, ACK, ACK | PUSH])
                    packets.append(segment(version, payload, flows[port][0], port=port, flags=flags))  # type: ignore[arg-type]
                    flows[port][0] = (flows[port][0] + length) % 2**32  # type: ignore[operator]
                    flows[port][1] += payload  # type: ignore[operator]
            for packet in packets:
                server.send(place.address, [packet])
            found = dict.fromkeys(flows, b"")
            start = 20 if version == 4 else 40
            while sum(map(len, found.values())) < sum(map(len, map(payload_of, packets))):
                header, whole = place.kernel.take()
                parts_of(header, whole)
                found[int.from_bytes(whole[start : start + 2], "big")] += payload_of(whole)
            assert found == {port: data for port, (_, data) in flows.items()}


# ---- in: who may ---------------------------------------------------------------------------------------
@aloud
async def test_registrations_are_left_in_order_with_whom_they_are_from() -> None:
    one, two = Peer(), Peer()
    async with pumping() as place:
        texts = [b"GOST" + bytes([number]) * (16 + 16 * (number % 4)) for number in range(20)]
        for text in texts:
            one.send(place.address, [text])
            one.send(place.address, [plain("10.0.0.1", b"between them")])
        two.send(place.address, [b"short"])  # says nothing
        two.send(place.address, [b"GOST" + bytes(65000)])
        found: list[tuple[bytes, Any]] = []
        while len(found) < 21:
            found += await place.pump.receive()
        assert found == [(text, one.name) for text in texts] + [(b"GOST" + bytes(65000), two.name)]
        assert [place.kernel.take()[1] for _ in texts] == [plain("10.0.0.1", b"between them")] * 20


@aloud
async def test_what_nobody_takes_does_not_fill_the_memory() -> None:
    peer, other = Peer(), Peer()
    async with pumping() as place:
        for _ in range(3):
            for number in range(60):
                peer.send(place.address, [b"GOST" + bytes(10_000 + number)])
            peer.send(place.address, [plain("10.0.0.1")])  # a marker: all before it has been looked at
            assert place.kernel.take()[1] == plain("10.0.0.1")
        found = await place.pump.receive()
        assert sum(len(data) for data, _ in found) <= 1 << 18
        assert [len(data) for data, _ in found] == [10_004 + number for number in range(len(found))]
        other.send(place.address, [b"GOST" + bytes(32)])
        assert await place.pump.receive() == [(b"GOST" + bytes(32), other.name)]


@aloud
async def test_a_client_leaves_answers_and_nothing_else() -> None:
    server = Peer()
    async with pumping(0, server=server) as place:
        for data in (b"", b"x", b"GOST" + bytes(15), b"NOST" + bytes(16), b"\x35" + bytes(40), b"GOST" + bytes(16)):
            server.send(place.address, [data])
        assert await place.pump.receive() == [(b"GOST" + bytes(16), server.name)]
        server.send(place.address, [plain("10.0.0.1")])
        assert place.kernel.take() == (PLAIN, plain("10.0.0.1"))


@pytest.mark.parametrize("strict", [False, True])
@aloud
async def test_sources_are_looked_at_where_that_is_wanted(strict: bool) -> None:
    ways = [Way(ip_network("10.1.0.0/16"), ip_address("10.0.0.2"))]
    one, two, stranger = Peer(), Peer(), Peer()
    async with pumping(SERVER | (STRICT if strict else 0), ways) as place:
        place.pump.learn(address("10.0.0.2"), one.name)
        place.pump.learn(address("10.0.0.3"), two.name)
        place.pump.learn(address("fd00::3"), two.name)
        good = [(one, "10.0.0.2"), (one, "10.1.7.7"), (two, "10.0.0.3"), (two, "fd00::3")]
        bad = [(one, "10.0.0.3"), (two, "10.1.7.7"), (stranger, "10.0.0.2"), (two, "10.9.9.9"), (one, "fd00::3")]
        for peer, source in (*bad, *good, *bad, good[0]):
            peer.send(place.address, [packet := plain("fd09::1" if ":" in source else "10.9.9.1", source=source)])
            if not strict or (peer, source) in good:
                assert place.kernel.take() == (PLAIN, packet)
        if strict:
            counts = await place.counted(lambda counts: counts.packets_down == 5)
            assert counts.dropped_down == 10
            assert place.pump.counts_of(one.name) == Counts(down=150, packets_down=3)
            place.pump.set_strict(False)
            stranger.send(place.address, [packet := plain("10.9.9.1")])
            assert place.kernel.take() == (PLAIN, packet)


@aloud
async def test_what_is_for_another_peer_goes_there() -> None:
    one, two = Peer(), Peer()
    async with pumping() as place:
        place.pump.learn(address(ENDS[4][0]), one.name)
        place.pump.learn(address(ENDS[4][1]), two.name)
        packets = train(4, (1348,) * 30 + (700,))
        one.send(place.address, packets)
        assert two.take(31) == packets
        one.send(place.address, [packet := plain(ENDS[4][0], b"to itself")])
        assert one.take() == [packet]
        counts = await place.counted(lambda counts: counts.packets_down == 32)
        total = sum(map(len, packets))
        assert counts == Counts(down=total + len(packet), packets_down=32)
        assert place.pump.counts_of(one.name) == Counts(len(packet), total + len(packet), 1, 32)
        assert place.pump.counts_of(two.name) == Counts(total, 0, 31)
        assert place.kernel.nothing()


def names_of_threads() -> list[str]:
    found = []
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has just ended
            found.append(Path(f"/proc/self/task/{task}/comm").read_text())
    return found


async def pumps(wanted: int) -> int:
    """Count the kernel's threads that are pumps, once they are as many as `wanted`: one that is joined still ends."""
    for _ in range(5000):
        if (found := names_of_threads().count("gostnet-tun\n")) == wanted:
            return found
        await asyncio.sleep(0.001)
    return found


# ---- ends ------------------------------------------------------------------------------------------------
@aloud
async def test_refusals_of_the_server_are_counted_and_end_nothing() -> None:
    server = Peer()
    name = server.name
    async with pumping(0, server=server) as place:
        server.sock.close()
        for _ in range(3):
            place.kernel.route(plain("10.0.0.2"))
            await asyncio.sleep(0.01)
        await place.counted(lambda counts: counts.refused > 0)
        again = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        again.bind(name)
        again.settimeout(5)
        with again:
            place.kernel.route(plain("10.0.0.2", b"listens again"))
            assert again.recv(2000) == plain("10.0.0.2", b"listens again")


@aloud
async def test_the_end_of_the_device_is_told() -> None:
    async with pumping() as place:
        peer = Peer()
        peer.send(place.address, [b"GOST" + bytes(32)])
        assert await place.pump.receive()
        place.kernel.sock.close()
        assert await place.pump.receive() == []
        assert place.pump.ended == errno.ENODEV
        assert not place.pump.closed


@aloud
async def test_who_waits_is_woken_when_the_device_is_closed(offload: list[int]) -> None:
    assert await pumps(0) == 0
    async with pumping() as place:
        scope = Scope("test")
        task = scope.start(place.pump.receive(), "waits")
        await asyncio.sleep(0)
        assert any(offload)
        assert await pumps(1) == 1
        place.device.abort()
        assert await task == []
        assert place.pump.closed
        assert await pumps(0) == 0
        assert offload[-1] == 0
        await scope.cancel()


@aloud
async def test_others_go_on_where_it_has_stopped() -> None:
    """What had been put together is cut before that; no descriptor and no thread is left."""
    server = Peer()
    before = None
    for _ in range(3):
        async with pumping(0, server=server) as place:
            payload = os.urandom(6000)
            packet = unfinished(4, payload, sequence=5)
            header = virtio(1, 1000, 20, flags=NEEDS_CSUM, header=52, offset=16)
            for _ in range(20):
                place.kernel.route(packet, header)
            place.pump.close()
            assert b"".join(map(payload_of, server.take(120))) == payload * 20
            counts = place.pump.counts()
            assert counts.packets_up == 120 == place.device.received
            place.kernel.route(plain("10.0.0.2", b"by Python"))
            assert bytes((await place.device.receive())[0]) == plain("10.0.0.2", b"by Python")
            server.send(place.address, [plain("10.0.0.2", b"by Python")])
            assert bytes((await place.carrier.receive())[0].data) == plain("10.0.0.2", b"by Python")
            place.pump.learn(address("10.0.0.2"), server.name)
            place.pump.forget(address("10.0.0.2"))
            place.pump.close()
        now = len(os.listdir("/proc/self/fd")), await pumps(0)
        assert now == (before or now)
        before = now


def worked() -> tuple[int, int]:
    """Return how often the thread of the one pump has gone to sleep, and its time on a processor in nanoseconds."""
    places = [Path("/proc/self/task", task) for task in os.listdir("/proc/self/task")]
    (place,) = [place for place in places if place.joinpath("comm").read_text() == "gostnet-tun\n"]
    found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", place.joinpath("status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]), int(place.joinpath("schedstat").read_text().split()[0])


@pytest.mark.parametrize("errors", [False, True])
@aloud
async def test_an_idle_pump_sleeps(errors: bool) -> None:
    """So it does where an error waits that nobody asks for: the target of an earlier datagram is not there."""
    server = Peer()
    async with pumping(0, server=server) as place:
        if errors:
            place.carrier.sock.setsockopt(socket.SOL_IP, 11, 1)  # IP_RECVERR
            server.sock.close()
            place.kernel.route(plain("10.0.0.2"))
            await place.counted(lambda counts: counts.refused > 0 or counts.packets_up > 0)
            await asyncio.sleep(0.1)
        else:
            server.send(place.address, [plain("10.0.0.2")])
            place.kernel.take()
            await place.counted(lambda counts: counts.packets_down > 0)
        before = worked()
        await asyncio.sleep(0.3)
        after = worked()
        assert after[0] - before[0] <= 1
        assert after[1] - before[1] < 10_000_000, "it does not sleep"


@aloud
async def test_a_pump_that_cannot_be_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = library.load()
    assert found is not None
    kernel = Kernel()
    device = TunDevice(os.dup(kernel.near.fileno()), "fake", 1400, joins=True)
    carrier = UdpSocket(listen_udp(Endpoint("127.0.0.1", 0)))
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(found, "tun_start", lambda pump: errno.EAGAIN)
    with pytest.raises(OSError, match="temporarily unavailable"):
        TunPump(found, device, carrier, SERVER)
    assert len(os.listdir("/proc/self/fd")) == before
    device.abort()
    with pytest.raises(OSError, match="could not be made"):
        TunPump(found, device, carrier, SERVER)
    with pytest.raises(ConnError):
        device.send_now([plain("10.0.0.2")])
    carrier.abort()
    kernel.sock.close()
    kernel.near.close()


# ---- hostile ---------------------------------------------------------------------------------------------
@VERSIONS
@aloud
async def test_headers_that_lie_are_dropped(version: int) -> None:
    server = Peer()
    good = unfinished(version, bytes(3000), sequence=5)
    start = 20 if version == 4 else 40
    right = {"kind": GSO[version], "size": 1000, "start": start, "flags": NEEDS_CSUM, "offset": 16}
    lies: list[dict[str, int]] = [
        {"kind": 3}, {"kind": 5}, {"kind": 0x7F}, {"kind": GSO[10 - version]}, {"size": 0}, {"size": 1},
        {"start": 0}, {"start": start - 1}, {"start": 65535}, {"start": len(good) - 19}, {"flags": 0}, {"offset": 6},
        {"offset": 65535},
    ]  # fmt: skip
    short = bytearray(good)
    short[start + 12] = 0x40  # a TCP header of 16 bytes
    long = bytearray(good[: start + 40])
    long[start + 12] = 0xF0  # longer than the packet
    async with pumping(0, server=server) as place:
        for lie in lies:
            place.kernel.route(good, virtio(**{**right, **lie}))
        for packet in (bytes(short), bytes(long), good[: start + 19], b"\x45", b"\x60", bytes(100), good[:1]):
            place.kernel.route(packet, virtio(**right))
        for header in (
            virtio(start=65535, offset=65535, flags=1),
            virtio(start=len(good), flags=1),
            virtio(start=len(good) - 60, offset=59, flags=1),
        ):
            place.kernel.route(good, header)
        place.kernel.sock.send(b"\1\1")
        place.kernel.sock.send(PLAIN)
        place.kernel.route(plain("10.0.0.2", b"marker"))
        assert server.take() == [plain("10.0.0.2", b"marker")]
        assert place.pump.counts().dropped_up == len(lies) + 10


@pytest.mark.parametrize("flags", [SERVER, SERVER | STRICT, SERVER | SINGLE, 0])
@aloud
async def test_nothing_that_comes_in_stops_it(flags: int) -> None:
    """Every length, and packets with bytes changed; then it still works."""
    chance = random.Random(flags)
    peer = Peer()
    async with pumping(flags, server=None if flags else peer) as place:
        for text in (*ENDS[4], *ENDS[6]):
            if flags:
                place.pump.learn(b"" if flags & SINGLE else address(text), peer.name)

        def throw(packet: bytes) -> None:
            if packet:
                peer.sock.sendto(packet, place.address)
                place.kernel.route(packet, chance.choice([PLAIN, chance.randbytes(10)]))

        for version in (4, 6):
            for packet in (*train(version, (100, 100)), plain("10.0.0.2"), b"GOST" + bytes(60)):
                for size in range(len(packet) + 1):
                    throw(packet[:size])
                for _ in range(300):
                    mutant = bytearray(packet)
                    for _ in range(chance.randrange(1, 4)):
                        mutant[chance.randrange(min(64, len(mutant)))] = chance.randrange(256)
                    throw(bytes(mutant))
                    while not place.kernel.nothing():
                        pass
                peer.sock.settimeout(0)
                try:
                    while True:
                        peer.sock.recv(70000)
                except BlockingIOError:
                    peer.sock.settimeout(5)
        assert not place.pump.ended
        destination = "10.9.9.1" if not flags & STRICT else "10.9.9.2"
        source = ENDS[4][0]
        marker = plain(destination, b"marker", source)
        peer.send(place.address, [marker])
        for _ in range(100_000):
            if place.kernel.take()[1] == marker:
                break
        else:
            raise AssertionError("no marker")


def test_hostile_input_touches_no_memory_that_is_not_its_own(tmp_path: Path) -> None:
    """The same in C, with the compiler's sanitizers looking on."""
    here = Path(__file__)
    sources = [str(here.with_name("hostile_tun.c")), str(Path(library.__file__).with_name("tun.c"))]
    words = ["cc", "-g", "-O1", "-std=c11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
    built = subprocess.run(
        [*words, "-o", str(tmp_path / "hostile"), *sources], capture_output=True, text=True, check=False
    )
    if built.returncode and "sanitize" in built.stderr + "asan" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert not built.returncode, built.stderr
    for seed in ("1", "2"):
        done = subprocess.run(
            [str(tmp_path / "hostile"), seed, "3000"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
