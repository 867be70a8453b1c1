"""What a client speaks, told by its first bytes: TLS, HTTP, SSH, Redis on streams; QUIC and DNS in datagrams. No I/O.

A recogniser takes bytes as they come and answers as soon as it is certain, so that a client of another protocol is
held for no longer than its bytes leave a doubt. It never raises: what breaks its own protocol is "nothing known".
"""

from __future__ import annotations

from typing import Final, Protocol

from ..core.errors import ProtocolError
from ..core.flow import Sniffed
from .client_hello import HelloReader
from .dns_message import parse_query
from .http1 import HeadReader, Request, parse_authority, parse_request, split_absolute
from .quic_initial import InitialReader

UNKNOWN: Final = Sniffed()
"""The verdict on what is none of the protocols."""

METHODS: Final = tuple(
    method.encode("ascii") + b" "
    for method in (
        *("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "CONNECT", "TRACE"),
        *("PROPFIND", "PROPPATCH", "MKCOL", "COPY", "MOVE", "LOCK", "UNLOCK", "REPORT", "SEARCH"),
    )
)
"""Beginnings of an HTTP/1 request. A list, because text protocols begin with a word and a blank as well."""

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What HTTP/2 begins with where both sides know of it (RFC 9113 section 3.4)."""

_SSH: Final = b"SSH-2"
_REDIS: Final = b"*+-:$"  # GOST: one byte is enough

MAX_DATAGRAMS: Final = 8
"""Datagrams that are held for one hello: clients cut it into two or three."""


class _Reader(Protocol):
    def feed(self, data: bytes) -> Sniffed | None: ...


class StreamRecogniser:
    """Looks at the first bytes of a stream."""

    __slots__ = ("_held", "_reader")

    def __init__(self) -> None:
        self._held = b""
        self._reader: _Reader | None = None

    def feed(self, data: bytes) -> Sniffed | None:
        """Return the verdict, UNKNOWN included, once it is certain; None while more bytes are needed."""
        if self._reader is None:
            data = self._held + data
            reader = _reader_for(data)
            if reader is None:
                self._held = data
                return None
            if isinstance(reader, Sniffed):
                return reader
            self._reader, self._held = reader, b""
        try:
            return self._reader.feed(data)
        except ProtocolError:
            return UNKNOWN


def _reader_for(data: bytes) -> _Reader | Sniffed | None:
    """Return who reads what begins with `data`, the verdict where that is clear, None while it may be several."""
    if not data:
        return None
    first = data[0]
    if first == 0x16:
        return _Tls()
    if first in _REDIS:
        return Sniffed("redis")
    if data.startswith(_SSH):
        return Sniffed("ssh")
    if data.startswith(METHODS):
        return _Http()
    if data.startswith(PREFACE):
        return Sniffed("http", alpn=("h2",))
    size = len(data)
    if any(word[:size] == data for word in (*METHODS, PREFACE, _SSH)):
        return None
    return UNKNOWN


class _Tls:
    __slots__ = ("_hello",)

    def __init__(self) -> None:
        self._hello = HelloReader()

    def feed(self, data: bytes) -> Sniffed | None:
        hello = self._hello.feed(data)
        return None if hello is None else Sniffed("tls", hello.server_name, alpn=hello.alpn, ech=hello.ech)


class _Http:
    __slots__ = ("_head",)

    def __init__(self) -> None:
        self._head = HeadReader()

    def feed(self, data: bytes) -> Sniffed | None:
        head = self._head.feed(data)
        return None if head is None else describe(parse_request(head), self._head.rest)


def describe(request: Request, body: bytes = b"") -> Sniffed:
    """Return what matchers and bypasses want to know of a request. A Host that is none counts as absent."""
    authority, target = request.get(b"host"), request.target
    absolute = split_absolute(target)
    if absolute is not None:
        _, authority, target = absolute  # RFC 9112 section 3.2.2: the Host field is ignored then
    elif request.method == b"CONNECT":
        authority, target = target, b""
    host, port = "", 0
    try:
        host, port = parse_authority(authority, 0)
    except ProtocolError:
        pass
    if not authority.startswith(b"["):
        host = host.lower().removesuffix(".")
    path, _, query = target.partition(b"?")
    return Sniffed(
        "http",
        host,
        port,
        proxied=absolute is not None or request.method == b"CONNECT",
        method=request.method.decode("ascii"),
        path=path.decode("latin-1"),
        query=query.decode("latin-1"),
        headers=tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in request.fields),
        body=body,
    )


class DatagramRecogniser:
    """Looks at the first datagrams of a client."""

    __slots__ = ("_count", "_quic")

    def __init__(self) -> None:
        self._count = 0
        self._quic = InitialReader()

    def feed(self, datagram: bytes) -> Sniffed | None:
        """Return the verdict, UNKNOWN included, once it is certain; None while more datagrams are needed.

        The name in a DNS query is what is asked about, not whom the client talks to: it is no `host`.
        """
        self._count += 1
        try:
            hello = self._quic.feed(datagram)
        except ProtocolError:
            if self._count > 1:
                return Sniffed("quic")
        else:
            if hello is not None:
                return Sniffed("quic", hello.server_name, alpn=hello.alpn, ech=hello.ech)
            return Sniffed("quic") if self._count == MAX_DATAGRAMS else None
        try:
            parse_query(datagram)
        except ProtocolError:
            return UNKNOWN
        return Sniffed("dns")
