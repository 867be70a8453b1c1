"""Everything that is wrong with a configuration: what the texts show, and what building the objects shows."""

from __future__ import annotations

from ..config.check import report
from ..config.finding import Finding
from ..config.load import Loaded
from .catalog import catalog

UNSUPPORTED = frozenset(
    (
        "*.plugin",
        "*.redis",
        "ForwardNode.auth",
        "ForwardNode.http",
        "ForwardNode.tls",
        "Hop.file",
        "Hop.http",
        "Node.http",
        "Node.tls",
        "Service.quotas",
    )
)
"""Fields of the schema that would change where traffic goes, or bound it, and that this version does not act upon."""


def check_loaded(loaded: Loaded, strict: bool = False, lenient: bool = False) -> list[Finding]:
    """Return the findings of loading and of all checks, in the order of their places. Opens nothing."""
    return report(loaded, catalog(), strict=strict, lenient=lenient, unsupported=UNSUPPORTED)
