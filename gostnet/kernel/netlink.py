"""Routes, rules, addresses and link settings of one network namespace: observed, put and dropped.

The few messages are encoded and read by hand: the guard has to act within a moment of the daemon's death, on a busy
machine too, and loading pyroute2 first takes 0.1 s of processor time and 20 MiB. The kernel answers a change while it
takes the request, so nothing here waits, and any thread may call it, with or without a running event loop.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from ipaddress import ip_address, ip_interface, ip_network
from typing import Literal, Self, TypeAlias

from gostnet.core.errors import KernelError
from gostnet.core.resources import Address, Bridge, Link, Port, Route, Rule

from . import netns
from .errors import kernel_error
from .netlink_attributes import attributes_of

_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWRULE, _DELRULE, _GETRULE = 32, 33, 34
_REQUEST, _ACK, _DUMP, _INTERRUPTED = 0x1, 0x4, 0x300, 0x10
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_ATTEMPTS = 20

_FAMILIES = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}
_VERSIONS: dict[int, Literal[4, 6]] = {socket.AF_INET: 4, socket.AF_INET6: 6}

# struct rtmsg: family, destination and source length, TOS, table, protocol, scope, type, flags
# struct fib_rule_hdr: family, destination and source length, TOS, table, two reserved, action, flags
_RTMSG = struct.Struct("=BBBBBBBBI")
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_CACHEINFO, _RTA_TABLE, _RTA_PREF = 1, 4, 5, 6, 12, 15, 20
_RTA_KNOWN = {_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_CACHEINFO, _RTA_TABLE, _RTA_PREF}
RouteType: TypeAlias = Literal["unicast", "local", "blackhole", "unreachable", "prohibit", "throw", "other"]
_TYPES: dict[RouteType, int] = {
    "unicast": 1,
    "local": 2,
    "blackhole": 6,
    "unreachable": 7,
    "prohibit": 8,
    "throw": 9,
}
_TYPE_NAMES = {number: name for name, number in _TYPES.items()}
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_HOST = 0, 253, 254
_TABLE_IN_ATTRIBUTE = 252
_IPV6_DEFAULT_METRIC = 1024
_CLONED = 0x200
_ROUTE_STATES = 0x1 | 0x2 | 0x8 | 0x10 | 0x4000  # dead, pervasive, offload, linkdown, trap: not to be set

_FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK, _FRA_SUPPRESS, _FRA_TABLE = 3, 6, 10, 14, 15
_FRA_FWMASK, _FRA_PAD, _FRA_PROTOCOL = 16, 18, 21
_FRA_KNOWN = {
    _FRA_IIFNAME,
    _FRA_PRIORITY,
    _FRA_FWMARK,
    _FRA_SUPPRESS,
    _FRA_TABLE,
    _FRA_FWMASK,
    _FRA_PAD,
    _FRA_PROTOCOL,
}
_TO_TABLE = 1
_INVERTED = 0x2
_NO_SUPPRESSION = 0xFFFFFFFF

_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, which flags to change
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_IFLA_INFO_KIND = 1
_IFF_UP = 1
_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_NO_DAD = 0x02

Attributes: TypeAlias = dict[int, bytes]


class RouteSocket:
    """An rtnetlink socket in one network namespace. A context manager."""

    __slots__ = ("_sequence", "_socket")

    def __init__(self, place: netns.Place = None) -> None:
        """Open a socket in a namespace, by default the thread's. Raise KernelError."""
        self._socket = netns.socket_in(place, socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _request(self, operation: str, kind: int, body: bytes, flags: int = 0) -> None:
        self._send(operation, kind, body, _REQUEST | _ACK | flags)
        for number, message, _ in self._replies(operation):
            if number == _ERROR:
                refused = -int(struct.unpack_from("=i", message)[0])
                if refused:
                    raise kernel_error(operation, refused)
                return

    def _dump(self, operation: str, kind: int, body: bytes) -> list[bytes]:
        """Return the answers without their headers. A dump that a change interrupted is asked for again."""
        for _ in range(_ATTEMPTS):
            self._send(operation, kind, body, _REQUEST | _DUMP)
            found, interrupted = [], False
            for number, message, flags in self._replies(operation):
                interrupted |= bool(flags & _INTERRUPTED)
                if number == _ERROR:
                    raise kernel_error(operation, -int(struct.unpack_from("=i", message)[0]))
                if number == _DONE:
                    break
                found.append(message)
            if not interrupted:
                return found
        raise KernelError(operation, errno.EAGAIN, "the state keeps changing")

    def _send(self, operation: str, kind: int, body: bytes, flags: int) -> None:
        self._sequence += 1
        try:
            self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body)
        except OSError as exc:
            raise kernel_error(operation, exc.errno or errno.EIO) from exc

    def _replies(self, operation: str) -> Iterator[tuple[int, bytes, int]]:
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except OSError as exc:
                raise kernel_error(operation, exc.errno or errno.EIO) from exc
            position = 0
            while position + _HEADER.size <= len(data):
                size, kind, flags, sequence, _ = _HEADER.unpack_from(data, position)
                if size < _HEADER.size:
                    break
                if sequence == self._sequence:
                    yield kind, data[position + _HEADER.size : position + size], flags
                position += (size + 3) & ~3


class RouteNetlink(RouteSocket):
    """Rules, routes, links and addresses, as resources."""

    __slots__ = ()

    # -- rules --
    def rules(self) -> list[Rule]:
        """Return the rules that are no more than a `Rule` can say, of both IP versions."""
        found = []
        for version in (4, 6):
            for body in self._dump("ip rule show", _GETRULE, struct.pack("=B11x", _FAMILIES[version])):
                rule = _rule_of(body)
                if rule is not None and rule.version == version:
                    found.append(rule)
        return found

    def put_rule(self, rule: Rule) -> None:
        """Add a rule. Raise KernelError."""
        operation = f"{ip(rule.version)} rule add {rule_words(rule)}"
        self._request(operation, _NEWRULE, _rule_message(rule), _CREATE | _EXCLUSIVE)

    def drop_rule(self, rule: Rule) -> None:
        """Remove the rule that is exactly this one. Raise KernelError (ENOENT) if there is none."""
        self._request(f"{ip(rule.version)} rule del {rule_words(rule)}", _DELRULE, _rule_message(rule))

    # -- routes --
    def routes(self, version: int, table: int = 0) -> list[Route]:
        """Return the routes of an IP version, of one table or (0) of all."""
        names = self._names()
        found = []
        for body in self._dump("ip route show", _GETROUTE, struct.pack("=B11x", _FAMILIES[version])):
            route = _route_of(body, names)
            # Without IPv6 in the kernel, IPv4's routes come for an answer.
            if route is not None and route.version == version and table in (0, route.table):
                found.append(route)
        return found

    def put_route(self, route: Route, *, replace: bool = False) -> None:
        """Add a route; with `replace`, in place of the one with the same key. Raise KernelError."""
        operation = f"{ip(route.version)} route {'replace' if replace else 'add'} {route_words(route)}"
        flags = _CREATE | (_REPLACE if replace else _EXCLUSIVE)
        self._request(operation, _NEWROUTE, route.raw or self._route_message(route, operation), flags)

    def drop_route(self, route: Route) -> None:
        """Remove a route. Raise KernelError (ESRCH) if there is none like it."""
        operation = f"{ip(route.version)} route del {route_words(route)}"
        self._request(operation, _DELROUTE, route.raw or self._route_message(route, operation))

    def _route_message(self, route: Route, operation: str) -> bytes:
        if route.type == "other":
            raise KernelError(operation, errno.EINVAL, "is of a type that has no name here")
        network = ip_network(route.destination)
        scope = _SCOPE_UNIVERSE
        if network.version == 4 and route.type == "local":
            scope = _SCOPE_HOST
        elif network.version == 4 and route.type == "unicast" and not route.gateway:
            scope = _SCOPE_LINK
        table = route.table if route.table < 256 else _TABLE_IN_ATTRIBUTE
        head = (_FAMILIES[network.version], network.prefixlen, 0, 0, table)
        body = _RTMSG.pack(*head, route.protocol, scope, _TYPES[route.type], 0) + _u32(_RTA_TABLE, route.table)
        if network.prefixlen:
            body += _attribute(_RTA_DST, network.network_address.packed)
        if route.gateway:
            body += _attribute(_RTA_GATEWAY, ip_address(route.gateway).packed)
        if route.device:
            body += _u32(_RTA_OIF, self._index(route.device, operation))
        if route.metric:
            body += _u32(_RTA_PRIORITY, route.metric)
        return body

    # -- addresses --
    def addresses(self, device: str) -> list[Address]:
        """Return the addresses of a device, [] if there is no such device."""
        indexes = [index for index, name in self._names().items() if name == device]
        found = []
        for body in self._dump("ip address show", _GETADDR, bytes(8)):
            _, length, _, _, index = _IFADDRMSG.unpack_from(body)
            of = dict(attributes_of(body, _IFADDRMSG.size))
            packed = of.get(_IFA_LOCAL) or of.get(_IFA_ADDRESS)
            if index in indexes and packed is not None:
                found.append(Address(device, f"{ip_address(packed)}/{length}"))
        return found

    def put_address(self, address: Address) -> None:
        """Add an address. Raise KernelError."""
        operation = f"ip address add {address.address} dev {address.device}"
        self._request(operation, _NEWADDR, self._address_message(address, operation), _CREATE | _EXCLUSIVE)

    def drop_address(self, address: Address) -> None:
        """Remove an address. Raise KernelError."""
        operation = f"ip address del {address.address} dev {address.device}"
        self._request(operation, _DELADDR, self._address_message(address, operation))

    def _address_message(self, address: Address, operation: str) -> bytes:
        interface = ip_interface(address.address)
        index = self._index(address.device, operation)
        body = _IFADDRMSG.pack(_FAMILIES[interface.version], interface.network.prefixlen, 0, 0, index)
        body += _attribute(_IFA_LOCAL, interface.ip.packed) + _attribute(_IFA_ADDRESS, interface.ip.packed)
        return body + (_u32(_IFA_FLAGS, _NO_DAD) if interface.version == 6 else b"")

    # -- links --
    def link(self, name: str) -> Link | None:
        """Return the settings of a device, None if there is none."""
        for body in self._dump("ip link show", _GETLINK, bytes(_IFINFOMSG.size)):
            of = dict(attributes_of(body, _IFINFOMSG.size))
            if _name(of) == name:
                flags = _IFINFOMSG.unpack_from(body)[3]
                return Link(name, _number(of[_IFLA_MTU]), bool(flags & _IFF_UP))
        return None

    def put_link(self, link: Link) -> None:
        """Change a device's settings. Raise KernelError, ENODEV if there is none."""
        operation = f"ip link set {link_words(link)}"
        index = self._index(link.name, operation)
        body = _IFINFOMSG.pack(0, 0, index, _IFF_UP if link.up else 0, _IFF_UP) + _u32(_IFLA_MTU, link.mtu)
        self._request(operation, _NEWLINK, body)

    # -- bridges --
    def bridge(self, name: str) -> Bridge | None:
        """Return a bridge, None if there is none. Raise KernelError for a device of another kind with its name."""
        for of in self._links().values():
            if _name(of) == name:
                if dict(attributes_of(of.get(_IFLA_LINKINFO, b""), 0)).get(_IFLA_INFO_KIND, b"")[:7] != b"bridge\0":
                    raise KernelError(f"use bridge {name}", errno.EEXIST, "the interface of this name is no bridge")
                return Bridge(name)
        return None

    def put_bridge(self, bridge: Bridge) -> None:
        """Make a bridge, and put it up. Raise KernelError."""
        # With an address of its own (locally administered) it does not take that of a port, which may go.
        address = bytes([0x02]) + os.urandom(5)
        body = _IFINFOMSG.pack(0, 0, 0, _IFF_UP, _IFF_UP)
        body += _attribute(_IFLA_IFNAME, bridge.name.encode() + b"\0") + _attribute(_IFLA_ADDRESS, address)
        body += _attribute(_IFLA_LINKINFO, _attribute(_IFLA_INFO_KIND, b"bridge\0"))
        self._request(f"ip link add {bridge_words(bridge)}", _NEWLINK, body, _CREATE | _EXCLUSIVE)

    def drop_bridge(self, bridge: Bridge) -> None:
        """Remove a bridge. Raise KernelError, EBUSY as long as it has ports."""
        operation = f"ip link del {bridge_words(bridge)}"
        index = self._index(bridge.name, operation)
        ports = [_name(of) for of in self._links().values() if _master(of) == index]
        if ports:
            raise KernelError(operation, errno.EBUSY, f"it has ports that are not ours: {', '.join(ports)}")
        self._request(operation, _DELLINK, _IFINFOMSG.pack(0, 0, index, 0, 0))

    def port(self, device: str) -> Port | None:
        """Return what a device is a port of, None if there is no such device."""
        links = self._links()
        for of in links.values():
            if _name(of) == device:
                return Port(device, _name(links.get(_master(of), {})))
        return None

    def put_port(self, port: Port) -> None:
        """Make a device a port of a bridge, or take it out. Raise KernelError."""
        operation = f"ip link set {port_words(port)}"
        master = self._index(port.bridge, operation) if port.bridge else 0
        body = _IFINFOMSG.pack(0, 0, self._index(port.device, operation), 0, 0) + _u32(_IFLA_MASTER, master)
        self._request(operation, _NEWLINK, body)

    def _links(self) -> dict[int, Attributes]:
        bodies = self._dump("ip link show", _GETLINK, bytes(_IFINFOMSG.size))
        return {_IFINFOMSG.unpack_from(body)[2]: dict(attributes_of(body, _IFINFOMSG.size)) for body in bodies}

    def _names(self) -> dict[int, str]:
        return {index: _name(of) for index, of in self._links().items()}

    def _index(self, name: str, operation: str) -> int:
        for index, candidate in self._names().items():
            if candidate == name:
                return index
        raise KernelError(operation, errno.ENODEV, f"there is no interface {name!r}")


# ---- words --------------------------------------------------------------------------------------
def ip(version: int) -> str:
    """Return the command that shows and changes objects of an IP version."""
    return "ip" if version == 4 else "ip -6"


def rule_words(rule: Rule) -> str:
    """Return a rule as ip(8) takes it after `ip rule add`."""
    words = [f"pref {rule.priority}"]
    if rule.mask:
        words.append(f"fwmark {rule.mark:#x}/{rule.mask:#x}")
    if rule.iif:
        words.append(f"iif {rule.iif}")
    words.append(f"lookup {rule.table}")
    if rule.suppress >= 0:
        words.append(f"suppress_prefixlength {rule.suppress}")
    words.append(f"protocol {rule.protocol}")
    return " ".join(words)


def route_words(route: Route) -> str:
    """Return a route as ip(8) takes it after `ip route add`."""
    words = [route.destination] if route.type == "unicast" else [route.type, route.destination]
    words += ["via", route.gateway] if route.gateway else []
    words += ["dev", route.device] if route.device else []
    words += ["table", str(route.table), "proto", str(route.protocol)]
    words += ["metric", str(route.metric)] if route.metric else []
    return " ".join(words)


def link_words(link: Link) -> str:
    """Return a device's settings as ip(8) takes them after `ip link set`."""
    return f"dev {link.name} mtu {link.mtu} {'up' if link.up else 'down'}"


def bridge_words(bridge: Bridge) -> str:
    """Return a bridge as ip(8) takes it after `ip link add`."""
    return f"{bridge.name} type bridge"


def port_words(port: Port) -> str:
    """Return a port as ip(8) takes it after `ip link set`."""
    return f"dev {port.device} master {port.bridge}" if port.bridge else f"dev {port.device} nomaster"


# ---- messages -----------------------------------------------------------------------------------
def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _u32(kind: int, number: int) -> bytes:
    return struct.pack("=HHI", 8, kind, number)


def _number(payload: bytes) -> int:
    return int(struct.unpack("=I", payload)[0])


def _name(of: Attributes) -> str:
    return of.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="surrogateescape")


def _master(of: Attributes) -> int:
    return _number(of[_IFLA_MASTER]) if _IFLA_MASTER in of else 0


def _rule_message(rule: Rule) -> bytes:
    table = rule.table if rule.table < 256 else _TABLE_IN_ATTRIBUTE
    body = _RTMSG.pack(_FAMILIES[rule.version], 0, 0, 0, table, 0, 0, _TO_TABLE, 0)
    body += _u32(_FRA_PRIORITY, rule.priority) + _u32(_FRA_TABLE, rule.table)
    body += _attribute(_FRA_PROTOCOL, bytes([rule.protocol]))
    if rule.mask:
        body += _u32(_FRA_FWMARK, rule.mark) + _u32(_FRA_FWMASK, rule.mask)
    if rule.iif:
        body += _attribute(_FRA_IIFNAME, rule.iif.encode(errors="surrogateescape") + b"\0")
    if rule.suppress >= 0:
        body += _u32(_FRA_SUPPRESS, rule.suppress)
    return body


def _rule_of(body: bytes) -> Rule | None:
    """Return the rule, None if it has more to it than a `Rule` can say."""
    family, to, source, tos, table, _, _, action, flags = _RTMSG.unpack_from(body)
    of = dict(attributes_of(body, _RTMSG.size))
    numbers = {kind: _number(value) for kind, value in of.items() if len(value) == 4}
    plain = (
        family in _VERSIONS
        and action == _TO_TABLE
        and not (to or source or tos or flags & _INVERTED)
        and set(of) <= _FRA_KNOWN
    )
    suppress = numbers.get(_FRA_SUPPRESS, _NO_SUPPRESSION)
    if not plain:
        return None
    return Rule(
        _VERSIONS[family],
        numbers.get(_FRA_PRIORITY, 0),
        numbers.get(_FRA_TABLE, table),
        numbers.get(_FRA_FWMARK, 0),
        numbers.get(_FRA_FWMASK, 0),
        of.get(_FRA_IIFNAME, b"").rstrip(b"\0").decode(errors="surrogateescape"),
        of.get(_FRA_PROTOCOL, b"\0")[0],
        -1 if suppress == _NO_SUPPRESSION else suppress,
    )


def _route_of(body: bytes, names: Mapping[int, str]) -> Route | None:
    """Return the route, None for the kernel's own notes about destinations and for what is no IP route."""
    family, length, source, tos, table, protocol, _, kind, flags = _RTMSG.unpack_from(body)
    if family not in _VERSIONS or flags & _CLONED:
        return None
    of = dict(attributes_of(body, _RTMSG.size))
    v6 = family == socket.AF_INET6
    destination = ip_address(of.get(_RTA_DST, bytes(16 if v6 else 4)))
    metric = _number(of[_RTA_PRIORITY]) if _RTA_PRIORITY in of else 0
    more = set(of) - _RTA_KNOWN or source or tos
    return Route(
        f"{destination}/{length}",
        _number(of[_RTA_TABLE]) if _RTA_TABLE in of else table,
        "other" if more else _TYPE_NAMES.get(kind, "other"),
        names.get(_number(of[_RTA_OIF]), "") if _RTA_OIF in of else "",
        str(ip_address(of[_RTA_GATEWAY])) if _RTA_GATEWAY in of else "",
        0 if v6 and metric == _IPV6_DEFAULT_METRIC else metric,
        protocol,
        _restorable(body),
    )


def _restorable(body: bytes) -> bytes:
    """Return a listed route as a request that makes it again: without states and the kernel's cache information."""
    *head, flags = _RTMSG.unpack_from(body)
    kept = [_RTMSG.pack(*head, flags & ~(_ROUTE_STATES | _CLONED))]
    kept += [_attribute(kind, payload) for kind, payload in attributes_of(body, _RTMSG.size) if kind != _RTA_CACHEINFO]
    return b"".join(kept)
