"""From sections of chains, hops and nodes to their objects; and the forward targets, which are nodes as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..config import schema
from ..config.common_options import HopOptions, NodeOptions
from ..config.names import listen_network
from ..core.address import ANY, Endpoint, parse_endpoint
from ..core.egress import Egress
from ..core.errors import ConfigError, Unavailable
from ..core.options import Secret
from ..core.sockets import DEFAULT_KEEPALIVE, Keepalive
from ..pipeline.chain import Chain, ChainEntry, ChainGroup, Router
from ..pipeline.connector import ConnectorContext
from ..pipeline.direct import Direct
from ..pipeline.hop import Hop, HopEntry, HopGroup, Targets
from ..pipeline.node import Latency, Marker, Matcher, Node
from ..pipeline.probe import RISE, Check, CommandCheck, EgressCheck, HTTPExchange, NodeCheck, Probe, target_of
from ..pipeline.router import ServiceRouter
from ..pipeline.selector import Selector, strategy_of
from ..pipeline.transport import StreamDialer, Transport
from ..policies.matcher import FilterMatcher, compile_matcher
from ..policies.nameserver import parse_server
from ..transports.proxy_protocol import ProxyProtocol
from .parts import Lazy, Parts, bind

CheckOf = Callable[[Endpoint, HTTPExchange | None], Check]
"""Makes what a probe does from the target, and the exchange with it, that its section names."""


def _through(way: Egress) -> CheckOf:
    """Connect to the probe's target by a way out."""
    return lambda target, exchange: EgressCheck(way, lambda: target, exchange)


def _at(node: Node, way: Egress) -> CheckOf:
    """Connect to the probe's target through a node."""
    return lambda target, exchange: NodeCheck(node, way, target, exchange)


def _chosen(egress: Egress, choose: Callable[[], Endpoint]) -> CheckOf:
    """Connect to one of a forwarder's targets; what the probe names as its own is only a Host field then."""
    return lambda _, exchange: EgressCheck(egress, choose, exchange)


class Chains:
    """Makes each chain once, and keeps the nodes by the place they have in the configuration.

    previous    nodes of the configuration before a reload: what is known of those that stay is kept
    """

    def __init__(self, parts: Parts, previous: Mapping[tuple[str, ...], Node]) -> None:
        self._parts = parts
        self._previous = previous
        self._hops = {hop.name: hop for hop in parts.config.hops}
        self._chains: dict[str, Chain] = {}
        self._building: list[str] = []
        self.nodes: dict[tuple[str, ...], Node] = {}
        self.probes: list[Probe] = []

    def router(self, handler: schema.Handler, direct: Direct) -> Router | None:
        """Return what gives the routes of a handler, None where it has no chain. Raise ConfigError."""
        first = self.chain(handler.chain, f"{handler.path}.chain") if handler.chain else None
        group = handler.chain_group
        if group is None:
            return first
        entries = [ChainEntry(first)] if first is not None else []
        for section in group.chains:
            chain = self.chain(section.chain, f"{section.path}.chain")
            if chain is None:
                continue
            matcher, _ = self._matcher(section.matcher, None)
            # GOST: among chains the length of a rule is no priority.
            entries.append(ChainEntry(chain, matcher, section.matcher.priority if section.matcher else 0))
            if section.probe is not None:
                way = ServiceRouter(direct, chain)
                self._probe(
                    section.probe,
                    f"chain {chain.name}",
                    chain.marker,
                    _through(way),
                )
        return ChainGroup(entries, _selector(group.selector))

    def way(self, name: str, path: str) -> Egress:
        """Return the way out through the chain `name`, or the direct one for "": what name servers are asked by."""
        chain = self.chain(name, path) if name else None
        return ServiceRouter(self._parts.direct, chain) if chain is not None else self._parts.direct

    def chain(self, name: str, path: str) -> Chain | None:
        """Return the chain `name`. Raise ConfigError."""
        if name in self._chains:
            return self._chains[name]
        section = self._parts.named({chain.name: chain for chain in self._parts.config.chains}, name, path, "chain")
        if section is None:
            return None
        if name in self._building:
            raise ConfigError(path, f"chain {name!r} needs itself, by way of a resolver's chain", code="config.cycle")
        self._building.append(name)
        try:
            metadata = bind(NodeOptions, section.metadata, f"{section.path}.metadata")
            hops: list[Hop] = []
            chain = Chain(
                name,
                hops,
                self._parts.direct,
                Marker(max(1, metadata.member.max_fails), metadata.member.fail_timeout or 10.0),
                metadata.member.weight,
                metadata.member.backup,
            )
            for index, hop in enumerate(section.hops):
                hops.append(self._hop(hop, (name, str(index)), chain))
        finally:
            self._building.pop()
        self._chains[name] = chain
        return chain

    def _hop(self, section: schema.Hop, key: tuple[str, ...], chain: Chain | None = None) -> Hop:
        """Make a hop of `chain`, or, without one, the targets of a forwarder."""
        if section.is_reference and section.name:
            found = self._parts.named(
                {hop.name: hop for hop in self._parts.config.hops}, section.name, section.path, "hop"
            )
            section = found or section
        for kind, value in (
            ("plugin", section.plugin),
            ("redis", section.redis),
            ("file", section.file),
            ("http", section.http),
        ):
            if value is not None:
                raise Unavailable(f"{section.path}.{kind}: not available in this version")
        options = bind(NodeOptions, section.metadata, f"{section.path}.metadata")
        on_no_node = bind(HopOptions, section.metadata, f"{section.path}.metadata").on_no_node
        selector = _selector(section.selector)
        nodes: list[Node] = []
        for index, each in enumerate(section.nodes):
            node = self._node(each, section, options, (*key, each.name or str(index)), selector)
            nodes.append(node)
            if chain is not None and each.probe is not None:
                way = chain.way_to(len(chain.hops)) if chain.hops else node.direct or chain.direct
                self._probe(
                    each.probe,
                    f"node {each.name or node.address}",
                    node.marker,
                    _at(node, way),
                    node.latency,
                )
        return Hop(section.name, nodes, selector, self._parts.bypass(section), on_no_node == "direct")

    def _node(
        self,
        section: schema.Node,
        hop: schema.Hop,
        hop_options: NodeOptions,
        key: tuple[str, ...],
        selector: Selector,
    ) -> Node:
        options = bind(NodeOptions, section.metadata, f"{section.path}.metadata")
        connector_section = section.connector or schema.Connector(path=f"{section.path}.connector")
        dialer_section = section.dialer or schema.Dialer(path=f"{section.path}.dialer")
        stack = self._parts.component("dialer", dialer_section.kind, dialer_section.path)
        dialer_options = bind(stack.Options, dialer_section.metadata, f"{dialer_section.path}.metadata")
        address = parse_endpoint(section.addr, f"{section.path}.addr", default_port=0) if section.addr else ANY
        transport = stack.make(
            dialer_options,
            lambda timeout: self._parts.client_tls(
                dialer_section.tls, f"{dialer_section.path}.tls", handshake_timeout=timeout
            ),
        )
        version = options.socket.proxy_protocol or hop_options.socket.proxy_protocol
        if version > 0:
            if stack.connects:
                transport = replace(transport, layers=(ProxyProtocol(version), *transport.layers))
            else:
                self._parts.log.warn(f"proxyProtocol has no meaning for the dialer {dialer_section.kind!r}")
        keepalive: Keepalive = (
            dialer_options.keepalive.value() if hasattr(dialer_options, "keepalive") else DEFAULT_KEEPALIVE
        )
        direct = self._node_direct(section, hop, options, hop_options, keepalive)
        connector_class = self._parts.component("connector", connector_section.kind, connector_section.path)
        auth = connector_section.auth or schema.Auth()
        context = ConnectorContext(
            username=auth.username,
            password=Secret(auth.password),
            tls=Lazy(lambda: self._parts.client_tls(connector_section.tls, f"{connector_section.path}.tls")),
            name=address.host,
            direct=direct or self._parts.direct,
            resolver=self._parts.system,
            log=self._parts.log.bind(kind="connector", connector=connector_section.kind, node=section.name),
        )
        connector = connector_class(
            bind(connector_class.Options, connector_section.metadata, f"{connector_section.path}.metadata"), context
        )
        matcher, priority = self._matcher(section.matcher, section.filter)
        hosts = section.hosts or hop.hosts
        resolver = section.resolver or hop.resolver
        node = Node(
            section.name,
            address,
            transport,
            connector,
            _marker(hop.selector, options),
            self._parts.bypass(section),
            self._parts.named(self._parts.hosts, hosts, f"{section.path}.hosts", "hosts"),
            self._parts.named(self._parts.resolvers, resolver, f"{section.path}.resolver", "resolver"),
            direct,
            options.member.weight,
            options.member.backup,
            priority,
            matcher,
            _latency(selector, section.probe),
        )
        self._keep(key, node, section.probe)
        return node

    def forget_previous(self) -> None:
        """Let go of the nodes before the reload: everything is made."""
        self._previous = {}

    def _keep(self, key: tuple[str, ...], node: Node, probe: schema.Probe | None) -> None:
        """Note a node by its place, and let it go on from what was known of the one there before a reload."""
        self.nodes[key] = node
        before = self._previous.get(key)
        if before is None or before.address != node.address:
            return
        node.marker.take_over(before.marker)
        if probe is None:
            node.marker.down = False  # nothing would ever lift it
        if node.latency is not None and before.latency is not None:
            node.latency.value, node.latency.seen = before.latency.value, before.latency.seen

    def _matcher(self, matcher: schema.Matcher | None, filtered: schema.Filter | None) -> tuple[Matcher | None, int]:
        """Return the matcher of a section, None for none, and its priority. Raise ConfigError."""
        if matcher is not None and matcher.rule:
            compiled = compile_matcher(
                matcher.rule,
                f"{matcher.path}.rule",
                bypasses=self._parts.bypasses,
                admissions=self._parts.admissions,
                body_size=matcher.body_size,
            )
            # GOST: a longer rule is a more special one.
            return compiled, matcher.priority or len(matcher.rule)
        priority = matcher.priority if matcher is not None else 0
        if filtered is not None and (filtered.host or filtered.protocol or filtered.path_):
            return FilterMatcher(filtered.host, filtered.protocol, filtered.path_), priority
        return None, priority

    def _probe(
        self,
        section: schema.Probe,
        name: str,
        marker: Marker,
        check_of: CheckOf,
        latency: Latency | None = None,
    ) -> None:
        """Make a probe: `check_of` makes what it does from the address that the section names."""
        kind = section.type.lower() or "tcp"
        if kind == "cmd":
            check: Check = CommandCheck(section.command)
        elif kind in ("tcp", "http"):
            target = parse_endpoint(section.addr, f"{section.path}.addr", default_port=80)
            exchange = None
            if kind == "http":
                exchange = HTTPExchange.of(
                    section.http_host or section.addr, section.http_path, section.http_headers, section.expected_status
                )
            check = check_of(target, exchange)
        else:
            raise ConfigError(
                f"{section.path}.type", f"{section.type!r} is not one of tcp, http, cmd", code="probe.type"
            )
        self.probes.append(
            Probe(
                name,
                check,
                marker,
                latency,
                interval=section.interval,
                timeout=section.timeout,
                fall=section.fail_threshold or marker.max_fails,
                rise=section.success_threshold or RISE,
                log=self._parts.log.bind(kind="probe"),
            )
        )

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
        return self._parts.direct_by(interface, mark, netns, section.path, keepalive)

    def forwarder(
        self, section: schema.Service, urls: dict[Node, tuple[str, str]] | None, egress: Egress
    ) -> Targets | None:
        """Return the targets of a service; `urls` takes how they are written where they may be URLs, else None.

        egress    the service's way out, by which probes reach targets
        """
        forwarder = section.forwarder
        if forwarder is None:
            return None
        if isinstance(egress, ServiceRouter):
            # The same way, but no probe is a connection of the service's: nobody limits or records it.
            egress = ServiceRouter(
                egress.direct,
                egress.chains,
                bypass=egress.bypass,
                hosts=egress.hosts,
                resolver=egress.resolver,
                timeout=egress.timeout,
            )
        if forwarder.hop_group is not None:
            return self._hop_group(section, forwarder.hop_group, egress)
        if forwarder.hop or forwarder.name:
            return self._forward_hop(
                section, forwarder.hop or forwarder.name, f"{forwarder.path}.hop", ("hop", section.name), egress
            )
        selector = _selector(forwarder.selector)
        targets = [
            self._target(node, section, (section.name, "forward", node.name or str(index)), selector, urls, egress)
            for index, node in enumerate(forwarder.nodes)
        ]
        return Hop(section.name, targets, selector)

    def _forward_hop(
        self, service: schema.Service, name: str, path: str, key: tuple[str, ...], egress: Egress
    ) -> Hop | None:
        """Return the hop `name` as targets: of its nodes the addresses count, connectors and dialers do not."""
        section = self._parts.named(self._hops, name, path, "hop")
        if section is None:
            return None
        hop = self._hop(section, (*key, name))
        for node, each in zip(hop.nodes, section.nodes, strict=True):
            if each.probe is not None:
                self._target_probe(each.probe, node, egress)
        return hop

    def _hop_group(self, service: schema.Service, group: schema.ForwardHopGroup, egress: Egress) -> HopGroup:
        entries: list[HopEntry] = []
        for index, section in enumerate(group.hops):
            hop = self._forward_hop(
                service, section.hop, f"{section.path}.hop", ("hops", service.name, str(index)), egress
            )
            if hop is None:
                continue
            matcher, _ = self._matcher(section.matcher, None)
            entry = HopEntry(hop, matcher, priority=section.matcher.priority if section.matcher else 0)
            entries.append(entry)
            if section.probe is not None:
                self._probe(
                    section.probe,
                    f"hop {hop.name}",
                    entry.marker,
                    _chosen(egress, target_of(hop)),
                )
        return HopGroup(service.name, entries, _selector(group.selector))

    def _target_probe(self, section: schema.Probe, node: Node, egress: Egress) -> None:
        self._probe(
            section,
            f"target {node.name or node.address}",
            node.marker,
            _chosen(egress, lambda: node.address),
            node.latency,
        )

    def _target(
        self,
        section: schema.ForwardNode,
        service: schema.Service,
        key: tuple[str, ...],
        selector: Selector,
        urls: dict[Node, tuple[str, str]] | None,
        egress: Egress,
    ) -> Node:
        path = f"{section.path}.addr"
        if urls is not None:
            _, address = parse_server(section.addr, path, secure=True)
        elif "://" in section.addr:
            raise Unavailable(f"{section.path}.addr: {section.addr!r}: schemes are not available in this version")
        else:
            address = parse_endpoint(section.addr, path)
        _refuse_network(section, service)
        options = bind(NodeOptions, section.metadata, f"{section.path}.metadata")
        target = self._parts.component("connector", "forward", section.path)
        filtered = section.filter or schema.Filter(host=section.host, protocol=section.protocol, path_=section.path_)
        matcher, priority = self._matcher(section.matcher, filtered)
        forwarder = service.forwarder
        node = Node(
            section.name,
            address,
            Transport("tcp", StreamDialer()),
            target(bind(target.Options, {}, section.path), ConnectorContext()),
            _marker(forwarder.selector if forwarder else None, options),
            self._parts.bypass(section),
            weight=options.member.weight,
            backup=options.member.backup,
            priority=priority,
            matcher=matcher,
            latency=_latency(selector, section.probe),
        )
        if urls is not None:
            urls[node] = (section.addr, path)
        self._keep(key, node, section.probe)
        if section.probe is not None:
            self._target_probe(section.probe, node, egress)
        return node


def _refuse_network(section: schema.ForwardNode, service: schema.Service) -> None:
    """Refuse to reach a target by another network than the clients come by."""
    listener = service.listener or schema.Listener()
    mode = next((str(value) for key, value in listener.metadata.items() if key.lower() == "mode"), "")
    if section.network and section.network.lower() != listen_network(listener.kind, mode):
        raise Unavailable(
            f"{section.path}.network: {section.network!r} behind a {listener.kind} listener is not available"
            " in this version"
        )


def _latency(selector: Selector, probe: schema.Probe | None) -> Latency | None:
    return Latency(probed=probe is not None) if selector.measures else None


def _selector(section: schema.Selector | None) -> Selector:
    if section is None:
        return Selector()
    return Selector(strategy_of(section.strategy, f"{section.path}.strategy"), section.max_latency)


def _marker(section: schema.Selector | None, options: NodeOptions) -> Marker:
    max_fails = options.member.max_fails or (section.max_fails if section else 0)
    fail_timeout = options.member.fail_timeout or (section.fail_timeout if section else 0.0)
    return Marker(max_fails if max_fails > 0 else 1, fail_timeout if fail_timeout > 0 else 10.0)
