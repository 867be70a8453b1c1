"""Several workers as `check`, `plan` and `doctor` speak of them: who serves what, and what each does by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..config import schema
from ..config.workers import parse_workers
from ..core.options import Problem, option_keys
from .catalog import catalog


def workers_of(config: schema.Config) -> int:
    """Return how many workers there will be; 1 if that cannot be told."""
    try:
        return parse_workers(config.workers)
    except ValueError:
        return 1


def alone(config: schema.Config) -> list[str]:
    """Return the names of the services that the first worker serves alone: their listeners cannot be shared."""
    return [service.name for service in config.services if not _is_shared(service)]


def worker_problems(config: schema.Config) -> Iterator[Problem]:
    """Yield where several workers are not what the configuration asks for, each with what is so."""
    count = workers_of(config)
    if count == 1:
        return
    processors = len(os.sched_getaffinity(0))
    if count > processors:
        yield _warning("workers", f"{count} processes share {_counted(processors, 'processor')}")
    if config.services and len(alone(config)) == len(config.services):
        yield _warning("workers", "no listener here can be shared: the first worker does all the work")
    for section in schema.walk(config):
        if isinstance(section, schema.Probe):
            yield _warning(section.path, f"each of {count} workers probes for itself, so probes come so many times")


def as_lines(config: schema.Config) -> Iterator[str]:
    """Yield in words who serves what, nothing for a single process."""
    count = workers_of(config)
    if count == 1:
        return
    single = alone(config)
    shared = [service.name for service in config.services if service.name not in single]
    if shared:
        yield f"{count} workers serve {', '.join(shared)}"
    if single:
        yield f"the first of {count} workers alone serves {', '.join(single)}: their listeners cannot be shared"


def _is_shared(service: schema.Service) -> bool:
    kind = service.listener.kind if service.listener is not None else "tcp"
    options = catalog().options("listener", kind)
    return options is not None and "reuseport" in option_keys(options)


def _warning(path: str, message: str) -> Problem:
    return Problem(path, message, "config.workers", "warning")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
