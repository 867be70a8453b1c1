"""Policies and tables that others refer to by name: from authers to quotas."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.options import Seconds
from .parts import Auth, FileLoader, HTTPLoader, Plugin, RedisLoader
from .section import Section, item


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
