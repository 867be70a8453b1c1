"""Routers: tables of networks and the gateways that lead to them. Rows O01-O09.

A destination is an address, for which the longest prefix counts, or any other text, for which an entry of the same text
does (the routing tunnel names its routes so).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final

from ..core.address import parse_ip
from ..core.contracts import NetworkRoute
from ..core.options import Problem
from ..core.resources import Resource, Route
from .entries import Entry
from .networks import PrefixTable, number, parse_network, parse_range

CODE: Final = "config.router"
PROTOCOL: Final = "static"
"""What the routes of tables say of their origin."""


@dataclass(frozen=True, slots=True)
class RouteEntry:
    """A line of a table, as it is written."""

    destination: str
    gateway: str


def _network(text: str) -> IPv4Network | IPv6Network | None:
    """Return the network of a destination, that of an address being itself; None for any other text."""
    if parse_range(text) is None:
        return None
    network = ip_network(text, strict=False)
    mapped = parse_ip(str(network.network_address))
    return network if mapped is not None and mapped.version == network.version else None


class RouteTable:
    """Routes by destination; of several for the same network the first counts. Immutable."""

    __slots__ = ("_exact", "_prefixes", "routes")

    def __init__(self, entries: Iterable[RouteEntry] = ()) -> None:
        self.routes: tuple[NetworkRoute, ...] = tuple(
            NetworkRoute(_network(entry.destination), entry.destination, entry.gateway, PROTOCOL) for entry in entries
        )
        self._exact: dict[str, NetworkRoute] = {}
        prefixes: list[tuple[tuple[int, int], NetworkRoute]] = []
        for route in reversed(self.routes):
            self._exact[route.destination] = route
            found = parse_range(route.destination)
            if found is not None:
                prefixes.append((found, route))
        self._prefixes = PrefixTable(prefixes)

    def __len__(self) -> int:
        return len(self.routes)

    def find(self, destination: str) -> NetworkRoute | None:
        """Return the route to a destination, None if there is none."""
        value = number(destination)
        found = self._prefixes.get(value) if value is not None else None
        return found if found is not None else self._exact.get(destination)

    def find_among(self, destination: str, network: str, protocol: str) -> NetworkRoute | None:
        """Return the route to a destination among those to one network or of one origin, "" for any."""
        if protocol not in ("", PROTOCOL):
            return None
        chosen = [route for route in self.routes if network in ("", route.destination, str(route.network))]
        table = RouteTable(RouteEntry(route.destination, route.gateway) for route in chosen)
        return table.find(destination)


def compile_routes(inline: Iterable[RouteEntry], entries: Iterable[Entry]) -> tuple[RouteTable, list[Problem]]:
    """Return the table of the configuration's routes and of lines `destination gateway`; bad lines are left out.

    # GOST: a blank line or a comment ends the process (O09); here neither is an entry.
    """
    problems: list[Problem] = []
    routes = list(inline)
    for entry in entries:
        words = entry.text.split()
        if len(words) != 2:
            problems.append(entry.error(f"{entry.text[:64]!r} is not a destination and its gateway", CODE))
        elif wrong := destination_problem(words[0]):
            problems.append(entry.error(wrong, CODE))
        else:
            routes.append(RouteEntry(*words))
    return RouteTable(routes), problems


def destination_problem(text: str) -> str:
    """Return what is wrong with a destination that looks like a network, "" for nothing."""
    if "/" in text and parse_network(text) is None and number(text.partition("/")[0]) is not None:
        return f"{text[:64]!r} is not a network such as 192.0.2.0/24"
    return ""


class _Present:
    """The present table, which routers of the same name before and after a reload share."""

    __slots__ = ("changed", "generation", "table")

    def __init__(self, table: RouteTable) -> None:
        self.table = table
        self.generation = 0
        self.changed: list[Callable[[], None]] = []


class StaticRouter:
    """Looks routes up in a table that can be replaced."""

    __slots__ = ("_present",)

    def __init__(self, table: RouteTable) -> None:
        self._present = _Present(table)

    @property
    def table(self) -> RouteTable:
        """The present table."""
        return self._present.table

    @property
    def generation(self) -> int:
        """Another number whenever an answer may have changed."""
        return self._present.generation

    @property
    def changed(self) -> list[Callable[[], None]]:
        """What is called after the table has been replaced."""
        return self._present.changed

    def replace(self, table: RouteTable) -> None:
        """Put another table in place of the present one."""
        self._present.table = table
        self._present.generation += 1
        for tell in self._present.changed:
            tell()

    def take_over(self, before: StaticRouter) -> None:
        """Be what a router before a reload was: those who have that one see from now on what this one does."""
        before.replace(self.table)
        self._present = before._present

    def get_route(self, destination: str, *, network: str = "", protocol: str = "") -> NetworkRoute | None:
        """Return the route to a destination, None if there is none."""
        if network or protocol:
            return self.table.find_among(destination, network, protocol)
        return self.table.find(destination)

    def resources(self) -> Sequence[Resource]:
        """Return the routes that the kernel can hold: to networks, by gateways that are addresses of the same version.

        An address without a prefix length names a destination for look-ups only, as in GOST (O06).
        """
        found: dict[str, Resource] = {}
        for route in self.table.routes:
            gateway = parse_ip(route.gateway)
            if route.network is None or gateway is None or "/" not in route.destination:
                continue
            if gateway.version == route.network.version and not gateway.is_unspecified:
                to = str(route.network)
                found.setdefault(to, Route(to, gateway=str(gateway), tentative=True))
        return tuple(found.values())
