"""Network devices that the kernel routes packets or frames into: what the listeners `tun` and `tap` have in common.

A device is made when the service opens; its addresses, its state and its routes are kernel resources, applied before
the service accepts. It ends with the process, and everything that hangs on it with it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import Literal

from ..core.address import ANY, Endpoint, IPAddress
from ..core.contracts import Router
from ..core.errors import ConfigError, GostnetError, KernelError
from ..core.flow import Flow
from ..core.log import Logger
from ..core.packets import IPInterface, IPNetwork, Medium, Packets, Setup, Way
from ..core.resources import Address, Link, Port, Resource, Route
from ..core.sockets import ListenOptions
from ..core.tasks import in_thread
from ..core.udp_socket import UdpSocket, listen_udp
from ..dataplane.tun_device import Backend, TunDevice, is_device_name, open_device
from ..kernel import netns
from ..kernel.netlink import RouteNetlink
from ..kernel.routeget import KernelRouter
from ..pipeline.transport import AcceptError, ListenerContext, Source

DEFAULT_MTU = 1420
"""Bytes: with IP and UDP headers around it, a packet fits into an Ethernet frame."""

_SMALLEST_MTU, _LARGEST_MTU = 68, 65535
"""Bytes: what Linux lets a device have; 68 is also the least that IPv4 asks for (RFC 791 section 3.2)."""

_SIOCSIFHWADDR, _ETHERNET = 0x8924, 1
_HARDWARE = struct.Struct("=16sH6s16x")
"""struct ifreq with a hardware address: name, type of hardware, address."""


# ---- options ------------------------------------------------------------------------------------
def setup_of(net: Iterable[str], gw: str, route: Iterable[str], routes: Iterable[str], path: str, code: str) -> Setup:
    """Return what the options of these names say of addresses and routes. Raise ConfigError below `path`.

    # GOST: what cannot be read is left out there, so that the tunnel comes up without it.
    """
    addresses: list[IPInterface] = []
    for text in net:
        try:
            addresses.append(ip_interface(text))
        except ValueError:
            wrong = f"{text[:64]!r} is not an address with prefix length such as 192.0.2.1/24"
            raise ConfigError(f"{path}.net", wrong, code=f"{code}.net") from None
    gateway = _gateway(gw, f"{path}.gw", code)
    ways = [Way(_network(text, f"{path}.route", code), gateway) for text in route]
    for text in routes:
        network, _, own = text.partition(" ")
        by = _gateway(own.strip(), f"{path}.routes", code) if own else gateway
        ways.append(Way(_network(network, f"{path}.routes", code), by))
    for way in ways:
        if way.gateway is not None and way.gateway.version != way.network.version:
            wrong = f"{way.network} cannot be reached by {way.gateway}, an address of the other IP version"
            raise ConfigError(f"{path}.routes", wrong, code=f"{code}.route")
    return Setup(tuple(addresses), tuple(ways))


def problems_of(
    name: str, mtu: int, net: Iterable[str], gw: str, route: Iterable[str], routes: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for every value of these options that no device can have."""
    if name and not is_device_name(name):
        yield "name", f"{name[:64]!r} is not the name of an interface"
    if 0 < mtu < _SMALLEST_MTU or mtu > _LARGEST_MTU:
        yield "mtu", f"{mtu} is not between {_SMALLEST_MTU} and {_LARGEST_MTU}"
    wrong = _fault(gw)
    if wrong:
        yield "gw", wrong
        gw = ""
    faults = [("net", _fault(net=[text])) for text in net]
    faults += [("route", _fault(gw, route=[text])) for text in route]
    faults += [("routes", _fault(gw, routes=[text])) for text in routes]
    yield from ((key, wrong) for key, wrong in faults if wrong)


def _fault(gw: str = "", net: Sequence[str] = (), route: Sequence[str] = (), routes: Sequence[str] = ()) -> str:
    try:
        setup_of(net, gw, route, routes, "", "device")
    except ConfigError as exc:
        return exc.reason
    return ""


def _network(text: str, path: str, code: str) -> IPNetwork:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        wrong = f"{text[:64]!r} is not a network such as 192.0.2.0/24"
        raise ConfigError(path, wrong, code=f"{code}.route") from None


def _gateway(text: str, path: str, code: str) -> IPAddress | None:
    try:
        return ip_address(text) if text else None
    except ValueError:
        raise ConfigError(path, f"{text[:64]!r} is not an address", code=f"{code}.route") from None


def addressing(device: str, setup: Setup) -> list[Resource]:
    """Return the addresses of a device, and the routes into it, as resources."""
    resources: list[Resource] = [Address(device, str(address)) for address in dict.fromkeys(setup.addresses)]
    resources += [
        Route(str(way.network), device=device, gateway=str(way.gateway) if way.gateway is not None else "")
        for way in setup.ways
    ]
    return resources


_DNS_TIMEOUT = 5.0


async def set_name_servers(device: str, servers: Sequence[str], log: Logger) -> None:
    """Tell systemd-resolved the name servers of a device, which it forgets with the device; warn if it cannot be."""
    if servers:
        problem = await in_thread(_resolvectl, device, servers)
        if problem:
            log.warn(f"the name servers of {device} are not set: {problem}")


def _resolvectl(device: str, servers: Sequence[str]) -> str:
    """Run the command and return what went wrong, "" for nothing."""
    try:
        done = subprocess.run(
            ["resolvectl", "dns", device, *servers], capture_output=True, text=True, timeout=_DNS_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    return done.stderr.strip() or f"resolvectl ended with status {done.returncode}" if done.returncode else ""


# ---- the source ---------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What a device is made as.

    name        "" lets the kernel choose
    mtu         of IP packets, bytes; 0 or less for the default
    router      chooses among peers; "kernel" is the kernel's routing by way of the device
    offload     packets come and go in runs (a virtio_net_hdr before each)
    hardware    hardware address, b"" for one of the kernel's choice, another one each time
    resources   what the kernel shall hold for a device of a name
    furnish     done with each device before it is handed out, for what is no resource
    """

    medium: Medium
    name: str
    mtu: int
    setup: Setup
    resources: Callable[[str], list[Resource]]
    hardware: bytes = b""
    router: Router | Literal["kernel"] | None = None
    offload: bool = False
    backend: Backend = "ioctl"
    furnish: Callable[[str], Awaitable[None]] | None = None


class DeviceSource(Source[Packets]):
    """A device, and for servers the UDP socket at the service's address.

    The device is handed out once. When whoever has it closes it, or somebody deletes it, it is made anew a second
    later, under the same name and with all that belongs to it.
    """

    network = "udp"
    yields = Packets

    def __init__(self, address: Endpoint, plan: DevicePlan, context: ListenerContext) -> None:
        self.address = address
        self._wanted = address
        self._plan = plan
        self._context = context
        self._mtu = plan.mtu if plan.mtu > 0 else DEFAULT_MTU
        self._name = plan.name
        self._device: TunDevice | None = None
        self._carrier: UdpSocket | None = None
        self._router: KernelRouter | None = None
        self._handed_out = False
        self._handed_before = False
        self._bare = False  # made anew, so that nobody has set it up
        self._opened = False
        self._ended = asyncio.Event()

    async def open(self) -> None:
        """Make the device and, without a target, bind the socket; `address` tells the port that was given."""
        self._opened = True
        self._bare = self._handed_before
        self._handed_out = False
        try:
            if not self._context.forwards:
                sock = listen_udp(self._wanted, ListenOptions(netns=self._context.netns))
                self.address = Endpoint.from_sockaddr(sock.getsockname())
                self._carrier = UdpSocket(sock, self.address)
            self._device = self._make()
        except BaseException:
            self.abort()
            raise

    def _make(self) -> TunDevice:
        plan = self._plan
        try:
            with netns.inside(self._context.netns or None):
                fd, self._name = open_device(self._name, plan.medium, plan.backend, vnet_header=plan.offload)
        except ConfigError as exc:
            raise ConfigError(f"{self._context.path}.metadata.name", exc.reason, hint=exc.hint, code=exc.code) from exc
        if plan.hardware:
            try:
                fcntl.ioctl(fd, _SIOCSIFHWADDR, _HARDWARE.pack(self._name.encode(), _ETHERNET, plan.hardware))
            except OSError as exc:
                os.close(fd)
                operation = f"ip link set dev {self._name} address {plan.hardware.hex(':')}"
                raise KernelError(operation, exc.errno or errno.EIO) from exc
        try:
            setup = replace(plan.setup, router=self._router_of(self._name))
        except BaseException:
            os.close(fd)
            raise
        self._ended.clear()
        device = TunDevice(
            fd, self._name, self._mtu, plan.medium, setup=setup, joins=plan.offload, on_close=self._ended.set
        )
        device.carrier = self._carrier
        return device

    def _router_of(self, name: str) -> Router | None:
        router = self._plan.router
        if router != "kernel":
            return router
        self._close_router()
        self._router = KernelRouter(self._context.netns or None, name)
        return self._router

    def _close_router(self) -> None:
        if self._router is not None:
            self._router.close()
            self._router = None

    def resources(self) -> Sequence[Resource]:
        """Return what belongs to the device; before it is open, to one of the name that it is likely to get."""
        name = self._name or f"{self._plan.medium.value}0"
        return [Link(name, self._mtu), *self._plan.resources(name)]

    async def accept(self) -> Sequence[tuple[Flow, Packets]]:
        """Return the device; after that wait until it has to be made anew. Raise AcceptError when it is gone."""
        if self._handed_out:
            await self._ended.wait()
            self._handed_out = False
            self._device = None
            if self._opened:
                raise AcceptError(f"device {self._name} has been closed")
        if not self._opened:
            await asyncio.get_running_loop().create_future()
        if self._device is None or self._bare:
            await self._make_anew()
        assert self._device is not None
        self._handed_out = self._handed_before = True
        if self._plan.furnish is not None:
            await self._plan.furnish(self._name)
        addresses = self._plan.setup.addresses
        self._context.log.info(f"name: {self._name}, net: {', '.join(map(str, addresses))}, mtu: {self._mtu}")
        client = Endpoint(str(addresses[0].ip), 0) if addresses else ANY
        return [(Flow("", client, self.address, "udp"), self._device)]

    async def _make_anew(self) -> None:
        try:
            if self._device is None:
                self._device = self._make()
            await in_thread(self._restore)
        except GostnetError as exc:
            if self._device is not None:
                self._device.abort()
                self._device = None
            raise AcceptError(str(exc)) from exc
        self._bare = False

    def _restore(self) -> None:
        """Make the kernel hold for a new device what it held for the one before; the journal knows it already."""
        with RouteNetlink(self._context.netns or None) as kernel:
            for item in sorted(self.resources(), key=lambda item: item.rank):
                match item:
                    case Link():
                        kernel.put_link(item)
                    case Port():
                        if kernel.port(item.device) != item:
                            kernel.put_port(item)
                    case Address():
                        try:
                            kernel.put_address(item)
                        except KernelError as exc:
                            if exc.errno != errno.EEXIST:
                                raise
                    case Route():
                        kernel.put_route(item, replace=True)

    async def aclose(self) -> None:
        """Close the device and the socket."""
        self.abort()

    def abort(self) -> None:
        """Close the device, which removes it, and the socket."""
        self._opened = False
        if self._device is not None:
            self._device.abort()
            self._device = None
        if self._carrier is not None:
            self._carrier.abort()
            self._carrier = None
        self._close_router()
