"""Everything that can be said about a configuration without opening a socket or touching the kernel."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from ..core.address import Endpoint, parse_endpoint
from ..core.errors import ConfigError
from ..core.options import Problem
from ..core.registry import GOST_NAMES, KINDS, Kind
from ..core.suggest import did_you_mean
from . import matcher, patterns, rules, schema
from .decode import UNKNOWN_KEY as UNKNOWN_SCHEMA_KEY
from .finding import Finding, locate
from .load import Loaded
from .metadata import UNKNOWN_KEY as UNKNOWN_METADATA_KEY
from .metadata import Catalog, MetadataChecker, metadata_references
from .names import listen_network
from .schema import Config, Reference, named, references, schema_fields, walk
from .workers import parse_workers

_LABELS: Final[Mapping[str, str]] = {
    "chains": "chain",
    "hops": "hop",
    "authers": "auther",
    "admissions": "admission",
    "bypasses": "bypass",
    "resolvers": "resolver",
    "hosts": "hosts table",
    "ingresses": "ingress",
    "routers": "router",
    "sds": "service discovery",
    "recorders": "recorder",
    "rewriters": "rewriter",
    "caches": "cache",
    "limiters": "limiter",
    "quotas": "quota",
    "climiters": "connection limiter",
    "rlimiters": "rate limiter",
    "observers": "observer",
    "loggers": "logger",
    "services": "service",
}
_DANGLING: Final[Mapping[str, str]] = {
    "authers": "every login is accepted",
    "admissions": "every client is refused",
    "bypasses": "nothing is bypassed",
    "chains": "traffic goes out directly",
    "hops": "traffic leaves the chain here",
    "limiters": "there is no limit",
    "quotas": "there is no limit",
    "climiters": "there is no limit",
    "rlimiters": "there is no limit",
    "resolvers": "the system's resolver is used",
}
"""What GOST does, Z01-Z07."""
_UNUSED: Final = frozenset(
    ("authers", "admissions", "bypasses", "resolvers", "hosts", "limiters", "quotas", "climiters", "rlimiters")
)
"""Lists whose objects protect or steer something, so that one that nobody refers to is likely a mistake."""


def check(
    config: Config,
    catalog: Catalog,
    *,
    strict: bool = False,
    lenient: bool = False,
    unsupported: Collection[str] = (),
) -> list[Finding]:
    """Check a configuration that could be decoded; findings come in the order of the sources.

    `strict` turns metadata keys that nobody reads into errors, `lenient` turns names that nothing bears into warnings.
    `unsupported` lists fields that this version does not act upon, such as `Service.quotas`, or `*.plugin` for that
    field of any section: using one is an error.
    """
    problems: list[Problem] = []
    for section in walk(config):
        problems += rules.problems(section)
        problems += _unsupported(section, unsupported)
    problems += _names(config)
    problems += _components(config, catalog)
    problems += _references(config, lenient=lenient)
    problems += _addresses(config)
    problems += _advice(config)
    problems += MetadataChecker(catalog, config.positions).check(config)
    if strict:
        problems = [replace(each, severity="error") if each.code == UNKNOWN_METADATA_KEY else each for each in problems]
    return ordered(locate(problems, config.positions))


def report(
    loaded: Loaded,
    catalog: Catalog,
    *,
    checking: bool = False,
    strict: bool = False,
    lenient: bool = False,
    unsupported: Collection[str] = (),
) -> list[Finding]:
    """Return all that is wrong with what was loaded; `checking` (the verb check) makes unknown keys errors as `strict`.

    What could not be decoded is not checked further: its defaults would only give findings that mislead.
    """
    found = list(loaded.findings)
    if checking or strict:
        found = [replace(each, severity="error") if each.code == UNKNOWN_SCHEMA_KEY else each for each in found]
    if not loaded.broken:
        found += check(loaded.config, catalog, strict=strict, lenient=lenient, unsupported=unsupported)
    return ordered(found)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by source (in the order of appearance) and position; drop what is said twice about one place."""
    unique = {(str(each.place), each.message, each.code): each for each in reversed(list(findings))}
    wrong = {str(each.place) for each in unique.values() if each.severity == "error"}
    # That nobody reads a key is no news where its value has been refused.
    listed = [
        each
        for each in reversed(unique.values())
        if each.code != UNKNOWN_METADATA_KEY or each.severity == "error" or str(each.place) not in wrong
    ]
    sources: dict[str, int] = {}
    for each in listed:
        sources.setdefault(each.place.source.name, len(sources))
    return sorted(listed, key=lambda each: (sources[each.place.source.name], each.place.line, each.place.column))


def summary(findings: Iterable[Finding]) -> str:
    """Return `N errors, M warnings`."""
    listed = list(findings)
    errors = sum(each.severity == "error" for each in listed)
    return f"{errors} errors, {len(listed) - errors} warnings"


# ---- names and references --------------------------------------------------------------------------------------------
def _names(config: Config) -> Iterator[Problem]:
    for key, objects in named(config).items():
        seen: dict[str, Any] = {}
        for each in objects:
            label = _LABELS[key]
            if not each.name:
                if key == "services":
                    yield Problem(each.path, "has no name; GOST would bind its port and never serve it", "service.name")
                else:
                    yield Problem(each.path, f"has no name, so nothing can use this {label}", "name.empty", "warning")
            elif each.name in seen:
                spot = config.positions.find(f"{seen[each.name].path}.name")
                where = f", first at {spot.value}" if spot else ""
                message = f"{label} {each.name!r} is defined twice{where}"
                yield Problem(f"{each.path}.name", message, "name.duplicate")
            else:
                seen[each.name] = each


def _rule_references(config: Config) -> Iterator[Reference]:
    for section in walk(config):
        if not isinstance(section, schema.Matcher) or not section.rule:
            continue
        try:
            rule = matcher.parse_rule(section.rule)
        except matcher.RuleError:
            continue  # reported as such
        for function, target in (("Bypass", "bypasses"), ("Admission", "admissions")):
            for name in matcher.names(rule, function):
                yield Reference(f"{section.path}.rule", name, target)


def _references(config: Config, *, lenient: bool) -> Iterator[Problem]:
    known = {key: {each.name for each in objects if each.name} for key, objects in named(config).items()}
    used: set[tuple[str, str]] = set()
    for reference in (*references(config), *metadata_references(config), *_rule_references(config)):
        if reference.target == "hops" and _is_bare_url(config, reference.path):
            continue
        # GOST trims these names only.
        name = reference.name.strip() if reference.target == "quotas" else reference.name
        used.add((reference.target, name))
        if name in known[reference.target]:
            continue
        label = _LABELS[reference.target]
        effect = _DANGLING.get(reference.target, "it has no effect")
        effect = effect if lenient else f"in GOST, {effect}"
        message = f"no {label} is named {name!r} ({effect}){did_you_mean(name, known[reference.target])}"
        yield Problem(reference.path, message, "reference.dangling", "warning" if lenient else "error")
    for key in sorted(_UNUSED):
        for each in named(config)[key]:
            if each.name and (key, each.name) not in used:
                message = f"{_LABELS[key]} {each.name!r} is not used by anything"
                yield Problem(f"{each.path}.name", message, "name.unused", "warning")


def _is_bare_url(config: Config, path: str) -> bool:
    """True for the hop of a -F without a host, which is not meant as a reference and is reported with the URL."""
    spot = config.positions.exact(path)
    return spot is not None and spot.value.source.kind == "url"


# ---- components ------------------------------------------------------------------------------------------------------
def _components(config: Config, catalog: Catalog) -> Iterator[Problem]:
    for section in walk(config):
        match section:
            case schema.Service():
                yield from _component(catalog, "handler", section, section.handler, "auto")
                yield from _component(catalog, "listener", section, section.listener, "tcp")
            case schema.Node():
                yield from _component(catalog, "connector", section, section.connector, "http")
                yield from _component(catalog, "dialer", section, section.dialer, "tcp")


def _component(catalog: Catalog, kind: Kind, owner: schema.Section, part: Any, default: str) -> Iterator[Problem]:
    name = part.kind if part is not None else default
    path = f"{part.path}.type" if part is not None else f"{owner.path}.{kind}"
    if catalog.available(kind, name):
        return
    if name in GOST_NAMES[kind]:
        yield Problem(path, f"{kind} {name!r} is not available in this version", "unavailable")
    else:
        other = next((each for each in KINDS if name in GOST_NAMES[each]), "")
        hint = f"; {name!r} is a {other}" if other else did_you_mean(name, GOST_NAMES[kind])
        yield Problem(path, f"unknown {kind} {name!r}{hint}", "config.unknown-component")


def _unsupported(section: schema.Section, fields: Collection[str]) -> Iterator[Problem]:
    for each in schema_fields(type(section)):
        names = (f"{type(section).__name__}.{each.key}", f"*.{each.key}")
        if not any(name in fields for name in names):
            continue
        value = getattr(section, each.attribute)
        if value or (each.shape == "section" and value is not None):
            path = f"{section.path}.{each.key}" if section.path else each.key
            yield Problem(path, f"{each.key!r} is not available in this version", "unavailable")


# ---- addresses -------------------------------------------------------------------------------------------------------
def _addresses(config: Config) -> Iterator[Problem]:
    taken: dict[tuple[str, ...], schema.Service] = {}
    for service in config.services:
        listener = service.listener or schema.Listener()
        mode = str(_lookup(listener.metadata, "mode") or "")
        network = listen_network(listener.kind, mode)
        path = f"{service.path}.addr"
        if network == "path":
            if not service.addr:
                yield Problem(service.path, f"a {listener.kind} listener needs a path as addr", "address")
                continue
            where: tuple[str, ...] = (network, service.addr)
        else:
            wrong = patterns.listen_address(service.addr) if network in ("tcp", "udp") else ""
            if wrong:
                yield Problem(path, f"{service.addr[:64]!r} {wrong}", "address")
            endpoint = _bound(service.addr)
            if wrong or network not in ("tcp", "udp") or endpoint is None:
                continue
            netns = str(_lookup(service.metadata, "netns") or "")
            where = (network, endpoint.host, str(endpoint.port), netns)
        other = taken.setdefault(where, service)
        if other is not service and not (_shares(service) and _shares(other)):
            message = f"{service.addr!r} is the address of {other.name or other.path!r} too"
            yield Problem(path, message, "address.duplicate")


def _bound(address: str) -> Endpoint | None:
    """Return what would be bound; None for a port that the kernel chooses."""
    try:
        endpoint = parse_endpoint(address) if address else None
    except ConfigError:
        return None
    if endpoint is None or endpoint.port == 0:
        return None
    return Endpoint("" if endpoint.host in ("", "0.0.0.0", "::") else endpoint.host, endpoint.port)


def _shares(service: schema.Service) -> bool:
    value = _lookup(service.listener.metadata, "reuseport") if service.listener else None
    return value in (True, 1, "true", "1", "t", "T", "TRUE", "True")


def _lookup(metadata: Mapping[str, Any], key: str) -> Any:
    for name, value in metadata.items():
        if name.lower() == key:
            return value
    return None


# ---- advice ----------------------------------------------------------------------------------------------------------
def _advice(config: Config) -> Iterator[Problem]:
    if config.kill_switch:
        message = "'killSwitch' is not available in this version; without it traffic flows as before when gostnet ends"
        yield Problem("killSwitch", message, "unavailable")
    try:
        parse_workers(config.workers)
    except ValueError as exc:
        yield Problem("workers", str(exc), "config.value")
    for service in config.services:
        listener = service.listener or schema.Listener()
        if listener.kind != "udp" or service.forwarder is None:
            continue
        if _lookup(listener.metadata, "keepalive") in (None, False, "false", "0", 0):
            ports = {node.addr.rpartition(":")[2] for node in service.forwarder.nodes}
            if not service.forwarder.nodes or not ports <= {"53", "123"}:
                message = "each client gets one reply; set keepalive=true for what answers more often"
                yield Problem(f"{service.path}.listener", message, "udp.one-reply", "warning")
