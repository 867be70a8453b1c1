"""What a bypass contains as sets of addresses: never more than the bypass itself says, and never less than possible."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.flow import Network
from gostnet.policies.bounds import EVERYTHING, NOTHING, UNKNOWN, Bounds, bounds_of
from gostnet.policies.bypass import PatternBypass, combine
from gostnet.policies.networks import number

ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.1.0.1", "192.0.2.7", "255.255.255.255", "0.0.0.0", "::1", "2001:db8::5", "::"]
PATTERNS = [
    *("10.0.0.0/24", "10.0.0.1", "10.0.0.1-10.1.0.1", "10.0.0.2:80", "10.0.0.2:443-444", "0.0.0.0/0", "::/0"),
    *("2001:db8::/32", "[2001:db8::5]:80", "*.example.com", ".example.com", "example.com:80", "10.*", "*:80", "*"),
    *("192.0.2.?", ".0.1", "*.0.1", "{10.0.0.1,x}.*", "255.255.255.255", "fd00-*"),
]
lists = st.builds(
    lambda patterns, whitelist, network: PatternBypass.from_patterns(patterns, whitelist=whitelist, network=network),
    st.lists(st.sampled_from(PATTERNS), max_size=4, unique=True),
    st.booleans(),
    st.sampled_from(["", "tcp", "udp"]),
)
networks = st.sampled_from(["tcp", "udp"])


def agrees(bounds: Bounds, contained: bool, address: str, port: int) -> None:
    value = number(address)
    assert value is not None
    at_port = any(
        value in ranges and any(low <= port <= high for low, high in ports) for ports, ranges in bounds.ports.items()
    )
    if value in bounds.certain or at_port:
        assert contained, "certain, but the bypass does not contain it"
    if contained:
        assert value in bounds.possible, "contained, but not thought possible"


@given(st.lists(lists, min_size=1, max_size=3), networks, st.sampled_from(ADDRESSES), st.sampled_from([80, 443, 9]))
def test_the_bounds_hold_what_the_bypass_says(
    members: list[PatternBypass], network: Network, address: str, port: int
) -> None:
    bypass = combine(members)
    assert bypass is not None
    agrees(bounds_of(bypass, network), bypass.contains(network, Endpoint(address, port)), address, port)


@given(lists, lists, networks, st.sampled_from(ADDRESSES), st.sampled_from([80, 443, 9]))
def test_bounds_are_joined_cut_and_turned_as_the_decisions_are(
    one: PatternBypass, other: PatternBypass, network: Network, address: str, port: int
) -> None:
    target = Endpoint(address, port)
    first, second = one.contains(network, target), other.contains(network, target)
    agrees(bounds_of(one, network) | bounds_of(other, network), first or second, address, port)
    agrees(bounds_of(one, network) & bounds_of(other, network), first and second, address, port)
    agrees(~bounds_of(one, network), not first, address, port)


@pytest.mark.parametrize("patterns", [["10.0.0.0/8", "*.example.com"], ["10.0.0.0/8", "example.com:443", ".org"]])
def test_names_take_nothing_away_from_what_is_known_of_addresses(patterns: list[str]) -> None:
    bounds = bounds_of(PatternBypass.from_patterns(patterns), "tcp")
    assert [*bounds.certain] == [*bounds.possible]
    turned = bounds_of(PatternBypass.from_patterns(patterns, whitelist=True), "tcp")
    assert number("10.1.2.3") not in turned.certain
    assert number("11.1.2.3") in turned.certain


def test_a_pattern_that_is_text_leaves_addresses_open() -> None:
    bounds = bounds_of(PatternBypass.from_patterns(["10.*", "192.0.2.0/24"]), "tcp")
    assert [*bounds.certain] == [(number("192.0.2.0"), number("192.0.2.255"))]
    assert [*bounds.possible] == [*EVERYTHING.possible]


def test_a_bypass_of_another_kind_says_nothing() -> None:
    class Other:
        def contains(self, network: Network, target: Endpoint) -> bool:
            return True

    assert bounds_of(Other(), "tcp") == UNKNOWN


def test_what_is_empty_contains_nothing_unless_it_is_of_a_network() -> None:
    assert bounds_of(PatternBypass.from_patterns([]), "tcp") == NOTHING
    assert bounds_of(PatternBypass.from_patterns([], network="tcp"), "tcp") == EVERYTHING
    assert bounds_of(PatternBypass.from_patterns([], network="tcp"), "udp") == NOTHING
    assert bounds_of(PatternBypass.from_patterns([], network="tcp", whitelist=True), "tcp") == NOTHING


def test_whoever_depends_on_a_list_is_told_of_a_new_one() -> None:
    bypass = PatternBypass.from_patterns([])
    told: list[int] = []
    bypass.changed.append(lambda: told.append(len(bypass.patterns)))
    bypass.replace(PatternBypass.from_patterns([str(ipaddress.ip_address("10.0.0.1"))]).patterns)
    assert told == [1]
