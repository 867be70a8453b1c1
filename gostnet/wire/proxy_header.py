"""The PROXY protocol header, which tells a server whom a proxy speaks for (haproxy.org: proxy-protocol.txt, 1 and 2).

version 1    PROXY TCP4|TCP6 SOURCE DESTINATION SOURCE-PORT DESTINATION-PORT CR LF
version 2    12 bytes of signature | 21 | FAMILY(1) | LEN(2) | source | destination | ports(2+2)
             FAMILY 11 TCP over IPv4, 12 UDP over IPv4, 21 and 22 the same over IPv6; big endian
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from ..core.address import Endpoint, parse_ip
from ..core.errors import ProtocolError

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
WORD: Final = b"PROXY "
MAX_LINE: Final = 107
"""Bytes of the longest line of version 1, its end included."""


def encode_proxy_header(version: int, source: Endpoint, destination: Endpoint, *, udp: bool = False) -> bytes:
    """Encode the header of a connection from `source` to `destination`; any version but 1 means 2.

    b"" when an address is not known: a server takes a connection without header for what it is. Version 1 has no word
    for UDP and says UNKNOWN. A host that is no IP address is written as 0.0.0.0.
    """
    if not source.host or not destination.host:
        return b""
    first, second = source.ip or IPv4Address(0), destination.ip or IPv4Address(0)
    ipv6 = first.version == 6 or second.version == 6
    if version == 1:
        if udp:
            return b"PROXY UNKNOWN\r\n"
        kind = "TCP6" if ipv6 else "TCP4"
        hosts = " ".join(_text(ip, ipv6) for ip in (first, second))
        return f"PROXY {kind} {hosts} {source.port} {destination.port}\r\n".encode()
    body = b"".join(
        (
            _packed(first, ipv6),
            _packed(second, ipv6),
            source.port.to_bytes(2, "big"),
            destination.port.to_bytes(2, "big"),
        )
    )
    family = (0x20 if ipv6 else 0x10) | (2 if udp else 1)
    return b"".join((SIGNATURE, bytes((0x21, family)), len(body).to_bytes(2, "big"), body))


def _text(ip: IPv4Address | IPv6Address, ipv6: bool) -> str:
    if ip.version == 4:
        return f"::ffff:{ip}" if ipv6 else str(ip)
    return str(IPv6Address(int(ip)))  # without the zone, which says nothing to others


def _packed(ip: IPv4Address | IPv6Address, ipv6: bool) -> bytes:
    if ipv6 and ip.version == 4:
        return b"\0" * 10 + b"\xff\xff" + ip.packed
    return ip.packed


# ---- reading ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What the beginning of a connection says.

    size       bytes of the header, 0 where the connection begins with something else
    source     whom the peer speaks for, None if it does not say, or speaks for itself
    """

    size: int
    source: Endpoint | None = None
    destination: Endpoint | None = None


NO_HEADER: Final = ProxyHeader(0)


def parse_proxy_header(data: bytes) -> ProxyHeader | None:
    """Read the header, of either version, at the beginning of `data`; None as long as more must come to tell.

    Raise ProtocolError for what begins like a header and is none.
    """
    if data.startswith(SIGNATURE):
        return _parse_binary(data)
    if data.startswith(WORD):
        return _parse_line(data)
    if SIGNATURE.startswith(data) or WORD.startswith(data):
        return None
    return NO_HEADER


def _parse_line(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n", 0, MAX_LINE)
    if end < 0:
        if len(data) >= MAX_LINE:
            raise ProtocolError(f"a PROXY header without end: {data[:64]!r}")
        return None
    size = end + 2
    words = data[:end].split(b" ")
    if words[1] == b"UNKNOWN":
        return ProxyHeader(size)
    version = {b"TCP4": 4, b"TCP6": 6}.get(words[1])
    if version is None or len(words) != 6:
        raise ProtocolError(f"a bad PROXY header: {data[:end][:64]!r}")
    source, destination = (_written(words[at], words[at + 2], version) for at in (2, 3))
    return ProxyHeader(size, source, destination)


def _written(host: bytes, port: bytes, version: int) -> Endpoint:
    """Return an address of version 1; an IPv4-mapped one as IPv4."""
    text = host.decode("ascii", "replace")
    try:
        found = ip_address(text)
    except ValueError:
        found = None
    if found is None or found.version != version or "%" in text:
        raise ProtocolError(f"{text[:64]!r} in a PROXY header is not an IPv{version} address")
    if not port.isdigit() or len(port) > 5 or int(port) > 65535:
        raise ProtocolError(f"{port[:64]!r} in a PROXY header is not a port")
    return Endpoint(str(parse_ip(text)), int(port))


def _parse_binary(data: bytes) -> ProxyHeader | None:
    if len(data) < 16:
        return None
    command, family = data[12], data[13]
    if command >> 4 != 2 or command & 15 > 1:
        raise ProtocolError(f"a PROXY header of version {command >> 4} with command {command & 15}")
    length = int.from_bytes(data[14:16], "big")
    if family >> 4 > 3 or family & 15 > 2:
        raise ProtocolError(f"a PROXY header of family {family:#04x}")
    width = {1: 4, 2: 16}.get(family >> 4, 0)
    speaks = command & 15 == 1 and width > 0 and family & 15 > 0
    if speaks and length < 2 * width + 4:
        raise ProtocolError(f"a PROXY header of family {family:#04x} with {length} bytes of addresses")
    size = 16 + length
    if len(data) < size:
        return None
    if not speaks:
        return ProxyHeader(size)
    ports = 16 + 2 * width
    source = Endpoint(_unpacked(data[16 : 16 + width]), int.from_bytes(data[ports : ports + 2], "big"))
    destination = Endpoint(_unpacked(data[16 + width : ports]), int.from_bytes(data[ports + 2 : ports + 4], "big"))
    return ProxyHeader(size, source, destination)


def _unpacked(packed: bytes) -> str:
    """Return an address as text, an IPv4-mapped one as IPv4."""
    return str(parse_ip(str(ip_address(packed))))
