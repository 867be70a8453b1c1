"""The SOCKS address."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import ANY, Endpoint
from gostnet.core.errors import EndOfStream, ProtocolError
from gostnet.core.sansio import run_on_bytes
from gostnet.wire.socks_addr import (
    EMPTY_NAME,
    ZERO,
    address_end,
    decode_address,
    decode_name,
    encode_address,
    ipv6_text,
    read_address,
)

LONG = "x" * 255

EXAMPLES = [
    (Endpoint("127.0.0.1", 7007), "017f0000011b5f"),
    (Endpoint("255.255.255.255", 65535), "01ffffffffffff"),
    (Endpoint("2001:db8::1", 80), "0420010db80000000000000000000000010050"),
    (Endpoint("::", 0), "04000000000000000000000000000000000000"),
    (Endpoint("localhost", 7007), "03096c6f63616c686f73741b5f"),
    (Endpoint(LONG, 1), "03ff" + LONG.encode().hex() + "0001"),
    (Endpoint("bücher.example", 80), "030f62c3bc636865722e6578616d706c650050"),
    (Endpoint("1.2.3", 80), "0305312e322e330050"),
    (Endpoint("example.com.", 80), "030c6578616d706c652e636f6d2e0050"),
]


@pytest.mark.parametrize(("endpoint", "written"), EXAMPLES, ids=lambda value: str(value)[:20])
def test_addresses_are_written_and_read(endpoint: Endpoint, written: str) -> None:
    raw = bytes.fromhex(written)
    assert encode_address(endpoint) == raw
    assert decode_address(raw) == endpoint
    assert address_end(raw) == len(raw)
    assert address_end(b"..." + raw + b"more", 3) == 3 + len(raw)
    assert run_on_bytes(read_address(), raw + b"more") == (endpoint, b"", b"more")


@pytest.mark.parametrize(("endpoint", "written"), EXAMPLES, ids=lambda value: str(value)[:20])
def test_a_cut_address_is_never_taken_for_a_whole_one(endpoint: Endpoint, written: str) -> None:
    raw = bytes.fromhex(written)
    for size in range(len(raw)):
        with pytest.raises(EndOfStream):
            run_on_bytes(read_address(), raw[:size])
        with pytest.raises(ProtocolError):
            decode_address(raw[:size])
        assert address_end(raw[:size]) == (len(raw) if size >= 2 else 0)
    with pytest.raises(ProtocolError):
        decode_address(raw + b"\0")


def test_an_empty_host_is_written_as_each_protocol_does() -> None:
    assert encode_address(ANY) == ZERO
    assert encode_address(Endpoint("", 53)) == bytes.fromhex("01000000000035")
    assert encode_address(Endpoint("", 53), EMPTY_NAME) == bytes.fromhex("03000035")
    assert decode_address(bytes.fromhex("03000035")) == Endpoint("", 53)


@pytest.mark.parametrize("kind", [0, 2, 5, 255])
def test_unknown_types_are_refused(kind: int) -> None:
    raw = bytes((kind,)) + bytes(30)
    for parse in (decode_address, address_end):
        with pytest.raises(ProtocolError, match=f"address type {kind}"):
            parse(raw)
    with pytest.raises(ProtocolError, match=f"address type {kind}"):
        run_on_bytes(read_address(), raw)


@pytest.mark.parametrize(
    "name",
    [b"a\0b", b"evil\r\nHost: x", b"two words", b"\xff\xfe", b"tab\t", b"\x7f", b" ", "zero\u200bwidth".encode()],
)
def test_names_that_could_be_mistaken_further_on_are_refused(name: bytes) -> None:
    with pytest.raises(ProtocolError, match="is not a name"):
        decode_name(name)
    with pytest.raises(ProtocolError, match="is not a name"):
        decode_address(bytes((3, len(name))) + name + b"\0\x50")


def test_addresses_written_out_as_names_take_their_usual_form() -> None:
    assert decode_name(b"::ffff:192.0.2.1") == "192.0.2.1"
    assert decode_name(b"2001:DB8:0:0:0:0:0:1") == "2001:db8::1"
    assert decode_name(b"192.0.2.1") == "192.0.2.1"


def test_mapped_addresses_are_ipv4() -> None:
    raw = b"\x04" + bytes(10) + b"\xff\xff\xc0\0\x02\x01\0\x50"
    assert decode_address(raw) == Endpoint("192.0.2.1", 80)
    assert encode_address(Endpoint("::ffff:192.0.2.1", 80)) == bytes.fromhex("01c0000201" + "0050")


def test_only_usual_spellings_count_as_addresses() -> None:
    for host in ("010.0.0.1", "1.2.3.04", "1.2.3.256", "1.2.3.-4", "1.2.3.4.5", "0x7f.0.0.1", "fe80::1%eth0"):
        assert encode_address(Endpoint(host, 1))[0] == 3, host


def test_what_no_address_can_hold_is_refused() -> None:
    with pytest.raises(ProtocolError, match="256 bytes"):
        encode_address(Endpoint("x" * 256, 1))
    with pytest.raises(ProtocolError, match="not a name"):
        encode_address(Endpoint("\udcff", 1))


ports = st.integers(0, 65535)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
names = st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126, exclude_characters=":"), min_size=1)


@given(st.one_of(addresses, names.filter(lambda name: len(name) < 256)), ports)
def test_decoding_gives_back_what_was_encoded(host: str, port: int) -> None:
    endpoint = Endpoint(host, port)
    ip = endpoint.ip
    assert decode_address(encode_address(endpoint)) == Endpoint(str(ip) if ip else host, port)


@given(st.binary(min_size=16, max_size=16))
def test_ipv6_text_is_that_of_the_standard_library(packed: bytes) -> None:
    address = IPv6Address(packed)
    assert ipv6_text(packed) == str(address.ipv4_mapped or address)


@given(st.lists(st.sampled_from([0, 0, 0, 1, 0xABCD]), min_size=8, max_size=8))
def test_ipv6_text_shortens_the_first_longest_run(groups: list[int]) -> None:
    packed = b"".join(group.to_bytes(2, "big") for group in groups)
    assert ip_address(ipv6_text(packed)).packed in (packed, packed[12:])
    address = IPv6Address(packed)
    assert ipv6_text(packed) == str(address.ipv4_mapped or address)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_address_or_an_error(data: bytes) -> None:
    try:
        endpoint = decode_address(data)
    except ProtocolError:
        return
    assert 0 <= endpoint.port <= 65535
    # An address of the name kind may be written shorter; it stays the same endpoint.
    assert decode_address(encode_address(endpoint, EMPTY_NAME)) == endpoint
