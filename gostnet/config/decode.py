"""Tree to schema, with GOST's coercions; every error is collected, and the place of every key and value is kept.

Files are weakly typed: numbers become strings, one object may stand for a list of one, keys of free maps are folded to
lower case. Inline JSON is not: types must fit and keys keep their case. In both, a bare number for a duration counts
nanoseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from ..core.options import Problem, Unusable, to_bool
from ..core.suggest import did_you_mean
from ..core.units import NANOSECONDS, parse_nanoseconds
from .scalars import INT64, resolve
from .schema import ChainGroupEntry, Config, SchemaField, Section, schema_fields
from .tree import List, Map, Positions, Scalar, Spot, Tree

S = TypeVar("S", bound=Section)

UNKNOWN_KEY: Final = "config.unknown-key"
"""The code of keys that the schema does not know: a warning that strict checking turns into an error."""

_V2_KEYS: Final = frozenset(("servenodes", "chainnodes"))
_READ_ONLY: Final = frozenset(("status",))
"""Keys that the API adds to its answers and that are ignored when such an answer is loaded again."""


@dataclass(slots=True)
class Decoder:
    """Collects what is found on the way."""

    problems: list[Problem] = field(default_factory=list)
    positions: Positions = field(default_factory=Positions)

    def config(self, tree: Map) -> Config:
        """Decode a whole configuration."""
        self.positions.add("", Spot(tree.place, tree.place))
        entries = []
        for entry in tree.entries:
            if entry.key.lower() in _V2_KEYS:
                self.positions.add(entry.key, Spot(entry.place, entry.value.place, entry.key))
                hint = "this is the syntax of GOST v2; write services and chains, or give the same URLs with -L and -F"
                self._error(entry.key, hint, "config.v2")
            else:
                entries.append(entry)
        return replace(self.section(Config, Map(entries, tree.place), ""), positions=self.positions)

    def section(self, cls: type[S], tree: Map, path: str) -> S:
        """Decode one object."""
        by_key = {each.key.lower(): each for each in schema_fields(cls)}
        values: dict[str, Any] = {"path": path}
        for entry in tree.entries:
            each = by_key.get(entry.key.lower())
            below = _join(path, each.key if each else entry.key)
            self.positions.add(below, Spot(entry.place, entry.value.place, entry.key))
            if each is None:
                if entry.key.lower() not in _READ_ONLY:
                    suggestion = did_you_mean(entry.key, (known.key for known in by_key.values()))
                    self._warn(below, f"unknown key{suggestion}", UNKNOWN_KEY)
                continue
            if is_null(entry.value):
                continue
            if "[" not in path and entry.value.place.source.kind == "file" and is_empty(entry.value):
                # GOST: outside of lists a section without content does not exist, `api: {}` included.
                self._warn(below, "is empty and therefore ignored", "config.empty")
                continue
            try:
                values[each.attribute] = self._value(each, entry.value, below)
            except Unusable as exc:
                shown = "the value" if each.secret else _shown(entry.value)
                self._error(below, f"{shown} is not {exc}", "config.type")
        return cls(**values)

    def _error(self, path: str, message: str, code: str) -> None:
        self.problems.append(Problem(path, message, code))

    def _warn(self, path: str, message: str, code: str) -> None:
        self.problems.append(Problem(path, message, code, "warning"))

    def _value(self, each: SchemaField, tree: Tree, path: str) -> Any:
        match each.shape:
            case "string":
                return self._string(tree, path, each.secret)
            case "integer":
                return _integer(tree)
            case "boolean":
                return _boolean(tree)
            case "duration":
                return self._duration(tree, path)
            case "strings":
                return self._items(tree, path, lambda item, at: self._string(item, at))
            case "string map":
                return self._string_map(tree, path)
            case "map":
                return self._map(tree, path)
            case "section":
                return self._one(each, tree, path)
            case _:
                return self._items(tree, path, lambda item, at: self._one(each, item, at))

    def _one(self, each: SchemaField, tree: Tree, path: str) -> Section:
        assert each.section is not None
        if each.section is ChainGroupEntry and isinstance(tree, Scalar) and isinstance(tree.value, str):
            return ChainGroupEntry(path=path, chain=tree.value)
        if not isinstance(tree, Map):
            raise Unusable("a map of keys and values")
        return self.section(each.section, tree, path)

    def _items(self, tree: Tree, path: str, decode: Callable[[Tree, str], Any]) -> tuple[Any, ...]:
        items: list[Tree]
        if isinstance(tree, List):
            items = tree.items
        elif tree.place.source.kind == "inline":
            raise Unusable("a list")
        else:
            # GOST: in files one item may stand for a list of one.
            items = [] if is_empty(tree) else [tree]
        found: list[Any] = []
        for index, item in enumerate(items):
            at = f"{path}[{len(found)}]"
            self.positions.add(at, Spot(item.place, item.place))
            if isinstance(item, Scalar) and item.value is None:
                self._warn(f"{path}[{index}]", "is empty and therefore ignored", "config.empty")
                continue
            try:
                found.append(decode(item, at))
            except Unusable as exc:
                self._error(at, f"{_shown(item)} is not {exc}", "config.type")
        return tuple(found)

    def _string(self, tree: Tree, path: str, secret: bool = False) -> str:
        if not isinstance(tree, Scalar):
            raise Unusable("a string")
        value = tree.value
        if isinstance(value, str):
            return value
        if tree.place.source.kind == "inline":
            raise Unusable("a string; put it in double quotes")
        text = _weak_text(value)
        if tree.text and text != tree.text:
            # `password: 0123` is the number 83, `true` becomes 1: the user hardly means that.
            became = "something else" if secret else repr(text)
            written = "the value" if secret else tree.text[:64]
            self._warn(path, f"{written} is not text and becomes {became}; put it in quotes", "config.unquoted")
        return text

    def _duration(self, tree: Tree, path: str) -> float:
        value = tree.value if isinstance(tree, Scalar) else None
        if isinstance(value, str):
            try:
                return parse_nanoseconds(value) / NANOSECONDS
            except ValueError:
                raise Unusable("a duration such as 10s") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -(2**63) <= value < 2**63:
            raise Unusable("a duration such as 10s")
        if int(value) != value:
            raise Unusable("a duration such as 10s")
        if 0 < abs(value) < 1_000_000:
            # GOST: bare numbers are nanoseconds here, though seconds in metadata.
            self._warn(path, f"{int(value)} means {int(value)} nanoseconds; write {int(value)}s", "config.nanoseconds")
        return int(value) / NANOSECONDS

    def _string_map(self, tree: Tree, path: str) -> dict[str, str]:
        result: dict[str, str] = {}
        for key, item in self._map_entries(tree, path):
            at = _join(path, key)
            try:
                result[key] = self._string(item, at) if not is_null(item) else ""
            except Unusable as exc:
                self._error(at, f"{_shown(item)} is not {exc}", "config.type")
        return result

    def _map(self, tree: Tree, path: str) -> dict[str, Any]:
        return {key: self._plain(item, _join(path, key)) for key, item in self._map_entries(tree, path)}

    def _map_entries(self, tree: Tree, path: str) -> list[tuple[str, Tree]]:
        if isinstance(tree, List) and tree.place.source.kind != "inline":
            # GOST: a list of maps is merged into one.
            found = [pair for item in tree.items for pair in self._map_entries(item, path)]
            return list(dict(found).items())
        if not isinstance(tree, Map):
            raise Unusable("a map of keys and values")
        fold = tree.place.source.kind == "file"
        result = []
        for entry in tree.entries:
            self.positions.add(_join(path, entry.key), Spot(entry.place, entry.value.place, entry.key))
            result.append((entry.key.lower() if fold else entry.key, entry.value))
        return result

    def _plain(self, tree: Tree, path: str) -> Any:
        """Return a free value as Python's own types, remembering places."""
        if isinstance(tree, Scalar):
            return tree.value
        if isinstance(tree, List):
            result = []
            for index, item in enumerate(tree.items):
                at = f"{path}[{index}]"
                self.positions.add(at, Spot(item.place, item.place))
                result.append(self._plain(item, at))
            return result
        return self._map(tree, path)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def is_null(tree: Tree) -> bool:
    """True for null."""
    return isinstance(tree, Scalar) and tree.value is None


def is_empty(tree: Tree) -> bool:
    """True for null, and for a map in which nothing but such values is."""
    return is_null(tree) or (isinstance(tree, Map) and all(is_empty(entry.value) for entry in tree.entries))


def _shown(tree: Tree) -> str:
    if isinstance(tree, Scalar):
        text = repr(tree.value)
        return text if len(text) <= 64 else text[:61] + "..."
    return "a list" if isinstance(tree, List) else "a map"


def _weak_text(value: int | float | bool | None) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        return plain_decimal(value) if math.isfinite(value) else {"inf": "+Inf", "-inf": "-Inf"}.get(str(value), "NaN")
    return "" if value is None else str(value)


def plain_decimal(value: float) -> str:
    """Write a float without exponent, in the fewest digits that read back the same."""
    text = repr(value)
    if "e" not in text:
        return text.removesuffix(".0")
    mantissa, _, exponent = text.partition("e")
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    point = len(whole) + int(exponent)
    digits = whole + fraction
    if point <= 0:
        return f"{sign}0.{'0' * -point}{digits}".rstrip("0")
    digits = digits.ljust(point, "0")
    rest = digits[point:].rstrip("0")
    return f"{sign}{digits[:point]}.{rest}" if rest else sign + digits[:point]


def _integer(tree: Tree) -> int:
    value = tree.value if isinstance(tree, Scalar) else None
    weak = tree.place.source.kind != "inline"
    if isinstance(value, bool):
        if weak:
            return int(value)
    elif isinstance(value, int):
        if value in INT64:
            return value
    elif isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    elif isinstance(value, str) and weak:
        number = resolve(value) if value else 0
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    raise Unusable("an integer")


def _boolean(tree: Tree) -> bool:
    value = tree.value if isinstance(tree, Scalar) else None
    if isinstance(value, bool):
        return value
    if tree.place.source.kind == "inline" or value is None:
        raise Unusable("true or false")
    return to_bool(value) if value != "" else False
