"""The copy engine over streams that are no sockets."""

from __future__ import annotations

import asyncio
import socket

from gostnet.core.errors import ConnError
from gostnet.core.flow import Flow
from gostnet.core.sockets import SocketStream
from gostnet.core.stream import CHUNK, Buffer
from gostnet.core.tasks import Scope, run, together
from gostnet.dataplane import copy
from gostnet.dataplane.opening import Opening
from gostnet.testing.memory import MemoryStream, stream_pair


class Counting(Opening):
    """Counts what passes through it."""

    __slots__ = ("calls",)

    def __init__(self, below: MemoryStream, prefix: bytes) -> None:
        super().__init__(below, prefix=prefix)
        self.calls = 0

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        self.calls += 1
        return await super().receive(max_bytes)

    async def send(self, data: Buffer) -> None:
        self.calls += 1
        await super().send(data)


def test_a_stream_that_has_had_its_say_is_left_out() -> None:
    async def main() -> None:
        client, near = stream_pair()
        far, server = stream_pair()
        opening = Counting(far, b"<ask>")
        opening.unread(b"early ")

        async def ends() -> None:
            for n in range(20):
                await client.send(b"%02d" % n)
                expected = b"<ask>00" if n == 0 else b"%02d" % n
                found = b""
                while len(found) < len(expected):
                    found += await server.receive()
                assert found == expected
                await server.send(b"re")
                answer = b"early re" if n == 0 else b"re"
                found = b""
                while len(found) < len(answer):
                    found += await client.receive()
                assert found == answer
            await client.send_eof()
            assert await server.receive() == b""
            await server.send_eof()
            assert await client.receive() == b""

        flow = Flow()
        await together(copy.relay(flow, near, opening), ends())
        assert (flow.meter.up, flow.meter.down) == (40, 46)
        assert opening.calls <= 4

    run(main())


class NoEnd(MemoryStream):
    """Its peer has gone when it is to be told the end."""

    __slots__ = ()

    async def send_eof(self) -> None:
        raise ConnError("broken pipe")


def test_an_end_that_cannot_be_told_is_no_failure() -> None:
    async def main() -> None:
        client, near = stream_pair()
        far, server = stream_pair()
        near.__class__ = NoEnd
        await client.send(b"question")
        await client.send_eof()
        await server.send(b"answer")
        await server.send_eof()
        await copy.relay(Flow(), near, far)
        assert await server.receive() == b"question"
        assert await client.receive() == b"answer"

    run(main())


class Heard(MemoryStream):
    """Notes what it is given to send."""

    __slots__ = ()

    said: list[bytes] = []  # noqa: RUF012

    async def send(self, data: Buffer) -> None:
        self.said.append(bytes(data))
        await super().send(data)


def sockets() -> tuple[SocketStream, SocketStream]:
    left, right = socket.socketpair()
    for each in (left, right):
        each.setblocking(False)
    return SocketStream(left), SocketStream(right)


def test_what_a_client_has_sent_already_goes_with_the_header() -> None:
    async def main() -> None:
        client, near = sockets()
        far, server = stream_pair()
        far.__class__ = Heard
        Heard.said = []
        await client.send(b"early")
        await client.send_eof()

        async def end() -> None:
            assert await server.receive() == b"<ask>early"
            assert await server.receive() == b""
            await server.send_eof()

        await together(copy.relay(Flow(), near, Opening(far, prefix=b"<ask>", prompt=True)), end())
        assert Heard.said == [b"<ask>early"]
        near.abort()
        assert await client.receive() == b""
        client.abort()

    run(main())


def test_header_does_not_wait_for_a_client_that_says_nothing() -> None:
    async def main() -> None:
        client, near = sockets()
        far, server = stream_pair()

        async def end() -> None:
            assert await server.receive() == b"<ask>"
            await server.send(b"banner")
            assert await client.receive() == b"banner"
            await server.send_eof()
            assert await client.receive() == b""
            await client.send_eof()

        await together(copy.relay(Flow(), near, Opening(far, prefix=b"<ask>", prompt=True)), end())
        near.abort()
        client.abort()

    run(main())


class Busy(MemoryStream):
    """Always has something to say, and room for what it is told."""

    __slots__ = ()

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        return bytes(max_bytes)

    async def send(self, data: Buffer) -> None:
        pass


def test_streams_that_never_wait_let_others_go_on() -> None:
    async def main() -> None:
        near, _ = stream_pair()
        far, _ = stream_pair()
        near.__class__ = far.__class__ = Busy
        flow = Flow()
        scope = Scope("relay")
        scope.launch(copy.relay(flow, near, far))
        for _ in range(3):
            before = flow.meter.up, flow.meter.down
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert flow.meter.up > before[0]
            assert flow.meter.down > before[1]
        await scope.cancel()

    run(main())
