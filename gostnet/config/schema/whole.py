"""The whole configuration, and the references within it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..tree import Positions
from .chains import Chain, Hop
from .observation import API, Cache, Log, Logger, Metrics, Observer, Profiling, Recorder, Rewriter
from .parts import TLS
from .policies import SD, Admission, Auther, Bypass, Hosts, Ingress, Limiter, Quota, Resolver, Router
from .section import Section, item, schema_fields, walk
from .services import Service


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
