"""Reaching a target of a forwarder: choose one, dial it, try another when that fails. Rows H01-H14, M01-M08."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..core.address import Endpoint
from ..core.errors import GostnetError, NoRoute, PolicyDenied
from ..core.flow import Flow
from ..core.hub import current_hub
from .handler import HandlerContext

T = TypeVar("T")

Dial = Callable[[Flow, Endpoint], Awaitable[T]]
"""Reaches an address for a flow: an egress's `connect` or `associate`."""


class NoTarget(NoRoute):
    """The forwarder has no target to offer."""

    code = "dial.notarget"


async def reach_target(flow: Flow, context: HandlerContext, dial: Dial[T]) -> T:
    """Dial a target of the forwarder; every one is tried once, in the order of the strategy, until one is reached.

    A target that fails is marked, one that is reached has its failures forgotten. Raise NoTarget when the forwarder has
    none, the last error when none could be reached, and PolicyDenied at once: no other target would change that.
    """
    assert context.hop is not None
    tried: tuple[object, ...] = ()
    error: GostnetError | None = None
    while True:
        flow.tried = tried
        try:
            node = context.forward_node(flow)
        except NoRoute as exc:
            raise error or NoTarget(str(exc)) from exc
        finally:
            flow.tried = ()  # what the router looks at next are nodes of its chain
        if node in tried:
            assert error is not None
            raise error
        try:
            reached = await dial(flow, node.address)
        except PolicyDenied:
            raise
        except GostnetError as exc:
            context.log.debug(f"target {node.name or node.address}: {exc}", sid=flow.sid)
            node.marker.mark(current_hub().loop.time())
            tried = (*tried, node)
            error = exc
        else:
            node.marker.reset()
            return reached
