"""IP packets as bytes, with scapy as the oracle."""

from __future__ import annotations

import warnings
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.wire.ip import UDP, UdpWay, checksum, ipv4_packets, ipv6_packets, udp_datagram, udp_payload

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scapy = pytest.importorskip("scapy.all", reason="scapy is the oracle of these tests")


def reference(data: bytes) -> int:
    """RFC 1071, word by word."""
    if len(data) % 2:
        data += b"\0"
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@given(st.binary(max_size=300))
def test_checksum_equals_the_word_by_word_sum(data: bytes) -> None:
    assert checksum(data) == reference(data)


@pytest.mark.parametrize("data", [b"", b"\0\0", b"\xff\xff", b"\xff\xff\xff\xff", b"\0\x01\xff\xfe"])
def test_checksum_at_the_edges(data: bytes) -> None:
    assert checksum(data) == reference(data)


ADDRESSES = pytest.mark.parametrize(
    ("source", "destination"), [("10.1.2.3", "192.0.2.255"), ("fd00::1", "2001:db8::ffff")], ids=["ipv4", "ipv6"]
)


@ADDRESSES
@given(st.binary(max_size=1472), st.integers(0, 65535), st.integers(1, 65535))
def test_prepared_headers_are_those_of_the_packet(
    source: str, destination: str, data: bytes, here: int, there: int
) -> None:
    a, b = ip_address(source), ip_address(destination)
    way = UdpWay(a, b, (here, there))
    packet = way.packet(memoryview(data))
    payload = udp_payload(a.packed, b.packed, here, there, data)
    if isinstance(a, IPv4Address):
        assert isinstance(b, IPv4Address)
        (expected,) = ipv4_packets(a, b, payload, 65535, 0)
        expected = expected[:10] + bytes(2) + expected[12:]  # its sum is left to the kernel
    else:
        assert isinstance(b, IPv6Address)
        (expected,) = ipv6_packets(a, b, payload, 65535, 0)
    assert packet == expected
    assert len(way.packet(bytes(way.largest))) == 1500


def test_a_sum_of_zero_is_written_as_its_other_form() -> None:
    here, there = ip_address("10.1.2.3"), ip_address("10.1.2.4")
    way = UdpWay(here, there, (1, 2))
    total = reference(here.packed + there.packed + bytes([0, UDP, 0, 10, 0, 1, 0, 2, 0, 10]))
    packet = way.packet(total.to_bytes(2, "big"))
    assert packet[26:28] == b"\xff\xff"
    assert packet[20:] == udp_payload(here.packed, there.packed, 1, 2, total.to_bytes(2, "big"))


@ADDRESSES
@pytest.mark.parametrize("size", [0, 1, 17, 1472, 1473, 4000, 65507 - 40])
@pytest.mark.parametrize("mtu", [1280, 1500])
def test_fragments_put_together_are_the_datagram(source: str, destination: str, size: int, mtu: int) -> None:
    data = bytes(i * 7 & 0xFF for i in range(size))
    here, there = ip_address(source), ip_address(destination)
    payload = udp_payload(here.packed, there.packed, 53, 40000, data)
    if isinstance(here, IPv4Address):
        assert isinstance(there, IPv4Address)
        packets = ipv4_packets(here, there, payload, mtu, 77)
        parsed = [scapy.IP(packet) for packet in packets]
        for packet, raw in zip(parsed, packets, strict=True):
            assert reference(raw[:20]) == 0
            assert packet.len == len(raw)
            assert packet.id == 77
        parts = {packet.frag * 8: bytes(packet.payload) for packet in parsed}
        assert [bool(packet.flags & 1) for packet in parsed] == [True] * (len(parsed) - 1) + [False]
    else:
        assert isinstance(there, IPv6Address)
        packets = ipv6_packets(here, there, payload, mtu, 77)
        parsed = [scapy.IPv6(packet) for packet in packets]
        parts = {}
        for packet, raw in zip(parsed, packets, strict=True):
            assert packet.plen == len(raw) - 40
            if scapy.IPv6ExtHdrFragment in packet:
                header = packet[scapy.IPv6ExtHdrFragment]
                assert (header.nh, header.id) == (17, 77)
                parts[header.offset * 8] = raw[48:]
            else:
                parts[0] = raw[40:]
    assert all(len(packet) <= mtu for packet in packets)
    whole = b"".join(parts[offset] for offset in sorted(parts))
    assert whole == payload
    packet = (scapy.IP if "." in source else scapy.IPv6)(src=source, dst=destination) / scapy.UDP(sport=53, dport=40000)
    expected = bytes(packet / data)[20 if "." in source else 40 :]
    assert whole == expected


@settings(max_examples=50)
@given(st.binary(max_size=200), st.integers(0, 65535), st.integers(0, 65535))
def test_the_udp_checksum_is_never_zero_and_right(data: bytes, source_port: int, port: int) -> None:
    here, there = IPv4Address("10.0.0.1").packed, IPv4Address("10.0.0.2").packed
    packet = udp_payload(here, there, source_port, port, data)
    assert packet[6:8] != b"\0\0"
    pseudo = here + there + b"\0\x11" + len(packet).to_bytes(2, "big")
    assert reference(pseudo + packet) == 0


@ADDRESSES
def test_udp_datagram_is_what_was_put_into_packets(source: str, destination: str) -> None:
    here, there = ip_address(source), ip_address(destination)
    payload = udp_payload(here.packed, there.packed, 1234, 53, b"data")

    def packets(mtu: int, data: bytes) -> list[bytes]:
        if isinstance(here, IPv4Address):
            assert isinstance(there, IPv4Address)
            return ipv4_packets(here, there, data, mtu, 7)
        assert isinstance(there, IPv6Address)
        return ipv6_packets(here, there, data, mtu, 7)

    (packet,) = packets(1500, payload)
    expected = (here.packed, 1234, there.packed, 53, b"data")
    assert udp_datagram(packet) == udp_datagram(memoryview(packet + b"trailing")) == expected
    for end in range(len(packet)):
        assert udp_datagram(packet[:end]) is None
    long = udp_payload(here.packed, there.packed, 1, 2, bytes(3000))
    assert [udp_datagram(piece) for piece in packets(1500, long)] == [None, None, None]


@given(st.binary(max_size=80))
def test_udp_datagram_of_any_bytes_is_no_error(data: bytes) -> None:
    udp_datagram(data)
