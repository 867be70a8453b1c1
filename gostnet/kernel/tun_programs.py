"""The two programs of the VPN's kernel engine (kernel.tun_engine), and the layout of the maps that they share.

    ends      the peer's address 16, port 2, zero 2, device 4, which is 0 but for link-local addresses | our address 16
    routes    address inside, a prefix (length in bits 4, address 16) -> ends 40 | device 4 | largest packet 4 | flags 4
    counts    ends 40 -> bytes to the peer 8, from it 8

IPv4 addresses are mapped ones, inside and outside (::ffff:a.b.c.d). Addresses and ports are in network order.

What differs between IPv4 and IPv6 outside is in `OUTSIDE`; each program has a part for either, written by the same
lines. IPv6 wants a checksum of UDP, but for tunnels whose ends have agreed on none (RFC 6935 section 5).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from gostnet.core.address import IPAddress

from .bpf import Assembly, At, Field, Helper, Map, MapKind, Register, Size, Test, Verdict

ENDS = struct.Struct("=16s2s2xI16s")
ROUTE = struct.Struct("=40sIII")
COUNT = struct.Struct("=QQ")
_PREFIX_SIZE = 20

EVERYTHING = bytes(_PREFIX_SIZE)
"""The key of the route with the shortest prefix."""

TAKES, OVER_IPV6 = 1, 2
"""Flags of a route: packets go to the peer this way; it is reached by IPv6."""

_THEIR_PORT, _THEIR_DEVICE, _OURS, _DEVICE, _ROOM, _FLAGS = 16, 20, 24, 40, 44, 48  # in a route
_SENT, _RECEIVED = 0, 8  # in a count


@dataclass(frozen=True, slots=True)
class Outside:
    """An IP version outside: its number in a frame, and where its header has what, in bytes.

    protocol   the number of what follows
    source     the sender's address, with the receiver's behind it
    room       how bpf_skb_adjust_room knows it
    """

    version: int
    ethernet: int
    header: int
    protocol: int
    source: int
    address: int
    room: int

    @property
    def size(self) -> int:
        """Bytes in front of a packet: this header and that of UDP."""
        return self.header + _UDP

    @property
    def in_key(self) -> int:
        """Where the 16 bytes of an address have this version's."""
        return 16 - self.address


_UDP = 8
_ETHERNET = 14
_HOPS = 64

# bpf_skb_adjust_room: at the packet's beginning; how segments are to be cut is left as it is; what is put in front,
# and what is left when the front is taken off.
_ROOM_MAC = 1
_FIXED_GSO, _ENCAP_IPV4, _ENCAP_IPV6, _ENCAP_UDP, _DECAP_IPV4, _DECAP_IPV6 = 1, 2, 4, 16, 128, 256
_TO_INGRESS = 1

_IPV4, _IPV6 = socket.htons(0x0800), socket.htons(0x86DD)

OUTSIDE = {
    4: Outside(4, _IPV4, 20, 9, 12, 4, _ENCAP_IPV4),
    6: Outside(6, _IPV6, 40, 6, 8, 16, _ENCAP_IPV6),
}

_LARGEST = 65535 - OUTSIDE[6].size
"""Bytes: what has a length that the headers outside can tell."""

_MOST_HEADERS = 40 + 60
"""Bytes that are taken to stand before the payload of a segment where it is not plain TCP."""

_MAPPED = socket.htonl(0xFFFF)
_LINK_LOCAL, _LINK_LOCAL_BITS = socket.htons(0xFE80), socket.htons(0xFFC0)
_FRAGMENT_BITS = socket.htons(0x3FFF)

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = Register

# On the stack, from its end downwards.
_KEY = -24  # of `routes`
_ENDS = -64  # of `counts`
_HEAD = -136  # headers: those that are put in front, or what is read of a packet
_FIRST = 20  # bytes of a packet inside that are looked at


def make_maps(most_routes: int, most_peers: int) -> tuple[Map, Map]:
    """Return the maps `routes` and `counts`. Raise KernelError."""
    routes = Map(MapKind.LPM_TRIE, _PREFIX_SIZE, ROUTE.size, most_routes, "gn_tun_routes")
    try:
        return routes, Map(MapKind.HASH, ENDS.size, COUNT.size, most_peers, "gn_tun_counts")
    except BaseException:
        routes.close()
        raise


def mapped(address: IPAddress) -> bytes:
    """Return an address in 16 bytes."""
    return bytes(10) + b"\xff\xff" + address.packed if isinstance(address, IPv4Address) else address.packed


def unmapped(address: bytes) -> IPAddress:
    """Return the address in 16 bytes."""
    whole = IPv6Address(address)
    return whole.ipv4_mapped or whole


def prefix(address: IPAddress, length: int) -> bytes:
    """Return the key of a prefix in `routes`."""
    return struct.pack("=I", length + 128 - address.max_prefixlen) + mapped(address)


# ---- pieces ---------------------------------------------------------------------------------------
def _key_of_packet(code: Assembly, offset: int, source: bool, missing: str) -> None:
    """Put the packet's source or destination into the key; R9 is the IP version, `offset` where the packet begins."""
    label = f"v6 {source} {offset} {missing}"
    code.store(R10, _KEY, 128)
    code.jump_if(R9, Test.EQUAL, 6, label)
    code.store(R10, _KEY + 4, 0)
    code.store(R10, _KEY + 8, 0)
    code.store(R10, _KEY + 12, _MAPPED)
    _load_bytes(code, offset + (12 if source else 16), _KEY + 16, 4, missing)
    code.jump(label + " done")
    code.label(label)
    _load_bytes(code, offset + (8 if source else 24), _KEY + 4, 16, missing)
    code.label(label + " done")


def _load_bytes(code: Assembly, offset: int, to: int, size: int, missing: str) -> None:
    """Copy bytes of the packet to the stack, or go on at `missing` if it ends before."""
    code.call(Helper.SKB_LOAD_BYTES, R6, offset, At(R10, to), size)
    code.jump_if(R0, Test.NOT_EQUAL, 0, missing)


def _look_up(code: Assembly, table: Map, base: Register, key: int, missing: str) -> None:
    code.call(Helper.MAP_LOOKUP_ELEM, table, At(base, key))
    code.jump_if(R0, Test.EQUAL, 0, missing)


def _copy(code: Assembly, base: Register, at: int, to: int, size: int) -> None:
    """Copy to the stack."""
    width, steps = (Size.WORD, 4) if size % 8 else (Size.DOUBLE, 8)
    for offset in range(0, size, steps):
        code.load(R1, base, at + offset, width)
        code.store(R10, to + offset, R1, width)


def _require(code: Assembly, at: int, size: Size, value: int, otherwise: str) -> None:
    """Go on at `otherwise` if the stack has not this value."""
    code.load(R1, R10, at, size)
    code.jump_if(R1, Test.NOT_EQUAL, value, otherwise)


def _endings(code: Assembly) -> Assembly:
    """Write the verdicts: the packet is not ours, or it is and cannot go on."""
    code.label("pass")
    code.leave(Verdict.NEXT)
    code.label("drop")
    code.leave(Verdict.DROP)
    return code


# ---- sending --------------------------------------------------------------------------------------
def sending(routes: Map, counts: Map, port: int, mark: int) -> Assembly:
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
    _look_up(code, routes, R10, _KEY, "pass")
    code.move(R7, R0)
    code.load(R1, R7, _FLAGS)
    code.jump_if(R1, Test.SET, TAKES, "takes")
    code.jump("pass")
    code.label("takes")
    # 2. does it fit?
    code.load(R8, R6, Field.LEN)
    code.jump_if(R8, Test.GREATER, _LARGEST, "pass")
    _size_on_the_way(code)
    code.load(R1, R7, _ROOM)
    code.jump_if(R2, Test.GREATER, R1, "pass")
    # 3. headers
    code.load(R1, R7, _FLAGS)
    code.jump_if(R1, Test.SET, OVER_IPV6, "over 6")
    for outside in OUTSIDE.values():
        code.label(f"over {outside.version}")
        (_write_ipv4 if outside.version == 4 else _write_ipv6)(code)
        code.store_bytes(R10, _HEAD + outside.header, port.to_bytes(2, "big"))
        code.load(R1, R7, _THEIR_PORT, Size.HALF)
        code.store(R10, _HEAD + outside.header + 2, R1, Size.HALF)
        code.move(R1, R8)
        code.add(R1, _UDP)
        code.swap(R1, 16)
        code.store(R10, _HEAD + outside.header + 4, R1, Size.HALF)
        code.store(R10, _HEAD + outside.header + 6, 0, Size.HALF)
        code.load(R9, R7, _DEVICE)
        _put_in_front(code, outside)
        if outside.version == 4:
            code.jump("out")
    # 4. count
    code.label("out")
    _look_up(code, counts, R7, 0, "drop")
    code.add_atomically(R0, _SENT, R8)
    # 5. out; the neighbour's address is written over an Ethernet header, which has to be there
    code.call(Helper.SKB_CHANGE_HEAD, R6, _ETHERNET, 0)
    code.jump_if(R0, Test.NOT_EQUAL, 0, "drop")
    code.move32(R1, mark)  # the context takes no constants
    code.store(R6, Field.MARK, R1)
    code.call(Helper.REDIRECT_NEIGH, R9, 0, 0, 0)
    code.leave()
    return _endings(code)


def _size_on_the_way(code: Assembly) -> None:
    """Put into R2 the size of the largest packet that this one is, or is still to be cut into."""
    code.move(R2, R8)
    code.load(R1, R6, Field.GSO_SIZE)
    code.jump_if(R1, Test.EQUAL, 0, "size")
    code.jump_if(R9, Test.EQUAL, 6, "segments 6")
    for inside in OUTSIDE.values():
        code.label(f"segments {inside.version}")
        _load_bytes(code, 0, _HEAD, inside.header + 20, "pass")
        if inside.version == 4:
            _require(code, _HEAD, Size.BYTE, 0x45, "segments")
        _require(code, _HEAD + inside.protocol, Size.BYTE, socket.IPPROTO_TCP, "segments")
        code.load(R2, R10, _HEAD + inside.header + 12, Size.BYTE)
        code.shift_right(R2, 2)
        code.bit_and(R2, 0x3C)  # the upper half of this byte counts words
        code.add(R2, inside.header)
        code.jump("add segment")
    code.label("segments")
    code.move(R2, _MOST_HEADERS)
    code.label("add segment")
    code.load(R1, R6, Field.GSO_SIZE)
    code.add(R2, R1)
    code.label("size")


def _write_ipv4(code: Assembly) -> None:
    """Write the header; its checksum is the sum of what is constant, both addresses and the length."""
    outside = OUTSIDE[4]
    constant = struct.pack(">BBHHHBBH", 0x45, 0, 0, 0, 0x4000, _HOPS, socket.IPPROTO_UDP, 0)
    code.store_bytes(R10, _HEAD, constant)
    code.move(R1, R8)
    code.add(R1, outside.size)
    code.swap(R1, 16)
    code.store(R10, _HEAD + 2, R1, Size.HALF)
    code.load(R2, R7, _OURS + outside.in_key)
    code.store(R10, _HEAD + 12, R2)
    code.load(R3, R7, outside.in_key)
    code.store(R10, _HEAD + 16, R3)
    code.add(R2, R3)
    code.add(R2, R1)
    code.add(R2, sum(struct.unpack("=6H", constant)))
    for bits in (32, 16, 16, 16):
        code.move(R3, R2)
        code.shift_right(R3, bits)
        if bits == 32:
            code.move32(R2, R2)
        else:
            code.bit_and(R2, 0xFFFF)
        code.add(R2, R3)
    code.bit_xor(R2, 0xFFFF)
    code.store(R10, _HEAD + 10, R2, Size.HALF)


def _write_ipv6(code: Assembly) -> None:
    code.store_bytes(R10, _HEAD, struct.pack(">IHBB", 6 << 28, 0, socket.IPPROTO_UDP, _HOPS))
    code.move(R1, R8)
    code.add(R1, _UDP)
    code.swap(R1, 16)
    code.store(R10, _HEAD + 4, R1, Size.HALF)
    _copy(code, R7, _OURS, _HEAD + 8, 16)
    _copy(code, R7, 0, _HEAD + 24, 16)


def _put_in_front(code: Assembly, outside: Outside) -> None:
    """Put headers from the stack in front; what fails behind the first step has left the packet changed.

    That step fails where the packet has come in headers between namespaces, which leaves a mark on it: no more are put
    around it, so that what goes from peer to peer there is the pump's.
    """
    flags = _FIXED_GSO | outside.room | _ENCAP_UDP
    code.call(Helper.SKB_ADJUST_ROOM, R6, outside.size, _ROOM_MAC, flags)
    code.jump_if(R0, Test.NOT_EQUAL, 0, "pass")
    code.call(Helper.SKB_STORE_BYTES, R6, 0, At(R10, _HEAD), outside.size, 0)
    code.jump_if(R0, Test.NOT_EQUAL, 0, "drop")


# ---- receiving ------------------------------------------------------------------------------------
def receiving(routes: Map, counts: Map, port: int, device: int, *, strict: bool, relays: bool) -> Assembly:
    """Return the program on the receiving side of network devices: R6 the packet, R7 the peer's counts, R8 the size."""
    code = Assembly()
    code.move(R6, R1)
    code.load(R1, R6, Field.PROTOCOL)
    code.jump_if(R1, Test.EQUAL, _IPV6, "over 6")
    code.jump_if(R1, Test.NOT_EQUAL, _IPV4, "pass")
    for outside in OUTSIDE.values():
        code.label(f"over {outside.version}")
        _receive_over(code, outside, routes, counts, port, strict, relays)
        code.label(f"strip {outside.version}")
        code.move(R2, -outside.size)
        if outside.version == 4:
            code.jump("strip")
    code.label("strip")
    code.move(R4, _FIXED_GSO | _DECAP_IPV4)
    code.jump_if(R9, Test.EQUAL, 4, "room")
    code.move(R4, _FIXED_GSO | _DECAP_IPV6)
    code.label("room")
    code.call(Helper.SKB_ADJUST_ROOM, R6, R2, _ROOM_MAC, R4)
    code.jump_if(R0, Test.NOT_EQUAL, 0, "drop")
    code.call(Helper.REDIRECT, device, R8)
    code.leave()
    return _endings(code)


def _receive_over(
    code: Assembly, outside: Outside, routes: Map, counts: Map, port: int, strict: bool, relays: bool
) -> None:
    """Look at one packet; go on behind this with R8 0 if it is for another peer, _TO_INGRESS if it is not."""
    udp, inside = _HEAD + outside.header, _HEAD + outside.size
    packet = _ETHERNET + outside.size
    # 1. UDP to our port, whole, without a checksum, from a peer, to the address that the peer knows
    _load_bytes(code, _ETHERNET, _HEAD, outside.size + _FIRST, "pass")
    if outside.version == 4:
        _require(code, _HEAD, Size.BYTE, 0x45, "pass")
        code.load(R1, R10, _HEAD + 6, Size.HALF)
        code.bit_and(R1, _FRAGMENT_BITS)
        code.jump_if(R1, Test.NOT_EQUAL, 0, "pass")
    _require(code, _HEAD + outside.protocol, Size.BYTE, socket.IPPROTO_UDP, "pass")
    _require(code, udp + 2, Size.HALF, socket.htons(port), "pass")
    _require(code, udp + 6, Size.HALF, 0, "pass")
    _write_ends(code, outside)
    _look_up(code, counts, R10, _ENDS, "pass")
    code.move(R7, R0)
    # 2. one packet of IP inside, as long as it says; a registration begins like one of IPv4 with options
    code.load(R8, R6, Field.LEN)
    code.subtract(R8, packet)
    code.load(R1, R10, inside, Size.BYTE)
    code.jump_if(R1, Test.EQUAL, ord("G"), "pass")
    code.move(R9, R1)
    code.shift_right(R9, 4)
    code.load(R2, R10, inside + 2, Size.HALF)
    code.swap(R2, 16)
    code.jump_if(R9, Test.EQUAL, 4, f"length {outside.version}")
    code.jump_if(R9, Test.NOT_EQUAL, 6, "pass")
    code.load(R2, R10, inside + 4, Size.HALF)
    code.swap(R2, 16)
    code.add(R2, OUTSIDE[6].header)
    code.label(f"length {outside.version}")
    code.jump_if(R2, Test.NOT_EQUAL, R8, "pass")
    # 3. may the peer send from there?
    if strict:
        _key_of_packet(code, packet, source=True, missing="pass")
        _look_up(code, routes, R10, _KEY, "drop")
        for at in range(0, ENDS.size, 8):
            code.load(R1, R0, at, Size.DOUBLE)
            code.load(R2, R10, _ENDS + at, Size.DOUBLE)
            code.jump_if(R1, Test.NOT_EQUAL, R2, "drop")
    code.add_atomically(R7, _RECEIVED, R8)
    # 4. for this host and what is behind it, or for another peer: then it leaves by the device again
    code.move(R8, _TO_INGRESS)
    if relays:
        _key_of_packet(code, packet, source=False, missing="pass")
        _look_up(code, routes, R10, _KEY, f"strip {outside.version}")
        code.move(R8, 0)


def _write_ends(code: Assembly, outside: Outside) -> None:
    """Write the key of who has sent what the stack has the headers of, and to which address."""
    for at, where in ((0, outside.source), (_OURS, outside.source + outside.address)):
        if outside.version == 4:
            code.store(R10, _ENDS + at, 0)
            code.store(R10, _ENDS + at + 4, 0)
            code.store(R10, _ENDS + at + 8, _MAPPED)
        _copy(code, R10, _HEAD + where, _ENDS + at + outside.in_key, outside.address)
    code.load(R1, R10, _HEAD + outside.header, Size.HALF)
    code.store(R10, _ENDS + _THEIR_PORT, R1, Size.HALF)
    code.store(R10, _ENDS + _THEIR_PORT + 2, 0, Size.HALF)
    code.store(R10, _ENDS + _THEIR_DEVICE, 0)
    if outside.version == 6:
        code.load(R1, R10, _HEAD + outside.source, Size.HALF)
        code.bit_and(R1, _LINK_LOCAL_BITS)
        code.jump_if(R1, Test.NOT_EQUAL, _LINK_LOCAL, "global")
        code.load(R1, R6, Field.IFINDEX)
        code.store(R10, _ENDS + _THEIR_DEVICE, R1)
        code.label("global")
