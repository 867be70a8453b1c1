"""Small servers for the far end of a test or of the lab: HTTP and HTTPS, TCP and UDP echo, DNS.

They are asyncio programs on sockets made in a namespace, so nothing needs installing and nothing starts by itself on
the host. They share no code with the daemon's data path: what they report is an independent witness.

HTTP answers on these paths (GET and HEAD unless said otherwise; keep-alive and pipelining are understood):

/             a line for people: who came from where to where
/whoami       the same as JSON: client, client_port, server, server_port, scheme, host
/headers      the request's headers as a JSON list of [name, value], in order
/bytes/N      N bytes of `pattern`, with a length
/chunked/N    the same in chunks
/slow/S       the line of /, after S seconds
/status/N     an empty answer with status N
/upload       POST or PUT: what arrived as JSON: size, sha256
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any, TypeAlias

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import httptools

from gostnet.core.address import Endpoint
from gostnet.core.errors import KernelError
from gostnet.core.tasks import Scope, run
from gostnet.kernel import netns

from .certificates import Authority

Zone: TypeAlias = Mapping[str, Sequence[str]]
"""Names, lower case and without the last dot, and their addresses."""

_TTL = 1
_PIECE = 1 << 16
_DATAGRAMS = 32
"""Datagrams taken per turn of the loop."""
_CYCLE = bytes(range(251)) * (_PIECE // 251 + 2)
"""A prime number of different bytes: a piece that is lost, doubled or out of place never fits."""


def pattern(size: int, offset: int = 0) -> bytes:
    """Return `size` bytes of the endless pattern 0, 1, ... 250, 0, ... from `offset` on."""
    start = offset % 251
    if start + size <= len(_CYCLE):
        return _CYCLE[start : start + size]
    return (_CYCLE[:251] * ((start + size) // 251 + 1))[start : start + size]


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the services listen; 0 takes a free port (an own one for each address), None leaves a service out."""

    http: int | None = 80
    https: int | None = 443
    echo: int | None = 7
    dns: int | None = 53


FREE_PORTS = Ports(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as a server saw it. `service` is http, https, echo/tcp, echo/udp, dns/tcp or dns/udp.

    detail   the request's method and path, the first bytes echoed (at most 64, as repr), or the DNS question
    """

    service: str
    client: Endpoint
    server: Endpoint
    detail: str


class Witness:
    """Remembers the last requests; may be asked from any thread."""

    def __init__(self, size: int = 10_000) -> None:
        self._seen: deque[Seen] = deque(maxlen=size)
        self._changed = threading.Condition()

    def note(self, seen: Seen) -> None:
        """Add a request."""
        with self._changed:
            self._seen.append(seen)
            self._changed.notify_all()

    def all(self, service: str = "") -> list[Seen]:
        """Return what was seen, oldest first, of one service if given."""
        with self._changed:
            return [seen for seen in self._seen if service in ("", seen.service)]

    def clear(self) -> None:
        """Forget everything."""
        with self._changed:
            self._seen.clear()

    def wait_for(self, wanted: Callable[[Seen], bool], timeout: float = 5.0) -> Seen:
        """Block until a request fits, and return it. Raise TimeoutError after `timeout` seconds."""
        with self._changed:
            found = self._changed.wait_for(lambda: next(filter(wanted, self._seen), None), timeout)
        if found is None:
            raise TimeoutError(f"no such request within {timeout:g} s")
        return found


class Servers:
    """All services on the given addresses of one namespace."""

    def __init__(
        self,
        place: netns.Place,
        addresses: Sequence[str],
        *,
        zone: Zone | None = None,
        ports: Ports = Ports(),
        authority: Authority | None = None,
    ) -> None:
        """`zone` also gives the names for the certificate; `authority` issues it, by default one of its own."""
        self.addresses = tuple(addresses)
        self.zone = {name.lower(): tuple(values) for name, values in (zone or {}).items()}
        self.authority = authority or Authority()
        self.witness = Witness()
        self._place = place
        self._ports = ports
        self._endpoints: dict[tuple[str, int], Endpoint] = {}
        self._listening: list[asyncio.Server] = []
        self._associations: list[_Association] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._scope: Scope | None = None

    async def start(self) -> None:
        """Listen. Raise KernelError when an address or port is not to be had; nothing listens then."""
        self._scope = Scope("servers")
        try:
            for address in self.addresses:
                await self._start_on(address)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Stop listening and drop every connection. Idempotent."""
        for server in self._listening:
            server.close()
        for association in self._associations:
            association.close()
        for writer in list(self._writers):
            writer.transport.abort()
        if self._scope is not None:
            await self._scope.cancel()
        # The transports close their sockets in the loop's next turns.
        for server in self._listening:
            await server.wait_closed()
        await asyncio.sleep(0)
        self._listening.clear()
        self._associations.clear()

    def endpoint(self, service: str, version: int = 4) -> Endpoint:
        """Return where `service` (http, https, echo/tcp, echo/udp, dns/tcp, dns/udp) listens. Raise KeyError."""
        return self._endpoints[service, version]

    async def _start_on(self, address: str) -> None:
        ports = self._ports
        if ports.http is not None:
            await self._listen("http", address, ports.http, self._http)
        if ports.https is not None:
            identity = self.authority.issue(*self.zone, *self.addresses, "localhost")
            await self._listen("https", address, ports.https, self._http, identity.server_context("http/1.1"))
        if ports.echo is not None:
            await self._listen("echo/tcp", address, ports.echo, self._echo)
            self._bind("echo/udp", address, ports.echo, self._echo_datagram)
        if ports.dns is not None:
            await self._listen("dns/tcp", address, ports.dns, self._dns)
            self._bind("dns/udp", address, ports.dns, self._dns_datagram)

    async def _listen(
        self,
        service: str,
        address: str,
        port: int,
        serve: Callable[[_Connection], Any],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        sock = self._bound(service, address, port, socket.SOCK_STREAM)
        scope = self._scope
        assert scope is not None

        async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(_Connection(self, service, reader, writer))
            except (ConnectionError, TimeoutError, ssl.SSLError, asyncio.IncompleteReadError):
                pass  # the peer went away
            finally:
                self._writers.discard(writer)
                writer.close()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._writers.add(writer)
            scope.start(attend(reader, writer), f"{service} server")

        self._listening.append(await asyncio.start_server(accepted, sock=sock, ssl=tls, backlog=1024))

    def _bind(self, service: str, address: str, port: int, answer: Callable[[_Association, bytes, Any], None]) -> None:
        sock = self._bound(service, address, port, socket.SOCK_DGRAM)
        self._associations.append(_Association(self.witness, service, sock, answer))

    def _bound(self, service: str, address: str, port: int, kind: int) -> socket.socket:
        version = ip_address(address).version
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        sock = netns.socket_in(self._place, family, kind)
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
        except OSError as exc:
            sock.close()
            raise KernelError(f"serve {service} on {Endpoint(address, port)}", exc.errno or 0) from exc
        self._endpoints.setdefault((service, version), Endpoint.from_sockaddr(sock.getsockname()))
        return sock

    # ---- HTTP -----------------------------------------------------------------------------------
    async def _http(self, connection: _Connection) -> None:
        requests: deque[_Request] = deque()
        exchange = _Exchange(requests.append)
        parser = httptools.HttpRequestParser(exchange)
        exchange.parser = parser
        while data := await connection.reader.read(_PIECE):
            try:
                parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                await connection.answer(HTTPStatus.BAD_REQUEST, b"not understood\n", keep_alive=False)
                return
            if exchange.continue_wanted:
                exchange.continue_wanted = False
                await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            while requests:
                request = requests.popleft()
                connection.note(f"{request.method} {request.path}")
                await _respond(connection, request)
                if not request.keep_alive:
                    return

    # ---- echo -----------------------------------------------------------------------------------
    async def _echo(self, connection: _Connection) -> None:
        first = True
        while data := await connection.reader.read(_PIECE):
            if first:
                connection.note(repr(data[:64]))
                first = False
            await connection.send(data)
        if connection.writer.can_write_eof():
            with suppress(OSError):  # reset by the client meanwhile
                connection.writer.write_eof()

    def _echo_datagram(self, association: _Association, data: bytes, peer: Any) -> None:
        association.note(peer, repr(data[:64]))
        association.send(data, peer)

    # ---- DNS ------------------------------------------------------------------------------------
    async def _dns(self, connection: _Connection) -> None:
        while True:
            try:
                (size,) = struct.unpack("!H", await connection.reader.readexactly(2))
            except asyncio.IncompleteReadError:
                return
            query = await connection.reader.readexactly(size)
            reply, question = self._resolve(query, connection.client, 65535)
            connection.note(question)
            if reply:
                await connection.send(struct.pack("!H", len(reply)) + reply)

    def _dns_datagram(self, association: _Association, data: bytes, peer: Any) -> None:
        reply, question = self._resolve(data, Endpoint.from_sockaddr(peer), 0)
        association.note(peer, question)
        if reply:
            association.send(reply, peer)

    def _resolve(self, data: bytes, client: Endpoint, limit: int) -> tuple[bytes, str]:
        """Return (reply, question for the witness); an empty reply for what deserves none.

        `limit` 0 takes the size that the query announces (RFC 6891), 512 without.
        """
        try:
            query = dns.message.from_wire(data)
        except (dns.exception.DNSException, struct.error):
            return b"", "malformed"
        if query.flags & dns.flags.QR or query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
            return b"", "not a query"
        asked = query.question[0]
        name = asked.name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(asked.rdtype)
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.AA
        if name == "whoami" or name.startswith("whoami."):
            if kind == "TXT":
                reply.answer.append(dns.rrset.from_text(asked.name, _TTL, "IN", "TXT", f'"{client.host}"'))
        elif name in self.zone:
            version = {"A": 4, "AAAA": 6}.get(kind)
            found = [a for a in self.zone[name] if ip_address(a).version == version]
            if found:
                reply.answer.append(dns.rrset.from_text(asked.name, _TTL, "IN", kind, *found))
        else:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        limit = limit or (max(512, query.payload) if query.edns >= 0 else 512)
        try:
            wire = reply.to_wire(max_size=limit)
        except dns.exception.TooBig:
            reply.answer.clear()
            reply.flags |= dns.flags.TC
            wire = reply.to_wire(max_size=limit)
        return wire, f"{name} {kind}"


# ---- running them -------------------------------------------------------------------------------
@asynccontextmanager
async def serving(place: netns.Place, addresses: Sequence[str], **options: Any) -> AsyncIterator[Servers]:
    """Run `Servers` on the present loop; `options` are those of `Servers`."""
    servers = Servers(place, addresses, **options)
    await servers.start()
    try:
        yield servers
    finally:
        await servers.aclose()


@contextmanager
def serving_in_thread(place: netns.Place, addresses: Sequence[str], **options: Any) -> Iterator[Servers]:
    """Run `Servers` on a loop of their own in a thread, for tests that block or that have several loops."""
    started = threading.Event()
    outcome: list[Servers | BaseException] = []
    stop: list[Callable[[], None]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        finished = asyncio.Event()

        def finish() -> None:
            loop.call_soon_threadsafe(finished.set)

        stop.append(finish)
        async with serving(place, addresses, **options) as servers:
            outcome.append(servers)
            started.set()
            await finished.wait()

    def body() -> None:
        try:
            run(main(), uvloop=False)
        except BaseException as exc:  # handed to the caller, who waits for it
            outcome.append(exc)
        finally:
            started.set()

    thread = threading.Thread(target=body, name="servers", daemon=True)
    thread.start()
    started.wait()
    if isinstance(outcome[0], BaseException):
        thread.join()
        raise outcome[0]
    try:
        yield outcome[0]
    finally:
        stop[0]()
        thread.join()
    if len(outcome) > 1 and isinstance(outcome[1], BaseException):
        raise outcome[1]


# ---- parts --------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Connection:
    servers: Servers
    service: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    client: Endpoint = field(init=False)
    server: Endpoint = field(init=False)

    def __post_init__(self) -> None:
        self.client = Endpoint.from_sockaddr(self.writer.get_extra_info("peername"))
        self.server = Endpoint.from_sockaddr(self.writer.get_extra_info("sockname"))

    def note(self, detail: str) -> None:
        self.servers.witness.note(Seen(self.service, self.client, self.server, detail))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(
        self,
        status: HTTPStatus,
        body: bytes,
        *,
        kind: str = "text/plain; charset=utf-8",
        keep_alive: bool = True,
        head: bool = False,
    ) -> None:
        await self.send(_head(status, keep_alive, kind, len(body)) + (b"" if head else body))


class _Association:
    """A UDP service on its socket. asyncio's own transport loses datagrams without payload."""

    def __init__(
        self,
        witness: Witness,
        service: str,
        sock: socket.socket,
        answer: Callable[[_Association, bytes, Any], None],
    ) -> None:
        self._witness = witness
        self._service = service
        self._sock = sock
        self._answer = answer
        self._server = Endpoint.from_sockaddr(sock.getsockname())
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(_DATAGRAMS):
            try:
                data, peer = self._sock.recvfrom(65535)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about an earlier answer
            self._answer(self, data, peer)

    def send(self, data: bytes, peer: Any) -> None:
        try:
            self._sock.sendto(data, peer)
        except OSError:
            pass  # lost, as datagrams may be

    def note(self, peer: Any, detail: str) -> None:
        self._witness.note(Seen(self._service, Endpoint.from_sockaddr(peer), self._server, detail))

    def close(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()


@dataclass(slots=True)
class _Request:
    method: str = ""
    path: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    size: int = 0
    keep_alive: bool = True
    version: str = "1.1"
    digest: Any = field(default_factory=hashlib.sha256)

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")


class _Exchange:
    """What the parser calls: gathers one request after the other; bodies are counted, not kept."""

    def __init__(self, complete: Callable[[_Request], None]) -> None:
        self.parser: Any = None
        self.continue_wanted = False
        self._complete = complete
        self._request = _Request()
        self._url = b""

    def on_message_begin(self) -> None:
        self._request = _Request()
        self._url = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        request = self._request
        request.method = self.parser.get_method().decode("latin-1")
        request.version = self.parser.get_http_version()
        url = self._url.decode("latin-1")
        request.path = url.partition("://")[2].partition("/")[2] if "://" in url else url.lstrip("/")
        request.path = "/" + request.path.partition("?")[0]
        self.continue_wanted = request.header("expect").lower() == "100-continue"

    def on_body(self, data: bytes) -> None:
        self._request.size += len(data)
        self._request.digest.update(data)

    def on_message_complete(self) -> None:
        self._request.keep_alive = self.parser.should_keep_alive()
        self._complete(self._request)


def _head(status: HTTPStatus, keep_alive: bool, kind: str, length: int | None) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", "Server: gostnet-lab", f"Content-Type: {kind}"]
    if length is None:
        lines.append("Transfer-Encoding: chunked")
    elif status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):  # RFC 9110 section 8.6
        lines.append(f"Content-Length: {length}")
    lines.append(f"Connection: {'keep-alive' if keep_alive else 'close'}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def _respond(connection: _Connection, request: _Request) -> None:
    """Answer one request on one of the paths that the module describes."""
    _, first, *rest = request.path.split("/")
    argument = rest[0] if rest else ""
    client, server = connection.client, connection.server
    head, keep_alive = request.method == "HEAD", request.keep_alive
    status, kind = HTTPStatus.OK, "text/plain; charset=utf-8"
    body = b"not found\n"
    if request.method in ("POST", "PUT") and first == "upload":
        kind = "application/json"
        body = _json({"size": request.size, "sha256": request.digest.hexdigest()})
    elif request.method not in ("GET", "HEAD"):
        status, body = HTTPStatus.METHOD_NOT_ALLOWED, b"GET and HEAD; POST and PUT on /upload\n"
    elif first == "" and not rest:
        body = f"hello: you came from {client} to {server} by {connection.service}\n".encode()
    elif first == "slow" and _number(argument) is not None:
        await asyncio.sleep(_number(argument) or 0.0)
        body = f"hello, late: you came from {client} to {server} by {connection.service}\n".encode()
    elif first == "whoami":
        kind = "application/json"
        body = _json(
            {
                "client": client.host,
                "client_port": client.port,
                "server": server.host,
                "server_port": server.port,
                "scheme": connection.service,
                "host": request.header("host"),
            }
        )
    elif first == "headers":
        kind, body = "application/json", _json(request.headers)
    elif first == "status" and argument.isdigit() and 200 <= int(argument) <= 599:
        status, body = _status(int(argument)), b""
    elif first in ("bytes", "chunked") and argument.isascii() and argument.isdigit():
        await _pattern(connection, request, int(argument), chunked=first == "chunked")
        return
    else:
        status = HTTPStatus.NOT_FOUND
    await connection.answer(status, body, kind=kind, keep_alive=keep_alive, head=head)


async def _pattern(connection: _Connection, request: _Request, size: int, *, chunked: bool) -> None:
    await connection.send(
        _head(HTTPStatus.OK, request.keep_alive, "application/octet-stream", None if chunked else size)
    )
    if request.method == "HEAD":
        return
    for offset in range(0, size, _PIECE):
        piece = pattern(min(_PIECE, size - offset), offset)
        await connection.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
    if chunked:
        await connection.send(b"0\r\n\r\n")


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number <= 3600 else None


def _status(code: int) -> HTTPStatus:
    try:
        return HTTPStatus(code)
    except ValueError:
        return HTTPStatus.OK
