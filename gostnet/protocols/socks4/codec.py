"""SOCKS4 and SOCKS4a messages, both sides.

    request   04 CMD PORT(2) IP(4) USERID 00 [HOST 00 where IP is 0.0.0.x, x not 0]
    reply     00 CODE PORT(2) IP(4)     port and address are zero, and are not looked at

The format has no RFC; "SOCKS: A protocol for TCP proxy across firewalls" and its 4A extension describe it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from ...core.address import Endpoint
from ...core.errors import ProtocolError, UpstreamRejected
from ...core.sansio import Handshake, Read, ReadUntil, Send
from ...wire.socks_addr import decode_name, ipv4_text

VERSION: Final = 4
CONNECT: Final = 1

MAX_USERID: Final = 512
"""Bytes of a user id with its end: the format has no limit of its own."""

MAX_HOST: Final = 256
"""Bytes of a host with its end: longer names do not exist (RFC 1035 section 2.3.4)."""


class Code(IntEnum):
    """The outcome in a reply."""

    GRANTED = 0x5A
    FAILED = 0x5B
    BYPASSED = 0x5C
    """Originally "no identd"; # GOST: sent for a bypassed target."""
    BAD_USERID = 0x5D


_MEANING: Final[dict[int, str]] = {
    Code.FAILED: "rejected or failed",
    Code.BYPASSED: "refused by its rules",
    Code.BAD_USERID: "the user id is not accepted",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for."""

    command: int
    target: Endpoint
    userid: str


_HEAD: Final = Read(8)
_USERID: Final = ReadUntil(b"\0", MAX_USERID)
_HOST: Final = ReadUntil(b"\0", MAX_HOST)


def read_request() -> Handshake[Request]:
    """Read a request of either form. Raise ProtocolError for another version or a host that is not a name."""
    head: bytes = yield _HEAD
    if head[0] != VERSION:
        raise ProtocolError(f"version {head[0]} instead of SOCKS4")
    userid: bytes = (yield _USERID)[:-1]
    if head[4:7] == b"\0\0\0" and head[7]:
        host = decode_name((yield _HOST)[:-1])
    else:
        host = ipv4_text(head[4:8])
    return Request(head[1], Endpoint(host, head[2] << 8 | head[3]), userid.decode("utf-8", "replace"))


def encode_reply(code: Code) -> bytes:
    """Return a reply with the zero address."""
    return bytes((0, code, 0, 0, 0, 0, 0, 0))


def encode_request(target: Endpoint, userid: bytes = b"", *, by_address: bool = False) -> bytes:
    """Return a CONNECT request: with the host as text (4a), or with its IPv4 address.

    Raise ProtocolError for what the form cannot carry: another kind of host, a NUL byte, text too long.
    """
    port = target.port.to_bytes(2, "big")
    if b"\0" in userid or len(userid) >= MAX_USERID:
        raise ProtocolError("a SOCKS4 user id has at most 511 bytes and none is zero")
    if by_address:
        ip = target.ip
        if ip is None or ip.version != 4:
            raise ProtocolError(f"{target.host[:64]!r} is not an IPv4 address, the only kind that SOCKS4 can ask for")
        packed = ip.packed
        if packed[:3] == b"\0\0\0" and packed[3]:
            raise ProtocolError(f"{ip} stands for a name in SOCKS4a")
        return b"\x04\x01" + port + packed + userid + b"\0"
    try:
        host = target.host.encode()
    except UnicodeEncodeError as exc:
        raise ProtocolError(f"{target.host[:64]!r} is not a name") from exc
    if not host or b"\0" in host or len(host) >= MAX_HOST:
        raise ProtocolError(f"{target.host[:64]!r} is not a name that SOCKS4a can ask for")
    return b"".join((b"\x04\x01", port, b"\0\0\0\x01", userid, b"\0", host, b"\0"))


def ask(request: bytes, target: Endpoint) -> Handshake[None]:
    """Send a request and read the reply. Raise UpstreamRejected for a refusal."""
    yield Send(request)
    reply: bytes = yield _HEAD
    if reply[0] != 0:
        raise ProtocolError(f"version {reply[0]} in a SOCKS4 reply")
    code = reply[1]
    if code != Code.GRANTED:
        meaning = _MEANING.get(code, "unknown code")
        raise UpstreamRejected(f"the SOCKS4 proxy refuses {target}: {meaning} ({code})", code)
