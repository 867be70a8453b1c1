"""Limits that several workers keep together: the same rules as of one process, their state in the ledger.

What they promise holds for all workers together, and exactly: whoever asks looks at the common state under its lock.
Without room in the ledger, which takes more than a thousand clients of one set at a time, a client's limit holds for
each worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from ..core.address import Endpoint
from ..core.contracts import Slot
from .bucket import Clock, Maker, Rate, TokenBucket
from .ledger import Ledger, key_of
from .limits import ConnectionLimits
from .quota import Quota, Terms, Wall
from .rules import Rules


# ---- rates --------------------------------------------------------------------------------------
class SharedBucket(TokenBucket):
    """A bucket whose tokens are in the ledger."""

    __slots__ = ("_key", "_ledger")

    def __init__(self, rate: Rate, clock: Clock, ledger: Ledger, key: bytes) -> None:
        super().__init__(rate, clock)
        self._ledger = ledger
        self._key = key

    @contextmanager
    def _turn(self) -> Iterator[None]:
        ledger, key = self._ledger, self._key
        row = ledger.enter(key)
        try:
            if row >= 0:
                stamp = ledger.stamps[row]
                if stamp:
                    self._last, self._tokens = stamp, ledger.values[row]
                else:
                    self._last, self._tokens = self._clock(), float(self.rate.burst)
            yield
            if row >= 0:
                ledger.stamps[row], ledger.values[row] = self._last, self._tokens
        finally:
            ledger.leave(key)

    def take(self, wanted: int) -> int:
        """Return how many of `wanted` tokens may be used now, and use them."""
        with self._turn():
            return super().take(wanted)

    def give_back(self, unused: int) -> None:
        """Return tokens that were taken and not used."""
        with self._turn():
            super().give_back(unused)

    def delay(self) -> float:
        """Seconds until `take` may return more than 0."""
        with self._turn():
            return super().delay()

    def full(self) -> bool:
        """Whether the bucket is as good as a new one."""
        with self._turn():
            return super().full()


def shared_buckets(ledger: Ledger, clock: Clock, *name: str) -> Maker:
    """Return what makes the buckets of a limiter, or of one direction of it, which `name` tells from all others."""

    def make(key: Hashable, rate: Rate) -> TokenBucket:
        return SharedBucket(rate, clock, ledger, key_of(*name, key))

    return make


# ---- connections --------------------------------------------------------------------------------
class SharedConnectionLimits(ConnectionLimits):
    """Counts of connections in the ledger; those of a worker that dies are taken off by the supervisor."""

    __slots__ = ("_all", "_all_key", "_ledger", "_name")

    def __init__(self, rules: Rules[int], ledger: Ledger, name: str) -> None:
        super().__init__(rules)
        self._ledger = ledger
        self._name = name
        self._all_key = key_of("climiter", name)
        self._all = ledger.pin(self._all_key)

    def count(self, client: Endpoint) -> int:
        """Return how many connections `client` has."""
        key = key_of("climiter", self._name, client.host)
        row = self._ledger.enter(key)
        try:
            return super().count(client) + (self._ledger.total(row) if row >= 0 else 0)
        finally:
            self._ledger.leave(key)

    def acquire(self, client: Endpoint) -> Slot | None:
        """Take a slot for a connection of `client`, None if it would be one too many."""
        ledger, rules = self._ledger, self.rules
        if not self._count(self._all_key, self._all, rules.total):
            return None
        limit = rules.for_client(client.host)
        key = key_of("climiter", self._name, client.host)
        row = ledger.enter(key)
        try:
            if row < 0:
                local = super().acquire(client)
                if local is not None:
                    return _Places(ledger, (self._all,), local)
            else:
                if limit is None:
                    limit = rules.each
                if limit is None or ledger.total(row) < limit:
                    ledger.own[row] += 1
                    return _Places(ledger, (self._all, row))
        finally:
            ledger.leave(key)
        ledger.own[self._all] -= 1
        return None

    def _count(self, key: bytes, row: int, limit: int | None) -> bool:
        ledger = self._ledger
        if limit is None:
            ledger.own[row] += 1  # nobody else writes there
            return True
        ledger.enter(key)
        try:
            if ledger.total(row) >= limit:
                return False
            ledger.own[row] += 1
            return True
        finally:
            ledger.leave(key)


class _Places:
    """One counted connection. Rows that count something are given to nobody else, so no lock is needed."""

    __slots__ = ("_ledger", "_local", "_rows")

    def __init__(self, ledger: Ledger, rows: tuple[int, ...], local: Slot | None = None) -> None:
        self._ledger = ledger
        self._rows = rows
        self._local = local

    def release(self) -> None:
        rows, self._rows = self._rows, ()
        for row in rows:
            self._ledger.own[row] -= 1
        local, self._local = self._local, None
        if local is not None:
            local.release()


# ---- quotas -------------------------------------------------------------------------------------
class SharedQuota(Quota):
    """A quota whose counter is in the ledger."""

    __slots__ = ("_inside", "_key", "_ledger", "_row", "_written")

    def __init__(
        self,
        name: str,
        terms: Terms,
        ledger: Ledger,
        wall: Wall = time.time_ns,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._ledger = ledger
        self._key = key_of("quota", name)
        self._inside = False
        self._written = 0
        self._row = -1  # others may have counted already: who begins sets nothing
        super().__init__(name, terms, wall, report)
        self._row = ledger.pin(self._key)
        self._written = self.used

    @property
    def used(self) -> int:
        """Bytes counted by all workers."""
        return self._ledger.integers[self._row] if self._row >= 0 else 0

    @used.setter
    def used(self, value: int) -> None:
        if self._row >= 0:
            self._ledger.integers[self._row] = value

    @property
    def changed(self) -> bool:
        """Whether there is something to write."""
        return self.used != self._written

    @changed.setter
    def changed(self, value: bool) -> None:
        self._written = -1 if value else self.used

    def reset(self, used: int = 0) -> None:
        """Set the counter, which the first worker does for all: each would set it at another moment."""
        if self._ledger.worker == 0:
            super().reset(used)

    def retire(self) -> None:
        """Hold nobody back any more. Who is configured by this name later begins with what the file says."""
        super().retire()
        self.reset()
        self.changed = False

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._ledger.enter(self._key)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._ledger.leave(self._key)

    def take(self, wanted: int) -> int:
        """Return how many of `wanted` bytes may move, and count them."""
        with self._turn():
            return super().take(wanted)

    def count(self, size: int) -> None:
        """Count bytes that have moved; less than 0 gives some back."""
        with self._turn():
            super().count(size)
