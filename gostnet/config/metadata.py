"""Checks of the free maps: keys that nobody reads, values that cannot be read, capture keys, names inside metadata.

A key of a `-L` URL goes to handler, listener and service alike, one of `-F` to hop, node, connector and dialer: it is
unknown only if none of them knows it. In a file each map has one reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from ..core.options import Problem, bind_options, option_keys, to_comma_list
from ..core.registry import Kind
from ..core.suggest import did_you_mean
from . import patterns, schema
from .common_options import HANDLER_PREFIXES, HandlerOptions, HopOptions, NodeOptions, RecorderOptions, ServiceOptions
from .common_options import MemberOptions as ChainOptions
from .schema import Reference
from .tree import Positions

UNKNOWN_KEY: Final = "metadata.unknown-key"
"""The code of metadata keys that no component reads; strict checking turns it into an error."""

CAPTURE_LISTENERS: Final = frozenset(("red", "redir", "redirect", "redu", "tungo"))
"""Listeners that can install rules which bring them traffic."""

_REFERENCES: Final[Mapping[str, str]] = {"ingress": "ingresses", "sd": "sds", "mitm.bypass": "bypasses"}
"""Handler keys that name objects."""
_CAPTURE: Final = ("capture",)
_LIFTED: Final = frozenset(
    (
        *("prefer", "retries", "admission", "bypass", "resolver", "hosts", "climiter", "rlimiter"),
        *("limiter.in", "limiter.out", "limiter.conn.in", "limiter.conn.out"),
    )
)
"""Keys of -L that GOST leaves in the maps of service and listener after objects were made of them."""


class Catalog(Protocol):
    """What is built, and with which options; `core.registry.Catalog` is one."""

    def available(self, kind: Kind, name: str) -> bool:
        """True if a component of that name is built."""

    def options(self, kind: Kind, name: str) -> type[Any] | None:
        """Return the options class of a component, None for none."""


@dataclass(slots=True)
class _Reader:
    """A map and the option classes that read it; with `open_ended` it may hold keys that are not known here."""

    path: str
    raw: Mapping[str, Any]
    classes: Sequence[type[Any]]
    open_ended: bool = False
    prefixes: tuple[str, ...] = ()
    """Beginnings of keys that are known or reported elsewhere."""


@dataclass(slots=True)
class MetadataChecker:
    """Collects problems of all metadata of a configuration."""

    catalog: Catalog
    positions: Positions
    problems: list[Problem] = field(default_factory=list)

    def check(self, config: schema.Config) -> list[Problem]:
        """Check every map."""
        for service in config.services:
            self._service(service)
        for chain in config.chains:
            self._read([_Reader(f"{chain.path}.metadata", chain.metadata, (ChainOptions,))])
            for hop in chain.hops:
                self._hop(hop)
        for hop in config.hops:
            self._hop(hop)
        return self.problems

    def _component(self, kind: Kind, name: str) -> tuple[list[type[Any]], bool]:
        """Return the options classes of a component, and whether it may have more that are not known."""
        if not self.catalog.available(kind, name):
            return [], True
        options = self.catalog.options(kind, name)
        return ([options] if options else []), False

    def _service(self, service: schema.Service) -> None:
        handler = service.handler or schema.Handler(path=f"{service.path}.handler")
        listener = service.listener or schema.Listener(path=f"{service.path}.listener")
        handler_classes, handler_open = self._component("handler", handler.kind)
        listener_classes, listener_open = self._component("listener", listener.kind)
        from_url = self._from_url(service.path)
        # capture_problems reports these; a URL's copies in the other maps mean nothing.
        elsewhere = _CAPTURE if from_url and listener.kind not in CAPTURE_LISTENERS else ()
        self._read(
            [
                _Reader(f"{service.path}.metadata", service.metadata, (ServiceOptions,), prefixes=elsewhere),
                _Reader(
                    f"{handler.path}.metadata",
                    handler.metadata,
                    (HandlerOptions, *handler_classes),
                    handler_open,
                    (*HANDLER_PREFIXES, *elsewhere),
                ),
                _Reader(
                    f"{listener.path}.metadata",
                    listener.metadata,
                    listener_classes,
                    listener_open,
                    () if listener.kind in CAPTURE_LISTENERS else _CAPTURE,
                ),
            ],
            from_url=from_url,
        )
        for record in service.recorders:
            self._read([_Reader(f"{record.path}.metadata", record.metadata, (RecorderOptions,))])
        self.problems += capture_problems(listener)

    def _hop(self, hop: schema.Hop) -> None:
        readers = [_Reader(f"{hop.path}.metadata", hop.metadata, (NodeOptions, HopOptions))]
        for node in hop.nodes:
            connector = node.connector or schema.Connector(path=f"{node.path}.connector")
            dialer = node.dialer or schema.Dialer(path=f"{node.path}.dialer")
            connector_classes, connector_open = self._component("connector", connector.kind)
            dialer_classes, dialer_open = self._component("dialer", dialer.kind)
            readers += [
                _Reader(f"{node.path}.metadata", node.metadata, (NodeOptions,)),
                _Reader(f"{connector.path}.metadata", connector.metadata, connector_classes, connector_open),
                _Reader(f"{dialer.path}.metadata", dialer.metadata, dialer_classes, dialer_open),
            ]
        self._read(readers, from_url=self._from_url(hop.path))

    def _from_url(self, path: str) -> bool:
        spot = self.positions.exact(path)
        return spot is not None and spot.value.source.kind == "url"

    def _read(self, readers: list[_Reader], *, from_url: bool = False) -> None:
        known: set[str] = set(_LIFTED) if from_url else set()
        shared_open = from_url and any(reader.open_ended for reader in readers)
        names = {id(reader): {key.lower() for cls in reader.classes for key in option_keys(cls)} for reader in readers}
        for reader in readers:
            known |= names[id(reader)]
            for options in reader.classes:
                bind_options(options, reader.raw, reader.path, set(), self.problems)
        reported: set[str] = set()
        everywhere = [key for reader in readers for cls in reader.classes for key in option_keys(cls)]
        for reader in readers:
            if reader.open_ended or shared_open:
                continue
            own = known if from_url else names[id(reader)]
            for key in reader.raw:
                if key.lower() in own or key.startswith(reader.prefixes) or (from_url and key in reported):
                    continue
                reported.add(key)
                spelt = everywhere if from_url else [key for cls in reader.classes for key in option_keys(cls)]
                self.problems.append(_unknown(reader, key, spelt, known))


def _unknown(reader: _Reader, key: str, own: Iterable[str], elsewhere: Iterable[str]) -> Problem:
    """Say that nobody reads `key`; `own` are the keys that its map may have, `elsewhere` those of all parts."""
    if isinstance(reader.raw[key], Mapping) and any(name.lower().startswith(f"{key.lower()}.") for name in own):
        inner = next(iter(reader.raw[key]), "...")
        message = f"nested keys are not read; write them with a dot, such as {key}.{inner}"
    elif key.lower() in elsewhere:
        message = "has no effect here; it is an option of another part of this service or hop"
    else:
        message = f"nothing reads this key{did_you_mean(key, own)}"
    return Problem(f"{reader.path}.{key}", message, UNKNOWN_KEY, "warning")


def capture_problems(listener: schema.Listener) -> Iterator[Problem]:
    """Yield what is wrong with the capture keys of a listener."""
    path = f"{listener.path}.metadata"
    found = {key.lower(): (key, value) for key, value in listener.metadata.items()}
    for key, (spelt, value) in found.items():
        if key != "capture" and not key.startswith("capture."):
            continue
        where = f"{path}.{spelt}"
        if listener.kind not in CAPTURE_LISTENERS:
            message = f"a {listener.kind} listener captures nothing; use red (TCP), redu (UDP) or tungo"
            yield Problem(where, message, "capture.listener")
        elif key != "capture" and "capture" not in found:
            yield Problem(where, "says nothing without capture", "capture.unused")
        else:
            yield from _capture_values(where, key, value)


def _capture_values(path: str, key: str, value: Any) -> Iterator[Problem]:
    try:
        items = to_comma_list(value)
    except ValueError:
        return  # the type is reported where the options are bound
    check = {"capture.exclude": patterns.network, "capture.sources": patterns.network, "capture.ports": patterns.ports}
    for text in items:
        wrong = check.get(key, _interface)(text)
        if wrong:
            yield Problem(path, f"{text[:64]!r} {wrong}", "capture.value")


def _interface(name: str) -> str:
    if len(name.encode()) > 15 or "/" in name or name.split() != [name] or name in (".", ".."):
        return "is not an interface name"
    if name == "lo":
        return "cannot be captured, as what is captured goes through it; write local"
    return ""


KERNEL_ROUTER: Final = "kernel"
"""The router of this name is the kernel's routing, unless the configuration has one of the name."""


def metadata_references(config: schema.Config) -> Iterator[Reference]:
    """Yield the names of objects that metadata holds."""
    routers = {router.name for router in config.routers}
    for service in config.services:
        for part in (service.handler, service.listener):
            if part is None:
                continue
            for key, value in part.metadata.items():
                lower = key.lower()
                target = _REFERENCES.get(lower) if part is service.handler else None
                if lower in ("router", "tun.router") and part.kind in ("router", "tun"):
                    target = "routers" if value != KERNEL_ROUTER or value in routers else None
                if target and isinstance(value, str) and value:
                    yield Reference(f"{part.path}.metadata.{key}", value, target)
