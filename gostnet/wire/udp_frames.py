"""Datagrams inside other carriers: UDP-tun frames and length frames on streams, SOCKS5 headers on UDP.

    UDP-tun     LEN(2) FRAG(1) ATYP ADDR PORT DATA     LEN counts DATA only; GOST: gosocks5, UDP over TCP
    length      LEN(2) DATA                            one target; GOST: relay, CONNECT with network udp
    SOCKS5      0000 FRAG(1) ATYP ADDR PORT DATA       RFC 1928 section 7

Numbers are big endian. FRAG is written 0xff in UDP-tun and 0 in SOCKS5; any value is taken (# GOST: fragments are
passed on as whole datagrams).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from ..core.address import Endpoint
from ..core.errors import ProtocolError
from .socks_addr import MAX_SIZE, address_end, decode_address, encode_address

MAX_DATA: Final = 65535
"""Bytes of the largest datagram that LEN can tell."""

MAX_TUN_FRAME: Final = 3 + MAX_SIZE + MAX_DATA
"""Bytes of the largest UDP-tun frame."""

UDP_HEADER: Final = b"\0\0\0"
"""What stands before the address in a SOCKS5 datagram."""

# Datagrams come and go in runs with few peers: both directions of the conversion are remembered.
known_address: Final = lru_cache(maxsize=4096)(encode_address)
known_endpoint: Final = lru_cache(maxsize=4096)(decode_address)


def encode_datagram(data: bytes | bytearray | memoryview, peer: Endpoint) -> bytes:
    """Return a SOCKS5 datagram to or from `peer` (RFC 1928 section 7). Raise ProtocolError for a name too long."""
    return b"".join((UDP_HEADER, known_address(peer), data))


def decode_datagram(packet: bytes) -> tuple[bytes, Endpoint]:
    """Return (data, peer) of a SOCKS5 datagram. RSV and FRAG are not looked at. Raise ProtocolError."""
    end = address_end(packet, 3)
    if not end or end > len(packet):
        raise ProtocolError(f"a datagram of {len(packet)} bytes ends inside its header")
    return packet[end:], known_endpoint(packet[3:end])


def encode_tun_frames(batch: Iterable[tuple[bytes | bytearray | memoryview, Endpoint]]) -> bytes:
    """Return the UDP-tun frames of a batch of (data, peer) as one buffer.

    Left out are datagrams that no frame can carry: more than 65,535 bytes, a peer whose name is too long, and empty
    ones. GOST's reader takes LEN 0 for "whatever the next read returns", so an empty frame would swallow the next.
    """
    parts: list[bytes | bytearray | memoryview] = []
    for data, peer in batch:
        size = len(data)
        if not 0 < size <= MAX_DATA:
            continue
        try:
            address = known_address(peer)
        except ProtocolError:
            continue
        parts.append(bytes((size >> 8, size & 0xFF, 0xFF)) + address)
        parts.append(data)
    return b"".join(parts)


def encode_length_frames(batch: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Return the length frames of a batch as one buffer; what is longer than 65,535 bytes is left out."""
    parts: list[bytes | bytearray | memoryview] = []
    for data in batch:
        size = len(data)
        if size <= MAX_DATA:
            parts.append(size.to_bytes(2, "big"))
            parts.append(data)
    return b"".join(parts)


class _Frames:
    """What has come of frames that are not complete: never more than one frame and one read."""

    __slots__ = ("_held", "_wanted", "error")

    def __init__(self) -> None:
        self.error: ProtocolError | None = None
        """Why nothing can be read any more: the border of the next frame is not known."""
        self._held = bytearray()
        self._wanted = 0

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete."""
        return len(self._held)

    def _gathered(self, data: bytes) -> bytes:
        """Return what can be parsed now, b"" while the frame at the front is known to need more."""
        held = self._held
        if not held:
            return data
        held += data
        if len(held) < self._wanted:
            return b""
        data = bytes(held)
        held.clear()
        return data

    def _keep(self, data: bytes, start: int, wanted: int) -> None:
        """Hold what is left from `start`, of which the first frame needs `wanted` bytes."""
        self._wanted = wanted
        if start < len(data):
            self._held += data[start:] if start else data


class TunFrames(_Frames):
    """Takes a stream of UDP-tun frames apart, however it is cut into pieces."""

    __slots__ = ()

    def feed(self, data: bytes) -> list[tuple[bytes, Endpoint]]:
        """Return (data, peer) of every frame that `data` completes; sets `error` after the last good one.

        A frame whose peer is not a usable name is dropped alone. LEN 0 is an empty datagram: GOST's writers send one
        for it, and nothing after it.
        """
        data = self._gathered(data)
        frames: list[tuple[bytes, Endpoint]] = []
        size, start = len(data), 0
        while start < size and self.error is None:
            try:
                head = address_end(data, start + 3)
            except ProtocolError as exc:
                self.error = exc
                return frames
            if not head:
                self._keep(data, start, 5)
                return frames
            end = head + (data[start] << 8 | data[start + 1])
            if end > size:
                self._keep(data, start, end - start)
                return frames
            try:
                frames.append((data[head:end], known_endpoint(data[start + 3 : head])))
            except ProtocolError:
                pass
            start = end
        return frames


class LengthFrames(_Frames):
    """Takes a stream of length frames apart."""

    __slots__ = ()

    def feed(self, data: bytes) -> list[bytes]:
        """Return every datagram that `data` completes."""
        data = self._gathered(data)
        frames: list[bytes] = []
        size, start = len(data), 0
        while start < size:
            if size - start < 2:
                self._keep(data, start, 2)
                return frames
            head = start + 2
            end = head + (data[start] << 8 | data[start + 1])
            if end > size:
                self._keep(data, start, end - start)
                return frames
            frames.append(data[head:end])
            start = end
        return frames
