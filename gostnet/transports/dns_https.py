"""DNS over HTTPS at the listener `dns` (RFC 8484): queries out of HTTP/2 and HTTP/1.1, answers into it.

Each connection is a Datagrams whose payloads are messages; the port of a datagram's peer is the number of its request.
"""

from __future__ import annotations

import asyncio
import binascii
from abc import abstractmethod
from base64 import urlsafe_b64decode
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from ..core.address import Endpoint
from ..core.datagrams import Datagram, Datagrams
from ..core.errors import ConnError, ProtocolError
from ..core.flow import Flow
from ..core.stream import Stream
from ..core.tasks import deadline
from ..wire import dns_message, http1
from .tls import TlsStream

ALPN: Final = ("h2", "http/1.1")
MEDIA: Final = b"application/dns-message"
PIPELINED: Final = 64
"""Requests of one connection in work at a time."""
IDLE: Final = 60.0
REQUEST_TIME: Final = 10.0
"""Seconds for a connection without a request in work, and for a request to come whole."""
WRITE_TIME: Final = 10.0
"""Seconds for a client to take an answer."""

_Fields = list[tuple[bytes, bytes]]


class DnsOverHttps:
    """The layer above TLS: it turns a connection into its queries."""

    async def server(self, flow: Flow, below: Stream) -> Any:
        """Return the connection as Datagrams; it speaks what TLS agreed on, HTTP/1.1 where it agreed on nothing."""
        if isinstance(below, TlsStream) and below.alpn == "h2":
            return Http2Queries(below)
        return Http1Queries(below)

    async def client(self, flow: Flow, below: Stream, name: str) -> Stream:
        """Raise ProtocolError: this is a listener's side."""
        raise ProtocolError("DNS over HTTPS is asked for by name servers, not by dialers")


def query_of(method: bytes, target: bytes, kind: bytes, body: bytes) -> bytes | int:
    """Return the query in a request, of any path, or the status that says what is wrong with it.

    GET carries it in `?dns=`, base64url without padding (RFC 8484 section 4.1), POST as its body.
    """
    if method == b"POST":
        if kind.partition(b";")[0].strip().lower() != MEDIA:
            return 415
        query = body
    elif method == b"GET":
        parameters = target.partition(b"?")[2].partition(b"#")[0].split(b"&")
        text = next((part[4:] for part in parameters if part.startswith(b"dns=")), b"").rstrip(b"=")
        try:
            query = urlsafe_b64decode(text + b"=" * (-len(text) % 4))
        except (binascii.Error, ValueError):
            return 400
    else:
        return 405
    # What is no query gets no answer from a name service, and a request must have one.
    if len(query) < dns_message.HEADER or query[2] & 0x80:
        return 400
    return query if len(query) <= dns_message.MAX_SIZE else 413


def _fields_of(status: int, body: bytes) -> _Fields:
    fields: _Fields = [(b"content-length", b"%d" % len(body))]
    if status == 405:
        fields.append((b"allow", b"GET, POST"))
    if body:
        fields.append((b"content-type", MEDIA))
        try:
            lifetime = dns_message.parse_answer(body).lifetime
        except ProtocolError:
            lifetime = None
        # RFC 8484 section 5.1: a cache of HTTP's must not keep it longer than DNS allows.
        fields.append((b"cache-control", b"max-age=%d" % (lifetime.seconds if lifetime is not None else 0)))
    return fields


class _Queries(Datagrams):
    """What both versions have in common: the connection below, and bounded writes."""

    __slots__ = ("_below", "_closed", "_writing")

    def __init__(self, below: Stream) -> None:
        super().__init__(below.local, dns_message.MAX_SIZE)
        self._below = below
        self._writing = asyncio.Lock()
        self._closed = False

    @abstractmethod
    def _pending(self) -> bytes:
        """Return what is to be written now."""

    async def _flush(self) -> None:
        """Write what is pending. Raise ConnError, also for a client that does not read."""
        try:
            with deadline(WRITE_TIME):
                async with self._writing:
                    data = self._pending()
                    if data:
                        await self._below.send(data)
        except TimeoutError as exc:
            raise ConnError("the client does not read its answers") from exc

    async def aclose(self) -> None:
        self._end()
        await self._below.aclose()

    def abort(self) -> None:
        self._end()
        self._below.abort()

    @abstractmethod
    def _end(self) -> None:
        """Let go of whoever waits for the other direction."""


class Http1Queries(_Queries):
    """HTTP/1.1: one request after the other, each read when the one before has been answered."""

    __slots__ = ("_answered", "_last", "_out", "_rest")

    def __init__(self, below: Stream) -> None:
        super().__init__(below)
        self._rest = b""
        self._last = False
        self._out = b""
        self._answered: asyncio.Future[None] | None = None

    async def receive(self) -> Sequence[Datagram]:
        if self._answered is not None:
            await self._answered
            self._answered = None
        while not (self._last or self._closed):
            try:
                found = await self._request()
            except ProtocolError as exc:
                self._last = True
                await self._respond(431 if isinstance(exc, http1.HeadTooLarge) else 400, b"")
                raise
            if found is None:
                break
            if isinstance(found, bytes):
                self._answered = asyncio.get_running_loop().create_future()
                return (Datagram(found, self._below.remote),)
            await self._respond(found, b"")
        return ()

    async def send(self, batch: Sequence[Datagram]) -> None:
        try:
            for datagram in batch:
                await self._respond(200, bytes(datagram.data))
        except ConnError:
            self._last = True
            raise
        finally:
            self._release()

    def _release(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def _pending(self) -> bytes:
        data, self._out = self._out, b""
        return data

    def _end(self) -> None:
        self._closed = True
        self._release()

    async def _respond(self, status: int, body: bytes) -> None:
        fields = _fields_of(status, body)
        if self._last:
            fields.append((b"connection", b"close"))
        start = b"HTTP/1.1 %d %b" % (status, http1.reason_of(status).encode("ascii"))
        self._out += http1.head_bytes(start, [(http1.canonical(name), value) for name, value in fields]) + body
        await self._flush()

    async def _request(self) -> bytes | int | None:
        """Read one request: its query, or the status to answer with; None at the end. Raise ProtocolError."""
        data, self._rest = self._rest, b""
        if not data:
            try:
                with deadline(IDLE):
                    data = await self._below.receive()
            except TimeoutError:
                return None
            if not data:
                return None
        try:
            with deadline(REQUEST_TIME):
                return await self._parse(data)
        except TimeoutError as exc:
            raise ProtocolError(f"a request that does not end within {REQUEST_TIME:g}s") from exc

    async def _parse(self, data: bytes) -> bytes | int:
        reader = http1.HeadReader()
        head = reader.feed(data)
        while head is None:
            head = reader.feed(await self._more())
        request = http1.parse_request(head)
        self._last = not request.persistent
        taker = http1.request_body(request)
        body = b""
        data = reader.rest
        if taker is not None and not data and request.get(b"expect").lower() == b"100-continue":
            self._out += b"HTTP/1.1 100 Continue\r\n\r\n"
            await self._flush()
        while taker is not None and not taker.done:
            body += taker.feed(data or await self._more())
            data = b""
            if len(body) > dns_message.MAX_SIZE:
                self._last = True
                return 413
        self._rest = taker.rest if taker is not None else data
        return query_of(request.method, request.target, request.get(b"content-type"), body)

    async def _more(self) -> bytes:
        data = await self._below.receive()
        if not data:
            raise ProtocolError("the client closed inside a request")
        return data


class Http2Queries(_Queries):
    """HTTP/2: requests as they come, answers in any order."""

    __slots__ = ("_messages", "_ready", "_room", "_working")

    def __init__(self, below: Stream) -> None:
        from ..wire.http2_messages import ShortMessages  # h2 takes time to import; most services never need it

        super().__init__(below)
        self._messages = ShortMessages(client=False, limit=dns_message.MAX_SIZE, streams=PIPELINED)
        self._ready: deque[Datagram] = deque()
        self._working = 0
        self._room: asyncio.Future[None] | None = None

    async def receive(self) -> Sequence[Datagram]:
        await self._flush()
        # A request that is taken back stays in work until it is answered: who takes all of them back gets no more in.
        while not self._closed:
            if self._working >= PIPELINED:
                self._room = asyncio.get_running_loop().create_future()
                await self._room
                continue
            if self._ready:
                batch = [self._ready.popleft() for _ in range(min(len(self._ready), PIPELINED - self._working))]
                self._working += len(batch)
                return batch
            try:
                with deadline(IDLE):
                    data = await self._below.receive()
            except TimeoutError:
                if self._working:
                    continue
                data = b""
            if not data:
                self._messages.end()
                await self._flush()
                return ()
            try:
                self._take(data)
            finally:
                await self._flush()
        return ()

    def _take(self, data: bytes) -> None:
        from ..wire.http2_messages import Fate

        for message in self._messages.receive(data):
            if message.fate is Fate.RESET:
                continue
            found: bytes | int = 413
            if message.fate is Fate.WHOLE:
                method, target = message.fields.get(b":method", b""), message.fields.get(b":path", b"")
                found = query_of(method, target, message.fields.get(b"content-type", b""), message.body)
            if isinstance(found, int):
                self._respond(message.stream, found, b"")
            else:
                self._ready.append(Datagram(found, Endpoint(self._below.remote.host, message.stream)))

    def _respond(self, stream: int, status: int, body: bytes) -> None:
        self._messages.respond(stream, [(b":status", b"%d" % status), *_fields_of(status, body)], body)

    async def send(self, batch: Sequence[Datagram]) -> None:
        for datagram in batch:
            self._working -= 1
            self._respond(datagram.peer.port, 200, bytes(datagram.data))
        self._wake()
        await self._flush()

    def _pending(self) -> bytes:
        return self._messages.outgoing()

    def _wake(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _end(self) -> None:
        self._closed = True
        self._wake()
