"""The splice engine: two TCP sockets joined by the kernel, driven by the hub's edges, without a task per direction.

Small messages are moved by recv and send, which is two system calls; as soon as a read fills its buffer the direction
changes to splice through a pooled pipe, and back when it falls idle. So bulk bytes never enter user space, and a short
answer never pays for a pipe. An idle connection holds two sockets and no pipe.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Coroutine, Sequence
from typing import Any

from ..core.errors import GostnetError, IdleTimeout, conn_error
from ..core.fiber import Gate
from ..core.flow import Flow, Meter, Shaper
from ..core.hub import READABLE
from ..core.sockets import SocketStream
from . import shaper as limits
from .native.engine import Engine
from .native.passage import Passage, check_end
from .opening import FirstBytes
from .pipes import Pipe, PipePool, not_spliced, pipe_pool

SMALL = 16384
"""Bytes of one recv. A read that fills it says bulk."""

BUDGET = 12
"""Rounds before a direction yields, so that one fast stream does not starve the others."""

PATIENCE = 8
"""Edges after which a flow is no short one any more: a request and its answer are two to four."""

_MOST = 1 << 20
_REFUSED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP})
_FLAGS = 0x01 | 0x02  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK
_HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

First = tuple[FirstBytes | None, FirstBytes | None]
"""What is done to the first bytes of the two directions: up, down."""


class _Half:
    """One direction: where its bytes are (in `rest` or in a pipe), and how far it is from its end.

    try_read    a read may yield something: an edge came since the last one found nothing
    hung_up     the source's peer has closed, and its edge has been: read on until the end of stream
    first       what is done to the first bytes, None when that is over, or was never anything
    failed      the sink refused bytes; what the other direction still has to say is delivered all the same
    copies      the kernel does not splice one of the sockets
    stops_at_bulk   bulk is somebody else's to move: stop when it begins
    """

    __slots__ = (
        "bulk",
        "copies",
        "done",
        "eof",
        "failed",
        "first",
        "hung_up",
        "in_pipe",
        "meter",
        "paused",
        "pipe",
        "pool",
        "rest",
        "shapers",
        "sink",
        "source",
        "stops_at_bulk",
        "try_read",
        "up",
    )

    def __init__(
        self,
        source: SocketStream,
        sink: SocketStream,
        meter: Meter,
        up: bool,
        shapers: Sequence[Shaper],
        pool: PipePool,
        first: FirstBytes | None,
    ) -> None:
        self.source = source
        self.sink = sink
        self.meter = meter
        self.up = up
        self.shapers = shapers
        self.pool = pool
        self.first = first
        self.rest: bytes | memoryview = source.take_unread()
        if first is not None and self.rest:
            self.rest = self._begin(self.rest)
        self.pipe: Pipe | None = None
        self.in_pipe = 0
        self.bulk = self.copies = False
        self.stops_at_bulk = False
        self.eof = False
        self.done = False
        self.failed: OSError | None = None
        self.paused = False
        readiness = source.readiness
        self.hung_up = readiness.events & _HUNG_UP != 0
        self.try_read = readiness.pending or self.hung_up

    def pass_on(self) -> bool:
        """Move a small message by the shortest way; False if this is no case for it, and `pump` is to go on."""
        if self.rest or self.in_pipe or self.bulk or self.hung_up or self.shapers or self.first is not None:
            return False
        source, sink = self.source, self.sink
        try:
            data = source.readiness.sock.recv(SMALL)
        except BlockingIOError:
            self.try_read = False
            return True
        size = len(data)
        source.received += size
        if not size:
            self.eof = True
            return False
        if size == SMALL:
            self.bulk = True
            self.rest = data
            return False
        self.try_read = False
        try:
            count = sink.readiness.sock.send(data)
        except OSError:
            self.rest = data  # full: an edge will say when it is not; or broken, which `pump` will find too
            return False
        self.count(count)
        if count < size:
            self.rest = memoryview(data)[count:]
        return True

    def count(self, size: int) -> None:
        """Note bytes that the sink has taken."""
        if self.up:
            self.meter.up += size
        else:
            self.meter.down += size
        self.sink.sent += size

    def pump(self, last: bool) -> bool:
        """Move bytes until something blocks or the direction ends; return True if the budget ended it.

        `last` says that the other direction has ended: closing the sockets, which follows, sends the FIN.

        Raise OSError when the source broke; a sink that breaks only ends this direction.
        """
        for _ in range(BUDGET):
            # 1. what is under way must leave first
            if self.in_pipe or self.rest:
                try:
                    if not self._flush():
                        return False
                except BlockingIOError:
                    return False
                except OSError as exc:
                    self.failed = exc
                    self.stop()
                    return False
            if self.eof:
                self.stop()
                if not last:
                    self._shut()
                return False
            if not self.try_read or self.paused:
                return False
            if self.bulk and self.stops_at_bulk:
                return True
            # 2. how much may come in
            wanted = _MOST if self.bulk else SMALL
            if self.shapers:
                wanted = limits.grant(self.shapers, wanted)
                if not wanted:
                    self.paused = True
                    return False
            # 3. take it
            try:
                got = self._take(wanted)
            except BlockingIOError:
                if self.shapers:
                    limits.give_back(self.shapers, wanted)
                self.try_read = self.bulk = False
                self.free_pipe()
                return False
            if self.shapers and got < wanted:
                limits.give_back(self.shapers, wanted - got)
            self.source.received += got
            if not got:
                self.eof = True
            elif got < wanted and not self.bulk:
                # A short read has emptied the queue: more brings an edge, unless the last edge was the hang-up.
                self.try_read = self.hung_up
            else:
                self.bulk = True
        return True

    def _flush(self) -> bool:
        """Send what is under way; return True when all of it has left."""
        sink = self.sink
        if self.rest:
            count = sink.readiness.sock.send(self.rest)
            left = len(self.rest) - count
            self.rest = memoryview(self.rest)[count:] if left else b""
        else:
            assert self.pipe is not None
            try:
                count = os.splice(self.pipe[0], sink.readiness.fd, self.in_pipe, flags=_FLAGS)
            except OSError as exc:
                if exc.errno not in _REFUSED:
                    raise
                self._copy_instead(exc)
                return self._flush()
            left = self.in_pipe = self.in_pipe - count
        self.count(count)
        return not left

    def _take(self, wanted: int) -> int:
        if self.bulk and self.first is None and not self.copies:
            if self.pipe is None:
                self.pipe = self.pool.take()
            if self.pipe is not None:
                try:
                    self.in_pipe = os.splice(self.source.readiness.fd, self.pipe[1], wanted, flags=_FLAGS)
                    return self.in_pipe
                except OSError as exc:
                    if exc.errno not in _REFUSED:
                        raise
                    self._copy_instead(exc)
        data = self.source.readiness.sock.recv(min(wanted, SMALL))
        self.rest = data if self.first is None else self._begin(data)
        return len(data)

    def _copy_instead(self, exc: OSError) -> None:
        """Do without the pipe from now on; its bytes are under way all the same."""
        assert self.pipe is not None
        self.rest = os.read(self.pipe[0], self.in_pipe) if self.in_pipe else b""
        self.in_pipe = 0
        self.copies = True
        self.free_pipe()
        self.pool.refuse(not_spliced(exc.errno or 0))

    def _begin(self, data: bytes) -> bytes:
        """Return what is to be sent for the first bytes that came, b"" standing for their end."""
        first = self.first
        assert first is not None
        prefix = len(first.prefix)
        data = first.take(data)
        if not first.prefix:
            self._leave_out(prefix)
        if first.done:
            self.first = None
        return data

    def begin_unasked(self) -> None:
        """Send a prompt prefix without waiting for the source, which has said nothing so far."""
        first = self.first
        if first is None or not first.prompt or self.done:
            return
        self._leave_out(len(first.prefix))
        self.rest = first.take_prefix()
        if first.done:
            self.first = None

    def _leave_out(self, size: int) -> None:
        """Take bytes of a prefix, which are not payload, out of the meter before they are sent and counted."""
        if self.up:
            self.meter.up -= size
        else:
            self.meter.down -= size

    def _shut(self) -> None:
        try:
            self.sink.shut()
        except OSError as exc:
            self.failed = exc

    def free_pipe(self) -> None:
        """Give the pipe back to the pool."""
        if self.pipe is not None:
            self.pool.put(self.pipe, empty=not self.in_pipe)
            self.pipe = None

    def stop(self) -> None:
        """End the direction; a pipe that still holds bytes is closed with them."""
        self.done = True
        self.free_pipe()
        self.in_pipe = 0
        self.rest = b""


class _Pair:
    """Two halves, the events of both sockets, and one gate that opens at the end of it all.

    With an `engine` it moves into the native thread as soon as it has shown that it lives on: by `patience` edges, or
    by a read that fills its buffer. A short flow never pays for the move.
    """

    __slots__ = (
        "_engine",
        "_error",
        "_gate",
        "_hub",
        "_idle",
        "_passage",
        "_patience",
        "_queued",
        "_seen",
        "_timers",
        "client",
        "down",
        "flow",
        "meter",
        "up",
        "upstream",
    )

    def __init__(
        self,
        flow: Flow,
        client: SocketStream,
        upstream: SocketStream,
        idle: float,
        first: First,
        engine: Engine | None,
        patience: int,
    ) -> None:
        hub = client.readiness.hub
        pool = pipe_pool(hub)
        shapers = flow.shapers
        self.flow = flow
        self.meter = flow.meter
        self.client = client
        self.upstream = upstream
        self.up = _Half(client, upstream, flow.meter, True, shapers.up if shapers else (), pool, first[0])
        self.down = _Half(upstream, client, flow.meter, False, shapers.down if shapers else (), pool, first[1])
        self._hub = hub
        self._idle = idle
        self._seen = -1
        self._queued = False
        self._timers: Sequence[asyncio.TimerHandle] = ()
        self._gate = Gate(hub)
        self._error: GostnetError | None = None
        self._engine = engine
        self._patience = patience
        self._passage: Passage | None = None
        self.up.stops_at_bulk = self.down.stops_at_bulk = engine is not None

    async def run(self) -> None:
        """Join the sockets until both directions have ended. Raise ConnError; both are reset then."""
        try:
            self.client.readiness.claim(self._client_events)
            self.upstream.readiness.claim(self._upstream_events)
            if self._idle:
                self._watch()
            self._go()
            if self.up.first is not None or self.down.first is not None:
                self.up.begin_unasked()
                self.down.begin_unasked()
                self._go()
            await self._gate.wait()
        finally:
            self._leave()
        failed = self.up.failed or self.down.failed
        if failed is None and self._passage is not None:
            failed = self._passage.failed
        check_end(self.client, self.upstream, self._error, failed)

    def _leave(self) -> None:
        """Give everything back, whatever has ended the pair."""
        if self._passage is not None:
            self._passage.leave()
        self.up.stop()
        self.down.stop()
        for timer in self._timers:
            timer.cancel()
        self.client.readiness.unclaim()
        self.upstream.readiness.unclaim()

    def _client_events(self, events: int) -> None:
        self._events(events, self.up, self.down)

    def _upstream_events(self, events: int) -> None:
        self._events(events, self.down, self.up)

    def _events(self, events: int, reads: _Half, writes: _Half) -> None:
        """Pump what an edge concerns: the direction that reads from this socket, the one that waits for its room."""
        if self._gate.is_open:
            return
        if events & READABLE:
            reads.try_read = True
            if events & _HUNG_UP:
                reads.hung_up = True
            if not (reads.done or reads.paused or self._pass_on(reads)):
                self._pump(reads, writes)
        if (writes.rest or writes.in_pipe) and not writes.done:
            self._pump(writes, reads)
        if self._engine is not None:
            self._patience -= 1
            if self._patience <= 0:
                self._move_in()

    def _pass_on(self, half: _Half) -> bool:
        try:
            return half.pass_on()
        except OSError as exc:
            self._fail(conn_error(exc))
            return True

    def _pump(self, half: _Half, other: _Half) -> None:
        """Pump one direction and see to what follows from it."""
        try:
            more = half.pump(other.done)
        except OSError as exc:
            self._fail(conn_error(exc))
            return
        except GostnetError as exc:  # what a header says
            self._fail(exc)
            return
        if half.done:
            if other.done:
                self._gate.open()
                return
            if half.failed is not None:
                # The sink is dead: its own last words, if any, are read to the end, which comes by itself.
                other.try_read = other.hung_up = more = True
        elif half.paused:
            self._resume_later(half)
        if more and half.bulk and half.stops_at_bulk:
            if self._move_in():
                return
            half.stops_at_bulk = False  # something is under way in the other direction: an edge will try again
        if more and not self._queued:
            self._queued = True
            self._hub.call_ready(self._go)

    def _go(self) -> None:
        """Pump both directions, unless the thread does by now."""
        self._queued = False
        if self._passage is not None:
            return
        if not (self.up.done or self._gate.is_open):
            self._pump(self.up, self.down)
        if not (self.down.done or self._gate.is_open):
            self._pump(self.down, self.up)
        if self._engine is not None and self._patience <= 0:
            self._move_in()

    def _fail(self, error: GostnetError) -> None:
        if not self._gate.is_open:
            self._error = error
            self._gate.open()

    def _resume_later(self, half: _Half) -> None:
        def resume() -> None:
            half.paused = False
            self._go()

        if not half.done and half.paused:
            self._keep(self._hub.loop.call_later(limits.delay(half.shapers), resume))

    def _keep(self, timer: asyncio.TimerHandle) -> None:
        """Note a timer that is to be cancelled at the end; those that have run are forgotten."""
        now = self._hub.loop.time()
        self._timers = (timer, *(other for other in self._timers if not other.cancelled() and other.when() > now))

    def _watch(self) -> None:
        """End the pair when no byte has moved for `idle` seconds; looks twice per period."""
        if self._passage is not None:
            self._passage.count()
        moved = self.meter.up + self.meter.down
        if moved == self._seen:
            self._fail(IdleTimeout(f"idle for {self._idle:g}s"))
            return
        self._seen = moved
        self._keep(self._hub.loop.call_later(self._idle, self._watch))

    # ---- into the native thread ----------------------------------------------------------------
    def _move_in(self) -> bool:
        """Hand the sockets over to the thread if nothing is under way at this moment; tell whether that was done."""
        up, down, engine = self.up, self.down, self._engine
        if engine is None or self._gate.is_open or self._passage is not None:
            return self._passage is not None
        for half in (up, down):
            if half.rest or half.in_pipe or half.first is not None or half.paused or half.failed is not None:
                return False
            if half.eof and not half.done:
                return False
        passage = Passage(self.flow, self.client, self.upstream, engine, self._ended_inside)
        if not passage.enter(done=up.done | down.done << 1):
            self._engine = None
            self.flow.engine = "splice: native has not taken the flow"
            self.client.readiness.claim(self._client_events)  # brings an edge, and with it whatever came meanwhile
            self.upstream.readiness.claim(self._upstream_events)
            return False
        self._passage = passage
        up.free_pipe()
        down.free_pipe()
        self.flow.engine = "native: lives on"
        return True

    def _ended_inside(self) -> None:
        passage = self._passage
        if passage is not None and passage.error is not None:
            self._fail(passage.error)
        else:
            self._gate.open()


def fits(flow: Flow, client: object, upstream: object) -> bool:
    """Tell whether the engine can take the pair: two sockets of ours, and nobody who wants to see the bytes."""
    return type(client) is SocketStream and type(upstream) is SocketStream and not flow.taps


def relay(
    flow: Flow,
    client: SocketStream,
    upstream: SocketStream,
    idle: float = 0.0,
    first: First = (None, None),
    engine: Engine | None = None,
    patience: int = PATIENCE,
) -> Coroutine[Any, Any, None]:
    """Return what joins two sockets until both directions have ended, and counts into `flow.meter` and the sockets.

    It raises ConnError when one breaks (both are reset then), IdleTimeout after `idle` seconds without a byte (0:
    never), and what `first` raises of headers. Cancelling leaves no descriptor behind; closing the streams stays the
    caller's business.
    With `engine`, a flow that lives on is moved by its thread: after `patience` edges, at once with 0.
    """
    return _Pair(flow, client, upstream, idle, first, engine, patience).run()
