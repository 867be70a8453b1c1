"""QUIC Initial packets of clients: the ClientHello inside, gathered over packets and datagrams. No I/O.

Initial packets are sealed with keys that follow from a connection ID which stands in them (RFC 9001 section 5.2, for
version 2 RFC 9369 section 3), so whoever sees the packet can read it.

    1 1 TT RR PP | version (4) | length, DCID | length, SCID | length, token | length | packet number (1..4) | payload

Lengths of token and packet are variable-length integers (RFC 9000 section 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from ..core.errors import ProtocolError
from .client_hello import CLIENT_HELLO, MAX_HELLO, ClientHello, parse_client_hello

MAX_FRAMES: Final = 256
"""Pieces of a hello that are kept: browsers cut it into a dozen at most."""

_PADDING, _PING, _ACK, _ACK_ECN, _CRYPTO = 0x00, 0x01, 0x02, 0x03, 0x06


class _Version(NamedTuple):
    salt: bytes
    initial: int
    prefix: bytes


_VERSIONS: Final = {
    0x00000001: _Version(bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a"), 0, b"quic"),
    0x6B3343CF: _Version(bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"), 1, b"quicv2"),
    0xFF00001D: _Version(bytes.fromhex("afbfec289993d24c9e9786f19c6111e04390a899"), 0, b"quic"),
}
"""Version 1, version 2, draft 29. Salt, packet type of Initial, beginning of the labels."""


@dataclass(frozen=True, slots=True)
class _Keys:
    aead: AESGCM
    iv: bytes
    header: Cipher[modes.ECB]

    @classmethod
    def of(cls, version: _Version, connection: bytes) -> _Keys:
        extract = HMAC(version.salt, SHA256())
        extract.update(connection)
        secret = _expand(extract.finalize(), b"client in", 32)
        key = _expand(secret, version.prefix + b" key", 16)
        mask = _expand(secret, version.prefix + b" hp", 16)
        return cls(AESGCM(key), _expand(secret, version.prefix + b" iv", 12), Cipher(algorithms.AES(mask), modes.ECB()))


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label with an empty context (RFC 8446 section 7.1)."""
    full = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes((len(full),)) + full + b"\x00"
    return HKDFExpand(SHA256(), size, info).derive(secret)


class InitialReader:
    """Gathers the ClientHello of one client from its first datagrams."""

    __slots__ = ("_connection", "_keys", "_pieces")

    def __init__(self) -> None:
        self._connection = b""
        self._keys: _Keys | None = None
        self._pieces: dict[int, bytes] = {}

    def feed(self, datagram: bytes) -> ClientHello | None:
        """Return the hello once `datagram` completes it, None when more must come.

        Raise ProtocolError for a datagram that holds no Initial packet of a client in a version known here.
        """
        position = found = 0
        while position < len(datagram) and datagram[position] & 0x80:
            end, initial = self._packet(datagram, position)
            found += initial
            position = end
        if not found:
            raise ProtocolError("not a QUIC Initial packet")
        return self._gathered()

    def _packet(self, datagram: bytes, start: int) -> tuple[int, bool]:
        """Take one packet of a datagram; return its end, and whether it was an Initial."""
        version = _VERSIONS.get(int.from_bytes(datagram[start + 1 : start + 5], "big"))
        if version is None or not datagram[start] & 0x40:
            raise ProtocolError("not a QUIC packet of a known version")
        position = start + 5
        connection, position = _vector(datagram, position, 20)
        _, position = _vector(datagram, position, 20)
        initial = datagram[start] >> 4 & 3 == version.initial
        if initial:
            size, position = _integer(datagram, position)
            position += size  # the token
        size, position = _integer(datagram, position)
        end = position + size
        if end > len(datagram):
            raise ProtocolError("a QUIC packet that is cut off")
        if initial:
            self._open(version, connection, datagram[start:end], position - start)
        return end, initial

    def _open(self, version: _Version, connection: bytes, packet: bytes, at: int) -> None:
        """Take protection off `packet`, whose number stands at `at`, and keep its CRYPTO frames."""
        if self._keys is None or connection != self._connection:
            # A Retry changes the ID and with it the keys; what was gathered counts on (RFC 9001 section 5.2).
            self._keys, self._connection = _Keys.of(version, connection), connection
        keys = self._keys
        sample = packet[at + 4 : at + 20]
        if len(sample) < 16:
            raise ProtocolError("a QUIC packet that is too short")
        mask = keys.header.encryptor().update(sample)
        first = packet[0] ^ (mask[0] & 0x0F)
        width = (first & 3) + 1
        number = bytes(byte ^ mask[1 + index] for index, byte in enumerate(packet[at : at + width]))
        head = bytes((first,)) + packet[1:at] + number
        nonce = (int.from_bytes(keys.iv, "big") ^ int.from_bytes(number, "big")).to_bytes(12, "big")
        try:
            payload = keys.aead.decrypt(nonce, packet[at + width :], head)
        except InvalidTag as exc:
            raise ProtocolError("a QUIC packet that its own keys do not open") from exc
        self._frames(payload)

    def _frames(self, payload: bytes) -> None:
        position = 0
        while position < len(payload):
            kind = payload[position]
            position += 1
            if kind in (_PADDING, _PING):
                continue
            if kind in (_ACK, _ACK_ECN):
                # largest, delay, count of ranges, first range; a gap and a length for each range; three counters
                values = [0, 0, 0, 0]
                for index in range(4):
                    values[index], position = _integer(payload, position)
                for _ in range(min(2 * values[2], len(payload)) + (3 if kind == _ACK_ECN else 0)):
                    _, position = _integer(payload, position)
                continue
            if kind != _CRYPTO:
                return  # CONNECTION_CLOSE; nothing else may stand here (RFC 9000 section 12.4)
            offset, position = _integer(payload, position)
            piece, position = _long_vector(payload, position)
            if offset + len(piece) > MAX_HELLO or len(self._pieces) >= MAX_FRAMES:
                raise ProtocolError("a ClientHello in QUIC that is too large")
            if len(piece) > len(self._pieces.get(offset, b"")):
                self._pieces[offset] = piece

    def _gathered(self) -> ClientHello | None:
        """Return the hello if its pieces are all there."""
        hello = bytearray()
        for offset in sorted(self._pieces):
            if offset > len(hello):
                break
            hello[offset:] = self._pieces[offset] + hello[offset + len(self._pieces[offset]) :]
        if hello and hello[0] != CLIENT_HELLO:
            raise ProtocolError("a QUIC handshake that does not begin with a ClientHello")
        if len(hello) < 4:
            return None
        size = 4 + int.from_bytes(hello[1:4], "big")
        if size > MAX_HELLO:
            raise ProtocolError(f"a ClientHello of {size} bytes")
        return parse_client_hello(bytes(hello[:size])) if len(hello) >= size else None


def _integer(data: bytes, position: int) -> tuple[int, int]:
    """Return a variable-length integer and where it ends (RFC 9000 section 16)."""
    if position >= len(data):
        raise ProtocolError("a QUIC packet that is cut off")
    width = 1 << (data[position] >> 6)
    end = position + width
    if end > len(data):
        raise ProtocolError("a QUIC packet that is cut off")
    return int.from_bytes(data[position:end], "big") & ((1 << (8 * width - 2)) - 1), end


def _vector(data: bytes, position: int, most: int) -> tuple[bytes, int]:
    end = position + 1 + (data[position] if position < len(data) else most + 1)
    if end > len(data) or end - position - 1 > most:
        raise ProtocolError("a QUIC packet with an impossible connection ID")
    return data[position + 1 : end], end


def _long_vector(data: bytes, position: int) -> tuple[bytes, int]:
    size, start = _integer(data, position)
    if start + size > len(data):
        raise ProtocolError("a QUIC frame that is cut off")
    return data[start : start + size], start + size
