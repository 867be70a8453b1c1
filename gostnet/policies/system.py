"""The system's resolver: what the C library knows, for everything that has no resolver of its own."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ..core.errors import ResolveError
from .bucket import Clock
from .networks import number
from .threads import Busy, Threads

THREADS: Final = 8
"""Look-ups at a time: a dead name server holds each for several seconds."""
TTL: Final = 10.0
"""Seconds that addresses are kept; the C library does not say for how long they hold."""
NEGATIVE_TTL: Final = 2.0
"""Seconds that a failure is kept."""
MAX_ENTRIES: Final = 1024

_FAMILIES: Final = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(slots=True)
class _Known:
    addresses: tuple[str, ...]
    error: str
    expires: float


class SystemResolver:
    """Asks the C library in threads, with a short-lived cache; equal look-ups at the same time are one.

    both_families   asked for no family, it gives the addresses of both
    """

    both_families: Final = True

    def __init__(self, *, clock: Clock = time.monotonic, threads: int = THREADS, entries: int = MAX_ENTRIES) -> None:
        self._clock = clock
        self._entries = entries
        self._threads = Threads("resolver", threads)
        self._known: dict[tuple[str, int], _Known] = {}
        self._running: dict[tuple[str, int], asyncio.Future[_Known]] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        """Return the addresses of `host` in the system's order of preference. Raise ResolveError.

        The C library sets its own time-out; who cannot wait for it cancels.
        """
        if number(host) is not None:
            return [host]
        key = (host.lower(), family)
        known = self._known.get(key)
        if known is None or known.expires <= self._clock():
            known = await self._look_up(key)
        if not known.addresses:
            raise ResolveError(f"{host[:64]}: {known.error}")
        return list(known.addresses)

    async def _look_up(self, key: tuple[str, int]) -> _Known:
        running = self._running.get(key)
        if running is None:
            host, family = key
            try:
                call = self._threads.submit(socket.getaddrinfo, host, None, _FAMILIES[family], socket.SOCK_STREAM)
            except Busy as exc:
                return _Known((), str(exc), 0.0)
            running = self._running[key] = asyncio.get_running_loop().create_future()
            call.add_done_callback(partial(self._ended, key))
        # The answer belongs to all who wait: one that is cancelled must not take it along.
        return await asyncio.shield(running)

    def _ended(self, key: tuple[str, int], call: asyncio.Future[Any]) -> None:
        now = self._clock()
        error = call.exception()
        if error is None:
            addresses = tuple(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in call.result()))
            known = _Known(addresses, "no address", now + TTL)
        else:
            known = _Known((), getattr(error, "strerror", None) or "not a host name", now + NEGATIVE_TTL)
        self._known.pop(key, None)
        while len(self._known) >= self._entries:
            del self._known[next(iter(self._known))]
        self._known[key] = known
        self._running.pop(key).set_result(known)

    def close(self) -> None:
        """Let the threads end; look-ups from now on fail."""
        self._threads.close()
