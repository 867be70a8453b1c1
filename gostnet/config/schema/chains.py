"""Chains, hops and nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.options import Seconds
from .parts import (
    TLS,
    Auth,
    FileLoader,
    Filter,
    HTTPLoader,
    HTTPNode,
    Matcher,
    NodeTLS,
    Plugin,
    Probe,
    RedisLoader,
    Selector,
    SockOpts,
)
from .section import Section, item


@dataclass(frozen=True, slots=True, kw_only=True)
class Connector(Section):
    """The protocol spoken with a node."""

    type: str = item("", keep=True)
    auth: Auth | None = item(None)
    tls: TLS | None = item(None)
    metadata: dict[str, Any] = item({})

    @property
    def kind(self) -> str:
        """The connector's name, `http` unless said otherwise."""
        return self.type or "http"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialer(Section):
    """What carries connections to a node."""

    type: str = item("", keep=True)
    auth: Auth | None = item(None)
    tls: TLS | None = item(None)
    metadata: dict[str, Any] = item({})

    @property
    def kind(self) -> str:
        """The dialer's name, `tcp` unless said otherwise."""
        return self.type or "tcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node(Section):
    """A proxy on the way."""

    name: str = item("", keep=True)
    addr: str = item("")
    network: str = item("")
    bypass: str = item("", ref="bypasses")
    bypasses: tuple[str, ...] = item((), ref="bypasses")
    resolver: str = item("", ref="resolvers")
    hosts: str = item("", ref="hosts")
    connector: Connector | None = item(None)
    dialer: Dialer | None = item(None)
    interface: str = item("")
    netns: str = item("")
    sockopts: SockOpts | None = item(None)
    filter: Filter | None = item(None)
    matcher: Matcher | None = item(None)
    http: HTTPNode | None = item(None)
    tls: NodeTLS | None = item(None)
    probe: Probe | None = item(None)
    metadata: dict[str, Any] = item({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop(Section):
    """Nodes of which a chain uses one."""

    name: str = item("", keep=True)
    interface: str = item("")
    sockopts: SockOpts | None = item(None)
    selector: Selector | None = item(None)
    bypass: str = item("", ref="bypasses")
    bypasses: tuple[str, ...] = item((), ref="bypasses")
    resolver: str = item("", ref="resolvers")
    hosts: str = item("", ref="hosts")
    nodes: tuple[Node, ...] = item(())
    reload: Seconds = item(0.0)
    file: FileLoader | None = item(None)
    redis: RedisLoader | None = item(None)
    http: HTTPLoader | None = item(None)
    plugin: Plugin | None = item(None)
    metadata: dict[str, Any] = item({})

    @property
    def is_reference(self) -> bool:
        """True inside a chain for a hop that says nothing but its name: it stands for the one in the list of hops."""
        return not (self.nodes or self.plugin or self.file or self.redis or self.http)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain(Section):
    """Hops, passed through in order."""

    name: str = item("", keep=True)
    hops: tuple[Hop, ...] = item((), keep=True)
    metadata: dict[str, Any] = item({})
