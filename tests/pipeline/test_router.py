"""Router, chain, hop: the way to a target. Names of tests carry the ids of docs/compatibility.md."""

from __future__ import annotations

import asyncio

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import (
    BypassDenied,
    DialError,
    DialRefused,
    DialTimeout,
    GostnetError,
    ResolveError,
    UpstreamRejected,
)
from gostnet.core.flow import Flow, Network
from gostnet.core.tasks import run
from gostnet.pipeline.chain import Chain
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Node
from gostnet.pipeline.router import ServiceRouter
from gostnet.pipeline.selector import Fifo, RoundRobin, Selector

from .kit import Direct, Label, node

TARGET = Endpoint("203.0.113.5", 80)


class Matches:
    """A bypass of exact endpoints."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def contains(self, network: Network, target: Endpoint) -> bool:
        return str(target) in self.texts


class Table:
    """Hosts and resolver in one: a dict of names."""

    def __init__(self, **names: list[str]) -> None:
        self.names = {name.replace("_", "."): found for name, found in names.items()}

    def lookup(self, host: str, family: int = 0) -> list[str]:
        return self.names.get(host, [])

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        if host not in self.names:
            raise ResolveError(f"{host} has no address")
        return self.names[host]


def chain(direct: Direct, *hops: list[Node], bypass: Matches | None = None) -> Chain:
    return Chain("c", [Hop(f"hop-{i}", items, Selector(RoundRobin()), bypass) for i, items in enumerate(hops)], direct)


def way(router: ServiceRouter, target: Endpoint = TARGET, flow: Flow | None = None) -> tuple[str, ...]:
    async def main() -> tuple[str, ...]:
        stream = await router.connect(flow or Flow(), target)
        assert isinstance(stream, Label)
        return stream.way

    return run(main())


def test_c01_without_a_chain_the_way_is_direct() -> None:
    assert way(ServiceRouter(Direct())) == (f"tcp {TARGET}",)


def test_c03_three_hops_in_order_and_the_route_is_noted() -> None:
    direct, flow = Direct(), Flow()
    router = ServiceRouter(direct, chain(direct, [node("a", 1)], [node("b", 2)], [node("c", 3)]))
    assert way(router, flow=flow) == ("tcp 192.0.2.1:1", "a 192.0.2.1:2", "b 192.0.2.1:3", f"c {TARGET}")
    assert flow.route == ("a@192.0.2.1:1", "b@192.0.2.1:2", "c@192.0.2.1:3")
    assert flow.target == TARGET


def test_c05_c06_a_bypass_shortens_the_route() -> None:
    direct = Direct()
    hops = chain(direct, [node("a", 1)], [node("b", 2)])
    hops.hops[1].bypass = Matches(str(TARGET))
    assert way(ServiceRouter(direct, hops)) == ("tcp 192.0.2.1:1", f"a {TARGET}")
    hops.hops[0].bypass = Matches(str(TARGET))
    assert way(ServiceRouter(direct, hops)) == (f"tcp {TARGET}",)


def test_h14_a_node_whose_bypass_matches_is_passed_over() -> None:
    direct = Direct()
    nodes = [node("a", 1, bypass=Matches(str(TARGET))), node("b", 2)]
    assert way(ServiceRouter(direct, chain(direct, nodes))) == ("tcp 192.0.2.1:2", f"b {TARGET}")


def test_h02_the_highest_priority_wins() -> None:
    direct = Direct()
    nodes = [node("a", 1, priority=5), node("b", 2, priority=10), node("c", 3)]
    assert way(ServiceRouter(direct, chain(direct, nodes)))[0] == "tcp 192.0.2.1:2"


def test_service_bypass_refuses_also_behind_a_resolved_name() -> None:
    router = ServiceRouter(Direct(), bypass=Matches("10.0.0.9:80"), resolver=Table(evil_test=["10.0.0.9"]))
    flow = Flow()
    with pytest.raises(BypassDenied):
        way(router, Endpoint("evil.test", 80), flow)
    assert "10.0.0.9:80" in flow.reason


def test_r12_a_hop_bypass_sees_the_address_that_hosts_gave() -> None:
    direct = Direct()
    router = ServiceRouter(
        direct,
        chain(direct, [node("a", 1)], bypass=Matches("127.0.0.1:7002")),
        hosts=Table(dst_test=["127.0.0.1"]),
    )
    assert way(router, Endpoint("dst.test", 7002)) == ("tcp 127.0.0.1:7002",)


def test_a_name_travels_to_the_last_proxy_when_nothing_resolves_it() -> None:
    direct = Direct()
    router = ServiceRouter(direct, chain(direct, [node("a", 1)]))
    assert way(router, Endpoint("web.test", 80)) == ("tcp 192.0.2.1:1", "a web.test:80")


def test_r14_a_name_that_the_resolver_does_not_know_fails_before_the_chain() -> None:
    direct = Direct()
    with pytest.raises(ResolveError):
        way(ServiceRouter(direct, chain(direct, [node("a", 1)]), resolver=Table()), Endpoint("nowhere.test", 80))
    assert direct.asked == []


def test_r04_a_retry_takes_the_next_node_and_the_dead_one_is_marked() -> None:
    direct = Direct(dead=("192.0.2.1:1",))
    dead, live = node("dead", 1), node("live", 2)
    router = ServiceRouter(direct, chain(direct, [dead, live]), retries=1)
    assert way(router) == ("tcp 192.0.2.1:2", f"live {TARGET}")
    assert (dead.marker.failures, live.marker.failures) == (1, 0)


def test_l20_a_dead_node_costs_one_failure_then_is_left_out() -> None:
    direct = Direct(dead=("192.0.2.1:1",))
    router = ServiceRouter(direct, chain(direct, [node("dead", 1), node("live", 2)]))
    outcomes = []
    for _ in range(5):
        try:
            way(router)
            outcomes.append("ok")
        except DialError:
            outcomes.append("fail")
    assert outcomes == ["fail", "ok", "ok", "ok", "ok"]


def test_c10_the_node_that_cannot_be_reached_is_marked_and_not_the_one_before() -> None:
    def unreachable(step: str, target: Endpoint | None) -> GostnetError | None:
        return UpstreamRejected("no way", 4) if target == Endpoint("192.0.2.1", 2) else None

    direct = Direct()
    first, second = node("a", 1, fail=unreachable), node("b", 2)
    routes = chain(direct, [first], [second])
    with pytest.raises(UpstreamRejected):
        way(ServiceRouter(direct, routes))
    assert (first.marker.failures, second.marker.failures, routes.marker.failures) == (0, 1, 1)
    assert all(stream.aborted for stream in direct.streams)


def test_c09_a_failed_handshake_marks_the_node_and_closes_what_was_open() -> None:
    direct = Direct()
    bad = node("bad", 1, fail=lambda step, target: DialError("tls") if step == "handshake" else None)
    with pytest.raises(DialError, match="tls"):
        way(ServiceRouter(direct, chain(direct, [bad])))
    assert bad.marker.failures == 1
    assert direct.streams[0].aborted


def test_c11_r08_a_refused_target_marks_nobody_and_is_not_asked_again() -> None:
    calls: list[str] = []

    def refuse(step: str, target: Endpoint | None) -> GostnetError | None:
        calls.append(step)
        return UpstreamRejected("connection refused", 5) if step == "connect" else None

    direct = Direct()
    only = node("a", 1, fail=refuse)
    with pytest.raises(UpstreamRejected):
        way(ServiceRouter(direct, chain(direct, [only]), retries=2))
    assert only.marker.failures == 0
    assert calls.count("connect") == 1


def test_c12_success_resets_the_marker() -> None:
    direct = Direct()
    item = node("a", 1, max_fails=3)
    item.marker.mark(0.0)
    way(ServiceRouter(direct, chain(direct, [item])))
    assert item.marker.failures == 0


def test_r09_a_node_that_never_answers_ends_with_the_deadline_and_is_marked() -> None:
    class Silent:
        async def handshake(self, flow: Flow, below: object) -> object:
            await asyncio.sleep(3600)
            raise AssertionError

    direct = Direct()
    silent = node("silent", 1)
    silent.connector = Silent()  # type: ignore[assignment]
    with pytest.raises(DialTimeout, match=r"0\.05s"):
        way(ServiceRouter(direct, chain(direct, [silent]), timeout=0.05))
    assert silent.marker.failures == 1
    assert direct.streams[0].aborted


def test_r02_a_negative_number_of_retries_is_one_attempt() -> None:
    direct = Direct(dead=(str(TARGET),))
    with pytest.raises(DialRefused):
        way(ServiceRouter(direct, retries=-5))
    assert len(direct.asked) == 1


def test_traffic_limits_are_put_on_a_flow_once() -> None:
    class Limiter:
        def shape(self, flow: Flow, into: object) -> None:
            into.up.append(self)  # type: ignore[attr-defined]

    async def main() -> None:
        router = ServiceRouter(Direct(), traffic=[Limiter()])  # type: ignore[list-item]
        flow = Flow()
        await router.connect(flow, TARGET)
        await router.connect(flow, TARGET)
        assert flow.shapers is not None
        assert len(flow.shapers.up) == 1

    run(main())


def test_l21_fifo_comes_back_after_the_fail_timeout() -> None:
    clock = [0.0]
    items = [node("a", 1, max_fails=2, fail_timeout=3.0), node("b", 2)]
    hop = Hop("h", items, Selector(Fifo()))

    def pick() -> str:
        chosen = hop.select(Flow(), TARGET, clock[0])
        assert chosen is not None
        return chosen.name

    seen = []
    for _ in range(3):
        seen.append(pick())
        if seen[-1] == "a":
            items[0].marker.mark(clock[0])
    clock[0] = 3.5
    seen.append(pick())
    assert seen == ["a", "a", "b", "a"]
