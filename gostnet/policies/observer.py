"""Observers: programs that are told what services do, and how much. Rows E01-E08.

A report that fails is sent again, before anything newer; meanwhile the counters go on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeAlias

from ..core.errors import GostnetError
from .post import Poster
from .threads import Threads

PERIOD: Final = 5.0
"""Seconds between reports where the configuration says 0."""
MIN_PERIOD: Final = 1.0
_STATES: Final = 64
"""Changes of state that wait for an observer that does not answer; the oldest are forgotten."""

Events: TypeAlias = "list[dict[str, Any]]"
"""Events as an HTTP plugin gets them."""


class Observer(Protocol):
    """Takes events."""

    name: str

    def submit(self, events: Events) -> asyncio.Future[None]:
        """Hand events over. The future, or the call, raises GostnetError when they were not taken."""


class HTTPObserver:
    """The plugin type `http`: POST `{"events": [...]}`, answered by 200 and `{"ok": true}`."""

    def __init__(self, name: str, poster: Poster, threads: Threads) -> None:
        self.name = name
        self._poster = poster
        self._threads = threads

    def submit(self, events: Events) -> asyncio.Future[None]:
        """Post events. Raise PostError, or Busy."""
        return self._threads.submit(self._poster.call, {"events": events})


class Reporter:
    """Reports of one service to one observer: changes of state at once, statistics from time to time.

    collect    returns what has changed since it was asked last
    prepare    sees to it, before that, that all counts are up to date; None where there is nothing to wait for
    """

    def __init__(
        self,
        observer: Observer,
        *,
        period: float = PERIOD,
        states: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._observer = observer
        self.period = max(MIN_PERIOD, period) if period > 0 else PERIOD
        self.collect: Callable[[], Events] = list
        self.prepare: Callable[[], Awaitable[None]] | None = None
        self._states = states
        self._report = report or (lambda _: None)
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_STATES)
        self._unsent: Events = []
        self._flight: tuple[Events, asyncio.Future[None]] | None = None
        self._wake = asyncio.Event()
        self._failing = False

    def status(self, service: str, state: str, message: str) -> None:
        """Queue a change of state."""
        if self._states:
            status = {"state": state, "msg": message}
            self._waiting.append({"kind": "service", "service": service, "type": "status", "status": status})
            self._wake.set()

    async def load(self) -> bool:
        """There is nothing to wait for."""
        return True

    async def run(self) -> None:
        """Report until cancelled."""
        now = asyncio.get_running_loop().time
        due = now() + self.period
        while True:
            try:
                async with asyncio.timeout(max(0.0, due - now())):
                    await self._wake.wait()
            except TimeoutError:
                due = now() + self.period
            else:
                self._wake.clear()
                await self._send_states()
                continue
            await self._send_states()
            await self._send_statistics()

    async def _send_states(self) -> None:
        while self._waiting:
            if not await self._send([self._waiting[0]]):
                return

    async def _send_statistics(self) -> None:
        if self._unsent and not await self._send(self._unsent):
            return
        if self.prepare is not None:
            await self.prepare()
        self._unsent = self.collect()
        if self._unsent:
            await self._send(self._unsent)

    async def _send(self, events: Events) -> bool:
        """Hand events over and forget them; keep them when they are not taken. Return whether they were."""
        try:
            self._flight = (events, self._observer.submit(events))
        except GostnetError as exc:
            return self._failed(exc)
        return await self._land()

    async def _land(self) -> bool:
        """Wait for what is under way. Who is cancelled here leaves it to `finish`, so that nothing is sent twice."""
        assert self._flight is not None
        events, future = self._flight
        try:
            await asyncio.shield(future)
        except GostnetError as exc:
            self._flight = None
            return self._failed(exc)
        self._flight = None
        self._failing = False
        if self._waiting and events[0] is self._waiting[0]:
            self._waiting.popleft()
        if events is self._unsent:
            self._unsent = []
        return True

    def _failed(self, error: GostnetError) -> bool:
        if not self._failing:
            self._report(f"observer {self._observer.name}: {error}")
        self._failing = True
        return False

    async def finish(self) -> None:
        """Report the last changes, at the end."""
        if self._flight is not None:
            await self._land()
        await self._send_states()
        await self._send_statistics()
