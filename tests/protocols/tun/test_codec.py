"""Registrations and answers, both sides."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import IPAddress
from gostnet.core.errors import ProtocolError
from gostnet.protocols.tun import codec
from gostnet.wire import ip_header

from ..vectors import load
from .kit import packet4, packet6

ADDRESSES = [ip_address("192.168.124.2"), ip_address("fd00::2")]


def test_the_clients_registration_is_gosts() -> None:
    wanted = load("tun-client").steps[0].data
    assert codec.encode_registration("pass-1234567890123456", ADDRESSES) == wanted
    decoded = codec.decode_registration(wanted)
    assert decoded == codec.Registration(b"pass-12345678901", tuple(ADDRESSES))


def test_the_answer_is_gosts() -> None:
    for name, step, observed in (("tun-client", 2, "127.0.0.1"), ("tun-udp-keepalive", 2, "10.99.0.1")):
        wanted = load(name).steps[step].data
        assert codec.encode_answer(observed) == wanted
        assert codec.is_answer(wanted)
        assert codec.decode_answer(wanted) == ip_address(observed)


def test_an_answer_to_a_scoped_address_names_it_without_scope() -> None:
    assert codec.decode_answer(codec.encode_answer("fe80::1%eth0")) == ip_address("fe80::1")


def test_what_is_no_registration() -> None:
    good = codec.encode_registration("", ADDRESSES)
    for size in range(len(good)):
        decoded = codec.decode_registration(good[:size])
        assert (decoded is not None) == (size == codec.HEADER + 16), size
    assert codec.decode_registration(good + b"x") is None
    assert codec.decode_registration(b"gost" + good[4:]) is None
    assert codec.decode_registration(load("tun-short-keepalive").steps[0].data) is None


def test_a_registration_without_an_address_is_refused() -> None:
    with pytest.raises(ProtocolError, match="without an address"):
        codec.encode_registration("x", [])


@pytest.mark.parametrize("size", [0, 19, 21, 36])
def test_what_is_no_answer(size: int) -> None:
    data = b"GOST".ljust(size, b"\0")[:size]
    assert not codec.is_answer(data)
    with pytest.raises(ProtocolError, match=f"{size} bytes"):
        codec.decode_answer(data)


def test_a_passphrase_is_cut_in_bytes_even_inside_a_character() -> None:
    assert codec.pack_passphrase("ä" * 9) == "ä".encode() * 8
    assert codec.pack_passphrase("x" + "ä" * 9) == b"x" + "ä".encode() * 7 + "ä".encode()[:1]
    assert codec.pack_passphrase("") == bytes(16)


@given(st.text(max_size=20), st.lists(st.ip_addresses(), min_size=1, max_size=20))
def test_registrations_read_back(passphrase: str, addresses: list[IPAddress]) -> None:
    decoded = codec.decode_registration(codec.encode_registration(passphrase, addresses))
    assert decoded is not None
    mapped = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    assert decoded.addresses == tuple(mapped)
    assert decoded.passphrase == passphrase.encode()[:16].rstrip(b"\0")


@given(st.binary(max_size=80) | st.binary(max_size=80).map(b"GOST".__add__))
def test_any_bytes_are_read_or_left(data: bytes) -> None:
    decoded = codec.decode_registration(data)
    if decoded is not None:
        assert len(data) == codec.HEADER + 16 * len(decoded.addresses)
    ip_header.source(data)
    assert ip_header.is_ip(data) == bool(ip_header.destination(data))


def test_addresses_of_headers() -> None:
    four, six = packet4("192.0.2.1", "192.0.2.9"), packet6("fd00::1", "fd00::9")
    for packet, size, ends in ((four, 20, ("192.0.2.1", "192.0.2.9")), (six, 40, ("fd00::1", "fd00::9"))):
        assert ip_header.source(packet[:size]) == ip_address(ends[0]).packed
        assert ip_header.destination(packet[:size]) == ip_address(ends[1]).packed
        assert ip_header.source(packet[: size - 1]) == b""
        assert ip_header.destination(packet[: size - 1]) == b""
    assert not ip_header.is_ip(b"\x50" + four[1:])
    assert not ip_header.is_ip(b"")


def test_offers_are_what_gost_ignores() -> None:
    """Its server drops 20 bytes that begin so, and its client takes any for an answer."""
    assert len(codec.OFFER) == codec.HEADER
    assert codec.decode_registration(codec.OFFER) is None
    assert codec.is_answer(codec.OFFER)
    assert codec.encode_answer("192.0.2.1") != codec.OFFER
