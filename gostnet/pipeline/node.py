"""Nodes: one proxy (or one forward target), how it is reached, and how it has been doing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from ..core.address import Endpoint
from ..core.contracts import Bypass, Connector, Hosts, Resolver
from ..core.datagrams import Datagrams
from ..core.egress import Egress
from ..core.errors import GostnetError
from ..core.flow import Flow
from ..core.hub import current_hub
from ..core.stream import Stream
from .destination import left_out_for
from .names import Named
from .race import race
from .transport import Transport


class Matcher(Protocol):
    """Decides whether a flow may take a node, a chain or a hop."""

    def matches(self, flow: Flow, host: str) -> bool:
        """Tell it for a flow that wants `host`, "" where that is not known."""


@dataclass(slots=True)
class Marker:
    """How often something failed in a row, and when last (loop clock, seconds). Rows M01-M08.

    down    a probe has found it dead: it stays so until the probe finds it alive, whatever time passes
    """

    max_fails: int = 1
    fail_timeout: float = 10.0
    failures: int = 0
    last: float = 0.0
    down: bool = False

    def mark(self, now: float) -> None:
        """Note a failure."""
        self.failures += 1
        self.last = now

    def reset(self) -> None:
        """Note a success."""
        self.failures = 0

    def failed(self, now: float) -> bool:
        """Whether it counts as dead at `now`; it is tried again after `fail_timeout`."""
        return self.down or (self.failures >= self.max_fails and now - self.last < self.fail_timeout)

    def take_over(self, before: Marker) -> None:
        """Go on from what another marker knows: after a reload."""
        self.failures, self.last, self.down = before.failures, before.last, before.down


@dataclass(slots=True)
class Latency:
    """How long it takes to reach a node, its handshakes included, in seconds.

    value      smoothed; None before the first measurement, and after a probe that failed
    seen       when it was measured last (loop clock)
    probed     probes measure it; otherwise the connections that are made anyway do
    trying     until when a flow that was sent to measure it is waited for
    """

    value: float | None = None
    seen: float = 0.0
    probed: bool = False
    trying: float = 0.0

    def note(self, seconds: float, now: float) -> None:
        """Take a measurement in, a third of it: one slow answer must not make the traffic change sides."""
        self.value = seconds if self.value is None else self.value + (seconds - self.value) / 3
        self.seen = now


@dataclass(slots=True, eq=False)
class Node:
    """A proxy in a hop.

    address    empty host and port for connectors that need none
    direct     how the first node of a route is dialled when it has its own interface, mark or namespace
    matcher    the flows that it is for, None for all
    latency    None where nothing depends on it
    """

    name: str
    address: Endpoint
    transport: Transport
    connector: Connector
    marker: Marker = field(default_factory=Marker)
    bypass: Bypass | None = None
    hosts: Hosts | None = None
    resolver: Resolver | None = None
    direct: Egress | None = None
    weight: int = 1
    backup: bool = False
    priority: int = 0
    matcher: Matcher | None = None
    latency: Latency | None = None

    def over(self, lower: Egress) -> Egress:
        """Return the way out that leads through this node, itself reached through `lower`."""
        return NodeEgress(self, lower)

    def bypasses(self, flow: Flow, target: Endpoint) -> bool:
        """Tell whether this node is not for flows to `target`; one that is not known is the node's own address."""
        asked = target if target.host else self.address
        return self.bypass is not None and left_out_for(self.bypass, flow, asked) is not None


class NodeEgress:
    """Connections through one node: dial it, shake hands, ask it for the target.

    The node is marked when it cannot be reached, also when the one before it is to blame for that (C10): what counts is
    that this way does not lead there. A failure to reach the one before it is not its own.

    opening    an attempt to reach the node is under way, or was cancelled
    down       the last attempt to reach it, or a node before it, failed
    """

    __slots__ = ("down", "lower", "node", "opening")

    def __init__(self, node: Node, lower: Egress) -> None:
        self.node = node
        self.lower = lower
        self.opening = False
        self.down = False

    async def open(self, flow: Flow) -> Stream:
        """Reach the node and do the connector's handshake. Raise DialError or ProtocolError; nothing stays open."""
        node, lower = self.node, self.lower
        if node.hosts is not None or node.resolver is not None:
            lower = Named(lower, node.hosts, node.resolver)
        began = current_hub().loop.time() if node.latency is not None else 0.0
        self.opening = True
        try:
            below = await node.transport.dial(flow, node.address, lower)
            try:
                stream = await node.connector.handshake(flow, below)
            except BaseException:
                below.abort()
                raise
        except GostnetError:
            self.opening = False
            self.down = True
            if not is_down(self.lower):
                self._mark(flow)
            raise
        self.opening = self.down = False
        node.marker.reset()
        if node.latency is not None and not node.latency.probed:
            now = current_hub().loop.time()
            node.latency.note(now - began, now)
        return stream

    def _mark(self, flow: Flow) -> None:
        self.node.marker.mark(current_hub().loop.time())
        flow.tried = (*flow.tried, self.node)

    async def reach(self, flow: Flow) -> tuple[NodeEgress, Stream]:
        """Do `open`, and return the egress that goes on from it."""
        return self, await self.open(flow)

    def blame(self, flow: Flow) -> bool:
        """Mark the nodes that were being reached when the deadline passed; return whether there was one."""
        if isinstance(self.lower, NodeEgress | RaceEgress) and self.lower.blame(flow):
            return True
        if not self.opening:
            return False
        self.opening = False
        self._mark(flow)
        return True

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Connect to `target` through the node."""
        below = await self.open(flow)
        return await self.connect_over(flow, below, target)

    async def connect_over(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        """Ask the node, reached by `below`, for `target`; `below` is aborted on any failure."""
        try:
            return await self.node.connector.connect(flow, below, target)
        except BaseException:
            below.abort()
            raise

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open an association through the node."""
        below = await self.open(flow)
        return await self.associate_over(flow, below, target)

    async def associate_over(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams:
        """Ask the node, reached by `below`, for an association; `below` is aborted on any failure."""
        try:
            return await self.node.connector.associate(flow, below, target)
        except BaseException:
            below.abort()
            raise


class RaceEgress:
    """Connections through the first of several nodes that can be reached: the strategy `parallel`. Rows L11-L13."""

    __slots__ = ("down", "opening", "ways", "won")

    def __init__(self, ways: Sequence[NodeEgress]) -> None:
        self.ways = ways
        self.down = False
        self.opening = False
        self.won: NodeEgress | None = None

    async def reach(self, flow: Flow) -> tuple[NodeEgress, Stream]:
        """Reach all, handshakes included, and return the first with its stream; those that fail are marked."""
        self.opening = True
        try:
            found = await race([partial(way.reach, flow) for way in self.ways], _drop)
        except GostnetError:
            self.opening = False
            self.down = True
            raise
        self.opening = self.down = False
        for way in self.ways:
            way.opening = False  # those that were cancelled were only slower
        self.won = found[0]
        return found

    def blame(self, flow: Flow) -> bool:
        """Mark the nodes that were being reached when the deadline passed; return whether there was one."""
        self.opening = False
        blamed = [way.blame(flow) for way in self.ways]
        return any(blamed)

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Connect to `target` through the node that is reached first."""
        way, below = await self.reach(flow)
        return await way.connect_over(flow, below, target)

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open an association through the node that is reached first."""
        way, below = await self.reach(flow)
        return await way.associate_over(flow, below, target)


def _drop(reached: tuple[NodeEgress, Stream]) -> None:
    reached[1].abort()


def is_down(way: Egress) -> bool:
    """Tell whether `way` leads through a node that could not be reached just now."""
    return isinstance(way, NodeEgress | RaceEgress) and way.down
