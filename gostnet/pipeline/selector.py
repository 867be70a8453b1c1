"""Choosing one of several: filters first, then a strategy. Rows L01-L21."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar
from zlib import crc32

from ..core.errors import ConfigError
from ..core.flow import Flow
from .node import Latency, Marker

MAX_PARALLEL = 8
"""Candidates that the strategy `parallel` races: each costs a connection for every flow."""

STALE = 60.0
"""Seconds after which a latency that no probe keeps fresh is measured again by a flow."""

TRIAL = 10.0
"""Seconds during which other flows do not follow the one that was sent to measure."""


class Candidate(Protocol):
    """What can be chosen: a node, a chain of a group, or a hop of a group."""

    @property
    def marker(self) -> Marker: ...
    @property
    def weight(self) -> int: ...
    @property
    def backup(self) -> bool: ...
    @property
    def priority(self) -> int: ...
    @property
    def latency(self) -> Latency | None: ...


C = TypeVar("C", bound=Candidate)


class Strategy(Protocol):
    """Picks one of a non-empty list, at `now` on the loop's clock."""

    def pick(self, flow: Flow, candidates: Sequence[C], now: float = 0.0) -> C: ...


class RoundRobin:
    """One after the other, over the list as filtered; where weights differ, each as often as its weight says."""

    def __init__(self) -> None:
        self._next = 0
        self._credit: dict[int, int] = {}

    def pick(self, flow: Flow, candidates: Sequence[C], now: float = 0.0) -> C:
        """Return the next one; weights below 1 count as 1."""
        first = candidates[0].weight
        if all(candidate.weight == first for candidate in candidates):
            index = self._next % len(candidates)
            self._next += 1
            return candidates[index]
        # Everyone earns its weight, the richest is taken and pays what all have earned: turns are spread evenly.
        weights = [max(1, candidate.weight) for candidate in candidates]
        credit = {
            id(candidate): self._credit.get(id(candidate), 0) + weight
            for candidate, weight in zip(candidates, weights, strict=True)
        }
        chosen = max(candidates, key=lambda candidate: credit[id(candidate)])
        credit[id(chosen)] -= sum(weights)
        self._credit = credit
        return chosen


class Random:
    """At random, by weight."""

    def __init__(self, source: random.Random | None = None) -> None:
        self._random = source or random.Random()

    def pick(self, flow: Flow, candidates: Sequence[C], now: float = 0.0) -> C:
        """Return one at random; weights below 1 count as 1."""
        weights = [max(1, candidate.weight) for candidate in candidates]
        return self._random.choices(candidates, weights)[0]


class Fifo:
    """Always the first: high availability."""

    def pick(self, flow: Flow, candidates: Sequence[C], now: float = 0.0) -> C:
        """Return the first."""
        return candidates[0]


class Hash:
    """By the client id, else by the flow's hash source: the same client keeps its node."""

    def __init__(self, source: random.Random | None = None) -> None:
        self._random = source or random.Random()

    def pick(self, flow: Flow, candidates: Sequence[C], now: float = 0.0) -> C:
        """Return the candidate at CRC-32 (IEEE) modulo the count."""
        key = flow.user or flow.hash
        if not key:
            return self._random.choice(candidates)
        return candidates[crc32(key.encode()) % len(candidates)]


class LowestLatency:
    """The one that is reached fastest, as probes or else the flows themselves have found."""

    def pick(self, flow: Flow, candidates: Sequence[C], now: float = 0.0) -> C:
        """Return the fastest; one that nothing has measured for a while gets a flow to measure it."""
        best: C | None = None
        fastest = 0.0
        for candidate in candidates:
            latency = candidate.latency
            if latency is None:
                continue
            unknown = latency.value is None or now - latency.seen > STALE
            if unknown and not latency.probed and now >= latency.trying:
                latency.trying = now + TRIAL
                return candidate
            if latency.value is not None and (best is None or latency.value < fastest):
                best, fastest = candidate, latency.value
        return candidates[0] if best is None else best


class Parallel(Fifo):
    """All at the same time: who can race them does, everybody else takes the first."""


_BY_NAME: dict[str, Callable[[], Strategy]] = {
    "": RoundRobin,
    "round": RoundRobin,
    "rr": RoundRobin,
    "random": Random,
    "rand": Random,
    "fifo": Fifo,
    "ha": Fifo,
    "hash": Hash,
    "parallel": Parallel,
    "lowestlatency": LowestLatency,
    "lowest": LowestLatency,
    "ll": LowestLatency,
}


def strategy_of(name: str, path: str = "") -> Strategy:
    """Return the strategy called `name`. Raise ConfigError for a name that GOST does not know."""
    kind = _BY_NAME.get(name.lower())
    if kind is None:
        raise ConfigError(
            path,
            f"{name!r} is not a strategy: use round, random, fifo, hash, parallel or lowestlatency",
            code="strategy",
        )
    return kind()


class Selector:
    """The filters and the strategy of one hop or group.

    max_latency    slower ones are left out while faster ones are there; 0 for any
    """

    def __init__(self, strategy: Strategy | None = None, max_latency: float = 0.0) -> None:
        self._strategy: Strategy = strategy or RoundRobin()
        self._parallel = isinstance(self._strategy, Parallel)
        self._max_latency = max_latency

    @property
    def measures(self) -> bool:
        """Whether it looks at latencies."""
        return self._max_latency > 0 or isinstance(self._strategy, LowestLatency)

    def pick(self, flow: Flow, candidates: Sequence[C], now: float) -> Sequence[C]:
        """Return what is to be used: one candidate, several that are to be raced, none if there are none.

        Dead ones, and those that failed in this very attempt, are left out while others live; backups are left out
        while a primary lives; then all but those of the highest priority. When all are dead the first is returned as
        a last resort (H11): trying it beats going around the proxy.
        """
        if len(candidates) <= 1:
            return candidates
        tried = flow.tried
        alive = [item for item in candidates if not item.marker.failed(now) and item not in tried]
        if not alive:
            left = [item for item in candidates if item not in tried] or candidates
            return left[:MAX_PARALLEL] if self._parallel else left[:1]
        if len(alive) > 1:
            alive = [item for item in alive if not item.backup] or alive
        if len(alive) > 1:
            highest = max(item.priority for item in alive)
            alive = [item for item in alive if item.priority == highest]
        if len(alive) > 1 and self._max_latency > 0:
            alive = [item for item in alive if self._fast(item.latency)] or alive
        if len(alive) == 1:
            return alive
        if self._parallel:
            return alive[:MAX_PARALLEL]
        return (self._strategy.pick(flow, alive, now),)

    def _fast(self, latency: Latency | None) -> bool:
        return latency is None or latency.value is None or latency.value <= self._max_latency

    def select(self, flow: Flow, candidates: Sequence[C], now: float) -> C | None:
        """Return one of `candidates`, None if the list is empty: for who cannot race."""
        picked = self.pick(flow, candidates, now)
        return picked[0] if picked else None
