"""Addresses as numbers, and tables of ranges and prefixes over them.

Both families share one line of integers: IPv6 is 0..2^128-1, IPv4 starts at 2^128. IPv4-mapped IPv6 counts as IPv4.
"""

from __future__ import annotations

import socket
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, Generic, TypeVar

from ..core.address import Endpoint

T = TypeVar("T")

V4: Final = 1 << 128
"""Where IPv4 addresses begin."""
_V4_DIGITS: Final = frozenset("0123456789")


def number(host: str) -> int | None:
    """Return the number of an IP address in text form, without its zone, or None for anything else."""
    if ":" in host:
        try:
            value = int.from_bytes(socket.inet_pton(socket.AF_INET6, host.partition("%")[0]), "big")
        except (OSError, ValueError):
            return None
        return V4 | value & 0xFFFFFFFF if value >> 32 == 0xFFFF else value
    if host[-1:] in _V4_DIGITS:
        try:
            return V4 | int.from_bytes(socket.inet_pton(socket.AF_INET, host), "big")
        except (OSError, ValueError):
            return None
    return None


def parse_network(text: str) -> tuple[int, int] | None:
    """Return the first and last number of `ADDRESS/BITS`, host bits ignored, or None if it is not a network."""
    host, slash, bits = text.partition("/")
    first = number(host)
    if first is None or not slash or not (bits.isascii() and bits.isdigit()) or len(bits) > 3:
        return None
    length = int(bits)
    if ":" in host:
        if length > 128:
            return None
        if first >= V4:
            if length < 96:
                # A network wider than the mapped block is one of IPv6: the bits before the block are zero.
                first = 0xFFFF << 32 | first & 0xFFFFFFFF
            else:
                length -= 96
    elif length > 32:
        return None
    size = (32 if first >= V4 else 128) - length
    first = first >> size << size
    return first, first | (1 << size) - 1


class Intervals:
    """A set of numbers as sorted, disjoint ranges; a look-up is one bisection."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Merge (first, last) pairs, both included; reversed pairs are empty."""
        starts: list[int] = []
        ends: list[int] = []
        for first, last in sorted(ranges):
            if last < first:
                continue
            if ends and first <= ends[-1] + 1:
                ends[-1] = max(ends[-1], last)
            else:
                starts.append(first)
                ends.append(last)
        self._starts = starts
        self._ends = ends

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges, ascending, disjoint and not adjoining."""
        return zip(self._starts, self._ends, strict=True)

    def __contains__(self, value: int) -> bool:
        index = bisect_right(self._starts, value) - 1
        return index >= 0 and value <= self._ends[index]


class PrefixTable(Generic[T]):
    """Values of networks; of several that hold an address the most specific one counts."""

    __slots__ = ("_v4", "_v6")

    def __init__(self, networks: Iterable[tuple[tuple[int, int], T]] = ()) -> None:
        """Take ((first, last), value) pairs as `parse_network` makes them; of equal networks the last one stays."""
        tables: dict[tuple[bool, int], dict[int, T]] = {}
        for (first, last), value in networks:
            size = (last - first).bit_length()
            tables.setdefault((first >= V4, size), {})[first >> size] = value
        self._v4 = [(size, table) for (v4, size), table in sorted(tables.items(), key=lambda i: i[0]) if v4]
        self._v6 = [(size, table) for (v4, size), table in sorted(tables.items(), key=lambda i: i[0]) if not v4]

    def __bool__(self) -> bool:
        return bool(self._v4 or self._v6)

    def get(self, value: int) -> T | None:
        """Return the value of the smallest network that holds `value`."""
        for size, table in self._v4 if value >= V4 else self._v6:
            found = table.get(value >> size)
            if found is not None:
                return found
        return None


class Networks:
    """A list of addresses and networks, such as the clients of `skipauth`."""

    __slots__ = ("_ranges",)

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._ranges = Intervals(ranges)

    def __bool__(self) -> bool:
        return len(self._ranges) > 0

    def __contains__(self, client: Endpoint) -> bool:
        value = number(client.host)
        return value is not None and value in self._ranges


def parse_range(text: str) -> tuple[int, int] | None:
    """Return the first and last number of an address or a network, None for anything else."""
    value = number(text)
    return (value, value) if value is not None else parse_network(text)
