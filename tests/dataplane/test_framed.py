"""Datagrams over a stream."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams, pieces
from gostnet.core.errors import ConnError, ProtocolError
from gostnet.core.sockets import SocketStream
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.dataplane.framed import LengthDatagrams, TunDatagrams
from gostnet.testing import check_datagrams, stream_pair
from gostnet.testing.memory import Faults, Trickle
from gostnet.wire.udp_frames import MAX_DATA, encode_tun_frames

PEER = Endpoint("192.0.2.1", 53)
NAME = Endpoint("dns.example", 53)
TARGET = Endpoint("198.51.100.7", 7)


class Counting(Stream):
    """Counts the writes to the stream below."""

    def __init__(self, below: Stream) -> None:
        super().__init__(below.local, below.remote)
        self.below = below
        self.writes = 0

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self.below.receive(max_bytes)

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        self.writes += 1
        await self.below.send(data)

    async def send_eof(self) -> None:
        await self.below.send_eof()

    async def aclose(self) -> None:
        await self.below.aclose()

    def abort(self) -> None:
        self.below.abort()


async def _gather(datagrams: Datagrams, count: int) -> list[tuple[bytes, Endpoint]]:
    got: list[tuple[bytes, Endpoint]] = []
    while len(got) < count:
        batch = await datagrams.receive()
        assert batch, f"ended after {len(got)} of {count}"
        got += [(bytes(datagram.data), datagram.peer) for datagram in batch]
    return got


def test_datagrams_keep_peers_and_borders_both_ways() -> None:
    async def main() -> None:
        left, right = stream_pair(window=1 << 20)
        near, far = TunDatagrams(left), TunDatagrams(right)
        batch = [Datagram(b"one", PEER), Datagram(b"x" * MAX_DATA, NAME), Datagram(memoryview(b"three"), PEER)]
        await near.send(batch)
        assert await _gather(far, 3) == [(b"one", PEER), (b"x" * MAX_DATA, NAME), (b"three", PEER)]
        await far.send([Datagram(b"back", NAME)])
        assert await _gather(near, 1) == [(b"back", NAME)]

    run(main())


def test_a_batch_is_one_write_and_one_read_may_be_many() -> None:
    async def main() -> None:
        left, right = stream_pair()
        counting = Counting(left)
        await TunDatagrams(counting).send([Datagram(bytes([number]), PEER) for number in range(32)])
        assert counting.writes == 1
        batch = await TunDatagrams(right).receive()
        assert [datagram.data for datagram in batch] == [bytes([number]) for number in range(32)]

    run(main())


def test_joined_datagrams_become_frames_of_their_own() -> None:
    async def main() -> None:
        left, right = stream_pair()
        await TunDatagrams(left).send([Datagram(b"aaaabbbbcc", PEER, 4), Datagram(b"whole", NAME, 10)])
        assert await _gather(TunDatagrams(right), 4) == [
            (b"aaaa", PEER),
            (b"bbbb", PEER),
            (b"cc", PEER),
            (b"whole", NAME),
        ]

    run(main())


def test_with_a_target_every_datagram_goes_there_and_comes_from_there() -> None:
    async def main() -> None:
        left, right = stream_pair()
        near, far = TunDatagrams(left, TARGET), TunDatagrams(right)
        await near.send([Datagram(b"out", PEER)])
        assert await _gather(far, 1) == [(b"out", TARGET)]
        await far.send([Datagram(b"in", PEER)])
        assert await _gather(near, 1) == [(b"in", TARGET)]

    run(main())


def test_an_empty_datagram_never_reaches_the_stream() -> None:
    """# GOST: its reader would take the frame after it for the datagram's data (protocols 1.5)."""

    async def main() -> None:
        left, right = stream_pair()
        counting = Counting(left)
        near = TunDatagrams(counting)
        await near.send([Datagram(b"", PEER)])
        assert counting.writes == 0
        await near.send([Datagram(b"a", PEER), Datagram(b"", PEER), Datagram(b"b", PEER)])
        assert await right.receive() == encode_tun_frames([(b"a", PEER), (b"b", PEER)])

    run(main())


def test_an_empty_datagram_from_the_peer_does_not_desynchronise() -> None:
    async def main() -> None:
        left, right = stream_pair()
        await left.send(b"\0\0\xff\x01\xc0\0\x02\x01\0\x35" + encode_tun_frames([(b"next", PEER)]))
        assert await _gather(TunDatagrams(right), 2) == [(b"", PEER), (b"next", PEER)]

    run(main())


@pytest.mark.parametrize("make", [TunDatagrams, lambda stream: LengthDatagrams(stream, TARGET)])
def test_byte_by_byte_is_as_good_as_whole(make: Callable[[Stream], Datagrams]) -> None:
    async def main() -> None:
        left, right = stream_pair()
        await make(left).send([Datagram(b"first", TARGET), Datagram(b"second", TARGET)])
        await left.send_eof()
        far = make(Trickle(right))
        assert await _gather(far, 2) == [(b"first", TARGET), (b"second", TARGET)]
        assert await far.receive() == ()

    run(main())


@pytest.mark.parametrize("cut", range(1, 15))
def test_a_frame_cut_off_by_the_end_is_lost_alone(cut: int) -> None:
    async def main() -> None:
        stream = encode_tun_frames([(b"whole", PEER), (b"cut", PEER)])
        left, right = stream_pair()
        await left.send(stream[:-cut])
        await left.send_eof()
        far = TunDatagrams(right)
        kept = 1 if len(stream) - cut >= 15 else 0
        assert await _gather(far, kept) == [(b"whole", PEER)][:kept]
        assert await far.receive() == ()

    run(main())


def test_nonsense_ends_the_association_after_what_made_sense() -> None:
    async def main() -> None:
        left, right = stream_pair()
        await left.send(encode_tun_frames([(b"good", PEER)]) + b"\0\1\xff\x09nonsense")
        far = TunDatagrams(right)
        assert await _gather(far, 1) == [(b"good", PEER)]
        for _ in range(2):
            with pytest.raises(ProtocolError, match="address type 9"):
                await far.receive()

    run(main())


def test_a_broken_stream_is_reported() -> None:
    async def main() -> None:
        left, right = stream_pair(left=Faults(fail_receive_at=0, fail_send_at=0))
        near = TunDatagrams(left)
        with pytest.raises(ConnError):
            await near.send([Datagram(b"x", PEER)])
        with pytest.raises(ConnError):
            await near.receive()
        right.abort()

    run(main())


def test_length_frames_carry_empty_datagrams_too() -> None:
    async def main() -> None:
        left, right = stream_pair(window=1 << 20)
        near, far = LengthDatagrams(left, TARGET), LengthDatagrams(right, PEER)
        await near.send([Datagram(b"", NAME), Datagram(b"y" * MAX_DATA, NAME), Datagram(b"abcde", NAME, 2)])
        sent: Sequence[bytes] = [b"", b"y" * MAX_DATA, b"ab", b"cd", b"e"]
        assert await _gather(far, 5) == [(data, PEER) for data in sent]

    run(main())


@pytest.mark.parametrize("close", ["aclose", "abort"])
def test_closing_closes_the_stream(close: str) -> None:
    async def main() -> None:
        for make in (TunDatagrams, lambda stream: LengthDatagrams(stream, TARGET)):
            left, _ = stream_pair()
            datagrams = make(left)
            if close == "aclose":
                await datagrams.aclose()
            else:
                datagrams.abort()
            assert left.closed

    run(main())


def test_pieces_of_a_single_datagram_are_itself() -> None:
    assert list(pieces(Datagram(b"", PEER))) == [b""]
    assert list(pieces(Datagram(b"abc", PEER, 3))) == [b"abc"]
    assert list(pieces(Datagram(b"abc", PEER, 2))) == [b"ab", b"c"]


def _sockets() -> tuple[SocketStream, SocketStream]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    made = []
    for sock in (near, far):
        sock.setblocking(False)
        here, there = Endpoint.from_sockaddr(sock.getsockname()), Endpoint.from_sockaddr(sock.getpeername())
        made.append(SocketStream(sock, here, there))
    return made[0], made[1]


def test_tun_datagrams_do_what_all_datagrams_do() -> None:
    async def pair() -> tuple[Datagrams, Datagrams]:
        near, far = _sockets()
        return TunDatagrams(near, local=near.local), TunDatagrams(far, local=far.local)

    run(check_datagrams(pair, empty=False, sees_end=True))


def test_length_datagrams_do_what_all_datagrams_do() -> None:
    async def pair() -> tuple[Datagrams, Datagrams]:
        near, far = _sockets()
        return LengthDatagrams(near, far.local, near.local), LengthDatagrams(far, near.local, far.local)

    run(check_datagrams(pair, sees_end=True))
