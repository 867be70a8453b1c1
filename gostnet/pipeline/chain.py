"""Chains: hops in a row; a route is one node of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..core.address import Endpoint
from ..core.datagrams import Datagrams
from ..core.egress import Egress
from ..core.errors import GostnetError
from ..core.flow import Flow
from ..core.hub import current_hub
from ..core.stream import Stream
from .hop import Hop
from .node import Marker, Node, NodeEgress
from .selector import Selector


class Router(Protocol):
    """Gives the route for a destination: a chain, or a group of chains."""

    def route(self, flow: Flow, target: Endpoint, now: float) -> Route | None: ...


class Route:
    """The nodes that one flow goes through, as a way out."""

    __slots__ = ("_direct", "_reaching", "chain", "nodes")

    def __init__(self, nodes: Sequence[Node], direct: Egress, chain: Chain | None = None) -> None:
        self.nodes = nodes
        self.chain = chain
        self._direct = direct
        self._reaching: Node | None = None

    async def _reach_last(self, flow: Flow) -> tuple[NodeEgress, Stream]:
        """Connect through all nodes; return the last one and the stream to it. Marks successes and failures.

        The node that could not be reached is marked, also when the one before it is to blame (C10): what counts is
        that this way does not lead there.
        """
        below: Stream | None = None
        egress: NodeEgress | None = None
        clock = current_hub().loop.time
        for node in self.nodes:
            lower: Egress = node.direct or self._direct if egress is None else _Carried(egress, below)
            egress = NodeEgress(node, lower)
            self._reaching = node
            try:
                below = await egress.open(flow)
            except GostnetError:
                self.blame(flow, clock())
                raise
            node.marker.reset()
        self._reaching = None
        if self.chain is not None:
            self.chain.marker.reset()
        assert egress is not None
        assert below is not None
        return egress, below

    def blame(self, flow: Flow, now: float) -> None:
        """Mark the node that is being reached, and the chain, as failed: on an error, or when the deadline passes."""
        node, self._reaching = self._reaching, None
        if node is not None:
            node.marker.mark(now)
            flow.tried = (*flow.tried, node)
            if self.chain is not None:
                self.chain.marker.mark(now)

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Connect to `target` through the nodes. A refusal of the last node concerns the target and marks nobody."""
        last, below = await self._reach_last(flow)
        return await last.connect_over(flow, below, target)

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open an association through the nodes."""
        last, below = await self._reach_last(flow)
        try:
            return await last.node.connector.associate(flow, below, target)
        except BaseException:
            below.abort()
            raise


class _Carried:
    """The way out of a node that has been reached already: used once, for the next node of the route."""

    __slots__ = ("_below", "_egress")

    def __init__(self, egress: NodeEgress, below: Stream | None) -> None:
        self._egress = egress
        self._below = below

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Ask the node for the next one."""
        below, self._below = self._below, None
        assert below is not None
        return await self._egress.connect_over(flow, below, target)

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Ask the node for an association, for next nodes that are reached by datagrams."""
        below, self._below = self._below, None
        assert below is not None
        try:
            return await self._egress.node.connector.associate(flow, below, target)
        except BaseException:
            below.abort()
            raise


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
        nodes: list[Node] = []
        for hop in self.hops:
            node = hop.select(flow, target, now)
            if node is None:
                break
            nodes.append(node)
        return Route(nodes, self.direct, self) if nodes else None


@dataclass(slots=True)
class ChainGroup:
    """Several chains, one of which is chosen for each flow."""

    chains: Sequence[Chain]
    selector: Selector = field(default_factory=Selector)

    def route(self, flow: Flow, target: Endpoint, now: float) -> Route | None:
        """Return the route of the chain chosen. Raise NoRoute."""
        chain = self.selector.select(flow, self.chains, now)
        return chain.route(flow, target, now) if chain is not None else None
