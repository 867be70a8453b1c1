"""GOST relay messages, both sides, without I/O (GOST: module relay, version 1).

    request     01 | CMD | FEALEN(2) | features        CMD: command in bits 0-3, 0x80 for UDP, the rest is not looked at
    response    01 | STATUS | FEALEN(2) | features
    feature     TYPE(1) | LEN(2) | body                all features together take at most 65,535 bytes

    01 credentials   ULEN(1) user PLEN(1) password
    02 address       ATYP(1) address port(2), an empty host as a name of length 0
    04 network       NETWORK(2): 0 tcp, 1 udp, 2 ip, 0x10 unix, 0x11 serial, any other means tcp

Numbers are big endian. Other features (03 tunnel, 05 metadata, ...) are passed over. Of several of one kind the last
one counts. A message that does not parse is ProtocolError; its sender is closed on without a word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeAlias

from ...core.address import Endpoint
from ...core.errors import ProtocolError, UpstreamRejected
from ...core.sansio import Handshake, Read, Send
from ...wire.socks_addr import EMPTY_NAME, decode_address, encode_address

VERSION: Final = 1

UDP: Final = 0x80
"""The bit of CMD that asks for datagrams."""


class Command(IntEnum):
    """What a request asks for; 0 is CONNECT too."""

    CONNECT = 1
    BIND = 2
    ASSOCIATE = 3


class Status(IntEnum):
    """The answer to a request."""

    OK = 0
    BAD_REQUEST = 1
    UNAUTHORIZED = 2
    FORBIDDEN = 3
    TIMEOUT = 4
    UNAVAILABLE = 5
    HOST_UNREACHABLE = 6
    NETWORK_UNREACHABLE = 7
    INTERNAL = 8


STATUS_TEXT: Final[dict[int, str]] = {
    Status.BAD_REQUEST: "bad request",
    Status.UNAUTHORIZED: "wrong credentials",
    Status.FORBIDDEN: "forbidden",
    Status.TIMEOUT: "timeout",
    Status.UNAVAILABLE: "service unavailable",
    Status.HOST_UNREACHABLE: "host unreachable",
    Status.NETWORK_UNREACHABLE: "network unreachable",
    Status.INTERNAL: "internal error",
}


class Network(IntEnum):
    """What kind of connection is asked for."""

    TCP = 0
    UDP = 1
    IP = 2
    UNIX = 0x10
    SERIAL = 0x11


_CREDENTIALS: Final = 1
_ADDRESS: Final = 2
_NETWORK: Final = 4
_NETWORKS: Final = frozenset(Network)

Credentials: TypeAlias = tuple[str, str]
"""User and password."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request.

    command       bits 0-3 of CMD: a Command, 0, or something unknown
    network       UDP when the bit of CMD says so, whatever the feature says
    target        None without an address
    credentials   None without any
    """

    command: int
    network: Network = Network.TCP
    target: Endpoint | None = None
    credentials: Credentials | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Response:
    """A response; `address` is where a BIND listens."""

    status: int
    address: Endpoint | None = None


# ---- encode -------------------------------------------------------------------------------------
def encode_request(request: Request) -> bytes:
    """Encode in GOST's order: network first, but after the credentials in a BIND; the address last.

    The network is left out for TCP, unless it is a BIND. Raise ProtocolError for what does not fit.
    """
    command, kind = request.command, request.network
    bind = command == Command.BIND
    network = _feature(_NETWORK, kind.to_bytes(2, "big")) if bind or kind != Network.TCP else b""
    credentials = encode_credentials(*request.credentials) if request.credentials is not None else b""
    address = _feature(_ADDRESS, encode_address(request.target, EMPTY_NAME)) if request.target is not None else b""
    body = (credentials + network if bind else network + credentials) + address
    if kind == Network.UDP:
        command |= UDP
    return b"".join((bytes((VERSION, command)), len(body).to_bytes(2, "big"), body))


def encode_credentials(user: str, password: str) -> bytes:
    """Encode the credentials feature. Raise ProtocolError for more than 255 bytes of either."""
    name, word = user.encode("utf-8", "replace"), password.encode("utf-8", "replace")
    if len(name) > 255 or len(word) > 255:
        raise ProtocolError("relay: user and password have at most 255 bytes each")
    return _feature(_CREDENTIALS, bytes((len(name),)) + name + bytes((len(word),)) + word)


def encode_response(status: int, address: Endpoint | None = None) -> bytes:
    """Encode a response, with the address of a BIND."""
    body = _feature(_ADDRESS, encode_address(address, EMPTY_NAME)) if address is not None else b""
    return b"".join((bytes((VERSION, status)), len(body).to_bytes(2, "big"), body))


def _feature(kind: int, body: bytes) -> bytes:
    return b"".join((bytes((kind,)), len(body).to_bytes(2, "big"), body))


# ---- decode -------------------------------------------------------------------------------------
def read_request() -> Handshake[Request]:
    """Read a request. Raise ProtocolError."""
    head: bytes = yield Read(4)
    _check_version(head[0])
    size = head[2] << 8 | head[3]
    body: bytes = (yield Read(size)) if size else b""
    command = head[1] & 0x0F
    network = Network.TCP
    target: Endpoint | None = None
    credentials: Credentials | None = None
    for kind, part in _features(body):
        if kind == _ADDRESS:
            target = _decode_address(part)
        elif kind == _NETWORK:
            network = _decode_network(part)
        elif kind == _CREDENTIALS:
            credentials = _decode_credentials(part)
    if head[1] & UDP:
        network = Network.UDP
    return Request(command, network, target, credentials)


def read_response() -> Handshake[Response]:
    """Read a response. Raise ProtocolError; what it says is the caller's to judge (`accept`)."""
    head: bytes = yield Read(4)
    _check_version(head[0])
    size = head[2] << 8 | head[3]
    body: bytes = (yield Read(size)) if size else b""
    return _decode_response(head[1], body)


def accept(response: Response) -> Response:
    """Return `response` if it says yes. Raise UpstreamRejected with its status."""
    status = response.status
    if status != Status.OK:
        raise UpstreamRejected(f"the relay answers {status} ({STATUS_TEXT.get(status, 'unknown status')})", status)
    return response


def ask(request: bytes) -> Handshake[Response]:
    """Send an encoded request and read its response. Raise UpstreamRejected or ProtocolError."""
    yield Send(request)
    response = yield from read_response()
    return accept(response)


class ResponseHead:
    """Takes the response off the front of what a relay sends, however it is cut; never holds more than a response."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes | None:
        """Return what follows the response once it is complete, None before.

        Raise UpstreamRejected when it refuses, ProtocolError when it is none.
        """
        held = self._held = self._held + data if self._held else data
        if held:
            _check_version(held[0])
        if len(held) < 4:
            return None
        end = 4 + (held[2] << 8 | held[3])
        if len(held) < end:
            return None
        self._held = b""
        accept(_decode_response(held[1], held[4:end]))
        return held[end:]


def _check_version(version: int) -> None:
    if version != VERSION:
        raise ProtocolError(f"relay: version {version}, expected {VERSION}")


def _decode_response(status: int, body: bytes) -> Response:
    address: Endpoint | None = None
    for kind, part in _features(body):
        if kind == _ADDRESS:
            address = _decode_address(part)
    return Response(status, address)


def _features(body: bytes) -> list[tuple[int, bytes]]:
    found = []
    position, end = 0, len(body)
    while position < end:
        start = position + 3
        if start > end:
            raise ProtocolError("relay: the features end inside a header")
        position = start + (body[start - 2] << 8 | body[start - 1])
        if position > end:
            raise ProtocolError("relay: a feature is longer than all features together")
        found.append((body[start - 3], body[start:position]))
    return found


def _decode_address(body: bytes) -> Endpoint:
    endpoint = decode_address(body)
    host, _, port = endpoint.host.partition("::")
    if endpoint.port == 0 and host == "0.0.0.0" and port.isascii() and port.isdigit() and int(port) <= 65535:
        # GOST: 3.3.0 asks for a BIND to ":2222" as the name "0.0.0.0::2222" with port 0.
        return Endpoint(host, int(port))
    return endpoint


def _decode_network(body: bytes) -> Network:
    if len(body) < 2:
        raise ProtocolError(f"relay: a network feature of {len(body)} bytes, expected 2")
    number = body[0] << 8 | body[1]
    return Network(number) if number in _NETWORKS else Network.TCP


def _decode_credentials(body: bytes) -> Credentials:
    user_end = 1 + body[0] if body else 0
    if not user_end or user_end >= len(body) or user_end + 1 + body[user_end] > len(body):
        raise ProtocolError("relay: credentials that end too early")
    user = body[1:user_end].decode("utf-8", "replace")
    password = body[user_end + 1 : user_end + 1 + body[user_end]].decode("utf-8", "replace")
    return user, password
