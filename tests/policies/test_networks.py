"""Addresses as numbers, ranges and prefixes, against the standard library."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.policies.networks import V4, Intervals, Networks, PrefixTable, number, parse_network, parse_range

V6 = st.integers(0, (1 << 128) - 1).map(ipaddress.IPv6Address).filter(lambda ip: ip.ipv4_mapped is None)


@given(st.ip_addresses())
def test_numbers_of_addresses(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    plain = mapped or address
    assert number(str(address)) == (int(plain) | V4 if plain.version == 4 else int(plain))


@pytest.mark.parametrize(
    "text",
    ["", "example.com", "1.2.3", "1.2.3.4.5", "010.0.0.1", "1.2.3.256", "::g", "[::1]", "1.2.3.4 ", "a\0.1", "١.1.1.1"],
)
def test_other_text_has_no_number(text: str) -> None:
    assert number(text) is None


def test_mapped_and_zoned_addresses() -> None:
    assert number("::ffff:10.0.0.1") == number("10.0.0.1")
    assert number("fe80::1%eth0") == number("fe80::1")


@given(st.ip_addresses(v=4), st.integers(0, 32), st.ip_addresses(v=4))
def test_networks_of_v4(base: ipaddress.IPv4Address, bits: int, other: ipaddress.IPv4Address) -> None:
    bounds = parse_network(f"{base}/{bits}")
    value = number(str(other))
    assert bounds is not None
    assert value is not None
    assert (bounds[0] <= value <= bounds[1]) is (other in ipaddress.ip_network(f"{base}/{bits}", strict=False))


@given(V6, st.integers(0, 128))
def test_networks_of_v6(base: ipaddress.IPv6Address, bits: int) -> None:
    net = ipaddress.ip_network(f"{base}/{bits}", strict=False)
    assert parse_network(f"{base}/{bits}") == (int(net.network_address), int(net.broadcast_address))


def test_networks_of_mapped_addresses() -> None:
    assert parse_network("::ffff:10.1.0.0/112") == parse_network("10.1.0.0/16")
    wide = parse_network("::ffff:10.1.0.0/90")
    net = ipaddress.ip_network("::ffff:10.1.0.0/90", strict=False)
    assert wide == (int(net.network_address), int(net.broadcast_address))


@pytest.mark.parametrize(
    "text", ["10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "::/129", "x/8", "10.0.0.0/-1", "10.0.0.0/8 ", "1.1.1.1/²"]
)
def test_other_text_is_no_network(text: str) -> None:
    assert parse_network(text) is None


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=10), st.integers(0, 60))
def test_intervals_equal_a_search(ranges: list[tuple[int, int]], value: int) -> None:
    assert (value in Intervals(ranges)) is any(first <= value <= last for first, last in ranges)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(24, 32)), max_size=10), st.integers(0, 255))
def test_the_most_specific_prefix_counts(networks: list[tuple[int, int]], low: int) -> None:
    pairs = []
    best: tuple[int, int] | None = None
    for index, (base, bits) in enumerate(networks):
        bounds = parse_network(f"10.0.0.{base}/{bits}")
        assert bounds is not None
        pairs.append((bounds, index))
        if base >> 32 - bits == low >> 32 - bits and (best is None or bits >= best[0]):
            best = (bits, index)
    value = number(f"10.0.0.{low}")
    assert value is not None
    assert PrefixTable(pairs).get(value) == (best[1] if best else None)


def test_prefixes_of_both_families_are_apart() -> None:
    v4, v6 = parse_network("0.0.0.0/0"), parse_network("::/0")
    assert v4 is not None
    assert v6 is not None
    table = PrefixTable([(v4, "four"), (v6, "six")])
    one, other = number("1.2.3.4"), number("::1")
    assert one is not None
    assert other is not None
    assert (table.get(one), table.get(other)) == ("four", "six")
    assert not PrefixTable[str]()


def test_lists_of_networks() -> None:
    ranges = [parse_range("10.0.0.0/8"), parse_range("192.0.2.1")]
    networks = Networks([bounds for bounds in ranges if bounds is not None])
    assert networks
    assert Endpoint("10.1.2.3", 5) in networks
    assert Endpoint("192.0.2.1", 5) in networks
    assert Endpoint("192.0.2.2", 5) not in networks
    assert Endpoint("@", 0) not in networks
    assert parse_range("10.0.0.1-10.0.0.2") is None
    assert not Networks([])
