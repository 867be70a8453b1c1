"""The language of matcher rules: from text to a tree, with the position of what is wrong. Rows J01-J43.

    Host(`example.com`) && (PathPrefix(`/api`) || !ClientIP("10.0.0.0/8"))

Calls joined by `&&`, `||`, `!` and parentheses; `!` binds tighter than `&&`, that tighter than `||`. Arguments are
strings, in back quotes as they are or in double quotes with Go's escapes. `//` begins a comment. What the calls mean is
in policies/matcher.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ..core.address import parse_ip
from ..core.suggest import did_you_mean
from . import patterns
from .regex import compile_regex

MAX_RULE: Final = 65536
MAX_DEPTH: Final = 100
"""Parentheses inside one another."""

COMPARISONS: Final = ("gt", "ge", "lt", "le", "eq", "ne")


class RuleError(ValueError):
    """A rule that cannot be read; `position` counts characters from 1."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message}, at character {position} of the rule")
        self.position = position


@dataclass(frozen=True, slots=True)
class Call:
    """A condition: a function in its usual spelling, with its arguments; `position` as in RuleError."""

    name: str
    arguments: tuple[str, ...]
    position: int = 0


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite."""

    item: Rule


@dataclass(frozen=True, slots=True)
class AllOf:
    """Conditions of which each must hold."""

    items: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Conditions of which one must hold."""

    items: tuple[Rule, ...]


Rule = Call | Not | AllOf | AnyOf


# ---- arguments -------------------------------------------------------------------------------------------------------
def _text(arguments: tuple[str, ...]) -> str:
    return ""


def _host(arguments: tuple[str, ...]) -> str:
    if not arguments[0].isascii():
        return f"{arguments[0][:64]!r} has characters beyond ASCII; write the name in its xn-- form"
    return ""


def _path(arguments: tuple[str, ...]) -> str:
    return "" if arguments[0].startswith("/") else f"{arguments[0][:64]!r} does not begin with /"


def _regex(arguments: tuple[str, ...]) -> str:
    try:
        compile_regex(arguments[-1])
    except ValueError as exc:
        return f"{arguments[-1][:64]!r} {exc}"
    return ""


def _field_regex(arguments: tuple[str, ...]) -> str:
    return _regex(arguments) if len(arguments) == 2 else ""


def _field(arguments: tuple[str, ...]) -> str:
    return _comparison(arguments) if len(arguments) == 3 else ""


def _comparison(arguments: tuple[str, ...]) -> str:
    if arguments[1] not in COMPARISONS:
        return f"{arguments[1][:64]!r} is not one of {', '.join(COMPARISONS)}"
    try:
        float(arguments[2])
    except ValueError:
        return f"{arguments[2][:64]!r} is not a number"
    return ""


def _address(arguments: tuple[str, ...]) -> str:
    text = arguments[0]
    if parse_ip(text) is None and not patterns.is_network(text):
        return f"{text[:64]!r} is neither an address nor a network such as 10.0.0.0/8"
    return ""


_JSON_PATH: Final = re.compile(r"(?:[^.\\|#@*?{}\[\]()!]|\\.)+(?:\.(?:[^.\\|#@*?{}\[\]()!]|\\.)+)*(?:\.#)?|#")


def _json(arguments: tuple[str, ...]) -> str:
    if _JSON_PATH.fullmatch(arguments[0]) is None:
        return f"{arguments[0][:64]!r} is not a path of names and numbers such as user.roles.0"
    return _comparison(arguments) if len(arguments) == 3 else _regex(arguments)


FUNCTIONS: Final[Mapping[str, tuple[int, int, Callable[[tuple[str, ...]], str]]]] = {
    "Host": (1, 1, _host),
    "HostRegexp": (1, 1, _regex),
    "Method": (1, 1, _text),
    "Path": (1, 1, _path),
    "PathPrefix": (1, 1, _path),
    "PathRegexp": (1, 1, _regex),
    "Header": (1, 3, _field),
    "HeaderRegexp": (1, 2, _field_regex),
    "Query": (1, 3, _field),
    "QueryRegexp": (1, 2, _field_regex),
    "BodyRegexp": (1, 1, _regex),
    "BodyJSON": (2, 3, _json),
    "ClientIP": (1, 1, _address),
    "Network": (1, 1, _text),
    "Proto": (1, 1, _text),
    "Bypass": (1, 1, _text),
    "Admission": (1, 1, _text),
}
"""By name: fewest and most arguments, and what says what is wrong with them."""

_SPELLINGS: Final = {
    spelling: name for name in FUNCTIONS for spelling in (name, name.lower(), name.upper(), name.lower().capitalize())
}
"""GOST knows each function as written, in lower case, in capitals, and with one capital (J10, J11)."""


# ---- words -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int


_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLANK: Final = re.compile(r"(?:[ \t\r\n]+|//[^\n]*)+")
_ESCAPE: Final = re.compile(
    r"\\(?:([abfnrtv\\\"])|([0-3][0-7]{2})|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))"
)
_LETTERS: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        if (blank := _BLANK.match(text, at)) is not None:
            at = blank.end()
            continue
        position = at + 1
        char = text[at]
        if char in "&|" and text[at : at + 2] == char * 2:
            yield _Token(char * 2, char * 2, position)
            at += 2
        elif char in "!(),":
            yield _Token(char, char, position)
            at += 1
        elif char == "`":
            end = text.find("`", at + 1)
            if end < 0:
                raise RuleError("a string that begins with ` has no end", position)
            yield _Token("string", text[at + 1 : end].replace("\r", ""), position)
            at = end + 1
        elif char == '"':
            value, at = _quoted(text, at)
            yield _Token("string", value, position)
        elif (word := _WORD.match(text, at)) is not None:
            yield _Token("word", word[0], position)
            at = word.end()
        else:
            hint = "; strings are written `like this`" if char in "'0123456789" else ""
            raise RuleError(f"{char!r} has no meaning here{hint}", position)
    yield _Token("end", "the end", len(text) + 1)


def _quoted(text: str, start: int) -> tuple[str, int]:
    """Return the string that begins at `start`, and where it ends."""
    parts: list[str] = []
    at = start + 1
    while at < len(text) and text[at] != "\n":
        char = text[at]
        if char == '"':
            return "".join(parts), at + 1
        if char != "\\":
            parts.append(char)
            at += 1
            continue
        found = _ESCAPE.match(text, at)
        number = 0
        if found is not None and found[1] is None:
            number = int(found[2], 8) if found[2] else int(found[found.lastindex or 0], 16)
        if found is None or number > 0x10FFFF or 0xD800 <= number < 0xE000:
            raise RuleError(f"there is no escape {text[at : at + 2]!r}", at + 1)
        parts.append(_LETTERS[found[1]] if found[1] else chr(number))
        at = found.end()
    raise RuleError('a string that begins with " has no end', start + 1)


# ---- sentences -------------------------------------------------------------------------------------------------------
class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._next = next(self._tokens)

    def _take(self) -> _Token:
        token = self._next
        if token.kind != "end":
            self._next = next(self._tokens)
        return token

    def run(self) -> Rule:
        rule = self._either(0)
        if self._next.kind != "end":
            raise RuleError(
                f"{self._next.text[:64]!r} cannot follow here; join conditions by && or ||", self._next.position
            )
        return rule

    def _either(self, depth: int) -> Rule:
        items = [self._both(depth)]
        while self._next.kind == "||":
            self._take()
            items.append(self._both(depth))
        return items[0] if len(items) == 1 else AnyOf(tuple(items))

    def _both(self, depth: int) -> Rule:
        items = [self._single(depth)]
        while self._next.kind == "&&":
            self._take()
            items.append(self._single(depth))
        return items[0] if len(items) == 1 else AllOf(tuple(items))

    def _single(self, depth: int) -> Rule:
        negated = False
        while self._next.kind == "!":
            self._take()
            negated = not negated
        token = self._take()
        if token.kind == "(":
            if depth >= MAX_DEPTH:
                raise RuleError(f"more than {MAX_DEPTH} parentheses are open", token.position)
            item = self._either(depth + 1)
            self._expect(")", f"the parenthesis of character {token.position} is not closed")
        elif token.kind == "word":
            item = self._call(token)
        else:
            raise RuleError(
                f"there is {_shown(token)} where a condition such as Host(`example.com`) belongs", token.position
            )
        return Not(item) if negated else item

    def _expect(self, kind: str, otherwise: str) -> None:
        token = self._take()
        if token.kind != kind:
            raise RuleError(f"there is {_shown(token)} where {kind!r} belongs: {otherwise}", token.position)

    def _call(self, word: _Token) -> Call:
        name = _SPELLINGS.get(word.text)
        if name is None:
            raise RuleError(
                f"there is no function {word.text[:64]!r}{did_you_mean(word.text, FUNCTIONS)}", word.position
            )
        self._expect("(", f"{name} is a function")
        arguments: list[str] = []
        while self._next.kind != ")":
            token = self._take()
            if token.kind != "string":
                raise RuleError(f"there is {_shown(token)} where a string of {name} belongs", token.position)
            if not token.text:
                raise RuleError(f"{name} has an empty argument", token.position)
            arguments.append(token.text)
            if self._next.kind != ")":
                self._expect(",", f"the parenthesis of {name} is not closed")
        self._take()
        fewest, most, problem = FUNCTIONS[name]
        if not fewest <= len(arguments) <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise RuleError(f"{name} takes {wanted} arguments, not {len(arguments)}", word.position)
        wrong = problem(tuple(arguments))
        if wrong:
            raise RuleError(f"{name}: {wrong}", word.position)
        return Call(name, tuple(arguments), word.position)


def _shown(token: _Token) -> str:
    return "the end" if token.kind == "end" else repr(token.text[:64])


def parse_rule(text: str) -> Rule:
    """Return the tree of a rule. Raise RuleError."""
    if len(text) > MAX_RULE:
        raise RuleError(f"the rule is longer than {MAX_RULE} characters", MAX_RULE)
    return _Parser(text).run()


def print_rule(rule: Rule) -> str:
    """Return a text that parses to `rule`."""
    match rule:
        case Call():
            return f"{rule.name}({', '.join(_literal(argument) for argument in rule.arguments)})"
        case Not():
            return "!" + _enclosed(rule.item)
        case AllOf():
            return " && ".join(_enclosed(item) for item in rule.items)
        case AnyOf():
            return " || ".join(_enclosed(item) for item in rule.items)


def _enclosed(rule: Rule) -> str:
    text = print_rule(rule)
    return text if isinstance(rule, Call | Not) else f"({text})"


def _literal(text: str) -> str:
    if "`" not in text and "\r" not in text:
        return f"`{text}`"
    quoted = "".join(
        "\\" + char if char in '"\\' else f"\\x{ord(char):02x}" if ord(char) < 32 else char for char in text
    )
    return f'"{quoted}"'


def names(rule: Rule, function: str) -> Iterator[str]:
    """Yield the objects that calls of `function` (Bypass, Admission) name."""
    match rule:
        case Call():
            if rule.name == function:
                yield rule.arguments[0]
        case Not():
            yield from names(rule.item, function)
        case AllOf() | AnyOf():
            for item in rule.items:
                yield from names(item, function)
