"""From sections of chains, hops and nodes to their objects; and the forward targets, which are nodes as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..config import schema
from ..config.common_options import NodeOptions
from ..core.address import ANY, parse_endpoint
from ..core.egress import Egress
from ..core.errors import ConfigError, Unavailable
from ..core.options import Secret
from ..core.sockets import DEFAULT_KEEPALIVE, Keepalive
from ..pipeline.chain import Chain, ChainGroup, Router
from ..pipeline.connector import ConnectorContext
from ..pipeline.direct import Direct
from ..pipeline.hop import Hop
from ..pipeline.node import Marker, Node
from ..pipeline.router import ServiceRouter
from ..pipeline.selector import Selector, strategy_of
from ..pipeline.transport import StreamDialer, Transport
from ..policies.nameserver import parse_server
from ..transports.proxy_protocol import ProxyProtocol
from .dialing import dial_options
from .parts import Lazy, Parts, bind


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

    def router(self, handler: schema.Handler, direct: Direct) -> Router | None:
        """Return what gives the routes of a handler, None where it has no chain. Raise ConfigError."""
        chains: list[Chain] = []
        if handler.chain:
            chain = self.chain(handler.chain, f"{handler.path}.chain")
            if chain is not None:
                chains.append(chain)
        group = handler.chain_group
        if group is not None:
            for entry in group.chains:
                if entry.matcher is not None or entry.probe is not None:
                    raise Unavailable(f"{entry.path}: matcher and probe are not available in this version")
                chain = self.chain(entry.chain, f"{entry.path}.chain")
                if chain is not None:
                    chains.append(chain)
            return ChainGroup(chains, _selector(group.selector))
        return chains[0] if chains else None

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
            chain = Chain(
                name,
                [self._hop(hop, (name, str(index))) for index, hop in enumerate(section.hops)],
                self._parts.direct,
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
        nodes = [
            self._node(node, section, options, (*key, node.name or str(i))) for i, node in enumerate(section.nodes)
        ]
        return Hop(section.name, nodes, _selector(section.selector), self._parts.bypass(section))

    def _node(self, section: schema.Node, hop: schema.Hop, hop_options: NodeOptions, key: tuple[str, ...]) -> Node:
        _refuse_node(section)
        options = bind(NodeOptions, section.metadata, f"{section.path}.metadata")
        connector_section = section.connector or schema.Connector(path=f"{section.path}.connector")
        dialer_section = section.dialer or schema.Dialer(path=f"{section.path}.dialer")
        stack = self._parts.component("dialer", dialer_section.kind, dialer_section.path)
        dialer_options = bind(stack.Options, dialer_section.metadata, f"{dialer_section.path}.metadata")
        address = parse_endpoint(section.addr, f"{section.path}.addr", default_port=0) if section.addr else ANY
        transport = stack.make(
            dialer_options, lambda: self._parts.client_tls(dialer_section.tls, f"{dialer_section.path}.tls")
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
        marker = _marker(hop.selector, options)
        before = self._previous.get(key)
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
            self._parts.bypass(section),
            self._parts.named(self._parts.hosts, hosts, f"{section.path}.hosts", "hosts"),
            self._parts.named(self._parts.resolvers, resolver, f"{section.path}.resolver", "resolver"),
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
        return Direct(
            self._parts.system, dial_options(interface, mark, netns, self._parts.own_mark, keepalive, section.path)
        )

    def forwarder(self, section: schema.Service, urls: dict[Node, tuple[str, str]] | None) -> Hop | None:
        """Return the targets of a service; `urls` takes how they are written where they may be URLs, else None."""
        forwarder = section.forwarder
        if forwarder is None:
            return None
        if forwarder.hop_group is not None:
            raise Unavailable(f"{forwarder.path}.hopGroup: not available in this version")
        if forwarder.hop or forwarder.name:
            name = forwarder.hop or forwarder.name
            hop = self._parts.named(self._hops, name, f"{forwarder.path}.hop", "hop")
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
        options = bind(NodeOptions, section.metadata, f"{section.path}.metadata")
        target = self._parts.component("connector", "forward", section.path)
        node = Node(
            section.name,
            address,
            Transport("tcp", StreamDialer()),
            target(bind(target.Options, {}, section.path), ConnectorContext()),
            _marker(forwarder.selector, options),
            self._parts.bypass(section),
            weight=options.member.weight,
            backup=options.member.backup,
        )
        if urls is not None:
            urls[node] = (section.addr, path)
        return node


def _refuse_node(section: schema.Node | schema.ForwardNode) -> None:
    """Refuse what would change where traffic goes and is not built: a route that is silently wrong leaks."""
    for kind, value in (("matcher", section.matcher), ("filter", section.filter), ("probe", section.probe)):
        if value is not None:
            raise Unavailable(f"{section.path}.{kind}: not available in this version")


def _selector(section: schema.Selector | None) -> Selector:
    if section is None:
        return Selector()
    return Selector(strategy_of(section.strategy, f"{section.path}.strategy"))


def _marker(section: schema.Selector | None, options: NodeOptions) -> Marker:
    max_fails = options.member.max_fails or (section.max_fails if section else 0)
    fail_timeout = options.member.fail_timeout or (section.fail_timeout if section else 0.0)
    return Marker(max_fails if max_fails > 0 else 1, fail_timeout if fail_timeout > 0 else 10.0)
