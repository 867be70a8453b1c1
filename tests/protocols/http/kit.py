"""What the tests of the HTTP proxy share: origins, a way out that renames ports, a handler that is watched."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.egress import Egress
from gostnet.core.flow import Flow
from gostnet.core.log import Logger, quiet
from gostnet.core.options import bind_options
from gostnet.core.stream import Stream
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.router import ServiceRouter
from gostnet.protocols.http.handler import HttpHandler

from ..vectors import PATIENCE, Names, Peer


class Users:
    """Knows user:pass."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        self.asked.append((username, password))
        return "id-of-user" if (username, password) == ("user", "pass") else None


class Renamed(Direct):
    """A direct way out that goes to other ports than it is asked for: recordings name fixed ones."""

    def __init__(self, ports: Mapping[int, int]) -> None:
        super().__init__(Names())
        self._ports = ports
        self.asked: list[Endpoint] = []

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        self.asked.append(target)
        return await super().connect(flow, Endpoint(target.host, self._ports.get(target.port, target.port)))

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        return await super().associate(flow, target)


def way_out(ports: Mapping[int, int] | None = None, **options: Any) -> ServiceRouter:
    """Return a router over `Renamed`; `options` are the router's."""
    return ServiceRouter(Renamed(ports or {}), **options)


class Watched:
    """An HttpHandler, made from a metadata map, that tells what became of its connections."""

    accepts = (Stream,)

    def __init__(
        self, metadata: dict[str, Any] | None = None, *, users: Users | None = None, log: Logger | None = None
    ) -> None:
        context = HandlerContext(service="test", authenticator=users, log=log or quiet())
        self.handler = HttpHandler(bind_options(HttpHandler.Options, metadata or {}), context)
        self.ends: asyncio.Queue[tuple[Flow, BaseException | None]] = asyncio.Queue()

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        try:
            await self.handler.handle(flow, conn, egress)
        except BaseException as exc:
            self.ends.put_nowait((flow, exc))
            raise
        self.ends.put_nowait((flow, None))

    async def end(self) -> tuple[Flow, BaseException | None]:
        """Wait until a connection has ended; return its flow and what it raised."""
        async with asyncio.timeout(PATIENCE):
            return await self.ends.get()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.handler.close()


# ---- origins ------------------------------------------------------------------------------------
@dataclass(slots=True)
class Visit:
    """One connection to an origin."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    seen: list[bytes]

    async def head(self) -> bytes:
        """Return the next request's head, b"" at the end."""
        try:
            async with asyncio.timeout(PATIENCE):
                head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as exc:
            if exc.partial:
                raise
            return b""
        self.seen.append(head)
        return head

    async def exactly(self, count: int) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readexactly(count)

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readuntil(end)

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


@dataclass(slots=True)
class Origin:
    """A running origin: its port, the heads that it has seen, and how many connections came."""

    port: int = 0
    seen: list[bytes] = field(default_factory=list)
    connections: int = 0
    failures: list[BaseException] = field(default_factory=list)

    @property
    def at(self) -> bytes:
        """Its authority."""
        return b"127.0.0.1:%d" % self.port


@asynccontextmanager
async def origin(serve: Callable[[Visit], Awaitable[None]], tls: ssl.SSLContext | None = None) -> AsyncIterator[Origin]:
    """Run `serve` for every connection, inside TLS if a context is given.

    What it raises, but for lost connections, is raised at the end.
    """
    made = Origin()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.connections += 1
        try:
            await serve(Visit(reader, writer, made.seen))
        except (ConnectionError, asyncio.CancelledError):
            pass
        except Exception as exc:
            made.failures.append(exc)
        finally:
            writer.close()

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
    if made.failures:
        raise made.failures[0]


def saying(*answers: bytes) -> Callable[[Visit], Awaitable[None]]:
    """Return an origin that gives these answers to requests without a body, the last one again and again.

    The connection is closed behind an answer that says so, or whose end nothing else tells.
    """
    waiting = list(answers)

    async def serve(visit: Visit) -> None:
        while await visit.head():
            answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            await visit.send(answer)
            low = answer.lower()
            if b"connection: close" in low or not (b"content-length" in low or b"chunked" in low or b" 204 " in low):
                return

    return serve


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def recorded(visit: Visit) -> None:
    """The origin of the recordings: echoes what it saw, in the words of Python's http.server."""
    while head := await visit.head():
        body = head.replace(b"\r\n", b"\n")
        await visit.send(
            b"HTTP/1.1 200 OK\r\nServer: BaseHTTP/0.6 Python/3.11.7\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
            b"Content-Length: %d\r\nContent-Type: text/plain\r\n\r\n%b" % (len(body), body)
        )
        if b"\nConnection: close\n" in body:
            return


async def answer_to(address: Endpoint, request: bytes, *, shut: bool = False) -> bytes:
    """Send `request` on a new connection and return all that comes until the end."""
    with await Peer.connect(address) as peer:
        await peer.send(request)
        if shut:
            peer.shut()
        return await peer.rest()
