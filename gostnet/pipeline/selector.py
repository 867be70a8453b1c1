"""Choosing one of several: filters first, then a strategy. Rows L01-L21."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar
from zlib import crc32

from ..core.errors import ConfigError
from ..core.flow import Flow
from .node import Marker


class Candidate(Protocol):
    """What can be chosen: a node, or a chain of a group."""

    @property
    def marker(self) -> Marker: ...
    @property
    def weight(self) -> int: ...
    @property
    def backup(self) -> bool: ...


C = TypeVar("C", bound=Candidate)


class Strategy(Protocol):
    """Picks one of a non-empty list."""

    def pick(self, flow: Flow, candidates: Sequence[C]) -> C: ...


class RoundRobin:
    """One after the other, over the list as filtered."""

    def __init__(self) -> None:
        self._next = 0

    def pick(self, flow: Flow, candidates: Sequence[C]) -> C:
        """Return the next one."""
        index = self._next % len(candidates)
        self._next += 1
        return candidates[index]


class Random:
    """At random, by weight."""

    def __init__(self, source: random.Random | None = None) -> None:
        self._random = source or random.Random()

    def pick(self, flow: Flow, candidates: Sequence[C]) -> C:
        """Return one at random; weights below 1 count as 1."""
        weights = [max(1, candidate.weight) for candidate in candidates]
        return self._random.choices(candidates, weights)[0]


class Fifo:
    """Always the first: high availability."""

    def pick(self, flow: Flow, candidates: Sequence[C]) -> C:
        """Return the first."""
        return candidates[0]


class Hash:
    """By the client id, else by the flow's hash source: the same client keeps its node."""

    def __init__(self, source: random.Random | None = None) -> None:
        self._random = source or random.Random()

    def pick(self, flow: Flow, candidates: Sequence[C]) -> C:
        """Return the candidate at CRC-32 (IEEE) modulo the count."""
        key = flow.user or flow.hash
        if not key:
            return self._random.choice(candidates)
        return candidates[crc32(key.encode()) % len(candidates)]


STRATEGIES: dict[str, type[RoundRobin] | type[Random] | type[Fifo] | type[Hash]] = {
    "": RoundRobin,
    "round": RoundRobin,
    "rr": RoundRobin,
    "random": Random,
    "rand": Random,
    "fifo": Fifo,
    "ha": Fifo,
    "hash": Hash,
}


def strategy_of(name: str, path: str = "") -> Strategy:
    """Return the strategy called `name`. Raise ConfigError for a name that GOST does not know or we do not build."""
    if name in ("parallel", "lowestlatency", "lowest", "ll"):
        raise ConfigError(path, f"strategy {name!r} is not available in this version", code="unavailable")
    kind = STRATEGIES.get(name.lower())
    if kind is None:
        raise ConfigError(path, f"{name!r} is not a strategy: use round, random, fifo or hash", code="strategy")
    return kind()


class Selector:
    """The filters and the strategy of one hop or group."""

    def __init__(self, strategy: Strategy | None = None) -> None:
        self._strategy: Strategy = strategy or RoundRobin()

    def select(self, flow: Flow, candidates: Sequence[C], now: float) -> C | None:
        """Return one of `candidates`, None if the list is empty.

        Dead ones, and those that failed in this very attempt, are left out while others live; backups are left out
        while a primary lives. When all are dead the first is returned as a last resort (H11): trying it beats going
        around the proxy.
        """
        if len(candidates) <= 1:
            return candidates[0] if candidates else None
        alive: Sequence[C] = [item for item in candidates if item not in flow.tried and not item.marker.failed(now)]
        if not alive:
            alive = [item for item in candidates if item not in flow.tried]
            return alive[0] if alive else candidates[0]
        if len(alive) > 1:
            primary = [item for item in alive if not item.backup]
            alive = primary or alive
        if len(alive) == 1:
            return alive[0]
        return self._strategy.pick(flow, alive)
