"""Everything that is wrong with a configuration: what the texts show, and what building the objects shows."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ..config import schema
from ..config.argv import Invocation
from ..config.check import ordered, report
from ..config.finding import Finding, locate
from ..config.load import Loaded
from ..core.options import Problem
from .catalog import catalog

PLUGGABLE = (
    *("Admission", "Auther", "Bypass", "Hop", "Hosts", "Ingress", "Limiter", "Resolver", "Rewriter", "Router", "SD"),
)
"""Sections whose plugins are not asked; those of recorders and observers are."""

UNSUPPORTED = frozenset(
    (
        *(f"{owner}.plugin" for owner in PLUGGABLE),
        "*.redis",
        "ForwardNode.auth",
        "ForwardNode.http",
        "ForwardNode.tls",
        "Hop.file",
        "Hop.http",
        "Node.http",
        "Node.tls",
    )
)
"""Fields of the schema that would change where traffic goes, or bound it, and that this version does not act upon."""


def passes(loaded: Loaded, invocation: Invocation) -> bool:
    """Print what is wrong with a configuration, in the words of `check`; return whether it can be used."""
    findings = check_loaded(loaded, strict=invocation.strict, lenient=invocation.lenient)
    for finding in findings:
        print(finding, file=sys.stderr)
    return not any(finding.severity == "error" for finding in findings)


def check_loaded(loaded: Loaded, strict: bool = False, lenient: bool = False) -> list[Finding]:
    """Return the findings of loading and of all checks, in the order of their places. Opens nothing."""
    found = report(loaded, catalog(), strict=strict, lenient=lenient, unsupported=UNSUPPORTED)
    if loaded.broken:
        return found
    return ordered([*found, *locate(_files(loaded.config), loaded.config.positions)])


def _files(config: schema.Config) -> Iterator[Problem]:
    """Read the certificates that are named anywhere: some would be missed only when the first peer asks for TLS."""
    for section in schema.walk(config):
        if isinstance(section, schema.TLS):
            from ..transports.tls_context import block_problems  # brings OpenSSL along, which most checks do not need

            yield from block_problems(section)
