"""Lines of limits: a key and its values. `$` is the total, `$$` each client or connection, else an address or network.

Rows K01-K06 for which rule counts for a client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeAlias, TypeVar

from ..core.options import Problem
from .entries import Entry
from .networks import PrefixTable, number, parse_network

T = TypeVar("T")

CODE: Final = "config.limit"

Key: TypeAlias = "str | int | tuple[int, int]"
"""`$`, `$$`, the number of an address, or the first and last number of a network."""

TOTAL: Final = "$"
EACH: Final = "$$"


def parse_key(text: str) -> Key | None:
    """Return the key of a line, None if it is none."""
    if text in (TOTAL, EACH):
        return text
    value = number(text)
    return value if value is not None else parse_network(text)


def parse_rules(entries: Iterable[Entry], parse: Callable[[list[str]], T]) -> tuple[list[tuple[Key, T]], list[Problem]]:
    """Return (key, value) of every usable line, and what is wrong with the others, which are left out.

    `parse` gets the words after the key, at least one, and raises ValueError with what is wrong.
    """
    rules: list[tuple[Key, T]] = []
    problems: list[Problem] = []
    for entry in entries:
        word, *values = entry.text.split()
        key = parse_key(word)
        if key is None:
            problems.append(
                entry.error(f"{word[:64]!r} is not $, $$, an address or a network such as 10.0.0.0/8", CODE)
            )
        elif not values:
            problems.append(entry.error(f"{entry.text[:64]!r} has no value after {word}", CODE))
        else:
            try:
                rules.append((key, parse(values)))
            except ValueError as exc:
                problems.append(entry.error(str(exc), CODE))
    return rules, problems


class Rules(Generic[T]):
    """Values by key, the last of equal keys counting. None stands for no limit and is as good as no rule (K06)."""

    __slots__ = ("_addresses", "_networks", "by_key", "each", "total")

    def __init__(self, rules: Iterable[tuple[Key, T | None]] = ()) -> None:
        latest = dict(rules)
        self.by_key: dict[Key, T] = {key: value for key, value in latest.items() if value is not None}
        self.total = self.by_key.get(TOTAL)
        self.each = self.by_key.get(EACH)
        self._addresses = {key: value for key, value in self.by_key.items() if isinstance(key, int)}
        # The most specific network counts (K03); GOST takes the widest, which makes narrower rules dead.
        self._networks = PrefixTable((key, value) for key, value in self.by_key.items() if isinstance(key, tuple))

    def for_client(self, host: str) -> T | None:
        """Return the value for a client: of its address, else of the smallest network around it."""
        if not self._addresses and not self._networks:
            return None
        value = number(host)
        if value is None:
            return None
        found = self._addresses.get(value)
        return found if found is not None else self._networks.get(value)
