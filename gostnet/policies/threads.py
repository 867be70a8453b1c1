"""Threads for calls that block, of which none can hold up the end of the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar

from ..core.errors import GostnetError

T = TypeVar("T")

MAX_WAITING: Final = 256
"""Calls that may wait for a thread."""

_Job: TypeAlias = "tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]] | None"


class Busy(GostnetError):
    """Too many calls wait already."""

    code = "busy"


class Threads:
    """A few daemon threads, started when needed.

    Not the loop's own pool: that one is joined at the end, and a name server or a web server that does not answer
    would keep the daemon from ending.
    """

    def __init__(self, name: str, count: int, waiting: int = MAX_WAITING) -> None:
        self._name = name
        self._count = count
        self._waiting = waiting
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._threads = 0
        self._running = 0
        self._closed = False

    def submit(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Call `function` in a thread; the future has its outcome. Raise Busy when too many calls wait.

        Cancelling the future drops the outcome, and the call too if it has not begun.
        """
        if self._closed or self._running - self._threads >= self._waiting:
            raise Busy(f"{self._name}: {'closed' if self._closed else 'too many calls wait'}")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._running += 1
        if self._running > self._threads and self._threads < self._count:
            self._threads += 1
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        self._jobs.put((future, function, args))
        return future

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` in a thread and return its result."""
        return await self.submit(function, *args)

    def close(self) -> None:
        """Let the threads end after what they do at the moment; their number need not be waited for."""
        if not self._closed:
            self._closed = True
            for _ in range(self._threads):
                self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, function, args = job
            result: Any = None
            error: BaseException | None = None
            if not future.cancelled():
                try:
                    result = function(*args)
                except Exception as exc:  # handed to the caller, whatever it is
                    error = exc
            try:
                future.get_loop().call_soon_threadsafe(self._finish, future, result, error)
            except RuntimeError:
                return  # the loop has been closed, nobody waits any more

    def _finish(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._running -= 1
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
