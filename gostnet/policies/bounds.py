"""What a bypass contains, as sets of addresses: so that something else than the bypass can decide, the kernel say.

A bypass is asked about addresses and names; of names, and of patterns that are compared as text, no set of addresses
can be made. So there are two sets: what it contains for certain, and what it may contain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Final

from ..core.contracts import Bypass
from ..core.flow import Network
from .bypass import BypassGroup, PatternBypass, Patterns
from .networks import V4, Intervals

LAST: Final = V4 | 0xFFFFFFFF
"""The highest number of an address."""

PortRanges = tuple[tuple[int, int], ...]
_NO: Final = Intervals()
_ALL: Final = Intervals([(0, LAST)])


@dataclass(frozen=True, slots=True)
class Bounds:
    """A set of addresses between two known ones.

    certain     in it at any port
    possible    nothing else is in it
    ports       in it for certain at these ports
    """

    certain: Intervals = _NO
    possible: Intervals = _NO
    ports: Mapping[PortRanges, Intervals] = field(default_factory=dict)

    def __invert__(self) -> Bounds:
        return Bounds(_without(self.possible), _without(self.certain))

    def __or__(self, other: Bounds) -> Bounds:
        ports = dict(self.ports)
        for key, ranges in other.ports.items():
            ports[key] = _union(ports.get(key, _NO), ranges)
        return Bounds(_union(self.certain, other.certain), _union(self.possible, other.possible), ports)

    def __and__(self, other: Bounds) -> Bounds:
        ports = {
            key: found
            for mine, its in ((self.ports, other.certain), (other.ports, self.certain))
            for key, ranges in mine.items()
            if (found := _intersection(ranges, its))
        }
        return Bounds(_intersection(self.certain, other.certain), _intersection(self.possible, other.possible), ports)


NOTHING: Final = Bounds()
EVERYTHING: Final = Bounds(_ALL, _ALL)
UNKNOWN: Final = Bounds(_NO, _ALL)


def bounds_of(bypass: Bypass, network: Network) -> Bounds:
    """Return what a bypass contains of the addresses of flows of one network."""
    match bypass:
        case PatternBypass():
            if bypass.network and bypass.network != network:
                return NOTHING
            if not bypass.patterns:
                return EVERYTHING if bypass.network and not bypass.whitelist else NOTHING
            found = _bounds_of(bypass.patterns)
            return ~found if bypass.whitelist else found
        case BypassGroup():
            white = [bounds_of(m, network) for m in bypass.members if getattr(m, "whitelist", False)]
            black = [bounds_of(m, network) for m in bypass.members if not getattr(m, "whitelist", False)]
            of_white = reduce(Bounds.__and__, white) if white else NOTHING
            return reduce(Bounds.__or__, black, of_white)
        case _:
            return UNKNOWN


def lists_of(bypass: Bypass | None) -> Iterator[PatternBypass]:
    """Yield the lists of patterns that a bypass is made of."""
    if isinstance(bypass, BypassGroup):
        for member in bypass.members:
            yield from lists_of(member)
    elif isinstance(bypass, PatternBypass):
        yield bypass


def _bounds_of(patterns: Patterns) -> Bounds:
    single = [(value, value) for value, ports in patterns.addresses.items() if ports is None]
    by_ports: dict[PortRanges, list[tuple[int, int]]] = {}
    for value, ports in patterns.addresses.items():
        if ports is not None:
            by_ports.setdefault(ports, []).append((value, value))
    certain = Intervals([*patterns.ranges, *single]) if single else patterns.ranges
    possible = _ALL
    if not patterns.textual:
        some = [pair for pairs in by_ports.values() for pair in pairs]
        possible = Intervals([*certain, *some]) if some else certain
    return Bounds(certain, possible, {ports: Intervals(pairs) for ports, pairs in by_ports.items()})


def _union(one: Intervals, other: Intervals) -> Intervals:
    if not one or not other:
        return one or other
    return Intervals([*one, *other])


def _intersection(one: Intervals, other: Intervals) -> Intervals:
    return _without(_union(_without(one), _without(other)))


def _without(ranges: Intervals) -> Intervals:
    """Return all other addresses."""
    return Intervals(_gaps(ranges))


def _gaps(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    beyond = 0
    for first, last in ranges:
        if first > beyond:
            yield beyond, first - 1
        beyond = last + 1
    if beyond <= LAST:
        yield beyond, LAST
