"""Streams that begin with a header: as streams, and joined by either engine of the relay."""

from __future__ import annotations

import asyncio
import os

import pytest

from gostnet.core.errors import ConnError, EndOfStream, ProtocolError
from gostnet.core.flow import Flow
from gostnet.core.hub import current_hub
from gostnet.core.stream import Stream
from gostnet.core.tasks import run, together
from gostnet.dataplane.opening import Opening
from gostnet.dataplane.pipes import pipe_pool
from gostnet.dataplane.relay import leaf, relay
from gostnet.testing.conformance import check_stream
from gostnet.testing.memory import Faults, Trickle, stream_pair

from .kit import read_all, tcp_pair

ASK = b"<ask>"
OK = b"<ok!>"


class Word:
    """Takes one word off; refuses any other."""

    def __init__(self, word: bytes) -> None:
        self._word = word
        self._held = b""

    def feed(self, data: bytes) -> bytes | None:
        self._held += data
        if not self._word.startswith(self._held[: len(self._word)]):
            raise ProtocolError(f"refused: {self._held[: len(self._word)]!r}")
        return None if len(self._held) < len(self._word) else self._held[len(self._word) :]


# ---- as a stream --------------------------------------------------------------------------------
def test_it_keeps_the_contract_of_streams_while_it_begins() -> None:
    async def pair() -> tuple[Stream, Stream]:
        left, right = stream_pair()
        return Opening(left, prefix=ASK, prompt=True), Opening(right, strip=Word(ASK))

    run(check_stream(pair))


def test_the_prefix_travels_with_the_first_bytes_and_the_header_goes_with_the_first_read() -> None:
    async def main() -> None:
        left, right = stream_pair()
        client = Opening(left, prefix=ASK, prompt=True, strip=Word(OK))
        assert leaf(client) is client
        await client.send(b"")
        assert right.received == 0
        assert left.sent == 0
        await client.send(b"payload")
        assert await right.receive() == ASK + b"payload"
        await client.send(b", more")
        assert await right.receive() == b", more"
        assert client.transparent_over() is None
        await right.send(OK + b"answer")
        assert await client.receive(3) == b"ans"
        assert leaf(client) is left
        assert await client.receive() == b"wer"

    run(main())


def test_reading_sends_a_prompt_prefix_and_no_other() -> None:
    async def main() -> None:
        left, right = stream_pair()
        client, server = Opening(left, prefix=ASK, prompt=True, strip=Word(OK)), Opening(right, prefix=OK)

        async def speak() -> None:
            assert await server.receive() == ASK
            assert right.sent == 0
            await server.send(b"banner")

        async def listen() -> None:
            assert await client.receive() == b"banner"

        await together(listen(), speak())
        assert leaf(server) is right

    run(main())


def test_who_reads_and_writes_at_once_sends_one_piece() -> None:
    async def main() -> None:
        left, right = stream_pair()
        client = Opening(left, prefix=ASK, prompt=True)

        async def listen() -> None:
            assert await client.receive() == b"x"

        async def speak() -> None:
            await client.send(b"payload")
            assert await right.receive() == ASK + b"payload"
            await right.send(b"x")

        await together(speak(), listen())

    run(main())


def test_bytes_sent_while_the_prefix_leaves_come_after_it() -> None:
    async def main() -> None:
        left, right = stream_pair(window=1)
        client = Opening(left, prefix=ASK, prompt=True)

        async def listen() -> None:
            assert await client.receive() == b"."

        started, speaking = asyncio.Event(), asyncio.Event()

        async def speak() -> None:
            await started.wait()
            assert leaf(client) is client
            speaking.set()
            await client.send(b"payload")

        async def server() -> None:
            got = await right.receive()
            started.set()
            await speaking.wait()
            while len(got) < len(ASK + b"payload"):
                got += await right.receive()
            assert got == ASK + b"payload"
            await right.send(b".")

        await together(listen(), speak(), server())

    run(main())


@pytest.mark.parametrize("prompt", [False, True])
def test_the_end_is_preceded_by_the_prefix(prompt: bool) -> None:
    async def main() -> None:
        left, right = stream_pair()
        stream = Opening(left, prefix=ASK, prompt=prompt)
        await stream.send_eof()
        await stream.send_eof()
        assert await read_all(right) == ASK

    run(main())


@pytest.mark.parametrize("cut", range(len(OK)))
def test_an_end_inside_the_header_is_an_error(cut: int) -> None:
    async def main() -> None:
        left, right = stream_pair(left=Faults(end_at=cut))
        await right.send(OK)
        with pytest.raises(EndOfStream):
            await Opening(left, strip=Word(OK)).receive()

    run(main())


def test_a_header_in_pieces_and_nested_ones_are_read_whole() -> None:
    async def main() -> None:
        left, right = stream_pair()
        stream = Opening(Opening(Trickle(left), prefix=b"1", strip=Word(b"one")), prefix=b"2", strip=Word(b"two"))
        await stream.send(b"payload")
        assert await right.receive() == b"12payload"
        await right.send(b"onetworest")
        await right.send_eof()
        assert await read_all(stream) == b"rest"

    run(main())


def test_a_refusal_is_raised_to_the_reader() -> None:
    async def main() -> None:
        left, right = stream_pair()
        await right.send(b"<no!>")
        with pytest.raises(ProtocolError, match="refused"):
            await Opening(left, strip=Word(OK)).receive()

    run(main())


# ---- in a relay ---------------------------------------------------------------------------------
class Rig:
    """client == (lazy answer, relay, lazy request) == server, over TCP on loopback."""

    def __init__(self, engine: str) -> None:
        self.client, inner_client = tcp_pair()
        inner_server, self.server = tcp_pair()
        self.flow = Flow()
        self.seen = bytearray()
        if engine == "copy":
            self.flow.taps = [lambda data, up: self.seen.extend(data)]
        else:
            self.flow.engine = engine
        self.inner: tuple[Stream, Stream] = (
            Opening(inner_client, prefix=OK),
            Opening(inner_server, prefix=ASK, prompt=True, strip=Word(OK)),
        )

    async def run(self) -> None:
        try:
            await relay(self.flow, *self.inner)
        finally:
            for stream in self.inner:
                stream.abort()

    def close(self) -> None:
        for stream in (self.client, self.server, *self.inner):
            stream.abort()
        pipe_pool(current_hub()).close()


ENGINES = pytest.mark.parametrize("engine", ["copy", "splice", "native"])


@ENGINES
@pytest.mark.parametrize("size", [1, 70_000, 3_000_001])
def test_headers_are_exchanged_and_payload_arrives_both_ways(engine: str, size: int) -> None:
    up, down = os.urandom(size), os.urandom(size)

    async def main() -> None:
        rig = Rig(engine)

        async def client() -> None:
            async def write() -> None:
                await rig.client.send(up)
                await rig.client.send_eof()

            async def read() -> None:
                assert await read_all(rig.client) == OK + down

            await together(write(), read())

        async def server() -> None:
            assert await read_all(rig.server) == ASK + up
            await rig.server.send(OK + down)
            await rig.server.send_eof()

        await together(rig.run(), client(), server())
        assert (rig.flow.meter.up, rig.flow.meter.down) == (size, size)
        rig.close()

    run(main())


@ENGINES
def test_the_request_leaves_together_with_what_was_said_before(engine: str) -> None:
    async def main() -> None:
        rig = Rig(engine)
        await rig.client.send(b"hello")

        async def server() -> None:
            assert await rig.server.receive() == ASK + b"hello"
            await rig.server.send(OK[:2])
            await rig.server.send(OK[2:])
            await rig.server.send(b"answer")
            assert await rig.client.receive(5) == OK
            assert await rig.client.receive() == b"answer"
            await rig.client.send_eof()
            assert await rig.server.receive() == b""
            await rig.server.send(b", late")
            await rig.server.send_eof()
            assert await read_all(rig.client) == b", late"

        await together(rig.run(), server())
        rig.close()

    run(main())


@ENGINES
def test_a_server_that_speaks_first_is_asked_first(engine: str) -> None:
    async def main() -> None:
        rig = Rig(engine)

        async def ends() -> None:
            assert await rig.server.receive() == ASK
            await rig.server.send(OK + b"220 ready")
            assert await rig.client.receive() == OK + b"220 ready"
            await rig.server.send_eof()
            assert await rig.client.receive() == b""
            await rig.client.send(b"after your end")
            await rig.client.send_eof()
            assert await read_all(rig.server) == b"after your end"

        await together(rig.run(), ends())
        assert (rig.flow.meter.up, rig.flow.meter.down) == (14, 9)
        rig.close()

    run(main())


@ENGINES
def test_silence_on_both_sides_still_exchanges_the_headers(engine: str) -> None:
    async def main() -> None:
        rig = Rig(engine)

        async def ends() -> None:
            await rig.client.send_eof()
            assert await read_all(rig.server) == ASK
            await rig.server.send(OK)
            await rig.server.send_eof()
            assert await read_all(rig.client) == OK

        await together(rig.run(), ends())
        assert (rig.flow.meter.up, rig.flow.meter.down) == (0, 0)
        rig.close()

    run(main())


@ENGINES
@pytest.mark.parametrize(("answer", "error"), [(b"<no!>", ProtocolError), (b"<o", EndOfStream), (b"", EndOfStream)])
def test_a_refusal_ends_the_relay(engine: str, answer: bytes, error: type[Exception]) -> None:
    async def main() -> None:
        rig = Rig(engine)

        async def ends() -> None:
            assert await rig.server.receive() == ASK
            await rig.server.send(answer)
            await rig.server.send_eof()
            try:
                assert await read_all(rig.client) == b""
            except ConnError:
                pass

        async def relayed() -> None:
            with pytest.raises(error):
                await rig.run()

        await together(relayed(), ends())
        rig.close()

    run(main())


def test_nested_beginnings_are_spliced_in_their_order() -> None:
    async def main() -> None:
        client, inner_client = tcp_pair()
        inner_server, server = tcp_pair()
        lower = Opening(inner_server, prefix=b"1", prompt=True, strip=Word(b"one"))
        upper = Opening(lower, prefix=b"2", prompt=True, strip=Word(b"two"))
        inner_client.unread(b"early ")
        flow = Flow()

        async def ends() -> None:
            assert await server.receive() == b"12early "
            await client.send(b"late")
            assert await server.receive() == b"late"
            for piece in (b"o", b"net", b"wo", b"rest"):
                await server.send(piece)
            await server.send_eof()
            await client.send_eof()
            assert await read_all(client) == b"rest"
            assert await read_all(server) == b""

        async def joined() -> None:
            await relay(flow, inner_client, upper)
            await upper.aclose()
            await inner_client.aclose()

        await together(joined(), ends())
        assert (flow.meter.up, flow.meter.down) == (10, 4)
        assert upper.transparent_over() is lower
        assert lower.transparent_over() is inner_server
        client.abort()
        server.abort()
        pipe_pool(current_hub()).close()

    run(main())
