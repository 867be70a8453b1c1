"""Open connections to origins between two requests, for the option `keepalive`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ...core.address import Endpoint
from ...core.errors import ConnError
from ...core.hub import current_hub
from ...core.sockets import SocketStream
from ...core.stream import Stream


@dataclass(slots=True, eq=False)
class Idle:
    """A connection that waits for its next request; `route` is the way it took, for the records."""

    stream: Stream
    route: tuple[str, ...]
    origin: Endpoint
    expires: float = 0.0

    def alive(self) -> bool:
        """Whether the origin has neither closed it nor said anything unasked, as far as a socket can tell."""
        if not isinstance(self.stream, SocketStream):
            return True
        try:
            return self.stream.receive_now(1) is None
        except ConnError:
            return False


class Pool:
    """Idle connections, the latest first. Bounded: the oldest make room."""

    IDLE = 30.0
    """Seconds that a connection is kept (GOST's, fixed there too)."""

    PER_ORIGIN = 8
    TOTAL = 256

    def __init__(self) -> None:
        self._all: dict[Idle, None] = {}  # in the order in which they expire
        self._by_origin: dict[Endpoint, list[Idle]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._all)

    def take(self, origin: Endpoint, *, certain: bool = False) -> Idle | None:
        """Return a connection to `origin`, None without a usable one.

        `certain`: only one that can be seen to be alive, for requests that must not be sent twice.
        """
        waiting = self._by_origin.get(origin)
        while waiting:
            idle = waiting[-1]
            if certain and not isinstance(idle.stream, SocketStream):
                return None
            self._forget(idle)
            if idle.alive():
                return idle
            idle.stream.abort()
        return None

    def put(self, stream: Stream, route: tuple[str, ...], origin: Endpoint) -> None:
        """Keep a connection on which the last exchange is complete; it is the pool's from now on."""
        loop = current_hub().loop
        idle = Idle(stream, route, origin, loop.time() + self.IDLE)
        waiting = self._by_origin.setdefault(origin, [])
        waiting.append(idle)
        self._all[idle] = None
        if len(waiting) > self.PER_ORIGIN:
            self._drop(waiting[0])
        elif len(self._all) > self.TOTAL:
            self._drop(next(iter(self._all)))
        if self._timer is None:
            self._timer = loop.call_at(idle.expires, self._expire)

    def close(self) -> None:
        """Close everything; the pool can be used again."""
        for idle in tuple(self._all):
            self._drop(idle)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        loop = current_hub().loop
        now = loop.time()
        self._timer = None
        for idle in tuple(self._all):
            if idle.expires > now:
                self._timer = loop.call_at(idle.expires, self._expire)
                break
            self._drop(idle)

    def _drop(self, idle: Idle) -> None:
        self._forget(idle)
        idle.stream.abort()

    def _forget(self, idle: Idle) -> None:
        del self._all[idle]
        waiting = self._by_origin[idle.origin]
        waiting.remove(idle)
        if not waiting:
            del self._by_origin[idle.origin]
