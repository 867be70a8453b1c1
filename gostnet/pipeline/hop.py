"""Hops: a set of nodes of which one carries the flow. Rows H01-H14."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.address import Endpoint
from ..core.contracts import Bypass
from ..core.flow import Flow
from .node import Node
from .selector import Selector


@dataclass(slots=True)
class Hop:
    """Nodes, how one is chosen, and the destinations that leave the hop out."""

    name: str
    nodes: Sequence[Node]
    selector: Selector = field(default_factory=Selector)
    bypass: Bypass | None = None

    def select(self, flow: Flow, target: Endpoint, now: float) -> Node | None:
        """Return the node for `target`; None means that bypasses skip the hop, and with it those behind it."""
        if self.bypass is not None and self.bypass.contains(flow.network, target):
            flow.reason = f"bypass of {self.name} matches {target}"
            return None
        if len(self.nodes) == 1 and self.nodes[0].bypass is None:
            return self.nodes[0]
        candidates = [node for node in self.nodes if node.passes(flow, target)]
        if not candidates:
            # The user's own bypasses on every node, or a hop without nodes, send the destination around it (H01, H14).
            flow.reason = f"no node of {self.name} takes {target}"
            return None
        best = max(node.priority for node in candidates)
        if best != min(node.priority for node in candidates):
            for priority in sorted({node.priority for node in candidates}, reverse=True):
                tier = [node for node in candidates if node.priority == priority]
                if all(node.backup for node in tier) and not all(node.backup for node in candidates):
                    continue
                if (node := self.selector.select(flow, tier, now)) is not None:
                    return node
        return self.selector.select(flow, candidates, now)
