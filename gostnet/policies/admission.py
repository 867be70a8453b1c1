"""Admission: which clients may connect, by address. Rows A01-A11."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..core.address import Endpoint
from ..core.contracts import Resolver
from ..core.errors import ResolveError
from ..core.options import Problem
from .entries import Entry, inline, refuse
from .networks import Intervals, number, parse_network

CODE: Final = "config.admission"

_NAME: Final = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_][A-Za-z0-9_-]*\.?"
)


@dataclass(frozen=True, slots=True)
class Clients:
    """A compiled list of clients: ranges of addresses, and names whose addresses are looked up at load."""

    ranges: Intervals
    names: tuple[str, ...] = ()


def compile_clients(entries: Iterable[Entry]) -> tuple[Clients, list[Problem]]:
    """Return the usable patterns (IP, network, host name), and what is wrong with the others, which are left out."""
    problems: list[Problem] = []
    ranges: list[tuple[int, int]] = []
    names: dict[str, None] = {}
    for entry in entries:
        text = entry.text
        value = number(text)
        network = (value, value) if value is not None else parse_network(text)
        if network is not None:
            ranges.append(network)
        elif _is_name(text):
            names[text.lower()] = None
        else:
            problems.append(entry.error(_complaint(text), CODE))
    return Clients(Intervals(ranges), tuple(names)), problems


def _is_name(text: str) -> bool:
    """A host name, and not an address or a range of addresses with a mistake in it."""
    if _NAME.fullmatch(text) is None:
        return False
    return not text.rstrip(".").rpartition(".")[2].isdigit() and number(text.partition("-")[0]) is None


def _complaint(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and ":" not in host.strip("[]"):
        return f"{text!r} is not a client: a port says nothing about clients; write {host.strip('[]')}"
    low, dash, high = text.partition("-")
    if dash and number(low.strip()) is not None and number(high.strip()) is not None:
        return f"{text!r} is not a client: ranges are written as networks, such as 10.0.0.0/29"
    return f"{text!r} is not a client: an address, a network such as 10.0.0.0/8, or a host name"


class AddressAdmission:
    """A list of clients: as a blacklist it refuses them, as a whitelist it admits nobody else.

    A client without an address (a unix socket) matches nothing; an empty address is always admitted (A03).
    """

    __slots__ = ("_addresses", "_named", "clients", "whitelist")

    def __init__(self, clients: Clients, *, whitelist: bool = False) -> None:
        self.clients = clients
        self.whitelist = whitelist
        self._addresses: dict[str, tuple[int, ...]] = {}
        self._named: frozenset[int] = frozenset()

    @classmethod
    def from_patterns(
        cls, patterns: Iterable[str], *, whitelist: bool = False, path: str = "matchers"
    ) -> AddressAdmission:
        """Compile `patterns`. Raise ConfigError that names the first bad one as `path[INDEX]` (A06)."""
        compiled, problems = compile_clients(inline(patterns, path))
        refuse(problems)
        return cls(compiled, whitelist=whitelist)

    def replace(self, clients: Clients) -> None:
        """Put another list in place of the present one; what is known of its names stays."""
        self.clients = clients
        self._use({name: self._addresses[name] for name in clients.names if name in self._addresses})

    async def resolve_names(self, resolver: Resolver) -> list[str]:
        """Look up the names of the list; return what to tell of those that failed, which keep their last addresses."""
        complaints = []
        found = dict(self._addresses)
        clients = self.clients
        for name in clients.names:
            try:
                addresses = await resolver.resolve(name)
            except ResolveError as exc:
                complaints.append(f"{name}: {exc}")
                continue
            found[name] = tuple(value for value in map(number, addresses) if value is not None)
        if clients is self.clients:
            self._use(found)
        return complaints

    def _use(self, addresses: dict[str, tuple[int, ...]]) -> None:
        self._addresses = addresses
        self._named = frozenset(value for values in addresses.values() for value in values)

    def admits(self, client: Endpoint) -> bool:
        """Decide about `client`; its port does not matter."""
        if not client.host:
            return True
        value = number(client.host)
        matched = value is not None and (value in self.clients.ranges or value in self._named)
        return matched == self.whitelist
