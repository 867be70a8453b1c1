"""From the configuration's sections to policy objects by name.

What is wrong is gathered in `Build.problems`, so that a user sees all of it at once; an object with an error is still
made of what is left, for checks, and must not be run. References between objects are the caller's to resolve.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from ..config import schema
from ..config.schema import (
    Admission,
    Auther,
    Bypass,
    Config,
    FileLoader,
    Hosts,
    HTTPLoader,
    Limiter,
    Nameserver,
    Plugin,
    RedisLoader,
    Resolver,
    Router,
)
from ..core import contracts
from ..core.egress import Egress
from ..core.errors import ConfigError
from ..core.options import Problem
from ..core.sockets import PLAIN, DialOptions
from ..core.tasks import in_thread
from . import auth, hosts, limits, routers, traffic
from .admission import AddressAdmission, compile_clients
from .bucket import Clock, Rate
from .bypass import PatternBypass, check_network, compile_patterns
from .entries import Clean, Entry, inline, strip_comment, strip_leading_comment
from .ledger import Ledger
from .loader import FileSource, HTTPSource, Reloader, Report, Source
from .nameserver import TIMEOUT, NameServer, parse_family, parse_path, parse_server, parse_subnet
from .observer import Reporter
from .quota import Quota
from .recorders import Recorder
from .resolver import DNSResolver
from .rules import Rules
from .shared import SharedConnectionLimits, shared_buckets
from .threads import Threads

T = TypeVar("T")
D = TypeVar("D")
R_contra = TypeVar("R_contra", contravariant=True)

LOADER_THREADS: Final = 4
FINISH: Final = 2.0
"""Seconds that observers and recorders have at the end."""


class Attended(Protocol):
    """Something with work beside the services."""

    async def load(self) -> bool:
        """Do what must be done before services begin; return whether it is complete."""

    async def run(self) -> None:
        """Do the rest, until cancelled or until there is none."""


Ways = Callable[[str, str], Egress]
"""Takes the name of a chain ("" for none) and the path of the reference; raises ConfigError if there is no such one."""


@dataclass(slots=True)
class Build:
    """What the builders share, and what they leave beside the objects.

    resolver   looks up the host names in admissions
    report     takes what loaders have to say, one sentence each, for the log
    options    mark, interface and namespace of the loaders' own sockets
    tls        the client side of TLS, which verifies, for name servers; without it they cannot be asked by TLS
    https      the same with HTTP/2 on offer, for those that are asked by HTTPS
    problems   what is wrong with the configuration
    reloaders  await `load()` of each before the services start, then run `run()` of each as a task
    ledger     what this process counts together with the other workers, None where there are none
    limiters, quotas, recorders   what the next configuration takes over, by name; limiters by kind, recorders with
               their sections
    reporters  report a last time at the end
    """

    resolver: contracts.Resolver | None = None
    report: Report | None = None
    options: DialOptions = PLAIN
    tls: contracts.Layer | None = None
    https: contracts.Layer | None = None
    clock: Clock = time.monotonic
    ledger: Ledger | None = None
    problems: list[Problem] = field(default_factory=list)
    reloaders: list[Attended] = field(default_factory=list)
    limiters: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    quotas: dict[str, Quota] = field(default_factory=dict)
    recorders: dict[str, tuple[schema.Recorder, Recorder]] = field(default_factory=dict)
    reporters: list[Reporter] = field(default_factory=list)
    threads: Threads = field(default_factory=lambda: Threads("loader", LOADER_THREADS))

    def close(self) -> None:
        """Let the loaders' threads end."""
        self.threads.close()

    async def aclose(self, successor: Build | None = None) -> None:
        """Report and write what is left, for at most `FINISH` seconds, but not what `successor` has taken over."""
        try:
            async with asyncio.timeout(FINISH):
                for reporter in self.reporters:
                    await reporter.finish()
        except TimeoutError:
            pass
        kept = [] if successor is None else [recorder for _, recorder in successor.recorders.values()]
        for _, recorder in self.recorders.values():
            if recorder not in kept:
                await in_thread(recorder.close, FINISH)
        self.close()

    def note(self, error: ConfigError) -> None:
        """Gather an error."""
        self.problems.append(Problem(error.path, error.reason, error.code))

    def attempt(self, make: Callable[[], T], otherwise: D) -> T | D:
        """Return what `make` makes, or `otherwise` if that is a ConfigError."""
        try:
            return make()
        except ConfigError as exc:
            self.note(exc)
            return otherwise


class _Loadable(Protocol):
    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def reload(self) -> float: ...
    @property
    def file(self) -> FileLoader | None: ...
    @property
    def redis(self) -> RedisLoader | None: ...
    @property
    def http(self) -> HTTPLoader | None: ...
    @property
    def plugin(self) -> Plugin | None: ...


class _Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=_Named)


def named_sections(sections: Sequence[N]) -> Iterator[N]:
    """Yield the sections that something can refer to; of equal names the first."""
    seen = set()
    for section in sections:
        if section.name and section.name not in seen:
            seen.add(section.name)
            yield section


def unavailable(what: str) -> str:
    """Return the message for what this version does not build."""
    return f"{what} is not available in this version"


def _sources(section: _Loadable, build: Build) -> list[Source]:
    """Return file and URL of a section; an empty one is none, as in GOST."""
    path = section.path
    if section.plugin is not None:
        build.note(ConfigError(f"{path}.plugin", unavailable("a plugin"), code="unavailable"))
    if section.redis is not None:
        build.note(ConfigError(f"{path}.redis", unavailable("a Redis loader"), code="unavailable"))
    sources: list[Source] = []
    if section.file is not None and section.file.path_:
        sources.append(FileSource(section.file.path_))
    if section.http is not None and section.http.url:
        loader = section.http
        try:
            sources.append(HTTPSource(loader.url, loader.timeout, build.options, f"{path}.http.url"))
        except ConfigError as exc:
            build.note(exc)
    return sources


def _watch(
    kind: str,
    section: _Loadable,
    build: Build,
    compile: Callable[[Sequence[Entry]], tuple[T, list[Problem]]],
    install: Callable[[T], None],
    *,
    open_without: bool = False,
    clean: Clean = strip_comment,
    settle: Callable[[], Awaitable[Sequence[str]]] | None = None,
) -> None:
    """Add a reloader where there is something to load, or names to look up again.

    open_without    without a line from a source the policy lets everything pass
    """
    sources = _sources(section, build)
    if sources or settle is not None:
        reloader: Reloader[T] = Reloader(
            f"{kind} {section.name}",
            sources,
            compile,
            install,
            build.threads,
            period=section.reload,
            required=open_without and bool(sources),
            clean=clean,
            settle=settle,
            report=build.report,
        )
        build.reloaders.append(reloader)


# ---- admissions, bypasses -----------------------------------------------------------------------
def build_admissions(config: Config, build: Build) -> dict[str, AddressAdmission]:
    """Return the admissions by name."""
    return {section.name: _admission(section, build) for section in named_sections(config.admissions)}


def _admission(section: Admission, build: Build) -> AddressAdmission:
    entries = inline(section.matchers, f"{section.path}.matchers")
    clients, problems = compile_clients(entries)
    build.problems += problems
    admission = AddressAdmission(clients, whitelist=section.whitelist or section.reverse)
    loaded = section.file is not None or section.http is not None
    resolver = build.resolver
    settle = None
    if resolver is not None and (clients.names or loaded):
        settle = partial(admission.resolve_names, resolver)
    _watch(
        "admission",
        section,
        build,
        lambda more: compile_clients([*entries, *more]),
        admission.replace,
        open_without=not entries and not (section.whitelist or section.reverse),
        settle=settle,
    )
    return admission


def build_bypasses(config: Config, build: Build) -> dict[str, PatternBypass]:
    """Return the bypasses by name."""
    return {section.name: _bypass(section, build) for section in named_sections(config.bypasses)}


def _bypass(section: Bypass, build: Build) -> PatternBypass:
    entries = inline(section.matchers, f"{section.path}.matchers")
    patterns, problems = compile_patterns(entries)
    build.problems += problems
    network = build.attempt(lambda: check_network(section.network, f"{section.path}.network"), "")
    bypass = PatternBypass(patterns, whitelist=section.whitelist or section.reverse, network=network)
    _watch(
        "bypass",
        section,
        build,
        lambda more: compile_patterns([*entries, *more]),
        bypass.replace,
        open_without=not entries,
    )
    return bypass


# ---- authers ------------------------------------------------------------------------------------
def build_authers(config: Config, build: Build) -> dict[str, auth.StaticAuthenticator]:
    """Return the authenticators by name."""
    return {section.name: _auther(section, build) for section in named_sections(config.authers)}


def _auther(section: Auther, build: Build) -> auth.StaticAuthenticator:
    passwords = {pair.username: pair.password for pair in section.auths if pair.username}
    auther = auth.StaticAuthenticator(auth.Users(passwords))
    _watch(
        "auther",
        section,
        build,
        lambda more: auth.compile_users(passwords, more),
        auther.replace,
        clean=strip_leading_comment,
    )
    return auther


# ---- hosts, resolvers ---------------------------------------------------------------------------
def build_hosts(config: Config, build: Build) -> dict[str, hosts.StaticHosts]:
    """Return the tables of names by name."""
    return {section.name: _hosts(section, build) for section in named_sections(config.hosts)}


def _hosts(section: Hosts, build: Build) -> hosts.StaticHosts:
    mappings: list[hosts.Mapping] = []
    for mapping in section.mappings:
        found = hosts.parse_mapping(mapping.ip, (mapping.hostname, *mapping.aliases))
        if found is None:
            message = f"{mapping.ip[:64]!r} is not an IP address"
            build.note(ConfigError(f"{mapping.path}.ip", message, code=hosts.CODE))
        elif not mapping.hostname.strip():
            build.note(ConfigError(f"{mapping.path}.hostname", "a mapping needs a name", code=hosts.CODE))
        else:
            mappings += found
    table = hosts.StaticHosts(hosts.HostTable(mappings))
    _watch("hosts", section, build, lambda more: hosts.compile_hosts(mappings, more), table.replace)
    return table


def build_resolvers(config: Config, build: Build, ways: Ways) -> dict[str, DNSResolver]:
    """Return the resolvers by name; `ways` gives the egress of each server's chain."""
    return {section.name: _resolver(section, build, ways) for section in named_sections(config.resolvers)}


def _resolver(section: Resolver, build: Build, ways: Ways) -> DNSResolver:
    if section.plugin is not None:
        build.note(ConfigError(f"{section.path}.plugin", unavailable("a plugin"), code="unavailable"))
    servers = [server for server in section.nameservers if server.addr.strip()]
    made = [_server(server, build, ways) for server in servers]
    if not servers and section.plugin is None:
        build.note(ConfigError(f"{section.path}.nameservers", "a resolver needs a name server", code="config.resolver"))
    return DNSResolver([server for server in made if server is not None], clock=build.clock, report=build.report)


def _server(section: Nameserver, build: Build, ways: Ways) -> NameServer | None:
    path = section.path

    def make() -> NameServer:
        transport, address = parse_server(section.addr, f"{path}.addr", secure=build.tls is not None)
        return NameServer(
            address=address,
            egress=ways(section.chain, f"{path}.chain"),
            transport=transport,
            prefer=parse_family(section.prefer, f"{path}.prefer"),
            only=parse_family(section.only, f"{path}.only"),
            subnet=parse_subnet(section.client_ip, f"{path}.clientIP"),
            ttl=section.ttl,
            timeout=section.timeout if section.timeout > 0 else TIMEOUT,
            stale=section.async_ and section.ttl >= 0,
            tls=build.https or build.tls if transport == "https" else build.tls,
            hostname=section.hostname,
            path=parse_path(section.addr, f"{path}.addr"),
        )

    return build.attempt(make, None)


# ---- routers ------------------------------------------------------------------------------------
def build_routers(config: Config, build: Build) -> dict[str, routers.StaticRouter]:
    """Return the routers by name."""
    return {section.name: _router(section, build) for section in named_sections(config.routers)}


def _router(section: Router, build: Build) -> routers.StaticRouter:
    entries: list[routers.RouteEntry] = []
    for route in section.routes:
        destination, gateway = (route.dst or route.net).strip(), route.gateway.strip()
        key = "dst" if route.dst or not route.net else "net"
        if not destination or not gateway:
            # GOST: leaves it out.
            missing = "dst" if not destination else "gateway"
            build.note(ConfigError(f"{route.path}.{missing}", "a route needs dst and gateway", code=routers.CODE))
        elif wrong := routers.destination_problem(destination):
            build.note(ConfigError(f"{route.path}.{key}", wrong, code=routers.CODE))
        else:
            entries.append(routers.RouteEntry(destination, gateway))
    router = routers.StaticRouter(routers.RouteTable(entries))
    _watch("router", section, build, lambda more: routers.compile_routes(entries, more), router.replace)
    return router


# ---- limiters -----------------------------------------------------------------------------------
def build_limiters(config: Config, build: Build, before: Build | None = None) -> dict[str, traffic.TrafficLimits]:
    """Return the bandwidth limiters by name; those of `before`, the configuration before, go on."""

    def make(name: str, rules: traffic.TrafficRules) -> traffic.TrafficLimits:
        makers = None
        if build.ledger is not None:
            up, down = (shared_buckets(build.ledger, build.clock, "limiter", name, way) for way in ("up", "down"))
            makers = up, down
        return traffic.TrafficLimits(rules, build.clock, makers)

    return _limiters("limiter", config.limiters, build, before, traffic.compile_traffic, make)


def build_climiters(config: Config, build: Build, before: Build | None = None) -> dict[str, limits.ConnectionLimits]:
    """Return the connection limiters by name; those of `before` go on with their counts."""

    def make(name: str, rules: Rules[int]) -> limits.ConnectionLimits:
        if build.ledger is None:
            return limits.ConnectionLimits(rules)
        return SharedConnectionLimits(rules, build.ledger, name)

    return _limiters("climiter", config.climiters, build, before, limits.compile_connections, make)


def build_rlimiters(config: Config, build: Build, before: Build | None = None) -> dict[str, limits.RateLimits]:
    """Return the limiters of requests by name; those of `before` go on with what they have granted."""

    def make(name: str, rules: Rules[Rate]) -> limits.RateLimits:
        maker = None if build.ledger is None else shared_buckets(build.ledger, build.clock, "rlimiter", name)
        return limits.RateLimits(rules, build.clock, maker)

    return _limiters("rlimiter", config.rlimiters, build, before, limits.compile_rates, make)


class _Replaceable(Protocol[R_contra]):
    def replace(self, rules: R_contra) -> None: ...


L = TypeVar("L", bound=_Replaceable[Any])


class _Succession:
    """A limiter of the configuration before: its new rules wait until the new configuration holds."""

    def __init__(self, limiter: _Replaceable[Any], rules: Any) -> None:
        self._limiter = limiter
        self._rules = rules
        self._holds = False

    def install(self, rules: Any) -> None:
        """Take rules, those of the sources included."""
        self._rules = rules
        if self._holds:
            self._limiter.replace(rules)

    async def load(self) -> bool:
        """There is nothing to wait for."""
        return True

    async def run(self) -> None:
        """Put the rules in place."""
        self._holds = True
        self._limiter.replace(self._rules)


def _limiters(
    kind: str,
    sections: Sequence[Limiter],
    build: Build,
    before: Build | None,
    compile: Callable[[Sequence[Entry]], tuple[T, list[Problem]]],
    make: Callable[[str, T], L],
) -> dict[str, L]:
    known: Mapping[str, L] = before.limiters.get(kind, {}) if before is not None else {}
    made: dict[str, L] = {}
    for section in named_sections(sections):
        entries = _limits(section)
        rules, problems = compile(entries)
        build.problems += problems
        limiter = known.get(section.name)
        install: Callable[[T], None]
        if limiter is None:
            limiter = make(section.name, rules)
            install = limiter.replace
        else:
            succession = _Succession(limiter, rules)
            build.reloaders.append(succession)
            install = succession.install
        made[section.name] = limiter
        work = partial(_compile, compile, entries)
        _watch(kind, section, build, work, install, open_without=not entries)
    build.limiters[kind] = made
    return made


def _limits(section: Limiter) -> list[Entry]:
    return inline(section.limits, f"{section.path}.limits")


def _compile(
    compile: Callable[[Sequence[Entry]], tuple[T, list[Problem]]], entries: Sequence[Entry], more: Sequence[Entry]
) -> tuple[T, list[Problem]]:
    """Compile the lines of the configuration, then those of the sources, which count more."""
    return compile([*entries, *more])
