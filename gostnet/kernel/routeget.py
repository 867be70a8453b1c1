"""Look one destination up in the kernel's routing, as it would be for a packet with a mark, a user and a device.

Some 20 us a look-up: the message is encoded and read by hand, as pyroute2 takes 30 times as long here and has no way
to ask for the matched route. The kernel answers within `send`, so a look-up never blocks and may run on an event loop.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal, TypeAlias

from gostnet.core.errors import DialUnreachable, KernelError

from .netlink import RouteSocket

RouteType: TypeAlias = Literal["unicast", "local", "broadcast", "anycast", "multicast", "other"]

_GETROUTE, _ERROR, _REQUEST = 26, 2, 1
_HEADER = struct.Struct("=IHHII")
_RTMSG = struct.Struct("=BBBBBBBBI")
_DST, _OIF, _GATEWAY, _PREFSRC, _METRICS, _TABLE, _MARK, _VIA, _UID = 1, 4, 5, 7, 8, 15, 16, 18, 25
_METRIC_MTU = 2
_LOOKUP_TABLE, _FIB_MATCH = 0x1000, 0x2000
_TYPES: dict[int, RouteType] = {1: "unicast", 2: "local", 3: "broadcast", 4: "anycast", 5: "multicast"}

# What the kernel answers with for a blackhole is EINVAL; for unreachable EHOSTUNREACH, for prohibit EACCES.
_NO_WAY = {
    errno.ENETUNREACH: "there is no route",
    errno.EHOSTUNREACH: "a route says unreachable",
    errno.EINVAL: "a route says blackhole",
    errno.EACCES: "a route says prohibit",
    errno.EAGAIN: "a route says throw",
}


@dataclass(frozen=True, slots=True)
class FoundRoute:
    """The way to a destination.

    table     the routing table that the answer comes from
    device    index of the interface
    gateway   the neighbour, "" if the destination itself is one
    source    the address that a socket without one of its own would get, "" if the kernel says none
    mtu       bytes, as far as a route or a learnt path MTU says; 0 for the interface's own
    prefix    of the matched route, with `matched`; else that of the destination alone
    """

    type: RouteType
    table: int
    device: int
    gateway: str = ""
    source: str = ""
    mtu: int = 0
    prefix: int = 0


class RouteLookup(RouteSocket):
    """A socket for look-ups in one network namespace."""

    __slots__ = ()

    def get(
        self, destination: str, *, mark: int = 0, device: int = 0, uid: int | None = None, matched: bool = False
    ) -> FoundRoute:
        """Return the way to an IP address, with `matched` the route that it was found by.

        `device` is an interface's index, as SO_BINDTODEVICE would set it. Raise DialUnreachable that says why if
        there is no way, KernelError if the kernel does not take the question (ENODEV: no such device).
        """
        packed = ip_address(destination).packed
        family, bits = (socket.AF_INET, 32) if len(packed) == 4 else (socket.AF_INET6, 128)
        flags = _LOOKUP_TABLE | (_FIB_MATCH if matched else 0)
        body = _RTMSG.pack(family, bits, 0, 0, 0, 0, 0, 0, flags) + struct.pack("=HH", 4 + len(packed), _DST) + packed
        for kind, number in ((_MARK, mark), (_OIF, device)):
            if number:
                body += struct.pack("=HHI", 8, kind, number)
        if uid is not None:
            body += struct.pack("=HHI", 8, _UID, uid)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        try:
            self._socket.send(_HEADER.pack(_HEADER.size + len(body), _GETROUTE, _REQUEST, self._sequence, 0) + body)
            while True:
                data = self._socket.recv(8192)
                size, kind, _, sequence, _ = _HEADER.unpack_from(data)
                if sequence == self._sequence:
                    break
        except OSError as exc:
            raise KernelError(f"ip route get {destination}", exc.errno or errno.EIO) from exc
        if kind == _ERROR:
            raise _refusal(destination, -int(struct.unpack_from("=i", data, _HEADER.size)[0]))
        return _parse(data[:size])


def _refusal(destination: str, number: int) -> DialUnreachable | KernelError:
    if number in _NO_WAY:
        return DialUnreachable(f"no way to {destination}: {_NO_WAY[number]}")
    return KernelError(f"ip route get {destination}", number, os.strerror(number))


def _parse(data: bytes) -> FoundRoute:
    """Read struct rtmsg, 12 bytes behind the header, and the attributes behind it."""
    _, prefix, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(data, _HEADER.size)
    device, gateway, source, mtu = 0, "", "", 0
    position = _HEADER.size + _RTMSG.size
    while position + 4 <= len(data):
        size, attribute = struct.unpack_from("=HH", data, position)
        if size < 4:
            break
        payload = data[position + 4 : position + size]
        attribute &= 0x3FFF
        if attribute == _OIF:
            (device,) = struct.unpack("=I", payload)
        elif attribute == _TABLE:  # the header's field has room for 255 only
            (table,) = struct.unpack("=I", payload)
        elif attribute == _GATEWAY:
            gateway = str(ip_address(payload))
        elif attribute == _VIA:  # a gateway of the other IP version, behind its family
            gateway = str(ip_address(payload[2:]))
        elif attribute == _PREFSRC:
            source = str(ip_address(payload))
        elif attribute == _METRICS:
            mtu = _mtu_of(payload)
        position += (size + 3) & ~3
    return FoundRoute(_TYPES.get(kind, "other"), table, device, gateway, source, mtu, prefix)


def _mtu_of(metrics: bytes) -> int:
    position = 0
    while position + 8 <= len(metrics):
        size, kind, number = struct.unpack_from("=HHI", metrics, position)
        if size < 4:
            break
        if kind == _METRIC_MTU:
            return int(number)
        position += (size + 3) & ~3
    return 0
