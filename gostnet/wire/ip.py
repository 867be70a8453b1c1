"""IP and UDP packets as bytes: headers, checksums, fragments (RFC 791, 768, 8200). No I/O."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

UDP = 17
HOP_LIMIT = 64
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_UDP = struct.Struct("!HHHH")
_WORD, _WORDS = struct.Struct("!H"), struct.Struct("!HH")
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


class UdpWay:
    """From one endpoint to another: datagrams as whole packets, whose headers differ in lengths and sum only.

    largest    bytes of data that a packet of 1500 bytes has room for
    """

    __slots__ = ("_add", "_head", "_ports", "_rest", "_sum", "largest")

    def __init__(
        self, source: IPv4Address | IPv6Address, destination: IPv4Address | IPv6Address, ports: tuple[int, int]
    ) -> None:
        """Prepare for addresses of one family; `ports` are those of source and destination.

        Identification and header checksum of IPv4 are 0: the kernel fills them where packets come with their header.
        """
        addresses = source.packed + destination.packed
        if len(addresses) == 8:
            self._head = b"\x45\0"
            self._rest = struct.pack("!HHBBH", 0, 0, HOP_LIMIT, UDP, 0) + addresses
            self._add = 28
        else:
            self._head = b"\x60\0\0\0"
            self._rest = struct.pack("!BB", UDP, HOP_LIMIT) + addresses
            self._add = 8
        self._ports = struct.pack("!HH", *ports)
        self._sum = (int.from_bytes(addresses, "big") + sum(ports) + UDP) % 0xFFFF
        self.largest = 1500 - 28 if len(addresses) == 8 else 1500 - 48

    def packet(self, data: bytes | bytearray | memoryview) -> bytes:
        """Return the packet that carries `data`, unfragmented."""
        size = len(data)
        number = int.from_bytes(data, "big")
        if size & 1:
            number <<= 8
        length = 8 + size
        total = 0xFFFF - (number + self._sum + 2 * length) % 0xFFFF
        return b"".join(
            (self._head, _WORD.pack(self._add + size), self._rest, self._ports, _WORDS.pack(length, total), data)
        )


def udp_datagram(packet: bytes | memoryview) -> tuple[bytes, int, bytes, int, bytes] | None:
    """Return source, its port, destination, its port and data of a UDP packet; None for any other, and for fragments.

    The addresses are packed. The sum is not looked at: whoever hands the packet out answers for it.
    """
    size = len(packet)
    version = packet[0] >> 4 if size >= 28 else 0
    if version == 4:
        start, end = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
        addresses = bytes(packet[12:16]), bytes(packet[16:20])
        plain = packet[9] == UDP and not int.from_bytes(packet[6:8], "big") & 0x3FFF
    elif version == 6 and size >= 48:
        start, end = 40, 40 + int.from_bytes(packet[4:6], "big")
        addresses = bytes(packet[8:24]), bytes(packet[24:40])
        plain = packet[6] == UDP
    else:
        return None
    if not plain or end > size or start < 20 or start + 8 > end:
        return None
    source, destination, length, _ = _UDP.unpack_from(packet, start)
    if not 8 <= length <= end - start:
        return None
    return addresses[0], source, addresses[1], destination, bytes(packet[start + 8 : start + length])


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
