"""The SOCKS address: ATYP, address, port. Used by SOCKS5, UDP-tun frames, GOST relay and shadowsocks.

    01 | 4 bytes IPv4 | port    03 | length | name | port    04 | 16 bytes IPv6 | port

RFC 1928 section 5; the port is big endian.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from ..core.address import Endpoint, parse_ip
from ..core.errors import ProtocolError
from ..core.sansio import Handshake, Read

IPV4: Final = 1
NAME: Final = 3
IPV6: Final = 4

ZERO: Final = b"\x01\0\0\0\0\0\0"
"""0.0.0.0:0, what stands where there is no address to tell."""

EMPTY_IPV4: Final = b"\x01\0\0\0\0"
"""ATYP and address that SOCKS5 writes for an empty host."""

EMPTY_NAME: Final = b"\x03\0"
"""ATYP and address that GOST relay writes for an empty host."""

MAX_SIZE: Final = 1 + 1 + 255 + 2
"""Bytes of the longest address."""


def encode_address(endpoint: Endpoint, empty: bytes = EMPTY_IPV4) -> bytes:
    """Encode ATYP, address and port; `empty` stands for the host "".

    Names are written as they are (no IDNA), an IPv6 address with a zone as a name. Raise ProtocolError for a name of
    more than 255 bytes.
    """
    host, port = endpoint
    return (_encode_host(host) if host else empty) + port.to_bytes(2, "big")


# Hosts repeat more than ports: the proxy's own in replies, a few targets in datagrams.
@lru_cache(maxsize=4096)
def _encode_host(host: str) -> bytes:
    if ":" in host:
        ip = parse_ip(host)
        if ip is not None and getattr(ip, "scope_id", None) is None:
            return (b"\x01" if ip.version == 4 else b"\x04") + ip.packed
    elif len(parts := host.split(".")) == 4:
        try:
            packed = bytes(map(int, parts))
        except ValueError:
            pass
        else:
            # Only the usual spelling is an address: 010.0.0.1 or " 1.0.0.1" are names.
            if ipv4_text(packed) == host:
                return b"\x01" + packed
    try:
        name = host.encode()
    except UnicodeEncodeError as exc:
        raise ProtocolError(f"{host[:64]!r} is not a name") from exc
    if len(name) > 255:
        raise ProtocolError(f"a name of {len(name)} bytes, at most 255 are possible")
    return bytes((NAME, len(name))) + name


def rest_size(kind: int, first: int) -> int:
    """Return how many bytes follow ATYP and the first byte of the address, which a reader has asked for together.

    Raise ProtocolError for another ATYP: the end of such an address is not known.
    """
    if kind == IPV4:
        return 5
    if kind == NAME:
        return first + 2
    if kind == IPV6:
        return 17
    raise ProtocolError(f"address type {kind}, expected 1, 3 or 4")


def address_end(data: bytes, start: int = 0) -> int:
    """Return where the address at `start` ends, 0 while fewer than its first two bytes are in `data`.

    The end may lie beyond the end of `data`. Raise ProtocolError for an unknown ATYP.
    """
    if len(data) < start + 2:
        return 0
    return start + 2 + rest_size(data[start], data[start + 1])


def decode_address(data: bytes) -> Endpoint:
    """Decode a whole address, nothing before or after it.

    An empty name is the host "". Raise ProtocolError for another length, an unknown ATYP, and for a name that is not
    printable UTF-8 without blanks: it could only serve to confuse what writes it into a header, a query or a log.
    """
    size = len(data)
    if size < 2 or 2 + rest_size(data[0], data[1]) != size:
        raise ProtocolError(f"an address of {size} bytes that do not belong together: {data[:64]!r}")
    kind = data[0]
    port = data[-2] << 8 | data[-1]
    if kind == IPV4:
        return Endpoint(f"{data[1]}.{data[2]}.{data[3]}.{data[4]}", port)
    if kind == IPV6:
        return Endpoint(ipv6_text(data[1:17]), port)
    return Endpoint(decode_name(data[2:-2]), port)


def decode_name(raw: bytes) -> str:
    """Decode the host of a request: a name, or an address written out, in its usual form. Raise ProtocolError."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as exc:
        raise ProtocolError(f"{raw[:64]!r} is not a name") from exc
    if not text.isprintable() or " " in text:
        raise ProtocolError(f"{raw[:64]!r} is not a name")
    if ":" in text and (ip := parse_ip(text)) is not None:
        return str(ip)
    return text


def read_address() -> Handshake[Endpoint]:
    """Read ATYP, address and port. Raise ProtocolError as `decode_address` does."""
    head: bytes = yield Read(2)
    rest: bytes = yield Read(rest_size(head[0], head[1]))
    return decode_address(head + rest)


def ipv4_text(packed: bytes) -> str:
    """Write four bytes as an address."""
    return f"{packed[0]}.{packed[1]}.{packed[2]}.{packed[3]}"


@lru_cache(maxsize=4096)
def ipv6_text(packed: bytes) -> str:
    """Write sixteen bytes as an address in the form of RFC 5952, an IPv4-mapped one as IPv4."""
    if packed[:12] == b"\0\0\0\0\0\0\0\0\0\0\xff\xff":
        return ipv4_text(packed[12:])
    groups = [packed[index] << 8 | packed[index + 1] for index in range(0, 16, 2)]
    # The longest run of zero groups, the first one of equals, two groups at least.
    best_start, best_size, start = -1, 1, -1
    for index, group in enumerate((*groups, 1)):
        if group:
            if start >= 0 and index - start > best_size:
                best_start, best_size = start, index - start
            start = -1
        elif start < 0:
            start = index
    if best_start < 0:
        return ":".join(f"{group:x}" for group in groups)
    before = ":".join(f"{group:x}" for group in groups[:best_start])
    after = ":".join(f"{group:x}" for group in groups[best_start + best_size :])
    return f"{before}::{after}"
