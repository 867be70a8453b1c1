"""PROXY headers, against the examples of the specification and what the real gost sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import ANY, Endpoint, IPAddress
from gostnet.core.errors import ProtocolError
from gostnet.wire.proxy_header import NO_HEADER, ProxyHeader, encode_proxy_header, parse_proxy_header

CLIENT, SERVER = Endpoint("127.0.0.1", 56370), Endpoint("127.0.0.1", 8001)
SIGNATURE = "0d0a0d0a000d0a515549540a"


def test_version_1_is_a_line() -> None:
    assert encode_proxy_header(1, CLIENT, SERVER) == b"PROXY TCP4 127.0.0.1 127.0.0.1 56370 8001\r\n"
    six = Endpoint("2001:db8::1", 1), Endpoint("2001:db8::2", 443)
    assert encode_proxy_header(1, *six) == b"PROXY TCP6 2001:db8::1 2001:db8::2 1 443\r\n"
    assert encode_proxy_header(1, CLIENT, SERVER, udp=True) == b"PROXY UNKNOWN\r\n"


@pytest.mark.parametrize("version", [2, 3, 99])
def test_every_other_version_is_2(version: int) -> None:
    data = encode_proxy_header(version, Endpoint("127.0.0.1", 0xDC3E), Endpoint("127.0.0.1", 0x1F41))
    assert data.hex() == SIGNATURE + "2111000c" + "7f0000017f000001" + "dc3e1f41"


def test_families_of_version_2() -> None:
    six = Endpoint("2001:db8::1", 1)
    addresses = "20010db8000000000000000000000001" + "00000000000000000000ffff7f000001"
    assert encode_proxy_header(2, six, SERVER).hex() == SIGNATURE + "21210024" + addresses + "00011f41"
    assert encode_proxy_header(2, CLIENT, SERVER, udp=True)[12:16].hex() == "2112000c"
    assert encode_proxy_header(2, six, six, udp=True)[12:16].hex() == "21220024"


def test_what_is_not_known() -> None:
    assert encode_proxy_header(1, ANY, SERVER) == b""
    assert encode_proxy_header(2, CLIENT, ANY) == b""
    named = Endpoint("a.name", 5)
    assert encode_proxy_header(1, named, SERVER) == b"PROXY TCP4 0.0.0.0 127.0.0.1 5 8001\r\n"


# ---- reading ------------------------------------------------------------------------------------
V1 = b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n"
V2 = bytes.fromhex(SIGNATURE + "2111000c" + "c0000201" + "c6336402" + "dc0401bb")
V2_TLV = bytes.fromhex(SIGNATURE + "2111000f" + "c0000201" + "c6336402" + "dc0401bb" + "040000")
CLAIM = Endpoint("192.0.2.1", 56324), Endpoint("198.51.100.2", 443)


@pytest.mark.parametrize("data", [V1, V2, V2_TLV])
def test_a_header_is_read_when_it_is_complete_and_what_follows_is_left(data: bytes) -> None:
    for size in range(len(data)):
        assert parse_proxy_header(data[:size]) is None
    for rest in (b"", b"GET / HTTP/1.1\r\n", data):
        assert parse_proxy_header(data + rest) == ProxyHeader(len(data), *CLAIM)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"PROXY UNKNOWN\r\n", 15),
        (b"PROXY UNKNOWN ffff::1 whatever it says\r\n", 40),
        (bytes.fromhex(SIGNATURE + "20000000"), 16),
        (bytes.fromhex(SIGNATURE + "2011000c" + "00" * 12), 28),
        (bytes.fromhex(SIGNATURE + "2100000400000000"), 20),
        (bytes.fromhex(SIGNATURE + "213100d8") + bytes(216), 232),
    ],
)
def test_a_header_that_tells_nobody_is_passed_over(data: bytes, size: int) -> None:
    assert parse_proxy_header(data + b"x") == ProxyHeader(size)


@pytest.mark.parametrize("data", [b"G", b"\x16\x03\x01", b"PROXX", b"\r\n\r\nx", b"proxy TCP4", b"SSH-2.0-x\r\n"])
def test_what_is_no_header_is_none(data: bytes) -> None:
    assert parse_proxy_header(data) == NO_HEADER


@pytest.mark.parametrize(
    "data",
    [
        b"PROXY\x20\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 56324\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443 \r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 65536\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 -1 443\r\n",
        b"PROXY TCP4 192.0.2.1 2001:db8::1 1 443\r\n",
        b"PROXY TCP6 192.0.2.1 198.51.100.2 1 443\r\n",
        b"PROXY TCP6 fe80::1%eth0 fe80::2 1 443\r\n",
        b"PROXY TCP4 \xff\xfe 198.51.100.2 1 443\r\n",
        b"PROXY TCP5 192.0.2.1 198.51.100.2 1 443\r\n",
        b"PROXY " + b"x" * 101,
        bytes.fromhex(SIGNATURE + "1111000c") + bytes(12),
        bytes.fromhex(SIGNATURE + "2211000c") + bytes(12),
        bytes.fromhex(SIGNATURE + "2111000b") + bytes(11),
        bytes.fromhex(SIGNATURE + "2121000c") + bytes(12),
        bytes.fromhex(SIGNATURE + "2141000c") + bytes(12),
        bytes.fromhex(SIGNATURE + "2113000c") + bytes(12),
    ],
)
def test_what_begins_like_a_header_and_is_none_breaks_the_protocol(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_proxy_header(data)


def test_mapped_addresses_are_ipv4() -> None:
    six, four = Endpoint("2001:db8::1", 7), Endpoint("192.0.2.1", 8)
    for version in (1, 2):
        data = encode_proxy_header(version, six, four)
        assert parse_proxy_header(data) == ProxyHeader(len(data), six, four)


_HOSTS = st.ip_addresses(v=4) | st.ip_addresses(v=6).filter(lambda ip: ip.ipv4_mapped is None and not ip.scope_id)


@given(st.sampled_from((1, 2)), _HOSTS, _HOSTS, st.integers(0, 65535), st.integers(0, 65535))
def test_what_is_written_is_read(
    version: int, first: IPAddress, second: IPAddress, source_port: int, destination_port: int
) -> None:
    source, destination = Endpoint(str(first), source_port), Endpoint(str(second), destination_port)
    data = encode_proxy_header(version, source, destination)
    assert parse_proxy_header(data) == ProxyHeader(len(data), source, destination)


@given(st.sampled_from((b"", b"PROXY ", bytes.fromhex(SIGNATURE))), st.binary(max_size=80))
def test_any_bytes_are_read_or_break_the_protocol(start: bytes, rest: bytes) -> None:
    try:
        header = parse_proxy_header(start + rest)
    except ProtocolError:
        return
    assert header is None or header.size <= len(start + rest)
