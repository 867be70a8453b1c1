"""The only place that starts tasks, and the deadline that bounds them.

Every task has a name and a scope; a scope is drained or cancelled as a whole, so none is left without a parent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from .hub import current_hub

T = TypeVar("T")


class Scope:
    """A set of tasks with one end. Tasks report their own errors; what escapes goes to the loop's handler."""

    __slots__ = ("_loop", "_tasks", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """Start `work` as a task of this scope."""
        task = self._loop.create_task(work, name=name or self.name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler(
                {"message": f"task {task.get_name()!r} of {self.name!r} failed", "exception": error, "task": task}
            )

    async def drain(self, seconds: float) -> int:
        """Wait until all tasks have ended, at most `seconds`; return how many are left."""
        if self._tasks and seconds > 0:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        return len(self._tasks)

    async def cancel(self) -> None:
        """Cancel what is left and wait for it to end."""
        while self._tasks:
            tasks = set(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await asyncio.sleep(0)


async def together(*works: Coroutine[Any, Any, Any]) -> None:
    """Run all of `works` to their end; the first error cancels the others and is raised as it is.

    The last one runs in the calling task: two directions of a relay cost one extra task.
    """
    loop = asyncio.get_running_loop()
    parent = asyncio.current_task()
    assert parent is not None
    failure: list[BaseException] = []
    interrupted = False
    main_ended = False

    def ended(task: asyncio.Task[Any]) -> None:
        nonlocal interrupted
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not failure:
            failure.append(error)
            if not main_ended and not interrupted:
                interrupted = True
                parent.cancel()

    children = [loop.create_task(work) for work in works[:-1]]
    for child in children:
        child.add_done_callback(ended)
    try:
        try:
            await works[-1]
        finally:
            main_ended = True
        for child in children:
            if not child.done():
                await asyncio.wait((child,))
    except BaseException as exc:
        main_ended = True
        for child in children:
            child.cancel()
        pending = [child for child in children if not child.done()]
        if pending:
            await asyncio.wait(pending)
        if interrupted and isinstance(exc, asyncio.CancelledError) and parent.uncancel() == 0:
            raise failure[0] from None
        raise
    if failure:
        raise failure[0]


async def first_done(works: list[Coroutine[Any, Any, T]]) -> tuple[int, T]:
    """Run all of `works`; return (index, result) of the first to end, and cancel the others.

    An error of the first to end is raised. Results of those that are cancelled must not hold resources.
    """
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for index, task in enumerate(tasks):
            if task.done():
                return index, task.result()
        raise AssertionError("asyncio.wait returned without a finished task")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a blocking function in the loop's thread pool."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


def run(main: Coroutine[Any, Any, T], *, uvloop: bool | None = None) -> T:
    """Run `main` on a fresh loop: uvloop when installed, unless `uvloop` says otherwise. Closes the hub at the end."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if uvloop is not False:
        try:
            import uvloop as module
        except ImportError:
            if uvloop:
                raise
        else:
            factory = module.new_event_loop

    async def body() -> T:
        try:
            return await main
        finally:
            current_hub().close()

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(body())
