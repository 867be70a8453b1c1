"""Races: several ways to the same thing, of which the first that works is taken."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..core.address import Endpoint
from ..core.stream import Stream
from ..core.tasks import Scope

T = TypeVar("T")

FALLBACK_DELAY = 0.3
"""Seconds before the next address is tried beside the one at hand: Go's happy-eyeballs delay (RFC 8305)."""

MAX_RACING = 8
"""Attempts that run at the same time: a name with many addresses must not become many connections."""


async def race(
    attempts: Sequence[Callable[[], Awaitable[T]]],
    discard: Callable[[T], None],
    *,
    delay: float = 0.0,
    limit: int = MAX_RACING,
) -> T:
    """Return the first result; the other attempts are cancelled, and a result that one had all the same is discarded.

    The attempts start in order, the next one `delay` seconds after the one before or as soon as one fails, at most
    `limit` at a time. Raise the first error when all have failed. Cancelling it leaves no result behind.
    """
    loop = asyncio.get_running_loop()
    scope = Scope("race")
    won: asyncio.Future[T] = loop.create_future()
    errors: list[Exception] = []
    waiting = deque(attempts)
    wake = asyncio.Event()
    running = 0

    async def run(attempt: Callable[[], Awaitable[T]]) -> None:
        nonlocal running
        try:
            result = await attempt()
        except Exception as exc:
            errors.append(exc)
        else:
            if won.done():
                discard(result)
            else:
                won.set_result(result)
        finally:
            running -= 1
            wake.set()

    try:
        while not won.done():
            pause: float | None = None
            if waiting and running < limit:
                running += 1
                scope.start(run(waiting.popleft()))
                pause = delay if waiting and running < limit else None
            elif not running:
                raise errors[0]
            if pause == 0.0:
                continue
            wake.clear()
            try:
                async with asyncio.timeout(pause):
                    await wake.wait()
            except TimeoutError:
                pass
        return won.result()
    except asyncio.CancelledError:
        if won.done():
            discard(won.result())
        raise
    finally:
        won.cancel()  # what still succeeds from here on is discarded
        await scope.cancel()


async def connect_any(connect: Callable[[Endpoint], Awaitable[Stream]], hosts: Sequence[str], port: int) -> Stream:
    """Connect to one of the addresses of a name, in their order, the families taking turns (RFC 8305 section 4)."""
    if len(hosts) == 1:
        return await connect(Endpoint(hosts[0], port))

    def attempt(host: str) -> Callable[[], Awaitable[Stream]]:
        return lambda: connect(Endpoint(host, port))

    return await race([attempt(host) for host in interleaved(hosts)], Stream.abort, delay=FALLBACK_DELAY)


def interleaved(hosts: Sequence[str]) -> Sequence[str]:
    """Return the addresses with the families taking turns, beginning with that of the first."""
    first = ":" in hosts[0]
    queues = (
        deque(host for host in hosts if (":" in host) == first),
        deque(host for host in hosts if (":" in host) != first),
    )
    if not queues[1]:
        return hosts
    turns: list[str] = []
    while queues[0] or queues[1]:
        turns += [queue.popleft() for queue in queues if queue]
    return turns
