"""Hops: a set of nodes of which one carries the flow; and groups of hops. Rows H01-H14."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..core.address import Endpoint
from ..core.contracts import Bypass
from ..core.errors import NoRoute
from ..core.flow import Flow
from .destination import left_out_for
from .node import Latency, Marker, Matcher, Node
from .selector import Selector


class Targets(Protocol):
    """What a forwarder chooses its targets from: a hop, or a group of them."""

    @property
    def nodes(self) -> Sequence[Node]: ...

    @property
    def selective(self) -> bool:
        """Whether a matcher decides, so that flows may get different targets for what they ask."""

    def pick(self, flow: Flow, target: Endpoint, now: float, host: str = "") -> Sequence[Node]: ...

    def select(self, flow: Flow, target: Endpoint, now: float, host: str = "") -> Node | None: ...


@dataclass(slots=True)
class Hop:
    """Nodes, how one is chosen, and the destinations that leave the hop out.

    direct_otherwise    a flow that no node is for goes on without the hop, as one that a bypass takes does
    """

    name: str
    nodes: Sequence[Node]
    selector: Selector = field(default_factory=Selector)
    bypass: Bypass | None = None
    direct_otherwise: bool = False

    @property
    def selective(self) -> bool:
        """Whether nodes have matchers."""
        return any(node.matcher is not None for node in self.nodes)

    def pick(self, flow: Flow, target: Endpoint, now: float, host: str = "") -> Sequence[Node]:
        """Return the node for `target`, or several to be raced; () means that bypasses skip the hop, and what follows.

        host    what the flow asked for by name, "" if nothing is known; what was sniffed goes before it

        Raise NoRoute when nodes are left that could be used, but none of them is for this flow.
        """
        matched = left_out_for(self.bypass, flow, target) if self.bypass is not None else None
        if matched is not None:
            flow.reason = f"bypass of {self.name} matches {matched}"
            return ()
        nodes = self.nodes
        if len(nodes) == 1 and nodes[0].bypass is None and nodes[0].matcher is None:
            return nodes
        candidates: list[Node] = []
        unmatched = False
        for node in nodes:
            if node.matcher is not None and not node.matcher.matches(flow, host):
                unmatched = True
            elif not node.bypasses(flow, target):
                candidates.append(node)
        if not candidates:
            asked = (flow.sniffed.host if flow.sniffed is not None else "") or host or target
            flow.reason = f"no node of {self.name} takes {asked}"
            if unmatched and not self.direct_otherwise:
                raise NoRoute(
                    f"hop {self.name}: no node is for {asked}",
                    hint="add a node without a matcher, or onNoNode: direct to the hop's metadata",
                )
            # The user's own bypasses on every node, or a hop without nodes, send the destination around it (H01, H14).
            return ()
        return self.selector.pick(flow, candidates, now)

    def select(self, flow: Flow, target: Endpoint, now: float, host: str = "") -> Node | None:
        """Do `pick` for who cannot race: return one node, None if there is none."""
        picked = self.pick(flow, target, now, host)
        return picked[0] if picked else None


@dataclass(slots=True, eq=False)
class HopEntry:
    """One hop of a group, with the flows that it is for. Its probe writes the marker, and nothing else does."""

    hop: Hop
    matcher: Matcher | None = None
    marker: Marker = field(default_factory=Marker)
    weight: int = 1
    backup: bool = False
    priority: int = 0
    latency: Latency | None = None


@dataclass(slots=True)
class HopGroup:
    """Several hops, one of which gives the target of a flow."""

    name: str
    entries: Sequence[HopEntry]
    selector: Selector = field(default_factory=Selector)

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes of all hops."""
        return [node for entry in self.entries for node in entry.hop.nodes]

    @property
    def selective(self) -> bool:
        """Whether hops, or nodes of theirs, have matchers."""
        return any(entry.matcher is not None or entry.hop.selective for entry in self.entries)

    def pick(self, flow: Flow, target: Endpoint, now: float, host: str = "") -> Sequence[Node]:
        """Return the target that the hop chosen gives. One that only has dead nodes left gives way to the others."""
        left = [entry for entry in self.entries if entry.matcher is None or entry.matcher.matches(flow, host)]
        otherwise: Sequence[Node] = ()
        while left:
            entry = self.selector.select(flow, left, now)
            assert entry is not None
            try:
                picked = entry.hop.pick(flow, target, now, host)
            except NoRoute:
                picked = ()
            if any(node not in flow.tried and not node.marker.failed(now) for node in picked):
                return picked
            if not otherwise or all(node in flow.tried for node in otherwise):
                otherwise = picked or otherwise
            left.remove(entry)
        return otherwise

    def select(self, flow: Flow, target: Endpoint, now: float, host: str = "") -> Node | None:
        """Do `pick` for who cannot race: return one node, None if there is none."""
        picked = self.pick(flow, target, now, host)
        return picked[0] if picked else None
