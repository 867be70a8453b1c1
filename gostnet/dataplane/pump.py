"""pump(): two datagram ends joined until one ends or falls idle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ..core.address import Endpoint
from ..core.datagrams import Datagram, Datagrams
from ..core.fiber import Gate
from ..core.flow import Flow, Shaper
from ..core.hub import current_hub
from ..core.tasks import first_of_fibers
from ..core.udp_socket import UdpSocket
from .native.library import load
from .sessions import Session
from .shaper import grant

_NATIVE = ("auto", "native")
"""What `Flow.engine` may ask for so that the native library is taken, where it is there."""

Filter = Callable[[Endpoint], bool]
"""Tells whether datagrams may go to, or come from, a peer."""


async def pump(
    flow: Flow,
    client: Datagrams,
    upstream: Datagrams,
    idle: float = 0.0,
    allowed: Filter | None = None,
    beside: Sequence[Coroutine[Any, Any, None]] = (),
) -> None:
    """Pass datagrams both ways, peers as they are, until one side ends; IdleTimeout is a normal end here.

    Datagrams over the flow's limits, or with a peer that `allowed` refuses, are dropped: nothing that a single datagram
    does ends the association. An empty one is passed on as long as both ends can carry it. Raise DialRefused if the
    upstream's host says that nobody listens there, and has never answered before. `beside` runs with it, and ends it.
    """
    shapers = flow.shapers
    up, down = (shapers.up, shapers.down) if shapers else ((), ())
    socket = bottom(upstream)
    if isinstance(socket, UdpSocket) and socket.peer is not None:
        socket.tells_refusal = True
    session, wanted = bottom(client), flow.engine
    limited, watched = bool(up or down), allowed is not None or bool(beside)
    if isinstance(session, Session) and isinstance(socket, UdpSocket) and socket.peer is not None:
        flow.engine = _why_copy(wanted, True, limited, watched)
        if not limited and not watched:
            await session.joined(flow, socket, idle, wanted in _NATIVE)
            return
    else:
        flow.engine = _why_copy(wanted, False, limited, watched)
    works = [
        _direction(flow, client, upstream, True, up, allowed),
        _direction(flow, upstream, client, False, down, allowed),
        *beside,
    ]
    if idle:
        works.append(_until_idle(flow, idle))
    await first_of_fibers("datagrams", works)


def _why_copy(wanted: str, plain: bool, limited: bool, watched: bool) -> str:
    if wanted not in _NATIVE:
        return "copy: asked for"
    if not plain:
        return "copy: one end is no plain socket"
    if limited or watched:
        return f"copy: {'there are limits' if limited else 'somebody looks at the datagrams'}"
    return f"copy: native {'is ' + load()[1] if load()[0] is None else 'has not taken the flow'}"


def bottom(datagrams: Datagrams) -> Datagrams:
    """Follow `transparent_over` to the lowest datagrams that still do something."""
    while (below := datagrams.transparent_over()) is not None:
        datagrams = below
    return datagrams


async def _direction(
    flow: Flow, source: Datagrams, sink: Datagrams, up: bool, shapers: Sequence[Shaper], allowed: Filter | None
) -> None:
    meter = flow.meter
    while batch := await source.receive():
        if allowed is not None or shapers:
            batch = [datagram for datagram in batch if _passes(datagram, shapers, allowed)]
            if not batch:
                continue
        size = 0
        for datagram in batch:
            size += len(datagram.data)
        await sink.send(batch)
        if up:
            meter.up += size
        else:
            meter.down += size
        flow.packets += sum(-(-len(datagram.data) // datagram.stride) if datagram.stride else 1 for datagram in batch)


def _passes(datagram: Datagram, shapers: Sequence[Shaper], allowed: Filter | None) -> bool:
    if allowed is not None and not allowed(datagram.peer):
        return False
    if shapers:
        size = len(datagram.data)
        got = grant(shapers, size)
        if got < size:
            for shaper in shapers:
                shaper.give_back(got)
            return False
    return True


async def _until_idle(flow: Flow, idle: float) -> None:
    """Return once no datagram has passed for `idle` seconds, seen with a resolution of a quarter of it."""
    loop, gate = asyncio.get_running_loop(), Gate(current_hub())
    seen, since = flow.packets, loop.time()

    def look() -> None:
        nonlocal seen, since
        if flow.packets != seen:
            seen, since = flow.packets, loop.time()
        elif loop.time() - since >= idle:
            gate.open()
            return
        timers[0] = loop.call_later(idle / 4, look)

    timers = [loop.call_later(idle / 4, look)]
    try:
        await gate.wait()
    finally:
        timers[0].cancel()
