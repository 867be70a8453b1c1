"""Networks of namespaces, declared as data: hosts, the links between them, addresses, routes and sysctls.

A `Topology` says what there is; a `Network` builds it in the kernel and takes it away again. Names are
`gn-<pid>-<role>` unless given, so that several test runs share a machine and what a killed run left behind is
recognised by its dead pid. Addresses are usable at once: duplicate address detection is off.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from ipaddress import ip_interface, ip_network
from pathlib import Path
from types import TracebackType

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from gostnet.core.errors import KernelError
from gostnet.kernel import netns

from .netlink import CREATE, ROUTE, Netlink, interfaces

_NEWLINK, _NEWADDR, _NEWROUTE = 16, 20, 24
_UP = 1
_NO_DAD = 0x02
_MAIN_TABLE, _STATIC, _UNIVERSE, _LINK, _UNICAST = 254, 4, 0, 253, 1
_FIRST_INDEX = 100
"""The two ends of a pair need different indexes: the kernel looks at the carrier of a device at once if its index
differs from its peer's, else up to a second later, because it takes the device for one that has no peer."""

_CARRIER_TIMEOUT = 5.0
"""Seconds; it takes milliseconds unless the machine is overloaded."""

_OF_A_RUN = re.compile(r"gn-(\d+)-.+")


@dataclass(frozen=True, slots=True)
class Route:
    """A route of a host: to a network or `default`, `via` a neighbour's address or straight out of `interface`.

    `default` with an IPv6 `via` is the default of IPv6.
    """

    to: str
    via: str = ""
    interface: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace. `loopback` addresses (with prefix length) sit on `lo`; `sysctls` are set last."""

    role: str
    forwarding: bool = False
    routes: tuple[Route, ...] = ()
    loopback: tuple[str, ...] = ()
    sysctls: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class End:
    """One end of a link: the host, the name of the interface there, and its addresses with prefix length."""

    host: str
    interface: str
    addresses: tuple[str, ...] = ()
    mtu: int = 1500


@dataclass(frozen=True, slots=True)
class Link:
    """A cable between two hosts (a veth pair)."""

    left: End
    right: End


@dataclass(frozen=True, slots=True)
class Topology:
    """Hosts and the links between them."""

    hosts: tuple[Host, ...]
    links: tuple[Link, ...] = ()

    def host(self, role: str) -> Host:
        """Return the host with this role. Raise KeyError."""
        for host in self.hosts:
            if host.role == role:
                return host
        raise KeyError(role)

    def addresses(self, role: str, interface: str = "", version: int = 0) -> list[str]:
        """Return the host's addresses without prefix length, of one interface and IP version if given."""
        self.host(role)
        ends = [end for link in self.links for end in (link.left, link.right) if end.host == role]
        found = [ip_interface(a) for end in ends if interface in ("", end.interface) for a in end.addresses]
        return [str(a.ip) for a in found if version in (0, a.version)]


def row(*roles: str, prefix4: str = "10.99", prefix6: str = "fd99") -> Topology:
    """Declare hosts in a row, all but the first and the last forwarding, every one reachable from every other.

    Link n, counted from 1, is `prefix4.n.0/24` and `prefix6:n::/64`; its left host has 1, its right host 2. The
    interface towards the left is `lan0`, towards the right `wan0`. The ends have default routes, hosts in between
    a route to each network that they do not touch.
    """
    links = []
    for number, (left, right) in enumerate(itertools.pairwise(roles), 1):
        ends = [
            End(role, interface, (f"{prefix4}.{number}.{last}/24", f"{prefix6}:{number:x}::{last}/64"))
            for role, interface, last in ((left, "wan0", 1), (right, "lan0", 2))
        ]
        links.append(Link(*ends))
    hosts = []
    for place, role in enumerate(roles):
        first, last = place == 0, place == len(roles) - 1
        routes: list[Route] = []
        for number in range(1, len(roles)):
            neighbour, of = (place, 1) if number < place else (place + 1, 2)
            vias = (f"{prefix4}.{neighbour}.{of}", f"{prefix6}:{neighbour:x}::{of}")
            if number in (place, place + 1):
                continue
            if not first and not last:
                routes += [
                    Route(f"{prefix4}.{number}.0/24", vias[0]),
                    Route(f"{prefix6}:{number:x}::/64", vias[1]),
                ]
        if first and not last:
            routes += [Route("default", f"{prefix4}.1.2"), Route("default", f"{prefix6}:1::2")]
        elif last and not first:
            routes += [Route("default", f"{prefix4}.{place}.1"), Route("default", f"{prefix6}:{place:x}::1")]
        hosts.append(Host(role, forwarding=not first and not last, routes=tuple(routes)))
    return Topology(tuple(hosts), tuple(links))


def own_name(role: str) -> str:
    """Return the name that this process gives to the namespace of `role`."""
    return f"gn-{os.getpid()}-{role}"


class Network:
    """A topology in the kernel, from entering the context (or `up`) to leaving it (or `down`)."""

    def __init__(self, topology: Topology, name: Callable[[str], str] = own_name) -> None:
        """`name` gives the name of the namespace of a role."""
        self.topology = topology
        self.names = {host.role: name(host.role) for host in topology.hosts}
        self._held: dict[str, netns.Namespace] = {}

    def __enter__(self) -> Network:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.down()

    def up(self) -> None:
        """Build everything, or nothing: what was built is removed again when the kernel refuses something.

        Namespaces of the same names are replaced. Raise KernelError.
        """
        self.down()
        try:
            for role, name in self.names.items():
                netns.create(name)
                self._held[role] = netns.open_namespace(name)
                _set_basics(name)
            for number, link in enumerate(self.topology.links):
                self._connect(link, _FIRST_INDEX + 2 * number)
            for link in self.topology.links:
                self._await_carrier(link)
            for host in self.topology.hosts:
                self._configure(host)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Remove the namespaces; the links go with them. Idempotent, also for what another process left."""
        for namespace in self._held.values():
            namespace.close()
        self._held.clear()
        for name in self.names.values():
            netns.delete(name, missing_ok=True)

    def __getitem__(self, role: str) -> str:
        """Return the name of the namespace of `role`."""
        return self.names[role]

    def inside(self, role: str) -> AbstractContextManager[None]:
        """Move the calling thread into the host and back; see `netns.inside`."""
        return netns.inside(self._held[role])

    def socket_in(self, role: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Make a non-blocking socket on the host."""
        return netns.socket_in(self._held[role], family, kind, protocol)

    def address(self, role: str, version: int = 4, interface: str = "") -> str:
        """Return the host's first address of an IP version. Raise LookupError if it has none."""
        found = self.topology.addresses(role, interface, version)
        if not found:
            raise LookupError(f"{role} has no address of IPv{version}")
        return found[0]

    def _connect(self, link: Link, index: int) -> None:
        left, right = link.left, link.right
        operation = f"connect {left.host} and {right.host}"
        with Netlink(ROUTE, self._held[left.host]) as netlink:
            peer = {
                "index": index + 1,
                "attrs": [
                    ("IFLA_IFNAME", right.interface),
                    ("IFLA_NET_NS_FD", self._held[right.host].fileno()),
                    ("IFLA_MTU", right.mtu),
                ],
            }
            message = ifinfmsg()
            message["index"] = index
            message["attrs"] = [
                ("IFLA_IFNAME", left.interface),
                ("IFLA_MTU", left.mtu),
                (
                    "IFLA_LINKINFO",
                    {
                        "attrs": [
                            ("IFLA_INFO_KIND", "veth"),
                            ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]}),
                        ]
                    },
                ),
            ]
            netlink.change(operation, _NEWLINK, message, CREATE)
        for end in (left, right):
            with Netlink(ROUTE, self._held[end.host]) as netlink:
                index = _index(netlink, end.interface)
                _bring_up(netlink, index, f"{operation}: {end.interface}")
                for address in end.addresses:
                    _add_address(netlink, index, address)

    def _await_carrier(self, link: Link) -> None:
        """Wait until the kernel has taken note of the carrier: it then adds link-local addresses and routes."""
        deadline = time.monotonic() + _CARRIER_TIMEOUT
        for end in (link.left, link.right):
            with Netlink(ROUTE, self._held[end.host]) as netlink:
                while end.interface not in {i.name for i in interfaces(netlink) if i.running}:
                    if time.monotonic() > deadline:
                        raise KernelError(f"{end.host}: wait for the carrier of {end.interface}", errno.ETIMEDOUT)
                    time.sleep(0.001)

    def _configure(self, host: Host) -> None:
        place = self._held[host.role]
        with Netlink(ROUTE, place) as netlink:
            loopback = _index(netlink, "lo")
            _bring_up(netlink, loopback, f"{host.role}: lo")
            for address in host.loopback:
                _add_address(netlink, loopback, address)
            for route in host.routes:
                _add_route(netlink, route)
        settings: dict[str, str | int] = {}
        if host.forwarding:
            settings = {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1}
        settings.update(host.sysctls)
        for key, value in settings.items():
            if has_ipv6() or "/ipv6/" not in key:
                write_sysctl(place, key, value)


def sweep() -> list[str]:
    """Remove the namespaces that runs of processes which are dead now left behind; return their names."""
    swept = []
    for name in netns.names():
        match = _OF_A_RUN.fullmatch(name)
        if match is not None and not _alive(int(match[1])):
            netns.delete(name, missing_ok=True)
            swept.append(name)
    return swept


def has_ipv6() -> bool:
    """Tell whether the kernel has IPv6 at all."""
    return os.path.exists("/proc/sys/net/ipv6")


def read_sysctl(place: netns.Place, key: str) -> str:
    """Return a sysctl of a namespace, such as `net/ipv4/ip_forward`. Raise KernelError."""
    with netns.inside(place):
        try:
            return _sysctl(key).read_text().strip()
        except OSError as exc:
            raise KernelError(f"read sysctl {key}", exc.errno or 0) from exc


def write_sysctl(place: netns.Place, key: str, value: str | int) -> None:
    """Set a sysctl of a namespace. Raise KernelError."""
    with netns.inside(place):
        try:
            _sysctl(key).write_text(f"{value}\n")
        except OSError as exc:
            raise KernelError(f"set sysctl {key}", exc.errno or 0) from exc


def _sysctl(key: str) -> Path:
    return Path("/proc/sys", key if "/" in key else key.replace(".", "/"))


def _set_basics(place: netns.Place) -> None:
    """Make the namespace independent of what the host has as its defaults."""
    # An IPv4 setting of the first namespace is inherited by new ones, rp_filter among them.
    settings: Iterable[tuple[str, int]] = (
        ("net/ipv4/conf/all/rp_filter", 0),
        ("net/ipv4/conf/default/rp_filter", 0),
        ("net/ipv4/ip_forward", 0),
    )
    if has_ipv6():
        settings = (
            *settings,
            ("net/ipv6/conf/all/disable_ipv6", 0),
            ("net/ipv6/conf/default/disable_ipv6", 0),
            ("net/ipv6/conf/default/accept_dad", 0),
            ("net/ipv6/conf/default/accept_ra", 0),
        )
    for key, value in settings:
        write_sysctl(place, key, value)


def _index(netlink: Netlink, interface: str) -> int:
    for candidate in interfaces(netlink):
        if candidate.name == interface:
            return candidate.index
    raise KernelError(f"find interface {interface}", errno.ENODEV)


def _bring_up(netlink: Netlink, index: int, operation: str) -> None:
    message = ifinfmsg()
    message["index"], message["flags"], message["change"] = index, _UP, _UP
    netlink.change(operation, _NEWLINK, message)


def _add_address(netlink: Netlink, index: int, text: str) -> None:
    address = ip_interface(text)
    if address.version == 6 and not has_ipv6():
        return
    message = ifaddrmsg()
    message["family"] = socket.AF_INET if address.version == 4 else socket.AF_INET6
    message["index"], message["prefixlen"] = index, address.network.prefixlen
    message["attrs"] = [("IFA_ADDRESS", str(address.ip)), ("IFA_LOCAL", str(address.ip))]
    if address.version == 6:
        message["attrs"] = [("IFA_ADDRESS", str(address.ip)), ("IFA_FLAGS", _NO_DAD)]
    netlink.change(f"add address {text}", _NEWADDR, message, CREATE)


def _add_route(netlink: Netlink, route: Route) -> None:
    if route.to == "default":
        network = ip_network("::/0" if ":" in route.via else "0.0.0.0/0")
    else:
        network = ip_network(route.to)
    if network.version == 6 and not has_ipv6():
        return
    message = rtmsg()
    message["family"] = socket.AF_INET if network.version == 4 else socket.AF_INET6
    message["dst_len"] = network.prefixlen
    message["table"], message["proto"], message["type"] = _MAIN_TABLE, _STATIC, _UNICAST
    message["scope"] = _UNIVERSE if route.via or network.version == 6 else _LINK
    attrs: list[tuple[str, object]] = []
    if network.prefixlen:
        attrs.append(("RTA_DST", str(network.network_address)))
    if route.via:
        attrs.append(("RTA_GATEWAY", route.via))
    if route.interface:
        attrs.append(("RTA_OIF", _index(netlink, route.interface)))
    message["attrs"] = attrs
    netlink.change(f"add route {route.to}", _NEWROUTE, message, CREATE)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
