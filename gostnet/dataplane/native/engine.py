"""The engine over the native relay: a few C threads per hub, their news by an eventfd that the hub watches."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import weakref
from dataclasses import dataclass
from typing import Final, Protocol

from ...core.hub import Hub
from ..pipes import SMALL_PIPES, not_spliced
from .library import ENDED, OFF, WANTS, Library, Record, Records, load

BATCH: Final = 64
"""Records taken from the library at once."""

REFRESH: Final = 1.0
"""Seconds between looks at the counters of flows that are inside, so that meters show bytes of running flows."""


RETRY: Final = 30.0
"""Seconds until threads that could not be started are asked for again."""


class Passenger(Protocol):
    """A flow inside the thread, as the engine sees it. The calls come from the loop."""

    def counted(self, record: Record) -> None:
        """Take the counters, which begin with 0 at `add`."""

    def wants(self, up: bool, size: int) -> None:
        """Grant leave for some of the `size` bytes that wait in this direction, now or later."""

    def ended(self, record: Record) -> None:
        """Take the end: the thread has let go of the sockets."""


def threads_here() -> int:
    """Return how many threads move bytes: as many as processors that this process may use, at most four.

    On two processors two moved 1.3 times the messages and 1.7 times the bulk of one, for the same CPU (measured).
    """
    return min(4, len(os.sched_getaffinity(0)))


class Engine:
    """The threads of one hub, and the flows inside them. Made for the first flow; ends with the hub.

    A flow's number is its number in its thread, times the number of threads, plus that of the thread.
    """

    __slots__ = (
        "__weakref__",
        "_events",
        "_hub",
        "_inside",
        "_library",
        "_next",
        "_one",
        "_records",
        "_relays",
        "_stop",
        "_timer",
    )

    def __init__(self, hub: Hub, library: Library, threads: int = 0) -> None:
        """Start the threads, by default as many as `threads_here` says. Raise OSError."""
        self._hub = hub
        self._library = library
        self._inside: dict[int, Passenger] = {}
        self._records = Records(BATCH)
        self._one = Records(1)
        self._timer: asyncio.TimerHandle | None = None
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._relays: list[int] = []
        self._next = 0
        for _ in range(threads or threads_here()):
            relay = library.start(self._events)
            if not relay:
                _stop(library, self._relays, self._events, os.getpid())
                raise OSError("no memory, descriptors or threads for it")
            self._relays.append(relay)
        # Also without `Hub.close`, and never in a fork, which has no such thread.
        self._stop = weakref.finalize(self, _stop, library, self._relays, self._events, os.getpid())
        hub.register(self._events, self._news)
        hub.closing.append(self.close)

    def __len__(self) -> int:
        """Flows inside."""
        return len(self._inside)

    def add(
        self,
        passenger: Passenger,
        client: int,
        upstream: int,
        *,
        limited: int = 0,
        done: int = 0,
        short: bool = False,
    ) -> int | None:
        """Hand two descriptors over, which no hub watches any more; return the flow's number, None if that failed.

        Bits of `limited`: the direction (1 up, 2 down) moves only what `grant` allows; of `done`: it has ended. Flows
        that are likely to be `short` share one thread, which is not woken for each of them then, and which closes the
        descriptors of those that end well, as their records say; others take turns.
        """
        if not self._stop.alive:
            return None
        count = len(self._relays)
        if short:
            thread = 0
        else:
            thread = self._next = (self._next + 1) % count
        found: int = self._library.add(self._relays[thread], client, upstream, limited, done, short)
        if found < 0:
            self._hub.give_way("native", "splice", "no memory, or no epoll watches, for another flow")
            return None
        number = found * count + thread
        self._inside[number] = passenger
        if self._timer is None:
            self._timer = self._hub.loop.call_later(REFRESH, self._refresh)
        return number

    def cancel(self, number: int, passenger: Passenger) -> None:
        """Take a flow back, unless it has ended: the descriptors are the caller's again.

        Its `counted` is called once more.
        """
        if self._stop.alive and self._inside.get(number) is passenger:
            del self._inside[number]
            own, thread = divmod(number, len(self._relays))
            self._library.cancel(self._relays[thread], own, self._one.place)
            passenger.counted(self._one.read(1)[0])

    def grant(self, number: int, up: bool, size: int) -> None:
        """Let a limited direction move `size` bytes more."""
        if self._stop.alive:
            own, thread = divmod(number, len(self._relays))
            self._library.grant(self._relays[thread], own, 0 if up else 1, size)

    def count(self, number: int, passenger: Passenger) -> None:
        """Have `counted` called with the counters of this moment, unless the flow has ended."""
        if self._stop.alive and self._inside.get(number) is passenger:
            own, thread = divmod(number, len(self._relays))
            self._library.count(self._relays[thread], own, self._one.place)
            passenger.counted(self._one.read(1)[0])

    def _news(self, _: int) -> None:
        try:
            os.eventfd_read(self._events)
        except BlockingIOError:
            pass
        for thread in range(len(self._relays)):
            self._news_of(thread)

    def _news_of(self, thread: int) -> None:
        records, relay = self._records, self._relays[thread]
        while True:
            count: int = self._library.news(relay, records.place, BATCH)
            # A number is free again as soon as its end has been told, and whoever hears of an end may hand over the
            # next pair at once: so first all that have ended leave.
            told = [(record, self._passenger(record, thread)) for record in records.read(count)]
            for record, passenger in told:
                if passenger is not None:
                    _tell(record, passenger)
            if count < BATCH:
                return

    def _passenger(self, record: Record, thread: int) -> Passenger | None:
        number = record.id * len(self._relays) + thread
        return self._inside.pop(number, None) if record.news & ENDED else self._inside.get(number)

    def _refresh(self) -> None:
        """Bring the meters up to date, and look again while anything is inside."""
        if not self._inside:
            self._timer = None
            return
        records, threads = self._records, len(self._relays)
        for thread, relay in enumerate(self._relays):
            position = ctypes.c_uint32(0)
            while count := self._library.moved(relay, position, records.place, BATCH):
                for record in records.read(count):
                    passenger = self._inside.get(record.id * threads + thread)
                    if passenger is not None:
                        passenger.counted(record)
            self._tell_refusal(relay)
        self._timer = self._hub.loop.call_later(REFRESH, self._refresh)

    def _tell_refusal(self, relay: int) -> None:
        """Tell why a thread copies bytes, which it does by itself."""
        refused: int = self._library.refused(relay)
        if refused in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            self._hub.give_way("splice", "copy", f"no pipe: {os.strerror(refused)}")
        elif refused:
            self._hub.give_way("splice", "copy", SMALL_PIPES if refused == errno.EDQUOT else not_spliced(refused))

    def close(self) -> None:
        """End the threads; flows that are still inside move no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for number, passenger in tuple(self._inside.items()):
            self.cancel(number, passenger)  # what was closed in there must not be closed again
        self._hub.forget(self._events)
        self._hub.native = None
        self._stop()


def _tell(record: Record, passenger: Passenger) -> None:
    if record.news & ENDED:
        passenger.counted(record)
        passenger.ended(record)
        return
    if record.news & WANTS:
        passenger.wants(True, record.wanted_up)
    if record.news & WANTS << 1:
        passenger.wants(False, record.wanted_down)


def _stop(library: Library, relays: list[int], events: int, process: int) -> None:
    if os.getpid() == process:
        for relay in relays:
            library.stop(relay)
        os.close(events)


@dataclass(frozen=True, slots=True)
class _Refused:
    """In an engine's place: why there is none, and how long that is taken for granted."""

    reason: str
    until: float


def engine(hub: Hub) -> tuple[Engine | None, str]:
    """Return (the engine of `hub`, ""), started if need be, or (None, why there is none)."""
    library, reason = load()
    if library is None:
        if reason != OFF:
            hub.give_way("native", "splice", reason)
        return None, reason
    found = hub.native
    if type(found) is Engine:
        return found, ""
    if found is None or found.until <= hub.loop.time():
        try:
            hub.native = Engine(hub, library)
        except OSError as exc:
            found = hub.native = _Refused(exc.strerror or str(exc), hub.loop.time() + RETRY)
            hub.give_way("native", "splice", found.reason)
        else:
            return hub.native, ""
    return None, found.reason
