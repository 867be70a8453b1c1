"""The value of the fields `Gost-Target` and `X-Gost-Target`: a host name, hidden from the casual eye.

    base64url( CRC-32 of the name (4 bytes, big endian), base64url( name ) )        both without padding

GOST: x/handler/http/util.go.
"""

from __future__ import annotations

import base64
import re
import zlib

_ALPHABET = re.compile(rb"[A-Za-z0-9_-]*").fullmatch


def _decode(text: bytes) -> bytes | None:
    if _ALPHABET(text) is None or len(text) % 4 == 1:
        return None
    return base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def encode_target(name: bytes) -> bytes:
    """Return the field's value for `name`, which may carry a port."""
    return _encode(zlib.crc32(name).to_bytes(4, "big") + _encode(name))


def decode_target(value: bytes) -> bytes | None:
    """Return the name in `value`, None for a value that is damaged or something else: it counts as absent."""
    outer = _decode(value)
    if outer is None or len(outer) < 4:
        return None
    name = _decode(outer[4:])
    if name is None or zlib.crc32(name) != int.from_bytes(outer[:4], "big"):
        return None
    return name
