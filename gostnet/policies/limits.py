"""Limits: concurrent connections and request rates. Rows K01-K09."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

from ..core.address import Endpoint
from ..core.contracts import ConnectionLimiter, Slot
from ..core.options import Problem
from .bucket import Buckets, Clock, Maker, Rate, TokenBucket, carry_over, local_buckets, total_bucket
from .entries import Entry, inline, refuse
from .rules import Rules, parse_rules


# ---- connections --------------------------------------------------------------------------------
def compile_connections(entries: Iterable[Entry]) -> tuple[Rules[int], list[Problem]]:
    """Return the rules of lines `KEY N`; N of 0 or less is no limit."""
    rules, problems = parse_rules(entries, _count)
    return Rules((key, value if value > 0 else None) for key, value in rules), problems


def _count(words: list[str]) -> int:
    try:
        if len(words) == 1:
            return int(words[0])
    except ValueError:
        pass
    raise ValueError(f"{' '.join(words)[:64]!r} is not a number of connections")


class ConnectionLimits:
    """Bounds concurrent connections: `$` all of them, `$$` those of each client without a rule of its own.

    What is counted does not depend on the rules, so a reload neither forgets connections nor counts them twice.
    """

    __slots__ = ("_clients", "rules", "total")

    def __init__(self, rules: Rules[int]) -> None:
        self.rules = rules
        self.total = 0
        """Connections at present."""
        self._clients: dict[str, int] = {}

    @classmethod
    def from_lines(cls, lines: Iterable[str], path: str = "limits") -> ConnectionLimits:
        """Compile lines. Raise ConfigError that names the first bad one as `path[INDEX]`."""
        rules, problems = compile_connections(inline(lines, path))
        refuse(problems)
        return cls(rules)

    def replace(self, rules: Rules[int]) -> None:
        """Put other rules in place of the present ones; connections over a new limit stay."""
        self.rules = rules

    def count(self, client: Endpoint) -> int:
        """Return how many connections `client` has."""
        return self._clients.get(client.host, 0)

    def acquire(self, client: Endpoint) -> Slot | None:
        """Take a slot for a connection of `client`, None if it would be one too many."""
        rules = self.rules
        host = client.host
        count = self._clients.get(host, 0)
        if rules.total is not None and self.total >= rules.total:
            return None
        limit = rules.for_client(host)
        if limit is None:
            limit = rules.each
        if limit is not None and count >= limit:
            return None
        self.total += 1
        self._clients[host] = count + 1
        return _Slot(self, host)

    def _release(self, host: str) -> None:
        self.total -= 1
        left = self._clients[host] - 1
        if left:
            self._clients[host] = left
        else:
            del self._clients[host]


class _Slot:
    """One counted connection."""

    __slots__ = ("_host", "_owner")

    def __init__(self, owner: ConnectionLimits, host: str) -> None:
        self._owner: ConnectionLimits | None = owner
        self._host = host

    def release(self) -> None:
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._release(self._host)


# ---- requests -----------------------------------------------------------------------------------
def compile_rates(entries: Iterable[Entry]) -> tuple[Rules[Rate], list[Problem]]:
    """Return the rules of lines `KEY R`, R requests a second, fractions allowed; 0 or less is no limit.

    One more than the whole part of R may come at once (K07).
    """
    rules, problems = parse_rules(entries, _rate)
    return Rules((key, Rate(value, int(value) + 1) if value > 0 else None) for key, value in rules), problems


def _rate(words: list[str]) -> float:
    try:
        if len(words) == 1:
            value = float(words[0])
            if math.isfinite(value):
                return value
    except ValueError:
        pass
    raise ValueError(f"{' '.join(words)[:64]!r} is not a number of requests a second")


class _Free:
    """The slot of a limit on rates: nothing is held."""

    __slots__ = ()

    def release(self) -> None: ...


_FREE = _Free()


class RateLimits:
    """Bounds requests a second. A `ConnectionLimiter` too, for services where a connection is a request."""

    __slots__ = ("_buckets", "_make", "_total", "rules")

    def __init__(self, rules: Rules[Rate], clock: Clock = time.monotonic, make: Maker | None = None) -> None:
        """`make` makes the buckets, by default ones of this process alone."""
        self._make = make or local_buckets(clock)
        self._buckets = Buckets(self._make)
        self._total: TokenBucket | None = None
        self.rules: Rules[Rate] = Rules()
        self.replace(rules)

    @classmethod
    def from_lines(
        cls, lines: Iterable[str], path: str = "limits", clock: Clock = time.monotonic, make: Maker | None = None
    ) -> RateLimits:
        """Compile lines. Raise ConfigError that names the first bad one as `path[INDEX]`."""
        rules, problems = compile_rates(inline(lines, path))
        refuse(problems)
        return cls(rules, clock, make)

    def replace(self, rules: Rules[Rate]) -> None:
        """Put other rules in place of the present ones; what has been used counts on."""
        self.rules = carry_over(self.rules, rules)
        self._total = total_bucket(self._total, self.rules, self._make)

    def allow(self, client: Endpoint) -> bool:
        """Count one request of `client` if it may pass; a refused one uses up nothing."""
        rules = self.rules
        own: TokenBucket | None = None
        rate = rules.for_client(client.host)
        if rate is None:
            rate = rules.each
        if rate is not None:
            own = self._buckets.get(client.host, rate)
            if not own.take(1):
                return False
        if self._total is not None and not self._total.take(1):
            if own is not None:
                own.give_back(1)
            return False
        return True

    def acquire(self, client: Endpoint) -> Slot | None:
        """Return a slot that holds nothing, None if the rate is exceeded."""
        return _FREE if self.allow(client) else None


class AllOf:
    """Several connection limiters as one: all must give a slot, and a refusal takes nothing."""

    __slots__ = ("_members",)

    def __init__(self, members: Sequence[ConnectionLimiter]) -> None:
        self._members = tuple(members)

    def acquire(self, client: Endpoint) -> Slot | None:
        """Take a slot of every member, None if one refuses."""
        slots: list[Slot] = []
        for member in self._members:
            slot = member.acquire(client)
            if slot is None:
                for taken in reversed(slots):
                    taken.release()
                return None
            slots.append(slot)
        return _Slots(slots)


class _Slots:
    __slots__ = ("_slots",)

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots

    def release(self) -> None:
        slots, self._slots = self._slots, []
        for slot in slots:
            slot.release()
