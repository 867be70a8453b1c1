"""Entries: one line of a policy's table and where it stands, so that whatever is wrong with it can be named."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..core.errors import ConfigError
from ..core.options import Problem

Clean = Callable[[str], str]
"""Takes the comment and the blanks around off a line of a file."""


class Entry(NamedTuple):
    """One line: of the configuration (`origin` is the path of the list), or of a file or URL (`origin` names it)."""

    text: str
    origin: str
    position: int
    inline: bool = True

    @property
    def where(self) -> str:
        """The place as users read it: `bypasses[0].matchers[2]`, or `file /etc/list: line 3`."""
        return f"{self.origin}[{self.position}]" if self.inline else f"{self.origin}: line {self.position + 1}"

    def error(self, message: str, code: str) -> Problem:
        """Return what is wrong with the entry, which is left out."""
        return Problem(self.where, message, code)

    def warning(self, message: str, code: str) -> Problem:
        """Return what is odd about the entry, which stays."""
        return Problem(self.where, message, code, "warning")


def inline(texts: Iterable[str], path: str) -> list[Entry]:
    """Return the entries of a list in the configuration; blank ones are dropped."""
    return [Entry(text.strip(), path, index) for index, text in enumerate(texts) if text.strip()]


def strip_comment(line: str) -> str:
    """Take off everything from the first `#` on."""
    return line.partition("#")[0].strip()


def strip_leading_comment(line: str) -> str:
    """Take off a comment that is the whole line: `#` may be part of a password (U08)."""
    line = line.strip()
    return "" if line.startswith("#") else line


def lines(data: bytes, origin: str, clean: Clean = strip_comment) -> list[Entry]:
    """Return the entries of a file: UTF-8, any line ends, a byte order mark allowed; blank ones are dropped."""
    text = data.decode("utf-8-sig", "replace")
    found = []
    for index, line in enumerate(text.split("\n")):
        cleaned = clean(line)
        if cleaned:
            found.append(Entry(cleaned, origin, index, False))
    return found


def refuse(problems: Iterable[Problem]) -> None:
    """Raise ConfigError for the first error among `problems`."""
    for problem in problems:
        if problem.severity == "error":
            raise ConfigError(problem.path, problem.message, code=problem.code)
