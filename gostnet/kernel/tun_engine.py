"""A VPN's packets without this process: put into UDP and taken out of it by two BPF programs, over IPv4 and IPv6.

One program sees what the kernel sends into the device. It looks up which peer has the destination, puts IP and UDP
in front and hands the packet to the network device by which the peer is reached. The other sees what network devices
receive: what a known peer has sent this way is stripped and enters by the VPN's device. Both are in
kernel.tun_programs, with the layout of the maps.

Both move packets as they are inside a host: up to 64 KiB at a time, TCP checksums still to be filled in. A network card
finishes them; between namespaces and virtual machines nobody does, and a program that reads them from a socket gets
rubbish. So packets go this way only to peers that are known to take them so (`takes`), and a datagram sent this way is
told by having no UDP checksum, which one from a socket has. All else is left to who reads device and socket.

Programs, maps and links end with the process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from gostnet.core.address import Endpoint, IPAddress, parse_ip
from gostnet.core.errors import GostnetError, KernelError
from gostnet.core.packets import Way
from gostnet.wire.ip import ipv4_packets, ipv6_packets

from . import netns
from .bpf import Direction, Link, Map, attachment_problem, load
from .routeget import RouteLookup
from .tun_programs import (
    COUNT,
    ENDS,
    EVERYTHING,
    OUTSIDE,
    OVER_IPV6,
    ROUTE,
    TAKES,
    make_maps,
    mapped,
    prefix,
    receiving,
    sending,
    unmapped,
)

MOST_PEERS = 4096
"""Peers at a time; those beyond go the other way."""

MOST_ROUTES = 65536

_ARPHRD_ETHER = 1
_SO_MARK = 36
_SIOCGIFMTU, _SIOCGIFHWADDR, _SIOCETHTOOL = 0x8921, 0x8927, 0x8946
_GET_DRIVER = struct.Struct("=I32s160x")
_ETHTOOL_GDRVINFO = 3

_INSIDE = frozenset(("veth", "netkit", "bridge", "tun", "macvlan", "ipvlan", "dummy"))
"""Drivers of devices that reach others on this host, so that nobody fills in checksums."""


@dataclass(slots=True)
class _Peer:
    """What is in the maps for a peer."""

    route: bytes
    addresses: set[IPAddress]
    seen: tuple[int, int] = (0, 0)

    @property
    def ends(self) -> bytes:
        return self.route[: ENDS.size]


class TunEngine:
    """The two programs at work for one device and one UDP port. A context manager; closing it stops them."""

    def __init__(
        self,
        device: str,
        port: int,
        *,
        place: netns.Place = None,
        strict: bool = False,
        single: bool = False,
        relays: bool = True,
        ways: Iterable[Way] = (),
        mark: int = 0,
    ) -> None:
        """Load and attach. Raise KernelError with the reason if this kernel or this process cannot.

        device   the VPN's device, in the namespace `place`, as are all others
        port     of the socket that peers send to
        strict   packets from a peer are taken only if their source is the peer's own
        single   there is one peer, which has every address
        relays   what a peer sends to another peer's address goes to that one
        ways     networks behind peers, by their gateways
        mark     of the packets that go out
        """
        self.reason = ""
        """Why the last call of `learn` has answered no."""
        self._place = place
        self._single = single
        self._mark = mark
        self._port = port
        self._raw: dict[int, socket.socket] = {}
        self._ways = [(way.network, way.gateway) for way in ways if way.gateway is not None]
        self._peers: dict[Endpoint, _Peer] = {}
        self._moved = [0, 0]
        self._links: dict[int, Link] = {}
        self._open: list[Map | Link | RouteLookup | socket.socket] = []
        try:
            with netns.inside(place):
                problem = attachment_problem()
                if problem:
                    raise KernelError("", 0, problem)
                self._device = socket.if_nametoindex(device)
                self._ask = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                self._open.append(self._ask)
                self._routes, self._counts = make_maps(MOST_ROUTES, MOST_PEERS)
                self._open += [self._routes, self._counts]
                with load(sending(self._routes, self._counts, port, mark), "gn_tun_send") as program:
                    self._sender = program.attach(self._device, Direction.EGRESS)
                self._open.append(self._sender)
                code = receiving(
                    self._routes, self._counts, port, self._device, strict=strict, relays=relays and not single
                )
                self._receiver = load(code, "gn_tun_receive")
                self._lookup = RouteLookup(place)
                self._open.append(self._lookup)
                self._open_raw()
                for index, _ in socket.if_nameindex():
                    self._listen(index)
        except OSError as exc:
            self.close()
            raise KernelError(f"BPF programs of {device}", exc.errno or 0) from exc
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the programs off. Idempotent."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        for thing in reversed(self._open):
            thing.close()
        self._open.clear()
        receiver = getattr(self, "_receiver", None)
        if receiver is not None:
            receiver.close()

    def __enter__(self) -> TunEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- datagrams ---------------------------------------------------------------------------------
    def _open_raw(self) -> None:
        """Open the sockets of `say`, that of IPv6 where the host has it."""
        for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
            try:
                sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
            except OSError as exc:
                if exc.errno == errno.EAFNOSUPPORT:
                    continue
                raise KernelError("raw socket", exc.errno or 0, hint="the kernel engine needs CAP_NET_RAW") from exc
            self._open.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, self._mark)
            self._raw[version] = sock

    def say(self, peer: Endpoint, data: bytes) -> None:
        """Send a datagram to a peer that is served, without a checksum as its packets have none. It may get lost."""
        theirs, port, device, ours = ENDS.unpack(self._peers[peer].ends)
        here, there = unmapped(ours), unmapped(theirs)
        payload = struct.pack("!H2sHH", self._port, port, 8 + len(data), 0) + data
        with suppress(OSError):
            if isinstance(here, IPv4Address) and isinstance(there, IPv4Address):
                (packet,) = ipv4_packets(here, there, payload, 65535, 0)
                self._raw[4].sendto(packet, (str(there), 0))
            elif isinstance(here, IPv6Address) and isinstance(there, IPv6Address):
                (packet,) = ipv6_packets(here, there, payload, 65535, 0)
                self._raw[6].sendto(packet, (str(there), 0, 0, device))

    # ---- devices -----------------------------------------------------------------------------------
    def _listen(self, index: int) -> bool:
        """Take packets from a network device; False for one that has no Ethernet header. In the right namespace."""
        link = self._links.get(index)
        if link is not None:
            if link.attached:
                return True
            link.close()  # the device has gone, and this is another one by its number
            del self._links[index]
        if index == self._device:
            return False
        try:
            name = socket.if_indextoname(index)
            answer = fcntl.ioctl(self._ask, _SIOCGIFHWADDR, struct.pack("16s24x", name.encode()))
            if struct.unpack_from("=H", answer, 16)[0] != _ARPHRD_ETHER:
                return False
            self._links[index] = self._receiver.attach(index, Direction.INGRESS)
        except (OSError, GostnetError):
            return False  # it has just gone, or takes no programs
        return True

    def _mtu_of(self, index: int) -> int:
        name = socket.if_indextoname(index)
        answer = fcntl.ioctl(self._ask, _SIOCGIFMTU, struct.pack("16s24x", name.encode()))
        return int(struct.unpack_from("=i", answer, 16)[0])

    def problem(self) -> str:
        """Tell why the engine does nothing any more, "" if it does."""
        if self._sender.attached:
            return ""
        try:
            with netns.inside(self._place):
                socket.if_indextoname(self._device)
        except (OSError, GostnetError):
            return ""  # the device has gone, and takes the rest along
        return "its program has been taken off the device"

    def _is_inside(self, index: int) -> bool:
        """Tell whether a device reaches others on this host only. In the right namespace."""
        question = ctypes.create_string_buffer(_GET_DRIVER.pack(_ETHTOOL_GDRVINFO, b""), _GET_DRIVER.size)
        request = struct.pack("@16sP16x", socket.if_indextoname(index).encode(), ctypes.addressof(question))
        try:
            fcntl.ioctl(self._ask, _SIOCETHTOOL, request)
        except OSError:
            return False  # it has no driver that says its name
        return bytes(_GET_DRIVER.unpack(question)[1]).rstrip(b"\0").decode() in _INSIDE

    # ---- peers -------------------------------------------------------------------------------------
    @property
    def peers(self) -> Collection[Endpoint]:
        """Those that are served."""
        return self._peers.keys()

    def learn(
        self,
        addresses: Sequence[IPAddress],
        peer: Endpoint,
        *,
        takes: bool,
        anyway: bool = False,
        source: str = "",
    ) -> bool:
        """Note that `peer` has these addresses; return whether it is served here: what it sends this way is taken.

        Call it again from time to time: it follows changes of the way to the peer. `takes`: packets go to the peer
        this way; `anyway`: also without, if it is reached by a network card. `source` is our address towards it, by
        default that of the route. Where the answer is False, `reason` says why.
        """
        self.reason = ""
        route = self._way_to(peer, takes, anyway, source)
        known = self._peers.get(peer)
        if route is None:
            if known is not None:
                self._mute(known)
            self._disown(addresses, peer)
            return False
        wanted = set(addresses)
        if known is not None and known.route == route and wanted <= known.addresses:
            return True
        if known is None:
            known = self._peers[peer] = _Peer(route, set())
        changed = known.route != route
        before = known.ends
        known.route = route
        try:
            if self._counts.lookup(known.ends) is None:
                self._counts.update(known.ends, COUNT.pack(0, 0))
            if self._single:
                for other in [other for other in self._peers if other != peer]:
                    self.forget_peer(other)
                self._routes.update(EVERYTHING, route)
            for address in known.addresses | wanted if changed else wanted - known.addresses:
                self._point(address, peer, route)
            if before != known.ends:
                self._close_count(known, before)  # our address has changed; now nothing counts there any more
        except KernelError as exc:
            if exc.errno != errno.E2BIG:
                raise
            if before != known.ends:
                self._close_count(known, before)
            self.forget_peer(peer)
            self._disown(addresses, peer)
            self.reason = "there are too many peers"
            return False
        for other in [other for other, of in self._peers.items() if not of.addresses and other != peer]:
            self.forget_peer(other)
        return True

    def _way_to(self, peer: Endpoint, takes: bool, anyway: bool, source: str) -> bytes | None:
        host, _, zone = peer.host.partition("%")
        try:
            with netns.inside(self._place):
                scope = int(zone) if zone.isdecimal() else socket.if_nametoindex(zone) if zone else 0
                found = self._lookup.get(host, mark=self._mark, device=scope)
                if found.type != "unicast":
                    self.reason = "it is on this host"
                    return None
                if not self._listen(found.device):
                    self.reason = f"{socket.if_indextoname(found.device)} has no Ethernet header or takes no programs"
                    return None
                mtu = found.mtu or self._mtu_of(found.device)
                takes = takes or (anyway and not self._is_inside(found.device))
        except (OSError, GostnetError) as exc:
            self.reason = str(exc)
            return None
        address, ours = ip_address(host), parse_ip((source or found.source).partition("%")[0])
        if ours is None or address.version != ours.version:
            self.reason = "it is not known which address of this host it sees"
            return None
        if not isinstance(address, IPv6Address) or not address.is_link_local:
            scope = 0
        flags = (TAKES if takes else 0) | (OVER_IPV6 if address.version == 6 else 0)
        ends = ENDS.pack(mapped(address), peer.port.to_bytes(2, "big"), scope, mapped(ours))
        return ROUTE.pack(ends, found.device, max(0, mtu - OUTSIDE[address.version].size), flags)

    def _mute(self, known: _Peer) -> None:
        """Send nothing to a peer this way for now; what it sends is still taken, as it does not know yet."""
        *where, flags = ROUTE.unpack(known.route)
        known.route = ROUTE.pack(*where, flags & ~TAKES)
        keys = [EVERYTHING] if self._single else []
        for key in keys + [key for address in known.addresses for key in self._keys(address)]:
            self._routes.update(key, known.route)

    def _close_count(self, known: _Peer, ends: bytes) -> None:
        """Count for the last time what has gone between these ends."""
        self._count(known, ends)
        known.seen = (0, 0)
        self._counts.delete(ends)

    def _disown(self, addresses: Sequence[IPAddress], peer: Endpoint) -> None:
        """Send what is for these addresses to nobody this way: they are those of a peer that is not served now."""
        if self._single:
            for other in [other for other in self._peers if other != peer]:
                self.forget_peer(other)
        for other, known in self._peers.items():
            for address in known.addresses.intersection(addresses) if other != peer else ():
                known.addresses.discard(address)
                for key in self._keys(address):
                    self._routes.delete(key)

    def _point(self, address: IPAddress, peer: Endpoint, route: bytes) -> None:
        """Let an address and the networks behind it lead to a peer, and no more to the one that had it before."""
        for other, known in self._peers.items():
            if other != peer:
                known.addresses.discard(address)
        self._peers[peer].addresses.add(address)
        for key in self._keys(address):
            self._routes.update(key, route)

    def _keys(self, address: IPAddress) -> list[bytes]:
        if self._single:
            return []
        keys = [prefix(address, address.max_prefixlen)]
        keys += [prefix(network.network_address, network.prefixlen) for network, by in self._ways if by == address]
        return keys

    def forget(self, address: IPAddress) -> None:
        """Forget whose an address is."""
        for known in self._peers.values():
            known.addresses.discard(address)
        for key in self._keys(address):
            self._routes.delete(key)

    def forget_peer(self, peer: Endpoint) -> None:
        """Forget a peer: whatever it sends this way is left alone again."""
        known = self._peers.get(peer)
        if known is None:
            return
        del self._peers[peer]
        if self._single and not self._peers:
            self._routes.delete(EVERYTHING)
        for address in known.addresses:
            for key in self._keys(address):
                self._routes.delete(key)
        self._close_count(known, known.ends)

    # ---- counts ------------------------------------------------------------------------------------
    def moved(self) -> tuple[int, int]:
        """Return the bytes that went to peers and came from them since the last call."""
        for known in self._peers.values():
            self._count(known, known.ends)
        moved = self._moved[0], self._moved[1]
        self._moved = [0, 0]
        return moved

    def _count(self, known: _Peer, ends: bytes) -> None:
        value = self._counts.lookup(ends)
        if value is not None:
            up, down = COUNT.unpack(value)
            self._moved[0] += up - known.seen[0]
            self._moved[1] += down - known.seen[1]
            known.seen = (up, down)
