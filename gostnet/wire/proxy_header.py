"""The PROXY protocol header, which tells a server whom a proxy speaks for (haproxy.org: proxy-protocol.txt, 1 and 2).

version 1    PROXY TCP4|TCP6 SOURCE DESTINATION SOURCE-PORT DESTINATION-PORT CR LF
version 2    12 bytes of signature | 21 | FAMILY(1) | LEN(2) | source | destination | ports(2+2)
             FAMILY 11 TCP over IPv4, 12 UDP over IPv4, 21 and 22 the same over IPv6; big endian
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ..core.address import Endpoint

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"


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
        return f"PROXY {kind} {first} {second} {source.port} {destination.port}\r\n".encode()
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


def _packed(ip: IPv4Address | IPv6Address, ipv6: bool) -> bytes:
    if ipv6 and ip.version == 4:
        return b"\0" * 10 + b"\xff\xff" + ip.packed
    return ip.packed
