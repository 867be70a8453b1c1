"""Datagrams between a TAP client and its server (GOST: handler/tap), both sides.

plain            an Ethernet frame as it is: destination(6) | source(6) | type(2) | ...
with a cipher    a packet of Shadowsocks whose payload is the frame (wire.shadowsocks_packet)

A frame to its own source is a loop test of Ethernet (type 90 00): a server that knows the source sends it back to
whom it came from, as any frame, so it tells a client that the server is there, and the server where the client is.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from ...core.errors import ConfigError
from ...core.suggest import did_you_mean
from ...wire.shadowsocks_packet import METHODS, PacketCipher, derived_key

Buffer: TypeAlias = bytes | bytearray | memoryview

HEADER: Final = 14
"""Bytes before a frame's payload."""

ADDRESS: Final = 6

_LOOP_TEST: Final = b"\x90\x00"
_SHORTEST: Final = 60
"""Bytes of the shortest frame on a wire, without its checksum."""


def is_group(address: Buffer) -> bool:
    """Tell whether a hardware address is that of many: multicast or broadcast."""
    return bool(address[0] & 1)


def loop_test(address: bytes) -> bytes:
    """Return the frame that comes back to its sender, of an address that nobody else has."""
    # Skip count 0, function 1 (reply), receipt number 0: little endian, two bytes each.
    return (address + address + _LOOP_TEST + b"\0\0\1\0\0\0").ljust(_SHORTEST, b"\0")


def is_loop_test(frame: Buffer) -> bool:
    """Tell whether a frame is to be sent back to whom it came from."""
    return frame[12:14] == _LOOP_TEST and frame[:6] == frame[6:12]


# ---- ciphers ------------------------------------------------------------------------------------
NO_CIPHER: Final = "dummy"


def cipher_of(method: str, password: str, key: str, path: str) -> PacketCipher | None:
    """Return the cipher `method` with a key, or with one made of the password; None for "" and "dummy".

    `key` counts by its bytes. Raise ConfigError below `path` for an unknown method, a key of the wrong size, or none.
    """
    name = method.lower()
    if name in ("", NO_CIPHER):
        return None
    if name not in METHODS:
        known = sorted(METHODS)
        wrong = f"{method[:64]!r} is not a cipher such as {known[0].upper()}{did_you_mean(name, known)}"
        raise ConfigError(f"{path}.auth.username", wrong, code="tap.cipher")
    size = METHODS[name].key_size
    if key:
        secret = key.encode()
        if len(secret) != size:
            wrong = f"a key of {method} has {size} bytes, not {len(secret)}"
            raise ConfigError(f"{path}.metadata.key", wrong, code="tap.cipher")
    elif password:
        secret = derived_key(password.encode("utf-8", "surrogateescape"), size)
    else:
        # GOST: sends in the clear then.
        raise ConfigError(f"{path}.auth.password", f"cipher {method} needs a password", code="tap.cipher")
    return PacketCipher(METHODS[name], secret)
