r"""Globs over host names: `*` any text, dots included; `?` one character; `[a-c]`, `[!a-c]`; `{a,b}`; `\` quotes.

Matching never backtracks beyond the last `*`, so a name that a stranger chose costs no more than its length times
that of the glob.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product
from typing import Final, Generic, TypeAlias, TypeVar

T = TypeVar("T")

MAX_BRANCHES: Final = 64
"""Globs that one with braces may stand for."""
MAX_DEPTH: Final = 8
"""Braces within braces."""
_GRAM: Final = 3


class Star:
    """Any text."""


class One:
    """A set of single characters, as the source of a regular expression."""

    __slots__ = ("source",)

    def __init__(self, source: str) -> None:
        self.source = source


Token: TypeAlias = "str | Star | One"


def parse_glob(text: str) -> list[list[Token]]:
    """Return the globs without braces that `text` stands for, as literals and wildcards. Raise ValueError."""
    tokens, position = _sequence(text, 0, 0)
    assert position == len(text)
    return [_joined(branch) for branch in tokens]


def _sequence(text: str, position: int, depth: int) -> tuple[list[list[Token]], int]:
    """Parse up to the end, or inside braces up to `,` or `}`; return all expansions and the position after."""
    if depth > MAX_DEPTH:
        raise ValueError(f"the braces are nested deeper than {MAX_DEPTH}")
    pieces: list[list[list[Token]]] = []
    while position < len(text):
        char = text[position]
        if depth and char in ",}":
            break
        position += 1
        if char == "\\":
            if position == len(text):
                raise ValueError("nothing follows the backslash")
            pieces.append([[text[position]]])
            position += 1
        elif char == "*":
            pieces.append([[Star()]])
        elif char == "?":
            pieces.append([[One(".")]])
        elif char == "[":
            one, position = _class(text, position)
            pieces.append([[one]])
        elif char == "{":
            branches: list[list[Token]] = []
            while True:
                found, position = _sequence(text, position, depth + 1)
                branches += found
                if position == len(text):
                    raise ValueError("a brace is not closed")
                position += 1
                if text[position - 1] == "}":
                    break
            pieces.append(branches)
        else:
            pieces.append([[char]])
    count = 1
    for piece in pieces:
        count *= len(piece)
        if count > MAX_BRANCHES:
            raise ValueError(f"the braces stand for more than {MAX_BRANCHES} globs")
    return [[token for branch in branches for token in branch] for branches in product(*pieces)], position


def _class(text: str, position: int) -> tuple[One, int]:
    end = text.find("]", position + 1)
    if end < 0:
        raise ValueError("a bracket is not closed")
    content = text[position:end]
    negated = content.startswith("!")
    content = content[negated:]
    source = ""
    index = 0
    while index < len(content):
        if content[index + 1 : index + 2] == "-" and index + 2 < len(content):
            low, high = content[index], content[index + 2]
            if low > high:
                raise ValueError(f"{low}-{high} is the wrong way round")
            source += f"{re.escape(low)}-{re.escape(high)}"
            index += 3
        else:
            source += re.escape(content[index])
            index += 1
    if not source:
        raise ValueError("a bracket is empty")
    return One(f"[{'^' if negated else ''}{source}]"), end + 1


def _joined(tokens: Iterable[Token]) -> list[Token]:
    """Join literals side by side, and stars side by side."""
    joined: list[Token] = []
    for token in tokens:
        if isinstance(token, str) and joined and isinstance(joined[-1], str):
            joined[-1] += token
        elif not (isinstance(token, Star) and joined and isinstance(joined[-1], Star)):
            joined.append(token)
    return joined


def compile_glob(tokens: Iterable[Token]) -> re.Pattern[str]:
    """Return the regular expression, for `fullmatch`."""
    segments = [""]
    for token in tokens:
        if isinstance(token, Star):
            segments.append("")
        else:
            segments[-1] += token.source if isinstance(token, One) else re.escape(token)
    if len(segments) == 1:
        return re.compile(segments[0], re.DOTALL)
    head, *middle, tail = segments
    # The first place where a segment fits is the best one: atomic groups keep the engine from trying the others.
    return re.compile(head + "".join(f"(?>.*?{segment})" for segment in middle) + ".*" + tail, re.DOTALL)


class GlobTable(Generic[T]):
    """Globs and their values. A look-up tries only those whose longest literal occurs in the name."""

    __slots__ = ("_by_gram", "_by_head", "_by_tail", "_rest")

    def __init__(self, globs: Iterable[tuple[list[Token], T]] = ()) -> None:
        self._by_head: dict[int, dict[str, list[tuple[re.Pattern[str] | None, T]]]] = {}
        self._by_tail: dict[int, dict[str, list[tuple[re.Pattern[str] | None, T]]]] = {}
        self._by_gram: dict[str, list[tuple[re.Pattern[str] | None, T]]] = {}
        self._rest: list[tuple[re.Pattern[str] | None, T]] = []
        for tokens, value in globs:
            self._add(tokens, value)

    def _add(self, tokens: list[Token], value: T) -> None:
        first = tokens[0] if tokens else ""
        head = first if isinstance(first, str) else ""
        last = tokens[-1] if len(tokens) > 1 else ""
        tail = last if isinstance(last, str) else ""
        inner = max((token for token in tokens[1:-1] if isinstance(token, str)), key=len, default="")
        # `*tail` and `head*` are decided by the look-up itself.
        simple = len(tokens) == 2 and any(isinstance(token, Star) for token in tokens) and bool(head or tail)
        entry = (None if simple else compile_glob(tokens), value)
        if len(inner) >= _GRAM and len(inner) > max(len(head), len(tail)):
            self._by_gram.setdefault(inner[:_GRAM], []).append(entry)
        elif tail and len(tail) >= len(head):
            self._by_tail.setdefault(len(tail), {}).setdefault(tail, []).append(entry)
        elif head:
            self._by_head.setdefault(len(head), {}).setdefault(head, []).append(entry)
        else:
            self._rest.append(entry)

    def __bool__(self) -> bool:
        return bool(self._by_head or self._by_tail or self._by_gram or self._rest)

    def find(self, name: str) -> Iterable[T]:
        """Yield the values of the globs that match all of `name`, in no particular order."""
        for size, table in self._by_tail.items():
            entries = table.get(name[-size:])
            if entries is not None:
                yield from _matching(entries, name)
        for size, table in self._by_head.items():
            entries = table.get(name[:size])
            if entries is not None:
                yield from _matching(entries, name)
        if self._by_gram:
            for gram in {name[at : at + _GRAM] for at in range(len(name) - _GRAM + 1)}:
                entries = self._by_gram.get(gram)
                if entries is not None:
                    yield from _matching(entries, name)
        if self._rest:
            yield from _matching(self._rest, name)


def _matching(entries: list[tuple[re.Pattern[str] | None, T]], name: str) -> Iterable[T]:
    for pattern, value in entries:
        if pattern is None or pattern.fullmatch(name):
            yield value
