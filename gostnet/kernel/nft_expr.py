"""The expressions of nftables: each term in the words of nft(8) and in the encoding that the kernel takes.

A rule is a sequence of terms. Every term goes through register 1 and leaves nothing behind in it that a later one
needs. Numbers of attributes and keys are those of linux/netfilter/nf_tables.h. Values that a program compares with a
number of the host (marks, conntrack state) sit in registers in the host's byte order, what comes out of packets in
network order.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_network
from typing import Literal, NamedTuple

NESTED = 0x8000
TCP, UDP = 6, 17
_PROTOCOLS = {TCP: "tcp", UDP: "udp"}
_RT_TCPMSS = 3
_TO_NETWORK_ORDER = 1
_TCP_OPTION = 1
_MAXSEG = 2

_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_META_MARK, _META_IIFNAME, _META_OIFNAME, _META_NFPROTO, _META_L4PROTO = 3, 6, 7, 15, 16
_CT_DIRECTION, _CT_STATUS, _CT_MARK = 1, 2, 3
_SOCKET_TRANSPARENT, _SOCKET_WILDCARD = 0, 2
_FIB_DADDR, _FIB_MARK = 0x2, 0x4
_DROP, _ACCEPT, _JUMP, _GOTO, _RETURN = 0, 1, -3, -4, -5


class Term(NamedTuple):
    """A match or a statement."""

    text: str
    code: bytes


def compose(*terms: Term) -> Term:
    """Put terms in a row."""
    return Term(" ".join(term.text for term in terms if term.text), b"".join(term.code for term in terms))


# ---- encoding -----------------------------------------------------------------------------------
def tlv(kind: int, payload: bytes) -> bytes:
    """Encode one netlink attribute, padded to 4 bytes."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def u32(kind: int, number: int) -> bytes:
    """Encode an attribute that holds a number; nftables wants it in network order."""
    return struct.pack("=HH", 8, kind) + struct.pack("!I", number & 0xFFFFFFFF)


def value(kind: int, payload: bytes) -> bytes:
    """Encode an attribute that holds data for a register."""
    return tlv(NESTED | kind, tlv(1, payload))


def name_attribute(kind: int, name: str) -> bytes:
    """Encode an attribute that holds a name."""
    return tlv(kind, name.encode() + b"\0")


def host(number: int) -> bytes:
    """Encode a number as registers hold it, in the host's byte order."""
    return struct.pack("=I", number)


def _expression(name: str, *attributes: bytes) -> bytes:
    return tlv(NESTED | 1, name_attribute(1, name) + tlv(NESTED | 2, b"".join(attributes)))


def _meta(key: int) -> bytes:
    return _expression("meta", u32(2, key), u32(1, 1))


def _ct(key: int) -> bytes:
    return _expression("ct", u32(2, key), u32(1, 1))


def _payload(base: int, offset: int, size: int) -> bytes:
    return _expression("payload", u32(1, 1), u32(2, base), u32(3, offset), u32(4, size))


def _compare(data: bytes, *, negate: bool = False) -> bytes:
    return _expression("cmp", u32(1, 1), u32(2, int(negate)), value(3, data))


def _range(low: bytes, high: bytes) -> bytes:
    return _expression("range", u32(1, 1), u32(2, 0), value(3, low), value(4, high))


def _bits(mask: bytes, flip: bytes | None = None) -> bytes:
    flip = bytes(len(mask)) if flip is None else flip
    return _expression("bitwise", u32(1, 1), u32(2, 1), u32(3, len(mask)), value(4, mask), value(5, flip))


def _load(data: bytes, register: int = 1) -> bytes:
    return _expression("immediate", u32(1, register), value(2, data))


def _lookup(name: str, *, negate: bool = False) -> bytes:
    return _expression("lookup", name_attribute(1, name), u32(2, 1), u32(5, 1) if negate else b"")


# ---- matches ------------------------------------------------------------------------------------
def ip_version(version: int) -> Term:
    """Match packets of IPv4 or IPv6."""
    return Term(f"meta nfproto ipv{version}", _meta(_META_NFPROTO) + _compare(b"\x02" if version == 4 else b"\x0a"))


def protocol(number: int) -> Term:
    """Match TCP or UDP."""
    return Term(f"meta l4proto {_PROTOCOLS[number]}", _meta(_META_L4PROTO) + _compare(bytes([number])))


def enters_by(interface: str, *, negate: bool = False) -> Term:
    """Match packets by the name of the interface they came in by, which need not exist, or those of another one."""
    code = _meta(_META_IIFNAME) + _compare(interface.encode().ljust(16, b"\0"), negate=negate)
    return Term(f'iifname {"!= " if negate else ""}"{interface}"', code)


def leaves_by(interface: str, *, negate: bool = False) -> Term:
    """Match packets by the name of the interface they will leave by, or those that leave by another."""
    code = _meta(_META_OIFNAME) + _compare(interface.encode().ljust(16, b"\0"), negate=negate)
    return Term(f'oifname {"!= " if negate else ""}"{interface}"', code)


def mark(number: int, mask: int, *, negate: bool = False) -> Term:
    """Match `mark & mask`, the packet's."""
    relation = "!=" if negate else "=="
    code = _meta(_META_MARK) + _bits(host(mask)) + _compare(host(number), negate=negate)
    return Term(f"meta mark & {mask:#010x} {relation} {number:#010x}", code)


def connection_mark(bit: int, *, negate: bool = False) -> Term:
    """Match packets of connections whose conntrack mark has this bit, or has not; never one that is not tracked."""
    code = _ct(_CT_MARK) + _bits(host(bit)) + _compare(host(bit), negate=negate)
    return Term(f"ct mark & {bit:#010x} {'!=' if negate else '=='} {bit:#010x}", code)


def reply() -> Term:
    """Match packets that go against the direction in which their connection began; never one that is not tracked."""
    return Term("ct direction reply", _ct(_CT_DIRECTION) + _compare(b"\x01"))


def translated() -> Term:
    """Match packets of connections that have had their destination changed."""
    status = 1 << 5  # IPS_DST_NAT
    return Term("ct status dnat", _ct(_CT_STATUS) + _bits(host(status)) + _compare(host(0), negate=True))


def first_segment() -> Term:
    """Match the TCP segment that opens a connection: SYN without ACK, FIN and RST."""
    code = _meta(_META_L4PROTO) + _compare(bytes([TCP])) + _payload(_TRANSPORT_HEADER, 13, 1)
    return Term("tcp flags & (fin | syn | rst | ack) == syn", code + _bits(b"\x17") + _compare(b"\x02"))


def address_type_in(set_name: str) -> Term:
    """Match packets by what the destination is to this host (local, broadcast, ...)."""
    return Term(f"fib daddr type @{set_name}", _expression("fib", u32(1, 1), u32(2, 3), u32(3, 2)) + _lookup(set_name))


def routed_into(interface: str) -> Term:
    """Match packets whose destination is routed to an interface, their mark considered."""
    code = _expression("fib", u32(1, 1), u32(2, 2), u32(3, _FIB_DADDR | _FIB_MARK))
    return Term(f'fib daddr . mark oifname "{interface}"', code + _compare(interface.encode().ljust(16, b"\0")))


def _address(version: int, side: Literal["saddr", "daddr"]) -> tuple[str, bytes]:
    offset, size = {4: (12, 4), 6: (8, 16)}[version]
    if side == "daddr":
        offset += size
    word = "ip" if version == 4 else "ip6"
    return f"{word} {side}", ip_version(version).code + _payload(_NETWORK_HEADER, offset, size)


def address_in(side: Literal["saddr", "daddr"], version: int, set_name: str, *, negate: bool = False) -> Term:
    """Match packets of one IP version by an address in a set, or not in it."""
    text, code = _address(version, side)
    return Term(f"{text} {'!= ' if negate else ''}@{set_name}", code + _lookup(set_name, negate=negate))


def source_within(network: str) -> Term:
    """Match packets of the network's IP version from a source within it."""
    return _within(network, "saddr")


def destination_within(network: str) -> Term:
    """Match packets of the network's IP version to a destination within it."""
    return _within(network, "daddr")


def _within(network: str, side: Literal["saddr", "daddr"]) -> Term:
    net = ip_network(network)
    text, code = _address(net.version, side)
    return Term(f"{text} {net}", code + _bits(net.netmask.packed) + _compare(net.network_address.packed))


def port_in(number: int, set_name: str, *, negate: bool = False) -> Term:
    """Match packets of TCP or UDP by a destination port in a set, or not in it."""
    code = protocol(number).code + _payload(_TRANSPORT_HEADER, 2, 2) + _lookup(set_name, negate=negate)
    return Term(f"{_PROTOCOLS[number]} dport {'!= ' if negate else ''}@{set_name}", code)


def port_is(number: int, port: int) -> Term:
    """Match packets of TCP or UDP by their destination port."""
    code = protocol(number).code + _payload(_TRANSPORT_HEADER, 2, 2) + _compare(struct.pack("!H", port))
    return Term(f"{_PROTOCOLS[number]} dport {port}", code)


def udp_between(low: int, high: int) -> Term:
    """Match UDP packets whose ports both are within a range."""
    bounds = struct.pack("!H", low), struct.pack("!H", high)
    ports = [_payload(_TRANSPORT_HEADER, offset, 2) + _range(*bounds) for offset in (0, 2)]
    return Term(f"udp sport {low}-{high} udp dport {low}-{high}", protocol(UDP).code + b"".join(ports))


def transparent_connection() -> Term:
    """Match packets for an established socket that is transparent.

    Listening sockets on the wildcard address are left out; so are, by the kernel's own restriction, sockets that are
    not whole yet or any more (a handshake, TIME_WAIT).
    """
    code = b"".join(
        _expression("socket", u32(1, key), u32(2, 1)) + _compare(bytes([wanted]))
        for key, wanted in ((_SOCKET_WILDCARD, 0), (_SOCKET_TRANSPARENT, 1))
    )
    return Term("socket wildcard 0 socket transparent 1", code)


# ---- statements ---------------------------------------------------------------------------------
def count() -> Term:
    """Count packets and bytes."""
    return Term("counter", _expression("counter"))


def set_mark(number: int, mask: int) -> Term:
    """Set the bits of `mask` in the packet's mark to those of `number`."""
    keep = ~mask & 0xFFFFFFFF
    code = _meta(_META_MARK) + _bits(host(keep), host(number & mask))
    return Term(
        f"meta mark set meta mark & {keep:#010x} | {number & mask:#010x}",
        code + _expression("meta", u32(2, _META_MARK), u32(3, 1)),
    )


def set_connection_mark(bit: int) -> Term:
    """Set one bit of the connection's mark."""
    code = _ct(_CT_MARK) + _bits(host(~bit & 0xFFFFFFFF), host(bit))
    return Term(f"ct mark set ct mark | {bit:#010x}", code + _expression("ct", u32(2, _CT_MARK), u32(4, 1)))


def hand_over(port: int, address: str = "") -> Term:
    """Give the packet to the transparent socket on a port of this host (tproxy).

    An established socket comes first. With an address the packet must be of its IP version.
    """
    load = _load(struct.pack("!H", port))
    if not address:
        return Term(f"tproxy to :{port}", load + _expression("tproxy", u32(1, 0), u32(3, 1)))
    word, family, packed, shown = _target(address)
    load += _load(packed, 2)
    code = load + _expression("tproxy", u32(1, family), u32(2, 2), u32(3, 1))
    return Term(f"tproxy {word} to {shown}:{port}", code)


def redirect(port: int, address: str = "") -> Term:
    """Change the destination to a port of this host, at the incoming interface's address or at the one given."""
    load = _load(struct.pack("!H", port))
    if not address:
        return Term(f"redirect to :{port}", load + _expression("redir", u32(1, 1)))
    word, family, packed, shown = _target(address)
    load += _load(packed, 2)
    code = load + _expression("nat", u32(1, 1), u32(2, family), u32(3, 2), u32(5, 1))
    return Term(f"dnat {word} to {shown}:{port}", code)


def _target(address: str) -> tuple[str, int, bytes, str]:
    parsed = ip_address(address)
    if parsed.version == 4:
        return "ip", 2, parsed.packed, str(parsed)
    return "ip6", 10, parsed.packed, f"[{parsed}]"


def masquerade() -> Term:
    """Change the source to the address of the interface that the packet leaves by."""
    return Term("masquerade", _expression("masq"))


def clamp_segments() -> Term:
    """Lower the segment size in a SYN to what the MTU of the route, and of that of the way back, lets through.

    Register 1 holds it in the host's order, the option is written at its offset 2 (RFC 9293 section 3.2).
    """
    syn = _meta(_META_L4PROTO) + _compare(bytes([TCP])) + _payload(_TRANSPORT_HEADER, 13, 1)
    code = syn + _bits(b"\x06") + _compare(b"\x02") + _expression("rt", u32(1, 1), u32(2, _RT_TCPMSS))
    code += _expression("byteorder", u32(1, 1), u32(2, 1), u32(3, _TO_NETWORK_ORDER), u32(4, 2), u32(5, 2))
    code += _expression("exthdr", u32(7, 1), tlv(2, bytes([_MAXSEG])), u32(3, 2), u32(4, 2), u32(6, _TCP_OPTION))
    return Term("tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu", code)


def accept() -> Term:
    """End this hook's base chain; other tables still see the packet."""
    return Term("accept", _verdict(_ACCEPT))


def drop() -> Term:
    """Drop the packet."""
    return Term("drop", _verdict(_DROP))


def back() -> Term:
    """Go on behind the jump that led here."""
    return Term("return", _verdict(_RETURN))


def jump(chain: str) -> Term:
    """Go on in another chain, and come back at its end."""
    return Term(f"jump {chain}", _verdict(_JUMP, chain))


def goto(chain: str) -> Term:
    """Go on in another chain, for good."""
    return Term(f"goto {chain}", _verdict(_GOTO, chain))


def _verdict(number: int, chain: str = "") -> bytes:
    target = name_attribute(2, chain) if chain else b""
    return _expression("immediate", u32(1, 0), tlv(NESTED | 2, tlv(NESTED | 2, u32(1, number) + target)))
