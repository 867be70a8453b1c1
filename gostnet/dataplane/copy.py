"""The copy engine: any two streams, joined by two fibers. What TLS, muxes and taps go through."""

from __future__ import annotations

import asyncio
from typing import Any

from ..core.errors import ConnError, IdleTimeout
from ..core.fiber import Fiber
from ..core.flow import Flow, Shaper
from ..core.hub import current_hub
from ..core.sockets import SocketStream
from ..core.stream import Stream
from .opening import Opening, floor, leaf
from .shaper import granted

CHUNK = 262144
"""Bytes per read: TLS gains from large ones, sockets do not mind."""

TURN = 4 * CHUNK
"""Bytes after which a direction that never waits lets the others go on: a millisecond of TLS."""


async def relay(flow: Flow, client: Stream, upstream: Stream, idle: float = 0.0) -> None:
    """Join two streams until both directions have ended, through `flow`'s shapers and taps.

    Raise ConnError when one breaks, IdleTimeout after `idle` seconds without a byte (0: never).
    """
    up = _Direction(flow, client, upstream, True)
    down = _Direction(flow, upstream, client, False)
    up.other, down.other = down, up
    try:
        if idle:
            await _bounded(flow, up, down, idle)
        else:
            await _both(up, down)
    finally:
        up.give_back()
        down.give_back()
    failed = up.failed or down.failed
    if failed is not None:
        raise failed


async def _both(up: _Direction, down: _Direction) -> None:
    """Run both directions to their end; the first error ends the other one and is raised.

    One runs in the caller, the other in a fiber of its own, which begins: what a client has sent already goes with what
    the way to the target has to say first.
    """
    parent: Any = current_hub().fiber or asyncio.current_task()
    failure: list[BaseException] = []
    waiting = interrupted = False
    over: asyncio.Future[None] | None = None

    def ended(fiber: Fiber) -> None:
        nonlocal interrupted
        if over is not None and not over.done():
            over.set_result(None)
        if fiber.error is not None:
            failure.append(fiber.error)
            if waiting:
                interrupted = True
                parent.cancel()

    child = Fiber(up.run(), parent.get_name(), (ended,))
    child.start()
    try:
        if not failure:
            waiting = True
            await down.run()
            waiting = False
            if not child.finished:
                over = asyncio.get_running_loop().create_future()
                await over
    except BaseException as exc:
        waiting = False
        child.cancel()
        while not child.finished:
            over = asyncio.get_running_loop().create_future()
            await over
        if interrupted and isinstance(exc, asyncio.CancelledError) and parent.uncancel() == 0:
            raise failure.pop() from None
        raise
    finally:
        del child  # an error that is raised holds this frame, and must not be held by it
    if failure:
        raise failure.pop()


async def _bounded(flow: Flow, up: _Direction, down: _Direction, idle: float) -> None:
    """Run both directions under one timer that every byte puts back."""
    loop = asyncio.get_running_loop()
    meter = flow.meter
    seen = -1
    try:
        async with asyncio.timeout(None) as deadline:

            def watch() -> None:
                nonlocal seen
                moved = meter.up + meter.down
                if moved == seen:
                    deadline.reschedule(loop.time())
                else:
                    seen = moved
                    timers[:] = [loop.call_later(idle, watch)]

            timers = [loop.call_later(0, watch)]
            try:
                await _both(up, down)
            finally:
                timers[0].cancel()
    except TimeoutError as exc:
        raise IdleTimeout(f"idle for {idle:g}s") from exc


class _Direction:
    """One direction of the copy. A sink that breaks ends only this direction; a source that breaks ends both."""

    __slots__ = ("_flow", "_shapers", "_sink", "_source", "_up", "ended", "failed", "other")

    def __init__(self, flow: Flow, source: Stream, sink: Stream, up: bool) -> None:
        self._flow = flow
        self._source = source
        self._sink = sink
        self._up = up
        shapers = flow.shapers
        self._shapers: list[Shaper] = (shapers.up if up else shapers.down) if shapers else []
        self.ended = False
        self.failed: ConnError | None = None
        self.other: _Direction | None = None

    async def run(self) -> None:
        """Copy until the end of stream, and pass it on."""
        flow, source, sink, up, shapers = self._flow, self._source, self._sink, self._up, self._shapers
        meter = flow.meter
        opening = isinstance(source, Opening) or isinstance(sink, Opening)
        moved = 0
        first: bytes | None = None
        if isinstance(sink, Opening) and sink.prompts and type(source) is SocketStream:
            first = source.receive_now(CHUNK)  # what has come already goes with the header
        while True:
            if first is None:
                # The last data live until the next are there: with nothing between them malloc would return large ones
                # to the kernel and ask for as much again, page by page, each time (a third of the CPU of bulk).
                data = await source.receive(CHUNK)
            else:
                data, first = first, None
            if not data:
                break
            for tap in flow.taps or ():
                tap(data, up)
            try:
                if shapers:
                    await self._send_shaped(data)
                else:
                    await sink.send(data)
                    if up:
                        meter.up += len(data)
                    else:
                        meter.down += len(data)
            except ConnError as exc:
                self.failed = exc
                return
            if opening:
                # Once headers have been said and heard, bytes need not pass through the streams that saw to them.
                source, sink = leaf(source), floor(sink)
                opening = isinstance(source, Opening) or isinstance(sink, Opening)
            moved += len(data)
            if moved >= TURN:
                moved = 0
                await asyncio.sleep(0)
        self.ended = True
        other = self.other
        if other is not None and other.ended and type(sink) is SocketStream:
            return  # it is closed at once, which says the same
        try:
            await sink.send_eof()
        except ConnError:
            pass  # who is gone needs no end: all that was to be said has been sent before

    async def _send_shaped(self, data: bytes) -> None:
        view = memoryview(data)
        meter = self._flow.meter
        while view:
            allowed = await granted(self._shapers, len(view))
            await self._sink.send(view[:allowed])
            if self._up:
                meter.up += allowed
            else:
                meter.down += allowed
            view = view[allowed:]

    def give_back(self) -> None:
        """Forget the ends, so that a cancelled relay keeps no stream alive."""
        self._shapers = []
        self.other = None
