"""ICMP as bytes: echo messages and errors of both IP versions (RFC 792, RFC 4443). No I/O.

Echo, with the numbers of IPv4 and IPv6, code 0:

    type (request 8 or 128, reply 0 or 129) 1 | code 1 | checksum 2 | identifier 2 | sequence number 2 | data
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from .ip import UDP, checksum

IPAddress = IPv4Address | IPv6Address

PROTOCOL: Mapping[int, int] = {4: 1, 6: 58}
REQUEST: Mapping[int, int] = {4: 8, 6: 128}
REPLY: Mapping[int, int] = {4: 0, 6: 129}
ECHO_HEADER = 8
"""Bytes before the data."""

_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_FRAGMENTED = 0x3FFF


@dataclass(frozen=True, slots=True)
class EchoRequest:
    """An echo request: who asks, who is asked, the identifier, and the message from the type on."""

    source: IPAddress
    destination: IPAddress
    identifier: int
    message: bytes


def echo_request(packet: bytes | bytearray | memoryview) -> EchoRequest | None:
    """Return the echo request in an IP packet, None for anything else, fragments included."""
    size = len(packet)
    if size < 20:
        return None
    version = packet[0] >> 4
    if version == 4:
        start, end = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
        plain = packet[9] == PROTOCOL[4] and not int.from_bytes(packet[6:8], "big") & _FRAGMENTED
        addresses = packet[12:16], packet[16:20]
    elif version == 6 and size >= 40:
        start, end = 40, 40 + int.from_bytes(packet[4:6], "big")
        plain = packet[6] == PROTOCOL[6]
        addresses = packet[8:24], packet[24:40]
    else:
        return None
    if not plain or start < 20 or end > size or end - start < ECHO_HEADER:
        return None
    message = bytes(packet[start:end])
    if message[0] != REQUEST[version] or message[1]:
        return None
    source, destination = (ip_address(bytes(part)) for part in addresses)
    return EchoRequest(source, destination, int.from_bytes(message[4:6], "big"), message)


def echo(kind: int, identifier: int, message: bytes, source: IPAddress, destination: IPAddress) -> bytes:
    """Return an echo message with another type and identifier, and the checksum that belongs to it."""
    header = struct.pack("!BBHH", kind, 0, 0, identifier)
    return _summed(header + message[6:], source, destination)


def port_unreachable(client: IPAddress, client_port: int, target: IPAddress, port: int, size: int) -> bytes:
    """Return the error for a UDP datagram of `size` bytes from `client` to a port of `target` that nobody listens at.

    type 3, code 3 of IPv4 or type 1, code 4 of IPv6 | checksum 2 | 4 bytes 0 | the headers of the datagram
    """
    length = 8 + size
    datagram = struct.pack("!HHHH", client_port, port, length, 0)
    if target.version == 4:
        fields = (0x45, 0, 20 + length, 0, 0, 64, UDP)
        header = _IPV4.pack(*fields, 0, client.packed, target.packed)
        header = _IPV4.pack(*fields, checksum(header), client.packed, target.packed)
        begin = struct.pack("!BBHI", 3, 3, 0, 0)
    else:
        header = _IPV6.pack(6 << 28, length, UDP, 64, client.packed, target.packed)
        begin = struct.pack("!BBHI", 1, 4, 0, 0)
    return _summed(begin + header + datagram, target, client)


def _summed(message: bytes, source: IPAddress, destination: IPAddress) -> bytes:
    """Set the checksum of a message that has 0 there; that of IPv6 is also over a pseudo header (RFC 8200 8.1)."""
    start = 0
    if source.version == 6:
        pseudo = source.packed + destination.packed + struct.pack("!II", len(message), PROTOCOL[6])
        start = int.from_bytes(pseudo, "big")
    return message[:2] + struct.pack("!H", checksum(message, start)) + message[4:]
