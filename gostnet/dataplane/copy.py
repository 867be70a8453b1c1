"""The copy engine: any two streams, joined by two coroutines. What TLS, muxes and taps go through."""

from __future__ import annotations

import asyncio

from ..core.errors import ConnError, IdleTimeout
from ..core.flow import Flow, Shaper
from ..core.stream import Stream
from ..core.tasks import together
from .opening import Opening, floor, leaf
from .shaper import granted

CHUNK = 262144
"""Bytes per read: TLS gains from large ones, sockets do not mind."""


async def relay(flow: Flow, client: Stream, upstream: Stream, idle: float = 0.0) -> None:
    """Join two streams until both directions have ended, through `flow`'s shapers and taps.

    Raise ConnError when one breaks, IdleTimeout after `idle` seconds without a byte (0: never).
    """
    up = _Direction(flow, client, upstream, True)
    down = _Direction(flow, upstream, client, False)
    try:
        if idle:
            await _bounded(flow, up, down, idle)
        else:
            await together(up.run(), down.run())
    finally:
        up.give_back()
        down.give_back()
    failed = up.failed or down.failed
    if failed is not None:
        raise failed


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
                await together(up.run(), down.run())
            finally:
                timers[0].cancel()
    except TimeoutError as exc:
        raise IdleTimeout(f"idle for {idle:g}s") from exc


class _Direction:
    """One direction of the copy. A sink that breaks ends only this direction; a source that breaks ends both."""

    __slots__ = ("_flow", "_shapers", "_sink", "_source", "_up", "failed")

    def __init__(self, flow: Flow, source: Stream, sink: Stream, up: bool) -> None:
        self._flow = flow
        self._source = source
        self._sink = sink
        self._up = up
        shapers = flow.shapers
        self._shapers: list[Shaper] = (shapers.up if up else shapers.down) if shapers else []
        self.failed: ConnError | None = None

    async def run(self) -> None:
        """Copy until the end of stream, and pass it on."""
        flow, source, sink, up, shapers = self._flow, self._source, self._sink, self._up, self._shapers
        meter = flow.meter
        opening = isinstance(source, Opening) or isinstance(sink, Opening)
        while data := await source.receive(CHUNK):
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
