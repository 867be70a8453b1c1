"""The readiness hub: one edge-triggered epoll set, nested in the asyncio or uvloop loop.

Every fast-path socket is registered once, for reading and writing together, and stays registered until it is closed.
Operations are tried first; only EAGAIN suspends. The loop watches a single descriptor, the epoll set itself, so a
connection never costs the loop an `add_reader`/`remove_reader` pair per wait.
"""

from __future__ import annotations

import asyncio
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_ALL = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET

_BATCH = 256
"""Events taken per turn of the loop, so that other callbacks of the loop are not starved."""

_LOOK = 0.05
"""Seconds for which it is judged whether the loop is bound by its processor."""
_BOUND = 0.8
"""Share of that time from which on it is."""

OnEvents: TypeAlias = Callable[[int], None]


class Hub:
    """The epoll set of one loop. Not thread-safe: everything happens on the loop's thread."""

    __slots__ = (
        "__weakref__",
        "_bound",
        "_callbacks",
        "_closed",
        "_epoll",
        "_looked",
        "_ready",
        "_running_ready",
        "_used",
        "arena",
        "closing",
        "deadlines",
        "fiber",
        "gave_way",
        "loop",
        "native",
        "pipes",
        "tell",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.fiber: Any = None
        """The fiber that runs at this moment (core.fiber)."""
        self.deadlines: dict[float, Any] = {}
        """The shared deadlines by duration (core.fiber)."""
        self.native: Any = None
        """The thread that moves bytes for this hub, if there is one (dataplane.native)."""
        self.pipes: Any = None
        """Its pipes for splice (dataplane.pipes)."""
        self.arena: Any = None
        """Where its sockets receive datagrams (core.batches)."""
        self.gave_way: dict[tuple[str, str], str] = {}
        """Engines that have given way to another one, and why."""
        self.tell: Callable[[str], object] | None = None
        """Takes a line about that, for the log."""
        self.closing: list[Callable[[], object]] = []
        """Called when the hub closes: what engines keep for it."""
        self._epoll = select.epoll(sizehint=1024)
        self._callbacks: dict[int, OnEvents] = {}
        self._closed: set[int] = set()
        self._ready: deque[Callable[[], object]] = deque()
        self._running_ready = False
        self._bound = False
        self._looked = self._used = 0.0
        loop.add_reader(self._epoll.fileno(), self._drain)

    def register(self, fd: int, on_events: OnEvents) -> None:
        """Watch `fd` for its whole life; `on_events` gets the epoll bits of each edge."""
        self._epoll.register(fd, _ALL)
        self._callbacks[fd] = on_events

    def replace(self, fd: int, on_events: OnEvents) -> None:
        """Hand the events of a registered `fd` to somebody else (an engine, or back)."""
        self._callbacks[fd] = on_events

    def forget(self, fd: int) -> None:
        """Stop watching `fd`, which the caller closes right after: closing is what takes it out of the set.

        The number may be reused at once, so events of it in the batch at hand are dropped.
        """
        if self._callbacks.pop(fd, None) is not None:
            self._closed.add(fd)

    def surrender(self, fd: int) -> OnEvents | None:
        """Stop watching `fd`, which stays open: from now on somebody else gets its edges. Return who has had them."""
        on_events = self._callbacks.pop(fd, None)
        if on_events is not None:
            self._closed.add(fd)
            self._epoll.unregister(fd)
        return on_events

    def call_ready(self, callback: Callable[[], object]) -> None:
        """Run `callback` in the loop's next turn: how a pump that used up its budget yields to the others."""
        self._ready.append(callback)
        if not self._running_ready:
            self._running_ready = True
            self.loop.call_soon(self._run_ready)

    def call_outside(self, callback: Callable[[], object]) -> None:
        """Run `callback` now if this is a callback of the hub's and no fiber runs in it, otherwise in the next turn.

        For what resumes a fiber, which can be done from neither a fiber nor a task.
        """
        if running.hub is self and self.fiber is None:
            callback()
        else:
            self.call_ready(callback)

    def give_way(self, engine: str, other: str, reason: str) -> None:
        """Note that an engine cannot do something, and which one does it instead; told once, not for each flow."""
        if (engine, other) not in self.gave_way:
            self.gave_way[engine, other] = reason
            if self.tell is not None:
                self.tell(f"engine {engine} gives way to {other}: {reason}")

    def bound(self) -> bool:
        """Whether the loop's thread has been working nearly all the time of late.

        Then somebody else had better do what can be done elsewhere. A thread that has as much to do but waits for its
        turn at a processor is not meant: nobody is free to help.
        """
        now = time.monotonic()
        if now - self._looked > _LOOK:
            used = time.thread_time()
            self._bound = used - self._used > _BOUND * (now - self._looked)
            self._looked, self._used = now, used
        return self._bound

    def close(self) -> None:
        """Close the epoll set; sockets that are still registered belong to their owners."""
        while self.closing:
            self.closing.pop()()
        if not self._epoll.closed:
            if not self.loop.is_closed():
                self.loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
        self._callbacks.clear()
        _hubs.pop(self.loop, None)

    def _drain(self) -> None:
        closed = self._closed
        closed.clear()
        callbacks = self._callbacks
        running.hub = self
        try:
            for fd, events in self._epoll.poll(0, _BATCH):
                if closed and fd in closed:
                    continue
                on_events = callbacks.get(fd)
                if on_events is not None:
                    on_events(events)
        finally:
            running.hub = None

    def _run_ready(self) -> None:
        self._running_ready = False
        ready = self._ready
        running.hub = self
        try:
            for _ in range(len(ready)):
                ready.popleft()()
        finally:
            running.hub = None
            if ready and not self._running_ready:
                self._running_ready = True
                self.loop.call_soon(self._run_ready)


_hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = WeakKeyDictionary()


class _Running(threading.local):
    """The hub whose callbacks this thread runs at the moment."""

    hub: Hub | None = None


running: Final = _Running()


def current_hub() -> Hub:
    """Return the hub of the running loop, made on first use.

    Inside the hub's own callbacks the loop is not asked: CPython 3.11 makes a system call (getpid) of that question.
    """
    hub = running.hub
    if hub is not None:
        return hub
    loop = asyncio.get_running_loop()
    hub = _hubs.get(loop)
    if hub is None:
        hub = _hubs[loop] = Hub(loop)
    return hub
