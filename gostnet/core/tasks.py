"""The only place that starts tasks, and the deadline that bounds them.

Every task has a name and a scope; a scope is drained or cancelled as a whole, so none is left without a parent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from .fiber import Fiber, Gate, deadline
from .hub import Hub, current_hub

T = TypeVar("T")

__all__ = ["Fiber", "Scope", "deadline", "first_done", "first_of_fibers", "in_thread", "run", "together"]


class Scope:
    """A set of tasks with one end. Tasks report their own errors; what escapes goes to the loop's handler."""

    __slots__ = ("_at_end", "_fibers", "_hub", "_loop", "_tasks", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        self._fibers: set[Fiber] = set()
        self._at_end = (self._fiber_done,)
        self._loop = asyncio.get_running_loop()
        self._hub: Hub | None = None

    def __len__(self) -> int:
        return len(self._tasks) + len(self._fibers)

    def launch(self, work: Coroutine[Any, Any, None]) -> Fiber:
        """Run `work` as a fiber of this scope, to its first wait at once: for connections, who wait for sockets."""
        if self._hub is None:
            self._hub = current_hub()
        fiber = Fiber(work, self.name, self._at_end, self._hub)
        self._fibers.add(fiber)
        fiber.start()
        return fiber

    def _fiber_done(self, fiber: Fiber) -> None:
        self._fibers.discard(fiber)
        if fiber.error is not None:
            self._report(fiber.name, fiber.error)

    def _report(self, name: str, error: BaseException) -> None:
        self._loop.call_exception_handler({"message": f"task {name!r} of {self.name!r} failed", "exception": error})

    def start(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """Start `work` as a task of this scope."""
        task = self._loop.create_task(work, name=name or self.name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report(task.get_name(), error)

    async def drain(self, seconds: float) -> int:
        """Wait until everything has ended, at most `seconds`; return how much is left."""
        if len(self) and seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await self._empty()
            except TimeoutError:
                pass
        return len(self)

    async def cancel(self) -> None:
        """Cancel what is left and wait for it to end."""
        while len(self):
            everything: set[Any] = {*self._tasks, *self._fibers}
            for item in everything:
                item.cancel()
            await self._empty(once=True)

    async def _empty(self, once: bool = False) -> None:
        """Wait until what is here now has ended; and what came meanwhile too, unless `once`."""
        while len(self):
            ended = self._loop.create_future()
            left: set[Any] = {*self._tasks, *self._fibers}

            def gone(item: Any, left: set[Any] = left, ended: asyncio.Future[None] = ended) -> None:
                left.discard(item)
                if not left and not ended.done():
                    ended.set_result(None)

            for item in tuple(left):
                item.add_done_callback(gone)
            await ended
            if once:
                return


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
    child: asyncio.Task[Any] | None = None
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
            pending.clear()
        if interrupted and isinstance(exc, asyncio.CancelledError) and parent.uncancel() == 0:
            children.clear()
            raise failure.pop() from None
        raise
    finally:
        # An error that is raised here holds this frame: what holds the error in turn would keep both, and all that
        # their frames hold, until the garbage collector comes by.
        children.clear()
        child = None
    if failure:
        raise failure.pop()


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


async def first_of_fibers(name: str, works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all of `works` as fibers until the first of them ends, and cancel the others; its error is raised as it is.

    The cheap form of `first_done`, for what waits for sockets. The calling task or fiber only waits.
    """
    hub = current_hub()
    one, every = Gate(hub), Gate(hub)
    ended: list[Fiber] = []

    def at_end(fiber: Fiber) -> None:
        ended.append(fiber)
        if len(ended) == 1:
            hub.call_ready(one.open)
        if len(ended) == len(works):
            hub.call_ready(every.open)

    fibers = [Fiber(work, name, (at_end,)) for work in works]
    try:
        for fiber in fibers:
            fiber.start()
        await one.wait()
    finally:
        for fiber in fibers:
            fiber.cancel()
        if len(ended) < len(fibers):
            await every.wait()
        first = ended[:1]
        ended.clear()  # what an error that is raised holds must not hold it in turn
        fibers.clear()
    if first and (error := first.pop().error) is not None:
        try:
            raise error
        finally:
            del error


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
