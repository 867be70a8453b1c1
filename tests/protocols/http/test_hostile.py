"""Clients and origins that say anything at all: the handler ends, with nothing but the project's own errors."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import DialError, GostnetError
from gostnet.core.flow import Flow
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope, run
from gostnet.protocols.http import answer
from gostnet.testing.memory import Faults, MemoryStream, stream_pair

from ..vectors import PATIENCE
from .kit import OK, Watched

CLIENT = st.lists(
    st.sampled_from(
        [
            b"GET http://a.test/ HTTP/1.1\r\n\r\n",
            b"POST http://a.test/ HTTP/1.1\r\nContent-Length: 3\r\n\r\n",
            b"POST http://a.test/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET http://a.test/ HTTP/1.0\r\n\r\n",
            b"HEAD http://a.test/ HTTP/1.1\r\nConnection: close\r\n\r\n",
            b"GET http://a.test/ HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
            b"CONNECT a.test:443 HTTP/1.1\r\n\r\n",
            b"CONNECT  HTTP/1.1\r\nX-Gost-Protocol: udp\r\n\r\n",
            b"abc",
            b"3\r\nabc\r\n",
            b"0\r\n\r\n",
            b"\r\n",
            b"\n",
            b"\x00\xff",
            b"GET ",
        ]
    ),
    max_size=6,
)

ORIGIN = st.lists(
    st.sampled_from(
        [
            OK,
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n",
            b"3\r\nabc\r\n",
            b"0\r\n\r\n",
            b"abc",
            b"\x1f\x8b\x08",
            b"\n",
        ]
    ),
    max_size=5,
)


class Scripted:
    """A way out to origins that say `says`, whatever they hear, and then end."""

    def __init__(self, says: bytes, piece: int | None, fail_send_at: int | None) -> None:
        self.says = says
        self.faults = Faults(piece=piece, fail_send_at=fail_send_at)
        self.opened: list[MemoryStream] = []

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        ours, theirs = stream_pair(left=self.faults, window=1 << 20)
        await theirs.send(self.says)
        await theirs.send_eof()
        self.opened += [ours, theirs]
        return ours

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        raise DialError("no")


@settings(max_examples=150, deadline=None)
@given(
    CLIENT,
    ORIGIN,
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 0, 100]),
    st.sampled_from([None, 0, 60]),
    st.booleans(),
)
def test_whatever_is_said_the_handler_ends(
    client: list[bytes],
    origin: list[bytes],
    piece: int | None,
    origin_deaf_at: int | None,
    client_deaf_at: int | None,
    options: bool,
) -> None:
    async def main() -> None:
        egress = Scripted(b"".join(origin), piece, origin_deaf_at)
        ours, theirs = stream_pair(left=Faults(piece=piece, fail_send_at=client_deaf_at), window=1 << 20)
        await theirs.send(b"".join(client))
        await theirs.send_eof()
        with Watched({"keepalive": options, "compression": options, "udp": options}) as handler:
            scope = Scope("test")
            reader = scope.start(_read_all(theirs))
            try:
                async with asyncio.timeout(PATIENCE):
                    await handler.handler.handle(Flow(), ours, egress)
                await ours.aclose()
            except GostnetError:
                ours.abort()
            await reader
            await scope.cancel()
        for stream in egress.opened[::2]:
            assert stream.closed  # no upstream outlives its connection: this way out allows no keeping

    run(main())


async def _read_all(stream: Stream) -> None:
    try:
        while await stream.receive():
            pass
    except GostnetError:
        pass
    stream.abort()


def test_client_that_never_closes_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "LINGER", 0.05)

    async def main() -> None:
        ours, theirs = stream_pair()
        async with asyncio.timeout(PATIENCE):
            await answer.part(ours, b"bye")
            await answer.part(ours)  # and once more does no harm
        assert await theirs.receive() == b"bye"
        assert await theirs.receive() == b""
        ours.abort()
        theirs.abort()

    run(main())


def test_client_that_never_stops_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "DRAINED", 100000)

    async def main() -> None:
        ours, theirs = stream_pair()

        async def flood() -> None:
            try:
                while True:
                    await theirs.send(bytes(1000))
            except GostnetError:
                pass

        scope = Scope("test")
        task = scope.start(flood())
        async with asyncio.timeout(PATIENCE):
            await answer.part(ours, b"bye")
            await task
        assert 100000 <= ours.received < 300000
        theirs.abort()
        await scope.cancel()

    run(main())
