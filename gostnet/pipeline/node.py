"""Nodes: one proxy (or one forward target), how it is reached, and how it has been doing."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.address import Endpoint
from ..core.contracts import Bypass, Connector, Hosts, Resolver
from ..core.datagrams import Datagrams
from ..core.egress import Egress
from ..core.flow import Flow
from ..core.stream import Stream
from .transport import Transport


@dataclass(slots=True)
class Marker:
    """How often something failed in a row, and when last (loop clock, seconds). Rows M01-M08."""

    max_fails: int = 1
    fail_timeout: float = 10.0
    failures: int = 0
    last: float = 0.0

    def mark(self, now: float) -> None:
        """Note a failure."""
        self.failures += 1
        self.last = now

    def reset(self) -> None:
        """Note a success."""
        self.failures = 0

    def failed(self, now: float) -> bool:
        """Whether it counts as dead at `now`; it is tried again after `fail_timeout`."""
        return self.failures >= self.max_fails and now - self.last < self.fail_timeout


@dataclass(slots=True, eq=False)
class Node:
    """A proxy in a hop.

    address    empty host and port for connectors that need none
    direct     how the first node of a route is dialled when it has its own interface, mark or namespace
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

    def over(self, lower: Egress) -> Egress:
        """Return the way out that leads through this node, itself reached through `lower`."""
        return NodeEgress(self, lower)

    def passes(self, flow: Flow, target: Endpoint) -> bool:
        """Whether this node may carry the flow to `target`."""
        return self.bypass is None or not self.bypass.contains(flow.network, target)


class NodeEgress:
    """Connections through one node: dial it, shake hands, ask it for the target."""

    __slots__ = ("lower", "node")

    def __init__(self, node: Node, lower: Egress) -> None:
        self.node = node
        self.lower = lower

    async def open(self, flow: Flow) -> Stream:
        """Reach the node and do the connector's handshake. Raise DialError or ProtocolError; nothing stays open."""
        node = self.node
        address = await resolved(node.address, node.hosts, node.resolver)
        below = await node.transport.dial(flow, address, self.lower)
        try:
            return await node.connector.handshake(flow, below)
        except BaseException:
            below.abort()
            raise

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
        try:
            return await self.node.connector.associate(flow, below, target)
        except BaseException:
            below.abort()
            raise


async def resolved(address: Endpoint, hosts: Hosts | None, resolver: Resolver | None, family: int = 0) -> Endpoint:
    """Return `address` with its name looked up in `hosts`, then by `resolver`; unchanged where neither is configured.

    Raise ResolveError from the resolver.
    """
    if not address.host or (hosts is None and resolver is None):
        return address
    if hosts is not None:
        found = hosts.lookup(address.host, family)
        if found:
            return Endpoint(found[0], address.port)
    if resolver is not None and address.ip is None:
        return Endpoint((await resolver.resolve(address.host, family))[0], address.port)
    return address
