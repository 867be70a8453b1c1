"""From the configuration's sections to quotas, recorders and observers by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from ..config import schema
from ..config.common_options import RecorderOptions
from ..core.address import parse_endpoint
from ..core.errors import ConfigError
from ..core.options import Problem, bind_options
from ..core.units import parse_nanoseconds, parse_size
from . import recorders
from .build import Build, named_sections, unavailable
from .observer import HTTPObserver
from .post import Poster
from .quota import FILE, FLUSH, Keeper, Quota, Store, Terms, parse_direction, parse_time
from .recorders import FileSink, HTTPSink, NullSink, PluginSink, Recorder, Rotation, Sink, TCPSink, Use
from .shared import SharedQuota


# ---- quotas --------------------------------------------------------------------------------------
def build_quotas(config: schema.Config, build: Build, before: Mapping[str, Quota] | None = None) -> dict[str, Quota]:
    """Return the quotas by name. One of `before`, the quotas of the configuration before, goes on counting."""
    keeper = Keeper(build.threads, build.report)
    keeper.writes = build.ledger is None or build.ledger.worker == 0
    before = before or {}
    for section in named_sections(config.quotas):
        terms = _terms(section, build)
        known = before.get(section.name)
        if known is None:
            if build.ledger is None:
                known = Quota(section.name, terms, report=build.report)
            else:
                known = SharedQuota(section.name, terms, build.ledger, report=build.report)
            keeper.fresh.append(section.name)
        else:
            keeper.pending[section.name] = terms
        path = section.store.file if section.store is not None and section.store.file.strip() else FILE
        keeper.quotas[section.name] = (known, Store(path))
    keeper.gone = [quota for name, quota in before.items() if name not in keeper.quotas]
    if keeper.quotas or keeper.gone:
        build.reloaders.append(keeper)
    build.quotas = {name: quota for name, (quota, _) in keeper.quotas.items()}
    return build.quotas


def _terms(section: schema.Quota, build: Build) -> Terms:
    """Return what a section says; what cannot be read is a problem, where it is no limit in GOST."""

    def read() -> Terms:
        key, text = "limit", section.limit.strip()
        try:
            limit = parse_size(text) if text and text != "0" else 0
            key, text = "startsAt", section.starts_at
            starts = parse_time(text)
            key, text = "expiresAt", section.expires_at
            expires = parse_time(text)
            key, text = "direction", section.direction
            direction = parse_direction(text)
            key, text = "flush", section.flush.strip()
            flush = parse_nanoseconds(text) / 1e9 if text else 0.0
        except ValueError as exc:
            raise ConfigError(f"{section.path}.{key}", f"{text[:64]!r}: {exc}", code="config.quota") from exc
        return Terms(limit, starts, expires, direction, flush if flush > 0 else FLUSH)

    return build.attempt(read, Terms())


# ---- recorders -----------------------------------------------------------------------------------
def build_recorders(
    config: schema.Config, build: Build, before: Mapping[str, tuple[schema.Recorder, Recorder]] | None = None
) -> dict[str, Recorder]:
    """Return the recorders by name. One of `before` whose section is the same is kept, with what it has queued."""
    made: dict[str, tuple[schema.Recorder, Recorder]] = {}
    for section in named_sections(config.recorders):
        known = (before or {}).get(section.name)
        if known is not None and known[0] == section:
            made[section.name] = known
            continue
        sink = build.attempt(partial(_sink, section, build), NullSink())
        made[section.name] = (section, Recorder(section.name, sink, build.report))
    build.recorders = made
    return {name: recorder for name, (_, recorder) in made.items()}


def _sink(section: schema.Recorder, build: Build) -> Sink:
    """Return where a recorder writes: the first backend that is configured. Raise ConfigError."""
    path = section.path
    if section.plugin is not None:
        return PluginSink(_plugin(section.plugin, build))
    if section.file is not None and section.file.path_:
        return FileSink(section.file.path_, section.file.sep, _rotation(section.file.rotation))
    if section.tcp is not None and section.tcp.addr:
        return TCPSink(parse_endpoint(section.tcp.addr, f"{path}.tcp.addr"), section.tcp.timeout, build.options)
    if section.http is not None and section.http.url:
        http = section.http
        return HTTPSink(Poster(http.url, http.timeout, http.header, build.options, f"{path}.http.url"))
    if section.redis is not None:
        raise ConfigError(f"{path}.redis", unavailable("a Redis recorder"), code="unavailable")
    return NullSink()


def _rotation(section: schema.Rotation | None) -> Rotation | None:
    if section is None:
        return None
    size = section.max_size if section.max_size > 0 else 100
    return Rotation(
        size << 20, max(0, section.max_age), max(0, section.max_backups), section.local_time, section.compress
    )


def _plugin(section: schema.Plugin, build: Build) -> Poster:
    """Return what asks a plugin of the type http. Raise ConfigError."""
    if section.type.lower() != "http":
        raise ConfigError(f"{section.path}.type", unavailable("a gRPC plugin"), code="unavailable")
    if section.tls is not None and build.report is not None:
        build.report(f"{section.path}.tls: ignored: https is always verified, by the authorities of the system")
    headers = {"Authorization": f"Bearer {section.token}"} if section.token else None
    return Poster(section.addr, section.timeout, headers, build.options, f"{section.path}.addr")


def uses_of(objects: Sequence[schema.RecorderObject], made: Mapping[str, Recorder], build: Build) -> Mapping[str, Use]:
    """Return what a service records, by the names of its records; the first of a name counts. A problem is noted."""
    uses: dict[str, Use] = {}
    for item in objects:
        recorder = made.get(item.name)
        if recorder is None:
            continue
        if item.record not in recorders.BUILT:
            message = unavailable(f"the record {item.record!r}")
            build.note(ConfigError(f"{item.path}.record", message, code="unavailable"))
        if bind_options(RecorderOptions, item.metadata, f"{item.path}.metadata", problems=build.problems).http_body:
            message = "bodies are not recorded in this version"
            build.problems.append(Problem(f"{item.path}.metadata.http.body", message, "unavailable", "warning"))
            if build.report is not None:
                build.report(f"{item.path}.metadata.http.body: {message}")
        uses.setdefault(item.record, Use(recorder, item.metadata))
    return uses


# ---- observers -----------------------------------------------------------------------------------
def build_observers(config: schema.Config, build: Build) -> dict[str, HTTPObserver | None]:
    """Return the observers by name; None for one without a plugin, which does nothing."""
    made: dict[str, HTTPObserver | None] = {}
    for section in named_sections(config.observers):
        made[section.name] = None
        plugin = section.plugin
        if plugin is not None:
            poster = build.attempt(partial(_plugin, plugin, build), None)
            if poster is not None:
                made[section.name] = HTTPObserver(section.name, poster, build.threads)
    return made
