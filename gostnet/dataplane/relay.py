"""relay(): two streams joined until both directions have ended. It finds the sockets below and picks the engine."""

from __future__ import annotations

from ..core.errors import ConnError
from ..core.flow import Flow
from ..core.sockets import SocketStream
from ..core.stream import Stream
from . import copy, splice
from .opening import Opening, between, bottom


def leaf(stream: Stream) -> Stream:
    """Follow `transparent_over` to the lowest stream that still does something; what was unread moves down with it."""
    while (below := stream.transparent_over()) is not None:
        head = stream.take_unread()
        if head:
            below.unread(head)
        stream = below
    return stream


async def relay(flow: Flow, client: Stream, upstream: Stream, idle: float = 0.0) -> None:
    """Move bytes both ways until both ends have said their last, then return; half-close is kept without a time limit.

    The caller closes both streams right after: the last direction to end leaves its FIN to that.
    `flow` gives shapers and taps and takes the exact counts. Raise ConnError when a side broke (both are then reset,
    so that neither takes a cut answer for a whole one), IdleTimeout after `idle` seconds without a byte.
    """
    below_client, below_upstream = leaf(client), leaf(upstream)
    first: splice.First = (None, None)
    if isinstance(below_client, Opening) or isinstance(below_upstream, Opening):
        sockets = bottom(below_client), bottom(below_upstream)
        if splice.fits(flow, *sockets):
            first = between(below_client, below_upstream)
            below_client, below_upstream = sockets
    try:
        if splice.fits(flow, below_client, below_upstream):
            assert isinstance(below_client, SocketStream)
            assert isinstance(below_upstream, SocketStream)
            await splice.relay(flow, below_client, below_upstream, idle, first)
        else:
            await copy.relay(flow, below_client, below_upstream, idle)
    except ConnError:
        below_client.reset()
        below_upstream.reset()
        raise
