"""The disguise of GOST's SNI proxies: another name in the first bytes, and beside it the real one, encoded.

    TLS    the name in the hello is the cover; extension FFFE, the last one, carries the real name
    HTTP   `Host: cover`, and behind it `Gost-Target: VALUE` for the real value, port included

Names are encoded as in wire/gost_target.py. GOST: x/connector/sni. A server that takes the disguise off must put the
hello together byte by byte as its client made it, since both ends of TLS compare their idea of it.
"""

from __future__ import annotations

from typing import Final

from ...core.errors import ProtocolError
from ...wire.client_hello import CLIENT_HELLO, SERVER_NAME, extensions, extensions_start, server_name
from ...wire.gost_target import decode_target, encode_target
from ...wire.http1 import HeadReader, Request, canonical, head_bytes, parse_request
from ...wire.sniff import StreamRecogniser

DISGUISE: Final = 0xFFFE
"""The extension with the real name, of a type for private use."""

TARGET: Final = b"gost-target"


# ---- TLS ----------------------------------------------------------------------------------------
def disguise_hello(data: bytes, cover: bytes) -> bytes:
    """Return `data`, which begins with a ClientHello, under the name `cover`; unchanged where it names nobody.

    Unchanged too when the hello does not fill exactly one record: a server could not tell where it was cut.
    """
    parts = _Hello.of(data)
    if parts is None or not parts.name:
        return data
    kept = [(kind, _named(cover) if kind == SERVER_NAME else body) for kind, body in parts.extensions]
    return parts.put([*kept, (DISGUISE, encode_target(parts.name))])


def reveal_hello(data: bytes) -> bytes:
    """Return `data`, which begins with a ClientHello, as it was before `disguise_hello`; unchanged without one."""
    parts = _Hello.of(data)
    if parts is None or not parts.name:
        return data
    real = next((decode_target(body) for kind, body in parts.extensions if kind == DISGUISE), None)
    if not real:
        return data
    return parts.put(
        [(kind, _named(real) if kind == SERVER_NAME else body) for kind, body in parts.extensions if kind != DISGUISE]
    )


class _Hello:
    """A hello of one record, taken apart."""

    __slots__ = ("_front", "_rest", "_version", "extensions", "name")

    def __init__(self, version: bytes, message: bytes, rest: bytes) -> None:
        self._version = version
        self._rest = rest
        self._front = message[4 : extensions_start(message)]
        self.extensions = [(kind, message[start:end]) for kind, start, end in extensions(message)]
        self.name = next((server_name(body) for kind, body in self.extensions if kind == SERVER_NAME), b"")

    @classmethod
    def of(cls, data: bytes) -> _Hello | None:
        size = int.from_bytes(data[3:5], "big")
        message = data[5 : 5 + size]
        if data[:1] != b"\x16" or len(message) < size:
            return None
        try:
            return cls(data[1:3], message, data[5 + size :])
        except ProtocolError:
            return None

    def put(self, extensions: list[tuple[int, bytes]]) -> bytes:
        """Return the bytes of this hello with other extensions, and what came after it."""
        tail = b"".join(kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body for kind, body in extensions)
        body = self._front + len(tail).to_bytes(2, "big") + tail
        message = bytes((CLIENT_HELLO,)) + len(body).to_bytes(3, "big") + body
        return b"\x16" + self._version + len(message).to_bytes(2, "big") + message + self._rest


def _named(name: bytes) -> bytes:
    """Return the body of a server_name extension with one name (RFC 6066 section 3)."""
    size = len(name)
    return (size + 3).to_bytes(2, "big") + b"\x00" + size.to_bytes(2, "big") + name


# ---- HTTP ---------------------------------------------------------------------------------------
def disguise_head(data: bytes, cover: bytes) -> bytes:
    """Return `data`, which begins with a request's head, under the host `cover`; unchanged without a Host field."""
    request, rest = _split(data)
    if request is None or not request.get(b"host"):
        return data
    fields: list[tuple[bytes, bytes]] = []
    for name, value in request.fields:
        if name.lower() == b"host":
            fields += [(name, cover), (canonical(TARGET), encode_target(value))]
        else:
            fields.append((name, value))
    return _line(request, fields) + rest


def reveal_head(data: bytes) -> bytes:
    """Return `data`, which begins with a request's head, as it was before `disguise_head`; unchanged without one."""
    request, rest = _split(data)
    real = decode_target(request.get(TARGET)) if request is not None else None
    if request is None or not real or any(byte <= 32 or byte == 127 for byte in real):
        return data
    fields = [
        (name, real if name.lower() == b"host" else value) for name, value in request.fields if name.lower() != TARGET
    ]
    return _line(request, fields) + rest


def _split(data: bytes) -> tuple[Request | None, bytes]:
    reader = HeadReader()
    try:
        head = reader.feed(data)
        return (parse_request(head) if head is not None else None), reader.rest
    except ProtocolError:
        return None, data


def _line(request: Request, fields: list[tuple[bytes, bytes]]) -> bytes:
    return head_bytes(b"%b %b HTTP/1.%d" % (request.method, request.target, request.version - 10), fields)


# ---- both ---------------------------------------------------------------------------------------
def reveal(data: bytes) -> bytes:
    """Return the first bytes of a client as they were before any disguise."""
    return reveal_hello(data) if data[:1] == b"\x16" else reveal_head(data)


class Disguise:
    """Puts a cover on the first bytes of one client, held until there is enough of them."""

    __slots__ = ("_cover", "_held", "_recogniser")

    def __init__(self, cover: bytes) -> None:
        self._cover = cover
        self._held = b""
        self._recogniser = StreamRecogniser()

    def feed(self, data: bytes) -> bytes | None:
        """Return what is to be sent once `data` completes a hello or a head, or shows that it is neither; else None."""
        self._held += data
        found = self._recogniser.feed(data)
        if found is None:
            return None
        held = self.rest()
        match found.protocol:
            case "tls":
                return disguise_hello(held, self._cover)
            case "http":
                return disguise_head(held, self._cover)
            case _:
                return held

    def rest(self) -> bytes:
        """Return what is held: for the end of a stream."""
        held, self._held = self._held, b""
        return held
