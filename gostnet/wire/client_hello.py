"""The ClientHello of TLS: the name that a client asks for, before any key is agreed (RFC 8446 section 4.1.2). No I/O.

record      type 22 | version 03 xx | length (2) | fragment            a hello may span several records
handshake   type 1 | length (3) | legacy_version (2) | random (32) | session_id <0..32> | cipher_suites <2..>
            | compression <1..255> | extensions <0..65535>
extension   type (2) | length (2) | body
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..core.address import parse_ip
from ..core.errors import ProtocolError

HANDSHAKE: Final = 22
CLIENT_HELLO: Final = 1
SERVER_NAME: Final = 0
ALPN: Final = 16
SUPPORTED_VERSIONS: Final = 43
ENCRYPTED_HELLO: Final = 0xFE0D

MAX_HELLO: Final = 65536
"""Bytes of a hello: with post-quantum key shares they have about 1,800, and servers refuse more than this."""

MAX_RECORD: Final = 16384
"""Bytes of a record's fragment before encryption (RFC 8446 section 5.1)."""

_NAME = re.compile(rb"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,253}[A-Za-z0-9_])?\.?").fullmatch


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a hello says in the clear.

    server_name    in lower case and without a trailing dot, "" for none; IP addresses do not count (RFC 6066 section 3)
    versions       supported_versions without GREASE, else the one legacy version
    ech            an encrypted hello is inside, or something that looks like one: `server_name` is its cover
    """

    server_name: str = ""
    alpn: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()
    ech: bool = False


class HelloReader:
    """Gathers a ClientHello from TLS records as they arrive.

    Raises ProtocolError with the first byte that shows that this is something else. What follows the hello is not
    looked at.
    """

    __slots__ = ("_head", "_hello", "_left")

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0
        self._hello = bytearray()

    def feed(self, data: bytes) -> ClientHello | None:
        """Return the hello once `data` completes it, None before. Raise ProtocolError."""
        head, hello = self._head, self._hello
        position = 0
        while position < len(data):
            if not self._left:
                taken = data[position : position + 5 - len(head)]
                head += taken
                self._left = _fragment(head)
                if self._left:
                    head.clear()
            else:
                # A fragment is taken as it comes: whether this is a hello shows long before the record is complete.
                taken = data[position : position + self._left]
                hello += taken
                self._left -= len(taken)
                if (found := _complete(hello)) is not None:
                    return parse_client_hello(found)
            position += len(taken)
        return None


def _fragment(head: bytearray) -> int:
    """Return the size of a record's fragment, 0 while its head is not complete. Raise ProtocolError."""
    for byte, allowed in zip(head, (b"\x16", b"\x03", b"\x00\x01\x02\x03\x04"), strict=False):
        if byte not in allowed:
            raise ProtocolError("not a TLS handshake record")
    if len(head) < 5:
        return 0
    size = int.from_bytes(head[3:5], "big")
    if not 0 < size <= MAX_RECORD:
        raise ProtocolError(f"a handshake record of {size} bytes")
    return size


def _complete(message: bytearray) -> bytes | None:
    """Return the first handshake message if it is all there. Raise ProtocolError unless it is a ClientHello."""
    if message and message[0] != CLIENT_HELLO:
        raise ProtocolError("a handshake that does not begin with a ClientHello")
    if len(message) < 4:
        return None
    size = int.from_bytes(message[1:4], "big")
    if size > MAX_HELLO:
        raise ProtocolError(f"a ClientHello of {size} bytes")
    return bytes(message[: 4 + size]) if len(message) >= 4 + size else None


def parse_client_hello(message: bytes) -> ClientHello:
    """Parse a handshake message, its four bytes of header included. Raise ProtocolError."""
    name, ech = "", False
    alpn: tuple[str, ...] = ()
    versions: tuple[int, ...] = (int.from_bytes(message[4:6], "big"),)
    for kind, start, end in extensions(message):
        body = message[start:end]
        if kind == SERVER_NAME:
            name = host_name(server_name(body))
        elif kind == ALPN:
            alpn = tuple(item.decode("latin-1") for item in _alpn(body))
        elif kind == SUPPORTED_VERSIONS:
            offered = [int.from_bytes(body[index : index + 2], "big") for index in range(1, len(body) - 1, 2)]
            versions = tuple(version for version in offered if version & 0x0F0F != 0x0A0A)
        elif kind == ENCRYPTED_HELLO:
            ech = True
    return ClientHello(name, alpn, versions, ech)


def extensions(message: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (type, start, end) of each extension's body within a ClientHello message. Raise ProtocolError."""
    position = extensions_start(message)
    if position == len(message):
        return  # none at all, which is how clients spoke before there were any
    end = position + 2 + int.from_bytes(message[position : position + 2], "big")
    if end != len(message):
        raise ProtocolError("a ClientHello whose extensions do not end with it")
    position += 2
    while position < end:
        start = position + 4
        stop = start + int.from_bytes(message[position + 2 : start], "big")
        if start > end or stop > end:
            raise ProtocolError("an extension that is cut off")
        yield int.from_bytes(message[position : position + 2], "big"), start, stop
        position = stop


def extensions_start(message: bytes) -> int:
    """Return where the length of the extensions stands. Raise ProtocolError."""
    if len(message) < 4 or message[0] != CLIENT_HELLO or int.from_bytes(message[1:4], "big") != len(message) - 4:
        raise ProtocolError("not one whole ClientHello")
    position = 4 + 2 + 32
    for width in (1, 2, 1):  # session id, cipher suites, compression
        length_end = position + width
        position = length_end + int.from_bytes(message[position:length_end], "big")
        if length_end > len(message) or position > len(message):
            raise ProtocolError("a ClientHello that is cut off")
    return position


def server_name(body: bytes) -> bytes:
    """Return the host_name in a server_name extension as it is, b"" for none (RFC 6066 section 3).

    list length (2) | { type (1) | length (2) | name }
    """
    position = 2
    while position + 3 <= len(body):
        end = position + 3 + int.from_bytes(body[position + 1 : position + 3], "big")
        if body[position] == 0:
            return body[position + 3 : end] if end <= len(body) else b""
        position = end
    return b""


def host_name(raw: bytes) -> str:
    """Return `raw` as a name in lower case without a trailing dot, "" for what is no name, addresses included."""
    if len(raw) > 255 or _NAME(raw) is None:
        return ""
    name = raw.decode("ascii").lower().removesuffix(".")
    return "" if parse_ip(name) is not None else name


def _alpn(body: bytes) -> Iterator[bytes]:
    """Yield protocols (RFC 7301 section 3.1): list length (2) | { length (1) | name }."""
    position = 2
    while position < len(body):
        end = position + 1 + body[position]
        if end > len(body):
            return
        yield body[position + 1 : end]
        position = end
