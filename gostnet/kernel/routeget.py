"""Look one destination up in the kernel's routing, as it would be for a packet with a mark, a user and a device.

`RouteLookup` asks each time, `KernelRouter` is the same as a router of whoever has one, and remembers answers for as
long as nothing changes.

Some 20 us a look-up: the message is encoded and read by hand, as pyroute2 takes 30 times as long here and has no way
to ask for the matched route. The kernel answers within `send`, so a look-up never blocks and may run on an event loop.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Literal, TypeAlias

from gostnet.core.address import parse_ip
from gostnet.core.contracts import NetworkRoute
from gostnet.core.errors import DialUnreachable, KernelError

from . import netns
from .changes import Changes, Topic
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
    network   first address of the matched route's network, with `matched`; else the destination
    protocol  who has made the route, as the kernel numbers them (rtnetlink(7), rtm_protocol)
    """

    type: RouteType
    table: int
    device: int
    gateway: str = ""
    source: str = ""
    mtu: int = 0
    prefix: int = 0
    network: str = ""
    protocol: int = 0


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
    family, prefix, _, _, table, protocol, _, kind, _ = _RTMSG.unpack_from(data, _HEADER.size)
    device, gateway, source, mtu = 0, "", "", 0
    network = "0.0.0.0" if family == socket.AF_INET else "::"
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
        elif attribute == _DST:
            network = str(ip_address(payload))
        elif attribute == _GATEWAY:
            gateway = str(ip_address(payload))
        elif attribute == _VIA:  # a gateway of the other IP version, behind its family
            gateway = str(ip_address(payload[2:]))
        elif attribute == _PREFSRC:
            source = str(ip_address(payload))
        elif attribute == _METRICS:
            mtu = _mtu_of(payload)
        position += (size + 3) & ~3
    return FoundRoute(_TYPES.get(kind, "other"), table, device, gateway, source, mtu, prefix, network, protocol)


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


# ---- as a router --------------------------------------------------------------------------------
PROTOCOLS = {
    2: "kernel",
    3: "boot",
    4: "static",
    9: "ra",
    16: "dhcp",
    186: "bgp",
    188: "ospf",
    189: "rip",
    250: "gostnet",
}
"""Names of origins, as iproute2's rt_protos has them, and ours; others go by their number."""

_MOST_CACHED = 16384
"""Answers that are remembered; forgotten all at once when there are more."""


class KernelRouter:
    """The kernel's routing of one network namespace, of which only routes out of `device` count if one is named.

    To be used on an event loop. `generation` is another one whenever an answer may have changed.
    """

    def __init__(self, place: netns.Place = None, device: str = "") -> None:
        """Open the sockets. Raise KernelError."""
        self.generation = 0
        self._device = device
        self._place = netns.open_namespace(place)
        self._answers: dict[tuple[str, str, str], NetworkRoute | None] = {}
        try:
            self._lookup = RouteLookup(self._place)
            try:
                self._changes = Changes(Topic.LINKS | Topic.ADDRESSES | Topic.ROUTES, self._changed, self._place)
            except BaseException:
                self._lookup.close()
                raise
        except BaseException:
            self._place.close()
            raise

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        self._changes.close()
        self._lookup.close()
        self._place.close()

    def _changed(self) -> None:
        self.generation += 1
        self._answers.clear()

    def get_route(self, destination: str, *, network: str = "", protocol: str = "") -> NetworkRoute | None:
        """Return the route to an IP address, None if there is none, or not that to `network`, or of that origin."""
        key = (destination, network, protocol)
        try:
            return self._answers[key]
        except KeyError:
            pass
        if len(self._answers) >= _MOST_CACHED:
            self._answers.clear()
        found = self._ask(destination)
        if found is not None and (network not in ("", str(found.network)) or protocol not in ("", found.protocol)):
            found = None
        self._answers[key] = found
        return found

    def _ask(self, destination: str) -> NetworkRoute | None:
        if parse_ip(destination) is None:
            return None
        index = self._index()
        if index is None:
            return None
        try:
            found = self._lookup.get(destination, device=index, matched=True)
        except (DialUnreachable, KernelError):
            return None
        network = ip_network(f"{found.network}/{found.prefix}", strict=False)
        protocol = PROTOCOLS.get(found.protocol, str(found.protocol))
        return NetworkRoute(network, str(network), found.gateway, protocol)

    def _index(self) -> int | None:
        """Return the device's index, 0 for any device; None if there is no such device now."""
        if not self._device:
            return 0
        with netns.inside(self._place):
            try:
                return socket.if_nametoindex(self._device)
            except OSError:
                return None
