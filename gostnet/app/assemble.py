"""From a configuration to services: every object is built here, references are resolved here, nothing is opened."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..config import schema
from ..config.common_options import HandlerOptions, ServiceOptions
from ..core.address import ANY, Endpoint, parse_endpoint
from ..core.contracts import Authenticator, Policies, RateLimiter, Resolver, TrafficLimiter
from ..core.errors import ConfigError
from ..core.log import LEVELS, Logger, open_sink
from ..core.options import Secret, option_keys
from ..core.packets import Packets
from ..core.registry import Catalog
from ..core.resources import MARK_OWN
from ..pipeline.handler import HandlerContext
from ..pipeline.node import Node
from ..pipeline.probe import Probe
from ..pipeline.router import ServiceRouter
from ..pipeline.service import Service
from ..pipeline.transport import Listener, ListenerContext
from ..policies import auth
from ..policies.build import Build, build_authers, build_climiters, build_limiters, build_rlimiters, build_routers
from ..policies.build_books import build_observers, build_quotas, build_recorders, uses_of
from ..policies.merged import MergedBooks
from ..policies.observer import Reporter
from ..policies.quota import Quota
from ..policies.recorders import Records
from ..policies.stats import ServiceBooks
from ..transports.proxy_protocol import ProxyProtocol
from .chains import Chains
from .dialing import Trials
from .parts import Lazy, Parts, bind, own_credentials
from .routes import Routes
from .share import SHARED, Share


@dataclass(slots=True)
class Assembly:
    """A configuration as objects, nothing of it open.

    identity    by service: what decides whether its listening socket can be kept at a reload
    build       the loaders of policies, and the threads they read in
    hooks       by service: the commands of each stage
    trials      of how sockets are made
    probes      run `run()` of each as a task as long as this configuration holds
    """

    services: dict[str, Service]
    identity: dict[str, object]
    log: Logger
    build: Build
    nodes: dict[tuple[str, ...], Node] = field(default_factory=dict)
    hooks: dict[str, ServiceOptions] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    routes: Routes = field(default_factory=Routes)
    trials: Trials = field(default_factory=Trials)


class Assembler:
    """Builds the objects of one configuration. Raise ConfigError or Unavailable for what cannot be built."""

    def __init__(
        self,
        config: schema.Config,
        catalog: Catalog,
        system: Callable[[int], Resolver],
        *,
        lenient: bool = False,
        previous: Assembly | None = None,
        share: Share | None = None,
    ) -> None:
        """`share` is the part of one of several workers."""
        self._config = config
        # Own sockets are marked as soon as anything is captured: that is what keeps them out of the capture.
        captures = any(
            service.listener.kind == "tungo" or any(key.lower() == "capture" for key in service.listener.metadata)
            for service in config.services
            if service.listener is not None
        )
        own_mark = MARK_OWN if captures else 0
        self._hooks: dict[str, ServiceOptions] = {}
        self._share = share
        turn = share.ledger if share is not None else None
        known = {"worker": share.worker} if share is not None and share.totals is None else {}
        self._log = logger_of(config.log, known, turn)
        self._loggers = {
            logger.name: logger_of(logger.log, {**known, "logger": logger.name}, turn) for logger in config.loggers
        }
        parts = self._parts = Parts(config, catalog, system(own_mark), self._log, own_mark=own_mark, lenient=lenient)
        self._chains = Chains(parts, previous.nodes if previous else {})
        build = parts.build
        build.ledger = share.ledger if share is not None else None
        self._authers = build_authers(config, build)
        before = previous.build if previous is not None else None
        self._limiters = build_limiters(config, build, before)
        self._climiters = build_climiters(config, build, before)
        self._rlimiters = build_rlimiters(config, build, before)
        self._routes = Routes(build_routers(config, build))
        self._previous = previous
        self._quotas = build_quotas(config, build, previous.build.quotas if previous else {})
        self._recorders = build_recorders(config, build, previous.build.recorders if previous else {})
        self._observers = build_observers(config, build)
        parts.make_resolvers(self._chains.way)
        self._refuse_problems()

    def _refuse_problems(self) -> None:
        for problem in self._parts.build.problems:
            if problem.severity == "error":
                raise ConfigError(problem.path, problem.message, code=problem.code)

    # ---- the whole -----------------------------------------------------------------------------
    def build(self) -> Assembly:
        """Build everything."""
        services: dict[str, Service] = {}
        identity: dict[str, object] = {}
        for chain in self._config.chains:
            self._chains.chain(chain.name, chain.path)
        for section in self._config.services:
            if section.name in services:
                raise ConfigError(f"{section.path}.name", f"{section.name!r} is used twice", code="duplicate")
            services[section.name] = self._service(section)
            identity[section.name] = _identity(section, self._config)
        self._refuse_problems()
        chains = self._chains
        # What is made lazily holds on to us, and must not hold all the configurations before this one as well.
        self._previous = None
        chains.forget_previous()
        return Assembly(
            services,
            identity,
            self._log,
            self._parts.build,
            chains.nodes,
            self._hooks,
            chains.probes,
            self._routes,
            self._parts.trials,
        )

    # ---- references ----------------------------------------------------------------------------
    def _authenticator(self, section: schema.Handler) -> Authenticator | None:
        found = self._parts.all_named(
            self._authers, section.auther, section.authers, section.path, ("auther", "authers"), "auther"
        )
        named = section.auther or section.authers
        single = section.auth if section.auth is not None and not named else schema.Auth()
        skip = next((value for key, value in section.metadata.items() if key.lower() == "skipauth"), None)
        networks = auth.parse_skipauth(skip, f"{section.path}.metadata.skipauth") if skip else None
        return auth.authenticator_of(found, single.username, single.password, networks)

    def _logger_of(self, section: schema.Service) -> Logger:
        for name in (section.logger, *section.loggers):
            found = self._parts.named(self._loggers, name, f"{section.path}.logger", "logger")
            if found is not None:
                return found
        return self._log

    # ---- services ------------------------------------------------------------------------------
    def _service(self, section: schema.Service) -> Service:
        handler_section = section.handler or schema.Handler(path=f"{section.path}.handler")
        listener_section = section.listener or schema.Listener(path=f"{section.path}.listener")
        options = bind(ServiceOptions, section.metadata, f"{section.path}.metadata")
        self._hooks[section.name] = options
        log = self._logger_of(section).bind(
            kind="service", service=section.name, listener=listener_section.kind, handler=handler_section.kind
        )
        if options.labels:
            log = log.bind(labels=options.labels)
        listener = self._listener(section, listener_section, options, log)
        handler_class = self._parts.component("handler", handler_section.kind, handler_section.path)
        if not issubclass(listener.source.yields, handler_class.accepts):
            shape = listener.source.yields.__name__.lower()
            raise ConfigError(
                f"{handler_section.path}.type",
                f"handler {handler_section.kind!r} cannot work on listener {listener_section.kind!r},"
                f" which yields {shape}",
                code="config.mismatch",
            )
        records = self._records(section, options)
        router = self._router(section, handler_section, options, records, log)
        addresses: dict[Node, tuple[str, str]] = {}
        requests = self._rate_limiter(section)
        ciphered = handler_section.kind in ("tap",)  # there `auth` is no user's
        username, password = own_credentials(handler_section.auth if ciphered else None)
        context = HandlerContext(
            service=section.name,
            path=handler_section.path,
            authenticator=self._authenticator(handler_section),
            username=username,
            password=Secret(password),
            hop=self._chains.forwarder(section, addresses if handler_section.kind == "dns" else None, router),
            addresses=addresses,
            upstream_tls=self._parts.verifying,
            upstream_https=self._parts.verifying_http,
            metadata=handler_section.metadata,
            tls=Lazy(lambda: self._parts.server_tls(handler_section.tls, f"{handler_section.path}.tls")),
            requests=requests,
            netns=options.socket.netns,
            log=log,
        )
        handler = handler_class(
            bind(handler_class.Options, handler_section.metadata, f"{handler_section.path}.metadata"), context
        )
        engine = options.engine
        if engine == "kernel":
            if getattr(handler, "engine", "") != "kernel":
                raise ConfigError(
                    f"{section.path}.metadata.engine",
                    "'kernel' is for port forwards (handlers tcp, udp, forward), asked for in the handler's metadata",
                    code="engine",
                )
            engine = "auto"
        return Service(
            section.name,
            listener,
            handler,
            router,
            self._accept_policies(section, listener, requests, self._books(section, options, listener, records)),
            log,
            engine,
        )

    def _rate_limiter(self, section: schema.Service) -> RateLimiter | None:
        return self._parts.named(self._rlimiters, section.rlimiter, f"{section.path}.rlimiter", "rlimiter")

    def _records(self, section: schema.Service, options: ServiceOptions) -> Records | None:
        for item in section.recorders:
            self._parts.named(self._recorders, item.name, f"{item.path}.name", "recorder")
        uses = uses_of(section.recorders, self._recorders, self._parts.build)
        return Records(section.name, uses, options.labels) if uses else None

    def _books(
        self, section: schema.Service, options: ServiceOptions, listener: Listener, records: Records | None
    ) -> ServiceBooks | None:
        """Return what keeps the service's books, None where nobody would read them."""
        build = self._parts.build
        quotas = self._quotas_of(section)
        by_service = self._reporter(section.observer, f"{section.path}.observer", options.observer_period, states=True)
        handler = section.handler
        by_client = None
        reset_clients = False
        if handler is not None and handler.observer:
            common = bind(HandlerOptions, handler.metadata, f"{handler.path}.metadata")
            by_client = self._reporter(handler.observer, f"{handler.path}.observer", common.observer_period)
            reset_clients = common.observer_reset_traffic
        if not (records or quotas or options.enable_stats or by_service or by_client):
            return None
        before = self._previous.services.get(section.name) if self._previous else None
        known = before.policies.books if before is not None else None
        reporters = [reporter for reporter in (by_service, by_client) if reporter is not None]
        common_to_all: dict[str, Any] = {
            "quotas": quotas,
            "by_client": options.enable_stats or by_client is not None,
            "shown": options.enable_stats,
            "before": known if isinstance(known, ServiceBooks) else None,
        }
        share = self._share
        if share is not None and share.totals is not None:
            books: ServiceBooks = MergedBooks(section.name, share.totals, reporters=reporters, **common_to_all)
        else:
            if share is not None:
                reporters = []  # the supervisor tells of all workers together
            told = options.enable_stats or by_client is not None
            books = ServiceBooks(
                section.name,
                records=records,
                reporters=reporters,
                layered=bool(listener.layers),
                prefaced=listener.preface is not None,
                board=share.board if share is not None and told else None,
                **common_to_all,
            )
        if by_service is not None and options.enable_stats:
            reading = books.reading(f"service {section.observer}", options.observer_reset_traffic)
            by_service.collect = partial(books.service_events, reading)
        if by_client is not None and handler is not None:
            by_client.collect = partial(books.client_events, books.reading(f"client {handler.observer}", reset_clients))
        build.reporters += reporters
        build.reloaders += [books, *reporters]
        return books

    def _quotas_of(self, section: schema.Service) -> list[Quota]:
        names = {name.strip(): f"{section.path}.quotas[{index}]" for index, name in enumerate(section.quotas)}
        found = (self._parts.named(self._quotas, name, path, "quota") for name, path in names.items())
        return [quota for quota in found if quota is not None]

    def _reporter(self, name: str, path: str, period: float, *, states: bool = False) -> Reporter | None:
        observer = self._parts.named(self._observers, name, path, "observer")
        if observer is None:
            return None
        return Reporter(observer, period=period, states=states, report=self._parts.log.warn)

    def _accept_policies(
        self,
        section: schema.Service,
        listener: Listener,
        requests: RateLimiter | None,
        books: ServiceBooks | None,
    ) -> Policies:
        admissions = self._parts.all_named(
            self._parts.admissions,
            section.admission,
            section.admissions,
            section.path,
            ("admission", "admissions"),
            "admission",
        )
        limiter = self._parts.named(self._climiters, section.climiter, f"{section.path}.climiter", "climiter")
        if requests is not None and issubclass(listener.source.yields, Packets):
            # GOST: tun and tap do not ask; their one connection is no request, and refusing it would never end.
            self._parts.log.warn(f"{section.path}.rlimiter has no meaning for a device")
            requests = None
        return Policies(tuple(admissions), limiter, requests, books.quotas if books is not None else (), books)

    def _listener(
        self, section: schema.Service, listener: schema.Listener, options: ServiceOptions, log: Logger
    ) -> Listener:
        stack = self._parts.component("listener", listener.kind, listener.path)
        address = parse_endpoint(section.addr, f"{section.path}.addr") if section.addr else ANY
        forwarder = section.forwarder
        context = ListenerContext(
            service=section.name,
            path=listener.path,
            netns=options.socket.netns,
            tls=lambda alpn: self._parts.server_tls(listener.tls, f"{listener.path}.tls", alpn),
            forwards=forwarder is not None
            and bool(forwarder.nodes or forwarder.hop or forwarder.name or forwarder.hop_group),
            router=lambda name: self._routes.use(name, options.socket.netns),
            log=log,
        )
        metadata = listener.metadata
        shared = self._share is not None and "reuseport" in option_keys(stack.Options)
        if shared:
            metadata = {**{key: value for key, value in metadata.items() if key.lower() != "reuseport"}, **SHARED}
        if self._share is not None and address.port == 0:
            address = Endpoint(address.host, self._share.ports.get(section.name, 0))
        made: Listener = stack.make(address, bind(stack.Options, metadata, f"{listener.path}.metadata"), context)
        made.netns = options.socket.netns
        made.shared = shared
        if options.socket.proxy_protocol > 0:
            if made.source.network == "tcp":
                made.preface = ProxyProtocol()
            else:
                log.warn(f"proxyProtocol has no meaning for the listener {listener.kind!r}")
        return made

    def _router(
        self,
        section: schema.Service,
        handler: schema.Handler,
        options: ServiceOptions,
        records: Records | None,
        log: Logger,
    ) -> ServiceRouter:
        interface = options.socket.interface or section.interface
        mark = options.socket.so_mark or (section.sockopts.mark if section.sockopts else 0)
        if interface or mark or options.netns_out:
            direct = self._parts.direct_by(interface, mark, options.netns_out, section.path)
        else:
            direct = self._parts.direct
        chains = None if options.ignore_chain else self._chains.router(handler, direct)
        traffic: list[TrafficLimiter] = []
        for name, path, scope in (
            (section.limiter, f"{section.path}.limiter", options.limiter_scope),
            (handler.limiter, f"{handler.path}.limiter", "client"),
        ):
            limiter = self._parts.named(self._limiters, name, path, "limiter")
            if limiter is not None:
                traffic.append(limiter.scoped(scope, f"{section.path}.metadata.limiter.scope"))
        return ServiceRouter(
            direct,
            chains,
            bypass=self._parts.bypass(section),
            hosts=self._parts.named(self._parts.hosts, section.hosts, f"{section.path}.hosts", "hosts"),
            resolver=self._parts.named(self._parts.resolvers, section.resolver, f"{section.path}.resolver", "resolver"),
            retries=handler.retries,
            timeout=options.dial_timeout if options.dial_timeout > 0 else 15.0,
            traffic=traffic,
            dials=records if records is not None and records.dials else None,
            log=log,
        )


def _identity(section: schema.Service, config: schema.Config) -> object:
    """What the listening socket depends on: equal ones share it across a reload."""
    listener = section.listener
    if listener is not None and listener.kind in ("tun", "tap"):
        # Its one connection lasts as long as the device, so whatever that connection was begun with counts.
        return (section, config.chains, config.hops, config.authers)
    place = {key.lower(): value for key, value in section.metadata.items() if key.lower() in ("netns",)}
    return (section.addr, listener.kind if listener else "tcp", listener, repr(place))


def logger_of(
    section: schema.Log | None, fields: dict[str, Any], turn: AbstractContextManager[object] | None = None
) -> Logger:
    """Return the logger that a section describes; `turn` is held while it writes."""
    if section is None:
        return Logger(open_sink("stderr", turn), fields=fields)
    level = LEVELS.get(section.level.lower(), LEVELS["info"])
    return Logger(open_sink(section.output, turn), level, text=section.format == "text", fields=fields)
