"""Chains: hops in a row; a route is one node of each. Rows C01-C13, G01-G10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..core.address import Endpoint
from ..core.datagrams import Datagrams
from ..core.egress import Egress
from ..core.errors import GostnetError, NoRoute
from ..core.flow import Flow
from ..core.hub import current_hub
from ..core.stream import Stream
from .hop import Hop
from .node import Latency, Marker, Matcher, NodeEgress, RaceEgress
from .selector import Selector


class Router(Protocol):
    """Gives the route for a destination: a chain, or a group of chains."""

    @property
    def selective(self) -> bool:
        """Whether a matcher decides, so that flows to the same target may take different ways."""

    def route(self, flow: Flow, target: Endpoint, now: float) -> Route | None: ...


class Route:
    """The nodes that one flow goes through, as a way out: each is reached when the one behind it first needs it."""

    __slots__ = ("_last", "_raced", "chain", "stages")

    def __init__(self, stages: Sequence[NodeEgress | RaceEgress], chain: Chain | None = None) -> None:
        self.stages = stages
        self.chain = chain
        self._last = stages[-1]
        self._raced = any(isinstance(stage, RaceEgress) for stage in stages)

    @property
    def path(self) -> tuple[str, ...]:
        """The nodes, for logs: those that won where several race."""
        return tuple(_name(stage) for stage in self.stages)

    async def _reach(self, flow: Flow) -> tuple[NodeEgress, Stream]:
        """Connect through all nodes; return the last one and the stream to it. Marks successes and failures."""
        try:
            found = await self._last.reach(flow)
        except GostnetError:
            self._fail()
            raise
        if self.chain is not None:
            self.chain.marker.reset()
        if self._raced:
            flow.route = self.path
        return found

    def _fail(self) -> None:
        if self.chain is not None:
            self.chain.marker.mark(current_hub().loop.time())

    def blame(self, flow: Flow) -> None:
        """Mark the node that was being reached when the deadline passed, and the chain."""
        if self._last.blame(flow):
            self._fail()

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Connect to `target` through the nodes. A refusal of the last node concerns the target and marks nobody."""
        last, below = await self._reach(flow)
        return await last.connect_over(flow, below, target)

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open an association through the nodes."""
        last, below = await self._reach(flow)
        return await last.associate_over(flow, below, target)


def _name(stage: NodeEgress | RaceEgress) -> str:
    if isinstance(stage, RaceEgress):
        if stage.won is None:
            return f"parallel@{','.join(str(way.node.address) for way in stage.ways)}"
        stage = stage.won
    return f"{stage.node.name}@{stage.node.address}"


@dataclass(slots=True, eq=False)
class Chain:
    """Hops in a row."""

    name: str
    hops: Sequence[Hop]
    direct: Egress
    marker: Marker = field(default_factory=Marker)
    weight: int = 1
    backup: bool = False

    def route(self, flow: Flow, target: Endpoint, now: float) -> Route | None:
        """Return the route to `target`, None for the direct way. Raise NoRoute."""
        stages = self._stages(self.hops, flow, target, now)
        return Route(stages, self) if stages else None

    @property
    def selective(self) -> bool:
        """Whether nodes have matchers."""
        return any(hop.selective for hop in self.hops)

    def _stages(
        self, hops: Sequence[Hop], flow: Flow, target: Endpoint, now: float
    ) -> Sequence[NodeEgress | RaceEgress]:
        host = flow.target.host if target.host and flow.target is not None else ""
        stages: list[NodeEgress | RaceEgress] = []
        lower: Egress | None = None
        for hop in hops:
            nodes = hop.pick(flow, target, now, host)
            if not nodes:
                break
            if len(nodes) == 1:
                lower = NodeEgress(nodes[0], lower or nodes[0].direct or self.direct)
            else:
                lower = RaceEgress([NodeEgress(node, lower or node.direct or self.direct) for node in nodes])
            stages.append(lower)
        return stages

    def way_to(self, index: int) -> Egress:
        """Return the way out that leads to the nodes of the hop at `index`: what probes reach them by."""
        return _WayTo(self, index) if index else self.direct


class _WayTo:
    """The first hops of a chain as a way out; nodes are chosen for each connection."""

    __slots__ = ("_chain", "_index")

    def __init__(self, chain: Chain, index: int) -> None:
        self._chain = chain
        self._index = index

    def _way(self, flow: Flow, target: Endpoint) -> Egress:
        chain = self._chain
        stages = chain._stages(chain.hops[: self._index], flow, target, current_hub().loop.time())
        if len(stages) < self._index:
            raise NoRoute(f"chain {chain.name}: {target} is not reached through all hops before it")
        return stages[-1]

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Connect to a node through the hops before it."""
        return await self._way(flow, target).connect(flow, target)

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open an association through the hops before."""
        return await self._way(flow, target or Endpoint("", 0)).associate(flow, target)


@dataclass(slots=True, eq=False)
class ChainEntry:
    """One chain of a group, with the flows that it is for; how it has been doing is the chain's."""

    chain: Chain
    matcher: Matcher | None = None
    priority: int = 0
    latency: Latency | None = None

    @property
    def marker(self) -> Marker:
        """The chain's."""
        return self.chain.marker

    @property
    def weight(self) -> int:
        """The chain's."""
        return self.chain.weight

    @property
    def backup(self) -> bool:
        """The chain's."""
        return self.chain.backup


@dataclass(slots=True)
class ChainGroup:
    """Several chains, one of which is chosen for each flow."""

    entries: Sequence[ChainEntry]
    selector: Selector = field(default_factory=Selector)

    @property
    def selective(self) -> bool:
        """Whether chains, or nodes of theirs, have matchers."""
        return any(entry.matcher is not None or entry.chain.selective for entry in self.entries)

    def route(self, flow: Flow, target: Endpoint, now: float) -> Route | None:
        """Return the route of the chain chosen. Raise NoRoute when none is for this flow."""
        host = flow.target.host if target.host and flow.target is not None else ""
        entries = self.entries
        if any(entry.matcher is not None for entry in entries):
            entries = [entry for entry in entries if entry.matcher is None or entry.matcher.matches(flow, host)]
        entry = self.selector.select(flow, entries, now)
        if entry is None:
            raise NoRoute(
                f"no chain of the group is for {host or target}", hint="add a chain without a matcher to the group"
            )
        return entry.chain.route(flow, target, now)
