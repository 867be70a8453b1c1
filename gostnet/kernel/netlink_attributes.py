"""Attributes of netlink messages, as all families of netlink have them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_HEADER = struct.Struct("=HH")
_TYPE = 0x3FFF
"""Without the flags for nested attributes and for network byte order."""


def attributes_of(body: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    """Yield type and payload of each attribute from `position` on: size(2) | type(2) | payload, filled up to 4 bytes.

    What does not make sense ends it.
    """
    while position + 4 <= len(body):
        size, kind = _HEADER.unpack_from(body, position)
        if size < 4:
            return
        yield kind & _TYPE, body[position + 4 : position + size]
        position += (size + 3) & ~3
