"""The configuration's objects: GOST's schema, field by field, in GOST's order of output.

Every object knows its `path` (such as `services[0].handler`), which takes no part in comparisons, so that equal objects
of two generations compare equal wherever they stand. Durations are seconds, whatever the file said. Lists are tuples.
`None` for a section means that it is absent, which is not the same as empty.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..core.options import Seconds
from .tree import Positions

T = TypeVar("T")
S = TypeVar("S", bound="Section")


@dataclass(frozen=True, slots=True)
class _Spec:
    name: str = ""
    yaml: str = ""
    json: str = ""
    keep_yaml: bool = False
    keep_json: bool = False
    ref: str = ""
    secret: bool = False


def item(
    default: T,
    *,
    name: str = "",
    yaml: str = "",
    json: str = "",
    keep: bool | str = False,
    ref: str = "",
    secret: bool = False,
) -> T:
    """Declare a field of the schema.

    `name` is its key (default: camelCase of the field's name), `yaml` and `json` are the keys of the output where they
    differ. `keep` prints it even if empty (True, or only in "yaml" or "json"). `ref` names the top-level list
    that holds what the field refers to. `secret` values never reach messages.
    """
    spec = _Spec(name, yaml, json, keep in (True, "yaml"), keep in (True, "json"), ref, secret)
    made: Any
    if isinstance(default, dict):
        made = field(default_factory=dict, metadata={"spec": spec})
    else:
        made = field(default=cast(Any, default), metadata={"spec": spec})
    return cast(T, made)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """An object of the configuration."""

    path: str = field(default="", compare=False, repr=False)


# ---- parts that several objects have ---------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class TLSOptions(Section):
    """Fine tuning of a TLS side."""

    min_version: str = item("")
    max_version: str = item("")
    cipher_suites: tuple[str, ...] = item(())
    alpn: tuple[str, ...] = item(())


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS(Section):
    """Certificates and verification of a server or client side, and the generated default certificate."""

    cert_file: str = item("")
    key_file: str = item("")
    ca_file: str = item("")
    secure: bool = item(False)
    server_name: str = item("")
    options: TLSOptions | None = item(None)
    validity: Seconds = item(0.0)
    common_name: str = item("")
    organization: str = item("")
    reject_unknown_sni: bool = item(False, name="rejectUnknownSNI")
    server_names: tuple[str, ...] = item(())


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTLS(Section):
    """TLS from a forwarder to its target."""

    server_name: str = item("")
    secure: bool = item(False)
    options: TLSOptions | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth(Section):
    """A user name and password, or a file that holds them."""

    username: str = item("")
    password: str = item("", secret=True)
    file: str = item("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin(Section):
    """A program that answers in place of an object."""

    type: str = item("", keep=True)
    addr: str = item("", keep=True)
    tls: TLS | None = item(None)
    timeout: Seconds = item(0.0)
    token: str = item("", secret=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLoader(Section):
    """Lines from a file."""

    path_: str = item("", name="path", keep=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisLoader(Section):
    """Entries from a Redis key."""

    addr: str = item("", keep=True)
    db: int = item(0)
    username: str = item("")
    password: str = item("", secret=True)
    key: str = item("")
    type: str = item("")


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPLoader(Section):
    """Lines from a URL."""

    url: str = item("", keep=True)
    timeout: Seconds = item(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SockOpts(Section):
    """Deprecated form of the metadata key so_mark."""

    mark: int = item(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector(Section):
    """How one of several is chosen, and when a failed one is left out."""

    strategy: str = item("", keep=True)
    max_fails: int = item(0, keep=True)
    fail_timeout: Seconds = item(0.0, keep=True)
    max_latency: Seconds = item(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter(Section):
    """Deprecated routing conditions of a node."""

    host: str = item("")
    protocol: str = item("")
    path_: str = item("", name="path")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matcher(Section):
    """A routing rule."""

    rule: str = item("")
    priority: int = item(0)
    body_size: int = item(0, yaml="bodysize")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Section):
    """An active liveness check; `fail_threshold` and `success_threshold` are gostnet's own."""

    type: str = item("", keep=True)
    addr: str = item("", keep="yaml")
    interval: Seconds = item(0.0, keep=True)
    timeout: Seconds = item(0.0, keep=True)
    http_path: str = item("")
    http_host: str = item("")
    http_headers: dict[str, str] = item({})
    expected_status: int = item(0)
    command: str = item("")
    fail_threshold: int = item(0)
    success_threshold: int = item(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class URLRewrite(Section):
    """One substitution in the request path."""

    match: str = item("", json="Match", keep=True)
    replacement: str = item("", json="Replacement", keep=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyRewrite(Section):
    """One substitution in a body."""

    type: str = item("", json="Type", keep=True)
    match: str = item("", json="Match", keep=True)
    replacement: str = item("", json="Replacement", keep=True)
    rewriter: str = item("", ref="rewriters")
    max_chunk_size: int = item(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPNode(Section):
    """What happens to HTTP on its way to a node."""

    host: str = item("")
    header: dict[str, str] = item({})
    request_header: dict[str, str] = item({})
    response_header: dict[str, str] = item({})
    rewrite: tuple[URLRewrite, ...] = item(())
    rewrite_url: tuple[URLRewrite, ...] = item((), name="rewriteURL")
    rewrite_body: tuple[BodyRewrite, ...] = item(())
    rewrite_request_body: tuple[BodyRewrite, ...] = item(())
    rewrite_response_body: tuple[BodyRewrite, ...] = item(())
    fail_codes: str = item("")
    auth: Auth | None = item(None)


# ---- services --------------------------------------------------------------------------------------------------------
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


# ---- chains ----------------------------------------------------------------------------------------------------------
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


# ---- policies --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Auther(Section):
    """Users and their passwords."""

    name: str = item("", keep=True)
    auths: tuple[Auth, ...] = item(())
    reload: Seconds = item(0.0)
    file: FileLoader | None = item(None)
    redis: RedisLoader | None = item(None)
    http: HTTPLoader | None = item(None)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission(Section):
    """Patterns of client addresses."""

    name: str = item("", keep=True)
    reverse: bool = item(False)
    whitelist: bool = item(False)
    matchers: tuple[str, ...] = item(())
    reload: Seconds = item(0.0)
    file: FileLoader | None = item(None)
    redis: RedisLoader | None = item(None)
    http: HTTPLoader | None = item(None)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bypass(Section):
    """Patterns of destinations."""

    name: str = item("", keep=True)
    reverse: bool = item(False)
    whitelist: bool = item(False)
    network: str = item("")
    matchers: tuple[str, ...] = item(())
    reload: Seconds = item(0.0)
    file: FileLoader | None = item(None)
    redis: RedisLoader | None = item(None)
    http: HTTPLoader | None = item(None)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nameserver(Section):
    """A DNS server and how it is asked."""

    addr: str = item("", keep=True)
    chain: str = item("", ref="chains")
    prefer: str = item("")
    client_ip: str = item("", name="clientIP")
    hostname: str = item("")
    ttl: Seconds = item(0.0)
    timeout: Seconds = item(0.0)
    async_: bool = item(False, name="async")
    only: str = item("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolver(Section):
    """DNS servers, asked in order."""

    name: str = item("", keep=True)
    nameservers: tuple[Nameserver, ...] = item(())
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMapping(Section):
    """A name and an address."""

    ip: str = item("", keep=True)
    hostname: str = item("", keep=True)
    aliases: tuple[str, ...] = item(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts(Section):
    """A static table of names."""

    name: str = item("", keep=True)
    mappings: tuple[HostMapping, ...] = item(())
    reload: Seconds = item(0.0)
    file: FileLoader | None = item(None)
    redis: RedisLoader | None = item(None)
    http: HTTPLoader | None = item(None)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressRule(Section):
    """A host name and the tunnel behind it."""

    hostname: str = item("", keep=True)
    endpoint: str = item("", keep=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingress(Section):
    """Host names and tunnels."""

    name: str = item("", keep=True)
    rules: tuple[IngressRule, ...] = item(())
    reload: Seconds = item(0.0)
    file: FileLoader | None = item(None)
    redis: RedisLoader | None = item(None)
    http: HTTPLoader | None = item(None)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route(Section):
    """A destination and its gateway; `net` is an older name of `dst`."""

    net: str = item("")
    dst: str = item("")
    gateway: str = item("", keep=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Router(Section):
    """Routes of tun devices and routing tunnels."""

    name: str = item("", keep=True)
    routes: tuple[Route, ...] = item(())
    reload: Seconds = item(0.0)
    file: FileLoader | None = item(None)
    redis: RedisLoader | None = item(None)
    http: HTTPLoader | None = item(None)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SD(Section):
    """Service discovery."""

    name: str = item("", keep=True)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limiter(Section):
    """Limits of bandwidth, of connections or of requests, a line each."""

    name: str = item("", keep=True)
    limits: tuple[str, ...] = item(())
    reload: Seconds = item(0.0)
    file: FileLoader | None = item(None)
    redis: RedisLoader | None = item(None)
    http: HTTPLoader | None = item(None)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaRedis(Section):
    """A Redis server for quota counters."""

    addr: str = item("", keep=True)
    db: int = item(0)
    username: str = item("")
    password: str = item("", secret=True)
    key: str = item("")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaStore(Section):
    """Where quota counters survive a restart."""

    type: str = item("", keep=True)
    file: str = item("")
    redis: QuotaRedis | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota(Section):
    """A volume that may pass in a span of time."""

    name: str = item("", keep=True)
    limit: str = item("")
    starts_at: str = item("")
    expires_at: str = item("")
    direction: str = item("")
    flush: str = item("")
    store: QuotaStore | None = item(None)


# ---- observation -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation(Section):
    """When a file is renamed and a new one begun; `max_size` in MB, `max_age` in days."""

    max_size: int = item(0)
    max_age: int = item(0)
    max_backups: int = item(0)
    local_time: bool = item(False)
    compress: bool = item(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecorder(Section):
    """Records to a file."""

    path_: str = item("", name="path", keep=True)
    sep: str = item("")
    rotation: Rotation | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TCPRecorder(Section):
    """Records to a TCP server."""

    addr: str = item("", keep=True)
    timeout: Seconds = item(0.0, keep=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPRecorder(Section):
    """Records to a URL."""

    url: str = item("", keep=True)
    timeout: Seconds = item(0.0)
    header: dict[str, str] = item({})


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisRecorder(Section):
    """Records to a Redis key."""

    addr: str = item("", keep=True)
    db: int = item(0)
    username: str = item("")
    password: str = item("", secret=True)
    key: str = item("")
    type: str = item("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder(Section):
    """A sink of records."""

    name: str = item("", keep=True)
    file: FileRecorder | None = item(None)
    tcp: TCPRecorder | None = item(None)
    http: HTTPRecorder | None = item(None)
    redis: RedisRecorder | None = item(None)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriter(Section):
    """A rewriter of bodies."""

    name: str = item("", keep=True)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCache(Section):
    """A cache in memory."""

    ttl: Seconds = item(0.0)
    max_size: int = item(0)
    max_bytes: int = item(0)
    cleanup_interval: Seconds = item(0.0)
    eviction: str = item("")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisCache(Section):
    """A cache in Redis."""

    addr: str = item("", keep=True)
    db: int = item(0)
    username: str = item("")
    password: str = item("", secret=True)
    ttl: Seconds = item(0.0)
    key: str = item("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache(Section):
    """A cache of HTTP responses."""

    name: str = item("", keep=True)
    memory: MemoryCache | None = item(None)
    redis: RedisCache | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer(Section):
    """A receiver of events and statistics."""

    name: str = item("", keep=True)
    plugin: Plugin | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log(Section):
    """Where log entries go, and which."""

    output: str = item("")
    level: str = item("")
    format: str = item("")
    rotation: Rotation | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logger(Section):
    """A log with a name."""

    name: str = item("", keep=True)
    log: Log | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiling(Section):
    """The profiling server."""

    addr: str = item("", keep=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class API(Section):
    """The web API."""

    addr: str = item("", keep=True)
    path_prefix: str = item("")
    accesslog: bool = item(False)
    auth: Auth | None = item(None)
    auther: str = item("", ref="authers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics(Section):
    """The metrics endpoint."""

    addr: str = item("", keep=True)
    path_: str = item("", name="path")
    auth: Auth | None = item(None)
    auther: str = item("", ref="authers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(Section):
    """The whole."""

    services: tuple[Service, ...] = item((), keep=True)
    chains: tuple[Chain, ...] = item(())
    hops: tuple[Hop, ...] = item(())
    authers: tuple[Auther, ...] = item(())
    admissions: tuple[Admission, ...] = item(())
    bypasses: tuple[Bypass, ...] = item(())
    resolvers: tuple[Resolver, ...] = item(())
    hosts: tuple[Hosts, ...] = item(())
    ingresses: tuple[Ingress, ...] = item(())
    routers: tuple[Router, ...] = item(())
    sds: tuple[SD, ...] = item(())
    recorders: tuple[Recorder, ...] = item(())
    rewriters: tuple[Rewriter, ...] = item(())
    caches: tuple[Cache, ...] = item(())
    limiters: tuple[Limiter, ...] = item(())
    quotas: tuple[Quota, ...] = item(())
    climiters: tuple[Limiter, ...] = item(())
    rlimiters: tuple[Limiter, ...] = item(())
    observers: tuple[Observer, ...] = item(())
    loggers: tuple[Logger, ...] = item(())
    tls: TLS | None = item(None)
    log: Log | None = item(None)
    profiling: Profiling | None = item(None)
    api: API | None = item(None)
    metrics: Metrics | None = item(None)
    kill_switch: bool = item(False)
    workers: str = item("")
    positions: Positions = field(default_factory=Positions, compare=False, repr=False)


# ---- what the decoder, the output and the checks know of a class -----------------------------------------------------
@dataclass(frozen=True, slots=True)
class SchemaField:
    """One field: its attribute, its key, and its shape.

    `shape` is one of string, integer, boolean, duration, strings, string map, map, section, sections;
    `section` is the class of the last two.
    """

    attribute: str
    key: str
    shape: str
    section: type[Section] | None
    yaml: str
    json: str
    keep_yaml: bool
    keep_json: bool
    ref: str
    secret: bool


_SHAPES: Final[dict[Any, str]] = {
    str: "string",
    int: "integer",
    bool: "boolean",
    tuple[str, ...]: "strings",
    dict[str, str]: "string map",
    dict[str, Any]: "map",
}


def _shape(hint: Any) -> tuple[str, type[Section] | None]:
    if get_origin(hint) is Annotated:
        return "duration", None
    if hint in _SHAPES:
        return _SHAPES[hint], None
    if get_origin(hint) in (Union, UnionType):
        return "section", cast(type[Section], get_args(hint)[0])
    return "sections", cast(type[Section], get_args(hint)[0])


def _camel(attribute: str) -> str:
    first, *rest = attribute.rstrip("_").split("_")
    return first + "".join(word.capitalize() for word in rest)


def schema_fields(section: type[Section]) -> tuple[SchemaField, ...]:
    """Return the fields of a section class, in order."""
    return _schema_fields(cast(Hashable, section))


@cache
def _schema_fields(section: Any) -> tuple[SchemaField, ...]:
    hints = get_type_hints(section, include_extras=True)
    found = []
    for each in fields(section):
        spec: _Spec | None = each.metadata.get("spec")
        if spec is None:
            continue
        key = spec.name or _camel(each.name)
        shape, inner = _shape(hints[each.name])
        found.append(
            SchemaField(
                each.name,
                key,
                shape,
                inner,
                spec.yaml or key,
                spec.json or key,
                spec.keep_yaml,
                spec.keep_json,
                spec.ref,
                spec.secret,
            )
        )
    return tuple(found)


def walk(section: Section) -> Iterator[Section]:
    """Yield a section and all sections below it, in order."""
    yield section
    for each in schema_fields(type(section)):
        value = getattr(section, each.attribute)
        if each.shape == "section" and value is not None:
            yield from walk(value)
        elif each.shape == "sections":
            for inner in value:
                yield from walk(inner)


@dataclass(frozen=True, slots=True)
class Reference:
    """A name at `path` that must be in the top-level list `target`."""

    path: str
    name: str
    target: str


def references(config: Section) -> Iterator[Reference]:
    """Yield every reference by name in the fields of the schema; a chain's hop without content is one too."""
    for section in walk(config):
        if isinstance(section, Chain):
            for hop in section.hops:
                if hop.is_reference and hop.name:
                    yield Reference(f"{hop.path}.name", hop.name, "hops")
        for each in schema_fields(type(section)):
            if not each.ref:
                continue
            value = getattr(section, each.attribute)
            path = f"{section.path}.{each.key}" if section.path else each.key
            if isinstance(value, str):
                if value:
                    yield Reference(path, value, each.ref)
            else:
                for index, name in enumerate(value):
                    if name:
                        yield Reference(f"{path}[{index}]", name, each.ref)


def named(config: Config) -> Mapping[str, tuple[Any, ...]]:
    """Return the lists of named objects by their key."""
    return {each.key: getattr(config, each.attribute) for each in schema_fields(Config) if each.shape == "sections"}
