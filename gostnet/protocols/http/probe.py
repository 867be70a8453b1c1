"""Probe resistance: what somebody without credentials gets to see instead of a proxy.

    code:STATUS     an empty answer with this status
    web:URL         what the page at URL answers now
    host:ADDRESS    whatever the server at ADDRESS answers, to this request and all that follow
    file:PATH       the file, as HTML

Decoys are reached directly, never through the chain: the prober must not see its delays.
"""

from __future__ import annotations

import ssl
from collections.abc import Coroutine, Iterable
from typing import Any, BinaryIO, Final, TypeAlias
from urllib.parse import urljoin

from ...core.address import Endpoint, parse_endpoint
from ...core.egress import Egress
from ...core.errors import ConfigError, ConnError, GostnetError, ProtocolError
from ...core.flow import Flow
from ...core.log import Logger
from ...core.stream import CHUNK, Stream
from ...core.tasks import deadline, in_thread
from ...pipeline.handler import relay_with
from ...pipeline.router import ServiceRouter
from ...wire.http1 import (
    Body,
    HeadReader,
    Request,
    Response,
    content_length,
    head_bytes,
    parse_authority,
    parse_response,
    response_body,
    split_absolute,
)
from .answer import part
from .codec import USER_AGENT, Gunzip, asked_host, client_response, decoy_request, decoy_status, status_line

KINDS: Final = ("code", "web", "host", "file")

TIMEOUT: Final = 15.0
"""Seconds for the page of `web` (GOST's)."""

MOST_REDIRECTS: Final = 10
"""Redirects followed for `web` (Go's)."""

_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))


class Decoy:
    """One configured decoy.

    knock    hosts (lower case) whose seekers know that this is a proxy: they get the plain challenge
    """

    def __init__(self, setting: str, knock: str, idle: float, log: Logger) -> None:
        """Take `KIND:VALUE`, checked by `problem` before."""
        self.kind, _, self._value = setting.partition(":")
        self._knock = frozenset(item.strip().lower() for item in knock.split(",") if item.strip())
        self._idle = idle
        self._log = log

    def hides_from(self, request: Request) -> bool:
        """Whether the sender of `request` is to see the decoy."""
        return not self._knock or asked_host(request) not in self._knock

    async def answer(self, flow: Flow, client: Stream, egress: Egress, request: Request) -> None:
        """Answer in the decoy's name; the client's connection has ended then. A decoy that is out of reach says 503."""
        direct = egress.direct if isinstance(egress, ServiceRouter) else egress
        try:
            if self.kind == "code":
                play = self._code(client)
            elif self.kind == "file":
                play = await self._file(client)
            elif self.kind == "host":
                play = await self._host(flow, client, direct, request)
            else:
                play = await self._web(flow, client, direct, request)
        except (GostnetError, TimeoutError, OSError) as exc:
            self._log.warn(f"decoy {self.kind}: {exc}")
            await part(client, decoy_status(503))
            return
        try:
            await play
        except (GostnetError, TimeoutError, OSError) as exc:
            self._log.debug(f"decoy {self.kind}: {exc}")
            client.abort()

    # Each of these prepares what may fail while there is still time for another answer, and returns the answering.
    async def _code(self, client: Stream) -> None:
        await part(client, decoy_status(int(self._value)))

    async def _file(self, client: Stream) -> _Play:
        file, size = await in_thread(_open, self._value)

        async def play() -> None:
            left = size
            try:
                fields = [
                    (b"Content-Length", b"%d" % size),
                    (b"Connection", b"keep-alive"),
                    (b"Content-Type", b"text/html"),
                ]
                await client.send(head_bytes(status_line(200), fields))
                while left > 0 and (piece := await in_thread(file.read, min(left, CHUNK))):
                    left -= len(piece)
                    await client.send(piece)
            finally:
                file.close()
            await part(client)

        return play()

    async def _host(self, flow: Flow, client: Stream, direct: Egress, request: Request) -> _Play:
        upstream = await direct.connect(flow, parse_endpoint(self._value, default_port=80))
        try:
            await upstream.send(decoy_request(request))
        except BaseException:
            upstream.abort()
            raise
        return relay_with(flow, client, upstream, idle=self._idle)

    async def _web(self, flow: Flow, client: Stream, direct: Egress, request: Request) -> _Play:
        url = self._value if self._value.startswith("http") else "http://" + self._value
        with deadline(TIMEOUT):
            page = await _fetch(flow, direct, url)

        async def play() -> None:
            response, decoded = page.response, page.gunzip is not None
            try:
                with deadline(TIMEOUT):
                    await client.send(
                        client_response(
                            response,
                            11,
                            close=False,
                            length=None if decoded else page.length,
                            decoded=decoded,
                            more=[(b"Connection", b"keep-alive")] if response.status == 200 else None,
                        )
                    )
                    if request.method != b"HEAD":
                        await page.pass_on(client)
            finally:
                page.stream.abort()
            await part(client)

        return play()


_Play: TypeAlias = Coroutine[Any, Any, None]


def problem(setting: str) -> str:
    """Return what is wrong with a `probeResist` setting, "" if it can be used."""
    kind, colon, value = setting.partition(":")
    if not colon or kind not in KINDS or not value:
        return f"{setting!r} is not one of code:STATUS, web:URL, host:ADDRESS and file:PATH"
    if kind == "code" and not (value.isascii() and value.isdigit() and 200 <= int(value) <= 999):
        return f"{value!r} is not a status such as 404"
    if kind == "host":
        try:
            parse_endpoint(value, default_port=80)
        except ConfigError as exc:
            return exc.reason
    if kind == "web":
        try:
            _split(value if value.startswith("http") else "http://" + value)
        except ProtocolError as exc:
            return str(exc)
    return ""


def _open(path: str) -> tuple[BinaryIO, int]:
    file = open(path, "rb")  # noqa: SIM115 - closed by the caller, on another thread
    return file, file.seek(0, 2) - file.seek(0)


# ---- a page -------------------------------------------------------------------------------------
class _Page:
    """A decoy page, of which the head has come."""

    def __init__(self, stream: Stream, response: Response, rest: bytes) -> None:
        self.stream = stream
        self.response = response
        self.body: Body | None = response_body(response, b"GET")
        self.length = self.body.length if self.body is not None else content_length(response)
        self.gunzip = Gunzip() if response.get(b"content-encoding").lower() == b"gzip" else None
        self._rest = rest

    async def pass_on(self, client: Stream) -> None:
        """Send the body, without its content coding; its end is the connection's unless a length was said."""
        body, data = self.body, self._rest
        while body is not None and not body.done:
            if data:
                for piece in self._decoded(body.feed(data)):
                    await client.send(piece)
            if not body.done and not (data := await self.stream.receive()):
                body.end()

    def _decoded(self, payload: bytes) -> Iterable[bytes]:
        if self.gunzip is not None:
            return self.gunzip.feed(payload)
        return (payload,) if payload else ()


def _split(url: str) -> tuple[bool, Endpoint, bytes, bytes]:
    """Return (TLS, where, authority, path) of a URL. Raise ProtocolError."""
    try:
        found = split_absolute(url.encode("ascii"))
    except UnicodeEncodeError as exc:
        raise ProtocolError(f"{url!r} is not a URL in ASCII") from exc
    if found is None or found[0] not in (b"http", b"https") or any(byte <= 32 or byte == 127 for byte in found[2]):
        raise ProtocolError(f"{url!r} is not a URL such as http://example.com/")
    scheme, authority, path = found
    where = parse_authority(authority, 443 if scheme == b"https" else 80)
    if not where.host:
        raise ProtocolError(f"{url!r} has no host")
    return scheme == b"https", where, authority, path


async def _fetch(flow: Flow, direct: Egress, url: str) -> _Page:
    for _ in range(MOST_REDIRECTS + 1):
        secure, where, authority, path = _split(url)
        stream: Stream = await direct.connect(flow, where)
        try:
            if secure:
                stream = _Tls(stream, where.host)
            await stream.send(
                head_bytes(
                    b"GET %b HTTP/1.1" % path,
                    [(b"Host", authority), (b"User-Agent", USER_AGENT), (b"Accept-Encoding", b"gzip")],
                )
            )
            response, rest = await _response(stream)
            location = response.get(b"location")
            if response.status not in _REDIRECTS or not location:
                return _Page(stream, response, rest)
        except BaseException:
            stream.abort()
            raise
        stream.abort()
        try:
            url = urljoin(url, location.decode("latin-1"))
        except ValueError as exc:
            raise ProtocolError(f"redirect to {location[:64]!r}: {exc}") from exc
    raise ProtocolError(f"more than {MOST_REDIRECTS} redirects")


async def _response(stream: Stream) -> tuple[Response, bytes]:
    reader = HeadReader(response=True)
    while True:
        data = await stream.receive()
        if not data:
            raise ConnError("the decoy closed without an answer")
        while data and (head := reader.feed(data)) is not None:
            response = parse_response(head)
            if response.status >= 200:
                return response, reader.rest
            data, reader = reader.rest, HeadReader(response=True)


class _Tls(Stream):
    """The client side of TLS for one page; the handshake is part of the first `send`."""

    __slots__ = ("_below", "_in", "_object", "_out")

    def __init__(self, below: Stream, name: str) -> None:
        super().__init__(below.local, below.remote)
        self._below = below
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = ssl.create_default_context().wrap_bio(self._in, self._out, server_hostname=name)

    async def _flush(self) -> None:
        if self._out.pending:
            await self._below.send(self._out.read())

    async def _fill(self) -> None:
        await self._flush()
        data = await self._below.receive()
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        try:
            while True:
                try:
                    self._object.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await self._fill()
            self._object.write(data)
        except ssl.SSLError as exc:
            raise ConnError(f"TLS: {exc.reason or exc}") from exc
        await self._flush()

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._head:
            return self._take_head(max_bytes)
        while True:
            try:
                return self._object.read(max_bytes)
            except ssl.SSLWantReadError:
                await self._fill()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as exc:
                raise ConnError(f"TLS: {exc.reason or exc}") from exc

    async def send_eof(self) -> None:
        await self._flush()

    async def aclose(self) -> None:
        await self._below.aclose()

    def abort(self) -> None:
        self._below.abort()
