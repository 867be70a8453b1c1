"""The listener `tun`: a TUN device that the kernel routes packets into, handed out as one connection.

The device is made when the service opens; its addresses, its state and its routes are kernel resources, applied before
the service accepts. It ends with the process, and everything that hangs on it with it.
"""

from __future__ import annotations

import asyncio
import errno
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network

from ..core.address import ANY, Endpoint, IPAddress
from ..core.errors import ConfigError, GostnetError, KernelError, Unavailable
from ..core.flow import Flow
from ..core.options import CommaList, opt
from ..core.packets import IPInterface, IPNetwork, Packets, Setup, Way
from ..core.registry import register
from ..core.resources import Address, Link, Masquerade, Resource, Route
from ..core.sockets import ListenOptions, UdpSocket, listen_udp
from ..core.tasks import in_thread
from ..dataplane.tun_device import Backend, TunDevice, open_device
from ..kernel import netns
from ..kernel.netlink import RouteNetlink
from ..pipeline.transport import AcceptError, Listener, ListenerContext, Source

DEFAULT_MTU = 1420
"""Bytes: with IP and UDP headers around it, a packet fits into an Ethernet frame."""

_DNS_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TunOptions:
    """Options of the listener `tun` (transports 10.1)."""

    name: str = opt(
        "", "Name of the device; the kernel chooses one (tun0, tun1, ...) by default.", aliases=("tun.name",)
    )
    net: CommaList = opt([], "Addresses of the device with their prefix lengths, IPv4 and IPv6.", aliases=("tun.net",))
    mtu: int = opt(DEFAULT_MTU, "MTU of the device, bytes.", aliases=("tun.mtu",))
    peer: str = opt("", "Accepted for compatibility: GOST uses it on macOS only.", aliases=("tun.peer",))
    gw: str = opt("", "Gateway of the routes that name none.", aliases=("tun.gw",))
    route: CommaList = opt([], "Networks that are routed into the device, by way of `gw`.", aliases=("tun.route",))
    routes: CommaList = opt(
        [], "Networks that are routed into the device, each with its gateway behind a blank.", aliases=("tun.routes",)
    )
    router: str = opt("", "Name of a router whose routes choose among peers.", aliases=("tun.router",))
    dns: CommaList = opt([], "Name servers of the device, for systemd-resolved.", aliases=("tun.dns",))
    guid: str = opt("", "Accepted for compatibility: GOST uses it on Windows only.", aliases=("tun.guid",))
    masquerade: bool = opt(
        False,
        "Forward what peers send to other networks, with this host's address as its source.",
        aliases=("tun.masquerade",),
    )
    backend: str = opt(
        "ioctl",
        "What opens the device: gostnet itself, or python-pytun.",
        key="tun.backend",
        choices=("ioctl", "pytun"),
    )


def setup_of(options: TunOptions, path: str) -> Setup:
    """Return what the options say of addresses and routes. Raise ConfigError below `path`.

    # GOST: what cannot be read is left out there, so that the tunnel comes up without it.
    """
    addresses: list[IPInterface] = []
    for text in options.net:
        try:
            addresses.append(ip_interface(text))
        except ValueError:
            wrong = f"{text[:64]!r} is not an address with prefix length such as 192.0.2.1/24"
            raise ConfigError(f"{path}.net", wrong, code="tun.net") from None
    gateway = _gateway(options.gw, f"{path}.gw")
    ways = [Way(_network(text, f"{path}.route"), gateway) for text in options.route]
    for text in options.routes:
        network, _, own = text.partition(" ")
        ways.append(
            Way(_network(network, f"{path}.routes"), _gateway(own.strip(), f"{path}.routes") if own else gateway)
        )
    for way in ways:
        if way.gateway is not None and way.gateway.version != way.network.version:
            wrong = f"{way.network} cannot be reached by {way.gateway}, an address of the other IP version"
            raise ConfigError(f"{path}.routes", wrong, code="tun.route")
    return Setup(tuple(addresses), tuple(ways))


def _network(text: str, path: str) -> IPNetwork:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(path, f"{text[:64]!r} is not a network such as 192.0.2.0/24", code="tun.route") from None


def _gateway(text: str, path: str) -> IPAddress | None:
    try:
        return ip_address(text) if text else None
    except ValueError:
        raise ConfigError(path, f"{text[:64]!r} is not an address", code="tun.route") from None


def device_resources(name: str, mtu: int, setup: Setup) -> list[Resource]:
    """Return what the kernel shall hold for a device: up, with its addresses, and the routes into it."""
    resources: list[Resource] = [Link(name, mtu)]
    resources += [Address(name, str(address)) for address in dict.fromkeys(setup.addresses)]
    resources += [
        Route(str(way.network), device=name, gateway=str(way.gateway) if way.gateway is not None else "")
        for way in setup.ways
    ]
    return resources


class TunSource(Source[Packets]):
    """A TUN device, and for servers the UDP socket at the service's address.

    The device is handed out once. When whoever has it closes it, or somebody deletes it, it is made anew a second
    later, under the same name and with the same addresses and routes.
    """

    network = "udp"
    yields = Packets

    def __init__(self, address: Endpoint, options: TunOptions, context: ListenerContext) -> None:
        path = f"{context.path}.metadata"
        if options.router:
            raise Unavailable(f"{path}.router: named routers are not available in this version; write `routes`")
        self.address = address
        self._wanted = address
        self._context = context
        self._setup = setup_of(options, path)
        if context.forwards and not self._setup.addresses:
            # GOST: the client gives up at once, since it would have nothing to register.
            raise ConfigError(f"{path}.net", "a client needs at least one address of its own", code="tun.net")
        self._masquerade = options.masquerade
        if options.masquerade and not self._setup.addresses:
            raise ConfigError(f"{path}.masquerade", "needs `net`: its networks are what is masqueraded", code="tun.net")
        self._mtu = options.mtu if options.mtu > 0 else DEFAULT_MTU
        self._backend: Backend = "pytun" if options.backend == "pytun" else "ioctl"
        self._dns = tuple(options.dns)
        self._name = options.name
        self._device: TunDevice | None = None
        self._carrier: UdpSocket | None = None
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
        try:
            with netns.inside(self._context.netns or None):
                fd, self._name = open_device(self._name, backend=self._backend, vnet_header=True)
        except ConfigError as exc:
            raise ConfigError(f"{self._context.path}.metadata.name", exc.reason, hint=exc.hint, code=exc.code) from exc
        self._ended.clear()
        device = TunDevice(fd, self._name, self._mtu, setup=self._setup, joins=True, on_close=self._ended.set)
        device.carrier = self._carrier
        return device

    def resources(self) -> Sequence[Resource]:
        """Return the device's state, addresses and routes; before it is open, of the name it is likely to get."""
        name = self._name or "tun0"
        resources = device_resources(name, self._mtu, self._setup)
        if self._masquerade:
            networks = dict.fromkeys(str(address.network) for address in self._setup.addresses)
            resources.append(Masquerade(self._context.service, name, tuple(networks)))
        return resources

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
        await self._set_dns()
        setup = self._setup
        nets = ", ".join(map(str, setup.addresses))
        self._context.log.info(f"name: {self._name}, net: {nets}, mtu: {self._mtu}")
        client = Endpoint(str(setup.addresses[0].ip), 0) if setup.addresses else ANY
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
            for item in self.resources():
                match item:
                    case Link():
                        kernel.put_link(item)
                    case Address():
                        try:
                            kernel.put_address(item)
                        except KernelError as exc:
                            if exc.errno != errno.EEXIST:
                                raise
                    case Route():
                        kernel.put_route(item, replace=True)

    async def _set_dns(self) -> None:
        if self._dns:
            problem = await in_thread(_resolvectl, self._name, self._dns)
            if problem:
                self._context.log.warn(f"the name servers of {self._name} are not set: {problem}")

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


def _resolvectl(name: str, servers: Iterable[str]) -> str:
    """Tell systemd-resolved, which forgets it with the device; return what went wrong, "" for nothing."""
    try:
        done = subprocess.run(
            ["resolvectl", "dns", name, *servers], capture_output=True, text=True, timeout=_DNS_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    return done.stderr.strip() or f"resolvectl ended with status {done.returncode}" if done.returncode else ""


class TunListener:
    """The stack behind the name."""

    Options = TunOptions

    @staticmethod
    def make(address: Endpoint, options: TunOptions, context: ListenerContext) -> Listener:
        """Build a listener. Raise ConfigError."""
        return Listener("tun", TunSource(address, options, context))


register("listener", TunListener, ("tun",))
