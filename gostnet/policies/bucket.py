"""Token buckets, and a bounded table of them by key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from .rules import TOTAL, Key, Rules

Clock = Callable[[], float]
"""Seconds, never going back."""

QUANTUM: Final = 0.01
"""Seconds of tokens that are granted at least: without it a waiter would wake for every single byte."""
MAX_BUCKETS: Final = 65536
"""Buckets kept for keys that nobody uses at the moment; beyond it the oldest are forgotten, and begin full again."""
_FIRST_SWEEP: Final = 1024
_ROUNDING: Final = 1e-6
"""Seconds added to a wait, so that what floats round off does not make a second one."""


@dataclass(slots=True, eq=False)
class Rate:
    """Tokens (bytes, or requests) per second, and how many may pass at once.

    Buckets share it, so a reload changes the rate of what runs already.
    """

    per_second: float
    burst: int

    def take_from(self, other: Rate) -> None:
        """Become equal to `other`."""
        self.per_second = other.per_second
        self.burst = other.burst


_NO_LIMIT: Final = Rate(float(1 << 62), 1 << 62)


class TokenBucket:
    """A `Shaper` that starts full. Over any time t it grants at most `per_second * t + burst`."""

    __slots__ = ("__weakref__", "_clock", "_last", "_tokens", "rate")

    def __init__(self, rate: Rate, clock: Clock) -> None:
        self.rate = rate
        self._clock = clock
        self._last = clock()
        self._tokens: float = rate.burst

    def _fill(self) -> float:
        now = self._clock()
        rate = self.rate
        tokens = self._tokens + (now - self._last) * rate.per_second
        self._last = now
        return tokens if tokens < rate.burst else rate.burst

    def _quantum(self) -> float:
        rate = self.rate
        return min(max(1.0, rate.per_second * QUANTUM), rate.burst)

    def take(self, wanted: int) -> int:
        """Return how many of `wanted` tokens may be used now, and use them."""
        tokens = self._fill()
        if tokens >= wanted:
            self._tokens = tokens - wanted
            return wanted
        if tokens < self._quantum():
            self._tokens = tokens
            return 0
        granted = int(tokens)
        self._tokens = tokens - granted
        return granted

    def give_back(self, unused: int) -> None:
        """Return tokens that were taken and not used."""
        self._tokens = min(self._tokens + unused, self.rate.burst)

    def delay(self) -> float:
        """Seconds until `take` returns more than 0 whatever is wanted; 0 if it does now."""
        self._tokens = self._fill()
        missing = self._quantum() - self._tokens
        return missing / self.rate.per_second + _ROUNDING if missing > 0 else 0.0

    def full(self) -> bool:
        """Whether the bucket is as good as a new one."""
        self._tokens = self._fill()
        return self._tokens >= self.rate.burst


Maker = Callable[[Hashable, Rate], TokenBucket]
"""Makes the bucket of a key: `$`, or what a client is known by."""


def local_buckets(clock: Clock) -> Maker:
    """Return what makes buckets that nobody but this process knows."""
    return lambda _, rate: TokenBucket(rate, clock)


class Buckets:
    """Buckets by key (a client), made when first asked for.

    One that somebody still holds is never made twice. One that nobody holds is kept until it is full, so that a client
    does not get a new burst with every connection.
    """

    __slots__ = ("_kept", "_live", "_make", "_sweep_at")

    def __init__(self, make: Maker) -> None:
        self._make = make
        self._live: WeakValueDictionary[Hashable, TokenBucket] = WeakValueDictionary()
        self._kept: dict[Hashable, TokenBucket] = {}
        self._sweep_at = _FIRST_SWEEP

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, rate: Rate) -> TokenBucket:
        """Return the bucket of `key`, a new one if its rate is not `rate` any more."""
        bucket = self._live.get(key)
        if bucket is None or bucket.rate is not rate:
            bucket = self._live[key] = self._make(key, rate)
        if self._kept.get(key) is not bucket:
            if len(self._kept) >= self._sweep_at:
                self._sweep()
            self._kept[key] = bucket
        return bucket

    def _sweep(self) -> None:
        """Forget full buckets, then the oldest ones; the next sweep is when the table has doubled."""
        kept = {key: bucket for key, bucket in self._kept.items() if not bucket.full()}
        surplus = len(kept) - MAX_BUCKETS // 2
        for key in list(kept)[: max(0, surplus)]:
            del kept[key]
        self._kept = kept
        self._sweep_at = max(_FIRST_SWEEP, min(2 * len(kept), MAX_BUCKETS))


def carry_over(old: Rules[Rate], new: Rules[Rate]) -> Rules[Rate]:
    """Return `new` with the Rate objects of `old` where the key stays: buckets that are in use follow the change.

    Buckets whose rule is gone let everything pass.
    """
    merged: dict[Key, Rate] = {}
    for key, rate in new.by_key.items():
        known = old.by_key.get(key)
        if known is not None:
            known.take_from(rate)
            rate = known
        merged[key] = rate
    for key, rate in old.by_key.items():
        if key not in merged:
            rate.take_from(_NO_LIMIT)
    return Rules(merged.items())


def total_bucket(bucket: TokenBucket | None, rules: Rules[Rate], make: Maker) -> TokenBucket | None:
    """Return the bucket of the rule `$`: the present one if its rule is still there, None without a rule."""
    if rules.total is None:
        return None
    return bucket if bucket is not None and bucket.rate is rules.total else make(TOTAL, rules.total)
