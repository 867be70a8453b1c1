"""Reaching a target of a forwarder: choose one, dial it, try another when that fails. Rows H01-H14, M01-M08."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from ..core.address import ANY, Endpoint
from ..core.datagrams import Datagrams
from ..core.errors import GostnetError, NoRoute, PolicyDenied
from ..core.flow import Flow
from ..core.hub import current_hub
from ..core.stream import Stream
from .handler import HandlerContext
from .node import Node
from .race import race

T = TypeVar("T")

Dial = Callable[[Flow, Endpoint], Awaitable[T]]
"""Reaches an address for a flow: an egress's `connect` or `associate`."""


class NoTarget(NoRoute):
    """The forwarder has no target to offer."""

    code = "dial.notarget"


def targets_of(flow: Flow, context: HandlerContext) -> Sequence[Node]:
    """Return the next target of the forwarder, or several to be raced. Raise NoTarget when there is none.

    What a target's matcher and bypass see is what was sniffed of the flow; where that is nothing, a bypass sees the
    target's own address.
    """
    assert context.hop is not None
    sniffed = flow.sniffed
    wanted = Endpoint(sniffed.host, sniffed.port) if sniffed is not None and sniffed.host else ANY
    try:
        nodes = context.hop.pick(flow, wanted, current_hub().loop.time(), wanted.host)
    except NoRoute as exc:
        raise NoTarget(f"{context.service}: {exc}") from exc
    if not nodes:
        raise NoTarget(f"{context.service}: no forward target is available")
    return nodes


async def reach_target(flow: Flow, context: HandlerContext, dial: Dial[T]) -> T:
    """Dial a target of the forwarder; every one is tried once, in the order of the strategy, until one is reached.

    A target that fails is marked, one that is reached has its failures forgotten. Raise NoTarget when the forwarder has
    none, the last error when none could be reached, and PolicyDenied at once: no other target would change that.
    """
    return (await reach_node(flow, context, dial))[1]


async def reach_node(flow: Flow, context: HandlerContext, dial: Dial[T]) -> tuple[Node, T]:
    """Do `reach_target`, and return the target's node as well."""
    tried: tuple[object, ...] = ()
    error: GostnetError | None = None
    while True:
        flow.tried = tried
        try:
            nodes = targets_of(flow, context)
        except NoTarget as exc:
            raise error or exc from exc
        finally:
            flow.tried = ()  # what the router looks at next are nodes of its chain
        if any(node in tried for node in nodes):
            assert error is not None
            raise error
        try:
            if len(nodes) == 1:
                return nodes[0], await _dialled(flow, context, nodes[0], dial)
            return await _raced(flow, context, nodes, dial)
        except PolicyDenied:
            raise
        except GostnetError as exc:
            tried = (*tried, *nodes)
            error = exc


async def _dialled(flow: Flow, context: HandlerContext, node: Node, dial: Dial[T]) -> T:
    began = current_hub().loop.time() if node.latency is not None else 0.0
    if flow.details is not None:
        flow.details.fields["node"] = node.name
    try:
        reached = await dial(flow, node.address)
    except PolicyDenied:
        raise
    except GostnetError as exc:
        context.log.debug(f"target {node.name or node.address}: {exc}", sid=flow.sid)
        node.marker.mark(current_hub().loop.time())
        raise
    node.marker.reset()
    if node.latency is not None and not node.latency.probed:
        now = current_hub().loop.time()
        node.latency.note(now - began, now)
    return reached


async def _raced(flow: Flow, context: HandlerContext, nodes: Sequence[Node], dial: Dial[T]) -> tuple[Node, T]:
    """Dial all of `nodes`; the flow goes on as the first one that is reached has left it."""

    async def attempt(node: Node) -> tuple[Node, Flow, T]:
        # Each has its own idea of target and route, and only one of them becomes the flow's.
        own = copy.copy(flow)
        return node, own, await _dialled(own, context, node, dial)

    node, own, reached = await race([partial(attempt, node) for node in nodes], _drop)
    flow.target, flow.route, flow.reason, flow.network = own.target, own.route, own.reason, own.network
    flow.shapers = own.shapers
    return node, reached


def _drop(reached: tuple[Node, Flow, object]) -> None:
    found = reached[2]
    if isinstance(found, Stream | Datagrams):
        found.abort()
