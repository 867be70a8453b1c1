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

from ..core.batches import SOL_UDP, UDP_GRO
from ..core.errors import ConnError
from ..core.stream import Buffer
from ..core.udp_socket import UdpSocket
from .arena import slots

_SLOTS = 16
"""Trains per call of `receive_now`."""

_SLOT = 65535
_ANCILLARY = 64
_STRIDE = struct.Struct("=i")

Train = tuple[memoryview, int, Any]
"""Datagrams in a row, the size of each but the last, which may be shorter; and whom they are from (a sockaddr)."""


class Trains:
    """Sends and receives by a UDP socket, which stays the owner's; nobody else may read it meanwhile.

    drained   the last call of `receive_now` has taken all there was
    joins     the kernel joins datagrams that arrive
    """

    __slots__ = ("_slots", "_sock", "_socket", "drained", "joins")

    def __init__(self, udp: UdpSocket) -> None:
        self._socket = udp
        self._sock = udp.sock
        self._slots = slots(_SLOTS, _SLOT)
        self.joins = _try_option(udp.sock, UDP_GRO, 1)
        self.drained = False

    @property
    def cuts(self) -> bool:
        """Whether the kernel cuts trains that are sent."""
        return self._socket.cuts > 0

    @property
    def refused(self) -> bool:
        """Whether a connected socket's peer has said that nobody listens there; whoever reads it sets it back."""
        return self._socket.refused

    @refused.setter
    def refused(self, value: bool) -> None:
        self._socket.refused = value

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
                if level == SOL_UDP and kind == UDP_GRO:
                    stride = _STRIDE.unpack_from(data)[0]
            trains.append((slot[:size], stride, peer))
        return trains

    # ---- out -------------------------------------------------------------------------------------
    def send_from(self, packets: Sequence[Buffer], start: int, peer: Any = None) -> int:
        """Send packets in order, from the one at `start`; return where it stopped because the socket is full.

        `peer` is a sockaddr, None for a connected socket. A packet that cannot be sent is left out. Raise ConnError
        once closed.
        """
        return self._socket.send_from(packets, start, peer)


def _try_option(sock: socket.socket, option: int, value: int) -> bool:
    try:
        sock.setsockopt(SOL_UDP, option, value)
    except OSError:
        return False
    return True


def split(train: memoryview, stride: int) -> list[memoryview]:
    """Return the datagrams of a train."""
    size = len(train)
    if size <= stride:
        return [train]
    return [train[start : start + stride] for start in range(0, size, stride)]
