"""Routes that are reached lazily, races on the way, groups of chains. Test names carry ids of docs/compatibility.md."""

from __future__ import annotations

import asyncio

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import DialError, DialTimeout, GostnetError, NoRoute, UpstreamRejected
from gostnet.core.flow import Flow, Sniffed
from gostnet.core.stream import Stream
from gostnet.pipeline.chain import Chain, ChainEntry, ChainGroup
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Latency, Node
from gostnet.pipeline.router import ServiceRouter
from gostnet.pipeline.selector import Fifo, LowestLatency, Parallel, RoundRobin, Selector
from gostnet.policies.matcher import RuleMatcher

from .kit import Direct, Label, node, run_virtual
from .test_router import TARGET, Matches, way


class Slow:
    """A connector whose handshake takes its time, and then perhaps fails."""

    def __init__(self, seconds: float, error: GostnetError | None = None) -> None:
        self.seconds = seconds
        self.error = error
        self.cancelled = 0

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return below

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        assert isinstance(below, Label)
        return Label((*below.way, f"slow {target}"))


def slow(name: str, port: int, seconds: float, error: GostnetError | None = None) -> Node:
    made = node(name, port)
    made.connector = Slow(seconds, error)  # type: ignore[assignment]
    return made


def racing(direct: Direct, *nodes: Node) -> Chain:
    return Chain("c", [Hop("h", list(nodes), Selector(Parallel()))], direct)


def virtual_way(router: ServiceRouter, flow: Flow | None = None) -> tuple[str, ...]:
    async def main() -> tuple[str, ...]:
        stream = await router.connect(flow or Flow(), TARGET)
        assert isinstance(stream, Label)
        return stream.way

    return run_virtual(main())


# ---- lazily --------------------------------------------------------------------------------------
def test_c04_what_a_node_can_do_without_the_one_before_it_is_not_dialled() -> None:
    class Kept:
        """A dialer with an open session: it has no use for what is below."""

        async def dial(self, flow: Flow, address: Endpoint, lower: object) -> Stream:
            return Label((f"session to {address}",))

    direct = Direct()
    first, second = node("a", 1), node("b", 2)
    second.transport = type(second.transport)("mux", Kept())
    routes = Chain("c", [Hop("h", [first]), Hop("i", [second])], direct)
    assert way(ServiceRouter(direct, routes)) == ("session to 192.0.2.1:2", f"b {TARGET}")
    assert direct.asked == []


def test_c02_one_hop_of_one_node() -> None:
    direct = Direct()
    assert way(ServiceRouter(direct, Chain("c", [Hop("h", [node("a", 1)])], direct))) == (
        "tcp 192.0.2.1:1",
        f"a {TARGET}",
    )


def test_c08_a_node_that_refuses_is_marked_with_its_chain_and_no_other() -> None:
    direct = Direct(dead=("192.0.2.1:1",))
    first, second = node("a", 1), node("b", 2)
    routes = Chain("c", [Hop("h", [first]), Hop("i", [second])], direct)
    with pytest.raises(DialError):
        way(ServiceRouter(direct, routes))
    assert (first.marker.failures, second.marker.failures, routes.marker.failures) == (1, 0, 1)


def test_c12_success_forgives_the_chain_as_well() -> None:
    direct = Direct()
    routes = Chain("c", [Hop("h", [node("a", 1)])], direct)
    routes.marker.mark(0.0)
    way(ServiceRouter(direct, routes))
    assert routes.marker.failures == 0


def test_c13_a_node_without_an_address_is_what_the_one_before_it_makes_of_that() -> None:
    direct = Direct()
    second = node("b", 2)
    second.address = Endpoint("", 0)
    routes = Chain("c", [Hop("h", [node("a", 1)]), Hop("i", [second])], direct)
    assert way(ServiceRouter(direct, routes)) == ("tcp 192.0.2.1:1", "a :0", f"b {TARGET}")


def test_r01_an_attempt_may_take_fifteen_seconds() -> None:
    direct = Direct()
    router = ServiceRouter(direct, Chain("c", [Hop("h", [slow("a", 1, 14.9)])], direct))
    assert virtual_way(router)[0] == "tcp 192.0.2.1:1"
    router = ServiceRouter(direct, Chain("c", [Hop("h", [slow("a", 1, 15.1)])], direct))
    with pytest.raises(DialTimeout, match="15s"):
        virtual_way(router)


def test_r03_r05_retries_are_attempts_after_the_first() -> None:
    direct = Direct(dead=("192.0.2.1:1",))
    only = node("a", 1)
    with pytest.raises(DialError):
        virtual_way(ServiceRouter(direct, Chain("c", [Hop("h", [only])], direct), retries=3))
    assert len(direct.asked) == 4
    direct.dead = ()
    direct.asked.clear()
    calls = iter((DialError("once"), None))
    flaky = node("b", 2, fail=lambda step, target: next(calls) if step == "handshake" else None)
    router = ServiceRouter(direct, Chain("c", [Hop("h", [flaky])], direct), retries=2)
    assert virtual_way(router) == ("tcp 192.0.2.1:2", f"b {TARGET}")
    assert len(direct.asked) == 2


def test_a_flow_that_no_node_is_for_fails_at_once_and_is_not_retried() -> None:
    direct = Direct()
    item = node("a", 1, matcher=RuleMatcher("Host(`only.test`)"))
    router = ServiceRouter(direct, Chain("c", [Hop("h", [item])], direct), retries=5)
    with pytest.raises(NoRoute, match=r"no node is for 203\.0\.113\.5"):
        way(router)
    assert direct.asked == []


def test_matchers_see_the_name_that_was_asked_for_and_bypasses_the_address() -> None:
    direct = Direct()
    item = node("a", 1, matcher=RuleMatcher("Host(`web.test`)"))
    routes = Chain("c", [Hop("h", [item])], direct)

    class Names:
        def lookup(self, host: str, family: int = 0) -> list[str]:
            return ["192.0.2.80"] if host == "web.test" else []

    router = ServiceRouter(direct, routes, hosts=Names())
    assert way(router, Endpoint("web.test", 80)) == ("tcp 192.0.2.1:1", "a 192.0.2.80:80")
    sniffed = Flow()
    sniffed.sniffed = Sniffed("tls", "web.test")
    assert way(router, TARGET, sniffed) == ("tcp 192.0.2.1:1", f"a {TARGET}")


# ---- parallel ------------------------------------------------------------------------------------
def test_l12_the_node_that_is_reached_first_carries_the_flow() -> None:
    direct, flow = Direct(dead=("192.0.2.1:1",)), Flow()
    dead, lagging, live = node("dead", 1), slow("lagging", 2, 5.0), slow("live", 3, 1.0)
    routes = racing(direct, dead, lagging, live)
    assert virtual_way(ServiceRouter(direct, routes), flow) == ("tcp 192.0.2.1:3", f"slow {TARGET}")
    assert flow.route == ("live@192.0.2.1:3",)
    assert lagging.connector.cancelled == 1  # type: ignore[attr-defined]
    assert [item.marker.failures for item in (dead, lagging, live)] == [1, 0, 0]
    assert [stream.aborted for stream in direct.streams] == [True, False]
    assert routes.marker.failures == 0


def test_l13_a_node_that_hangs_after_its_connection_is_open_costs_nobody_anything() -> None:
    direct = Direct()
    routes = racing(direct, slow("hangs", 1, 3600), slow("live", 2, 0.01))
    router = ServiceRouter(direct, routes, timeout=2)
    assert {virtual_way(router)[0] for _ in range(5)} == {"tcp 192.0.2.1:2"}


def test_l13_nodes_that_fail_in_their_handshake_are_marked() -> None:
    direct = Direct()
    bad, live = slow("bad", 1, 0.1, DialError("tls")), slow("live", 2, 0.5)
    assert virtual_way(ServiceRouter(direct, racing(direct, bad, live)))[0] == "tcp 192.0.2.1:2"
    assert bad.marker.failures == 1


def test_when_all_that_race_fail_the_first_error_is_raised_and_the_chain_is_marked() -> None:
    direct = Direct()
    routes = racing(direct, slow("a", 1, 0.2, DialError("a")), slow("b", 2, 0.1, DialError("b")))
    with pytest.raises(DialError, match="b"):
        virtual_way(ServiceRouter(direct, routes))
    assert routes.marker.failures == 1
    assert all(stream.aborted for stream in direct.streams)


def test_r09_the_deadline_marks_all_that_hang() -> None:
    direct = Direct()
    items = [slow("a", 1, 3600), slow("b", 2, 3600)]
    routes = racing(direct, *items)
    with pytest.raises(DialTimeout):
        virtual_way(ServiceRouter(direct, routes, timeout=2))
    assert [item.marker.failures for item in items] == [1, 1]
    assert routes.marker.failures == 1


def test_r09_a_deadline_that_passes_behind_the_nodes_marks_none_of_them() -> None:
    class Mute(Slow):
        async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
            await asyncio.sleep(3600)
            raise AssertionError

    direct = Direct()
    items = [slow("a", 1, 5), node("b", 2)]
    items[1].connector = Mute(0.1)  # type: ignore[assignment]
    routes = racing(direct, *items)
    with pytest.raises(DialTimeout):
        virtual_way(ServiceRouter(direct, routes, timeout=2))
    assert [item.marker.failures for item in items] == [0, 0]
    assert routes.marker.failures == 0


def test_a_race_in_the_second_hop_goes_through_the_first_one_for_each() -> None:
    direct = Direct()
    first = node("a", 1)
    hops = [Hop("h", [first]), Hop("i", [slow("b", 2, 3600), slow("c", 3, 0.1)], Selector(Parallel()))]
    assert virtual_way(ServiceRouter(direct, Chain("c", hops, direct))) == (
        "tcp 192.0.2.1:1",
        "a 192.0.2.1:3",
        f"slow {TARGET}",
    )
    assert direct.asked == ["192.0.2.1:1"] * 2


def test_a_race_in_the_first_hop_leads_to_the_second() -> None:
    direct, flow = Direct(), Flow()
    hops = [Hop("h", [slow("a", 1, 9), slow("b", 2, 0.1)], Selector(Parallel())), Hop("i", [node("c", 3)])]
    assert virtual_way(ServiceRouter(direct, Chain("c", hops, direct)), flow)[-1] == f"c {TARGET}"
    assert flow.route == ("b@192.0.2.1:2", "c@192.0.2.1:3")


def test_a_first_hop_that_is_lost_is_not_held_against_the_second() -> None:
    direct = Direct()
    second = node("c", 3)
    hops = [Hop("h", [slow("a", 1, 0.1, DialError("a"))]), Hop("i", [second])]
    with pytest.raises(DialError):
        virtual_way(ServiceRouter(direct, Chain("c", hops, direct)))
    assert second.marker.failures == 0


# ---- latency -------------------------------------------------------------------------------------
def test_real_connections_measure_where_it_matters() -> None:
    direct = Direct()
    items = [slow("far", 1, 0.3), slow("near", 2, 0.1)]
    for item in items:
        item.latency = Latency()
    router = ServiceRouter(direct, Chain("c", [Hop("h", items, Selector(LowestLatency()))], direct))

    async def main() -> list[str]:
        ways = []
        for _ in range(5):
            stream = await router.connect(Flow(), TARGET)
            assert isinstance(stream, Label)
            ways.append(stream.way[0])
        return ways

    assert run_virtual(main()) == ["tcp 192.0.2.1:1", *["tcp 192.0.2.1:2"] * 4]
    assert items[1].latency is not None
    assert items[1].latency.value == pytest.approx(0.1)


# ---- groups --------------------------------------------------------------------------------------
def single(name: str, port: int, direct: Direct) -> Chain:
    return Chain(name, [Hop(name, [node(name, port)])], direct)


def outcomes(router: ServiceRouter, count: int) -> list[str]:
    found = []
    for _ in range(count):
        try:
            found.append(way(router)[0].removeprefix("tcp 192.0.2.1:"))
        except DialError:
            found.append("fail")
    return found


def test_g01_g02_a_chain_that_fails_gives_way_to_the_others() -> None:
    for strategy in (RoundRobin(), Fifo()):
        direct = Direct(dead=("192.0.2.1:1",))
        group = ChainGroup(
            [ChainEntry(single("dead", 1, direct)), ChainEntry(single("live", 2, direct))], Selector(strategy)
        )
        assert outcomes(ServiceRouter(direct, group), 4) == ["fail", "2", "2", "2"]


def test_g02_a_retry_takes_the_next_chain() -> None:
    direct = Direct(dead=("192.0.2.1:1",))
    group = ChainGroup([ChainEntry(single("dead", 1, direct)), ChainEntry(single("live", 2, direct))])
    assert way(ServiceRouter(direct, group, retries=1))[0] == "tcp 192.0.2.1:2"


def test_g03_g04_the_metadata_of_chains_counts_in_a_group() -> None:
    direct = Direct()
    primary, backup = single("primary", 1, direct), single("backup", 2, direct)
    backup.backup = True
    group = ChainGroup([ChainEntry(backup), ChainEntry(primary)])
    router = ServiceRouter(direct, group)
    assert outcomes(router, 3) == ["1", "1", "1"]
    primary.marker.max_fails = 2
    direct.dead = ("192.0.2.1:1",)
    assert outcomes(router, 4) == ["fail", "fail", "2", "2"]
    heavy, light = single("heavy", 1, Direct()), single("light", 2, Direct())
    heavy.weight = 3
    turns = outcomes(ServiceRouter(direct, ChainGroup([ChainEntry(heavy), ChainEntry(light)])), 4)
    assert sorted(turns) == ["1", "1", "1", "2"]


def test_g05_an_entry_is_for_the_flows_that_its_matcher_takes() -> None:
    direct = Direct()
    group = ChainGroup(
        [
            ChainEntry(single("special", 1, direct), RuleMatcher("Host(`special.test`)")),
            ChainEntry(single("rest", 2, direct)),
        ]
    )
    router = ServiceRouter(direct, group)
    assert {way(router, Endpoint("other.test", 80))[0] for _ in range(3)} == {"tcp 192.0.2.1:2"}
    assert {way(router, Endpoint("special.test", 80))[0] for _ in range(4)} == {"tcp 192.0.2.1:1", "tcp 192.0.2.1:2"}
    group.entries[0].priority = 1
    assert {way(router, Endpoint("special.test", 80))[0] for _ in range(4)} == {"tcp 192.0.2.1:1"}


def test_g05_a_flow_that_no_entry_takes_fails() -> None:
    direct = Direct()
    group = ChainGroup([ChainEntry(single("special", 1, direct), RuleMatcher("Host(`special.test`)"))])
    with pytest.raises(NoRoute, match=r"no chain of the group is for other\.test"):
        way(ServiceRouter(direct, group), Endpoint("other.test", 80))


def test_g07_g10_when_all_are_dead_the_first_is_tried_and_never_the_direct_way() -> None:
    direct = Direct()
    entries = [ChainEntry(single("a", 1, direct)), ChainEntry(single("b", 2, direct))]
    for entry in entries:
        entry.marker.down = True
    assert outcomes(ServiceRouter(direct, ChainGroup(entries)), 2) == ["1", "1"]
    assert outcomes(ServiceRouter(direct, ChainGroup(entries[1:])), 1) == ["2"]


def test_a_chain_that_its_bypass_skips_leads_to_the_direct_way() -> None:
    direct = Direct()
    made = single("a", 1, direct)
    made.hops[0].bypass = Matches(str(TARGET))
    assert way(ServiceRouter(direct, ChainGroup([ChainEntry(made)]))) == (f"tcp {TARGET}",)


def test_c11_g_a_refused_target_is_not_held_against_the_chain() -> None:
    direct = Direct()
    made = single("a", 1, direct)
    made.hops[0].nodes[0].connector.fail = (  # type: ignore[attr-defined]
        lambda step, target: UpstreamRejected("refused", 5) if step == "connect" else None
    )
    with pytest.raises(UpstreamRejected):
        way(ServiceRouter(direct, ChainGroup([ChainEntry(made)]), retries=2))
    assert made.marker.failures == 0


def test_a_way_that_a_matcher_chooses_is_not_for_everybody() -> None:
    direct = Direct()
    made = single("a", 1, direct)
    assert not ServiceRouter(direct, made).selective
    assert not ServiceRouter(direct, ChainGroup([ChainEntry(made)])).selective
    assert ServiceRouter(direct, ChainGroup([ChainEntry(made, RuleMatcher("Host(`a`)"))])).selective
    made.hops[0].nodes[0].matcher = RuleMatcher("ClientIP(`10.0.0.1`)")
    assert ServiceRouter(direct, made).selective
    assert ServiceRouter(direct, ChainGroup([ChainEntry(made)])).selective
