"""A VPN's packets without this process: put into UDP and taken out of it by two BPF programs, IPv4 outside.

One program sees what the kernel sends into the device. It looks up which peer has the destination, puts IPv4 and UDP
in front and hands the packet to the network device by which the peer is reached. The other sees what network devices
receive: what a known peer has sent this way is stripped and enters by the VPN's device.

Both move packets as they are inside a host: up to 64 KiB at a time, TCP checksums still to be filled in. A network card
finishes them; between namespaces and virtual machines nobody does, and a program that reads them from a socket gets
rubbish. So packets go this way only to peers that are known to take them so (`takes`), and a datagram sent this way is
told by having no UDP checksum, which one from a socket always has. All else is left to who reads device and socket.

    routes   address inside (a prefix)       -> peer's address 4, port 2, flags 2 | our address 4, device 4, MTU 4
    counts   peer's address 4, port 2, zero 2 -> bytes to the peer 8, from it 8 | our address 4, zero 4

Numbers on the wire's side are in network order. Programs, maps and links end with the process.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address

from gostnet.core.address import Endpoint, IPAddress
from gostnet.core.errors import GostnetError, KernelError
from gostnet.core.packets import Way

from . import netns
from .bpf import (
    Assembly,
    Direction,
    Field,
    Helper,
    Link,
    Map,
    MapKind,
    Register,
    Size,
    Test,
    Verdict,
    attachment_problem,
    load,
)
from .routeget import RouteLookup

MOST_PEERS = 4096
"""Peers at a time; those beyond go the other way."""

MOST_ROUTES = 65536

OUTER = 28
"""Bytes in front of a packet: IPv4 and UDP."""

_ETHERNET = 14
_LARGEST = 65535 - OUTER
_SEGMENT_HEADERS = OUTER + 40 + 60
"""What may stand in front of the payload of a segment that is still to be cut."""

_IPV4, _IPV6 = socket.htons(0x0800), socket.htons(0x86DD)
_TAKES = socket.htons(1)
_ARPHRD_ETHER = 1
_SIOCGIFMTU, _SIOCGIFHWADDR = 0x8921, 0x8927

# bpf_skb_adjust_room: at the packet's beginning; how segments are to be cut is left as it is; what is put in front
_ROOM_MAC = 1
_FIXED_GSO, _ENCAP_IPV4, _ENCAP_UDP, _DECAP_IPV6 = 1, 2, 16, 256
_TO_INGRESS = 1

_ROUTE = struct.Struct("=4s2sH4sII")
_COUNT = struct.Struct("=QQ4s4x")
_EVERYTHING = bytes(20)
"""The key of the route with the shortest prefix."""

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = Register


@dataclass(slots=True)
class _Peer:
    """What is in the maps for a peer."""

    route: bytes
    addresses: set[IPAddress]
    seen: tuple[int, int] = (0, 0)


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
        self._place = place
        self._single = single
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
                self._routes = Map(MapKind.LPM_TRIE, 20, _ROUTE.size, MOST_ROUTES, "gn_tun_routes")
                self._counts = Map(MapKind.HASH, 8, _COUNT.size, MOST_PEERS, "gn_tun_counts")
                self._open += [self._routes, self._counts]
                with load(_sending(self._routes, self._counts, port, mark), "gn_tun_send") as program:
                    self._open.append(program.attach(self._device, Direction.EGRESS))
                code = _receiving(self._routes, self._counts, port, self._device, strict, relays and not single)
                self._receiver = load(code, "gn_tun_receive")
                self._lookup = RouteLookup(place)
                self._open.append(self._lookup)
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

    # ---- devices -----------------------------------------------------------------------------------
    def _listen(self, index: int) -> bool:
        """Take packets from a network device; False for one that has no Ethernet header. In the right namespace."""
        if index in self._links:
            return True
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

    # ---- peers -------------------------------------------------------------------------------------
    @property
    def peers(self) -> Collection[Endpoint]:
        """Those that are served."""
        return self._peers.keys()

    def learn(self, addresses: Sequence[IPAddress], peer: Endpoint, *, takes: bool, source: str = "") -> bool:
        """Note that `peer` has these addresses; return whether it is served here: what it sends this way is taken.

        Call it again from time to time: it follows changes of the way to the peer. `takes`: packets go to the peer
        this way. `source` is our address towards it, by default that of the route.
        """
        route = self._way_to(peer, takes, source)
        known = self._peers.get(peer)
        if route is None:
            if known is not None:
                self._mute(known)
            return False
        wanted = set(addresses)
        if known is not None and known.route == route and wanted <= known.addresses:
            return True
        if known is None:
            known = self._peers[peer] = _Peer(route, set())
        changed = known.route != route
        known.route = route
        try:
            self._note(route)
            if self._single:
                for other in [other for other in self._peers if other != peer]:
                    self.forget_peer(other)
                self._routes.update(_EVERYTHING, route)
            for address in known.addresses | wanted if changed else wanted - known.addresses:
                self._point(address, peer, route)
        except KernelError:
            self.forget_peer(peer)  # a map is full
            return False
        for other in [other for other, of in self._peers.items() if not of.addresses and other != peer]:
            self.forget_peer(other)
        return True

    def _way_to(self, peer: Endpoint, takes: bool, source: str) -> bytes | None:
        address = ip_address(peer.host.partition("%")[0])
        if not isinstance(address, IPv4Address):
            return None
        try:
            with netns.inside(self._place):
                found = self._lookup.get(peer.host)
                if found.type != "unicast" or not self._listen(found.device):
                    return None
                mtu = found.mtu or self._mtu_of(found.device)
        except (OSError, GostnetError):
            return None
        ours = source or found.source
        if not ours or ":" in ours:
            return None
        flags = _TAKES if takes else 0
        port = peer.port.to_bytes(2, "big")
        return _ROUTE.pack(address.packed, port, flags, ip_address(ours).packed, found.device, mtu)

    def _mute(self, known: _Peer) -> None:
        """Send nothing to a peer this way for now; what it sends is still taken, as it does not know yet."""
        known.route = known.route[:6] + bytes(2) + known.route[8:]
        keys = [_EVERYTHING] if self._single else []
        for key in keys + [key for address in known.addresses for key in self._keys(address)]:
            self._routes.update(key, known.route)

    def _note(self, route: bytes) -> None:
        """Make the peer known to the receiving program; the counts of one that is known already go on."""
        key, ours = route[:6] + b"\0\0", route[8:12]
        known = self._counts.lookup(key)
        if known is None:
            self._counts.update(key, _COUNT.pack(0, 0, ours))
        elif known[16:20] != ours:
            self._counts.update(key, known[:16] + ours + bytes(4))

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
        keys = [_prefix(address, address.max_prefixlen)]
        keys += [_prefix(network.network_address, network.prefixlen) for network, by in self._ways if by == address]
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
        self._count(known)
        del self._peers[peer]
        self._counts.delete(known.route[:6] + b"\0\0")
        if self._single and not self._peers:
            self._routes.delete(_EVERYTHING)
        for address in known.addresses:
            for key in self._keys(address):
                self._routes.delete(key)

    # ---- counts ------------------------------------------------------------------------------------
    def moved(self) -> tuple[int, int]:
        """Return the bytes that went to peers and came from them since the last call."""
        for known in self._peers.values():
            self._count(known)
        moved = self._moved[0], self._moved[1]
        self._moved = [0, 0]
        return moved

    def _count(self, known: _Peer) -> None:
        value = self._counts.lookup(known.route[:6] + b"\0\0") if known.route else None
        if value is not None:
            up, down, _ = _COUNT.unpack(value)
            self._moved[0] += up - known.seen[0]
            self._moved[1] += down - known.seen[1]
            known.seen = (up, down)


def _prefix(address: IPAddress, length: int) -> bytes:
    """Return the key of a prefix; IPv4 addresses are mapped ones."""
    if isinstance(address, IPv4Address):
        return struct.pack("=I", 96 + length) + bytes(10) + b"\xff\xff" + address.packed
    return struct.pack("=I", length) + address.packed


# ---- programs -------------------------------------------------------------------------------------
_KEY = -24  # of `routes`, on the stack: length of the prefix 4, address 16
_PEER = -32  # of `counts`: address 4, port 2, zero 2
_OUTSIDE = -64  # headers that are put in front
_HEAD = -112  # what is read of a received packet: 28 bytes outside, 20 inside


def _key_of_packet(code: Assembly, offset: int, source: bool, missing: str) -> None:
    """Put the packet's source or destination into the key; R9 is the IP version, `offset` where the packet begins."""
    label = f"v6 {source} {offset} {missing}"
    code.store(R10, _KEY, 128)
    code.jump_if(R9, Test.EQUAL, 6, label)
    code.store(R10, _KEY + 4, 0)
    code.store(R10, _KEY + 8, 0)
    code.store(R10, _KEY + 12, socket.htonl(0xFFFF))
    _load_bytes(code, offset + (12 if source else 16), _KEY + 16, 4, missing)
    code.jump(label + " done")
    code.label(label)
    _load_bytes(code, offset + (8 if source else 24), _KEY + 4, 16, missing)
    code.label(label + " done")


def _load_bytes(code: Assembly, offset: int, to: int, size: int, missing: str) -> None:
    code.move(R1, R6)
    code.move(R2, offset)
    code.move(R3, R10)
    code.add(R3, to)
    code.move(R4, size)
    code.call(Helper.SKB_LOAD_BYTES)
    code.jump_if(R0, Test.NOT_EQUAL, 0, missing)


def _look_up(code: Assembly, table: Map, key: int) -> None:
    code.load_map(R1, table)
    code.move(R2, R10)
    code.add(R2, key)
    code.call(Helper.MAP_LOOKUP_ELEM)


def _sending(routes: Map, counts: Map, port: int, mark: int) -> Assembly:
    """Return the program on the sending side of the VPN's device: R6 the packet, R7 its route, R8 its size."""
    code = Assembly()
    code.move(R6, R1)
    # 1. whose is it?
    code.move(R9, 4)
    code.load(R1, R6, Field.PROTOCOL)
    code.jump_if(R1, Test.EQUAL, _IPV4, "known")
    code.jump_if(R1, Test.NOT_EQUAL, _IPV6, "pass")
    code.move(R9, 6)
    code.label("known")
    _key_of_packet(code, 0, source=False, missing="pass")
    _look_up(code, routes, _KEY)
    code.jump_if(R0, Test.EQUAL, 0, "pass")
    code.move(R7, R0)
    code.load(R1, R7, 6, Size.HALF)
    code.jump_if(R1, Test.EQUAL, 0, "pass")
    # 2. does it fit?
    code.load(R8, R6, Field.LEN)
    code.jump_if(R8, Test.GREATER, _LARGEST, "pass")
    code.load(R1, R6, Field.GSO_SIZE)
    code.move(R2, R1)
    code.add(R2, _SEGMENT_HEADERS)
    code.jump_if(R1, Test.NOT_EQUAL, 0, "size")
    code.move(R2, R8)
    code.add(R2, OUTER)
    code.label("size")
    code.load(R1, R7, 16)
    code.jump_if(R2, Test.GREATER, R1, "pass")
    # 3. count
    code.load(R1, R7, 0)
    code.store(R10, _PEER, R1)
    code.load(R1, R7, 4, Size.HALF)
    code.store(R10, _PEER + 4, R1, Size.HALF)
    code.store(R10, _PEER + 6, 0, Size.HALF)
    _look_up(code, counts, _PEER)
    code.jump_if(R0, Test.EQUAL, 0, "pass")
    code.add_atomically(R0, 0, R8)
    # 4. headers: the IPv4 checksum is the sum of what is constant, both addresses and the length
    code.add(R8, OUTER)
    code.store_bytes(R10, _OUTSIDE, bytes.fromhex("45000000000040004011") + bytes(2))
    code.move(R1, R8)
    code.swap(R1, 16)
    code.store(R10, _OUTSIDE + 2, R1, Size.HALF)
    code.load(R2, R7, 8)
    code.store(R10, _OUTSIDE + 12, R2)
    code.load(R3, R7, 0)
    code.store(R10, _OUTSIDE + 16, R3)
    code.add(R2, R3)
    code.add(R2, R1)
    code.add(R2, sum(map(socket.htons, (0x4500, 0x4000, 0x4011))))
    for bits in (32, 16, 16, 16):
        code.move(R3, R2)
        code.shift_right(R3, bits)
        if bits == 32:
            code.move32(R2, R2)
        else:
            code.bit_and(R2, 0xFFFF)
        code.add(R2, R3)
    code.bit_xor(R2, 0xFFFF)
    code.store(R10, _OUTSIDE + 10, R2, Size.HALF)
    code.store_bytes(R10, _OUTSIDE + 20, port.to_bytes(2, "big"))
    code.load(R1, R7, 4, Size.HALF)
    code.store(R10, _OUTSIDE + 22, R1, Size.HALF)
    code.subtract(R8, 20)
    code.swap(R8, 16)
    code.store(R10, _OUTSIDE + 24, R8, Size.HALF)
    code.store(R10, _OUTSIDE + 26, 0, Size.HALF)
    code.load(R9, R7, 12)
    # 5. out; what fails from here on has left the packet changed
    code.move(R1, R6)
    code.move(R2, OUTER)
    code.move(R3, _ROOM_MAC)
    code.move(R4, _FIXED_GSO | _ENCAP_IPV4 | _ENCAP_UDP)
    code.call(Helper.SKB_ADJUST_ROOM)
    code.jump_if(R0, Test.NOT_EQUAL, 0, "pass")
    code.move(R1, R6)
    code.move(R2, 0)
    code.move(R3, R10)
    code.add(R3, _OUTSIDE)
    code.move(R4, OUTER)
    code.move(R5, 0)
    code.call(Helper.SKB_STORE_BYTES)
    code.jump_if(R0, Test.NOT_EQUAL, 0, "drop")
    # The neighbour's address is written over an Ethernet header, which has to be there.
    code.move(R1, R6)
    code.move(R2, _ETHERNET)
    code.move(R3, 0)
    code.call(Helper.SKB_CHANGE_HEAD)
    code.jump_if(R0, Test.NOT_EQUAL, 0, "drop")
    code.store(R6, Field.MARK, _word(mark, R1, code))
    code.move(R1, R9)
    code.move(R2, 0)
    code.move(R3, 0)
    code.move(R4, 0)
    code.call(Helper.REDIRECT_NEIGH)
    code.leave()
    code.label("pass")
    code.leave(Verdict.NEXT)
    code.label("drop")
    code.leave(Verdict.DROP)
    return code


def _word(value: int, register: Register, code: Assembly) -> Register:
    """Put a constant into a register: the context takes no constants."""
    code.move32(register, value)
    return register


def _receiving(routes: Map, counts: Map, port: int, device: int, strict: bool, relays: bool) -> Assembly:
    """Return the program on the receiving side of network devices: R6 the packet, R7 the peer's counts, R8 the size."""
    code = Assembly()
    code.move(R6, R1)
    code.load(R1, R6, Field.PROTOCOL)
    code.jump_if(R1, Test.NOT_EQUAL, _IPV4, "pass")
    # 1. UDP to our port, whole, without a checksum, from a peer, to the address that the peer knows
    _load_bytes(code, _ETHERNET, _HEAD, OUTER + 20, "pass")
    code.load(R1, R10, _HEAD, Size.BYTE)
    code.jump_if(R1, Test.NOT_EQUAL, 0x45, "pass")
    code.load(R1, R10, _HEAD + 9, Size.BYTE)
    code.jump_if(R1, Test.NOT_EQUAL, socket.IPPROTO_UDP, "pass")
    code.load(R1, R10, _HEAD + 22, Size.HALF)
    code.jump_if(R1, Test.NOT_EQUAL, socket.htons(port), "pass")
    code.load(R1, R10, _HEAD + 26, Size.HALF)
    code.jump_if(R1, Test.NOT_EQUAL, 0, "pass")
    code.load(R1, R10, _HEAD + 6, Size.HALF)
    code.bit_and(R1, socket.htons(0x3FFF))
    code.jump_if(R1, Test.NOT_EQUAL, 0, "pass")
    code.load(R1, R10, _HEAD + 12)
    code.store(R10, _PEER, R1)
    code.load(R1, R10, _HEAD + 20, Size.HALF)
    code.store(R10, _PEER + 4, R1, Size.HALF)
    code.store(R10, _PEER + 6, 0, Size.HALF)
    _look_up(code, counts, _PEER)
    code.jump_if(R0, Test.EQUAL, 0, "pass")
    code.move(R7, R0)
    code.load(R1, R7, 16)
    code.load(R2, R10, _HEAD + 16)
    code.jump_if(R1, Test.NOT_EQUAL, R2, "pass")
    # 2. one packet of IP inside, as long as it says; a registration begins like one of IPv4 with options
    code.load(R8, R6, Field.LEN)
    code.subtract(R8, _ETHERNET + OUTER)
    code.load(R1, R10, _HEAD + OUTER, Size.BYTE)
    code.jump_if(R1, Test.EQUAL, ord("G"), "pass")
    code.move(R9, R1)
    code.shift_right(R9, 4)
    code.load(R2, R10, _HEAD + OUTER + 2, Size.HALF)
    code.swap(R2, 16)
    code.jump_if(R9, Test.EQUAL, 4, "length")
    code.jump_if(R9, Test.NOT_EQUAL, 6, "pass")
    code.load(R2, R10, _HEAD + OUTER + 4, Size.HALF)
    code.swap(R2, 16)
    code.add(R2, 40)
    code.label("length")
    code.jump_if(R2, Test.NOT_EQUAL, R8, "pass")
    # 3. may the peer send from there?
    if strict:
        _key_of_packet(code, _ETHERNET + OUTER, source=True, missing="pass")
        _look_up(code, routes, _KEY)
        code.jump_if(R0, Test.EQUAL, 0, "drop")
        code.load(R1, R0, 0)
        code.load(R2, R10, _PEER)
        code.jump_if(R1, Test.NOT_EQUAL, R2, "drop")
        code.load(R1, R0, 4, Size.HALF)
        code.load(R2, R10, _PEER + 4, Size.HALF)
        code.jump_if(R1, Test.NOT_EQUAL, R2, "drop")
    code.add_atomically(R7, 8, R8)
    # 4. for this host and what is behind it, or (R8 0) for another peer: then it leaves by the device again
    code.move(R8, _TO_INGRESS)
    if relays:
        _key_of_packet(code, _ETHERNET + OUTER, source=False, missing="pass")
        _look_up(code, routes, _KEY)
        code.jump_if(R0, Test.EQUAL, 0, "strip")
        code.move(R8, 0)
        code.label("strip")
    code.move(R1, R6)
    code.move(R2, -OUTER)
    code.move(R3, _ROOM_MAC)
    code.move(R4, _FIXED_GSO)
    code.jump_if(R9, Test.EQUAL, 4, "room")
    code.move(R4, _FIXED_GSO | _DECAP_IPV6)
    code.label("room")
    code.call(Helper.SKB_ADJUST_ROOM)
    code.jump_if(R0, Test.NOT_EQUAL, 0, "drop")
    code.move(R1, device)
    code.move(R2, R8)
    code.call(Helper.REDIRECT)
    code.leave()
    code.label("pass")
    code.leave(Verdict.NEXT)
    code.label("drop")
    code.leave(Verdict.DROP)
    return code
