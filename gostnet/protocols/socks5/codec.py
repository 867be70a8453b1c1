"""SOCKS5 messages, both sides: methods, credentials, request and reply.

    methods      05 N METHOD..            chosen    05 METHOD (ff: none)         RFC 1928 section 3
    credentials  01 N USER N PASSWORD     outcome   01 STATUS (00: accepted)     RFC 1929 section 2
    request      05 CMD 00 ATYP ADDR PORT reply     05 REP 00 ATYP ADDR PORT     RFC 1928 sections 4 and 6

RSV is written 0 and not looked at. Methods 80, 82 and command F3 are GOST's (gosocks5); F0 and F1 are Tor's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from ...core.address import ANY, Endpoint
from ...core.errors import AuthDenied, ProtocolError, UpstreamRejected
from ...core.sansio import Ask, Handshake, Read, Send
from ...wire.socks_addr import ZERO, decode_address, encode_address, rest_size

VERSION: Final = 5
AUTH_VERSION: Final = 1


class Method(IntEnum):
    """What comes between the choice of a method and the request."""

    NONE = 0x00
    PASSWORD = 0x02
    TLS = 0x80
    """A TLS handshake on the same connection, then nothing more."""
    TLS_PASSWORD = 0x82
    """A TLS handshake, then user name and password inside."""
    UNACCEPTABLE = 0xFF


class Command(IntEnum):
    """What a request asks for."""

    CONNECT = 0x01
    BIND = 0x02
    ASSOCIATE = 0x03
    RESOLVE = 0xF0
    RESOLVE_PTR = 0xF1
    MUX_BIND = 0xF2
    UDP_TUN = 0xF3
    """UDP over this connection, in UDP-tun frames (wire.udp_frames)."""


class Reply(IntEnum):
    """The outcome of a request."""

    SUCCEEDED = 0
    FAILURE = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    REFUSED = 5
    TTL_EXPIRED = 6
    COMMAND_UNSUPPORTED = 7
    ADDRESS_UNSUPPORTED = 8


_MEANING: Final[dict[int, str]] = {
    Reply.FAILURE: "general failure",
    Reply.NOT_ALLOWED: "not allowed by its rules",
    Reply.NETWORK_UNREACHABLE: "network unreachable",
    Reply.HOST_UNREACHABLE: "host unreachable",
    Reply.REFUSED: "connection refused",
    Reply.TTL_EXPIRED: "TTL expired",
    Reply.COMMAND_UNSUPPORTED: "command not supported",
    Reply.ADDRESS_UNSUPPORTED: "address type not supported",
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client shows: the question that a server's dialogue asks, answered by whether they hold."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Credentials({self.username!r}, ***)"


@dataclass(slots=True)
class Request:
    """What a client asks for. `command` may be none of `Command`."""

    command: int
    target: Endpoint


_TWO: Final = Read(2)
_THREE: Final = Read(3)
_FIVE: Final = Read(5)


# ---- server side --------------------------------------------------------------------------------
def choose_method(offered: bytes, *, authenticates: bool, tls: bool) -> Method:
    """Return the method for a client that offers these: TLS before plain, and credentials where they are needed."""
    if authenticates:
        if tls and Method.TLS_PASSWORD in offered:
            return Method.TLS_PASSWORD
        return Method.PASSWORD if Method.PASSWORD in offered else Method.UNACCEPTABLE
    if tls and Method.TLS in offered:
        return Method.TLS
    return Method.NONE if Method.NONE in offered else Method.UNACCEPTABLE


def serve(*, authenticates: bool, tls: bool) -> Handshake[Request | Method]:
    """Negotiate, and read the request; stop after the choice of a TLS method and return that instead.

    Asks `Credentials`. Raise when no method fits: AuthDenied if credentials are needed, else ProtocolError; and as
    `serve_request` does.
    """
    head: bytes = yield _TWO
    if head[0] != VERSION:
        raise ProtocolError(f"version {head[0]} instead of SOCKS5")
    if not head[1]:
        raise ProtocolError("the client offers no method")  # GOST: not even a refusal
    offered: bytes = yield Read(head[1])
    method = choose_method(offered, authenticates=authenticates, tls=tls)
    yield _CHOSEN[method]
    if method is Method.UNACCEPTABLE:
        refusal = AuthDenied if authenticates else ProtocolError
        raise refusal(f"no method in common: the client offers {offered.hex(' ')}")
    if method is Method.TLS or method is Method.TLS_PASSWORD:
        return method
    return (yield from serve_request(authenticates=method is Method.PASSWORD))


_CHOSEN: Final = {method: Send(bytes((VERSION, method))) for method in Method}
_ACCEPTED: Final = Send(bytes((AUTH_VERSION, 0)))
_REJECTED: Final = Send(bytes((AUTH_VERSION, 1)))


def serve_request(*, authenticates: bool) -> Handshake[Request]:
    """Check credentials if the chosen method has them, and read the request.

    Raise AuthDenied for wrong credentials (the client has been told), ProtocolError for what makes no sense.
    """
    if authenticates:
        head: bytes = yield _TWO
        if head[0] != AUTH_VERSION:
            raise ProtocolError(f"version {head[0]} of the user name and password")
        # The length of the password comes right behind the name.
        name: bytes = yield Read(head[1] + 1)
        password: bytes = yield Read(name[-1])
        username = name[:-1].decode("utf-8", "replace")
        if not (yield Ask(Credentials(username, password.decode("utf-8", "replace")))):
            yield _REJECTED
            raise AuthDenied(f"the credentials of {username[:64]!r} are not accepted")
        yield _ACCEPTED
    # Five bytes reach into every kind of address, and none is shorter.
    head = yield _FIVE
    if head[0] != VERSION:
        raise ProtocolError(f"version {head[0]} in a SOCKS5 request")
    rest: bytes = yield Read(rest_size(head[3], head[4]))
    return Request(head[1], decode_address(head[3:] + rest))


_PREFIX: Final = {reply: bytes((VERSION, reply, 0)) for reply in Reply}


def encode_reply(reply: Reply, bound: Endpoint | None = None) -> bytes:
    """Return a reply with the address `bound`, by default the zero address."""
    return _PREFIX[reply] + (ZERO if bound is None else encode_address(bound))


# ---- client side --------------------------------------------------------------------------------
def negotiate(offered: bytes) -> Handshake[Method]:
    """Offer methods (in order) and return the proxy's choice. Raise UpstreamRejected when it takes none.

    # GOST: a proxy that chooses user name and password without having been offered them is obeyed.
    """
    yield Send(bytes((VERSION, len(offered))) + offered)
    chosen: bytes = yield _TWO
    if chosen[0] != VERSION:
        raise ProtocolError(f"version {chosen[0]} in the answer of a SOCKS5 proxy")
    method = chosen[1]
    if method == Method.UNACCEPTABLE:
        raise UpstreamRejected(f"the SOCKS5 proxy takes none of the methods {offered.hex(' ')}", method)
    if method not in offered and method != Method.PASSWORD:
        raise ProtocolError(f"the SOCKS5 proxy chose method {method:#04x}, which was not offered")
    return Method(method)


def log_in(username: str, password: str) -> Handshake[None]:
    """Show credentials. Raise UpstreamRejected when they are not accepted."""
    yield Send(encode_credentials(username, password))
    outcome: bytes = yield _TWO
    if outcome[0] != AUTH_VERSION:
        raise ProtocolError(f"version {outcome[0]} in the answer to the credentials")
    if outcome[1] != 0:
        raise UpstreamRejected("the SOCKS5 proxy does not accept the credentials", outcome[1])


def encode_credentials(username: str, password: str) -> bytes:
    """Return the message with both. Raise ProtocolError for one of more than 255 bytes."""
    parts = [bytes((AUTH_VERSION,))]
    for text in (username, password):
        raw = text.encode("utf-8", "replace")
        if len(raw) > 255:
            raise ProtocolError("SOCKS5 carries user names and passwords of at most 255 bytes")
        parts += (bytes((len(raw),)), raw)
    return b"".join(parts)


def encode_request(command: Command, target: Endpoint = ANY) -> bytes:
    """Return a request; the default target is the zero address."""
    return bytes((VERSION, command, 0)) + encode_address(target)


def ask(command: Command, target: Endpoint = ANY) -> Handshake[Endpoint]:
    """Send a request and return the address of the reply, ANY for one that makes no sense.

    Raise UpstreamRejected for a refusal, as soon as its code is there: not every proxy sends an address with it.
    """
    yield Send(encode_request(command, target))
    head: bytes = yield _TWO
    if head[0] != VERSION:
        raise ProtocolError(f"version {head[0]} in a SOCKS5 reply")
    code = head[1]
    if code != Reply.SUCCEEDED:
        what = str(target) if command == Command.CONNECT else "UDP"
        meaning = _MEANING.get(code, "unknown reply")
        raise UpstreamRejected(f"the SOCKS5 proxy refuses {what}: {meaning} ({code})", code)
    start: bytes = yield _THREE
    rest: bytes = yield Read(rest_size(start[1], start[2]))
    try:
        return decode_address(start[1:] + rest)
    except ProtocolError:
        return ANY
