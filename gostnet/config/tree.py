"""The configuration before it has a schema: a tree of maps, lists and scalars, each with the place it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

ScalarValue: TypeAlias = str | int | float | bool | None

SourceKind: TypeAlias = Literal["file", "inline", "url", "environment"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where text came from. `kind` decides about coercions: files are weakly typed, inline JSON is not."""

    name: str
    kind: SourceKind = "file"


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a source; line and column count from 1, 0 is unknown."""

    source: Source
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        if self.line:
            return f"{self.source.name}:{self.line}:{self.column}"
        return f"{self.source.name}:{self.column}" if self.column else self.source.name


NOWHERE = Place(Source("gostnet", "environment"))


@dataclass(slots=True)
class Scalar:
    """A leaf; `text` is how it was written if it was plain YAML, "" otherwise."""

    value: ScalarValue
    place: Place
    text: str = ""


@dataclass(slots=True)
class List:
    """A sequence."""

    items: list[Tree]
    place: Place


@dataclass(slots=True)
class Entry:
    """A key as it was written, and its value."""

    key: str
    place: Place
    value: Tree


@dataclass(slots=True)
class Map:
    """A mapping; keys are unique without regard to case."""

    entries: list[Entry]
    place: Place

    def find(self, key: str) -> Entry | None:
        """Return the entry of `key`, compared without case."""
        wanted = key.lower()
        for entry in self.entries:
            if entry.key.lower() == wanted:
                return entry
        return None


Tree: TypeAlias = Scalar | List | Map


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a key and its value stand, and how the key was spelt."""

    key: Place
    value: Place
    spelling: str = ""


@dataclass(slots=True)
class Positions:
    """Places by path, compared without case."""

    spots: dict[str, Spot] = field(default_factory=dict)

    def add(self, path: str, spot: Spot) -> None:
        """Remember where `path` stands."""
        self.spots[path.lower()] = spot

    def find(self, path: str) -> Spot | None:
        """Return the place of `path`, or of the nearest object around it that has one."""
        for candidate in _upwards(path.lower()):
            spot = self.spots.get(candidate)
            if spot is not None:
                return spot
        return None

    def exact(self, path: str) -> Spot | None:
        """Return the place of `path` itself."""
        return self.spots.get(path.lower())


def _upwards(path: str) -> Iterator[str]:
    """Yield `path` and what it lies in: a.b[1].c, a.b[1], a.b, a, and the whole."""
    while path:
        yield path
        cut = max(path.rfind("."), path.rfind("["))
        path = path[: max(cut, 0)]
    yield ""
