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

FALLBACK_DELAY = 0.25
"""Seconds before the next address is tried beside the one at hand (RFC 8305 section 5)."""

MAX_RACING = 8
"""Attempts that run at the same time: a name with many addresses must not become many connections."""


async def race(
    attempts: Sequence[Callable[[], Awaitable[T]]],
    discard: Callable[[T], None],
    *,
    delay: float = 0.0,
    limit: int = MAX_RACING,
    more: Callable[[], Awaitable[Sequence[Callable[[], Awaitable[T]]]]] | None = None,
) -> T:
    """Return the first result; the other attempts are cancelled, and a result that one had all the same is discarded.

    The attempts start in order, the next one `delay` seconds after the one before or as soon as one fails, at most
    `limit` at a time. Raise the first error when all have failed. Cancelling it leaves no result behind.

    more    finds further attempts; asked once, when the first has not ended within the delay or all have failed. They
            take turns with those that still wait
    """
    loop = asyncio.get_running_loop()
    scope = Scope("race")
    won: asyncio.Future[T] = loop.create_future()
    errors: list[Exception] = []
    waiting = deque(attempts)
    wake = asyncio.Event()
    running = 0
    slow = False

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

    async def extend(find: Callable[[], Awaitable[Sequence[Callable[[], Awaitable[T]]]]]) -> None:
        nonlocal running
        try:
            found = taking_turns(await find(), list(waiting))
            waiting.clear()
            waiting.extend(found)
        except Exception as exc:
            errors.append(exc)
        finally:
            running -= 1
            wake.set()

    try:
        while not won.done():
            if more is not None and (slow or not (waiting or running)):
                running += 1
                scope.start(extend(more))
                more = None
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
                async with asyncio.timeout(pause if more is None else delay):
                    await wake.wait()
            except TimeoutError:
                slow = True
        return won.result()
    except asyncio.CancelledError:
        if won.done():
            discard(won.result())
        raise
    finally:
        won.cancel()  # what still succeeds from here on is discarded
        await scope.cancel()


async def connect_any(
    connect: Callable[[Endpoint], Awaitable[Stream]],
    hosts: Sequence[str],
    port: int,
    others: Callable[[], Awaitable[Sequence[str]]] | None = None,
) -> Stream:
    """Connect to one of the addresses of a name, in their order, the families taking turns (RFC 8305 section 4).

    others    finds the addresses in the family that `hosts` has none of: asked when those are slow or lead nowhere
    """
    if len(hosts) == 1 and others is None:
        return await connect(Endpoint(hosts[0], port))

    def attempt(host: str) -> Callable[[], Awaitable[Stream]]:
        return lambda: connect(Endpoint(host, port))

    async def more() -> list[Callable[[], Awaitable[Stream]]]:
        assert others is not None
        return [attempt(host) for host in await others()]

    return await race(
        [attempt(host) for host in interleaved(hosts)],
        Stream.abort,
        delay=FALLBACK_DELAY,
        more=more if others is not None else None,
    )


def interleaved(hosts: Sequence[str]) -> Sequence[str]:
    """Return the addresses with the families taking turns, beginning with that of the first."""
    first = ":" in hosts[0]
    return taking_turns(
        [host for host in hosts if (":" in host) == first], [host for host in hosts if (":" in host) != first]
    )


def taking_turns(first: Sequence[T], second: Sequence[T]) -> Sequence[T]:
    """Return the items of both in turn, as long as both have some."""
    if not first or not second:
        return first or second
    shared = min(len(first), len(second))
    return [item for pair in zip(first, second, strict=False) for item in pair] + [*first[shared:], *second[shared:]]
