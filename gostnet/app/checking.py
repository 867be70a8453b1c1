"""Everything that is wrong with a configuration: what the texts show, and what building the objects shows."""

from __future__ import annotations

from ..config.check import report
from ..config.finding import Finding
from ..config.load import Loaded
from .catalog import catalog


def check_loaded(loaded: Loaded, strict: bool = False, lenient: bool = False) -> list[Finding]:
    """Return the findings of loading and of all checks, in the order of their places. Opens nothing."""
    return report(loaded, catalog(), strict=strict, lenient=lenient)
