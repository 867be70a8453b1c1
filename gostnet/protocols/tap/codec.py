"""Datagrams between a TAP client and its server (GOST: handler/tap), both sides.

plain            an Ethernet frame as it is: destination(6) | source(6) | type(2) | ...
with a cipher    salt | AEAD(nonce 0){frame} | tag(16), salt as long as the key; the key of each datagram is
                 HKDF-SHA1(key, salt, "ss-subkey"), as packets of Shadowsocks have it

A frame to its own source is a loop test of Ethernet (type 90 00): a server that knows the source sends it back to
whom it came from, as any frame, so it tells a client that the server is there, and the server where the client is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ...core.errors import ConfigError, ProtocolError
from ...core.suggest import did_you_mean

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
class _Aead(Protocol):
    def encrypt(self, nonce: bytes, data: Buffer, associated_data: None) -> bytes: ...
    def decrypt(self, nonce: bytes, data: Buffer, associated_data: None) -> bytes: ...


_Make = Callable[[bytes], _Aead]
_METHODS: Final[dict[str, tuple[int, _Make]]] = {
    "aead_aes_128_gcm": (16, AESGCM),
    "aead_aes_256_gcm": (32, AESGCM),
    "aead_chacha20_poly1305": (32, ChaCha20Poly1305),
    "aes-128-gcm": (16, AESGCM),
    "aes-256-gcm": (32, AESGCM),
    "chacha20-ietf-poly1305": (32, ChaCha20Poly1305),
}
"""Names with the size of the key. Those of GOST's older Shadowsocks library, which `tap` has stayed with."""

NO_CIPHER: Final = "dummy"
TAG: Final = 16
_NONCE: Final = bytes(12)
_SHA1: Final = SHA1()


class PacketCipher:
    """Seals and opens datagrams of one key.

    salt_size   bytes of the salt that `seal` wants, fresh and random for each frame
    overhead    bytes that a datagram is longer than its frame
    """

    __slots__ = ("_key", "_make", "overhead", "salt_size")

    def __init__(self, make: _Make, key: bytes) -> None:
        self._make = make
        self._key = key
        self.salt_size = len(key)
        self.overhead = len(key) + TAG

    def seal(self, frame: Buffer, salt: bytes) -> bytes:
        """Return the datagram of a frame."""
        return salt + self._with(salt).encrypt(_NONCE, frame, None)

    def open(self, datagram: Buffer) -> bytes:
        """Return the frame in a datagram. Raise ProtocolError for one that was not sealed with this key."""
        size = self.salt_size
        if len(datagram) < size + TAG:
            raise ProtocolError(f"{len(datagram)} bytes are no sealed frame")
        try:
            return self._with(bytes(datagram[:size])).decrypt(_NONCE, datagram[size:], None)
        except InvalidTag:
            raise ProtocolError("a datagram that was sealed with another key") from None

    def _with(self, salt: bytes) -> _Aead:
        return self._make(HKDF(_SHA1, len(self._key), salt, b"ss-subkey").derive(self._key))


def cipher_of(method: str, password: str, key: str, path: str) -> PacketCipher | None:
    """Return the cipher `method` with a key, or with one made of the password; None for "" and "dummy".

    `key` counts by its bytes. Raise ConfigError below `path` for an unknown method, a key of the wrong size, or none.
    """
    name = method.lower()
    if name in ("", NO_CIPHER):
        return None
    if name not in _METHODS:
        known = sorted(_METHODS)
        wrong = f"{method[:64]!r} is not a cipher such as {known[0].upper()}{did_you_mean(name, known)}"
        raise ConfigError(f"{path}.auth.username", wrong, code="tap.cipher")
    size, make = _METHODS[name]
    if key:
        secret = key.encode()
        if len(secret) != size:
            wrong = f"a key of {method} has {size} bytes, not {len(secret)}"
            raise ConfigError(f"{path}.metadata.key", wrong, code="tap.cipher")
    elif password:
        secret = _derived(password.encode("utf-8", "surrogateescape"), size)
    else:
        # GOST: sends in the clear then.
        raise ConfigError(f"{path}.auth.password", f"cipher {method} needs a password", code="tap.cipher")
    return PacketCipher(make, secret)


def _derived(password: bytes, size: int) -> bytes:
    """Return the key that OpenSSL's EVP_BytesToKey makes with MD5, one round and no salt: what Shadowsocks uses."""
    found = last = b""
    while len(found) < size:
        last = hashlib.md5(last + password, usedforsecurity=False).digest()
        found += last
    return found[:size]
