"""One DNS server: how it is written, and one question to it over UDP, TCP (RFC 1035 section 4.2), TLS (RFC 7858) or
HTTPS (RFC 8484).

The sockets are an Egress's, so chains, marks and interfaces hold. Each UDP question has a socket of its own: its port,
the random id and the question itself are what a forged answer would have to guess. Connections under TLS are kept for
the next question, one at a time each, or any number at once by HTTP/2.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, TypeVar

import dns.edns
import dns.exception
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype

from ..core.address import ANY, Endpoint, parse_endpoint
from ..core.contracts import Layer
from ..core.datagrams import Datagram, Datagrams, pieces
from ..core.egress import Egress
from ..core.errors import ConfigError, ConnError, GostnetError, ResolveError
from ..core.flow import Flow
from ..core.stream import Stream
from ..core.suggest import did_you_mean
from ..wire import http1
from . import doh
from .networks import V4, number

Transport: TypeAlias = Literal["udp", "tcp", "tls", "https"]
Family: TypeAlias = Literal[4, 6]
T = TypeVar("T")
Accept: TypeAlias = Callable[[bytes], T | None]

CODE: Final = "config.nameserver"
PORT: Final = 53
TLS_PORT: Final = 853
HTTPS_PORT: Final = 443
HTTP_PATH: Final = "/dns-query"
TIMEOUT: Final = 5.0
"""Seconds for one question, as in GOST."""
RESEND: Final = (1.0, 2.0)
"""Seconds before a question over UDP is sent the second and the third time."""
EDNS_PAYLOAD: Final = 1232
"""Bytes announced where EDNS is needed: what passes without fragments (DNS flag day 2020)."""
CONNECTIONS: Final = 32
"""Connections under TLS to one server at a time; who finds all of them busy waits."""
KEPT: Final = 8
KEEP: Final = 10.0
"""Connections kept between questions, and seconds for each: less than what servers allow."""
HTTP_ALPN: Final = doh.HTTP_ALPN
SERVICE: Final = "resolver"
"""Name of the service on the flows that carry questions."""

TYPES: Final[dict[Family, dns.rdatatype.RdataType]] = {4: dns.rdatatype.A, 6: dns.rdatatype.AAAA}


@dataclass(frozen=True, slots=True, kw_only=True)
class NameServer:
    """A server and how it is asked.

    prefer   4 or 6: which family is asked first when the caller does not say (0 is 4)
    only     4 or 6: the other family is never asked, whatever the caller says (Y16)
    subnet   a client's address told to the server (RFC 7871), "" for none
    ttl      seconds answers are kept: 0 as they say, less than 0 not at all
    timeout  seconds for one question, both transports together
    stale    an expired answer is used at once and refreshed behind the scenes
    tls      the client side of TLS for the transports tls and https, which must verify; for HTTP/2 it must offer it
    hostname the name that the certificate must bear, "" for the address's host
    path     of the URL, for https
    """

    address: Endpoint
    egress: Egress
    transport: Transport = "udp"
    prefer: int = 0
    only: int = 0
    subnet: str = ""
    ttl: float = 0.0
    timeout: float = TIMEOUT
    stale: bool = False
    tls: Layer | None = None
    hostname: str = ""
    path: str = HTTP_PATH
    kept: Connections = field(default_factory=lambda: Connections(), compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.transport}://{self.address}"

    def families(self, asked: int) -> tuple[Family, ...]:
        """Return the families to ask for, in order: `only`, else the caller's, else both (Y10, Y11, Y16)."""
        pinned = self.only or asked
        if pinned:
            return (6,) if pinned == 6 else (4,)
        return (6, 4) if self.prefer == 6 else (4, 6)


class Refused(ResolveError):
    """The server answered with an error code: it works, but not for this question."""


def parse_server(text: str, path: str, *, secure: bool = False) -> tuple[Transport, Endpoint]:
    """Return transport and address of `[udp|tcp|tls|dot|https://]HOST[:PORT][/PATH]`. Raise ConfigError.

    secure    TLS can be had
    """
    scheme, separator, rest = text.strip().partition("://")
    if not separator:
        scheme, rest = "udp", scheme
    scheme = scheme.lower()
    if scheme in ("tls", "dot", "https") and not secure:
        raise ConfigError(path, f"name servers over {scheme!r} are not available in this version", code="unavailable")
    transport = _TRANSPORTS.get(scheme)
    if transport is None:
        known = did_you_mean(scheme, ("udp", "tcp", "tls", "https"))
        raise ConfigError(path, f"{scheme!r} is not a way to ask a name server, such as udp or tcp{known}", code=CODE)
    port = {"tls": TLS_PORT, "https": HTTPS_PORT}.get(transport, PORT)
    address = parse_endpoint(rest.partition("/")[0], path, default_port=port)
    if not address.host:
        raise ConfigError(path, f"{text!r} has no host", code=CODE)
    return transport, address


_TRANSPORTS: Final[dict[str, Transport]] = {"udp": "udp", "tcp": "tcp", "tls": "tls", "dot": "tls", "https": "https"}


def parse_path(text: str, path: str) -> str:
    """Return the path of a server's URL, `/dns-query` where it has none. Raise ConfigError for one no request can hold.

    A template's variable `{?dns}` is for GET, and left out.
    """
    found = text.strip().partition("://")[2].partition("/")[2].partition("#")[0].replace("{?dns}", "")
    if not found:
        return HTTP_PATH
    if not found.isascii() or any(char <= " " or char == "\x7f" for char in found):
        raise ConfigError(path, f"{text!r} has blanks or characters that must be percent-encoded", code=CODE)
    return "/" + found


def parse_family(text: str, path: str) -> int:
    """Return 4, 6, or 0 for "", of `ipv4`, `ip4`, `ipv6`, `ip6`. Raise ConfigError."""
    lowered = text.strip().lower()
    families = {"": 0, "ipv4": 4, "ip4": 4, "ipv6": 6, "ip6": 6}
    if lowered not in families:
        raise ConfigError(path, f"{text!r} is neither ipv4 nor ipv6", code=CODE)
    return families[lowered]


def parse_subnet(text: str, path: str) -> str:
    """Return the address to tell servers, "" for none. Raise ConfigError."""
    stripped = text.strip()
    if stripped and number(stripped) is None:
        raise ConfigError(path, f"{text!r} is not an IP address", code=CODE)
    return stripped


def make_query(server: NameServer, name: dns.name.Name, family: Family) -> dns.message.QueryMessage:
    """Return a question with a random id, and the client's network where the server is to know it (Y12)."""
    query = dns.message.make_query(name, TYPES[family], id=secrets.randbits(16))
    if server.subnet:
        value = number(server.subnet)
        assert value is not None
        option = dns.edns.ECSOption(server.subnet, 24 if value >= V4 else 128)
        query.use_edns(0, payload=EDNS_PAYLOAD, options=[option])
    return query


def parse_answer(data: bytes, query: dns.message.Message) -> dns.message.QueryMessage | None:
    """Return the message if it is the answer to `query`: same id, same question. None for anything else.

    A truncated one (TC) comes with what could be read of it.
    """
    if len(data) < 12 or data[0] << 8 | data[1] != query.id or not data[2] & 0x80:
        return None
    message: dns.message.Message
    try:
        message = dns.message.from_wire(data, ignore_trailing=True, raise_on_truncation=True)
    except dns.message.Truncated as exc:
        message = exc.message()  # type: ignore[no-untyped-call]
    except (dns.exception.DNSException, struct.error, ValueError):
        return None
    if not isinstance(message, dns.message.QueryMessage) or message.opcode() != dns.opcode.QUERY:
        return None
    if not message.question and message.rcode() != dns.rcode.NOERROR:
        return message  # servers that could not read the question do not repeat it
    return message if message.question == query.question else None


async def ask(server: NameServer, name: dns.name.Name, family: Family) -> dns.message.QueryMessage:
    """Put one question to `server`. Raise ResolveError when no answer came in time, Refused for an error code.

    NXDOMAIN is an answer.
    """
    query = make_query(server, name, family)
    answer = await exchange(server, query.to_wire(), lambda data: parse_answer(data, query), _shown(name))
    if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        raise Refused(f"{server}: {dns.rcode.to_text(answer.rcode())} for {_shown(name)}")
    return answer


def _shown(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True)


async def exchange(
    server: NameServer,
    query: bytes,
    accept: Accept[T],
    about: str = "the question",
    *,
    client: Endpoint = ANY,
    partial: bool = False,
) -> T:
    """Send `query`, a message with a random id, and return what `accept` makes of the answer to it.

    accept     returns None for what is no answer to the query; over UDP more may come, so the wait goes on
    client     on whose behalf; chains that choose by client look at it
    partial    a truncated answer is returned where TCP does not work; else that is the failure

    Raise ResolveError; the server's timeout holds for everything together.
    """
    cut: T | None = None
    try:
        async with asyncio.timeout(server.timeout):
            if server.transport == "udp":
                answer, truncated = await _ask_udp(server, query, accept, client)
                if not truncated:
                    return answer
                if partial:
                    cut = answer
            if server.transport in ("tls", "https"):
                return await _ask_tls(server, query, accept, client)
            return await _ask_tcp(server, query, accept, client)
    except TimeoutError as exc:
        if cut is not None:
            return cut
        raise ResolveError(f"{server}: no answer about {about} within {server.timeout:g}s") from exc
    except GostnetError as exc:
        if cut is not None:
            return cut
        if isinstance(exc, ResolveError):
            raise
        raise ResolveError(f"{server}: {exc}") from exc


async def _ask_udp(server: NameServer, query: bytes, accept: Accept[T], client: Endpoint) -> tuple[T, bool]:
    """Return the answer, and whether it is truncated."""
    flow = Flow(SERVICE, client, network="udp", target=server.address)
    datagrams = await server.egress.associate(flow, server.address)
    try:
        request = Datagram(query, server.address)
        for pause in (*RESEND, None):
            await datagrams.send((request,))
            try:
                async with asyncio.timeout(pause):
                    return await _answer_among(server, datagrams, accept)
            except TimeoutError:
                continue
    finally:
        datagrams.abort()
    raise AssertionError("the last wait has no end of its own")


async def _answer_among(server: NameServer, datagrams: Datagrams, accept: Accept[T]) -> tuple[T, bool]:
    """Wait for the answer; anything else that arrives is no reason to stop waiting."""
    while batch := await datagrams.receive():
        for datagram in batch:
            for data in map(bytes, pieces(datagram)):
                answer = accept(data)
                if answer is not None:
                    return answer, bool(data[2] & 2)
    raise ResolveError(f"{server}: the association ended")


async def _ask_tcp(server: NameServer, query: bytes, accept: Accept[T], client: Endpoint) -> T:
    """Ask over a connection of its own: two bytes of length, then the message, both ways."""
    flow = Flow(SERVICE, client, network="tcp", target=server.address)
    stream = await server.egress.connect(flow, server.address)
    try:
        return _accepted(server, await _converse(server, stream, query), accept)
    finally:
        stream.abort()


def _accepted(server: NameServer, data: bytes, accept: Accept[T]) -> T:
    answer = accept(data)
    if answer is None:
        raise ResolveError(f"{server}: what came back is no answer to the question")
    return answer


async def _converse(server: NameServer, stream: Stream, query: bytes) -> bytes:
    await stream.send(len(query).to_bytes(2, "big") + query)
    size = int.from_bytes(await _exactly(server, stream, 2), "big")
    return await _exactly(server, stream, size)


async def _exactly(server: NameServer, stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive(size - len(data))
        if not piece:
            raise ResolveError(f"{server}: the connection ended before the answer was complete")
        data += piece
    return data


# ---- TLS ----------------------------------------------------------------------------------------
class Connections:
    """Connections to one server kept for their next question; idle ones close by themselves after KEEP seconds.

    http2    the one that carries many questions at once, None if there is none
    """

    __slots__ = ("_free", "_idle", "_multiplexes", "_opening", "_timer", "http2")

    def __init__(self) -> None:
        self._idle: dict[Stream, asyncio.TimerHandle] = {}
        self._free: asyncio.Semaphore | None = None
        self._opening: asyncio.Lock | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._multiplexes = True
        self.http2: doh.Http2 | None = None

    def __len__(self) -> int:
        return len(self._idle) + (self.http2 is not None and not self.http2.ended)

    @property
    def free(self) -> asyncio.Semaphore:
        """What bounds the connections in use."""
        if self._free is None:
            self._free = asyncio.Semaphore(CONNECTIONS)
        return self._free

    @asynccontextmanager
    async def opening(self) -> AsyncIterator[None]:
        """Let one at a time open a connection, as long as it may turn out to be one for all who wait."""
        if self._opening is None:
            self._opening = asyncio.Lock()
        if self._multiplexes:
            async with self._opening:
                yield
        else:
            yield

    def take(self) -> Stream | None:
        """Return the one used last, None if there is none. The server may have closed it."""
        if not self._idle:
            return None
        stream, timer = self._idle.popitem()
        timer.cancel()
        return stream

    def put(self, stream: Stream) -> None:
        """Keep a connection whose last exchange is complete."""
        if len(self._idle) >= KEPT:
            self._expire(next(iter(self._idle)))
        self._idle[stream] = asyncio.get_running_loop().call_later(KEEP, self._expire, stream)

    def _expire(self, stream: Stream) -> None:
        self._idle.pop(stream).cancel()
        stream.abort()

    def adopt(self, stream: Stream) -> doh.Http2 | None:
        """Make a new connection the one for many questions if it speaks HTTP/2, else return None."""
        self._multiplexes = doh.speaks_http2(stream)
        if not self._multiplexes:
            return None
        if self.http2 is not None and self.http2.idle:
            self.http2.close()
        self.http2 = doh.Http2(stream)
        return self.http2

    def rest(self, session: doh.Http2) -> None:
        """Note that a question of HTTP/2 has ended: when it was the last one, the connection waits for the next.

        One that was full, and has given its place to another, is done then.
        """
        if session is not self.http2:
            if session.idle:
                session.close()
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(KEEP, self._expire_http2)

    def _expire_http2(self) -> None:
        if self.http2 is not None and self.http2.idle:
            self.http2.close()
            self.http2 = None

    def close(self) -> None:
        """Close what waits."""
        for stream in tuple(self._idle):
            self._expire(stream)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._expire_http2()


async def _ask_tls(server: NameServer, query: bytes, accept: Accept[T], client: Endpoint) -> T:
    """Ask over a kept connection, else over a new one; a kept one that has died in between is no failure."""
    kept = server.kept
    if kept.http2 is not None and kept.http2.usable:
        try:
            return await _ask_http2(server, kept.http2, query, accept)
        except ConnError:
            pass
    async with kept.free:
        while (stream := kept.take()) is not None:
            try:
                return await _exchange_on(server, stream, query, accept)
            except GostnetError:
                continue
        if server.transport != "https":
            return await _exchange_on(server, await _open(server, client), query, accept)
        async with kept.opening():
            session = kept.http2 if kept.http2 is not None and kept.http2.usable else None
            if session is None:
                fresh = await _open(server, client)
                session = kept.adopt(fresh)
        if session is None:
            return await _exchange_on(server, fresh, query, accept)
    return await _ask_http2(server, session, query, accept)


async def _ask_http2(server: NameServer, session: doh.Http2, query: bytes, accept: Accept[T]) -> T:
    try:
        return _accepted(server, await session.post(_authority(server), server.path.encode("ascii"), query), accept)
    finally:
        server.kept.rest(session)


async def _open(server: NameServer, client: Endpoint) -> Stream:
    flow = Flow(SERVICE, client, network="tcp", target=server.address)
    if server.tls is None:
        raise ResolveError(f"{server}: no TLS here")
    stream = await server.egress.connect(flow, server.address)
    try:
        return await server.tls.client(flow, stream, server.hostname or server.address.host)
    except BaseException:
        stream.abort()
        raise


async def _exchange_on(server: NameServer, stream: Stream, query: bytes, accept: Accept[T]) -> T:
    """Return the answer, and keep the connection or close it."""
    reusable = False
    try:
        if server.transport == "https":
            data, persistent = await doh.post(stream, _authority(server), server.path.encode("ascii"), query)
        else:
            data, persistent = await _converse(server, stream, query), True
        answer = _accepted(server, data, accept)
        reusable = persistent
        return answer
    finally:
        if reusable:
            server.kept.put(stream)
        else:
            stream.abort()


def _authority(server: NameServer) -> bytes:
    where = Endpoint(server.hostname or server.address.host, server.address.port)
    return http1.format_authority(where).removesuffix(b":443")
