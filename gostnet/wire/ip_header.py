"""What routing needs of an IP packet: whose it is and where it goes, as packed addresses. No objects, no checks beyond.

IPv4   version and header length at 0, source at 12..16, destination at 16..20 (RFC 791 section 3.1)
IPv6   version at 0, source at 8..24, destination at 24..40 (RFC 8200 section 3)
"""

from __future__ import annotations

IPV4_HEADER = 20
IPV6_HEADER = 40


def destination(packet: bytes) -> bytes:
    """Return the 4 or 16 bytes of the destination, b"" for what is no IP packet or ends inside its header."""
    size = len(packet)
    if size >= IPV4_HEADER:
        version = packet[0] >> 4
        if version == 4:
            return packet[16:20]
        if version == 6 and size >= IPV6_HEADER:
            return packet[24:40]
    return b""


def source(packet: bytes) -> bytes:
    """Return the 4 or 16 bytes of the source, b"" as in `destination`."""
    size = len(packet)
    if size >= IPV4_HEADER:
        version = packet[0] >> 4
        if version == 4:
            return packet[12:16]
        if version == 6 and size >= IPV6_HEADER:
            return packet[8:24]
    return b""


def is_ip(packet: bytes) -> bool:
    """Tell whether it is a packet of IPv4 or IPv6 with a whole header."""
    return bool(destination(packet))
