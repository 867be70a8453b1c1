"""A flow inside the native thread: what Python keeps of it meanwhile, and how it gets in and out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from ...core.errors import ConnError, GostnetError, conn_error
from ...core.fiber import Gate
from ...core.flow import Flow
from ...core.sockets import SocketStream
from .. import shaper as limits
from .engine import Engine
from .library import Record

_NOTHING = (0, 0, 0, 0)
_MOST = 1 << 20
"""Bytes for which the limits are asked at a time."""


def check_end(client: SocketStream, upstream: SocketStream, error: GostnetError | None, failed: OSError | None) -> None:
    """Raise what has ended two joined sockets, if it was no good end; both are reset where a connection broke.

    error     what has ended both directions
    failed    what has ended one of them
    """
    if error is None and failed is not None:
        error = conn_error(failed)
    if error is not None:
        if isinstance(error, ConnError):
            client.reset()
            upstream.reset()
        raise error


class Passage:
    """Two sockets inside the thread, from `enter` until both directions have ended, or `leave`.

    error     what has ended both directions
    failed    what has ended one of them, as its sink broke
    """

    __slots__ = (
        "_at_end",
        "_base",
        "_client",
        "_engine",
        "_flow",
        "_granted",
        "_lent",
        "_number",
        "_timers",
        "_upstream",
        "error",
        "failed",
    )

    def __init__(
        self,
        flow: Flow,
        client: SocketStream,
        upstream: SocketStream,
        engine: Engine,
        at_end: Callable[[], object],
    ) -> None:
        """`at_end` is called when both directions have ended."""
        self._flow = flow
        self._client = client
        self._upstream = upstream
        self._engine = engine
        self._at_end = at_end
        self._number: int | None = None
        self._base = _NOTHING
        self._granted = (0, 0)
        self._lent: tuple[int, int] | None = None
        self._timers: Sequence[asyncio.TimerHandle] = ()
        self.error: GostnetError | None = None
        self.failed: OSError | None = None

    def enter(self, *, done: int = 0, short: bool = False) -> bool:
        """Hand the sockets over, of which nobody holds bytes any more; False if the thread does not take them.

        Bits of `done` say which direction (1 up, 2 down) has ended. The sockets of a `short` flow that ends well are
        closed by the thread.
        """
        shapers = self._flow.shapers
        limited = 0 if shapers is None else bool(shapers.up) | bool(shapers.down) << 1
        if short:
            descriptors = self._lent = self._client.lend(), self._upstream.lend()
        else:
            descriptors = self._client.surrender(), self._upstream.surrender()
        self._number = self._engine.add(self, *descriptors, limited=limited, done=done, short=short)
        if self._number is None:
            self._regain()
        return self._number is not None

    def leave(self) -> None:
        """Take the sockets back if they are still inside, and give back what was granted and not used."""
        if self._number is not None:
            self._engine.cancel(self._number, self)
            self._number = None
        self._regain()
        shapers = self._flow.shapers
        if shapers is not None:
            for each, granted, taken in zip((shapers.up, shapers.down), self._granted, self._base, strict=False):
                if granted > taken:
                    limits.give_back(each, granted - taken)
        for timer in self._timers:
            timer.cancel()

    def _regain(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            self._client.regain(lent[0])
            self._upstream.regain(lent[1])

    def count(self) -> None:
        """Bring the counters up to date."""
        if self._number is not None:
            self._engine.count(self._number, self)

    async def run(self, gate: Gate) -> None:
        """Wait for the end, which opens `gate`. Raise ConnError; both sockets are reset then."""
        try:
            await gate.wait()
        finally:
            self.leave()
        check_end(self._client, self._upstream, self.error, self.failed)

    # ---- what the engine tells -----------------------------------------------------------------------
    def counted(self, record: Record) -> None:
        """Add what has moved since the last time."""
        taken_up, taken_down, moved_up, moved_down = now = record[-4:]
        base, self._base = self._base, now
        client, upstream, meter = self._client, self._upstream, self._flow.meter
        up, down = moved_up - base[2], moved_down - base[3]
        client.received += taken_up - base[0]
        client.sent += down
        upstream.received += taken_down - base[1]
        upstream.sent += up
        meter.up += up
        meter.down += down
        if record.closed:
            self._lent = None

    def wants(self, up: bool, size: int) -> None:
        """Let the thread have what the limits grant, at once or as soon as they grant something."""
        number, shapers = self._number, self._flow.shapers
        if number is None or shapers is None:
            return
        wanted = shapers.up if up else shapers.down
        try:
            allowed = limits.grant(wanted, min(size, _MOST))
        except GostnetError as exc:  # a quota is used up
            self._end(exc)
            return
        if allowed:
            self._granted = (self._granted[0] + allowed * up, self._granted[1] + allowed * (not up))
            self._engine.grant(number, up, allowed)
            return
        loop = self._client.readiness.hub.loop
        timer = loop.call_later(limits.delay(wanted), self.wants, up, size)
        now = loop.time()
        self._timers = (timer, *(other for other in self._timers if not other.cancelled() and other.when() > now))

    def ended(self, record: Record) -> None:
        """Take the end of both directions from the thread."""
        self._number = None
        if record.shut & 1:
            self._upstream.mark_eof_sent()
        if record.shut & 2:
            self._client.mark_eof_sent()
        code = record.failed_up or record.failed_down
        if code:
            self.failed = OSError(code, os.strerror(code))
        self._end(conn_error(OSError(record.error, os.strerror(record.error))) if record.error else None)

    def _end(self, error: GostnetError | None) -> None:
        self.error = self.error or error
        self._at_end()
