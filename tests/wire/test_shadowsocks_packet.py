"""Packets of Shadowsocks, byte by byte against what the real gost has sent both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.errors import ProtocolError
from gostnet.wire.shadowsocks_packet import METHODS, PacketCipher, derived_key

VECTORS = Path(__file__).parent.parent / "data/vectors"


def cipher(method: str, password: str = "pw") -> PacketCipher:
    found = METHODS[method]
    return PacketCipher(found, derived_key(password.encode(), found.key_size))


@pytest.mark.parametrize("method", ["aes-128-gcm", "aes-256-gcm", "chacha20-ietf-poly1305"])
def test_what_gost_has_sealed_is_opened_and_sealed_alike(method: str) -> None:
    recorded = json.loads((VECTORS / f"ssu-{method}.json").read_text())
    assert recorded["method"] == method
    under_test = cipher(method, recorded["password"])
    assert len(recorded["steps"]) == len(recorded["decoded"]) == 2
    for step, decoded in zip(recorded["steps"], recorded["decoded"], strict=True):
        sealed, payload = bytes.fromhex(step["hex"]), bytes.fromhex(decoded["plaintext"])
        assert under_test.open(sealed) == payload
        assert under_test.seal(payload, sealed[: under_test.salt_size]) == sealed
        assert len(sealed) == len(payload) + under_test.overhead


@pytest.mark.parametrize("method", METHODS)
@given(payload=st.binary(max_size=100))
def test_a_payload_comes_back_and_nothing_shorter_does(method: str, payload: bytes) -> None:
    under_test = cipher(method)
    sealed = under_test.seal(memoryview(payload), bytes(under_test.salt_size))
    assert under_test.open(memoryview(sealed)) == payload
    for length in range(len(sealed)):
        with pytest.raises(ProtocolError):
            under_test.open(sealed[:length])


def test_a_key_of_a_password_is_that_of_openssl() -> None:
    assert derived_key(b"gostpass", 16) == derived_key(b"gostpass", 32)[:16]
    # openssl enc -aes-256-cbc -md md5 -nosalt -k foobar -P
    assert derived_key(b"foobar", 32).hex() == "3858f62230ac3c915f300c664312c63f568378529614d22ddb49237d2f60bfdf"
