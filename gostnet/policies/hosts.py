"""Hosts: a static table of names. Rows N01-N16.

A name `.example.org` covers itself and everything below, `*.example.org` only what is below, `.` everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from ..core.address import parse_ip
from ..core.options import Problem
from .entries import Entry

CODE: Final = "config.hosts"


class Mapping(NamedTuple):
    """A name and one of its addresses, in its usual form."""

    name: str
    address: str


class HostTable:
    """Names with their addresses, in the order given. Immutable."""

    __slots__ = ("_below", "_names")

    def __init__(self, mappings: Iterable[Mapping] = ()) -> None:
        self._names: dict[str, tuple[str, ...]] = {}
        self._below: dict[str, tuple[str, ...]] = {}
        for name, address in mappings:
            table, key = self._names, name.lower()
            if key.startswith("*."):
                table, key = self._below, key[1:]
            elif key == "*":
                key = "."
            known = table.get(key, ())
            if address not in known:
                table[key] = (*known, address)

    def __len__(self) -> int:
        return len(self._names) + len(self._below)

    def find(self, host: str) -> tuple[str, ...]:
        """Return the addresses of the most specific name that covers `host`, () if none does."""
        name = host.lower()
        names, below = self._names, self._below
        found = names.get(name) or names.get("." + name)
        while not found:
            dot = name.find(".")
            if dot <= 0:
                return names.get(".", ())
            found = names.get(name[dot:]) or below.get(name[dot:])
            name = name[dot + 1 :]
        return found


def parse_mapping(ip: str, names: Iterable[str]) -> list[Mapping] | None:
    """Return the mappings of an address and its names, None if it is not an address."""
    address = parse_ip(ip.strip())
    if address is None:
        return None
    return [Mapping(name.strip(), str(address)) for name in names if name.strip()]


def compile_hosts(inline: Iterable[Mapping], entries: Iterable[Entry]) -> tuple[HostTable, list[Problem]]:
    """Return the table of the configuration's mappings and of lines `IP name [name...]`; bad lines are left out."""
    problems: list[Problem] = []
    mappings = list(inline)
    for entry in entries:
        ip, *names = entry.text.split()
        found = parse_mapping(ip, names)
        if found is None:
            problems.append(entry.error(f"{ip[:64]!r} is not an IP address", CODE))
        elif not found:
            problems.append(entry.error(f"{ip} has no name", CODE))
        else:
            mappings += found
    return HostTable(mappings), problems


class StaticHosts:
    """Looks names up in a table that can be replaced."""

    __slots__ = ("table",)

    def __init__(self, table: HostTable) -> None:
        self.table = table

    def replace(self, table: HostTable) -> None:
        """Put another table in place of the present one."""
        self.table = table

    def lookup(self, host: str, family: int = 0) -> list[str]:
        """Return the addresses of `host`, [] if it is not listed, or not for this `family` (4, 6; 0 is both).

        The most specific name decides, even if it has no address of the family (N07, N09).
        """
        addresses = self.table.find(host)
        if family:
            return [address for address in addresses if (":" in address) == (family == 6)]
        return list(addresses)
