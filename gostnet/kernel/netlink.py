"""Routes, rules, addresses and link settings of one network namespace: observed, put and dropped.

pyroute2 frames and parses the messages; the socket is our own, so that this works in any thread, with or without a
running event loop. The kernel answers a change while it takes the request, so nothing here waits.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_interface, ip_network
from typing import Any, Literal

from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from gostnet.core.errors import KernelError
from gostnet.core.resources import Address, Link, Route, Rule

from . import netns
from .errors import kernel_error

_NEWLINK, _GETLINK = 16, 18
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWRULE, _DELRULE, _GETRULE = 32, 33, 34
_REQUEST, _ACK, _DUMP, _INTERRUPTED = 0x1, 0x4, 0x300, 0x10
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_ATTEMPTS = 20

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_TYPES = {"unicast": 1, "local": 2, "blackhole": 6, "unreachable": 7, "prohibit": 8, "throw": 9}
_TYPE_NAMES = {number: name for name, number in _TYPES.items()}
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_HOST = 0, 253, 254
_TO_TABLE = 1
_IPV6_DEFAULT_METRIC = 1024
_CLONED = 0x200
_ROUTE_STATES = 0x1 | 0x2 | 0x8 | 0x10 | 0x4000  # dead, pervasive, offload, linkdown, trap: not to be set
_IFF_UP = 1
_NO_DAD = 0x02

_RULE_ATTRIBUTES = {
    "FRA_PRIORITY",
    "FRA_TABLE",
    "FRA_FWMARK",
    "FRA_FWMASK",
    "FRA_IIFNAME",
    "FRA_PROTOCOL",
    "FRA_SUPPRESS_PREFIXLEN",
    "FRA_PAD",
}
_ROUTE_ATTRIBUTES = {
    "RTA_DST",
    "RTA_TABLE",
    "RTA_OIF",
    "RTA_GATEWAY",
    "RTA_PRIORITY",
    "RTA_CACHEINFO",
    "RTA_PREF",
}
_NO_SUPPRESSION = 0xFFFFFFFF


class RouteNetlink:
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

    def __enter__(self) -> RouteNetlink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- rules --
    def rules(self) -> list[Rule]:
        """Return the rules that are no more than a `Rule` can say, of both IP versions."""
        found = []
        for version in (4, 6):
            for message in self._dump("ip rule show", _GETRULE, fibmsg, struct.pack("=B11x", _FAMILIES[version])):
                rule = _rule_of(message)
                if rule is not None and rule.version == version:
                    found.append(rule)
        return found

    def put_rule(self, rule: Rule) -> None:
        """Add a rule. Raise KernelError."""
        operation = f"{ip(rule.version)} rule add {rule_words(rule)}"
        self._change(operation, _NEWRULE, _rule_message(rule), _CREATE | _EXCLUSIVE)

    def drop_rule(self, rule: Rule) -> None:
        """Remove the rule that is exactly this one. Raise KernelError (ENOENT) if there is none."""
        self._change(f"{ip(rule.version)} rule del {rule_words(rule)}", _DELRULE, _rule_message(rule))

    # -- routes --
    def routes(self, version: int, table: int = 0) -> list[Route]:
        """Return the routes of an IP version, of one table or (0) of all."""
        names = self._names()
        found = []
        body = struct.pack("=B11x", _FAMILIES[version])
        for message in self._dump("ip route show", _GETROUTE, rtmsg, body):
            if message["flags"] & _CLONED or message["family"] != _FAMILIES[version]:
                continue  # the kernel's own notes about destinations; without IPv6, IPv4's answer
            route = _route_of(message, names)
            if table in (0, route.table):
                found.append(route)
        return found

    def put_route(self, route: Route, *, replace: bool = False) -> None:
        """Add a route; with `replace`, in place of the one with the same key. Raise KernelError."""
        operation = f"{ip(route.version)} route {'replace' if replace else 'add'} {route_words(route)}"
        flags = _CREATE | (_REPLACE if replace else _EXCLUSIVE)
        if route.raw:
            self._request(operation, _NEWROUTE, route.raw, flags)
        else:
            self._change(operation, _NEWROUTE, self._route_message(route, operation), flags)

    def drop_route(self, route: Route) -> None:
        """Remove a route. Raise KernelError (ESRCH) if there is none like it."""
        operation = f"{ip(route.version)} route del {route_words(route)}"
        if route.raw:
            self._request(operation, _DELROUTE, route.raw, 0)
        else:
            self._change(operation, _DELROUTE, self._route_message(route, operation))

    def _route_message(self, route: Route, operation: str) -> Any:
        network = ip_network(route.destination)
        message = rtmsg()
        message["family"], message["dst_len"] = _FAMILIES[network.version], network.prefixlen
        message["table"] = route.table if route.table < 256 else 252
        if route.type == "other":
            raise KernelError(operation, errno.EINVAL, "is of a type that has no name here")
        message["proto"], message["type"] = route.protocol, _TYPES[route.type]
        message["scope"] = _SCOPE_UNIVERSE
        if network.version == 4 and route.type == "local":
            message["scope"] = _SCOPE_HOST
        elif network.version == 4 and route.type == "unicast" and not route.gateway:
            message["scope"] = _SCOPE_LINK
        attributes: list[tuple[str, Any]] = [("RTA_TABLE", route.table)]
        if network.prefixlen:
            attributes.append(("RTA_DST", str(network.network_address)))
        if route.gateway:
            attributes.append(("RTA_GATEWAY", route.gateway))
        if route.device:
            attributes.append(("RTA_OIF", self._index(route.device, operation)))
        if route.metric:
            attributes.append(("RTA_PRIORITY", route.metric))
        message["attrs"] = attributes
        return message

    # -- addresses --
    def addresses(self, device: str) -> list[Address]:
        """Return the addresses of a device, [] if there is no such device."""
        indexes = [index for index, name in self._names().items() if name == device]
        found = []
        for message in self._dump("ip address show", _GETADDR, ifaddrmsg, bytes(8)):
            if message["index"] in indexes:
                text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
                found.append(Address(device, f"{text}/{message['prefixlen']}"))
        return found

    def put_address(self, address: Address) -> None:
        """Add an address. Raise KernelError."""
        operation = f"ip address add {address.address} dev {address.device}"
        self._change(operation, _NEWADDR, self._address_message(address, operation), _CREATE | _EXCLUSIVE)

    def drop_address(self, address: Address) -> None:
        """Remove an address. Raise KernelError."""
        operation = f"ip address del {address.address} dev {address.device}"
        self._change(operation, _DELADDR, self._address_message(address, operation))

    def _address_message(self, address: Address, operation: str) -> Any:
        interface = ip_interface(address.address)
        message = ifaddrmsg()
        message["family"], message["prefixlen"] = _FAMILIES[interface.version], interface.network.prefixlen
        message["index"] = self._index(address.device, operation)
        attributes: list[tuple[str, Any]] = [("IFA_ADDRESS", str(interface.ip)), ("IFA_LOCAL", str(interface.ip))]
        if interface.version == 6:
            attributes.append(("IFA_FLAGS", _NO_DAD))
        message["attrs"] = attributes
        return message

    # -- links --
    def link(self, name: str) -> Link | None:
        """Return the settings of a device, None if there is none."""
        for message in self._dump("ip link show", _GETLINK, ifinfmsg, bytes(16)):
            if message.get_attr("IFLA_IFNAME") == name:
                return Link(name, message.get_attr("IFLA_MTU"), bool(message["flags"] & _IFF_UP))
        return None

    def put_link(self, link: Link) -> None:
        """Change a device's settings. Raise KernelError, ENODEV if there is none."""
        operation = f"ip link set {link_words(link)}"
        message = ifinfmsg()
        message["index"] = self._index(link.name, operation)
        message["flags"], message["change"] = (_IFF_UP if link.up else 0), _IFF_UP
        message["attrs"] = [("IFLA_MTU", link.mtu)]
        self._change(operation, _NEWLINK, message)

    def _names(self) -> dict[int, str]:
        messages = self._dump("ip link show", _GETLINK, ifinfmsg, bytes(16))
        return {message["index"]: message.get_attr("IFLA_IFNAME") for message in messages}

    def _index(self, name: str, operation: str) -> int:
        for index, candidate in self._names().items():
            if candidate == name:
                return index
        raise KernelError(operation, errno.ENODEV, f"there is no interface {name!r}")

    # -- the socket --
    def _change(self, operation: str, kind: int, message: Any, flags: int = 0) -> None:
        message.encode()
        self._request(operation, kind, bytes(message.data)[_HEADER.size :], flags)

    def _request(self, operation: str, kind: int, body: bytes, flags: int) -> None:
        self._send(operation, kind, body, _REQUEST | _ACK | flags)
        for number, message, _ in self._replies(operation):
            if number == _ERROR:
                refused = -int(struct.unpack_from("=i", message, _HEADER.size)[0])
                if refused:
                    raise kernel_error(operation, refused)
                return

    def _dump(self, operation: str, kind: int, form: type[Any], body: bytes) -> list[Any]:
        """Return the parsed answers. A dump that a change interrupted is asked for again."""
        for _ in range(_ATTEMPTS):
            self._send(operation, kind, body, _REQUEST | _DUMP)
            raw, interrupted = [], False
            for number, message, flags in self._replies(operation):
                interrupted |= bool(flags & _INTERRUPTED)
                if number == _ERROR:
                    raise kernel_error(operation, -int(struct.unpack_from("=i", message, _HEADER.size)[0]))
                if number == _DONE:
                    break
                raw.append(message)
            if not interrupted:
                parsed = [form(message) for message in raw]
                for message in parsed:
                    message.decode()
                return parsed
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
                if sequence == self._sequence:
                    yield kind, data[position : position + size], flags
                position += (size + 3) & ~3


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
    words.append(f"lookup {rule.table} protocol {rule.protocol}")
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


# ---- messages -----------------------------------------------------------------------------------
def _rule_message(rule: Rule) -> Any:
    message = fibmsg()
    message["family"], message["action"] = _FAMILIES[rule.version], _TO_TABLE
    message["table"] = rule.table if rule.table < 256 else 252
    attributes: list[tuple[str, Any]] = [
        ("FRA_PRIORITY", rule.priority),
        ("FRA_TABLE", rule.table),
        ("FRA_PROTOCOL", rule.protocol),
    ]
    if rule.mask:
        attributes += [("FRA_FWMARK", rule.mark), ("FRA_FWMASK", rule.mask)]
    if rule.iif:
        attributes.append(("FRA_IIFNAME", rule.iif))
    message["attrs"] = attributes
    return message


def _rule_of(message: Any) -> Rule | None:
    """Return the rule, None if it has more to it than a `Rule` can say."""
    of = dict(message["attrs"])
    versions: dict[int, Literal[4, 6]] = {socket.AF_INET: 4, socket.AF_INET6: 6}
    plain = (
        message["family"] in versions
        and message["action"] == _TO_TABLE
        and not (message["src_len"] or message["dst_len"] or message["tos"])
        and not message["flags"] & 0x2  # inverted
        and set(of) <= _RULE_ATTRIBUTES
        and of.get("FRA_SUPPRESS_PREFIXLEN", _NO_SUPPRESSION) == _NO_SUPPRESSION
    )
    if not plain:
        return None
    return Rule(
        versions[message["family"]],
        of.get("FRA_PRIORITY", 0),
        of.get("FRA_TABLE", message["table"]),
        of.get("FRA_FWMARK", 0),
        of.get("FRA_FWMASK", 0),
        of.get("FRA_IIFNAME", ""),
        of.get("FRA_PROTOCOL", 0),
    )


def _route_of(message: Any, names: dict[int, str]) -> Route:
    of = dict(message["attrs"])
    v6 = message["family"] == socket.AF_INET6
    network = f"{of.get('RTA_DST', '::' if v6 else '0.0.0.0')}/{message['dst_len']}"
    metric = of.get("RTA_PRIORITY", 0)
    more = set(of) - _ROUTE_ATTRIBUTES or message["src_len"] or message["tos"]
    kind: Any = "other" if more else _TYPE_NAMES.get(message["type"], "other")
    return Route(
        network,
        of.get("RTA_TABLE", message["table"]),
        kind,
        names.get(of.get("RTA_OIF", 0), ""),
        of.get("RTA_GATEWAY", ""),
        0 if v6 and metric == _IPV6_DEFAULT_METRIC else metric,
        message["proto"],
        _restorable(bytes(message.data)[_HEADER.size :]),
    )


def _restorable(body: bytes) -> bytes:
    """Return a listed route as a request that makes it again: without states and the kernel's cache information."""
    flags = struct.unpack_from("=I", body, 8)[0] & ~(_ROUTE_STATES | _CLONED)
    kept = [body[:8], struct.pack("=I", flags)]
    position = 12
    while position + 4 <= len(body):
        size, kind = struct.unpack_from("=HH", body, position)
        if size < 4:
            break
        if kind & 0x3FFF != 12:  # RTA_CACHEINFO
            kept.append(body[position : position + size] + bytes(-size % 4))
        position += (size + 3) & ~3
    return b"".join(kept)
