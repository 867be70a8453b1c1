"""Bypass: every row of the table, the group rule, bad patterns, and the compiled form against a naive one."""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.core.address import Endpoint, parse_endpoint
from gostnet.core.errors import ConfigError
from gostnet.core.flow import Network
from gostnet.policies.bypass import (
    BypassGroup,
    PatternBypass,
    Patterns,
    check_network,
    combine,
    compile_patterns,
)
from gostnet.policies.entries import inline


def at(text: str) -> Endpoint:
    return parse_endpoint(text, default_port=0) if text else Endpoint("", 0)


ROWS = [
    ("B01", "192.168.1.1", {"192.168.1.1:80": True}),
    # GOST does not unmap IPv4-mapped addresses for single addresses and ranges.
    ("B02", "192.168.1.1", {"[::ffff:192.168.1.1]:80": True}),
    ("B03", "192.168.1.1:80", {"192.168.1.1:80": True, "192.168.1.1:81": False, "192.168.1.1": False}),
    ("B04", "192.168.1.1:0-65535", {"192.168.1.1": True}),
    ("B05", "192.168.1.1:80-90", {"192.168.1.1:80": True, "192.168.1.1:90": True, "192.168.1.1:91": False}),
    ("B06", "192.168.1.1:90-80", {"192.168.1.1:85": False}),
    ("B08", "example.com", {"EXAMPLE.com:443": True}),
    ("B09", "example.com", {"www.example.com": False}),
    ("B10", ".example.com", {"example.com": True, "a.b.example.com": True, "notexample.com": False}),
    # GOST does not strip the dot of an absolute name.
    ("B11", ".example.com", {"example.com.": True, "a.example.com.": True}),
    ("B12", "*.example.com", {"example.com": False, "a.b.example.com:80": True}),
    (
        "B13",
        "*.example.com:443",
        {"www.example.com:443": True, "www.example.com:80": False, "www.example.com": False},
    ),
    ("B14", "*example.com", {"notexample.com": True}),
    ("B15", "ex?mple.com", {"exmple.com": False, "example.com": True}),
    ("B16", "*", {"example.com": True, "[::1]:80": True, "1.2.3.4:5": True}),
    ("B17", "192.168.*", {"192.168.1.1:80": True, "192.16.1.1": False}),
    ("B18", "10.0.0.0/8", {"10.1.2.3:80": True, "example.com": False}),
    ("B19", "10.0.0.0/8", {"[::ffff:10.1.2.3]:80": True}),
    ("B21", "fd00::/8", {"[fd00::1]:80": True, "[fe00::1]:80": False}),
    ("B22", "0.0.0.0/0", {"1.2.3.4": True, "::1": False, "example.com": False}),
    # The third form of the row, brackets without a port, is no address there; an Endpoint has no brackets.
    ("B23", "::1", {"::1": True, "[::1]:80": True}),
    (
        "B24",
        "172.20.0.1-172.30.0.255",
        {"172.20.0.0": False, "172.20.0.1": True, "172.30.0.255": True, "172.30.1.0": False},
    ),
    ("B25", "172.20.0.1 - 172.20.0.9", {"172.20.0.5": True}),
    ("B26", "172.20.0.9-172.20.0.1", {"172.20.0.5": False}),
    ("B27", "fd00::1-fd00::ff", {"[fd00::10]:80": True, "[fd00::100]:80": False}),
    ("B28", "localhost", {"127.0.0.1:80": False}),
    ("B29", "com", {"example.com": False}),
    ("B29", ".com", {"example.com": True}),
    ("B30", ":80", {"1.2.3.4:80": False}),
    # GOST's glob library lets the literals around a star overlap.
    ("B40", "a.*.com", {"a.com": False, "a.b.com": True, "a..com": True}),
    ("B41", "[a-c]x.*", {"ax.com": True, "dx.com": False}),
    ("B41", "{a,b}.*", {"a.com": True, "c.com": False}),
]


@pytest.mark.parametrize(("row", "pattern", "targets"), ROWS, ids=[f"{row}-{pattern}" for row, pattern, _ in ROWS])
def test_blacklist_row(row: str, pattern: str, targets: dict[str, bool]) -> None:
    bypass = PatternBypass.from_patterns([pattern])
    assert {text: bypass.contains("tcp", at(text)) for text in targets} == targets
    inverse = PatternBypass.from_patterns([pattern], whitelist=True)
    assert {text: not inverse.contains("tcp", at(text)) for text in targets} == targets


@pytest.mark.parametrize(
    ("row", "patterns", "whitelist", "restricted", "targets"),
    [
        ("B31", ["example.com"], True, "", [("tcp", "example.com:80", False), ("tcp", "example.org:80", True)]),
        ("B31", ["example.com"], True, "", [("tcp", "", False)]),
        ("B32", [], True, "", [("tcp", "a:1", False)]),
        ("B33", [], False, "tcp", [("tcp", "a:1", True), ("udp", "a:1", False), ("ip", "a:1", False)]),
        ("B34", [], True, "udp", [("udp", "a:1", False), ("tcp", "a:1", False)]),
        ("B35", ["b"], True, "tcp", [("tcp", "a:1", True), ("udp", "a:1", False)]),
        ("none", [], False, "", [("tcp", "a:1", False)]),
        ("empty", ["*"], False, "", [("tcp", "", False)]),
    ],
)
def test_mode_and_network_row(
    row: str, patterns: list[str], whitelist: bool, restricted: str, targets: list[tuple[Network, str, bool]]
) -> None:
    bypass = PatternBypass.from_patterns(patterns, whitelist=whitelist, network=restricted)
    for network, text, expected in targets:
        assert bypass.contains(network, at(text)) is expected, (network, text)


TARGET = at("x:1")
WHITE_TRUE = PatternBypass.from_patterns(["a"], whitelist=True)
WHITE_FALSE = PatternBypass.from_patterns(["x"], whitelist=True)
BLACK_TRUE = PatternBypass.from_patterns(["x"])
BLACK_FALSE = PatternBypass.from_patterns(["a"])


@pytest.mark.parametrize(
    ("row", "members", "expected"),
    [
        ("B36", [WHITE_TRUE, BLACK_TRUE], True),
        ("B37", [WHITE_FALSE, BLACK_TRUE], True),
        ("B38", [WHITE_TRUE, WHITE_FALSE], False),
        ("B39", [], False),
        ("whitelist alone", [WHITE_TRUE, BLACK_FALSE], True),
        ("neither", [WHITE_FALSE, BLACK_FALSE], False),
    ],
)
def test_group_row(row: str, members: list[PatternBypass], expected: bool) -> None:
    assert BypassGroup(members).contains("tcp", TARGET) is expected


def test_combine_wraps_only_several() -> None:
    assert combine([]) is None
    assert combine([BLACK_TRUE]) is BLACK_TRUE
    several = combine([WHITE_FALSE, BLACK_TRUE])
    assert several is not None
    assert several.contains("tcp", TARGET)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param("192.168.1.1:abc", "'abc' is not a port", id="B07"),
        pytest.param("10.0.0.0/8:80", "a network takes no port", id="B20"),
        pytest.param("10.0.0.0/33", "is not a network", id="prefix"),
        pytest.param("10.0.0.0/255.0.0.0", "is not a network", id="mask"),
        pytest.param("https://example.com", "is not a network", id="url"),
        pytest.param("example.com:65536", "is not a port", id="port"),
        pytest.param("example.com:", "is not a port", id="no port"),
        pytest.param("example.com:1-2-3", "is not a port", id="three ports"),
        pytest.param("::1:80:x", "as [ADDRESS]:PORT", id="colons"),
        pytest.param("1.2.3.4-::1", "one end is IPv4", id="mixed range"),
        pytest.param("a b.com", "contains a blank", id="blank"),
        pytest.param("[a-c*.com", "a bracket is not closed", id="bracket"),
        pytest.param("{a,b*.com", "a brace is not closed", id="brace"),
        pytest.param("*.com\\", "nothing follows the backslash", id="backslash"),
    ],
)
def test_bad_pattern_is_refused_with_its_place(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PatternBypass.from_patterns(["good.example", pattern], path="bypasses[0].matchers")
    assert caught.value.path == "bypasses[0].matchers[1]"
    assert message in str(caught.value)


@pytest.mark.parametrize("pattern", [":80", "10.0.0.9-10.0.0.1", "a:90-80"])
def test_pattern_that_never_matches_is_a_warning_and_still_counts(pattern: str) -> None:
    patterns, problems = compile_patterns(inline([pattern], "matchers"))
    assert [problem.severity for problem in problems] == ["warning"]
    assert problems[0].path == "matchers[0]"
    assert "never matches" in problems[0].message
    assert PatternBypass(patterns, whitelist=True).contains("tcp", at("a:1"))


def test_ports_of_several_patterns_add_up() -> None:
    bypass = PatternBypass.from_patterns(["a.example:80", "a.example:443-445", ".b.example:80", "*.b.example:81"])
    for text, expected in (("a.example:80", True), ("a.example:444", True), ("a.example:81", False)):
        assert bypass.contains("tcp", at(text)) is expected
    for text, expected in (("b.example:81", False), ("x.b.example:81", True), ("x.b.example:80", True)):
        assert bypass.contains("tcp", at(text)) is expected
    anywhere = PatternBypass.from_patterns(["a.example:80", "a.example", "a.example:443"])
    assert anywhere.contains("tcp", at("a.example:7"))


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("[::1]:80", "[::1]:80", "[::1]:81"),
        ("[fd00:*]:80", "[fd00::5]:80", "[fd00::5]:81"),
        ("fd00:*", "[fd00::5]:80", "[fe80::5]:80"),
        ("fd00:*:5", "[fd00::5]:80", "[fd00::6]:80"),
        ("*ads*", "my-ads.example:1", "my.example:1"),
        ("*-ads.example", "my-ads.example:1", "ads.example:1"),
        ("?*.example", "a.example", ".example"),
        ("a\\*.*", "a*.b", "ab.b"),
        ("[!a]*.x", "b.x", "a.x"),
        ("*.{com,net}:80", "a.net:80", "a.org:80"),
        ("::ffff:10.0.0.0/104", "10.1.2.3", "11.1.2.3"),
        ("fe80::1", "fe80::1%eth0", "fe80::2%eth0"),
    ],
)
def test_forms_beside_the_rows(pattern: str, matching: str, other: str) -> None:
    bypass = PatternBypass.from_patterns([pattern])
    host, _, zone = matching.partition("%")
    assert bypass.contains("tcp", Endpoint(matching, 0) if zone else at(host))
    host, _, zone = other.partition("%")
    assert not bypass.contains("tcp", Endpoint(other, 0) if zone else at(host))


def test_replacing_the_patterns_may_empty_the_table() -> None:
    bypass = PatternBypass.from_patterns(["a"])
    assert bypass.contains("tcp", at("a:1"))
    bypass.replace(Patterns())
    assert not bypass.contains("tcp", at("a:1"))


def test_network_other_than_tcp_and_udp_is_refused() -> None:
    assert check_network(" TCP", "x") == "tcp"
    assert check_network("", "x") == ""
    with pytest.raises(ConfigError, match=r"bypasses\[0\]\.network: 'tcp4' is not a network"):
        check_network("tcp4", "bypasses[0].network")


# ---- against a naive oracle ---------------------------------------------------------------------
LABEL = st.sampled_from(["a", "b", "ab", "c", "com"])
NAME = st.lists(LABEL, min_size=1, max_size=4).map(".".join)
V4 = st.integers(0, 255).map(lambda n: f"10.0.{n % 4}.{n}")
V6 = st.integers(0, 300).map(lambda n: str(ipaddress.IPv6Address((0xFD << 120) + n)))
IP = st.one_of(V4, V6)
PORT = st.integers(78, 83)
GLOB = st.lists(st.one_of(LABEL, st.sampled_from(["*", "?", ".", "*.", "10.0."])), min_size=1, max_size=5).map("".join)


@st.composite
def pattern_and_oracle(draw: st.DrawFn) -> tuple[str, tuple[str, str, int, int]]:
    """Return a pattern as written, and as (kind, key, lowest port, highest port)."""
    kind = draw(st.sampled_from(["name", "suffix", "glob", "ip", "range", "net"]))
    low, high = 0, 65535
    ports = draw(st.sampled_from(["", "one", "range"])) if kind in ("name", "suffix", "glob", "ip") else ""
    if ports:
        low = high = draw(PORT)
        if ports == "range":
            high = draw(st.integers(low, 83))
    match kind:
        case "name":
            key = draw(NAME)
        case "suffix":
            key = "." + draw(NAME)
        case "glob":
            key = draw(GLOB.filter(lambda text: "*" in text or "?" in text))
        case "ip":
            key = draw(IP)
        case "range":
            low_ip, high_ip = sorted(draw(st.tuples(V4, V4)), key=lambda text: int(ipaddress.ip_address(text)))
            key = f"{low_ip}-{high_ip}"
        case _:
            key = f"{draw(V4)}/{draw(st.integers(20, 32))}"
    text = f"[{key}]" if ports and ":" in key else key
    if ports:
        text += f":{low}" if ports == "one" else f":{low}-{high}"
    return text, (kind, key, low, high)


def covers(rule: tuple[str, str, int, int], host: str, port: int) -> bool:
    kind, key, low, high = rule
    if not low <= port <= high:
        return False
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        ip = None
    match kind:
        case "name":
            return host == key
        case "suffix":
            return ("." + host).endswith(key)
        case "glob":
            absolute = key.endswith(".") and key[-2:-1].isalnum()
            return re.fullmatch(fnmatch.translate(key[:-1] if absolute else key), host) is not None
        case "ip":
            return ip == ipaddress.ip_address(key)
        case "range":
            first, last = (ipaddress.ip_address(part) for part in key.split("-"))
            return ip is not None and ip.version == 4 and int(first) <= int(ip) <= int(last)
        case _:
            return ip is not None and ip in ipaddress.ip_network(key, strict=False)


@settings(max_examples=300, deadline=None)
@given(st.lists(pattern_and_oracle(), max_size=12), st.lists(st.tuples(st.one_of(NAME, IP), PORT), max_size=8))
def test_compiled_patterns_equal_a_naive_search(
    rules: list[tuple[str, tuple[str, str, int, int]]], targets: list[tuple[str, int]]
) -> None:
    bypass = PatternBypass.from_patterns([text for text, _ in rules])
    for host, port in targets:
        expected = any(covers(rule, host, port) for _, rule in rules)
        assert bypass.contains("tcp", Endpoint(host, port)) is expected, (host, port)


def test_hundred_thousand_patterns_are_looked_up_in_microseconds() -> None:
    def word(number: int, size: int) -> str:
        number = number * 2654435761 % (1 << 40)
        return "".join("abcdefghijklmnopqrstuvwxyz"[number >> 5 * at & 31 & 25] for at in range(size))

    patterns = []
    for number in range(100_000):
        name = f"{word(number, 7)}{number}.{word(number + 1, 3)}"
        ip = f"{1 + number % 200}.{number >> 8 & 255}.{number & 255}"
        forms = (name, f".{name}", f"*.{name}", f"*-{name}", f"{name}*", f"*{name}*", f"{ip}.0/24", f"{ip}.7:80")
        patterns.append(forms[number % len(forms)])
    bypass = PatternBypass.from_patterns(patterns)
    hosts = ["www.example.com", "203.0.113.9", "2001:db8::1", "a.b.c.d.e.f.g.example.org"]
    assert not any(bypass.contains("tcp", Endpoint(host, 443)) for host in hosts)
    rounds = 200
    began = time.perf_counter()
    for _ in range(rounds):
        for host in hosts:
            bypass.contains("tcp", Endpoint(host, 443))
    each = (time.perf_counter() - began) / (rounds * len(hosts))
    assert each < 200e-6, f"{each * 1e6:.1f} microseconds"  # a search of the list takes several milliseconds
