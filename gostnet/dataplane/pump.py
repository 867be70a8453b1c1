"""pump(): two datagram ends joined until one ends or falls idle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ..core.address import Endpoint
from ..core.datagrams import Datagram, Datagrams
from ..core.flow import Flow, Shaper
from ..core.tasks import first_done
from .shaper import grant

Filter = Callable[[Endpoint], bool]
"""Tells whether datagrams may go to, or come from, a peer."""


async def pump(
    flow: Flow, client: Datagrams, upstream: Datagrams, idle: float = 0.0, allowed: Filter | None = None
) -> None:
    """Pass datagrams both ways, peers as they are, until one side ends; IdleTimeout is a normal end here.

    Datagrams over the flow's limits, or with a peer that `allowed` refuses, are dropped: nothing that a single datagram
    does ends the association. An empty one is passed on as long as both ends can carry it.
    """
    shapers = flow.shapers
    works = [
        _direction(flow, client, upstream, True, shapers.up if shapers else (), allowed),
        _direction(flow, upstream, client, False, shapers.down if shapers else (), allowed),
    ]
    if idle:
        works.append(_until_idle(flow, idle))
    await first_done(works)


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
        flow.packets += len(batch)


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
    loop = asyncio.get_running_loop()
    seen, since = flow.packets, loop.time()
    while True:
        await asyncio.sleep(idle / 4)
        if flow.packets != seen:
            seen, since = flow.packets, loop.time()
        elif loop.time() - since >= idle:
            return
