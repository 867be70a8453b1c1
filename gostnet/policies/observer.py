"""Observers: programs that are told what services do, and how much. Rows E01-E08.

A report that fails is sent again, before anything newer; meanwhile the counters go on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
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

    async def observe(self, events: Events) -> None:
        """Hand events over. Raise GostnetError when they were not taken."""


class HTTPObserver:
    """The plugin type `http`: POST `{"events": [...]}`, answered by 200 and `{"ok": true}`."""

    def __init__(self, name: str, poster: Poster, threads: Threads) -> None:
        self.name = name
        self._poster = poster
        self._threads = threads
        self._free = asyncio.Lock()

    async def observe(self, events: Events) -> None:
        """Post events. Raise PostError, or Busy."""
        async with self._free:
            await self._threads.run(self._poster.call, {"events": events})


class Reporter:
    """Reports of one service to one observer: changes of state at once, statistics from time to time.

    collect    returns what has changed since it was asked last
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
        self._states = states
        self._report = report or (lambda _: None)
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_STATES)
        self._unsent: Events = []
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
            self._waiting.popleft()

    async def _send_statistics(self) -> None:
        if self._unsent and not await self._send(self._unsent):
            return
        events = self.collect()
        self._unsent = events if events and not await self._send(events) else []

    async def _send(self, events: Events) -> bool:
        try:
            await self._observer.observe(events)
        except GostnetError as exc:
            if not self._failing:
                self._report(f"observer {self._observer.name}: {exc}")
            self._failing = True
            return False
        self._failing = False
        return True

    async def finish(self) -> None:
        """Report the last changes, at the end."""
        await self._send_states()
        await self._send_statistics()
