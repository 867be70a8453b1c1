"""Memory streams and datagrams keep the contracts, and break them where they are told to."""

from __future__ import annotations

import asyncio

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.errors import ConnError
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.testing import check_datagrams, check_stream, datagrams_pair, stream_pair
from gostnet.testing.conformance import receive_all, receive_exactly, split
from gostnet.testing.memory import LEFT, RIGHT, Faults, Trickle

LOOPS = pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])


@LOOPS
@pytest.mark.parametrize("window", [256, 65536])
def test_memory_stream_keeps_the_contract(uvloop: bool, window: int) -> None:
    async def pair() -> tuple[Stream, Stream]:
        return stream_pair(window=window)

    run(check_stream(pair, transfer=200_000), uvloop=uvloop)


@LOOPS
def test_memory_datagrams_keep_the_contract(uvloop: bool) -> None:
    async def pair() -> tuple[Datagrams, Datagrams]:
        return datagrams_pair()

    run(check_datagrams(pair, sees_end=True), uvloop=uvloop)


@pytest.mark.parametrize("piece", [1000, 70_000])
def test_trickle_keeps_the_contract(piece: int) -> None:
    async def pair() -> tuple[Stream, Stream]:
        left, right = stream_pair()
        return Trickle(left, piece), Trickle(right, piece)

    run(check_stream(pair, transfer=200_000))


def test_ends_know_their_addresses() -> None:
    left, right = stream_pair()
    assert (left.local, left.remote) == (LEFT, RIGHT)
    assert (right.local, right.remote) == (RIGHT, LEFT)
    one, _ = stream_pair(addresses=(Endpoint("::1", 1), Endpoint("::2", 2)))
    assert one.remote == Endpoint("::2", 2)


def test_send_waits_at_the_window() -> None:
    async def main() -> None:
        left, right = stream_pair(window=10)
        await left.send(b"0123456789")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await left.send(b"x")
        assert await right.receive() == b"0123456789"
        await left.send(b"y")
        assert await right.receive() == b"y"

    run(main())


def test_faulty_receive_delivers_pieces_then_fails_for_ever() -> None:
    async def main() -> None:
        left, right = stream_pair(right=Faults(piece=2, fail_receive_at=5))
        await left.send(b"abcdefgh")
        assert [await right.receive() for _ in range(3)] == [b"ab", b"cd", b"e"]
        for _ in range(2):
            with pytest.raises(ConnError, match="on purpose"):
                await right.receive()

    run(main())


def test_faulty_send_takes_what_fits_then_fails() -> None:
    async def main() -> None:
        left, right = stream_pair(left=Faults(fail_send_at=5))
        await left.send(b"abc")
        with pytest.raises(ConnError, match="on purpose"):
            await left.send(b"defgh")
        assert await right.receive() == b"abcde"
        with pytest.raises(ConnError, match="on purpose"):
            await left.send(b"i")

    run(main())


def test_stream_may_end_early() -> None:
    async def main() -> None:
        left, right = stream_pair(right=Faults(end_at=3))
        await left.send(b"abcdef")
        assert await receive_all(right) == b"abc"

    run(main())


def test_trickle_delivers_byte_by_byte() -> None:
    async def main() -> None:
        left, right = stream_pair()
        right.unread(b"un")
        slow = Trickle(right)
        await left.send(b"read")
        await left.send_eof()
        assert [await slow.receive() for _ in range(7)] == [b"u", b"n", b"r", b"e", b"a", b"d", b""]

    run(main())


def test_abort_loses_what_is_on_its_way_and_close_does_not() -> None:
    async def main() -> None:
        left, right = stream_pair()
        await left.send(b"lost")
        left.abort()
        with pytest.raises(ConnError, match="reset"):
            await right.receive()
        left, right = stream_pair()
        await left.send(b"kept")
        await left.aclose()
        assert left.closed
        assert not right.closed
        assert await receive_all(right) == b"kept"

    run(main())


def test_datagrams_are_lost_and_doubled_as_told() -> None:
    async def main() -> None:
        left, right = datagrams_pair(fate=lambda number: {0: 0, 1: 2}.get(number, 1))
        await left.send([Datagram(b"lost", RIGHT), Datagram(b"twice", RIGHT), Datagram(b"once", RIGHT)])
        assert split(await right.receive()) == [b"twice", b"twice", b"once"]
        assert left.dropped == 1

    run(main())


def test_datagrams_without_room_are_dropped() -> None:
    async def main() -> None:
        left, right = datagrams_pair(capacity=2, max_payload=4)
        await left.send([Datagram(b"%d" % number, RIGHT) for number in range(5)])
        assert left.dropped == 3
        assert split(await right.receive()) == [b"0", b"1"]
        await left.send([Datagram(b"large", RIGHT)])
        assert left.dropped == 4

    run(main())


def test_datagrams_carry_the_sender() -> None:
    async def main() -> None:
        left, right = datagrams_pair()
        await left.send([Datagram(b"x", Endpoint("192.0.2.77", 1))])
        (received,) = await right.receive()
        assert received.peer == LEFT

    run(main())


def test_receive_exactly_says_where_the_stream_ended() -> None:
    async def main() -> None:
        left, right = stream_pair()
        await left.send(b"abc")
        await left.send_eof()
        with pytest.raises(AssertionError, match="after 3 of 4 bytes"):
            await receive_exactly(right, 4)

    run(main())
