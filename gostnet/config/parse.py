"""Text to tree: YAML, JSON and TOML, with the line and column of every key and value (TOML: the file only)."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import date, datetime, time
from json.decoder import scanstring  # type: ignore[attr-defined]  # missing in typeshed, documented by its users
from typing import Any, Final, Literal, TypeAlias

import yaml

from ..core.errors import ConfigError
from .scalars import INT64, resolve, tagged
from .tree import Entry, List, Map, Place, Scalar, Source, Tree

Format: TypeAlias = Literal["yaml", "json", "toml"]

MAX_SIZE: Final = 10 << 20
"""Bytes of one configuration source: GOST's own limit for remote ones."""
MAX_DEPTH: Final = 100
"""Levels of nesting: GOST's schema has 12; metadata rarely needs 3."""
MAX_NODES: Final = 500_000
"""Values in one source, those that YAML aliases repeat included."""


class ParseError(ConfigError):
    """The text is not YAML, JSON or TOML; `place` says where."""

    code = "config.syntax"

    def __init__(self, place: Place, message: str) -> None:
        super().__init__("", message)
        self.place = place


def parse(text: str, form: Format, source: Source) -> Map:
    """Parse a whole configuration. Raise ParseError; an empty text is an empty map."""
    if len(text) > MAX_SIZE:
        raise ParseError(Place(source), f"larger than {MAX_SIZE >> 20} MiB")
    match form:
        case "yaml":
            tree = _YamlReader(source).read(text)
        case "json":
            tree = _JsonReader(text, source).read()
        case "toml":
            tree = _read_toml(text, source)
    if isinstance(tree, Scalar) and tree.value is None:
        return Map([], tree.place)
    if not isinstance(tree, Map):
        raise ParseError(tree.place, "the configuration is not a map of sections such as services: [...]")
    return tree


def _add(entries: dict[str, Entry], entry: Entry) -> None:
    """Add a key that must be new: GOST compares keys without case, so two that differ in case only are one."""
    known = entries.setdefault(entry.key.lower(), entry)
    if known is not entry:
        first = f"line {known.place.line}" if known.place.line else "another place"
        raise ParseError(entry.place, f"key {entry.key[:64]!r} is already defined in {first}")


# ---- YAML ----------------------------------------------------------------------------------------------------------
class _YamlReader:
    """Builds a tree from libyaml's events; no recursion, so depth is bounded by our limit only."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._anchors: dict[str, tuple[Tree, int]] = {}
        self._count = 0

    def read(self, text: str) -> Tree:
        root: Tree = Scalar(None, Place(self._source, 1, 1))
        documents = 0
        # A frame is the open collection, its key waiting for a value, its keys, its anchor and the count at its start.
        stack: list[_Frame] = []
        try:
            for event in yaml.parse(text, Loader=yaml.CBaseLoader):
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        raise ParseError(self._at(event), "a second document begins; only one is read")
                    continue
                done = self._collect(event, stack)
                if done is None:
                    continue
                if stack:
                    stack[-1].take(done)
                else:
                    root = done
        except yaml.MarkedYAMLError as exc:
            mark = exc.problem_mark or exc.context_mark
            place = Place(self._source, mark.line + 1, mark.column + 1) if mark else Place(self._source)
            raise ParseError(place, f"not valid YAML: {exc.problem or exc.context}") from exc
        except yaml.reader.ReaderError as exc:
            before = text[: exc.position]
            place = Place(self._source, before.count("\n") + 1, exc.position - before.rfind("\n"))
            raise ParseError(place, f"not valid YAML: {exc.reason}") from exc
        except (yaml.YAMLError, UnicodeError) as exc:
            raise ParseError(Place(self._source), f"not valid YAML: {exc}") from exc
        return root

    def _at(self, event: Any) -> Place:
        return Place(self._source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _count_one(self, place: Place, more: int = 1) -> None:
        self._count += more
        if self._count > MAX_NODES:
            raise ParseError(place, f"more than {MAX_NODES} values")

    def _collect(self, event: Any, stack: list[_Frame]) -> Tree | None:
        """Handle one event; return a value that is complete."""
        if isinstance(event, yaml.ScalarEvent):
            place = self._at(event)
            self._count_one(place)
            scalar = Scalar(self._value(event, place), place, event.value if event.implicit[0] else "")
            if event.anchor:
                self._anchors[event.anchor] = (scalar, 1)
            return scalar
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            place = self._at(event)
            self._count_one(place)
            if len(stack) >= MAX_DEPTH:
                raise ParseError(place, f"nested more than {MAX_DEPTH} levels deep")
            tree: Tree = Map([], place) if isinstance(event, yaml.MappingStartEvent) else List([], place)
            stack.append(_Frame(tree, event.anchor, self._count))
            return None
        if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            frame = stack.pop()
            tree = frame.finish()
            if frame.anchor:
                self._anchors[frame.anchor] = (tree, self._count - frame.count + 1)
            return tree
        if isinstance(event, yaml.AliasEvent):
            place = self._at(event)
            if event.anchor not in self._anchors:
                raise ParseError(place, f"alias {str(event.anchor)[:64]!r} has no anchor before it")
            tree, size = self._anchors[event.anchor]
            # What an alias repeats counts again: a few lines could otherwise stand for millions of values.
            self._count_one(place, size)
            return tree
        return None

    def _value(self, event: Any, place: Place) -> str | int | float | bool | None:
        if event.tag and event.tag != "!":
            try:
                return tagged(event.tag, event.value)
            except ValueError as exc:
                raise ParseError(place, f"cannot read {exc}") from exc
        if event.implicit[0]:
            return resolve(event.value)
        text: str = event.value
        return text


class _Frame:
    """An open YAML collection."""

    def __init__(self, tree: Tree, anchor: str | None, count: int) -> None:
        self.tree = tree
        self.anchor = anchor
        self.count = count
        self._keys: dict[str, Entry] = {}
        self._merged: dict[str, Entry] = {}
        self._key: Scalar | None = None

    def take(self, value: Tree) -> None:
        """Take the next value: an item, a key, or the value of the key before."""
        if isinstance(self.tree, List):
            self.tree.items.append(value)
            return
        if self._key is None:
            if not isinstance(value, Scalar):
                raise ParseError(value.place, "a key must be a word, not a list or map")
            self._key = value
            return
        key, self._key = self._key, None
        # In quotes it is a key like any other.
        if key.text == "<<":
            self._merge(value, key.place)
        else:
            _add(self._keys, Entry(_key_text(key), key.place, value))

    def _merge(self, value: Tree, place: Place) -> None:
        sources = value.items if isinstance(value, List) else [value]
        for source in sources:
            if not isinstance(source, Map):
                raise ParseError(place, "<< takes a map or a list of maps")
            for entry in source.entries:
                self._merged.setdefault(entry.key.lower(), entry)

    def finish(self) -> Tree:
        """Return the collection, explicit keys before merged ones."""
        if isinstance(self.tree, Map):
            self.tree.entries = (
                list({**self._merged, **self._keys}.values()) if self._merged else [*self._keys.values()]
            )
        return self.tree


def _key_text(scalar: Scalar) -> str:
    value = scalar.value
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


# ---- JSON ----------------------------------------------------------------------------------------------------------
_BLANK: Final = re.compile(r"[ \t\r\n]*")
_NUMBER: Final = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS: Final = (("true", True), ("false", False), ("null", None))


class _JsonReader:
    """A JSON reader that knows where it is, which the one of the standard library does not tell."""

    def __init__(self, text: str, source: Source) -> None:
        self._text = text
        self._source = source
        self._position = 0
        self._count = 0
        # Offsets of line starts, for places.
        self._line = 1
        self._line_start = 0
        self._counted = 0

    def read(self) -> Tree:
        self._blank()
        if self._position == len(self._text):
            return Scalar(None, self._here())
        tree = self._value(0)
        self._blank()
        if self._position < len(self._text):
            raise self._error("something follows the end of the value")
        return tree

    def _here(self) -> Place:
        """Return the present place; positions only grow, so lines are counted once."""
        fresh = self._text.count("\n", self._counted, self._position)
        if fresh:
            self._line += fresh
            self._line_start = self._text.rfind("\n", 0, self._position) + 1
        self._counted = self._position
        return Place(self._source, self._line, self._position - self._line_start + 1)

    def _error(self, message: str) -> ParseError:
        return ParseError(self._here(), f"not valid JSON: {message}")

    def _blank(self) -> None:
        found = _BLANK.match(self._text, self._position)
        self._position = found.end() if found else self._position

    def _next(self) -> str:
        self._blank()
        return self._text[self._position : self._position + 1]

    def _value(self, depth: int) -> Tree:
        place = self._here()
        self._count += 1
        if self._count > MAX_NODES:
            raise self._error(f"more than {MAX_NODES} values")
        if depth > MAX_DEPTH:
            raise self._error(f"nested more than {MAX_DEPTH} levels deep")
        start = self._text[self._position : self._position + 1]
        if start == "{":
            return self._map(place, depth)
        if start == "[":
            return self._list(place, depth)
        if start == '"':
            return Scalar(self._string(), place)
        for word, value in _WORDS:
            if self._text.startswith(word, self._position):
                self._position += len(word)
                return Scalar(value, place)
        return Scalar(self._number(), place)

    def _string(self) -> str:
        try:
            text, end = scanstring(self._text, self._position + 1, True)
        except json.JSONDecodeError as exc:
            self._position = min(exc.pos, len(self._text))
            raise self._error(exc.msg[:1].lower() + exc.msg[1:].removesuffix(" at")) from exc
        self._position = end
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            # Half a surrogate pair cannot be written anywhere; Go's reader puts U+FFFD as well.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return str(text)

    def _number(self) -> int | float:
        found = _NUMBER.match(self._text, self._position)
        if found is None:
            raise self._error("a value is missing")
        if found.end() - found.start() > 64:
            raise self._error("a number is too long")
        value = float(found[0]) if found[2] or found[3] else int(found[1])
        if value in (float("inf"), float("-inf")) or (isinstance(value, int) and value not in INT64):
            raise self._error(f"{found[0]} is too large")
        self._position = found.end()
        return value

    def _map(self, place: Place, depth: int) -> Map:
        self._position += 1
        entries: dict[str, Entry] = {}
        if self._next() == "}":
            self._position += 1
            return Map([], place)
        while True:
            if self._next() != '"':
                raise self._error("a key in double quotes is missing")
            key_place = self._here()
            key = self._string()
            if self._next() != ":":
                raise self._error("a colon is missing")
            self._position += 1
            self._blank()
            _add(entries, Entry(key, key_place, self._value(depth + 1)))
            if not self._more("}"):
                return Map(list(entries.values()), place)

    def _list(self, place: Place, depth: int) -> List:
        self._position += 1
        items: list[Tree] = []
        if self._next() == "]":
            self._position += 1
            return List(items, place)
        while True:
            self._blank()
            items.append(self._value(depth + 1))
            if not self._more("]"):
                return List(items, place)

    def _more(self, end: str) -> bool:
        found = self._next()
        if found not in (",", end):
            raise self._error(f"a comma or {end} is missing")
        self._position += 1
        return found == ","


# ---- TOML ----------------------------------------------------------------------------------------------------------
_TOML_PLACE: Final = re.compile(r" \(at line ([0-9]+), column ([0-9]+)\)$")


def _read_toml(text: str, source: Source) -> Tree:
    try:
        return _from_plain(tomllib.loads(text), Place(source), 0)
    except tomllib.TOMLDecodeError as exc:
        message = str(exc)
        found = _TOML_PLACE.search(message)
        line, column = (int(found[1]), int(found[2])) if found else (0, 0)
        message = _TOML_PLACE.sub("", message)
        raise ParseError(Place(source, line, column), f"not valid TOML: {message[:1].lower()}{message[1:]}") from exc
    except RecursionError as exc:
        raise ParseError(Place(source), f"nested more than {MAX_DEPTH} levels deep") from exc


def _from_plain(value: Any, place: Place, depth: int) -> Tree:
    if depth > MAX_DEPTH:
        raise ParseError(place, f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        entries: dict[str, Entry] = {}
        for key, item in value.items():
            _add(entries, Entry(str(key), place, _from_plain(item, place, depth + 1)))
        return Map(list(entries.values()), place)
    if isinstance(value, list):
        return List([_from_plain(item, place, depth + 1) for item in value], place)
    if isinstance(value, (datetime, date, time)):
        return Scalar(value.isoformat(), place)
    if isinstance(value, (str, int, float, bool)):
        return Scalar(value, place)
    raise ParseError(place, f"{value!r} is not a value of a configuration")
