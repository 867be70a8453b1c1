"""ICMP as bytes, with scapy as the oracle."""

from __future__ import annotations

import warnings
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.wire import icmp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scapy = pytest.importorskip("scapy.all", reason="scapy is the oracle of these tests")

PAIRS = [("10.1.2.3", "192.0.2.9"), ("fd00::1", "2001:db8::9")]
VERSIONS = pytest.mark.parametrize(("source", "destination"), PAIRS, ids=["ipv4", "ipv6"])


def request(source: str, destination: str, data: bytes) -> bytes:
    if ":" in source:
        layers = scapy.IPv6(src=source, dst=destination) / scapy.ICMPv6EchoRequest(id=77, seq=5, data=data)
    else:
        layers = scapy.IP(src=source, dst=destination) / scapy.ICMP(type=8, id=77, seq=5) / data
    return bytes(layers)


@VERSIONS
@pytest.mark.parametrize("data", [b"", b"odd", bytes(range(256)) * 5])
def test_echo_request_is_read_and_answered(source: str, destination: str, data: bytes) -> None:
    packet = request(source, destination, data)
    found = icmp.echo_request(memoryview(packet + b"trailing"))
    assert found is not None
    assert (str(found.source), str(found.destination), found.identifier) == (source, destination, 77)
    version = found.source.version
    assert icmp.echo(icmp.REQUEST[version], 77, found.message, found.source, found.destination) == found.message
    reply = icmp.echo(icmp.REPLY[version], 99, found.message, found.destination, found.source)
    if version == 4:
        expected = bytes(scapy.ICMP(type=0, id=99, seq=5) / data)
    else:
        whole = scapy.IPv6(src=destination, dst=source) / scapy.ICMPv6EchoReply(id=99, seq=5, data=data)
        expected = bytes(whole)[40:]
    assert reply == expected


@VERSIONS
def test_what_is_no_whole_echo_request(source: str, destination: str) -> None:
    packet = request(source, destination, b"data")
    for end in range(len(packet)):
        assert icmp.echo_request(packet[:end]) is None
    kind = 40 if ":" in source else 20
    assert icmp.echo_request(packet[:kind] + b"\3" + packet[kind + 1 :]) is None
    assert icmp.echo_request(packet[:kind] + packet[kind : kind + 1] + b"\1" + packet[kind + 2 :]) is None
    if ":" not in source:
        assert icmp.echo_request(packet[:6] + b"\x20\0" + packet[8:]) is None, "a fragment"


@given(st.binary(max_size=80))
def test_any_bytes_are_read_without_an_error(data: bytes) -> None:
    icmp.echo_request(data)


@VERSIONS
def test_port_unreachable(source: str, destination: str) -> None:
    message = icmp.port_unreachable(ip_address(source), 1234, ip_address(destination), 53, 100)
    if ":" in source:
        datagram = scapy.IPv6(src=source, dst=destination, hlim=64, plen=108, nh=17)
        datagram /= scapy.UDP(sport=1234, dport=53, len=108, chksum=0)
        whole = scapy.IPv6(src=destination, dst=source) / scapy.ICMPv6DestUnreach(code=4) / datagram
        assert message == bytes(whole)[40:]
    else:
        datagram = scapy.IP(src=source, dst=destination, len=128, id=0, ttl=64, proto=17)
        datagram /= scapy.UDP(sport=1234, dport=53, len=108, chksum=0)
        assert message == bytes(scapy.ICMP(type=3, code=3) / datagram)
