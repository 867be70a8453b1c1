"""UDP in trains: many datagrams of one size to or from one peer in a single system call.

Out, the kernel cuts what it is given (UDP_SEGMENT, Linux 4.18), and a device that can does it later still; in, it
joins what arrives together (UDP_GRO, Linux 5.0). Nothing of it shows on the wire. Where either is missing, datagrams
go one by one.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Any

from ..core.errors import ConnError
from ..core.sockets import UdpSocket
from ..core.stream import Buffer
from .arena import slots

_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_MOST_SEGMENTS = 64
"""Of one train: UDP_MAX_SEGMENTS up to Linux 6.8, twice as many since."""

_LARGEST_TRAIN = 65000
"""Bytes: a datagram less the headers of IPv6 with some extension headers."""

_SLOTS = 16
"""Trains per call of `receive_now`."""

_SLOT = 65535
_ANCILLARY = 64
_STRIDE = struct.Struct("=i")
_SEGMENT = struct.Struct("=H")

Train = tuple[memoryview, int, Any]
"""Datagrams in a row, the size of each but the last, which may be shorter; and whom they are from (a sockaddr)."""


class Trains:
    """Sends and receives by a UDP socket, which stays the owner's; nobody else may read it meanwhile.

    cuts      the kernel cuts trains that are sent
    drained   the last call of `receive_now` has taken all there was
    joins     the kernel joins datagrams that arrive
    refused   a connected socket's peer has said that nobody listens there; whoever reads it sets it back
    """

    __slots__ = ("_slots", "_sock", "_socket", "cuts", "drained", "joins", "refused")

    def __init__(self, udp: UdpSocket) -> None:
        self._socket = udp
        self._sock = udp.sock
        self._slots = slots(_SLOTS, _SLOT)
        self.cuts = _try_option(udp.sock, _UDP_SEGMENT, 0)
        self.joins = _try_option(udp.sock, _UDP_GRO, 1)
        self.refused = False
        self.drained = False

    @property
    def missing(self) -> str:
        """What this kernel lacks, "" for nothing."""
        return ", ".join(name for name, there in (("UDP_SEGMENT", self.cuts), ("UDP_GRO", self.joins)) if not there)

    @property
    def closed(self) -> bool:
        """Whether the socket is closed."""
        return self._socket.readiness.fd < 0

    # ---- in --------------------------------------------------------------------------------------
    def receive_now(self) -> list[Train]:
        """Return what has arrived, valid until the next call, and [] if nothing has. Raise ConnError once closed."""
        trains: list[Train] = []
        receive = self._sock.recvmsg_into
        self.drained = False
        for slot in self._slots:
            try:
                size, ancillary, _, peer = receive((slot,), _ANCILLARY)
            except (BlockingIOError, InterruptedError):
                self.drained = True
                break
            except OSError as exc:
                if self.closed:
                    raise ConnError("closed by this side") from exc
                self.refused |= exc.errno == errno.ECONNREFUSED
                continue  # the error has taken the place of what may be there
            stride = size
            for level, kind, data in ancillary:
                if level == _SOL_UDP and kind == _UDP_GRO:
                    stride = _STRIDE.unpack_from(data)[0]
            trains.append((slot[:size], stride, peer))
        return trains

    # ---- out -------------------------------------------------------------------------------------
    def send_from(self, packets: Sequence[Buffer], start: int, peer: Any = None) -> int:
        """Send packets in order, from the one at `start`; return where it stopped because the socket is full.

        `peer` is a sockaddr, None for a connected socket. A packet that cannot be sent is left out. Raise ConnError
        once closed.
        """
        count = len(packets)
        while start < count:
            end = start + 1
            if self.cuts and end < count:
                size = len(packets[start])
                last = min(count, start + _MOST_SEGMENTS, start + _LARGEST_TRAIN // max(size, 1))
                while end < last:
                    length = len(packets[end])
                    if length != size:
                        if length < size:
                            end += 1
                        break
                    end += 1
            if end - start > 1:
                sent = self._send_train(packets[start:end], peer)
                if sent is None:
                    # Larger than the way takes, or it cannot be cut: as datagrams of their own they may be fragmented.
                    for index in range(start, end):
                        if not self._send_one(packets[index], peer):
                            return index
                elif not sent:
                    return start
            elif not self._send_one(packets[start], peer):
                return start
            start = end
        return start

    def _send_train(self, train: Sequence[Buffer], peer: Any) -> bool | None:
        """Send a train; return False if the socket is full, None if it has to be sent as single datagrams."""
        ancillary = [(_SOL_UDP, _UDP_SEGMENT, _SEGMENT.pack(len(train[0])))]
        for _ in range(2):
            try:
                if peer is None:
                    self._sock.sendmsg(train, ancillary)
                else:
                    self._sock.sendmsg(train, ancillary, 0, peer)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as exc:
                if self._failed(exc):
                    continue
                if exc.errno in (errno.EIO, errno.EOPNOTSUPP):
                    self.cuts = False  # a device without checksums, on kernels that then do not cut (before Linux 6.11)
                return None
            return True
        return True

    def _send_one(self, packet: Buffer, peer: Any) -> bool:
        """Send one datagram now; False if the socket is full."""
        for _ in range(2):
            try:
                if peer is None:
                    self._sock.send(packet)
                else:
                    self._sock.sendto(packet, peer)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as exc:
                if self._failed(exc):
                    continue
            return True
        return True

    def _failed(self, exc: OSError) -> bool:
        """Note an error that concerns one datagram; True if it was about an earlier one, and this one is still here."""
        if self.closed:
            raise ConnError("closed by this side") from exc
        if exc.errno == errno.ECONNREFUSED:
            self.refused = True
            return True
        return False


def _try_option(sock: socket.socket, option: int, value: int) -> bool:
    try:
        sock.setsockopt(_SOL_UDP, option, value)
    except OSError:
        return False
    return True


def split(train: memoryview, stride: int) -> list[memoryview]:
    """Return the datagrams of a train."""
    size = len(train)
    if size <= stride:
        return [train]
    return [train[start : start + stride] for start in range(0, size, stride)]
