"""Captures compiled: what can never be wrong in them, whatever is captured."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.errors import ConfigError
from gostnet.core.resources import (
    MARK_DIVERTED,
    MARK_MASK,
    MARK_OWN,
    MARK_RETURNING,
    Around,
    Capture,
    Inlet,
    NftChain,
    NftRule,
    NftSet,
    NftTable,
    Ranges,
    Resource,
    Route,
    Rule,
    Sysctl,
    routed_table,
)
from gostnet.kernel.capture import compile_captures, table_name

RED = Capture("red", "tcp", "redirect", 12345, ("lan0",), True)
TPROXY = replace(RED, method="tproxy")
REDU = Capture("redu", "udp", "tproxy", 12346, ("lan0", "br-1"))

networks = st.one_of(
    st.builds(lambda a, n: str(ip_network((a, n), strict=False)), st.integers(0, 2**32 - 1), st.integers(0, 32)),
    st.builds(
        lambda a, n: str(ip_network((a.to_bytes(16, "big"), n), strict=False)),
        st.integers(0, 2**128 - 1),
        st.integers(0, 128),
    ),
)
port_ranges = st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda pair: (min(pair), max(pair)))
captures = st.builds(
    lambda kind, **kwargs: Capture(protocol=kind[0], method=kind[1], **kwargs),
    st.sampled_from([("tcp", "redirect"), ("tcp", "tproxy"), ("udp", "tproxy")]),
    service=st.sampled_from(["a", "b", 'with "quotes"']),
    port=st.integers(1, 65535),
    interfaces=st.lists(st.sampled_from(["lan0", "lan1", "br-0.5"]), unique=True).map(tuple),
    local=st.booleans(),
    exclude=st.lists(networks, max_size=4).map(tuple),
    sources=st.lists(networks, max_size=4).map(tuple),
    ports=st.lists(port_ranges, max_size=4).map(tuple),
    address=st.sampled_from(["", "192.0.2.1", "2001:db8::1"]),
).filter(lambda capture: capture.interfaces or capture.local)


def table_of(resources: tuple[Resource, ...]) -> NftTable:
    (table,) = [item for item in resources if isinstance(item, NftTable)]
    return table


def rules_of(table: NftTable, chain: str) -> list[str]:
    return [item.text for item in table.content if isinstance(item, NftRule) and item.chain == chain]


def packed(*texts: str) -> Ranges:
    """Return networks as ranges."""
    networks = [ip_network(text) for text in texts]
    ends = {4: b"", 6: b""}
    for network in networks:
        ends[network.version] += network.network_address.packed + network.broadcast_address.packed
    return Ranges(ends[4], ends[6])


AROUND = Around(packed("192.0.2.0/24", "2001:db8::/32"), ((((80, 80), (443, 443)), packed("198.51.100.1/32")),))


# ---- what goes direct ---------------------------------------------------------------------------
def test_what_goes_direct_is_let_go_before_it_is_captured() -> None:
    around = replace(AROUND, local=True)
    table = table_of(compile_captures([replace(RED, around=around)]))
    assert not any("@direct" in text for text in rules_of(table, "interface_0"))
    rules = rules_of(table, "local_0")
    direct = [index for index, text in enumerate(rules) if "@direct" in text]
    assert len(direct) == 3
    assert all("== syn" in rules[index] and rules[index].endswith("counter accept") for index in direct)
    assert [index for index in direct if "tcp dport @ports" in rules[index]] == direct[2:]
    assert max(direct) < next(index for index, text in enumerate(rules) if "redirect to" in text)
    assert not any(isinstance(item, Sysctl) for item in compile_captures([replace(RED, around=around)]))


def test_what_is_forwarded_hides_behind_the_host_and_has_it_forward() -> None:
    resources = compile_captures([replace(TPROXY, around=replace(AROUND, forwarded=True, local=True))])
    assert {item.name for item in resources if isinstance(item, Sysctl)} == {
        "net.ipv4.ip_forward",
        "net.ipv6.conf.all.forwarding",
    }
    hidden = 'iifname "lan0" ct mark & 0x04000000 == 0x04000000 counter masquerade'
    assert rules_of(table_of(resources), "direct_masquerade") == [hidden]
    only4 = Around(packed("192.0.2.0/24"), forwarded=True)
    resources = compile_captures([replace(TPROXY, around=only4)])
    assert [item.name for item in resources if isinstance(item, Sysctl)] == ["net.ipv4.ip_forward"]


def test_datagrams_stay_on_the_way_that_their_flow_has_begun() -> None:
    table = table_of(compile_captures([replace(REDU, around=replace(AROUND, forwarded=True))]))
    rules = rules_of(table, "interface_0")
    assert rules[0] == "meta l4proto udp ct mark & 0x04000000 == 0x04000000 counter accept"
    assert all("ct mark & 0x02000000 != 0x02000000" in text for text in rules if "@direct" in text)
    assert "ct mark set ct mark | 0x02000000" in rules[-1]


def test_what_has_come_back_through_lo_is_not_decided_again() -> None:
    table = table_of(compile_captures([replace(TPROXY, around=replace(AROUND, forwarded=True, local=True))]))
    assert not any("@direct" in text for text in rules_of(table, "return_0"))


def test_addresses_of_names_are_let_go_behind_networks_and_have_sets_of_their_own() -> None:
    around = replace(AROUND, local=True, names="abc")
    captures = [replace(TPROXY, local=True, around=around), replace(REDU, local=True, around=around)]
    table = table_of(compile_captures(captures))
    sets = [item for item in table.content if isinstance(item, NftSet) and item.timeout]
    assert [(of.name, of.type) for of in sets] == [("names4_abc", "ipv4_addr"), ("names6_abc", "ipv6_addr")]
    for chain in ("local_0", "local_1"):
        rules = rules_of(table, chain)
        named = [index for index, text in enumerate(rules) if "@names" in text]
        assert len(named) == 2
        assert all(rules[index].endswith("counter accept") for index in named)
        assert max(index for index, text in enumerate(rules) if "@direct" in text) < min(named)
        assert max(named) < len(rules) - 1
    assert not any("@names" in text for text in rules_of(table, "interface_0"))


def test_names_alone_are_enough_for_forwarding_to_be_asked_for() -> None:
    resources = compile_captures([replace(TPROXY, around=Around(forwarded=True, names="abc"))])
    assert len([item for item in resources if isinstance(item, Sysctl)]) == 2


# ---- every set of captures ----------------------------------------------------------------------
@given(st.lists(captures, min_size=1, max_size=4))
def test_no_marked_packet_gets_far(given_captures: list[Capture]) -> None:
    table = table_of(compile_captures(given_captures))
    allowed = {
        f'iifname "lo" meta mark & {MARK_MASK:#010x} == {MARK_RETURNING:#010x} goto tproxy_return',
    }
    bases = [item for item in table.content if isinstance(item, NftChain) and item.hook]
    assert bases
    for base in bases:
        rules = rules_of(table, base.name)
        guard = rules.index(f"meta mark & {MARK_MASK:#010x} != 0x00000000 accept")
        assert set(rules[:guard]) <= allowed
        assert base.priority > -100, "behind destination NAT"
    assert MARK_OWN & MARK_MASK == MARK_OWN != MARK_RETURNING


@given(st.lists(captures, min_size=1, max_size=4))
def test_every_capture_is_behind_what_is_never_captured(given_captures: list[Capture]) -> None:
    """Rules that redirect or divert are only reached through a jump to the chain `never`."""
    table = table_of(compile_captures(given_captures))
    chains = {item.name for item in table.content if isinstance(item, NftChain)}
    guarded = {name for name in chains if "jump never" in rules_of(table, name)}
    leads: dict[str, set[str]] = {name: set() for name in chains}
    for item in table.content:
        if isinstance(item, NftRule):
            for target in re.findall(r"(?:jump|goto) (\S+)$", item.text):
                assert target in chains
                leads[item.chain].add(target)

    def walk(name: str, behind: bool, depth: int) -> None:
        assert depth < 8, "the kernel allows 16 jumps"
        behind = behind or name in guarded
        for text in rules_of(table, name):
            if re.search(r"redirect to|dnat|tproxy ", text) or "meta mark set" in text:
                known = "socket transparent 1" in text  # belongs to a connection that was captured
                assert behind or known or name.startswith("return_"), (name, text)
        for target in leads[name]:
            walk(target, behind, depth + 1)

    for base in [item for item in table.content if isinstance(item, NftChain) and item.hook]:
        walk(base.name, False, 0)


@given(st.lists(captures, min_size=1, max_size=4))
def test_sets_are_used_exist_once_and_are_named_by_their_content(given_captures: list[Capture]) -> None:
    table = table_of(compile_captures(given_captures))
    sets = [item for item in table.content if isinstance(item, NftSet)]
    used = {name for item in table.content if isinstance(item, NftRule) for name in re.findall(r"@(\S+)", item.text)}
    assert sorted(of.name for of in sets) == sorted(used)
    changed = [replace(c, exclude=(*c.exclude, "198.51.100.77/32")) for c in given_captures]
    by_name = {of.name: of for of in sets}
    for of in (item for item in table_of(compile_captures(changed)).content if isinstance(item, NftSet)):
        assert by_name.get(of.name, of) == of


@given(st.lists(networks, max_size=12), st.lists(networks, max_size=5))
def test_sets_hold_the_same_addresses_without_overlap(texts: list[str], probes: list[str]) -> None:
    table = table_of(compile_captures([replace(RED, exclude=tuple(texts))]))
    found = [
        ip_network(element)
        for item in table.content
        if isinstance(item, NftSet) and item.name.startswith("exclude")
        for element in item.elements
    ]
    for index, one in enumerate(found):
        assert not any(one.version == other.version and one.overlaps(other) for other in found[index + 1 :])
    for text in [*texts, *probes]:
        for address in (ip_network(text).network_address, ip_network(text).broadcast_address):
            expected = any(address in ip_network(t) for t in texts if ip_network(t).version == address.version)
            assert any(address in n for n in found if n.version == address.version) == expected


@given(st.lists(port_ranges, min_size=1, max_size=10), st.integers(1, 65535))
def test_ports_are_merged(ranges: list[tuple[int, int]], probe: int) -> None:
    table = table_of(compile_captures([replace(RED, ports=tuple(ranges))]))
    (of,) = [item for item in table.content if isinstance(item, NftSet) and item.name.startswith("ports")]
    spans = [tuple(map(int, e.split("-"))) if "-" in e else (int(e), int(e)) for e in of.elements]
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(spans))
    for port in (probe, *(p for pair in ranges for p in pair)):
        assert any(low <= port <= high for low, high in spans) == any(low <= port <= high for low, high in ranges)


@given(captures, captures)
def test_digest_tells_tables_apart(one: Capture, other: Capture) -> None:
    first, second = compile_captures([one]), compile_captures([other])
    assert first == compile_captures([one])
    assert (table_of(first).content == table_of(second).content) == (table_of(first) == table_of(second))


# ---- routes and rules ---------------------------------------------------------------------------
def test_redirect_needs_a_table_only() -> None:
    assert [type(item) for item in compile_captures([RED])] == [NftTable]
    assert compile_captures([]) == ()


def test_tproxy_has_a_rule_for_each_interface_and_ip_version() -> None:
    resources = compile_captures([TPROXY, REDU], slot=3)
    number = 18254 + 3
    assert [item for item in resources if isinstance(item, Route)] == [
        Route("0.0.0.0/0", number, "local", "lo"),
        Route("::/0", number, "local", "lo"),
    ]
    ways = [("br-1", MARK_DIVERTED), ("lan0", MARK_DIVERTED), ("lo", MARK_RETURNING)]
    assert [item for item in resources if isinstance(item, Rule)] == [
        Rule(version, number, number, mark, MARK_MASK, name) for version in (4, 6) for name, mark in ways
    ]
    assert table_of(resources).note == "slot 3"
    without = compile_captures([TPROXY, REDU], slot=3, ipv6=False)
    assert [item for item in without if getattr(item, "version", 6) == 4 or isinstance(item, NftTable)] == list(without)
    assert table_of(without) == table_of(resources), "what is captured does not depend on it"


def test_local_needs_no_rule_for_interfaces_and_the_other_way_round() -> None:
    only_local = compile_captures([replace(TPROXY, interfaces=())])
    assert {item.iif for item in only_local if isinstance(item, Rule)} == {"lo"}
    only_lan = compile_captures([replace(TPROXY, local=False)])
    assert {item.iif for item in only_lan if isinstance(item, Rule)} == {"lan0"}


# ---- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (replace(REDU, method="redirect"), "udp can only be captured by tproxy"),
        (replace(RED, port=0), "needs a listener with a port, not 0"),
        (replace(RED, port=65536), "not 65536"),
        (replace(RED, interfaces=(), local=False), "names interfaces, local, or both"),
        (replace(RED, interfaces=("lan0", "lo")), "'lo' cannot be captured.*write local"),
        (replace(RED, interfaces=("a" * 16,)), "is not the name of an interface"),
        (replace(RED, interfaces=("ééééééééé",)), "is not the name of an interface"),
        (replace(RED, interfaces=("wild*",)), "is not the name of an interface"),
        (replace(RED, interfaces=("",)), "is not the name of an interface"),
        (replace(RED, interfaces=("a b",)), "is not the name of an interface"),
        (replace(RED, interfaces=('a"b',)), "is not the name of an interface"),
        (replace(RED, exclude=("10.0.0.0/33",)), "'10.0.0.0/33' is not a network such as"),
        (replace(RED, sources=("here",)), "'here' is not a network such as"),
        (replace(RED, ports=((0, 5),)), "'0-5' is not a range of ports"),
        (replace(RED, ports=((9, 5),)), "'9-5' is not a range of ports"),
        (replace(RED, address="localhost"), "'localhost' is not an address"),
        (replace(RED, address="127.0.0.1"), "cannot reach 127.0.0.1 from outside; listen on :12345"),
        (replace(RED, address="::1"), "cannot reach ::1 from outside"),
    ],
)
def test_senseless_capture_is_refused(capture: Capture, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compile_captures([RED, capture])
    assert caught.value.path == capture.service


def test_loopback_listener_takes_what_the_host_itself_sends() -> None:
    assert compile_captures([replace(RED, address="127.0.0.1", interfaces=())])
    assert compile_captures([replace(TPROXY, address="127.0.0.1")])


@pytest.mark.parametrize("name", ["default", "a", "A.b-c_9", "x" * 64])
def test_instance_names(name: str) -> None:
    assert table_name(name) == f"gostnet-{name}"


@pytest.mark.parametrize("name", ["", "x" * 65, "a/b", "..", "-a", "a b", 'a"', "é"])
def test_senseless_instance_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a name of letters"):
        table_name(name)


def test_host_bits_and_single_addresses_are_networks() -> None:
    table = table_of(compile_captures([replace(RED, exclude=("192.0.2.77/24", "2001:db8::1"))]))
    elements = [item.elements for item in table.content if isinstance(item, NftSet) and "exclude" in item.name]
    assert elements == [("192.0.2.0/24",), ("2001:db8::1/128",)]
    assert ip_address("2001:db8::1") in ip_network(elements[1][0])


# ---- inlets -------------------------------------------------------------------------------------
INLET = Inlet("t", "tungo", 5001, 5002, (("10.0.0.0/8", ""), ("10.1.0.0/16", "10.9.9.9"), ("fd00::/8", "")))


def winner(rules: list[Rule], own: list[str], routed: list[str], address: str) -> str:
    """Look an address up as the kernel does: rule by rule, the longest match, unless it is suppressed."""
    tables = {
        254: [("own", ip_network(text)) for text in own],
        routed_table(0): [("in", ip_network(n)) for n in routed],
    }
    for rule in sorted(rules, key=lambda rule: rule.priority):
        matching = [(net.prefixlen, who) for who, net in tables[rule.table] if ip_address(address) in net]
        if matching and max(matching)[0] > rule.suppress:
            return max(matching)[1]
    return max((net.prefixlen, who) for who, net in tables[254] if ip_address(address) in net)[1]


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), unique=True, max_size=6),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=6, unique=True),
    st.integers(0, 7),
)
def test_the_longest_prefix_wins_among_the_hosts_routes_and_those_into_a_device(
    own: list[tuple[int, int]], routed: list[tuple[int, int]], probe: int
) -> None:
    """Networks of 0 to 3 bits below 10.0.0.0/8; of two that are the same the one into the device counts."""

    def network(bits: int, length: int) -> str:
        return str(ip_network((10 << 24 | bits << 21, 8 + length), strict=False))

    mine, theirs = ["0.0.0.0/0", *(network(*pair) for pair in own)], [network(*pair) for pair in routed]
    inlet = replace(INLET, ways=tuple((text, "") for text in dict.fromkeys(theirs)))
    rules = [r for r in compile_captures([], [inlet]) if isinstance(r, Rule) and r.mark == 0]
    address = str(ip_address(10 << 24 | probe << 21 | 1))
    candidates = [(ip_network(t).prefixlen, 0) for t in mine if ip_address(address) in ip_network(t)]
    candidates += [(ip_network(t).prefixlen, 1) for t in theirs if ip_address(address) in ip_network(t)]
    assert winner(rules, mine, theirs, address) == ("in" if max(candidates)[1] else "own")


def test_rules_of_instances_differ_and_stay_before_the_main_table() -> None:
    many = tuple((str(ip_network(f"2001:db8::/{length}", strict=False)), "") for length in range(129))
    seen: set[Rule] = set()
    for slot in (0, 1, 255):
        rules = {r for r in compile_captures([], [replace(INLET, ways=many)], slot=slot) if isinstance(r, Rule)}
        assert not rules & seen
        assert max(rule.priority for rule in rules) < 32766
        seen |= rules


def test_everything_that_has_come_back_in_is_handed_over_or_dropped() -> None:
    table = table_of(compile_captures([], [INLET]))
    base = rules_of(table, "tproxy_in")
    assert "ct direction reply" in base[0]
    assert base[1] == 'iifname "tungo" goto inlet_0'
    assert base[2] == f"meta mark & {MARK_MASK:#010x} != 0x00000000 accept"
    chain = rules_of(table, "inlet_0")
    assert chain[0] == f"meta mark & {MARK_MASK:#010x} == {MARK_OWN:#010x} drop", "never our own sockets'"
    assert chain[-1] == "drop"
    assert all("tproxy to" in text or "drop" in text or "transparent 1" in text for text in chain)
    assert rules_of(table, "inlet_out")[1] == f"meta mark & {MARK_MASK:#010x} != 0x00000000 accept"


def test_local_traffic_goes_through_the_device() -> None:
    local = Capture("t", "tcp", "tproxy", 5001, local=True, device="tungo")
    resources = compile_captures([local], [replace(INLET, ways=())])
    rules = [item for item in resources if isinstance(item, Rule) and item.mark == MARK_RETURNING]
    assert {rule.iif for rule in rules} == {"lo"}
    (table,) = {rule.table for rule in rules}
    devices = {item.device for item in resources if isinstance(item, Route) and item.table == table}
    assert devices == {"tungo"}
    assert not any("tproxy_return" in text for text in rules_of(table_of(resources), "tproxy_in"))


def test_local_cannot_be_captured_in_two_ways() -> None:
    with pytest.raises(ConfigError, match="local is captured by red already"):
        compile_captures([TPROXY, replace(TPROXY, service="t", device="tungo")], [INLET])
    with pytest.raises(ConfigError, match="'tungo' is the device itself"):
        compile_captures([Capture("t", "tcp", "tproxy", 1, ("tungo",), device="tungo")], [INLET])
