"""Ciphers, byte by byte against what the real gost has said, and loop tests."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.errors import ConfigError, ProtocolError
from gostnet.protocols.tap.codec import cipher_of, is_group, is_loop_test, loop_test
from gostnet.wire.shadowsocks_packet import PacketCipher

from ..vectors import VECTORS

METHODS = [
    "AEAD_AES_128_GCM",
    "AEAD_AES_256_GCM",
    "AEAD_CHACHA20_POLY1305",
    "aes-128-gcm",
    "aes-256-gcm",
    "chacha20-ietf-poly1305",
]


def cipher(method: str, password: str = "pw", key: str = "") -> PacketCipher:
    found = cipher_of(method, password, key, "handler")
    assert found is not None
    return found


def test_what_gost_has_sealed_is_opened_and_sealed_alike() -> None:
    steps = json.loads((VECTORS / "tap-arp-aead.json").read_text())["steps"]
    under_test = cipher("AEAD_AES_128_GCM")
    for step in steps:
        sealed, plain = bytes.fromhex(step["hex"]), bytes.fromhex(step["plain"])
        assert under_test.open(sealed) == plain
        assert under_test.seal(plain, sealed[:16]) == sealed
        assert len(sealed) == len(plain) + under_test.overhead


@pytest.mark.parametrize("method", METHODS)
@given(frame=st.binary(max_size=100), flip=st.integers(0, 10_000))
def test_a_frame_comes_back_and_a_changed_one_does_not(method: str, frame: bytes, flip: int) -> None:
    under_test = cipher(method)
    sealed = under_test.seal(memoryview(frame), bytes(range(under_test.salt_size)))
    assert under_test.open(memoryview(sealed)) == frame
    where = flip % len(sealed)
    changed = sealed[:where] + bytes([sealed[where] ^ 1]) + sealed[where + 1 :]
    with pytest.raises(ProtocolError):
        under_test.open(changed)
    with pytest.raises(ProtocolError):
        under_test.open(sealed[:where])


@given(st.binary(max_size=200))
def test_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        cipher("aes-256-gcm").open(data)


def test_names_that_mean_the_same_and_keys_in_place_of_passwords() -> None:
    salt = bytes(32)
    assert cipher("AEAD_AES_256_GCM").seal(b"frame", salt) == cipher("aes-256-gcm").seal(b"frame", salt)
    key = "0123456789abcdef"
    assert cipher("aes-128-gcm", "any", key).seal(b"f", salt[:16]) == cipher("aes-128-gcm", "", key).seal(
        b"f", salt[:16]
    )
    assert cipher_of("", "pw", "", "handler") is None
    assert cipher_of("DUMMY", "pw", "", "handler") is None


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("rc4-md5", "pw", ""), "handler.auth.username"),
        (("aes-128-gcm", "pw", "short"), "handler.metadata.key"),
        (("aes-128-gcm", "", ""), "handler.auth.password"),
    ],
)
def test_what_would_not_protect_is_refused(arguments: tuple[str, str, str], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cipher_of(*arguments, "handler")
    assert caught.value.path == path
    assert "pw" not in caught.value.reason


def test_loop_tests_and_groups() -> None:
    own = bytes.fromhex("020000000001")
    frame = loop_test(own)
    assert len(frame) == 60
    assert is_loop_test(frame)
    assert not is_loop_test(frame[:6] + bytes(6) + frame[12:])
    assert not is_loop_test(frame[:12] + b"\x08\0" + frame[14:])
    assert not is_group(own)
    assert is_group(b"\xff" * 6)
    assert is_group(b"\x33\x33\0\0\0\1")
