"""What is seen of the daemon and of its traffic: recorders, observers, caches, logs, API, metrics."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.options import Seconds
from .parts import Auth, Plugin
from .section import Section, item


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
