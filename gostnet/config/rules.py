"""What the fields of each section must hold, beyond their types: one function a class, no look beyond the section.

GOST takes nearly all of these faults silently and does something else than was written; that is why they are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from ..core.address import parse_endpoint, parse_ip
from ..core.errors import ConfigError
from ..core.options import Problem
from ..core.suggest import did_you_mean
from ..core.units import parse_nanoseconds, parse_size
from . import patterns, schema
from .common_options import mark_problem
from .matcher import RuleError, parse_rule
from .names import PATH_SCHEMES

_STRATEGIES: Final = (
    *("round", "rr", "random", "rand", "fifo", "ha", "hash"),
    *("parallel", "lowestlatency", "lowest", "ll"),
)
_NODE_ONLY: Final = frozenset(("parallel", "lowestlatency", "lowest", "ll"))
_LEVELS: Final = ("trace", "debug", "info", "warn", "error", "fatal")
_FORMATS: Final = ("json", "text")
_TLS_VERSIONS: Final = ("VersionTLS10", "VersionTLS11", "VersionTLS12", "VersionTLS13")
_RECORDS: Final = (
    "recorder.service.client.address",
    "recorder.service.router.dial.address",
    "recorder.service.router.dial.address.error",
    "recorder.service.handler",
    "recorder.service.handler.serial",
    "recorder.service.handler.tunnel",
)
_INSTANT: Final = re.compile(
    r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
    r"(Z|[-+]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FAMILIES: Final = ("ipv4", "ipv6", "ip4", "ip6")


def problems(section: schema.Section) -> Iterator[Problem]:
    """Yield what is wrong within one section."""
    rule = _RULES.get(type(section))
    if rule is not None:
        yield from rule(section)


def _value(path: str, value: str, wrong: str, code: str) -> Iterator[Problem]:
    if wrong:
        yield Problem(path, f"{value[:64]!r} {wrong}", code)


def _choice(path: str, value: str, known: tuple[str, ...], code: str) -> Iterator[Problem]:
    """Yield a problem for a word that is not one of `known`; "" is always the default."""
    if value and value.lower() not in {word.lower() for word in known}:
        listed = ", ".join(known)
        yield Problem(path, f"{value[:64]!r} is not one of {listed}{did_you_mean(value, known)}", code)


def _lines(path: str, lines: tuple[str, ...], check: Callable[[str], str], code: str) -> Iterator[Problem]:
    for index, line in enumerate(lines):
        yield from _value(f"{path}[{index}]", line, check(line), code)


# ---- parts -----------------------------------------------------------------------------------------------------------
def _tls(tls: schema.TLS) -> Iterator[Problem]:
    if bool(tls.cert_file) != bool(tls.key_file):
        missing = "keyFile" if tls.cert_file else "certFile"
        yield Problem(tls.path, f"a certificate needs both files; {missing} is missing", "tls.pair")


def _tls_options(options: schema.TLSOptions) -> Iterator[Problem]:
    yield from _choice(f"{options.path}.minVersion", options.min_version, _TLS_VERSIONS, "tls.version")
    yield from _choice(f"{options.path}.maxVersion", options.max_version, _TLS_VERSIONS, "tls.version")


def _selector(selector: schema.Selector) -> Iterator[Problem]:
    path = f"{selector.path}.strategy"
    yield from _choice(path, selector.strategy, _STRATEGIES, "selector.strategy")
    group = "chainGroup." in selector.path or "hopGroup." in selector.path
    if group and selector.strategy.lower() in _NODE_ONLY:
        yield Problem(
            path, f"{selector.strategy!r} works among nodes only, not among chains or hops", "selector.strategy"
        )


def _probe(probe: schema.Probe) -> Iterator[Problem]:
    yield from _choice(f"{probe.path}.type", probe.type, ("tcp", "http", "cmd"), "probe.type")
    kind = probe.type.lower()
    needed, value = ("command", probe.command) if kind == "cmd" else ("addr", probe.addr)
    if not value:
        yield Problem(probe.path, f"has no {needed}; nothing would be probed", "probe.incomplete")
    elif kind != "cmd":
        yield from _value(f"{probe.path}.addr", probe.addr, patterns.node_address(probe.addr), "address")
    for key, number in (("interval", probe.interval), ("timeout", probe.timeout)):
        if number < 0 or 0 < number < 0.01:
            yield Problem(
                f"{probe.path}.{key}",
                f"{number:g}s is too short; write a unit, as in 30s: a bare number counts nanoseconds",
                "probe.time",
            )
    for key, count in (("failThreshold", probe.fail_threshold), ("successThreshold", probe.success_threshold)):
        if count < 0:
            yield Problem(f"{probe.path}.{key}", f"{count} is less than 0", "probe.threshold")
    if probe.expected_status and not 100 <= probe.expected_status <= 599:
        yield Problem(f"{probe.path}.expectedStatus", f"{probe.expected_status} is no status of HTTP", "probe.status")
    if probe.http_path and (not probe.http_path.startswith("/") or any(ord(char) <= 32 for char in probe.http_path)):
        yield Problem(f"{probe.path}.httpPath", f"{probe.http_path[:64]!r} does not begin with /", "probe.path")
    for name, text in (("Host", probe.http_host), *probe.http_headers.items()):
        if not _HEADER.fullmatch(name) or any(ord(char) < 32 for char in text):
            yield Problem(f"{probe.path}.httpHeaders", f"{name[:64]!r} is not a header and its value", "probe.header")


def _matcher(matcher: schema.Matcher) -> Iterator[Problem]:
    if not matcher.rule:
        return
    try:
        parse_rule(matcher.rule)
    except RuleError as exc:
        yield Problem(f"{matcher.path}.rule", str(exc), "matcher.rule")


def _sockopts(sockopts: schema.SockOpts) -> Iterator[Problem]:
    wrong = mark_problem(sockopts.mark)
    if wrong:
        yield Problem(f"{sockopts.path}.mark", wrong, "so_mark.reserved")


def _plugin(plugin: schema.Plugin) -> Iterator[Problem]:
    if not plugin.addr:
        yield Problem(plugin.path, "has no addr", "plugin.addr")
    elif plugin.type.lower() == "http" and "://" not in plugin.addr and ".observers[" not in f".{plugin.path}":
        yield Problem(
            f"{plugin.path}.addr", f"{plugin.addr!r} is not a URL such as http://127.0.0.1:8000", "plugin.addr"
        )


def _file_loader(loader: schema.FileLoader) -> Iterator[Problem]:
    if not loader.path_:
        yield Problem(loader.path, "has no path", "loader.incomplete")


def _http_loader(loader: schema.HTTPLoader) -> Iterator[Problem]:
    if not loader.url.startswith(("http://", "https://")):
        yield Problem(
            f"{loader.path}.url", f"{loader.url[:64]!r} is not a URL that begins with http://", "loader.incomplete"
        )


def _redis_loader(loader: schema.RedisLoader) -> Iterator[Problem]:
    if not loader.addr:
        yield Problem(loader.path, "has no addr", "loader.incomplete")


# ---- services and chains ---------------------------------------------------------------------------------------------
def _server_auth(path: str, auth: schema.Auth | None) -> Iterator[Problem]:
    if auth is None:
        return
    if auth.password and not auth.username:
        yield Problem(path, "a password without a user name protects nothing: everybody is let in", "auth.no-username")
    elif auth.username and not auth.password:
        yield Problem(path, f"user {auth.username!r} is let in with any password", "auth.any-password", "warning")


def _ca_without_certificate(tls: schema.TLS | None) -> Iterator[Problem]:
    if tls is not None and tls.ca_file and not tls.cert_file:
        message = "clients are only verified by a server that has certFile and keyFile too"
        yield Problem(f"{tls.path}.caFile", message, "tls.ca-ignored")


def _handler(handler: schema.Handler) -> Iterator[Problem]:
    if handler.kind not in ("ss", "ssu", "tap"):
        yield from _server_auth(f"{handler.path}.auth", handler.auth)
    if handler.auth and handler.auth.username and (handler.auther or handler.authers):
        yield Problem(f"{handler.path}.auth", "is not used because there is an auther", "auth.unused", "warning")
    if handler.retries < 0:
        yield Problem(f"{handler.path}.retries", f"{handler.retries} is less than 0", "handler.retries")
    yield from _ca_without_certificate(handler.tls)


_NO_TLS: Final = frozenset(
    ("tcp", "udp", "ws", "mws", "red", "redir", "redirect", "rtcp", "rudp", "unix", "runix", "serial", "stdio")
)


def _listener(listener: schema.Listener) -> Iterator[Problem]:
    keys = any(key.lower() == "authorizedkeys" for key in listener.metadata)
    if listener.kind in ("ssh", "sshd") and not keys:
        yield from _server_auth(f"{listener.path}.auth", listener.auth)
    if listener.kind not in _NO_TLS:
        yield from _ca_without_certificate(listener.tls)
    elif listener.tls is not None and (listener.tls.cert_file or listener.tls.ca_file):
        message = f"a {listener.kind} listener speaks no TLS; its certificate is not used"
        yield Problem(f"{listener.path}.tls", message, "tls.unused", "warning")


def _service(service: schema.Service) -> Iterator[Problem]:
    """Check what a listener would pass over: an error unless the handler says the same thing and does it."""
    listener = service.listener or schema.Listener(path=f"{service.path}.listener")
    handler = service.handler or schema.Handler(path=f"{service.path}.handler")
    if listener.kind not in ("ssh", "sshd") and (listener.auth or listener.auther or listener.authers):
        message = f"a {listener.kind} listener asks for no credentials; give them to the handler"
        covered = handler.auth is not None or bool(handler.auther or handler.authers)
        yield Problem(f"{listener.path}.auth", message, "auth.unused", "warning" if covered else "error")
    if handler.kind in ("tun", "tap") and service.forwarder is not None:
        yield from _tunnel_targets(service, service.forwarder)
    reverse = listener.kind in ("rtcp", "rudp", "runix")
    if (listener.chain or listener.chain_group) and not reverse:
        message = f"a {listener.kind} listener does not use a chain; give it to the handler"
        covered = bool(handler.chain) or handler.chain_group is not None
        yield Problem(f"{listener.path}.chain", message, "chain.unused", "warning" if covered else "error")


def _tunnel_targets(service: schema.Service, forwarder: schema.Forwarder) -> Iterator[Problem]:
    """Check that the servers of a tunnel have ports: GOST begins all the same, and dials them in vain for ever."""
    for node in forwarder.nodes:
        host = node.addr.removesuffix(":0").removesuffix(":")
        if "://" in host or not host:
            continue
        try:
            port = parse_endpoint(node.addr).port
        except ConfigError:
            if ":" in host and parse_ip(host) is None:
                continue  # the rule of forward nodes says what is wrong
            port = 0
        if not port:
            own = service.addr.rpartition(":")[2]
            likely = own if own.isdecimal() and int(own) else "8421"
            written = f"[{host}]" if ":" in host and not host.startswith("[") else host
            wrong = f"has no port, and a tunnel has no usual one; write it, as in {written}:{likely}"
            yield from _value(f"{node.path}.addr", node.addr, wrong, "address")


def _recorder_object(record: schema.RecorderObject) -> Iterator[Problem]:
    if not record.name:
        yield Problem(record.path, "has no name of a recorder", "recorder.name")
    yield from _choice(f"{record.path}.record", record.record, _RECORDS, "recorder.record")


def _forwarder(forwarder: schema.Forwarder) -> Iterator[Problem]:
    if not (forwarder.hop_group or forwarder.hop or forwarder.name or forwarder.nodes):
        yield Problem(forwarder.path, "has no nodes and no hop", "forwarder.empty")


def _forward_node(node: schema.ForwardNode) -> Iterator[Problem]:
    yield from _choice(f"{node.path}.network", node.network, ("tcp", "udp"), "forwarder.network")
    if not node.addr.startswith(("/", "./", "@")):
        yield from _value(f"{node.path}.addr", node.addr, patterns.target_address(node.addr), "address")


def _chain(chain: schema.Chain) -> Iterator[Problem]:
    if not chain.hops:
        yield Problem(chain.path, "has no hops; traffic would go out directly", "chain.empty")
    for hop in chain.hops:
        if hop.is_reference and not hop.name:
            yield Problem(hop.path, "has no nodes; traffic would leave the chain here", "hop.empty")


def _hop_group(group: schema.ForwardHopGroup) -> Iterator[Problem]:
    if not group.hops:
        yield Problem(group.path, "has no hops", "forwarder.empty")
    for entry in group.hops:
        if not entry.hop:
            yield Problem(entry.path, "names no hop", "hop.empty")


def _chain_group(group: schema.ChainGroup) -> Iterator[Problem]:
    for entry in group.chains:
        if not entry.chain:
            yield Problem(entry.path, "names no chain; traffic would go out directly", "chain.empty")


def _node(node: schema.Node) -> Iterator[Problem]:
    kinds = {node.connector.kind if node.connector else "http", node.dialer.kind if node.dialer else "tcp"}
    if kinds & {"direct", "virtual"} or kinds & PATH_SCHEMES:
        return
    yield from _value(f"{node.path}.addr", node.addr, patterns.node_address(node.addr), "address")


def _dialer(dialer: schema.Dialer) -> Iterator[Problem]:
    if dialer.auth is not None and dialer.kind not in ("ssh", "sshd"):
        message = f"a {dialer.kind} dialer sends no credentials; give them to the connector"
        yield Problem(f"{dialer.path}.auth", message, "auth.unused", "warning")


# ---- policies --------------------------------------------------------------------------------------------------------
def _auther(auther: schema.Auther) -> Iterator[Problem]:
    for auth in auther.auths:
        if not auth.username:
            yield Problem(auth.path, "has no user name and is passed over", "auth.no-username")
        else:
            yield from _server_auth(auth.path, auth)


def _admission(admission: schema.Admission) -> Iterator[Problem]:
    yield from _lines(f"{admission.path}.matchers", admission.matchers, patterns.admission, "pattern.admission")


def _bypass(bypass: schema.Bypass) -> Iterator[Problem]:
    yield from _lines(f"{bypass.path}.matchers", bypass.matchers, patterns.bypass, "pattern.bypass")
    yield from _choice(f"{bypass.path}.network", bypass.network, ("tcp", "udp"), "bypass.network")


def _nameserver(server: schema.Nameserver) -> Iterator[Problem]:
    yield from _value(f"{server.path}.addr", server.addr, patterns.name_server(server.addr), "resolver.addr")
    yield from _choice(f"{server.path}.prefer", server.prefer, _FAMILIES[:2], "resolver.family")
    yield from _choice(f"{server.path}.only", server.only, _FAMILIES, "resolver.family")
    if server.client_ip and parse_ip(server.client_ip) is None:
        yield Problem(f"{server.path}.clientIP", f"{server.client_ip[:64]!r} is not an address", "address")


def _host_mapping(mapping: schema.HostMapping) -> Iterator[Problem]:
    if parse_ip(mapping.ip) is None:
        yield Problem(f"{mapping.path}.ip", f"{mapping.ip[:64]!r} is not an address", "hosts.ip")
    if not mapping.hostname:
        yield Problem(mapping.path, "has no hostname", "hosts.name")


def _ingress_rule(rule: schema.IngressRule) -> Iterator[Problem]:
    if not (rule.hostname and rule.endpoint):
        yield Problem(rule.path, "needs hostname and endpoint", "ingress.incomplete")


def _route(route: schema.Route) -> Iterator[Problem]:
    if not (route.dst or route.net) or not route.gateway:
        yield Problem(route.path, "needs dst and gateway", "router.incomplete")
    elif route.net and not route.dst and not patterns.is_network(route.net):
        yield Problem(f"{route.path}.net", f"{route.net[:64]!r} is not a network such as 10.0.0.0/8", "network")
    elif "/" in route.dst and not patterns.is_network(route.dst):
        yield Problem(f"{route.path}.dst", f"{route.dst[:64]!r} is not a network such as 10.0.0.0/8", "network")


def _limiter(limiter: schema.Limiter) -> Iterator[Problem]:
    kind = limiter.path.partition("[")[0]
    check = {"climiters": patterns.connection_limit, "rlimiters": patterns.rate_limit}.get(kind, patterns.traffic_limit)
    yield from _lines(f"{limiter.path}.limits", limiter.limits, check, "limit")
    for index, line in enumerate(limiter.limits):
        if check is not patterns.traffic_limit and not check(line) and patterns.limits_nothing(line):
            path = f"{limiter.path}.limits[{index}]"
            yield Problem(path, f"{line[:64]!r} limits nothing: 0 is no limit", "limit.zero", "warning")


def _quota(quota: schema.Quota) -> Iterator[Problem]:
    if quota.limit and quota.limit != "0":
        try:
            parse_size(quota.limit)
        except ValueError:
            wrong = f"{quota.limit[:64]!r} is not a size such as 10GB, and would limit nothing"
            yield Problem(f"{quota.path}.limit", wrong, "limit")
    for key, value in (("startsAt", quota.starts_at), ("expiresAt", quota.expires_at)):
        if value and not _INSTANT.fullmatch(value):
            wrong = f"{value[:64]!r} is not a time such as 2026-01-31T00:00:00Z"
            yield Problem(f"{quota.path}.{key}", wrong, "quota.time")
    yield from _choice(f"{quota.path}.direction", quota.direction, ("in", "out", "total"), "quota.direction")
    if quota.flush:
        try:
            parse_nanoseconds(quota.flush)
        except ValueError:
            yield Problem(f"{quota.path}.flush", f"{quota.flush[:64]!r} is not a duration such as 10s", "config.type")


def _quota_store(store: schema.QuotaStore) -> Iterator[Problem]:
    yield from _choice(f"{store.path}.type", store.type, ("file", "redis"), "quota.store")
    if store.type.lower() == "redis":
        yield Problem(f"{store.path}.type", "'redis' saves nothing; use file", "quota.store")


# ---- observation -----------------------------------------------------------------------------------------------------
def _log(log: schema.Log) -> Iterator[Problem]:
    yield from _choice(f"{log.path}.level", log.level, _LEVELS, "log.level")
    yield from _choice(f"{log.path}.format", log.format, _FORMATS, "log.format")


def _logger(logger: schema.Logger) -> Iterator[Problem]:
    if logger.log is None:
        yield Problem(logger.path, "has no log and receives nothing", "logger.empty", "warning")


def _api(api: schema.API) -> Iterator[Problem]:
    if not api.addr:
        yield Problem(api.path, "has no addr; it would listen on a random port of all interfaces", "address")
    elif not api.addr.startswith("unix://"):
        yield from _value(f"{api.path}.addr", api.addr, patterns.listen_address(api.addr), "address")
    yield from _server_auth(f"{api.path}.auth", api.auth)
    if not (api.auther or (api.auth and api.auth.username)) and not _is_local(api.addr):
        yield Problem(api.path, "can be changed by everybody who reaches it; add auth", "api.open", "warning")


def _metrics(metrics: schema.Metrics) -> Iterator[Problem]:
    if not metrics.addr:
        yield Problem(metrics.path, "has no addr and is off", "address", "warning")
    elif not metrics.addr.startswith("unix://"):
        yield from _value(f"{metrics.path}.addr", metrics.addr, patterns.listen_address(metrics.addr), "address")
    yield from _server_auth(f"{metrics.path}.auth", metrics.auth)


def _is_local(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    ip = parse_ip(host)
    return address.startswith("unix://") or host == "localhost" or (ip is not None and ip.is_loopback)


_RULES: Final[Mapping[type[schema.Section], Callable[[Any], Iterator[Problem]]]] = {
    schema.TLS: _tls,
    schema.TLSOptions: _tls_options,
    schema.Selector: _selector,
    schema.Probe: _probe,
    schema.Matcher: _matcher,
    schema.SockOpts: _sockopts,
    schema.Plugin: _plugin,
    schema.FileLoader: _file_loader,
    schema.HTTPLoader: _http_loader,
    schema.RedisLoader: _redis_loader,
    schema.Service: _service,
    schema.Handler: _handler,
    schema.Listener: _listener,
    schema.RecorderObject: _recorder_object,
    schema.Forwarder: _forwarder,
    schema.ForwardNode: _forward_node,
    schema.Chain: _chain,
    schema.ChainGroup: _chain_group,
    schema.ForwardHopGroup: _hop_group,
    schema.Node: _node,
    schema.Dialer: _dialer,
    schema.Auther: _auther,
    schema.Admission: _admission,
    schema.Bypass: _bypass,
    schema.Nameserver: _nameserver,
    schema.HostMapping: _host_mapping,
    schema.IngressRule: _ingress_rule,
    schema.Route: _route,
    schema.Limiter: _limiter,
    schema.Quota: _quota,
    schema.QuotaStore: _quota_store,
    schema.Log: _log,
    schema.Logger: _logger,
    schema.API: _api,
    schema.Metrics: _metrics,
}
