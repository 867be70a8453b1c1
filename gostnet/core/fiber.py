"""Fibers: coroutines that the readiness hub resumes directly.

A connection suspends a handful of times, always for a socket. An asyncio task pays for each of these with a future, a
callback and a turn of the loop; a fiber is resumed inside the very call that saw the edge. To the code it runs, a fiber
is the current task: it awaits futures, is cancelled and times out as a task does.
"""

from __future__ import annotations

import asyncio
import types
from asyncio.tasks import _enter_task, _leave_task  # the documented hooks for task implementations of one's own
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, cast

from .hub import Hub, current_hub, running

_PARKED: Final = object()


class _Suspension(tuple[object]):
    """An awaitable whose iterator, a quarter of a generator in size, yields the one mark that is in it."""

    __slots__ = ()

    __await__ = tuple.__iter__


_SUSPENSION: Final = cast(Awaitable[None], _Suspension((_PARKED,)))


def suspend() -> Awaitable[None]:
    """Return what stops the running fiber when awaited, which is at once; what it waits at is in its `waiting`."""
    return _SUSPENSION


class Fiber:
    """One running coroutine. Its interface is the part of asyncio.Task that cancellation and time-outs need."""

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_cancelling",
        "_coro",
        "_hub",
        "_loop",
        "_must_cancel",
        "_scheduled",
        "cancelled",
        "error",
        "finished",
        "name",
        "waiting",
    )

    def __init__(
        self,
        work: Coroutine[Any, Any, Any],
        name: str,
        at_end: tuple[Callable[[Fiber], object], ...] = (),
        hub: Hub | None = None,
    ) -> None:
        """Take a coroutine; `start` runs it. `at_end` is called at the end, as by `add_done_callback`."""
        self.name = name
        self._coro = work
        hub = self._hub = hub or current_hub()
        self._loop = hub.loop
        self.waiting: Any = None
        self._must_cancel = False
        self._cancelling = 0
        self._callbacks = at_end
        self.finished = False
        self.cancelled = False
        self.error: BaseException | None = None
        self._scheduled = False

    def start(self) -> None:
        """Run the coroutine to its first wait, now: a connection that is taken is never cancelled before it began."""
        loop = self._loop
        caller = asyncio.current_task(loop)
        if caller is None:
            self._step()
            return
        hub = self._hub
        fiber, active = hub.fiber, running.hub
        _leave_task(loop, caller)
        running.hub = hub
        try:
            self._step()
        finally:
            running.hub = active
            _enter_task(loop, caller)
            hub.fiber = fiber

    def wake(self) -> None:
        """Resume the fiber now, in the caller's stack; only from a callback of the loop."""
        self.waiting = None
        if not self._scheduled:
            self._step()

    def wake_later(self) -> None:
        """Resume the fiber in the loop's next turn, unless something else does."""
        if self.waiting is not None:
            self.waiting = None
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._hub.call_ready(self._scheduled_step)

    def _scheduled_step(self) -> None:
        self._scheduled = False
        self._step()

    def _step(self, error: BaseException | None = None) -> None:
        if self.finished:
            return
        loop, hub = self._loop, self._hub
        if self._must_cancel:
            self._must_cancel = False
            if not isinstance(error, asyncio.CancelledError):
                error = asyncio.CancelledError()
        _enter_task(loop, self)  # type: ignore[arg-type]
        hub.fiber = self
        try:
            waited = self._coro.send(None) if error is None else self._coro.throw(error)
        except StopIteration:
            self._end(None)
        except asyncio.CancelledError:
            self.cancelled = True
            self._end(None)
        except (KeyboardInterrupt, SystemExit) as exc:
            self._end(exc)
            raise
        except BaseException as exc:
            self._end(exc)
        else:
            if waited is not _PARKED:
                self._wait_for(waited)
            elif self._must_cancel:
                self._interrupt()
        finally:
            hub.fiber = None
            _leave_task(loop, self)  # type: ignore[arg-type]

    def _wait_for(self, future: Any) -> None:
        """Wait for an asyncio future, or for the next turn (None)."""
        if future is None:
            self._schedule()
            return
        future._asyncio_future_blocking = False
        self.waiting = future
        future.add_done_callback(self._future_done)
        if self._must_cancel and future.cancel():
            self._must_cancel = False

    def _future_done(self, future: asyncio.Future[Any]) -> None:
        if self.waiting is future:
            self.waiting = None
            self._step()

    def _end(self, error: BaseException | None) -> None:
        self.finished = True
        self.error = error
        for callback in self._callbacks:
            callback(self)
        self._callbacks = ()

    # ---- what asyncio.timeout and our own scopes ask of a task ---------------------------------
    def cancel(self, msg: object = None) -> bool:
        """Throw CancelledError into the coroutine in the loop's next turn; False if it has ended."""
        if self.finished:
            return False
        self._cancelling += 1
        self._interrupt()
        return True

    def _interrupt(self) -> None:
        waiting = self.waiting
        if waiting is None:
            self._must_cancel = True  # it runs, or is about to: the next step throws
        elif isinstance(waiting, asyncio.Future):
            if not waiting.cancel():
                self._must_cancel = True
        else:
            waiting.leave(self)
            self.waiting = None
            self._must_cancel = True
            self._schedule()

    def cancelling(self) -> int:
        """Cancellations asked for and not taken back."""
        return self._cancelling

    def uncancel(self) -> int:
        """Take one cancellation back; return how many are left."""
        if self._cancelling:
            self._cancelling -= 1
        return self._cancelling

    def done(self) -> bool:
        """Whether the coroutine has ended."""
        return self.finished

    def get_name(self) -> str:
        """The name given at the start."""
        return self.name

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop it runs on."""
        return self._loop

    def get_coro(self) -> Coroutine[Any, Any, Any]:
        """The coroutine."""
        return self._coro

    def add_done_callback(self, callback: Callable[[Fiber], object]) -> None:
        """Call `callback(fiber)` at the end, within the last step; in the loop's next turn if that has been."""
        if self.finished:
            self._hub.call_ready(lambda: callback(self))
        else:
            self._callbacks = (*self._callbacks, callback)


class Waker:
    """An ordinary task's wait, in the form that a fiber's has."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future = future

    def wake(self) -> None:
        """Let the task go on."""
        if not self.future.done():
            self.future.set_result(None)

    wake_later = wake


class Gate:
    """Opens once; one fiber or task waits for it."""

    __slots__ = ("_hub", "_waiter", "is_open")

    def __init__(self, hub: Hub) -> None:
        self.is_open = False
        self._hub = hub
        self._waiter: Fiber | Waker | None = None

    def open(self) -> None:
        """Let the waiter go on; only from a callback of the loop, or before it waits."""
        self.is_open = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.wake()

    def wait(self) -> Awaitable[None]:
        """Return what waits until it opens when awaited, which is at once: a fiber has no frame of ours meanwhile."""
        fiber = self._hub.fiber
        if fiber is None or self.is_open:
            return self._wait()
        self._waiter = fiber
        fiber.waiting = self
        return suspend()

    async def _wait(self) -> None:
        if self.is_open:
            return
        waker = self._waiter = Waker(self._hub.loop.create_future())
        try:
            await waker.future
        finally:
            self._waiter = None

    def leave(self, fiber: Fiber) -> None:
        """Forget a fiber that is cancelled while it waits here."""
        self._waiter = None


class _Entry:
    """One running deadline."""

    __slots__ = ("active", "expired", "task", "when")

    def __init__(self, when: float, task: Any) -> None:
        self.when = when
        self.task = task
        self.active = True
        self.expired = False


class _Queue:
    """All deadlines of one duration: they expire in the order in which they began, so one timer serves them all."""

    __slots__ = ("_entries", "_loop", "_timer", "seconds")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self.seconds = seconds
        self._loop = loop
        self._entries: deque[_Entry] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, task: Any) -> _Entry:
        entry = _Entry(self._loop.time() + self.seconds, task)
        self._entries.append(entry)
        if self._timer is None:
            self._timer = self._loop.call_at(entry.when, self._expire)
        return entry

    def prune(self) -> None:
        """Drop ended entries at the front; the timer stays, it finds nothing or the next one."""
        entries = self._entries
        while entries and not entries[0].active:
            entries.popleft()

    def _expire(self) -> None:
        entries = self._entries
        now = self._loop.time()
        while entries and (not entries[0].active or entries[0].when <= now):
            entry = entries.popleft()
            if entry.active:
                entry.expired = True
                entry.task.cancel()
        self._timer = self._loop.call_at(entries[0].when, self._expire) if entries else None


class deadline:
    """`with deadline(seconds):` raise TimeoutError when the body takes longer; 0 or less never does.

    The cheap form of asyncio.timeout for durations that many connections share: no timer per use, and nothing to
    await on entry and exit.
    """

    __slots__ = ("_entry", "_queue", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._entry: _Entry | None = None

    def __enter__(self) -> deadline:
        if self.seconds > 0:
            hub = current_hub()
            queue = hub.deadlines.get(self.seconds)
            if queue is None:
                queue = hub.deadlines[self.seconds] = _Queue(hub.loop, self.seconds)
            task = hub.fiber or asyncio.current_task()
            self._queue = queue
            self._entry = queue.add(task)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        entry = self._entry
        if entry is None:
            return
        entry.active = False
        task, entry.task = entry.task, None
        self._queue.prune()
        if entry.expired and task.uncancel() <= 0 and kind is asyncio.CancelledError:
            raise TimeoutError(f"{self.seconds:g}s have passed") from error
