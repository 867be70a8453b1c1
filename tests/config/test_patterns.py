"""Patterns of addresses, lines of limits, addresses: what GOST would take silently and wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config import patterns


@pytest.mark.parametrize(
    "text",
    [
        *("192.168.1.1", "192.168.1.1:80", "192.168.1.1:0-65535", "192.168.1.1:80-90", "example.com", ".example.com"),
        *("*.example.com", "*.example.com:443", "*example.com", "ex?mple.com", "*", "192.168.*", "10.0.0.0/8"),
        *("10.1.2.3/8", "fd00::/8", "0.0.0.0/0", "::1", "[::1]:80", "172.20.0.1-172.30.0.255", "fd00::1-fd00::ff"),
        *("172.20.0.1 - 172.20.0.9", "localhost", "com", "example.com:80", "a-b.com", "2001:db8::*", " example.com "),
    ],
)
def test_bypass_patterns_that_mean_something(text: str) -> None:
    assert patterns.bypass(text) == ""


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("192.168.1.1:abc", "has a bad port"),  # B07
        ("192.168.1.1:90-80", "has a bad port"),  # B06
        ("example.com:", "ends in a colon"),
        ("10.0.0.0/8:80", "takes no port"),  # B20
        ("999.1.1.1/77", "is not a network"),
        ("10.0.0.0/33", "is not a network"),
        ("10.0.0.0/255.0.0.0", "is not a network"),
        ("10.0.0.9-10.0.0.1", "whose end is before"),  # B26
        ("10.0.0.1-x", "is not a range"),
        ("10.0.0.1-fd00::1", "is not a range"),
        (":80", "has no host"),  # B30
        ("192.168.1", "is not an IPv4 address"),
        ("1.2.3.400", "is not an IPv4 address"),
        ("fd00::zz", "is not an IPv6 address"),
        ("", "is empty"),
        ("example.com:70000", "has a bad port"),
    ],
)
def test_bypass_patterns_that_mean_nothing(text: str, wrong: str) -> None:
    assert wrong in patterns.bypass(text)


@pytest.mark.parametrize("text", ["10.0.0.1", "10.0.0.0/8", "::1", "fe80::/10", "example.com", "a-b.example.com"])
def test_admission_patterns_that_mean_something(text: str) -> None:
    assert patterns.admission(text) == ""


@pytest.mark.parametrize("text", ["10.0.0.1:80", "10.0.0.1-10.0.0.9", "*", "10.0.0.0/33", "1.2.3", "", "fe80::zz"])
def test_admission_patterns_that_mean_nothing(text: str) -> None:
    # A06: GOST ignores them, and admits.
    assert patterns.admission(text)


@pytest.mark.parametrize(
    "line",
    ["$ 1MB", "$ 1MB 2MB", "$$ 100KB 200KB 1MB", "10.0.0.1 1KB", "10.0.0.0/8\t1KB", "$ 0 1MB", "$ 0B 1MB", "::1 1.5MB"],
)
def test_traffic_limits(line: str) -> None:
    assert patterns.traffic_limit(line) == ""


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("$ 100", "would limit nothing"),
        ("$ 1Mb", "would limit nothing"),
        ("$ 10kB 1MB", "would limit nothing"),
        ("$ 1MB 512K", "would limit nothing"),
        ("$", "is not KEY IN"),
        ("$ 1MB 1MB 1MB 1MB", "is not KEY IN"),
        ("", "is not KEY IN"),
        ("x 1MB", "begins with 'x'"),
        ("10.0.0.0/99 1MB", "begins with '10.0.0.0/99'"),
    ],
)
def test_traffic_limits_that_limit_nothing(line: str, wrong: str) -> None:
    assert wrong in patterns.traffic_limit(line)


def test_connection_and_rate_limits() -> None:
    for line in ("$ 1000", "$$ 100", "192.168.1.1  10", "10.0.0.0/8 0"):
        assert patterns.connection_limit(line) == ""
        assert patterns.rate_limit(line) == ""
    assert patterns.rate_limit("$ 2.5") == ""
    for line in ("$ x", "$ 2.5", "$", "$ 1 2", "x 1"):
        assert patterns.connection_limit(line)
    for line in ("$ x", "$", "$ 1 2", "x 1", "$ nan"):
        assert patterns.rate_limit(line)
    assert patterns.limits_nothing("$ 0")
    assert not patterns.limits_nothing("$ 0.5")


@pytest.mark.parametrize("text", ["", ":80", "1.2.3.4:80", "[::1]:80", "localhost:0"])
def test_listen_addresses(text: str) -> None:
    assert patterns.listen_address(text) == ""


@pytest.mark.parametrize("text", ["80", "foo", ":x", ":70000", "::1:80", "[::1:80"])
def test_addresses_nobody_can_listen_on(text: str) -> None:
    assert "is not an address" in patterns.listen_address(text)


def test_node_and_target_addresses() -> None:
    assert patterns.node_address("h:1") == ""
    assert "is empty" in patterns.node_address("")
    assert "has no port" in patterns.node_address("h")
    for text in ("h", "h:1", "::1", "[::1]:80", "tls://1.1.1.1:853", "https://h/dns-query"):
        assert patterns.target_address(text) == ""
    for text in ("", "h:x", "://h", "tls://"):
        assert patterns.target_address(text)


def test_name_servers() -> None:
    for text in (
        "1.1.1.1",
        "1.1.1.1:53",
        "tcp://8.8.8.8",
        "tls://8.8.8.8:853",
        "https://1.0.0.1/dns-query",
        "::1",
        "h",
    ):
        assert patterns.name_server(text) == ""
    for text in ("", "udp://", "quic://1.1.1.1", "1.1.1.1:x", "tls:///x"):
        assert patterns.name_server(text)


def test_ports_and_networks() -> None:
    for text in ("80", "0", "65535", "8000-8100"):
        assert patterns.ports(text) == ""
    for text in ("", "x", "65536", "80-70", "80-", "-80"):
        assert patterns.ports(text)
    assert patterns.network("10.0.0.0/8") == patterns.network("10.0.0.1") == patterns.network("fd00::/8") == ""
    assert patterns.network("lan0")


CHECKS = [
    *(patterns.bypass, patterns.admission, patterns.traffic_limit, patterns.connection_limit, patterns.rate_limit),
    *(patterns.listen_address, patterns.node_address, patterns.target_address, patterns.name_server, patterns.ports),
    patterns.network,
]


@given(st.text(max_size=30) | st.text(alphabet="0123456789.:/-[]*$ abc", max_size=30), st.sampled_from(CHECKS))
def test_any_text_is_judged(text: str, check: Callable[[str], str]) -> None:
    assert isinstance(check(text), str)
