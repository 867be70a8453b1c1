"""Initial packets of aioquic's client, of one and of several datagrams, and of RFC 9001's appendix."""

from __future__ import annotations

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.core.errors import ProtocolError
from gostnet.wire.quic_initial import InitialReader

V1, V2 = 0x00000001, 0x6B3343CF


def datagrams_of(
    name: str | None = "quic.example.com", version: int = V1, alpn: tuple[str, ...] = ("h3",)
) -> list[bytes]:
    """Return what aioquic sends first."""
    configuration = QuicConfiguration(is_client=True, server_name=name, alpn_protocols=list(alpn))
    configuration.original_version = version
    configuration.supported_versions = [version]
    connection = QuicConnection(configuration=configuration)
    connection.connect(("192.0.2.1", 443), now=0.0)
    return [data for data, _ in connection.datagrams_to_send(now=0.0)]


@pytest.mark.parametrize("version", [V1, V2])
def test_name_and_alpn_of_a_single_datagram(version: int) -> None:
    (datagram,) = datagrams_of(version=version)
    hello = InitialReader().feed(datagram)
    assert hello is not None
    assert hello.server_name == "quic.example.com"
    assert hello.alpn == ("h3",)
    assert hello.versions == (0x0304,)


@pytest.mark.parametrize("version", [V1, V2])
def test_hello_over_several_datagrams_in_any_order(version: int) -> None:
    alpn = tuple(f"protocol-{number:03}-{'x' * 60}" for number in range(40))
    parts = datagrams_of(version=version, alpn=alpn)
    assert len(parts) > 1
    for order in (parts, parts[::-1]):
        reader = InitialReader()
        assert all(reader.feed(part) is None for part in order[:-1])
        hello = reader.feed(order[-1])
        assert hello is not None
        assert hello.server_name == "quic.example.com"
        assert hello.alpn == alpn


def test_datagram_that_is_repeated_changes_nothing() -> None:
    parts = datagrams_of(alpn=tuple("x" * 200 + str(number) for number in range(12)))
    reader = InitialReader()
    assert reader.feed(parts[0]) is None
    assert reader.feed(parts[0]) is None
    assert [reader.feed(part) is not None for part in parts[1:]] == [False] * (len(parts) - 2) + [True]


def test_packet_of_the_appendix() -> None:
    """RFC 9001 appendix A.2 by its own numbers: the head as protected there, the rest sealed by its keys."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key, iv = bytes.fromhex("1f369613dd76d5467730efcbe3b1a22d"), bytes.fromhex("fa044b2f42a3fd3b46fb255c")
    crypto = bytes.fromhex(
        "060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e868"
        "04fe3a47f06a2b69484c00000413011302010000c000000010000e00000b6578"
        "616d706c652e636f6dff01000100000a00080006001d00170018001000070005"
        "04616c706e000500050100000000003300260024001d00209370b2c9caa47fba"
        "baf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b000302030400"
        "0d0010000e0403050306030203080408050806002d00020101001c0002400100"
        "3900320408ffffffffffffffff05048000ffff07048000ffff08011001048000"
        "75300901100f088394c8f03e51570806048000ffff"
    )
    head = bytes.fromhex("c300000001088394c8f03e5157080000449e00000002")
    nonce = iv[:-1] + bytes((iv[-1] ^ 2,))
    sealed = AESGCM(key).encrypt(nonce, crypto.ljust(1162, b"\0"), head)
    assert sealed[:16].hex() == "d1b1c98dd7689fb8ec11d242b123dc9b"
    datagram = bytes.fromhex("c000000001088394c8f03e5157080000449e7b9aec34") + sealed
    hello = InitialReader().feed(datagram)
    assert hello is not None
    assert hello.server_name == "example.com"
    assert hello.alpn == ("alpn",)


@pytest.mark.parametrize(
    "data", [b"", b"\x40" * 1200, b"\xc0\x00\x00\x00\x01", b"\xc0\x00\x00\x00\x09" + bytes(1195), bytes(1200)]
)
def test_something_else_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        InitialReader().feed(data)


(WHOLE,) = datagrams_of()


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
@settings(max_examples=150)
def test_datagram_with_a_wrong_byte_never_yields_another_name(at: int, change: int) -> None:
    damaged = WHOLE[:at] + bytes((WHOLE[at] ^ change,)) + WHOLE[at + 1 :]
    try:
        hello = InitialReader().feed(damaged)
    except ProtocolError:
        return
    assert hello is None or hello.server_name == "quic.example.com"


@given(st.binary(max_size=64), st.integers(0, len(WHOLE)))
@settings(max_examples=100)
def test_any_bytes_either_parse_or_raise_protocol_error(noise: bytes, at: int) -> None:
    for data in (noise, b"\xc0\x00\x00\x00\x01" + noise, WHOLE[:at], WHOLE[:at] + noise):
        try:
            InitialReader().feed(data)
        except ProtocolError:
            pass


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_frames_of_any_bytes_raise_protocol_error_only(payload: bytes) -> None:
    reader = InitialReader()
    try:
        reader._frames(payload)
        reader._gathered()
    except ProtocolError:
        pass
