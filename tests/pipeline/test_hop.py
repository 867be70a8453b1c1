"""Hops and groups of hops: matchers, priorities, tiers. Names of tests carry the ids of docs/compatibility.md."""

from __future__ import annotations

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.errors import NoRoute
from gostnet.core.flow import Flow, Network, Sniffed
from gostnet.pipeline.hop import Hop, HopEntry, HopGroup
from gostnet.pipeline.node import Marker, Node
from gostnet.pipeline.selector import Fifo, RoundRobin, Selector
from gostnet.policies.bypass import PatternBypass
from gostnet.policies.matcher import FilterMatcher, RuleMatcher

from .kit import node

TARGET = Endpoint("203.0.113.5", 80)


class Everything:
    def contains(self, network: Network, target: Endpoint) -> bool:
        return True


class Recording:
    """A bypass that lets everything pass and keeps what it was asked about."""

    def __init__(self) -> None:
        self.asked: list[Endpoint] = []

    def contains(self, network: Network, target: Endpoint) -> bool:
        self.asked.append(target)
        return False


def pick(hop: Hop | HopGroup, flow: Flow | None = None, host: str = "", now: float = 0.0) -> str | None:
    found = hop.select(flow or Flow(), TARGET, now, host)
    return found.name if found is not None else None


def hop(*nodes: Node, fifo: bool = True, **extra: object) -> Hop:
    return Hop("h", list(nodes), Selector(Fifo() if fifo else RoundRobin()), **extra)  # type: ignore[arg-type]


def test_h01_without_nodes_the_hop_is_skipped() -> None:
    assert pick(hop()) is None


def test_h02_the_highest_priority_wins() -> None:
    assert pick(hop(node("a", 1, priority=5), node("b", 2, priority=10), node("c", 3))) == "b"


def test_h03_a_tie_is_the_selectors_to_break() -> None:
    equal = hop(node("a", 1, priority=50), node("b", 2, priority=50), node("c", 3, priority=1), fifo=False)
    assert [pick(equal) for _ in range(3)] == ["a", "b", "a"]


def test_h04_h05_negative_priorities_come_last_and_in_order() -> None:
    assert pick(hop(node("a", 1, priority=-5), node("b", 2))) == "b"
    assert pick(hop(node("a", 1, priority=-5), node("b", 2, priority=-10))) == "a"


def test_h06_a_primary_goes_before_a_backup_of_higher_priority() -> None:
    backup, primary = node("backup", 1, priority=100, backup=True), node("primary", 2, priority=10)
    assert pick(hop(backup, primary)) == "primary"
    primary.marker.mark(0.0)
    assert pick(hop(backup, primary)) == "backup"


def test_h07_a_node_whose_matcher_does_not_match_is_passed_over() -> None:
    picky = node("picky", 1, matcher=RuleMatcher("Host(`only.test`)"))
    assert pick(hop(picky, node("any", 2)), host="other.test") == "any"
    assert pick(hop(picky, node("any", 2)), host="only.test") == "picky"


def test_h08_when_no_node_is_for_a_flow_it_fails_unless_direct_is_asked_for() -> None:
    picky = node("picky", 1, matcher=RuleMatcher("Host(`only.test`)"))
    flow = Flow()
    with pytest.raises(NoRoute, match=r"hop h: no node is for other\.test"):
        pick(hop(picky), flow, "other.test")
    assert "other.test" in flow.reason
    assert pick(hop(picky, direct_otherwise=True), host="other.test") is None
    # One of its two nodes is bypassed, the other is not for it: nothing says that it may go around.
    with pytest.raises(NoRoute):
        pick(hop(picky, node("bypassed", 2, bypass=Everything())), host="other.test")


def test_h09_a_dead_node_of_high_priority_gives_way() -> None:
    high, low = node("high", 1, priority=100), node("low", 2, priority=10)
    high.marker.mark(0.0)
    assert pick(hop(high, low)) == "low"


def test_h10_the_only_node_is_used_even_if_it_is_dead() -> None:
    only = node("only", 1)
    only.marker.mark(0.0)
    only.marker.down = True
    assert pick(hop(only)) == "only"
    assert pick(hop(only, node("other", 2, matcher=RuleMatcher("Host(`x`)")))) == "only"


def test_h11_all_dead_first_is_last_resort() -> None:
    items = [node("a", 1), node("b", 2)]
    for item in items:
        item.marker.mark(0.0)
    assert pick(hop(*items)) == "a"


def test_h12_filters_know_no_specificity() -> None:
    items = [node("general", 1, matcher=FilterMatcher()), node("specific", 2, matcher=FilterMatcher("specific.com"))]
    assert pick(hop(*items), host="specific.com") == "general"


def test_h13_the_hops_own_bypass_comes_first() -> None:
    assert pick(hop(node("a", 1), bypass=Everything())) is None


def test_h14_a_bypassed_node_is_passed_over_and_a_hop_of_such_is_skipped() -> None:
    bypassed = node("bypassed", 1, bypass=Everything())
    assert pick(hop(bypassed, node("b", 2))) == "b"
    assert pick(hop(bypassed)) is None


def test_matchers_see_what_was_sniffed_and_who_asks() -> None:
    items = [
        node("api", 1, matcher=RuleMatcher("Host(`web.test`) && PathPrefix(`/api`)")),
        node("inside", 2, matcher=RuleMatcher("ClientIP(`10.0.0.0/8`)")),
        node("rest", 3, matcher=RuleMatcher("Network(`tcp`)")),
    ]
    flow = Flow(client=Endpoint("10.1.1.1", 7))
    assert pick(hop(*items), flow) == "inside"
    flow.sniffed = Sniffed("http", "web.test", path="/api/x")
    assert pick(hop(*items), flow, "192.0.2.1") == "api"
    assert pick(hop(*items), Flow(client=Endpoint("192.0.2.9", 7))) == "rest"


def test_a_bypass_is_asked_about_the_nodes_own_address_when_the_destination_is_unknown() -> None:
    seen = Recording()
    item = node("a", 1, bypass=seen)
    assert hop(item).select(Flow(), ANY, 0.0) is item
    assert seen.asked == [item.address]


@pytest.mark.parametrize(
    ("patterns", "sniffed", "reason"),
    [
        (["*.secret.test"], "www.secret.test", "bypass of h matches www.secret.test:80"),
        (["203.0.113.0/24"], "www.secret.test", "bypass of h matches 203.0.113.5:80"),
        (["203.0.113.0/24"], "", "bypass of h matches 203.0.113.5:80"),
        (["*.secret.test"], "other.test", ""),
    ],
)
def test_the_reason_names_what_the_bypass_of_a_hop_has_decided_by(
    patterns: list[str], sniffed: str, reason: str
) -> None:
    flow = Flow()
    if sniffed:
        flow.sniffed = Sniffed("tls", sniffed)
    found = pick(hop(node("a", 1), bypass=PatternBypass.from_patterns(patterns)), flow)
    assert (found, flow.reason) == (None if reason else "a", reason)


def test_the_reason_names_the_host_that_no_node_is_for() -> None:
    only = hop(node("a", 1, matcher=RuleMatcher("Host(`web.test`)")))
    flow = Flow()
    flow.sniffed = Sniffed("tls", "other.test")
    with pytest.raises(NoRoute, match=r"no node is for other\.test"):
        pick(only, flow, "203.0.113.5")
    assert flow.reason == "no node of h takes other.test"


# ---- groups --------------------------------------------------------------------------------------
def group(*entries: HopEntry) -> HopGroup:
    return HopGroup("web", list(entries), Selector(Fifo()))


def test_a_group_takes_the_first_hop_whose_matcher_matches() -> None:
    made = group(HopEntry(hop(node("a", 1)), RuleMatcher("Host(`a.test`)")), HopEntry(hop(node("b", 2), node("c", 3))))
    assert pick(made, host="a.test") == "a"
    assert pick(made, host="b.test") == "b"
    assert [item.name for item in made.nodes] == ["a", "b", "c"]


def test_a_group_without_a_match_has_no_target() -> None:
    assert pick(group(HopEntry(hop(node("a", 1)), RuleMatcher("Host(`a.test`)"))), host="b.test") is None
    assert pick(group()) is None


def test_a_hop_that_is_down_or_whose_nodes_are_dead_gives_way_to_the_next() -> None:
    first, second = node("first", 1), node("second", 2)
    made = group(HopEntry(hop(first)), HopEntry(hop(second)))
    first.marker.mark(0.0)
    assert pick(made) == "second"
    assert pick(made, now=11.0) == "first"
    made.entries[0].marker.down = True
    assert pick(made, now=11.0) == "second"
    second.marker.mark(11.0)
    assert pick(made, now=11.0) == "first"  # dead is the second one, and only the probe speaks against the first


def test_a_node_that_failed_in_this_attempt_is_only_given_when_nothing_else_is_left() -> None:
    first, second = node("first", 1), node("second", 2)
    made = group(HopEntry(hop(first)), HopEntry(hop(second)))
    flow = Flow()
    flow.tried = (first,)
    assert pick(made, flow) == "second"
    flow.tried = (first, second)
    assert pick(made, flow) in ("first", "second")


def test_priority_of_an_entry_decides_among_those_that_match() -> None:
    made = group(HopEntry(hop(node("a", 1))), HopEntry(hop(node("b", 2)), priority=7))
    assert pick(made) == "b"


def test_a_hop_of_a_group_that_has_no_node_for_a_flow_gives_way() -> None:
    picky = node("picky", 1, matcher=RuleMatcher("Host(`only.test`)"))
    assert pick(group(HopEntry(hop(picky)), HopEntry(hop(node("b", 2)))), host="x.test") == "b"


def test_entries_of_a_group_have_markers_of_their_own() -> None:
    assert HopEntry(hop()).marker is not HopEntry(hop()).marker
    assert isinstance(HopEntry(hop()).marker, Marker)


def test_what_depends_on_a_matcher_is_selective() -> None:
    rule = RuleMatcher("Host(`only.test`)")
    assert not hop(node("a", 1)).selective
    assert hop(node("a", 1, matcher=rule)).selective
    assert not group(HopEntry(hop(node("a", 1)))).selective
    assert group(HopEntry(hop(node("a", 1)), rule)).selective
    assert group(HopEntry(hop(node("a", 1, matcher=rule)))).selective
