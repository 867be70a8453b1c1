"""What is wrong with a configuration, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.options import Problem, Severity
from .tree import NOWHERE, Place, Positions


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to tell the user.

    `path` is the place in the schema (`services[0].addr`) or the part of a URL (`scheme`). With `fatal` there is no
    configuration at all, not even to print: the text could not be read.
    """

    place: Place
    path: str
    message: str
    code: str
    severity: Severity = "error"
    fatal: bool = False

    def __str__(self) -> str:
        path = f"{self.path}: " if self.path else ""
        return f"{self.place}: {self.severity}: {path}{self.message} [{self.code}]"

    def as_data(self) -> dict[str, Any]:
        """Return the finding for `--json`."""
        return {
            "source": self.place.source.name,
            "line": self.place.line,
            "column": self.place.column,
            "severity": self.severity,
            "path": self.path,
            "message": self.message,
            "code": self.code,
        }


def locate(problems: Iterable[Problem], positions: Positions, *, fatal: bool = False) -> list[Finding]:
    """Give problems the place of their path: of the key if it is unknown, else of the value."""
    found = []
    for problem in problems:
        spot = positions.find(problem.path)
        place = NOWHERE
        path = problem.path
        if spot is not None:
            place = spot.key if problem.code.endswith("unknown-key") else spot.value
            exact = positions.exact(path)
            if exact is not None and exact.spelling and problem.code.endswith("unknown-key"):
                path = path[: len(path) - len(exact.spelling)] + exact.spelling
        fails = fatal and problem.severity == "error"
        found.append(Finding(place, path, problem.message, problem.code, problem.severity, fails))
    return found
