"""Packets of Shadowsocks (SIP004, AEAD ciphers): each one is sealed by itself.

    salt | AEAD(nonce 0){payload} | tag(16)

The salt is as long as the key; the key of each packet is HKDF-SHA1(key, salt, "ss-subkey").
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..core.errors import ProtocolError

Buffer: TypeAlias = bytes | bytearray | memoryview


class _Aead(Protocol):
    def encrypt(self, nonce: bytes, data: Buffer, associated_data: None) -> bytes: ...
    def decrypt(self, nonce: bytes, data: Buffer, associated_data: None) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Method:
    """A cipher: the size of its key in bytes, and what makes it of a key."""

    key_size: int
    make: Callable[[bytes], _Aead]


_AES_128, _AES_256, _CHACHA20 = Method(16, AESGCM), Method(32, AESGCM), Method(32, ChaCha20Poly1305)

METHODS: Final[Mapping[str, Method]] = {
    "aead_aes_128_gcm": _AES_128,
    "aead_aes_256_gcm": _AES_256,
    "aead_chacha20_poly1305": _CHACHA20,
    "aes-128-gcm": _AES_128,
    "aes-256-gcm": _AES_256,
    "chacha20-ietf-poly1305": _CHACHA20,
}
"""By name in lower case; those with AEAD in front are of GOST's older library, which knows the others as well."""

TAG: Final = 16
_NONCE: Final = bytes(12)
_SHA1: Final = SHA1()


class PacketCipher:
    """Seals and opens packets of one key.

    salt_size   bytes of the salt that `seal` wants, fresh and random for each packet
    overhead    bytes that a packet is longer than its payload
    """

    __slots__ = ("_key", "_make", "overhead", "salt_size")

    def __init__(self, method: Method, key: bytes) -> None:
        """`key` has the method's size."""
        assert len(key) == method.key_size
        self._make = method.make
        self._key = key
        self.salt_size = len(key)
        self.overhead = len(key) + TAG

    def seal(self, payload: Buffer, salt: bytes) -> bytes:
        """Return the packet of a payload."""
        return salt + self._with(salt).encrypt(_NONCE, payload, None)

    def open(self, packet: Buffer) -> bytes:
        """Return the payload of a packet. Raise ProtocolError for one that was not sealed with this key."""
        size = self.salt_size
        if len(packet) < size + TAG:
            raise ProtocolError(f"{len(packet)} bytes are no sealed packet")
        try:
            return self._with(bytes(packet[:size])).decrypt(_NONCE, packet[size:], None)
        except InvalidTag:
            raise ProtocolError("a packet that was sealed with another key") from None

    def _with(self, salt: bytes) -> _Aead:
        return self._make(HKDF(_SHA1, len(self._key), salt, b"ss-subkey").derive(self._key))


def derived_key(password: bytes, size: int) -> bytes:
    """Return the key that OpenSSL's EVP_BytesToKey makes with MD5, one round and no salt: what Shadowsocks uses."""
    found = last = b""
    while len(found) < size:
        last = hashlib.md5(last + password, usedforsecurity=False).digest()
        found += last
    return found[:size]
