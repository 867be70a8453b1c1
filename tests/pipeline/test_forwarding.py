"""Reaching a target of a forwarder: retries, marks, and which error counts in the end."""

from __future__ import annotations

import asyncio

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import BypassDenied, DialRefused, DialTimeout, GostnetError
from gostnet.core.flow import Flow, Network, Sniffed
from gostnet.core.tasks import run
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.forwarding import NoTarget, reach_node, reach_target
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Latency, Marker, Node
from gostnet.pipeline.selector import Fifo, Parallel, Selector
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.policies.matcher import RuleMatcher
from gostnet.protocols.forward.connector import ForwardConnector

from .kit import run_virtual

A, B, C = (Endpoint(f"192.0.2.{number}", 80) for number in (1, 2, 3))


def context(*targets: Endpoint) -> HandlerContext:
    plain = ForwardConnector(ForwardConnector.Options(), ConnectorContext())
    nodes = [Node(target.host, target, Transport("tcp", StreamDialer()), plain, Marker()) for target in targets]
    return HandlerContext(service="web", hop=Hop("forward", nodes, Selector(Fifo())))


class Dial:
    """Reaches whatever has no error, and keeps what was asked for."""

    def __init__(self, **errors: GostnetError) -> None:
        self.errors = errors
        self.asked: list[Endpoint] = []

    async def __call__(self, flow: Flow, target: Endpoint) -> str:
        assert flow.tried == ()
        self.asked.append(target)
        error = self.errors.get("abc"[int(target.host[-1]) - 1])
        if error is not None:
            flow.tried = (object(),)  # as a chain's node that failed
            raise error
        return f"reached {target}"


def _failures(made: HandlerContext) -> list[int]:
    assert made.hop is not None
    return [node.marker.failures for node in made.hop.nodes]


def test_the_first_one_that_works_is_used_and_the_others_are_marked() -> None:
    async def main() -> None:
        made, dial = context(A, B, C), Dial(a=DialRefused("a"), b=DialTimeout("b"))
        flow = Flow()
        assert await reach_target(flow, made, dial) == f"reached {C}"
        assert dial.asked == [A, B, C]
        assert _failures(made) == [1, 1, 0]
        assert flow.tried == ()
        # The dead ones are left out from now on; one that lives again is forgiven.
        dial.errors.clear()
        assert await reach_target(Flow(), made, dial) == f"reached {C}"
        assert made.hop is not None
        for node in made.hop.nodes:
            node.marker.last -= 3600
        assert await reach_target(Flow(), made, dial) == f"reached {A}"
        assert _failures(made) == [0, 1, 0]

    run(main())


def test_each_is_tried_once_and_the_last_error_is_raised() -> None:
    async def main() -> None:
        made, dial = context(A, B), Dial(a=DialRefused("a"), b=DialTimeout("b"))
        for _ in range(2):
            dial.asked.clear()
            with pytest.raises(DialTimeout, match="b"):
                await reach_target(Flow(), made, dial)
            assert dial.asked == [A, B]
        assert _failures(made) == [2, 2]

    run(main())


def test_the_only_one_is_tried_even_if_it_was_dead() -> None:
    async def main() -> None:
        made, dial = context(A), Dial(a=DialRefused("a"))
        for count in (1, 2):
            with pytest.raises(DialRefused):
                await reach_target(Flow(), made, dial)
            assert _failures(made) == [count]

    run(main())


def test_a_policy_ends_it_and_marks_nobody() -> None:
    async def main() -> None:
        made, dial = context(A, B), Dial(a=BypassDenied("a"))
        with pytest.raises(BypassDenied):
            await reach_target(Flow(), made, dial)
        assert dial.asked == [A]
        assert _failures(made) == [0, 0]

    run(main())


def test_no_target_is_an_error_of_its_own() -> None:
    class Everything:
        def contains(self, network: Network, target: Endpoint) -> bool:
            return True

    async def main() -> None:
        with pytest.raises(NoTarget, match="web: no forward target"):
            await reach_target(Flow(), context(), Dial())
        made = context(A)
        assert made.hop is not None
        made.hop.bypass = Everything()
        with pytest.raises(NoTarget):
            await reach_target(Flow(), made, Dial())

    run(main())


def test_targets_that_race_are_all_dialled_and_the_flow_goes_on_as_the_first_has_left_it() -> None:
    dialled: list[str] = []
    ended: list[str] = []

    async def dial(flow: Flow, target: Endpoint) -> str:
        flow.target = target
        flow.route = (str(target),)
        dialled.append(target.host)
        try:
            await asyncio.sleep({A: 0.1, B: 3600, C: 1.0}[target])
        finally:
            ended.append(target.host)
        if target == A:
            raise DialRefused("a")
        return f"reached {target}"

    async def main() -> None:
        made = context(A, B, C)
        assert isinstance(made.hop, Hop)
        made.hop.selector = Selector(Parallel())
        flow = Flow()
        node, reached = await reach_node(flow, made, dial)
        assert reached == f"reached {C}"
        assert node.address == C
        assert (flow.target, flow.route) == (C, (str(C),))
        assert dialled == [A.host, B.host, C.host]
        assert sorted(ended) == sorted(dialled)
        assert _failures(made) == [1, 0, 0]

    run_virtual(main())


def test_when_all_that_race_fail_the_first_error_is_raised_once() -> None:
    async def main() -> None:
        made, dial = context(A, B), Dial(a=DialRefused("a"), b=DialTimeout("b"))
        assert isinstance(made.hop, Hop)
        made.hop.selector = Selector(Parallel())
        with pytest.raises(DialRefused, match="a"):
            await reach_target(Flow(), made, dial)
        assert sorted(dial.asked) == [A, B]
        assert _failures(made) == [1, 1]

    run_virtual(main())


def test_the_target_depends_on_what_was_sniffed() -> None:
    async def main() -> None:
        made = context(A, B)
        assert isinstance(made.hop, Hop)
        made.hop.nodes[0].matcher = RuleMatcher("Host(`api.test`)")
        flow = Flow(target=Endpoint("api.test", 80))  # where it came in says nothing about where it wants to go
        assert await reach_target(flow, made, Dial()) == f"reached {B}"
        flow.sniffed = Sniffed("http", "api.test", path="/")
        made.hop.nodes[0].priority = 1
        assert await reach_target(flow, made, Dial()) == f"reached {A}"
        made.hop.nodes = made.hop.nodes[:1]
        flow.sniffed = Sniffed("http", "web.test", path="/")
        with pytest.raises(NoTarget, match=r"web: hop forward: no node is for web\.test"):
            await reach_target(flow, made, Dial())

    run(main())


def test_reaching_a_target_measures_it_where_that_matters() -> None:
    async def main() -> None:
        made = context(A, B)
        assert isinstance(made.hop, Hop)
        for node in made.hop.nodes:
            node.latency = Latency()

        async def dial(flow: Flow, target: Endpoint) -> str:
            await asyncio.sleep(0.3)
            return ""

        await reach_target(Flow(), made, dial)
        assert made.hop.nodes[0].latency is not None
        assert made.hop.nodes[0].latency.value == pytest.approx(0.3)

    run_virtual(main())
