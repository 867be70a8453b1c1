"""Everything that is wrong with a configuration: what the texts show, and what building the objects shows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from ..config import schema
from ..config.argv import Invocation
from ..config.check import ordered, report
from ..config.finding import Finding, locate
from ..config.load import Loaded
from ..core.errors import ConfigError, GostnetError
from ..core.options import Problem, options_of
from ..core.registry import Kind
from .catalog import catalog
from .check_workers import worker_problems

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

_KINDS: Final[Mapping[type[schema.Section], Kind]] = {
    schema.Handler: "handler",
    schema.Listener: "listener",
    schema.Connector: "connector",
    schema.Dialer: "dialer",
}


def passes(loaded: Loaded, invocation: Invocation) -> bool:
    """Print what is wrong with a configuration, in the words of `check`; return whether it can be used."""
    findings = check_loaded(loaded, strict=invocation.strict, lenient=invocation.lenient)
    for finding in findings:
        print(finding, file=sys.stderr)
    return not any(finding.severity == "error" for finding in findings)


def check_loaded(
    loaded: Loaded, strict: bool = False, lenient: bool = False, *, building: bool = False
) -> list[Finding]:
    """Return the findings of loading and of all checks, in the order of their places. Opens nothing.

    With `building`, what passes all checks is built as for a start: that finds, one at a time, what only a component
    knows. A start does it anyway.
    """
    found = report(loaded, catalog(), strict=strict, lenient=lenient, unsupported=UNSUPPORTED)
    if loaded.broken:
        return found
    config = loaded.config
    found = ordered([*found, *locate([*_files(config), *_ciphers(config), *worker_problems(config)], config.positions)])
    if building and not any(finding.severity == "error" for finding in found):
        found = ordered([*found, *_building(config, lenient)])
    return found


def at_its_place(exc: GostnetError, config: schema.Config) -> Finding:
    """Return an error that came up while objects were built, with its place as far as its path is known."""
    path, message = "", f"{exc} ({exc.hint})" if exc.hint else str(exc)
    if isinstance(exc, ConfigError):
        path, message = as_written(exc.path, config), exc.reason
    else:  # Unavailable has only its text
        first, colon, rest = message.partition(": ")
        if colon and config.positions.exact(first) is not None:
            path, message = first, rest
    (finding,) = locate([Problem(path, message, exc.code)], config.positions)
    return finding


def as_written(path: str, config: schema.Config) -> str:
    """Return the path of a metadata key under the name that it has in the configuration: the key itself or an alias."""
    head, mark, key = path.partition(".metadata.")
    if not mark or config.positions.exact(path) is not None:
        return path
    for section in schema.walk(config):
        if section.path == head and isinstance(
            section, schema.Handler | schema.Listener | schema.Connector | schema.Dialer
        ):
            options = catalog().options(_KINDS[type(section)], section.kind)
            for option in options_of(options) if options is not None else ():
                if key.lower() in map(str.lower, option.names):
                    names = [f"{head}{mark}{name}" for name in option.names]
                    return next((name for name in names if config.positions.exact(name) is not None), path)
    return path


def _building(config: schema.Config, lenient: bool) -> Iterator[Finding]:
    """Build the objects, without the log files, which would be made by that."""
    from .assemble import Assembler  # who only checks texts needs none of it
    from .names import system_resolver

    silent = schema.Log(output="none")
    loggers = tuple(replace(logger, log=silent) for logger in config.loggers)
    try:
        Assembler(replace(config, log=silent, loggers=loggers), catalog(), system_resolver, lenient=lenient).build()
    except GostnetError as exc:
        yield at_its_place(exc, config)


def _ciphers(config: schema.Config) -> Iterator[Problem]:
    """Check what `auth` of a tap is: the name of a cipher, and what its key is made of."""
    for service in config.services:
        handler = service.handler
        if handler is None or handler.kind != "tap" or handler.auth is None or handler.auth.file:
            continue
        from ..protocols.tap.codec import cipher_of  # brings OpenSSL along

        key = next((value for name, value in handler.metadata.items() if name.lower() == "key"), "")
        try:
            cipher_of(handler.auth.username, handler.auth.password, key if isinstance(key, str) else "", handler.path)
        except ConfigError as exc:
            yield Problem(exc.path, exc.reason, exc.code)


def _files(config: schema.Config) -> Iterator[Problem]:
    """Read the certificates that are named anywhere: some would be missed only when the first peer asks for TLS."""
    for section in schema.walk(config):
        if isinstance(section, schema.TLS):
            from ..transports.tls_context import block_problems  # brings OpenSSL along, which most checks do not need

            yield from block_problems(section)
