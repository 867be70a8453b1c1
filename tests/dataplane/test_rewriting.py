"""TCP turned around with other addresses, with scapy as the oracle of checksums."""

from __future__ import annotations

import warnings
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.dataplane.rewriting import IDLE, Rewriter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scapy = pytest.importorskip("scapy.all", reason="scapy is the oracle of these tests")

PAIRS = {
    4: (ip_address("198.18.0.1"), ip_address("198.18.0.2")),
    6: (ip_address("fd67::1"), ip_address("fd67::2")),
}
PORT = 5000


def packet(source: str, sport: int, destination: str, dport: int, flags: str, payload: bytes = b"") -> bytearray:
    network = scapy.IPv6 if ":" in source else scapy.IP
    whole = network(src=source, dst=destination) / scapy.TCP(sport=sport, dport=dport, flags=flags) / payload
    return bytearray(bytes(whole))


def read(data: bytes | bytearray) -> tuple[str, int, str, int]:
    """Return the ends, and assert that all sums are right."""
    form = scapy.IPv6 if data[0] >> 4 == 6 else scapy.IP
    parsed = form(bytes(data))
    again = form(bytes(data))
    del again[scapy.TCP].chksum
    if form is scapy.IP:
        del again.chksum
    rebuilt = form(bytes(again))
    assert parsed[scapy.TCP].chksum % 0xFFFF == rebuilt[scapy.TCP].chksum % 0xFFFF
    if form is scapy.IP:
        assert parsed.chksum % 0xFFFF == rebuilt.chksum % 0xFFFF
    return parsed.src, parsed[scapy.TCP].sport, parsed.dst, parsed[scapy.TCP].dport


@given(
    st.sampled_from([4, 6]),
    st.integers(1, 2**32 - 1),
    st.integers(1, 2**32 - 1),
    st.integers(1, 65535),
    st.integers(1, 65535),
    st.binary(max_size=50),
)
def test_both_ways_with_right_sums(version: int, one: int, other: int, sport: int, dport: int, payload: bytes) -> None:
    base = 0 if version == 4 else 0x2001_0DB8 << 96
    form = {4: "IPv4Address", 6: "IPv6Address"}[version]
    make = getattr(__import__("ipaddress"), form)
    client, target = str(make(base + one)), str(make(base + other))
    rewriter = Rewriter(PAIRS, PORT)
    here, there = map(str, PAIRS[version])
    data = packet(client, sport, target, dport, "S", payload)
    assert rewriter.turn(memoryview(data), False, 0.0)
    source, number, destination, port = read(data)
    assert (source, destination, port) == (there, here, PORT)
    assert rewriter.origin(Endpoint(there, number)) == (Endpoint(client, sport), Endpoint(target, dport))
    answer = packet(here, PORT, there, number, "SA", payload)
    assert rewriter.turn(memoryview(answer), False, 0.0)
    assert read(answer) == (target, dport, client, sport)


@pytest.mark.parametrize("version", [4, 6])
def test_a_sum_that_is_still_to_be_completed_stays_so(version: int) -> None:
    """With NEEDS_CSUM the field holds the sum of the pseudo header; adding all else and inverting gives the sum."""
    client, target = ("10.1.2.3", "192.0.2.9") if version == 4 else ("fd00::3", "2001:db8::9")
    rewriter = Rewriter(PAIRS, PORT)
    data = packet(client, 1234, target, 80, "S", b"payload")
    start = 20 if version == 4 else 40

    def pseudo(view: bytearray) -> int:
        addresses = view[12:20] if version == 4 else view[8:40]
        return (int.from_bytes(addresses, "big") + 6 + len(view) - start) % 0xFFFF

    data[start + 16 : start + 18] = pseudo(data).to_bytes(2, "big")
    assert rewriter.turn(memoryview(data), True, 0.0)
    assert int.from_bytes(data[start + 16 : start + 18], "big") % 0xFFFF == pseudo(data)


def test_what_is_not_turned() -> None:
    rewriter = Rewriter(PAIRS, PORT)
    here, there = map(str, PAIRS[4])
    stray = packet("10.1.2.3", 1, "192.0.2.9", 2, "A")
    assert not rewriter.turn(memoryview(stray), False, 0.0)
    assert not rewriter.turn(memoryview(packet(here, PORT, there, 9, "S")), False, 0.0)
    fragment = packet("10.1.2.3", 1, "192.0.2.9", 2, "S")
    fragment[6] = 0x20
    assert not rewriter.turn(memoryview(fragment), False, 0.0)
    whole = packet("10.1.2.3", 1, "192.0.2.9", 2, "S")
    for end in range(40):
        assert not rewriter.turn(memoryview(whole[:end]), False, 0.0)
    assert rewriter.origin(Endpoint(there, 1024)) is None
    assert rewriter.origin(Endpoint("10.1.2.3", 1024)) is None
    assert len(rewriter) == 0


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_no_error(data: bytes, partial: bool) -> None:
    Rewriter(PAIRS, PORT).turn(memoryview(bytearray(data)), partial, 0.0)


def test_idle_connections_are_forgotten_and_the_same_one_keeps_its_port() -> None:
    rewriter = Rewriter(PAIRS, PORT)
    for number in range(50):
        assert rewriter.turn(memoryview(packet("10.1.2.3", 1000 + number, "192.0.2.9", 80, "S")), False, 0.0)
        assert rewriter.turn(memoryview(packet("10.1.2.3", 1000 + number, "192.0.2.9", 80, "S")), False, 1.0)
    assert len(rewriter) == 50
    assert rewriter.turn(memoryview(packet("10.1.2.3", 1000, "192.0.2.9", 80, "A")), False, IDLE)
    assert rewriter.turn(memoryview(packet("10.1.2.3", 5, "192.0.2.9", 80, "S")), False, IDLE + 70)
    assert len(rewriter) == 2
