"""The splice engine: two TCP sockets joined by the kernel, driven by the hub's edges, without a task per direction.

Small messages are moved by recv and send, which is two system calls; as soon as a read fills its buffer the direction
changes to splice through a pooled pipe, and back when it falls idle. So bulk bytes never enter user space, and a short
answer never pays for a pipe. An idle connection holds two sockets and no pipe.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import socket
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from ..core.errors import GostnetError, IdleTimeout, conn_error
from ..core.fiber import Gate
from ..core.flow import Flow, Meter, Shaper
from ..core.hub import READABLE, Hub
from ..core.sockets import SocketStream
from . import shaper as limits
from .opening import FirstBytes

PIPE_SIZE = 262144
"""Bytes: 64 KiB halves the rate, 1 MiB gains nothing and exhausts pipe-user-pages-soft sooner (measured)."""

SMALL = 16384
"""Bytes of one recv. A read that fills it says bulk."""

BUDGET = 12
"""Rounds before a direction yields, so that one fast stream does not starve the others."""

_MOST = 1 << 20
_FLAGS = 0x01 | 0x02  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK
_F_SETPIPE_SZ = 1031
_HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

Pipe = tuple[int, int]

First = tuple[FirstBytes | None, FirstBytes | None]
"""What is done to the first bytes of the two directions: up, down."""


class PipePool:
    """Empty pipes, kept for the next burst. One per hub, bounded."""

    __slots__ = ("__weakref__", "_free", "out")

    KEEP = 64

    def __init__(self) -> None:
        self._free: list[Pipe] = []
        self.out = 0

    def take(self) -> Pipe | None:
        """Return a pipe, None when the process has no descriptors left for one."""
        if self._free:
            self.out += 1
            return self._free.pop()
        try:
            read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.fcntl(write, _F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            pass  # beyond pipe-user-pages-soft the pipe keeps its default size: slower, not wrong
        self.out += 1
        return read, write

    def put(self, pipe: Pipe, *, empty: bool) -> None:
        """Give a pipe back; one that still holds bytes of a dead flow is closed."""
        self.out -= 1
        if empty and len(self._free) < self.KEEP:
            self._free.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self) -> None:
        """Close the kept pipes."""
        while self._free:
            for fd in self._free.pop():
                os.close(fd)

    def __del__(self) -> None:
        self.close()


_pools: WeakKeyDictionary[Hub, PipePool] = WeakKeyDictionary()


def pipe_pool(hub: Hub) -> PipePool:
    """Return the pool of `hub`'s loop."""
    pool = _pools.get(hub)
    if pool is None:
        pool = _pools[hub] = PipePool()
    return pool


class _Half:
    """One direction: where its bytes are (in `rest` or in a pipe), and how far it is from its end.

    try_read    a read may yield something: an edge came since the last one found nothing
    hung_up     the source's peer has closed, and its edge has been: read on until the end of stream
    first       what is done to the first bytes, None when that is over, or was never anything
    failed      the sink refused bytes; what the other direction still has to say is delivered all the same
    """

    __slots__ = (
        "bulk",
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
        self.bulk = False
        self.eof = False
        self.done = False
        self.failed: OSError | None = None
        self.paused = False
        readiness = source.readiness
        self.hung_up = readiness.events & _HUNG_UP != 0
        self.try_read = readiness.pending or self.hung_up

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
                self._free_pipe()
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
            count = sink.sock.send(self.rest)
            left = len(self.rest) - count
            self.rest = memoryview(self.rest)[count:] if left else b""
        else:
            assert self.pipe is not None
            count = os.splice(self.pipe[0], sink.readiness.fd, self.in_pipe, flags=_FLAGS)
            left = self.in_pipe = self.in_pipe - count
        if self.up:
            self.meter.up += count
        else:
            self.meter.down += count
        sink.sent += count
        return not left

    def _take(self, wanted: int) -> int:
        if self.bulk and self.first is None:
            if self.pipe is None:
                self.pipe = self.pool.take()
            if self.pipe is not None:
                self.in_pipe = os.splice(self.source.readiness.fd, self.pipe[1], wanted, flags=_FLAGS)
                return self.in_pipe
        data = self.source.sock.recv(min(wanted, SMALL))
        self.rest = data if self.first is None else self._begin(data)
        return len(data)

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
            self.sink.sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            if exc.errno != errno.ENOTCONN:  # the peer has reset: nothing is left to shut
                self.failed = exc
        self.sink.mark_eof_sent()

    def _free_pipe(self) -> None:
        if self.pipe is not None:
            self.pool.put(self.pipe, empty=not self.in_pipe)
            self.pipe = None

    def stop(self) -> None:
        """End the direction; a pipe that still holds bytes is closed with them."""
        self.done = True
        self._free_pipe()
        self.in_pipe = 0
        self.rest = b""


class _Pair:
    """Two halves, the events of both sockets, and one gate that opens at the end of it all."""

    __slots__ = (
        "_error",
        "_gate",
        "_hub",
        "_idle",
        "_queued",
        "_seen",
        "_timers",
        "client",
        "down",
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
    ) -> None:
        hub = client.readiness.hub
        pool = pipe_pool(hub)
        shapers = flow.shapers
        self.meter = flow.meter
        self.client = client
        self.upstream = upstream
        self.up = _Half(client, upstream, flow.meter, True, shapers.up if shapers else (), pool, first[0])
        self.down = _Half(upstream, client, flow.meter, False, shapers.down if shapers else (), pool, first[1])
        self._hub = hub
        self._idle = idle
        self._seen = -1
        self._queued = False
        self._timers: list[asyncio.TimerHandle] = []
        self._gate = Gate(hub)
        self._error: GostnetError | None = None

    async def run(self) -> None:
        """Join the sockets until both directions have ended. Raise ConnError."""
        self.client.readiness.claim(self._client_events)
        self.upstream.readiness.claim(self._upstream_events)
        try:
            if self._idle:
                self._watch()
            self._go()
            if self.up.first is not None or self.down.first is not None:
                self.up.begin_unasked()
                self.down.begin_unasked()
                self._go()
            await self._gate.wait()
        finally:
            self.up.stop()
            self.down.stop()
            for timer in self._timers:
                timer.cancel()
            self.client.readiness.unclaim()
            self.upstream.readiness.unclaim()
        if self._error is not None:
            raise self._error
        failed = self.up.failed or self.down.failed
        if failed is not None:
            raise conn_error(failed)

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
            if not (reads.done or reads.paused):
                self._pump(reads, writes)
        if (writes.rest or writes.in_pipe) and not writes.done:
            self._pump(writes, reads)

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
        if more and not self._queued:
            self._queued = True
            self._hub.call_ready(self._go)

    def _go(self) -> None:
        """Pump both directions."""
        self._queued = False
        if not (self.up.done or self._gate.is_open):
            self._pump(self.up, self.down)
        if not (self.down.done or self._gate.is_open):
            self._pump(self.down, self.up)

    def _fail(self, error: GostnetError) -> None:
        if not self._gate.is_open:
            self._error = error
            self._gate.open()

    def _resume_later(self, half: _Half) -> None:
        def resume() -> None:
            half.paused = False
            self._timers[:] = [timer for timer in self._timers if not timer.cancelled() and timer.when() > loop.time()]
            self._go()

        if not half.done and half.paused:
            loop = asyncio.get_running_loop()
            self._timers.append(loop.call_later(limits.delay(half.shapers), resume))

    def _watch(self) -> None:
        """End the pair when no byte has moved for `idle` seconds; looks twice per period."""
        moved = self.meter.up + self.meter.down
        if moved == self._seen:
            self._fail(IdleTimeout(f"idle for {self._idle:g}s"))
            return
        self._seen = moved
        self._timers[:] = [asyncio.get_running_loop().call_later(self._idle, self._watch)]


def fits(flow: Flow, client: object, upstream: object) -> bool:
    """Tell whether the engine can take the pair: two sockets of ours, and nobody who wants to see the bytes."""
    return type(client) is SocketStream and type(upstream) is SocketStream and not flow.taps


async def relay(
    flow: Flow,
    client: SocketStream,
    upstream: SocketStream,
    idle: float = 0.0,
    first: First = (None, None),
) -> None:
    """Join two sockets until both directions have ended; counts exactly into `flow.meter` and the sockets.

    Raise ConnError when one breaks, IdleTimeout after `idle` seconds without a byte (0: never), and what `first` raises
    of headers. Cancelling leaves no descriptor behind; closing the streams stays the caller's business.
    """
    await _Pair(flow, client, upstream, idle, first).run()
