"""The copy engine over streams that are no sockets."""

from __future__ import annotations

from gostnet.core.errors import ConnError
from gostnet.core.flow import Flow
from gostnet.core.stream import CHUNK, Buffer
from gostnet.core.tasks import run, together
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
