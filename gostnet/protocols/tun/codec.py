"""Datagrams between a TUN client and its server (GOST: handler/tun), both sides.

    data           an IP packet as it is: the first nibble is 4 or 6
    registration   "GOST" | passphrase(16, zero padded) | address(16) x N, N >= 1      client to server
    answer         "GOST" | address(16)                                                server to client
    offer          "GOST" | "gn-kernel" 01 | 0(6)                                      both ways

Addresses are those of IPv6, IPv4 ones mapped (::ffff:a.b.c.d). A registration names the client's addresses inside the
tunnel and is its keep-alive as well; the answer, of exactly 20 bytes, tells from which address it came.

The offer is gostnet's own: what comes now may have been put together by a kernel (kernel.tun_engine). A client sends it
behind a registration, the server in return, the client once more to confirm: then each knows that its own arrive. They
go as such packets do, without a checksum of UDP, so that they arrive where those would. Nobody else sees a difference:
GOST's server drops datagrams of 20 bytes, and its client is sent none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from ...core.address import IPAddress, parse_ip
from ...core.errors import ProtocolError

MAGIC = b"GOST"
PASSPHRASE_SIZE = 16
HEADER = len(MAGIC) + PASSPHRASE_SIZE
"""Bytes before the first address of a registration, and of a whole answer."""

OFFER = MAGIC + b"gn-kernel\x01" + bytes(6)

_MAPPED = bytes(10) + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Registration:
    """What a registration says; the passphrase without its padding."""

    passphrase: bytes
    addresses: tuple[IPAddress, ...]


def pack_address(address: IPAddress) -> bytes:
    """Return the 16 bytes of an address."""
    return address.packed if isinstance(address, IPv6Address) else _MAPPED + address.packed


def unpack_address(data: bytes) -> IPAddress:
    """Return the address in 16 bytes, a mapped one as IPv4."""
    return IPv4Address(data[12:]) if data[:12] == _MAPPED else IPv6Address(data)


def pack_passphrase(passphrase: str) -> bytes:
    """Return the 16 bytes of a passphrase: its beginning, or all of it and zeros."""
    return passphrase.encode("utf-8", "surrogateescape")[:PASSPHRASE_SIZE].ljust(PASSPHRASE_SIZE, b"\0")


def encode_registration(passphrase: str, addresses: Iterable[IPAddress]) -> bytes:
    """Return a registration. Raise ProtocolError without an address: it would be taken for an answer."""
    packed = b"".join(map(pack_address, addresses))
    if not packed:
        raise ProtocolError("a registration without an address")
    return MAGIC + pack_passphrase(passphrase) + packed


def decode_registration(datagram: bytes) -> Registration | None:
    """Return what a registration says, None for anything that is none or is cut in the middle of an address.

    A passphrase ends with its last byte that is not zero.
    """
    count, rest = divmod(len(datagram) - HEADER, 16)
    if count < 1 or rest or not datagram.startswith(MAGIC):
        return None
    addresses = tuple(unpack_address(datagram[start : start + 16]) for start in range(HEADER, len(datagram), 16))
    return Registration(datagram[len(MAGIC) : HEADER].rstrip(b"\0"), addresses)


def encode_answer(observed: str) -> bytes:
    """Return the answer to a registration that came from the IP address `observed`."""
    address = parse_ip(observed.partition("%")[0])
    return MAGIC + (pack_address(address) if address is not None else bytes(16))


def is_answer(datagram: bytes) -> bool:
    """Tell whether a datagram answers a registration; an offer does, too."""
    return len(datagram) == HEADER and datagram.startswith(MAGIC)


def decode_answer(datagram: bytes) -> IPAddress:
    """Return the address in an answer. Raise ProtocolError."""
    if not is_answer(datagram):
        raise ProtocolError(f"{len(datagram)} bytes are no answer to a registration")
    return unpack_address(datagram[len(MAGIC) :])
