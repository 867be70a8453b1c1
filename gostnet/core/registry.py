"""Names of components and what they stand for.

A registry knows three sets of names: those that are registered, those that a module registers when it is imported
(`declare`), and those that GOST has, built here or not. Values are classes (handlers, connectors) or plain data (the
stack behind a listener's or dialer's name).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

from .errors import ConfigError, Unavailable
from .suggest import did_you_mean

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

Kind: TypeAlias = Literal["handler", "listener", "connector", "dialer"]
KINDS: Final[tuple[Kind, ...]] = ("handler", "listener", "connector", "dialer")

_NAMES: Final[Mapping[Kind, str]] = {
    "handler": (
        "api auto dns file forward http http2 http3 masque metrics red redir redirect redu relay router rtcp rudp "
        "runix serial sni socks socks4 socks4a socks5 ss ssu sshd tap tcp tun tungo tunnel udp unix"
    ),
    "listener": (
        "dns dtls ftcp grpc h2 h2c h3 http2 http3 icmp icmp6 kcp mtcp mtls mws mwss ohttp otls pht phts quic red "
        "redir redirect redu rtcp rudp runix serial ssh sshd stdio tap tcp tls tun tungo udp unix ws wss wt"
    ),
    "connector": (
        "direct forward http http2 masque relay router serial sni socks socks4 socks4a socks5 ss ssu sshd tcp "
        "tunnel unix virtual"
    ),
    "dialer": (
        "direct dtls ftcp grpc h2 h2c h3 h3-masque http2 http3 icmp icmp6 kcp mtcp mtls mws mwss ohttp ohttps otls "
        "pht phts quic serial ssh sshd tcp tls udp unix utls virtual ws wss wt"
    ),
}
GOST_NAMES: Final[Mapping[Kind, frozenset[str]]] = {kind: frozenset(names.split()) for kind, names in _NAMES.items()}
"""Every component name of GOST 3.3 on Linux."""


class Registry(Generic[T]):
    """The names of one kind."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self._values: dict[str, T] = {}
        self._modules: dict[str, str] = {}

    def register(self, value: T, *names: str) -> None:
        """Give `value` one or more names. Raise ValueError for a name that already stands for something else."""
        if not names:
            raise ValueError(f"a {self.kind} needs a name")
        for name in names:
            if self._values.get(name, value) is not value:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
        for name in names:
            self._values[name] = value

    def declare(self, modules: Mapping[str, str]) -> None:
        """Say which module registers which name (name -> dotted module); it is imported at the first look-up."""
        self._modules.update(modules)

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._modules

    def names(self) -> list[str]:
        """Return all names that `get` answers, sorted."""
        return sorted(self._values.keys() | self._modules.keys())

    def known(self) -> frozenset[str]:
        """Return these names and all of GOST's."""
        return frozenset(self.names()) | GOST_NAMES[self.kind]

    def get(self, name: str, path: str = "") -> T:
        """Return what `name` stands for.

        Raise Unavailable for a name of GOST's that is not built, ConfigError at `path` for any other unknown one.
        """
        if name not in self._values and name in self._modules:
            import_module(self._modules[name])
        if name in self._values:
            return self._values[name]
        if name in GOST_NAMES[self.kind] or name in self._modules:
            raise Unavailable(f"{self.kind} {name!r} is not available in this version")
        suggestion = did_you_mean(name, self.known())
        raise ConfigError(path, f"unknown {self.kind} {name!r}{suggestion}", code="config.unknown-component")


class Catalog:
    """The four registries, and what their values tell about options."""

    def __init__(self) -> None:
        self.handlers: Registry[Any] = Registry("handler")
        self.listeners: Registry[Any] = Registry("listener")
        self.connectors: Registry[Any] = Registry("connector")
        self.dialers: Registry[Any] = Registry("dialer")

    def of(self, kind: Kind) -> Registry[Any]:
        """Return the registry of one kind."""
        registry: Registry[Any] = getattr(self, f"{kind}s")
        return registry

    def available(self, kind: Kind, name: str) -> bool:
        """True if a component of that name is built."""
        return name in self.of(kind)

    def options(self, kind: Kind, name: str) -> type[Any] | None:
        """Return the options class of a component (its `Options`), None if it is not built or has none."""
        registry = self.of(kind)
        if name not in registry:
            return None
        found: type[Any] | None = getattr(registry.get(name), "Options", None)
        return found


COMPONENTS: Final = Catalog()
"""What `component` and `register` fill: names of classes and stacks, never instances of components."""


def component(kind: Kind, *names: str, catalog: Catalog = COMPONENTS) -> Callable[[C], C]:
    """Register the decorated class under one or more names."""

    def decorate(cls: C) -> C:
        catalog.of(kind).register(cls, *names)
        return cls

    return decorate


def register(kind: Kind, value: object, names: Iterable[str], catalog: Catalog = COMPONENTS) -> None:
    """Register a plain value, such as the stack behind a listener's name; its `Options` attribute is its options."""
    catalog.of(kind).register(value, *names)
