"""Services: handlers, listeners, forwarders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .parts import TLS, Auth, Filter, HTTPNode, Matcher, NodeTLS, Probe, Selector, SockOpts
from .section import Section, item


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainGroupEntry(Section):
    """One chain of a group; a plain string in a file is its name."""

    chain: str = item("", ref="chains")
    matcher: Matcher | None = item(None)
    probe: Probe | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainGroup(Section):
    """Several chains, one of which is chosen."""

    chains: tuple[ChainGroupEntry, ...] = item(())
    selector: Selector | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler(Section):
    """The protocol spoken with the client."""

    type: str = item("", keep=True)
    retries: int = item(0)
    chain: str = item("", ref="chains")
    chain_group: ChainGroup | None = item(None)
    auther: str = item("", ref="authers")
    authers: tuple[str, ...] = item((), ref="authers")
    auth: Auth | None = item(None)
    tls: TLS | None = item(None)
    limiter: str = item("", ref="limiters")
    observer: str = item("", ref="observers")
    metadata: dict[str, Any] = item({})

    @property
    def kind(self) -> str:
        """The handler's name, `auto` unless said otherwise."""
        return self.type or "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener(Section):
    """What carries connections to the handler."""

    type: str = item("", keep=True)
    chain: str = item("", ref="chains")
    chain_group: ChainGroup | None = item(None)
    auther: str = item("", ref="authers")
    authers: tuple[str, ...] = item((), ref="authers")
    auth: Auth | None = item(None)
    tls: TLS | None = item(None)
    metadata: dict[str, Any] = item({})

    @property
    def kind(self) -> str:
        """The listener's name, `tcp` unless said otherwise."""
        return self.type or "tcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardNode(Section):
    """A target of a forwarder."""

    name: str = item("")
    addr: str = item("")
    network: str = item("")
    bypass: str = item("", ref="bypasses")
    bypasses: tuple[str, ...] = item((), ref="bypasses")
    protocol: str = item("")
    host: str = item("")
    path_: str = item("", name="path")
    filter: Filter | None = item(None)
    matcher: Matcher | None = item(None)
    auth: Auth | None = item(None)
    http: HTTPNode | None = item(None)
    tls: NodeTLS | None = item(None)
    probe: Probe | None = item(None)
    metadata: dict[str, Any] = item({})


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardHop(Section):
    """One hop of a forwarder's group."""

    hop: str = item("", ref="hops")
    matcher: Matcher | None = item(None)
    probe: Probe | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardHopGroup(Section):
    """Several hops, one of which is chosen."""

    hops: tuple[ForwardHop, ...] = item(())
    selector: Selector | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarder(Section):
    """Fixed targets of a service: `hop_group`, else `hop` (or `name`), else `nodes` with `selector`."""

    name: str = item("", ref="hops")
    hop: str = item("", ref="hops")
    selector: Selector | None = item(None)
    nodes: tuple[ForwardNode, ...] = item((), keep=True)
    hop_group: ForwardHopGroup | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderObject(Section):
    """What of a service goes to which recorder."""

    name: str = item("", keep=True, ref="recorders")
    record: str = item("", keep=True)
    metadata: dict[str, Any] = item({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Service(Section):
    """A listener, a handler, and the policies between them."""

    name: str = item("", keep=True)
    addr: str = item("")
    interface: str = item("")
    sockopts: SockOpts | None = item(None)
    admission: str = item("", ref="admissions")
    admissions: tuple[str, ...] = item((), ref="admissions")
    bypass: str = item("", ref="bypasses")
    bypasses: tuple[str, ...] = item((), ref="bypasses")
    resolver: str = item("", ref="resolvers")
    hosts: str = item("", ref="hosts")
    limiter: str = item("", ref="limiters")
    quotas: tuple[str, ...] = item((), ref="quotas")
    climiter: str = item("", ref="climiters")
    rlimiter: str = item("", ref="rlimiters")
    logger: str = item("", ref="loggers")
    loggers: tuple[str, ...] = item((), ref="loggers")
    observer: str = item("", ref="observers")
    rewriter: str = item("", ref="rewriters")
    recorders: tuple[RecorderObject, ...] = item(())
    cache: str = item("", ref="caches")
    handler: Handler | None = item(None)
    listener: Listener | None = item(None)
    forwarder: Forwarder | None = item(None)
    metadata: dict[str, Any] = item({})
