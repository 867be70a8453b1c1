"""From a configuration to services: every object is built here, references are resolved here, nothing is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..config import schema
from ..config.common_options import NodeOptions, ServiceOptions, SocketOptions
from ..core.address import ANY, parse_endpoint
from ..core.contracts import Authenticator, Bypass, Layer, Policies, Resolver, TrafficLimiter
from ..core.errors import ConfigError, Unavailable
from ..core.log import LEVELS, Logger, open_sink
from ..core.options import Problem, Secret, bind_options
from ..core.registry import Catalog
from ..core.resources import MARK_OWN
from ..core.sockets import DEFAULT_KEEPALIVE, PLAIN, DialOptions, Keepalive
from ..pipeline.chain import Chain, ChainGroup
from ..pipeline.chain import Router as ChainRouter
from ..pipeline.connector import ConnectorContext
from ..pipeline.direct import Direct
from ..pipeline.handler import HandlerContext
from ..pipeline.hop import Hop
from ..pipeline.node import Marker, Node
from ..pipeline.router import ServiceRouter
from ..pipeline.selector import Selector, strategy_of
from ..pipeline.service import Service
from ..pipeline.transport import Listener, ListenerContext, StreamDialer, Transport
from ..policies import auth
from ..policies.build import (
    Build,
    build_admissions,
    build_authers,
    build_bypasses,
    build_climiters,
    build_hosts,
    build_limiters,
    build_resolvers,
)
from ..policies.bypass import combine
from ..policies.nameserver import parse_server
from ..transports.certificates import Certificates
from ..transports.tls import TlsLayer
from .dialing import dial_options

T = TypeVar("T")


@dataclass(slots=True)
class Assembly:
    """A configuration as objects, nothing of it open.

    identity    by service: what decides whether its listening socket can be kept at a reload
    build       the loaders of policies, and the threads they read in
    hooks       by service: the commands of each stage
    """

    services: dict[str, Service]
    identity: dict[str, object]
    log: Logger
    build: Build
    nodes: dict[tuple[str, ...], Node] = field(default_factory=dict)
    hooks: dict[str, ServiceOptions] = field(default_factory=dict)


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
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._lenient = lenient
        self._previous = previous
        # Own sockets are marked as soon as anything is captured: that is what keeps them out of the capture.
        captures = any(
            any(key.lower() == "capture" for key in service.listener.metadata)
            for service in config.services
            if service.listener is not None
        )
        self._own_mark = MARK_OWN if captures else 0
        self._system = system(self._own_mark)
        self._plain: Sequence[DialOptions] = dial_options("", 0, "", self._own_mark) if self._own_mark else (PLAIN,)
        self._direct = Direct(self._system, self._plain)
        self._certificates = Certificates(config.tls)
        self._chains: dict[str, Chain] = {}
        self._building: list[str] = []
        self.nodes: dict[tuple[str, ...], Node] = {}
        self._hooks: dict[str, ServiceOptions] = {}
        self._log = _logger(config.log, {})
        self._loggers = {logger.name: _logger(logger.log, {"logger": logger.name}) for logger in config.loggers}
        self._verifying = _Lazy(lambda: self._client_tls(schema.TLS(secure=True), "tls"))
        build = self._build = Build(
            resolver=self._system, report=self._log.warn, options=self._plain[0], tls=self._verifying
        )
        self._authers = build_authers(config, build)
        self._admissions = build_admissions(config, build)
        self._bypasses = build_bypasses(config, build)
        self._hosts = build_hosts(config, build)
        self._limiters = build_limiters(config, build)
        self._climiters = build_climiters(config, build)
        self._resolvers = build_resolvers(config, build, self._way_of_chain)
        for problem in build.problems:
            if problem.severity == "error":
                raise ConfigError(problem.path, problem.message, code=problem.code)

    # ---- the whole -----------------------------------------------------------------------------
    def build(self) -> Assembly:
        """Build everything."""
        services: dict[str, Service] = {}
        identity: dict[str, object] = {}
        for chain in self._config.chains:
            self._chain(chain.name, chain.path)
        for section in self._config.services:
            if section.name in services:
                raise ConfigError(f"{section.path}.name", f"{section.name!r} is used twice", code="duplicate")
            services[section.name] = self._service(section)
            identity[section.name] = _identity(section, self._config)
        return Assembly(services, identity, self._log, self._build, self.nodes, self._hooks)

    # ---- references ----------------------------------------------------------------------------
    def _named(self, table: Mapping[str, T], name: str, path: str, what: str) -> T | None:
        """Return the object called `name`, None for "". Raise ConfigError for a name that nothing bears."""
        if not name:
            return None
        found = table.get(name)
        if found is None and not self._lenient:
            raise ConfigError(path, f"there is no {what} {name!r}", code="config.dangling")
        return found

    def _all_named(
        self, table: Mapping[str, T], one: str, many: Sequence[str], path: str, keys: tuple[str, str], what: str
    ) -> list[T]:
        names = [(one, f"{path}.{keys[0]}")] if one else []
        names += [(name, f"{path}.{keys[1]}[{index}]") for index, name in enumerate(many)]
        found = (self._named(table, name, where, what) for name, where in names)
        return [item for item in found if item is not None]

    def _bypass(self, section: schema.Service | schema.Hop | schema.Node | schema.ForwardNode) -> Bypass | None:
        found = self._all_named(
            self._bypasses, section.bypass, section.bypasses, section.path, ("bypass", "bypasses"), "bypass"
        )
        return combine(found)

    def _authenticator(self, section: schema.Handler) -> Authenticator | None:
        found = self._all_named(
            self._authers, section.auther, section.authers, section.path, ("auther", "authers"), "auther"
        )
        named = section.auther or section.authers
        single = section.auth if section.auth is not None and not named else schema.Auth()
        skip = next((value for key, value in section.metadata.items() if key.lower() == "skipauth"), None)
        networks = auth.parse_skipauth(skip, f"{section.path}.metadata.skipauth") if skip else None
        return auth.authenticator_of(found, single.username, single.password, networks)

    def _logger_of(self, section: schema.Service) -> Logger:
        for name in (section.logger, *section.loggers):
            found = self._named(self._loggers, name, f"{section.path}.logger", "logger")
            if found is not None:
                return found
        return self._log

    # ---- services ------------------------------------------------------------------------------
    def _service(self, section: schema.Service) -> Service:
        self._refuse_unbuilt(section)
        handler_section = section.handler or schema.Handler(path=f"{section.path}.handler")
        listener_section = section.listener or schema.Listener(path=f"{section.path}.listener")
        options = _bind(ServiceOptions, section.metadata, f"{section.path}.metadata")
        _refuse_proxy_protocol(options.socket, section.path)
        self._hooks[section.name] = options
        log = self._logger_of(section).bind(
            kind="service", service=section.name, listener=listener_section.kind, handler=handler_section.kind
        )
        listener = self._listener(section, listener_section, options, log)
        handler_class = self._component("handler", handler_section.kind, handler_section.path)
        if not issubclass(listener.source.yields, handler_class.accepts):
            shape = listener.source.yields.__name__.lower()
            raise ConfigError(
                f"{handler_section.path}.type",
                f"handler {handler_section.kind!r} cannot work on listener {listener_section.kind!r},"
                f" which yields {shape}",
                code="config.mismatch",
            )
        addresses: dict[Node, tuple[str, str]] = {}
        context = HandlerContext(
            service=section.name,
            authenticator=self._authenticator(handler_section),
            hop=self._forwarder(section, addresses if handler_section.kind == "dns" else None),
            addresses=addresses,
            upstream_tls=self._verifying,
            metadata=handler_section.metadata,
            tls=_Lazy(lambda: self._server_tls(handler_section.tls, f"{handler_section.path}.tls")),
            netns=options.socket.netns,
            log=log,
        )
        handler = handler_class(
            _bind(handler_class.Options, handler_section.metadata, f"{handler_section.path}.metadata"), context
        )
        return Service(
            section.name,
            listener,
            handler,
            self._router(section, handler_section, options, log),
            self._accept_policies(section),
            log,
        )

    def _refuse_unbuilt(self, section: schema.Service) -> None:
        """Refuse what would silently not hold: limits that are configured must limit."""
        for key, value in (("rlimiter", section.rlimiter), ("quotas", section.quotas)):
            if value:
                raise Unavailable(f"{section.path}.{key}: not available in this version")

    def _accept_policies(self, section: schema.Service) -> Policies:
        admissions = self._all_named(
            self._admissions,
            section.admission,
            section.admissions,
            section.path,
            ("admission", "admissions"),
            "admission",
        )
        limiter = self._named(self._climiters, section.climiter, f"{section.path}.climiter", "climiter")
        return Policies(tuple(admissions), limiter)

    def _listener(
        self, section: schema.Service, listener: schema.Listener, options: ServiceOptions, log: Logger
    ) -> Listener:
        stack = self._component("listener", listener.kind, listener.path)
        address = parse_endpoint(section.addr, f"{section.path}.addr") if section.addr else ANY
        forwarder = section.forwarder
        context = ListenerContext(
            service=section.name,
            path=listener.path,
            netns=options.socket.netns,
            tls=lambda: self._server_tls(listener.tls, f"{listener.path}.tls"),
            forwards=forwarder is not None and bool(forwarder.nodes or forwarder.hop or forwarder.name),
            log=log,
        )
        made: Listener = stack.make(
            address, _bind(stack.Options, listener.metadata, f"{listener.path}.metadata"), context
        )
        made.netns = options.socket.netns
        return made

    def _router(
        self, section: schema.Service, handler: schema.Handler, options: ServiceOptions, log: Logger
    ) -> ServiceRouter:
        interface = options.socket.interface or section.interface
        mark = options.socket.so_mark or (section.sockopts.mark if section.sockopts else 0)
        if interface or mark or options.netns_out:
            ways = dial_options(interface, mark, options.netns_out, self._own_mark, path=section.path)
            direct = Direct(self._system, ways)
        else:
            direct = self._direct
        chains = None if options.ignore_chain else self._chain_router(handler, direct)
        traffic: list[TrafficLimiter] = []
        for name, path, scope in (
            (section.limiter, f"{section.path}.limiter", options.limiter_scope),
            (handler.limiter, f"{handler.path}.limiter", "client"),
        ):
            limiter = self._named(self._limiters, name, path, "limiter")
            if limiter is not None:
                traffic.append(limiter.scoped(scope, f"{section.path}.metadata.limiter.scope"))
        return ServiceRouter(
            direct,
            chains,
            bypass=self._bypass(section),
            hosts=self._named(self._hosts, section.hosts, f"{section.path}.hosts", "hosts"),
            resolver=self._named(self._resolvers, section.resolver, f"{section.path}.resolver", "resolver"),
            retries=handler.retries,
            timeout=options.dial_timeout if options.dial_timeout > 0 else 15.0,
            traffic=traffic,
            log=log,
        )

    # ---- chains --------------------------------------------------------------------------------
    def _chain_router(self, handler: schema.Handler, direct: Direct) -> ChainRouter | None:
        chains: list[Chain] = []
        if handler.chain:
            chain = self._chain(handler.chain, f"{handler.path}.chain")
            if chain is not None:
                chains.append(chain)
        group = handler.chain_group
        if group is not None:
            for entry in group.chains:
                if entry.matcher is not None or entry.probe is not None:
                    raise Unavailable(f"{entry.path}: matcher and probe are not available in this version")
                chain = self._chain(entry.chain, f"{entry.path}.chain")
                if chain is not None:
                    chains.append(chain)
            return ChainGroup(chains, _selector(group.selector))
        return chains[0] if chains else None

    def _way_of_chain(self, name: str, path: str) -> Any:
        """Return the way out through the chain `name`, or the direct one for "": what name servers are asked by."""
        chain = self._chain(name, path) if name else None
        return ServiceRouter(self._direct, chain) if chain is not None else self._direct

    def _chain(self, name: str, path: str) -> Chain | None:
        if name in self._chains:
            return self._chains[name]
        section = self._named({chain.name: chain for chain in self._config.chains}, name, path, "chain")
        if section is None:
            return None
        if name in self._building:
            raise ConfigError(path, f"chain {name!r} needs itself, by way of a resolver's chain", code="config.cycle")
        self._building.append(name)
        try:
            metadata = _bind(NodeOptions, section.metadata, f"{section.path}.metadata")
            chain = Chain(
                name,
                [self._hop(hop, (name, str(index))) for index, hop in enumerate(section.hops)],
                self._direct,
                Marker(max(1, metadata.member.max_fails), metadata.member.fail_timeout or 10.0),
                metadata.member.weight,
                metadata.member.backup,
            )
        finally:
            self._building.pop()
        self._chains[name] = chain
        return chain

    def _hop(self, section: schema.Hop, key: tuple[str, ...]) -> Hop:
        if section.is_reference and section.name:
            found = self._named({hop.name: hop for hop in self._config.hops}, section.name, section.path, "hop")
            section = found or section
        for kind, value in (
            ("plugin", section.plugin),
            ("redis", section.redis),
            ("file", section.file),
            ("http", section.http),
        ):
            if value is not None:
                raise Unavailable(f"{section.path}.{kind}: not available in this version")
        options = _bind(NodeOptions, section.metadata, f"{section.path}.metadata")
        nodes = [
            self._node(node, section, options, (*key, node.name or str(i))) for i, node in enumerate(section.nodes)
        ]
        return Hop(section.name, nodes, _selector(section.selector), self._bypass(section))

    def _node(self, section: schema.Node, hop: schema.Hop, hop_options: NodeOptions, key: tuple[str, ...]) -> Node:
        _refuse_node(section)
        options = _bind(NodeOptions, section.metadata, f"{section.path}.metadata")
        _refuse_proxy_protocol(options.socket, section.path)
        connector_section = section.connector or schema.Connector(path=f"{section.path}.connector")
        dialer_section = section.dialer or schema.Dialer(path=f"{section.path}.dialer")
        stack = self._component("dialer", dialer_section.kind, dialer_section.path)
        dialer_options = _bind(stack.Options, dialer_section.metadata, f"{dialer_section.path}.metadata")
        address = parse_endpoint(section.addr, f"{section.path}.addr", default_port=0) if section.addr else ANY
        transport = stack.make(
            dialer_options, lambda: self._client_tls(dialer_section.tls, f"{dialer_section.path}.tls")
        )
        keepalive: Keepalive = (
            dialer_options.keepalive.value() if hasattr(dialer_options, "keepalive") else DEFAULT_KEEPALIVE
        )
        direct = self._node_direct(section, hop, options, hop_options, keepalive)
        connector_class = self._component("connector", connector_section.kind, connector_section.path)
        auth = connector_section.auth or schema.Auth()
        context = ConnectorContext(
            username=auth.username,
            password=Secret(auth.password),
            tls=_Lazy(lambda: self._client_tls(connector_section.tls, f"{connector_section.path}.tls")),
            name=address.host,
            direct=direct or self._direct,
            resolver=self._system,
            log=self._log.bind(kind="connector", connector=connector_section.kind, node=section.name),
        )
        connector = connector_class(
            _bind(connector_class.Options, connector_section.metadata, f"{connector_section.path}.metadata"), context
        )
        marker = _marker(hop.selector, options)
        before = self._previous.nodes.get(key) if self._previous else None
        if before is not None and before.address == address:
            marker.failures, marker.last = before.marker.failures, before.marker.last
        hosts = section.hosts or hop.hosts
        resolver = section.resolver or hop.resolver
        node = Node(
            section.name,
            address,
            transport,
            connector,
            marker,
            self._bypass(section),
            self._named(self._hosts, hosts, f"{section.path}.hosts", "hosts"),
            self._named(self._resolvers, resolver, f"{section.path}.resolver", "resolver"),
            direct,
            options.member.weight,
            options.member.backup,
        )
        self.nodes[key] = node
        return node

    def _node_direct(
        self,
        section: schema.Node,
        hop: schema.Hop,
        options: NodeOptions,
        hop_options: NodeOptions,
        keepalive: Keepalive,
    ) -> Direct | None:
        interface = options.socket.interface or section.interface or hop_options.socket.interface or hop.interface
        mark = (
            options.socket.so_mark
            or (section.sockopts.mark if section.sockopts else 0)
            or hop_options.socket.so_mark
            or (hop.sockopts.mark if hop.sockopts else 0)
        )
        netns = options.socket.netns or section.netns
        if not (interface or mark or netns or keepalive != DEFAULT_KEEPALIVE):
            return None
        return Direct(self._system, dial_options(interface, mark, netns, self._own_mark, keepalive, section.path))

    def _forwarder(self, section: schema.Service, urls: dict[Node, tuple[str, str]] | None) -> Hop | None:
        """Return the targets of a service; `urls` takes how they are written where they may be URLs, else None."""
        forwarder = section.forwarder
        if forwarder is None:
            return None
        if forwarder.hop_group is not None:
            raise Unavailable(f"{forwarder.path}.hopGroup: not available in this version")
        if forwarder.hop or forwarder.name:
            hop = self._named(
                {hop.name: hop for hop in self._config.hops},
                forwarder.hop or forwarder.name,
                f"{forwarder.path}.hop",
                "hop",
            )
            return self._hop(hop, ("hop", hop.name)) if hop is not None else None
        targets = [self._target(node, forwarder, urls) for node in forwarder.nodes]
        return Hop(section.name, targets, _selector(forwarder.selector))

    def _target(
        self, section: schema.ForwardNode, forwarder: schema.Forwarder, urls: dict[Node, tuple[str, str]] | None
    ) -> Node:
        _refuse_node(section)
        path = f"{section.path}.addr"
        if urls is not None:
            _, address = parse_server(section.addr, path, secure=True)
        elif "://" in section.addr:
            raise Unavailable(f"{section.path}.addr: {section.addr!r}: schemes are not available in this version")
        else:
            address = parse_endpoint(section.addr, path)
        options = _bind(NodeOptions, section.metadata, f"{section.path}.metadata")
        target = self._component("connector", "forward", section.path)
        node = Node(
            section.name,
            address,
            Transport("tcp", StreamDialer()),
            target(_bind(target.Options, {}, section.path), ConnectorContext()),
            _marker(forwarder.selector, options),
            self._bypass(section),
            weight=options.member.weight,
            backup=options.member.backup,
        )
        if urls is not None:
            urls[node] = (section.addr, path)
        return node

    # ---- TLS -----------------------------------------------------------------------------------
    def _server_tls(self, section: schema.TLS | None, path: str) -> Layer:
        return TlsLayer.for_server(section, self._certificates, path)

    def _client_tls(self, section: schema.TLS | None, path: str) -> Layer:
        return TlsLayer.for_client(section, path, certificates=self._certificates)

    def _component(self, kind: Any, name: str, path: str) -> Any:
        try:
            return self._catalog.of(kind).get(name, f"{path}.type")
        except Unavailable as exc:
            raise Unavailable(f"{path}.type: {exc}") from exc


class _Lazy:
    """A TLS layer that is made when a peer first asks for it: most services never do."""

    def __init__(self, make: Callable[[], Layer]) -> None:
        self._make = make
        self._layer: Layer | None = None

    def _get(self) -> Layer:
        if self._layer is None:
            self._layer = self._make()
        return self._layer

    async def server(self, flow: Any, below: Any) -> Any:
        """Run the server side."""
        return await self._get().server(flow, below)

    async def client(self, flow: Any, below: Any, name: str) -> Any:
        """Run the client side."""
        return await self._get().client(flow, below, name)


def _bind(options: type[T], metadata: Mapping[str, Any], path: str) -> T:
    problems: list[Problem] = []
    bound = bind_options(options, metadata, path, set(), problems)
    for problem in problems:
        if problem.severity == "error":
            raise ConfigError(problem.path, problem.message, code=problem.code)
    return bound


def _refuse_node(section: schema.Node | schema.ForwardNode) -> None:
    """Refuse what would change where traffic goes and is not built: a route that is silently wrong leaks."""
    for kind, value in (("matcher", section.matcher), ("filter", section.filter), ("probe", section.probe)):
        if value is not None:
            raise Unavailable(f"{section.path}.{kind}: not available in this version")


def _refuse_proxy_protocol(options: SocketOptions, path: str) -> None:
    if options.proxy_protocol:
        raise Unavailable(f"{path}.metadata.proxyProtocol: not available in this version")


def _selector(section: schema.Selector | None) -> Selector:
    if section is None:
        return Selector()
    return Selector(strategy_of(section.strategy, f"{section.path}.strategy"))


def _marker(section: schema.Selector | None, options: NodeOptions) -> Marker:
    max_fails = options.member.max_fails or (section.max_fails if section else 0)
    fail_timeout = options.member.fail_timeout or (section.fail_timeout if section else 0.0)
    return Marker(max_fails if max_fails > 0 else 1, fail_timeout if fail_timeout > 0 else 10.0)


def _identity(section: schema.Service, config: schema.Config) -> object:
    """What the listening socket depends on: equal ones share it across a reload."""
    listener = section.listener
    if listener is not None and listener.kind == "tun":
        # Its one connection lasts as long as the device, so whatever that connection was begun with counts.
        return (section, config.chains, config.hops, config.authers)
    place = {key.lower(): value for key, value in section.metadata.items() if key.lower() in ("netns",)}
    return (section.addr, listener.kind if listener else "tcp", listener, repr(place))


def _logger(section: schema.Log | None, fields: dict[str, Any]) -> Logger:
    if section is None:
        return Logger(open_sink("stderr"), fields=fields)
    level = LEVELS.get(section.level.lower(), LEVELS["info"])
    return Logger(open_sink(section.output), level, text=section.format == "text", fields=fields)
