"""What passes everything on keeps the contracts by itself, whatever a subclass adds."""

from __future__ import annotations

from gostnet.core.datagrams import Datagrams
from gostnet.core.passing import PassingDatagrams, PassingStream
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.testing import check_datagrams, check_stream, datagrams_pair, stream_pair
from gostnet.testing.memory import LEFT, RIGHT


def test_a_stream_that_passes_everything_on_is_one() -> None:
    async def pair() -> tuple[Stream, Stream]:
        left, right = stream_pair()
        return PassingStream(left), PassingStream(right)

    run(check_stream(pair, transfer=100_000, most_buffered=1_000_000))


def test_datagrams_that_are_passed_on_are_some() -> None:
    async def pair() -> tuple[Datagrams, Datagrams]:
        left, right = datagrams_pair()
        return PassingDatagrams(left), PassingDatagrams(right)

    run(check_datagrams(pair, sees_end=True))


def test_it_has_the_addresses_and_the_limit_of_what_is_below_and_does_not_say_that_it_adds_nothing() -> None:
    async def main() -> None:
        near, far = stream_pair()
        stream = PassingStream(near)
        assert (stream.local, stream.remote, stream.transparent_over()) == (LEFT, RIGHT, None)
        stream.reset()
        far.abort()
        below, other = datagrams_pair()
        below.max_payload = 1200
        datagrams = PassingDatagrams(below)
        assert (datagrams.local, datagrams.max_payload) == (below.local, 1200)
        assert datagrams.transparent_over() is None
        datagrams.abort()
        other.abort()

    run(main())


def test_what_was_put_back_comes_first_and_stays_here() -> None:
    async def main() -> None:
        near, far = stream_pair()
        stream = PassingStream(near)
        await far.send(b"later")
        stream.unread(b"first")
        assert near.take_unread() == b""
        assert await stream.receive(3) == b"fir"
        assert stream.take_unread() == b"st"
        assert await stream.receive() == b"later"
        stream.abort()
        far.abort()

    run(main())
