"""One DNS server: how it is written, and one question to it over UDP or TCP (RFC 1035 section 4.2).

The sockets are an Egress's, so chains, marks and interfaces hold. Each UDP question has a socket of its own: its port,
the random id and the question itself are what a forged answer would have to guess.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, TypeVar

import dns.edns
import dns.exception
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype

from ..core.address import ANY, Endpoint, parse_endpoint
from ..core.datagrams import Datagram, Datagrams
from ..core.egress import Egress
from ..core.errors import ConfigError, GostnetError, ResolveError
from ..core.flow import Flow
from ..core.stream import Stream
from ..core.suggest import did_you_mean
from .networks import V4, number

Transport: TypeAlias = Literal["udp", "tcp"]
Family: TypeAlias = Literal[4, 6]
T = TypeVar("T")
Accept: TypeAlias = Callable[[bytes], T | None]

CODE: Final = "config.nameserver"
PORT: Final = 53
TIMEOUT: Final = 5.0
"""Seconds for one question, as in GOST."""
RESEND: Final = (1.0, 2.0)
"""Seconds before a question over UDP is sent the second and the third time."""
EDNS_PAYLOAD: Final = 1232
"""Bytes announced where EDNS is needed: what passes without fragments (DNS flag day 2020)."""
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


def parse_server(text: str, path: str) -> tuple[Transport, Endpoint]:
    """Return transport and address of `[udp|tcp://]HOST[:PORT]`. Raise ConfigError."""
    scheme, separator, rest = text.strip().partition("://")
    if not separator:
        scheme, rest = "udp", scheme
    scheme = scheme.lower()
    if scheme in ("tls", "dot", "https"):
        raise ConfigError(path, f"name servers over {scheme!r} are not available in this version", code="unavailable")
    if scheme not in ("udp", "tcp"):
        known = did_you_mean(scheme, ("udp", "tcp", "tls", "https"))
        raise ConfigError(path, f"{scheme!r} is not a way to ask a name server, such as udp or tcp{known}", code=CODE)
    address = parse_endpoint(rest.partition("/")[0], path, default_port=PORT)
    if not address.host:
        raise ConfigError(path, f"{text!r} has no host", code=CODE)
    return ("tcp" if scheme == "tcp" else "udp"), address


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
            for data in pieces(datagram):
                answer = accept(data)
                if answer is not None:
                    return answer, bool(data[2] & 2)
    raise ResolveError(f"{server}: the association ended")


def pieces(datagram: Datagram) -> Iterator[bytes]:
    """Return the datagrams that one holds."""
    data = bytes(datagram.data)
    step = datagram.stride or len(data) or 1
    for start in range(0, len(data), step):
        yield data[start : start + step]


async def _ask_tcp(server: NameServer, query: bytes, accept: Accept[T], client: Endpoint) -> T:
    """Ask over a connection of its own: two bytes of length, then the message, both ways."""
    flow = Flow(SERVICE, client, network="tcp", target=server.address)
    stream = await server.egress.connect(flow, server.address)
    try:
        await stream.send(len(query).to_bytes(2, "big") + query)
        size = int.from_bytes(await _exactly(server, stream, 2), "big")
        answer = accept(await _exactly(server, stream, size))
        if answer is None:
            raise ResolveError(f"{server}: what came back is no answer to the question")
        return answer
    finally:
        stream.abort()


async def _exactly(server: NameServer, stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive(size - len(data))
        if not piece:
            raise ResolveError(f"{server}: the connection ended before the answer was complete")
        data += piece
    return data
