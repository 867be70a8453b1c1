"""IP and UDP packets as bytes: headers, checksums, fragments (RFC 791, 768, 8200). No I/O."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

UDP = 17
HOP_LIMIT = 64
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_UDP = struct.Struct("!HHHH")
_FRAGMENT_V6 = struct.Struct("!BBHI")
_FRAGMENT_HEADER = 44


def checksum(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """Return the Internet checksum (RFC 1071) of `data`, zero-padded to 16-bit words, plus the sum `start`.

    The one's complement sum is the number's remainder modulo 65535: one big division instead of a loop.
    """
    number = int.from_bytes(data, "big")
    if len(data) & 1:
        number <<= 8
    total = number + start
    rest = total % 0xFFFF
    if rest == 0 and total:
        rest = 0xFFFF
    return ~rest & 0xFFFF


def udp_payload(source: bytes, destination: bytes, source_port: int, destination_port: int, data: bytes) -> bytes:
    """Return UDP header and data; `source` and `destination` are packed addresses of one family.

    source port | destination port | length | checksum over the pseudo header (RFC 768; RFC 8200 section 8.1)
    """
    length = 8 + len(data)
    header = _UDP.pack(source_port, destination_port, length, 0)
    pseudo = source + destination + struct.pack("!II", length, UDP)
    # The pseudo header of IPv4 is shorter, but its sum is the same: zero words add nothing.
    total = checksum(header + data, int.from_bytes(pseudo, "big")) or 0xFFFF
    return _UDP.pack(source_port, destination_port, length, total) + data


def ipv4_packets(
    source: IPv4Address, destination: IPv4Address, payload: bytes, mtu: int, ident: int, protocol: int = UDP
) -> list[bytes]:
    """Return the IPv4 packets that carry a `payload`, fragmented where it exceeds `mtu` bytes.

    The kernel fills total length and header checksum of packets that are sent with IP_HDRINCL; both are right anyway.
    """
    step = (mtu - 20) & ~7
    packets = []
    for offset in range(0, len(payload), step):
        part = payload[offset : offset + step]
        more = 0x2000 if offset + step < len(payload) else 0
        fields = (0x45, 0, 20 + len(part), ident, more | offset >> 3, HOP_LIMIT, protocol)
        header = _IPV4.pack(*fields, 0, source.packed, destination.packed)
        header = _IPV4.pack(*fields, checksum(header), source.packed, destination.packed)
        packets.append(header + part)
    return packets


def ipv6_packets(
    source: IPv6Address, destination: IPv6Address, payload: bytes, mtu: int, ident: int, protocol: int = UDP
) -> list[bytes]:
    """Return the IPv6 packets that carry a `payload`, with fragment headers where it exceeds `mtu` bytes."""
    if 40 + len(payload) <= mtu:
        return [_IPV6.pack(6 << 28, len(payload), protocol, HOP_LIMIT, source.packed, destination.packed) + payload]
    step = (mtu - 48) & ~7
    packets = []
    for offset in range(0, len(payload), step):
        part = payload[offset : offset + step]
        more = 1 if offset + step < len(payload) else 0
        header = _IPV6.pack(6 << 28, 8 + len(part), _FRAGMENT_HEADER, HOP_LIMIT, source.packed, destination.packed)
        packets.append(header + _FRAGMENT_V6.pack(protocol, 0, offset | more, ident) + part)
    return packets
