"""relay(): two streams joined until both directions have ended. It finds the sockets below and picks the engine."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final, Literal, TypeAlias

from ..core.errors import ConnError
from ..core.fiber import Gate
from ..core.flow import Flow
from ..core.sockets import SocketStream
from ..core.stream import Stream
from . import copy, splice
from .native.engine import Engine, engine
from .native.passage import Passage
from .opening import Opening, between, bottom
from .opening import leaf as leaf

Choice: TypeAlias = Literal["auto", "copy", "splice", "native"]
"""What `Flow.engine` asks for. An engine that is not there, or cannot take the streams, gives way to the next one."""

_NOTHING: Final[splice.First] = (None, None)

CHOICES: Final[tuple[Choice, ...]] = ("auto", "copy", "splice", "native")


def relay(flow: Flow, client: Stream, upstream: Stream, idle: float = 0.0) -> Coroutine[Any, Any, None]:
    """Return what moves bytes both ways until both ends have said their last; half-close is kept without a time limit.

    It is awaited at once; that this is no coroutine itself saves idle connections a frame. The caller closes both
    streams right after: the last direction to end leaves its FIN to that.
    `flow` gives shapers and taps and takes the exact counts; `flow.engine` says which engine is wanted, and afterwards
    which one it was and why. Raise ConnError when a side broke (both are then reset, so that neither takes a cut answer
    for a whole one), IdleTimeout after `idle` seconds without a byte.
    """
    below_client, below_upstream = leaf(client), leaf(upstream)
    first = _NOTHING
    wanted = flow.engine
    if wanted != "copy" and (isinstance(below_client, Opening) or isinstance(below_upstream, Opening)):
        sockets = bottom(below_client), bottom(below_upstream)
        if splice.fits(flow, *sockets):
            first = between(below_client, below_upstream)
            below_client, below_upstream = sockets
    if wanted != "copy" and splice.fits(flow, below_client, below_upstream):
        assert isinstance(below_client, SocketStream)
        assert isinstance(below_upstream, SocketStream)
        thread, patience = _thread(flow, wanted, below_client)
        if thread is not None and not idle and first == _NOTHING:
            passing = _at_once(flow, below_client, below_upstream, thread, patience)
            if passing is not None:
                return passing
        return splice.relay(flow, below_client, below_upstream, idle, first, thread, patience)
    flow.engine = _why_copy(flow, wanted, below_client, below_upstream)
    return _copy(flow, below_client, below_upstream, idle)


async def _copy(flow: Flow, client: Stream, upstream: Stream, idle: float) -> None:
    try:
        await copy.relay(flow, client, upstream, idle)
    except ConnError:
        client.reset()
        upstream.reset()
        raise


def _at_once(
    flow: Flow, client: SocketStream, upstream: SocketStream, thread: Engine, patience: int
) -> Coroutine[Any, Any, None] | None:
    """Return what waits for the thread, if that is to have the flow from the first byte on and takes it.

    A loop that does not keep up has short flows moved by the thread meanwhile, and closed, which is a third of the work
    for one; a loop that does is faster at it alone, as nobody has to be woken.
    """
    hub = client.readiness.hub
    if (patience and not hub.bound()) or client.has_unread or upstream.has_unread:
        return None
    gate = Gate(hub)
    passage = Passage(flow, client, upstream, thread, gate.open)
    if not passage.enter(short=patience > 0):
        return None
    flow.engine = "native: the loop is busy" if patience else "native: asked for"
    return passage.run(gate)


def _thread(flow: Flow, wanted: str, client: SocketStream) -> tuple[Engine | None, int]:
    """Return the thread that may take the flow and how patiently, and note what the flow begins with."""
    if wanted == "splice":
        flow.engine = "splice: asked for"
        return None, 0
    thread, reason = engine(client.readiness.hub)
    if thread is None:
        flow.engine = f"splice: native is {reason}"
        return None, 0
    flow.engine = "splice: short"
    return thread, 0 if wanted == "native" else splice.PATIENCE


def _why_copy(flow: Flow, wanted: str, client: Stream, upstream: Stream) -> str:
    if wanted == "copy":
        return "copy: asked for"
    for stream in (client, upstream):
        if type(stream) is not SocketStream:
            return f"copy: {type(stream).__name__} is no plain socket"
    return "copy: somebody looks at the bytes"
