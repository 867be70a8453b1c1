"""TCP segments for the tests of runs: made with right sums, and looked at."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from ipaddress import ip_address

ENDS = {4: ("10.0.0.1", "10.0.0.2"), 6: ("fd00::1", "fd00::2")}
TIMESTAMPS = bytes.fromhex("0101080a00000001000000ff")


def checksum(data: bytes) -> int:
    """The Internet checksum, word by word (RFC 1071)."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def segment(
    version: int,
    payload: bytes,
    sequence: int,
    *,
    flags: int = 0x10,
    ack: int = 7,
    window: int = 500,
    port: int = 1000,
    options: bytes = TIMESTAMPS,
    fragment: int = 0x4000,
    tos: int = 0,
    identification: int = 0,
    ip_options: bytes = b"",
) -> bytes:
    """Return a segment with right checksums."""
    source, destination = (ip_address(text).packed for text in ENDS[version])
    offset = (20 + len(options)) // 4 << 4
    tcp = struct.pack(">HHIIBBHHH", port, 80, sequence & 0xFFFFFFFF, ack, offset, flags, window, 0, 0) + options
    pseudo = source + destination + struct.pack(">IHH", len(tcp) + len(payload), 0, 6)
    tcp = tcp[:16] + checksum(pseudo + tcp + payload).to_bytes(2, "big") + tcp[18:]
    if version == 6:
        return struct.pack(">IHBB", 6 << 28 | tos << 20, len(tcp) + len(payload), 6, 64) + pseudo[:32] + tcp + payload
    size = 20 + len(ip_options)
    head = struct.pack(
        ">BBHHHBBH", 0x40 | size // 4, tos, size + len(tcp) + len(payload), identification, fragment, 64, 6, 0
    )
    head += source + destination + ip_options
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + tcp + payload


def train(version: int, sizes: Sequence[int], start: int = 1000, **more: int) -> list[bytes]:
    """Return segments of random payloads that follow each other."""
    found, sequence = [], start
    for number, size in enumerate(sizes):
        found.append(segment(version, random.randbytes(size), sequence, identification=number * 3, **more))  # type: ignore[arg-type]
        sequence += size
    return found


def valid(packet: bytes) -> bool:
    """Tell whether all sums and lengths of a packet are right."""
    version = packet[0] >> 4
    if version == 4:
        size = (packet[0] & 15) * 4
        if checksum(packet[:size]) or int.from_bytes(packet[2:4], "big") != len(packet):
            return False
        ends, tcp = packet[12:20], packet[size:]
    else:
        if int.from_bytes(packet[4:6], "big") + 40 != len(packet):
            return False
        ends, tcp = packet[8:40], packet[40:]
    return checksum(ends + struct.pack(">IHH", len(tcp), 0, 6) + tcp) == 0


def payload_of(packet: bytes) -> bytes:
    """Return what is behind IP and TCP."""
    start = (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40
    return packet[start + (packet[start + 12] >> 4) * 4 :]
