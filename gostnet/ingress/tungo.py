"""The listener `tungo`: what is routed into a TUN device, handed out as connections instead of packets.

The kernel terminates TCP and UDP. A bounce (kernel.bounce) turns packets around at the device, rules give what comes
back in to two transparent sockets, and no packet passes through this process but those of ICMP. Where the kernel has
no way to turn them around, this process does (dataplane.rewriting): the engine `nat`.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, ClassVar, Literal

from ..core.address import Endpoint, IPAddress
from ..core.datagrams import Datagram
from ..core.errors import ConfigError, ConnError, GostnetError, KernelError
from ..core.flow import Flow
from ..core.hub import READABLE
from ..core.options import CommaList, group, opt
from ..core.packets import Setup
from ..core.registry import register
from ..core.resources import MARK_OWN, ROUTE_PROTOCOL, Address, Inlet, Link, Resource, Route, Sysctl
from ..core.sockets import any_readable
from ..core.tasks import Scope, in_thread
from ..dataplane.rewriting import Rewriter
from ..dataplane.sessions import Session, Sessions
from ..dataplane.tcp_runs import HEADER_SIZE
from ..dataplane.tun_device import TunDevice, open_device, set_offload
from ..kernel import netns, sysctl
from ..kernel.bounce import Bounce, Method
from ..kernel.netlink import RouteNetlink
from ..pipeline.transport import AcceptError, Listener, ListenerContext, Source
from ..protocols.transparent.tungo import Routed
from ..wire import icmp
from ..wire.ip import udp_datagram
from .capture import CaptureOptions, CaptureRequest
from .device import problems_of, set_name_servers, setup_of
from .redirect import RedOptions, RedSource
from .tproxy import RawSender, ReduOptions, ReduSource

DEFAULT_MTU = 1500
"""Bytes. TCP passes in large pieces whatever it says; datagrams go on from here as they are, and shall not be larger
than what passes the network. Below what the other devices have, the host's captured packets would be too large."""

UDP_IDLE = 86400.0
"""Seconds after which the listener ends a UDP flow; the handler does so much earlier."""

ECHO_IDLE = 10.0
"""Seconds after the last echo request with one identifier until it is forgotten."""

DUMMY_ADDRESS = "192.0.0.8/32"
"""For a device without an address where the reverse path is checked: the check wants one (RFC 7600)."""

UNKNOWN_PORT = 1
"""What a plan shows where the kernel will choose the port."""

LARGEST_MTU = 65535
"""Bytes; with the engine nat, for datagrams that are not cut into fragments before this process sees them."""

_PACKETS_A_TURN = 4
"""Times that the device is read in one turn of the loop: a flood of pings must not hold up the others."""

_PACKETS = 64
"""Packets that the engine nat reads in one turn of the loop."""

_NEEDS_SUM = 1
_OFFLOADS = 0x1 | 0x2 | 0x4
"""TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6: sums need not be complete, and TCP comes in large pieces."""

Echo = tuple[icmp.IPAddress, icmp.IPAddress, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TungoOptions:
    """Options of the listener `tungo` (transports 10.4)."""

    name: str = opt("tungo", "Name of the device.", aliases=("tun.name",))
    net: CommaList = opt([], "Addresses of the device with their prefix lengths, IPv4 and IPv6.", aliases=("tun.net",))
    mtu: int = opt(0, "MTU of the device, bytes; 1500 by default.", aliases=("tun.mtu",))
    peer: str = opt("", "Accepted for compatibility: GOST uses it on macOS only.", aliases=("tun.peer",))
    gw: str = opt("", "Gateway of the routes that name none.", aliases=("tun.gw",))
    route: CommaList = opt([], "Networks that are routed into the device, by way of `gw`.", aliases=("tun.route",))
    routes: CommaList = opt(
        [], "Networks that are routed into the device, each with its gateway behind a blank.", aliases=("tun.routes",)
    )
    dns: CommaList = opt([], "Name servers of the device, for systemd-resolved.", aliases=("tun.dns",))
    guid: str = opt("", "Accepted for compatibility: GOST uses it on Windows only.", aliases=("tun.guid",))
    engine: str = opt(
        "auto",
        "How packets come back from the device: by a BPF program (tcx), by filters of tc (clsact), or by way of"
        " this process (nat); the first that the kernel allows.",
        key="tungo.engine",
        choices=("auto", "tcx", "clsact", "nat"),
    )
    capture: CaptureOptions = group(CaptureOptions)

    def validate(self) -> Iterator[tuple[str, str]]:
        """Yield what cannot be read, before anything is opened."""
        return problems_of(self.name, self.mtu, self.net, self.gw, self.route, self.routes)


class TungoSource(Source[Any]):
    """A device with its bounce, and the transparent sockets behind it."""

    network: ClassVar[str] = "tun"
    yields: ClassVar[type[Any]] = Routed

    def __init__(
        self,
        address: Endpoint,
        options: TungoOptions,
        setup: Setup,
        request: CaptureRequest | None,
        context: ListenerContext,
    ) -> None:
        self.address = address
        self._options = options
        self._setup = setup
        self._request = request
        self._context = context
        self._name = options.name or "tungo"
        self._mtu = options.mtu if options.mtu > 0 else DEFAULT_MTU
        # A socket at one address gets what was for that address only, which none of the captured is.
        anywhere = Endpoint("", address.port)
        self._tcp = self._make_tcp(anywhere)
        self._udp = self._make_udp(anywhere)
        self._device: TunDevice | None = None
        self._bounce: Bounce | None = None
        self._nat: _Nat | None = None
        self._index = 0
        self._echoes: _Echoes | None = None
        self._routes: tuple[Route, ...] = ()
        self._handed_out = False
        self._warned = False
        self._refusing: Scope | None = None

    def _make_tcp(self, address: Endpoint) -> RedSource:
        return RedSource(address, RedOptions(tproxy=True), None, self._context, mark=MARK_OWN)

    def _make_udp(self, address: Endpoint) -> ReduSource:
        return ReduSource(address, ReduOptions(ttl=UDP_IDLE), None, self._context)

    # -- open --
    async def open(self) -> None:
        """Make the device and its bounce, and bind the sockets. Raise KernelError or ConfigError."""
        try:
            await self._open_sockets()
            self._open_device()
        except BaseException:
            self.abort()
            raise
        self._echoes = _Echoes(self._udp.sender)

    async def _open_sockets(self) -> None:
        """Bind at the service's port, or at ports of the kernel's choice where it is in use.

        # GOST: listens nowhere, so that two services may well have the same address.
        """
        try:
            await self._tcp.open()
            await self._udp.open()
        except KernelError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            self._tcp.abort()
            self._udp.abort()
            free = Endpoint("", 0)
            self._tcp, self._udp = self._make_tcp(free), self._make_udp(free)
            await self._tcp.open()
            await self._udp.open()
            self._context.log.info(f"{self.address} is in use; captured connections come to {self._tcp.address}")

    def _open_device(self) -> None:
        place = self._context.netns or None
        # The header of virtio is of use to the engine nat only, and in nobody's way with another one.
        try:
            with netns.inside(place):
                fd, self._name = open_device(self._name, vnet_header=True)
                index = socket.if_nametoindex(self._name)
        except ConfigError as exc:
            raise ConfigError(f"{self._context.path}.metadata.name", exc.reason, hint=exc.hint, code=exc.code) from exc
        self._device = TunDevice(fd, self._name, self._mtu, setup=self._setup, joins=True)
        self._bounce = self._make_bounce(place)
        self._nat = None
        if self._bounce is None:
            self._index = self._index or index  # a device made anew has the addresses that the rules know
            self._nat = _Nat(self._device, self._tcp.address.port, self._index, ipv6=self._has_ipv6())
            if self._options.mtu <= 0:
                self._mtu = LARGEST_MTU

    def _make_bounce(self, place: netns.Place) -> Bounce | None:
        """Return the bounce, None where the engine nat has to do."""
        methods: tuple[Method, ...] = ("tcx", "clsact")
        wanted = [method for method in methods if self._options.engine in ("auto", method)]
        log = self._context.log
        refused: list[KernelError] = []
        for method in wanted:
            try:
                made = Bounce(self._name, method, place)
            except KernelError as exc:
                refused.append(exc)
                log.info(f"engine {method} is not used: {exc}")
            else:
                log.info(f"engine {method}: packets come back from {self._name} in the kernel")
                return made
        if self._options.engine not in ("auto", "nat"):
            reasons = "; ".join(map(str, refused))
            raise KernelError(f"listen on {self._name}", refused[0].errno, reasons, hint=refused[-1].hint)
        log.info(f"engine nat: packets come back from {self._name} by way of this process")
        return None

    # -- resources --
    def resources(self) -> Sequence[Resource]:
        """Return the device's state and addresses, what is routed into it, and the capture beside it."""
        name, setup = self._name, self._setup
        resources: list[Resource] = [*self._sysctls(), Link(name, self._mtu)]
        resources += [Address(name, text) for text in self._addresses()]
        ways = tuple((str(way.network), str(way.gateway) if way.gateway is not None else "") for way in setup.ways)
        service = self._context.service
        tcp, udp = (
            Endpoint(source.address.host, source.address.port or UNKNOWN_PORT) for source in (self._tcp, self._udp)
        )
        if self._nat is None:
            resources.append(Inlet(service, name, tcp.port, udp.port, ways))
        else:
            peers = tuple(f"{there}/{there.max_prefixlen}" for _, there in self._nat.pairs.values())
            resources.append(Inlet(service, name, 0, 0, ways, peers))
        if self._request is not None:
            for protocol, address in (("tcp", tcp), ("udp", udp)):
                kind: Literal["tcp", "udp"] = "tcp" if protocol == "tcp" else "udp"
                resources.append(self._request.resource(service, kind, "tproxy", address, device=name))
        return resources

    def _sysctls(self) -> list[Resource]:
        """Return the device's settings: sources of what comes by it are addresses of this host, among others."""
        name = self._name.replace(".", "/")
        settings: list[Resource] = [
            Sysctl(f"net.ipv4.conf.{name}.accept_local", "1"),
            Sysctl(f"net.ipv4.conf.{name}.rp_filter", "2" if self._checks_reverse_path() else "0"),
        ]
        with netns.inside(self._context.netns or None):
            if self._has_ipv6():
                settings.append(Sysctl(f"net.ipv6.conf.{name}.disable_ipv6", "0"))
            if self._setup.ways and _is_strict_somewhere():
                # What comes back to our sockets has a mark by then (kernel.capture), which shall count.
                settings.append(Sysctl("net.ipv4.conf.all.src_valid_mark", "1"))
        return settings

    def _has_ipv6(self) -> bool:
        with netns.inside(self._context.netns or None):
            return sysctl.read("net.ipv6.conf.lo.disable_ipv6") == "0"

    def _checks_reverse_path(self) -> bool:
        """Tell whether the setting of all devices outweighs that of one: the greater one holds."""
        with netns.inside(self._context.netns or None):
            return sysctl.read("net.ipv4.conf.all.rp_filter") not in ("0", None)

    def _addresses(self) -> list[str]:
        addresses = [str(address) for address in dict.fromkeys(self._setup.addresses)]
        if self._checks_reverse_path() and not any(address.version == 4 for address in self._setup.addresses):
            addresses.append(DUMMY_ADDRESS)
        if self._nat is not None:
            addresses += [f"{here}/{here.max_prefixlen - 2}" for here, _ in self._nat.pairs.values()]
        return addresses

    # -- accept --
    async def accept(self) -> Sequence[tuple[Flow, Any]]:
        """Return new connections, associations and echo requests. Raise AcceptError when the device is gone."""
        if not self._handed_out:
            await self._begin()
        device, echoes = self._device, self._echoes
        assert device is not None
        assert echoes is not None
        tcp, udp = self._tcp, self._udp
        while True:
            batch: list[tuple[Flow, Any]] = [*tcp.accept_now(), *udp.accept_now()]
            if self._nat is not None:
                for flow, _ in batch:
                    self._nat.rename(flow)
            try:
                batch += self._read(device, echoes) if self._nat is None else self._turn(self._nat, echoes)
            except ConnError as exc:
                device.abort()
                self._handed_out = False
                raise AcceptError(str(exc)) from exc
            if batch:
                return batch
            await any_readable(tcp.readiness, udp.readiness, device.readiness)

    def _read(self, device: TunDevice, echoes: _Echoes) -> list[tuple[Flow, Any]]:
        """Feed the echo sessions with what the device has; return new ones. What is no echo request is dropped."""
        fresh: list[tuple[Flow, Any]] = []
        for _ in range(_PACKETS_A_TURN):
            packets = device.receive_now()
            if not packets:
                return fresh
            for packet in packets:
                request = icmp.echo_request(packet)
                if request is not None:
                    fresh += echoes.take(request, self.address)
                elif _is_transport(memoryview(packet)):
                    self._warn_of_loop()
        device.readiness.hub.call_ready(lambda: device.readiness.on_events(READABLE))
        return fresh

    def _turn(self, nat: _Nat, echoes: _Echoes) -> list[tuple[Flow, Any]]:
        """Turn TCP around, hand out UDP and echo requests."""
        fresh: list[tuple[Flow, Any]] = []
        for packet in nat.others():
            datagram = udp_datagram(packet)
            if datagram is not None:
                source, sport, destination, dport, data = datagram
                target = Endpoint(str(ip_address(destination)), dport)
                if not ip_address(destination).is_multicast:
                    fresh += self._udp.take(data, Endpoint(str(ip_address(source)), sport), target)
            else:
                request = icmp.echo_request(packet)
                if request is not None:
                    fresh += echoes.take(request, self.address)
        return fresh

    def _warn_of_loop(self) -> None:
        if not self._warned:
            self._warned = True
            self._context.log.warn(
                f"a connection of this daemon's own is routed into {self._name} and fails: somebody else's route leads"
                " there; `interface` in the service's metadata names the way out"
            )

    async def _begin(self) -> None:
        """Note what the kernel holds for the device; give a new one what the one before had."""
        try:
            if self._device is None or self._device.closed:
                self._open_device()
                await in_thread(self._restore)
            self._routes = await in_thread(self._routes_held)
        except GostnetError as exc:
            if self._device is not None:
                self._device.abort()
            raise AcceptError(str(exc)) from exc
        self._handed_out = True
        await set_name_servers(self._name, self._options.dns, self._context.log)
        addresses = self._setup.addresses
        self._context.log.info(f"name: {self._name}, net: {', '.join(map(str, addresses))}, mtu: {self._mtu}")

    def _routes_held(self) -> tuple[Route, ...]:
        with RouteNetlink(self._context.netns or None) as kernel:
            routes = [*kernel.routes(4), *kernel.routes(6)]
        return tuple(r for r in routes if r.device == self._name and r.protocol == ROUTE_PROTOCOL)

    def _restore(self) -> None:
        """Make the kernel hold for a new device what it held for the one before; the journal knows it already."""
        place = self._context.netns or None
        with RouteNetlink(place) as kernel, netns.inside(place):
            for item in self.resources():
                match item:
                    case Sysctl():
                        sysctl.write(item.name, item.value)
                    case Link():
                        kernel.put_link(item)
                    case Address():
                        kernel.put_address(item)
            for route in self._routes:
                kernel.put_route(Route(route.destination, route.table, device=self._name, gateway=route.gateway))

    async def retire(self) -> None:
        """Reset new TCP connections from now on, and end the flows of UDP and ICMP, which have no end of their own."""
        self._end_datagrams()
        if self._device is not None and not self._device.closed:
            self._refusing = Scope(f"{self._name} refuses")
            self._refusing.start(self._refuse(self._device))

    async def _refuse(self, device: TunDevice) -> None:
        """Reset what comes, and go on turning packets around where that is done here."""
        tcp, nat = self._tcp, self._nat
        places = (tcp.readiness,) if nat is None else (tcp.readiness, device.readiness)
        while True:
            with suppress(AcceptError):  # no descriptors left: those wait, and end with the device
                while fresh := tcp.accept_now():
                    for _, stream in fresh:
                        stream.reset()
            if nat is not None and not nat.turn_all():
                return  # somebody has deleted the device, and its connections with it
            await any_readable(*places)

    def _end_datagrams(self) -> None:
        if self._echoes is not None:
            self._echoes.close()
            self._echoes = None
        self._udp.abort()

    async def aclose(self) -> None:
        """Close the device, which removes it, and the sockets."""
        refusing, self._refusing = self._refusing, None
        if refusing is not None:
            await refusing.cancel()
            if self._nat is not None:
                self._nat.turn_all()  # the ends of the last connections are on their way
        self.abort()

    def abort(self) -> None:
        """Close the device, which removes it, and the sockets."""
        self._handed_out = False
        self._end_datagrams()
        self._tcp.abort()
        if self._bounce is not None:
            self._bounce.close()
            self._bounce = None
        if self._device is not None:
            self._device.abort()
            self._device = None


class _Nat:
    """The engine nat: the device's TCP, turned around in this process.

    pairs    by IP version: the address of the device, and that of the neighbour who does not exist. Networks for
             measurements between devices (RFC 2544) and private ones, a pair for each index that a device may have
    """

    def __init__(self, device: TunDevice, port: int, index: int, *, ipv6: bool) -> None:
        """`port` is that of the listening socket, `index` the device's."""
        first4 = IPv4Address("198.18.0.0") + 4 * (index % 32768)
        first6 = IPv6Address("fd67:6f73:7400::") + 4 * index
        self.pairs: dict[int, tuple[IPAddress, IPAddress]] = {4: (first4 + 1, first4 + 2)}
        if ipv6:
            self.pairs[6] = (first6 + 1, first6 + 2)
        self._device = device
        self._rewriter = Rewriter(self.pairs, port)
        self._buffer = memoryview(bytearray(HEADER_SIZE + 65535))
        set_offload(device.fd, _OFFLOADS)

    def rename(self, flow: Flow) -> None:
        """Give a flow that the socket accepted from the neighbour the ends that it has really."""
        ends = self._rewriter.origin(flow.client)
        if ends is not None:
            flow.client, flow.target = ends
            flow.hash, flow.reason = flow.client.host, ""

    def turn_all(self) -> bool:
        """Turn around what waits, and drop what is no TCP; False if the device is gone."""
        try:
            for _ in self.others():
                pass
        except ConnError:
            return False
        return True

    def others(self) -> Iterator[memoryview]:
        """Read the device, at most _PACKETS packets, and yield what is no TCP. Raise ConnError if it is gone."""
        device, buffer, turn = self._device, self._buffer, self._rewriter.turn
        fd, now = device.fd, device.readiness.hub.loop.time()
        into = [buffer]
        for _ in range(_PACKETS):
            try:
                size = os.readv(fd, into)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                raise ConnError(f"device {device.name} is gone") from exc
            if turn(buffer[HEADER_SIZE:size], bool(buffer[0] & _NEEDS_SUM), now):
                try:
                    os.write(fd, buffer[:size])
                except OSError:
                    continue  # as a network does that is too busy; TCP sends it again
            else:
                yield buffer[HEADER_SIZE:size]
        device.readiness.hub.call_ready(lambda: device.readiness.on_events(READABLE))


def _is_strict_somewhere() -> bool:
    """Tell whether an interface, in the thread's namespace, takes packets only from where their answers would go."""
    everywhere = sysctl.read("net.ipv4.conf.all.rp_filter")
    names = [name.replace(".", "/") for name in os.listdir("/proc/sys/net/ipv4/conf") if name not in ("all", "default")]
    values = {max(everywhere or "0", sysctl.read(f"net.ipv4.conf.{name}.rp_filter") or "0") for name in names}
    return "1" in values


def _is_transport(packet: memoryview) -> bool:
    """Tell whether a packet is TCP or UDP, which all comes back in but that of our own sockets."""
    version = packet[0] >> 4 if len(packet) else 0
    return (version == 4 and packet[9] in (6, 17)) or (version == 6 and packet[6] in (6, 17))


class _Echoes:
    """Echo requests as sessions: one for each client, destination and identifier."""

    def __init__(self, sender: RawSender) -> None:
        self._sender = sender
        self._sessions: Sessions[Echo] = Sessions(ECHO_IDLE)

    def take(self, request: icmp.EchoRequest, ingress: Endpoint) -> list[tuple[Flow, Session[Echo]]]:
        """Hand a request to its session; return that, with its flow, if it is a new one."""
        key = (request.source, request.destination, request.identifier)
        client, target = Endpoint(str(request.source), 0), Endpoint(str(request.destination), 0)
        session = self._sessions.find(key)
        fresh = []
        if session is None:
            session = self._sessions.open(key, client, target, self._answer(request))
            fresh.append((Flow("", client, ingress, "ip", target), session))
        session.offer(Datagram(request.message, client))
        return fresh

    def _answer(self, request: icmp.EchoRequest) -> Any:
        client, target, identifier = request.source, request.destination, request.identifier
        version = target.version

        def answer(batch: Sequence[Datagram]) -> None:
            for datagram in batch:
                reply = icmp.echo(icmp.REPLY[version], identifier, bytes(datagram.data), target, client)
                self._sender.send_packet(target, client, reply, icmp.PROTOCOL[version])

        return answer

    def close(self) -> None:
        """End the sessions."""
        self._sessions.close()


class TungoListener:
    """The stack behind the name."""

    Options = TungoOptions

    @staticmethod
    def make(address: Endpoint, options: TungoOptions, context: ListenerContext) -> Listener:
        """Build a listener. Raise ConfigError."""
        path = f"{context.path}.metadata"
        setup = setup_of(options.net, options.gw, options.route, options.routes, path, "tungo")
        request = CaptureRequest.of(options.capture, path)
        return Listener("tungo", TungoSource(address, options, setup, request, context))


register("listener", TungoListener, ("tungo",))
