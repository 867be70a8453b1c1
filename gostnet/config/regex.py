"""Regular expressions as GOST's users write them: RE2's syntax, translated to Python's.

What RE2 does not have (look-around, back references, possessive quantifiers) is refused, so that a rule means the same
in both programs. Matching is Python's: an expression that repeats a repetition, such as `(a+)+`, may take long.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

_POSIX: Final = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": r"\x00-\x7f",
    "blank": r"\t ",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t\n\v\f\r ",
    "upper": "A-Z",
    "word": "0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}
_NAME: Final = re.compile(r"\?P?<([A-Za-z_][0-9A-Za-z_]*)>")
_FLAGS: Final = re.compile(r"\?([ims]*(?:-[ims]+)?)([:)])")
_REPEAT: Final = re.compile(r"\{(\d+)(?:,(\d*))?\}", re.ASCII)
_HEX: Final = re.compile(r"x(?:\{([0-9A-Fa-f]{1,6})\}|([0-9A-Fa-f]{2}))")
MAX_REPEAT: Final = 1000
"""RE2's limit for the numbers in braces."""
MAX_PATTERN: Final = 4096
"""Characters of an expression; compiling takes time and memory in proportion."""


@lru_cache(maxsize=256)
def compile_regex(pattern: str) -> re.Pattern[str]:
    """Return the expression for searching. Raise ValueError that says what RE2 would not take, or Python cannot."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"is longer than {MAX_PATTERN} characters")
    text = _Translation(pattern).run()
    try:
        return re.compile(text, re.ASCII)
    except (re.error, OverflowError, RecursionError) as exc:
        raise ValueError(f"is not a regular expression: {exc}") from exc


class _Translation:
    """One pass over a pattern.

    groups    for each open group, the flags that were set inside it: each is a Python group to be closed with it
    """

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._out: list[str] = []
        self._groups: list[list[str]] = [[]]
        # Without the flag m, RE2's $ is the very end; Python's is also before a final newline.
        self._end = "$" if re.search(r"\(\?[is]*m", pattern) else r"\Z"

    def run(self) -> str:
        text, out = self._text, self._out
        quantified = True  # a quantifier needs something before it
        while self._at < len(text):
            char = text[self._at]
            self._at += 1
            if char in "*+?" or (char == "{" and self._repeat()):
                if quantified:
                    raise ValueError(f"has a repetition of nothing, or of a repetition, before position {self._at}")
                if char != "{":
                    out.append(char)
                if text[self._at : self._at + 1] == "?":
                    out.append("?")
                    self._at += 1
                quantified = True
                continue
            quantified = False
            if char == "\\":
                self._escape()
            elif char == "[":
                self._class()
            elif char == "(":
                quantified = self._open()
            elif char == ")":
                if len(self._groups) == 1:
                    raise ValueError("closes a group that is not open")
                out.append(")" * (len(self._groups.pop()) + 1))
            elif char == "|":
                # Flags set inside a group hold for its other branches too.
                flags = self._groups[-1]
                out.append(")" * len(flags) + "|" + "".join(flags))
                quantified = True
            elif char == "$":
                out.append(self._end)
            elif char == "^":
                out.append(char)
            else:
                out.append(r"\{" if char == "{" else char)
        if len(self._groups) > 1:
            raise ValueError("leaves a group open")
        out.append(")" * len(self._groups[0]))
        return "".join(out)

    def _repeat(self) -> bool:
        found = _REPEAT.match(self._text, self._at - 1)
        if found is None:
            return False
        if any(int(number or 0) > MAX_REPEAT for number in found.groups()):
            raise ValueError(f"repeats more than {MAX_REPEAT} times")
        self._out.append(found[0])
        self._at = found.end()
        return True

    def _open(self) -> bool:
        """Begin a group; return whether nothing that can be repeated stands before what follows."""
        text = self._text
        if text[self._at : self._at + 1] != "?":
            self._groups.append([])
            self._out.append("(")
            return True
        if (named := _NAME.match(text, self._at)) is not None:
            self._at = named.end()
            self._groups.append([])
            self._out.append(f"(?P<{named[1]}>")
            return True
        flags = _FLAGS.match(text, self._at)
        if flags is None or (flags[2] == ")" and not flags[1]):
            raise ValueError(f"uses (?{text[self._at + 1 : self._at + 3]}, which RE2 does not have")
        self._at = flags.end()
        opened = f"(?{flags[1]}:"
        self._out.append(opened)
        if flags[2] == ":":
            self._groups.append([])
        else:
            self._groups[-1].append(opened)
        return True

    def _escape(self) -> None:
        text, out = self._text, self._out
        char = text[self._at : self._at + 1]
        self._at += 1
        if char == "Q":
            end = text.find(r"\E", self._at)
            out.append(re.escape(text[self._at : end if end >= 0 else len(text)]))
            self._at = end + 2 if end >= 0 else len(text)
        elif char == "z":
            out.append(r"\Z")
        elif char and char in "AbB":
            out.append("\\" + char)
        else:
            out.append(self._character(char))

    def _character(self, char: str) -> str:
        """Return an escape that stands for a character or a class, inside and outside of brackets."""
        if char == "x":
            found = _HEX.match(self._text, self._at - 1)
            code = int(found[1] or found[2], 16) if found is not None else -1
            if found is None or code > 0x10FFFF:
                raise ValueError("has an escape \\x without a character's number")
            self._at = found.end()
            return re.escape(chr(code))
        if char and char in "dDsSwW":
            return "\\" + char
        if char and char in "afnrtv":
            return "\\" + char
        if char and not char.isalnum() and char.isascii():
            return re.escape(char)
        shown = "\\" + char
        raise ValueError(
            f"uses {shown!r}, which is not available" if char in ("p", "P") else f"has no escape {shown!r}"
        )

    def _class(self) -> None:
        """Copy a class, with its named sets spelt out and what Python might read as set operations escaped."""
        text, out = self._text, self._out
        out.append("[")
        if text[self._at : self._at + 1] == "^":
            out.append("^")
            self._at += 1
        first = True
        while True:
            char = text[self._at : self._at + 1]
            self._at += 1
            if not char:
                raise ValueError("leaves a [ open")
            if char == "]" and not first:
                out.append("]")
                return
            first = False
            if char == "[" and text[self._at : self._at + 1] == ":" and (end := text.find(":]", self._at)) > 0:
                name = text[self._at + 1 : end]
                if name not in _POSIX:
                    raise ValueError(f"has no class [:{name[:16]}:]")
                out.append(_POSIX[name])
                self._at = end + 2
            elif char == "\\":
                char = text[self._at : self._at + 1]
                self._at += 1
                out.append(self._character(char))
            else:
                out.append("\\" + char if char in "[]&~|" else char)
