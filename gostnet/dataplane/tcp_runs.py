"""Runs of TCP segments joined into one packet for a device that takes such: what a network card does on receiving.

A run is what one sender has cut: segments of one flow that follow each other, equal in everything but sequence number,
checksums and identification, all of one size but the last, which may be shorter. The kernel takes a joined run in one
write, with this in front of it (struct virtio_net_hdr, in the host's order):

    flags 1 | GSO type 1 | header length 2 | segment size 2 | checksum start 2 | checksum offset 2

No payload is read here. What the kernel gets is not marked as verified: the checksum of the whole follows from those of
the segments, so a segment that was damaged before it entered the tunnel makes the whole fail, as it would have alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from ..core.stream import Buffer

HEADER_SIZE = 10
"""Bytes of the header in front of every packet."""

PLAIN = bytes(HEADER_SIZE)
"""The header of a packet that is one."""

Run: TypeAlias = list[Buffer]
"""What is written at once: the header, then a packet, or the headers of a run and the payload of each segment."""

MOST_SEGMENTS = 64
_LARGEST = 65535

_VIRTIO = struct.Struct("=BBHHHH")
_GSO_TYPES = {4: 1, 6: 4}
_TCP = 6
_ACK, _PUSH = 0x10, 0x08


class _Layout:
    """Where things are in headers of one length, seen as one number: shifts, and what has to be equal."""

    __slots__ = ("_size", "_trains", "address_start", "ip", "length_shift", "mask", "push", "sequence_shift")

    def __init__(self, version: int, size: int) -> None:
        self.ip = 20 if version == 4 else 40
        self.address_start = 12 if version == 4 else 8

        def shift(end: int) -> int:
            return (size - end) * 8

        self.length_shift = shift(4 if version == 4 else 6)
        self.sequence_shift = shift(self.ip + 8)
        self.push = _PUSH << shift(self.ip + 14)
        differing = 0xFFFF << shift(self.ip + 18) | self.push
        if version == 4:
            # Identification (RFC 6864: of no meaning for packets that must not be fragmented) and header checksum.
            differing |= 0xFFFF << shift(6) | 0xFFFF << shift(12)
        self.mask = (1 << size * 8) - 1 ^ differing
        self._size = size
        self._trains: dict[int, tuple[int, int]] = {}  # by the number of packets, of which there are at most 64

    def sum_of_run(self, packets: Sequence[Buffer], alike: int, payload: int) -> tuple[int, int] | None:
        """Return the sum of the headers, and PSH of the last one, if packets of one size are a run, else None.

        All headers are seen as one number: what has to be equal to the first one (`alike`), with the sequence numbers
        that follow from it. A shift by a header is one by an even number of bytes, which sums do not mind.
        """
        count, size = len(packets), self._size
        known = self._trains.get(count)
        if known is None:
            bits = size * 8
            mask = steps = 0
            for index in range(count):
                mask = mask << bits | self.mask | (self.push if index < count - 1 else 0)
                steps = steps << bits | index << self.sequence_shift
            known = self._trains[count] = (mask, steps)
        fields = int.from_bytes(b"".join([packet[:size] for packet in packets]), "big")
        wanted = int.from_bytes(alike.to_bytes(size, "big") * count, "big") + payload * known[1]
        if fields & known[0] != wanted:
            return None
        return fields % 65535, packets[-1][self.ip + 13] & _PUSH


_layouts: dict[tuple[int, int], _Layout] = {}


def packets_of(run: Run) -> int:
    """Return how many packets are in a run."""
    return max(1, len(run) - 2)


def join_runs(packets: Sequence[Buffer]) -> Iterator[Run]:
    """Yield what to write to the device, in order and each with its header in front: packets as they are, or runs.

    Packets that are not plain segments (fragments, options of IPv4, extension headers, anything but ACK and PSH, no
    payload) pass as they are. The order within a flow is kept, and that between flows too.
    """
    number = int.from_bytes
    count = len(packets)
    start = doubtful = 0
    while start < count:
        first = packets[start]
        size = len(first)
        header = _header_of(first, size)
        payload = size - header
        # A piece of odd length would shift the sums of those behind it by a byte.
        if not header or payload <= 0 or payload & 1:
            yield [PLAIN, first]
            start += 1
            continue
        version = first[0] >> 4
        layout = _layouts.get((version, header))
        if layout is None:
            layout = _layouts[version, header] = _Layout(version, header)
        total = number(first[:header], "big")
        if total & layout.push:
            yield [PLAIN, first]
            start += 1
            continue
        limit = min(count, start + min(MOST_SEGMENTS, (_LARGEST - header) // payload))
        mask = layout.mask
        alike = total & mask
        step = payload << layout.sequence_shift
        push = 0
        end = start + 1
        # 1. all that are of this size at once: mostly they are one run
        if start >= doubtful:
            while end < limit and len(packets[end]) == size:
                end += 1
            found = layout.sum_of_run(packets[start:end], alike, payload) if end - start > 2 else None
            if found is None:
                doubtful, end = end, start + 1
            else:
                total, push = found
        # 2. one by one: behind those the shorter last one, or else as many as there are
        while end < limit and not push:
            packet = packets[end]
            length = len(packet)
            if not header < length <= size:
                break
            fields = number(packet[:header], "big")
            if fields & mask != alike + (end - start) * step - (size - length << layout.length_shift):
                break
            total += fields
            push = fields & layout.push
            end += 1
            if length < size:
                break
        if end - start > 1:
            pieces = [packet[header:] for packet in packets[start:end]]
            yield _joined(first, pieces, header, size, total, push, layout)
        else:
            yield [PLAIN, first]
        start = end


def _header_of(packet: Buffer, length: int) -> int:
    """Return the bytes of the headers if this may begin a run, else 0."""
    if length < 40:
        return 0
    kind = packet[0]
    if kind == 0x45:
        if packet[9] != _TCP or packet[6] != 0x40 or packet[7] or packet[2] << 8 | packet[3] != length:
            return 0
        start = 20
    elif kind >> 4 == 6:
        if length < 60 or packet[6] != _TCP or (packet[4] << 8 | packet[5]) + 40 != length:
            return 0
        start = 40
    else:
        return 0
    words = packet[start + 12] >> 4
    if words < 5 or packet[start + 13] & ~_PUSH != _ACK:
        return 0
    return start + words * 4


def _joined(first: Buffer, run: list[Buffer], header: int, size: int, total: int, push: int, layout: _Layout) -> Run:
    """Return a run as one packet with its header in front. `total` is the sum of the headers, as numbers.

    All sums are modulo 65535, which is what the Internet checksum (RFC 1071) is: a header of an even length, read as
    one number, leaves the sum of its words.
    """
    ip, count = layout.ip, len(run)
    payload = (count - 1) * (size - header) + len(run[-1])
    head = bytearray(first[:header])
    start = layout.address_start
    addresses = int.from_bytes(head[start:ip], "big") % 65535
    # 1. what the segments' own TCP headers add up to, then what their payloads do: with header and pseudo header,
    #    each segment adds up to zero
    tcp = header - ip
    if ip == 20:
        headers = total  # each IPv4 header adds up to zero by itself, if it is right
    else:
        head[4:6] = b"\0\0"
        headers = total - count * int.from_bytes(head[:ip], "big") - (count * tcp + payload)
    pseudo = count * (addresses + _TCP) + count * tcp + payload
    payloads = -(headers + pseudo) % 65535
    # 2. the headers of the whole
    if ip == 20:
        head[2:4] = (header + payload).to_bytes(2, "big")
        head[10:12] = b"\0\0"
        head[10:12] = (0xFFFF - int.from_bytes(head[:ip], "big") % 65535).to_bytes(2, "big")
    else:
        head[4:6] = (tcp + payload).to_bytes(2, "big")
    if push:
        head[ip + 13] |= _PUSH
    head[ip + 16 : ip + 18] = b"\0\0"
    whole = int.from_bytes(head[ip:], "big") + addresses + _TCP + tcp + payload + payloads
    head[ip + 16 : ip + 18] = (0xFFFF - whole % 65535).to_bytes(2, "big")
    virtio = _VIRTIO.pack(0, _GSO_TYPES[4 if ip == 20 else 6], header, size - header, 0, 0)
    return [virtio, head, *run]
