"""Traffic: bandwidth limits as data on the flow. Rows T01-T18.

A line is `KEY IN [OUT [BURST]]`, bytes a second: IN from the client, OUT to it. `$` is one bucket for everybody who
uses the limiter, `$$` one for each connection, an address or a network one for each client address.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from ..core.contracts import TrafficLimiter
from ..core.errors import ConfigError
from ..core.flow import Flow, Shaper, Shapers
from ..core.options import Problem
from ..core.units import parse_size
from .bucket import Buckets, Clock, Maker, Rate, TokenBucket, carry_over, local_buckets, total_bucket
from .entries import Entry, inline, refuse
from .rules import CODE, Rules, parse_rules

Scope: TypeAlias = Literal["", "service", "conn", "client"]
"""Which rules count: `$` only, `$$` with addresses and networks, or those by client; "" is service and conn."""

_NUMBER: Final = re.compile(r"([+-]?)([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class TrafficRules:
    """The rules of both directions."""

    up: Rules[Rate]
    down: Rules[Rate]


def compile_traffic(entries: Iterable[Entry]) -> tuple[TrafficRules, list[Problem]]:
    """Return the rules, and what is wrong with lines that are left out."""
    rules, problems = parse_rules(entries, _rates)
    up = Rules((key, Rate(into, burst or into) if into else None) for key, (into, _, burst) in rules)
    down = Rules((key, Rate(out, burst or out) if out else None) for key, (_, out, burst) in rules)
    return TrafficRules(up, down), problems


def _rates(words: list[str]) -> tuple[int, int, int]:
    if len(words) > 3:
        raise ValueError(f"{' '.join(words)[:64]!r} is not IN, OUT and BURST; sizes take no blank before their unit")
    values = [parse_rate(word) for word in words]
    return (*values, *[0] * (3 - len(values)))  # type: ignore[return-value]  # three of them


def parse_rate(word: str) -> int:
    """Return bytes a second; 0 for no limit, which is also what anything negative means.

    Raise ValueError that says what to write: what GOST cannot read is no limit there, silently (T02).
    """
    number = _NUMBER.fullmatch(word)
    if number is not None and (number[1] == "-" or not float(number[2])):
        return 0
    try:
        return parse_size(word)
    except ValueError:
        pass
    shown = word[:64]
    if number is not None and not number[1]:
        amount, unit = number[2], number[3]
        if not unit:
            raise ValueError(f"{shown!r} has no unit; write {amount}B, {amount}KB or {amount}MB")
        if len(unit) <= 3 and unit[0].upper() in "BKMGTPE" and unit[1:].lower() in ("", "b", "ib"):
            proper = "B" if unit[0].upper() == "B" else f"{unit[0].upper()}B"
            raise ValueError(f"{shown!r} is not a rate; write {amount}{proper}")
    raise ValueError(f"{shown!r} is not a rate such as 500KB or 10MB, in bytes a second")


class _Direction:
    """The rules of one direction and the buckets made by them."""

    __slots__ = ("_buckets", "_clock", "_make", "_total", "rules")

    def __init__(self, rules: Rules[Rate], clock: Clock, make: Maker) -> None:
        self._clock = clock
        self._make = make
        self._buckets = Buckets(make)
        self._total: TokenBucket | None = None
        self.rules: Rules[Rate] = Rules()
        self.replace(rules)

    def replace(self, rules: Rules[Rate]) -> None:
        self.rules = carry_over(self.rules, rules)
        self._total = total_bucket(self._total, self.rules, self._make)

    def shape(self, flow: Flow, scope: Scope, into: list[Shaper]) -> None:
        rules = self.rules
        host = flow.client.host
        found: list[TokenBucket] = []
        if self._total is not None and scope in ("", "service"):
            found.append(self._total)
        if scope != "service":
            if rules.each is not None:
                if scope == "client":
                    found.append(self._buckets.get(("client", flow.user or host), rules.each))
                else:
                    found.append(TokenBucket(rules.each, self._clock))
            rate = rules.for_client(host)
            if rate is not None:
                found.append(self._buckets.get(host, rate))
        # One bucket must not count the same bytes twice where a service and its handler name the same limiter.
        into += [bucket for bucket in found if bucket not in into]


class TrafficLimits:
    """The limiter of a name in the configuration; who uses it shares its buckets (T16, T18).

    clock    seconds, never going back
    makers   make the buckets that several flows have in common, up and down; by default ones of this process alone
    """

    __slots__ = ("_down", "_up")

    def __init__(
        self, rules: TrafficRules, clock: Clock = time.monotonic, makers: tuple[Maker, Maker] | None = None
    ) -> None:
        up, down = makers or (local_buckets(clock), local_buckets(clock))
        self._up = _Direction(rules.up, clock, up)
        self._down = _Direction(rules.down, clock, down)

    @classmethod
    def from_lines(cls, lines: Iterable[str], path: str = "limits", clock: Clock = time.monotonic) -> TrafficLimits:
        """Compile lines. Raise ConfigError that names the first bad one as `path[INDEX]`."""
        rules, problems = compile_traffic(inline(lines, path))
        refuse(problems)
        return cls(rules, clock)

    def replace(self, rules: TrafficRules) -> None:
        """Put other rules in place of the present ones; flows that run follow where their rule's key stays."""
        self._up.replace(rules.up)
        self._down.replace(rules.down)

    def shape(self, flow: Flow, into: Shapers) -> None:
        """Add the buckets of the scopes service and conn."""
        self.shape_scope(flow, into, "")

    def shape_scope(self, flow: Flow, into: Shapers, scope: Scope) -> None:
        """Add the buckets of one scope."""
        self._up.shape(flow, scope, into.up)
        self._down.shape(flow, scope, into.down)

    def scoped(self, scope: str, path: str = "limiter.scope") -> TrafficLimiter:
        """Return the limiter restricted to `scope`: `client` is what a handler's `limiter` means.

        In scope client `$$` is one bucket for each client id (its address without one). Raise ConfigError for another
        word.
        """
        for known in get_args(Scope):
            if scope == known:
                return _Scoped(self, known) if known else self
        raise ConfigError(path, f"{scope!r} is not a scope: service, conn or client", code=CODE)


class _Scoped:
    __slots__ = ("_limits", "_scope")

    def __init__(self, limits: TrafficLimits, scope: Scope) -> None:
        self._limits = limits
        self._scope: Scope = scope

    def shape(self, flow: Flow, into: Shapers) -> None:
        self._limits.shape_scope(flow, into, self._scope)
