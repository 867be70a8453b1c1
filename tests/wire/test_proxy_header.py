"""PROXY headers, against the examples of the specification and what the real gost sends."""

from __future__ import annotations

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.wire.proxy_header import encode_proxy_header

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
