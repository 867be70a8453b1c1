"""What the handlers of network devices have in common: tun and tap.

One device is one connection, and it lasts as long as the service. What goes wrong with a carrier is waited out; only
the end of the device ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ..core.datagrams import Datagrams
from ..core.errors import GostnetError
from ..core.flow import Flow, Shaper
from ..core.packets import Packets
from ..core.stream import Buffer
from ..core.tasks import Scope
from ..dataplane.shaper import grant
from .forwarding import Dial, reach_target
from .handler import HandlerContext

T = TypeVar("T")

RECONNECT = (1.0,)
"""Seconds before a server is dialled again."""

Session = Callable[[Datagrams], Awaitable[None]]
"""Serves the device by an association with the server until that ends; the association is the caller's to close."""


async def as_client(
    flow: Flow,
    device: Packets,
    context: HandlerContext,
    dial: Dial[Datagrams],
    session: Session,
    pauses: Sequence[float] = RECONNECT,
) -> None:
    """Keep a session with the forwarder's target up, as long as there is a device.

    `pauses` are the seconds before the first, second, ... attempt after failures in a row, the last for all further
    ones. Raise ConnError when somebody else has deleted the device.
    """
    log = context.log
    failures = 0
    while not device.closed:
        pause = pauses[min(failures, len(pauses) - 1)]
        failures += 1
        problem = "the server closed"
        try:
            upstream = await _unless_closed(device, reach_target(flow, context, dial))
            if upstream is None:
                return
            try:
                flow.connected = True
                failures = 1
                pause = pauses[0]
                await session(upstream)
            finally:
                upstream.abort()
        except GostnetError as exc:
            device.check()
            problem = str(exc)
        if not device.closed:
            log.warn(f"{device.name}: {problem}; dialling again in {pause:g}s", sid=flow.sid)
            await _unless_closed(device, asyncio.sleep(pause))


async def _unless_closed(device: Packets, work: Awaitable[T]) -> T | None:
    """Return what comes of `work`, None if it is left because the device is closed, which nobody else here notices."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:
            device.on_closed = lambda: limit.reschedule(loop.time())
            try:
                return await work
            finally:
                device.on_closed = None
    except TimeoutError:
        if not device.closed:
            raise
        return None


async def first_ended(*works: Coroutine[Any, Any, None]) -> None:
    """Run all as fibers, which the sockets they wait for resume directly; the first to end ends the others.

    Raise the first error.
    """
    scope = Scope("device")
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    failures: list[Exception] = []

    async def until_end(work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as exc:  # raised below, in the caller
            failures.append(exc)
        finally:
            if not ended.done():
                ended.set_result(None)

    for work in works:
        scope.launch(until_end(work))
    try:
        await ended
    finally:
        await scope.cancel()  # they wait for sockets, so they end at once
    if failures:
        raise failures[0]


def within(batch: Sequence[Buffer], shapers: Sequence[Shaper]) -> list[Buffer]:
    """Return the packets that the limits let pass; the others are dropped, as on any link that is too narrow."""
    passing: list[Buffer] = []
    for packet in batch:
        size = len(packet)
        got = grant(shapers, size)
        if got == size:
            passing.append(packet)
        else:
            for shaper in shapers:
                shaper.give_back(got)
    return passing
