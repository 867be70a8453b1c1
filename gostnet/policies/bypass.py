"""Bypass: patterns of destinations. Rows B01-B41.

A pattern is a network (`10.0.0.0/8`), a glob (`*.example.com`), an address or a range of them
(`172.20.0.1-172.30.0.255`), or a host name; `.example.com` is the name itself and everything below. Globs, names and
single addresses may carry a port or a range of ports (`example.com:80-90`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Final, TypeAlias

from ..core.address import Endpoint
from ..core.contracts import Bypass
from ..core.errors import ConfigError
from ..core.flow import Network
from ..core.options import Problem
from .entries import Entry, inline, refuse
from .glob import GlobTable, Token, parse_glob
from .networks import Intervals, number, parse_network

Ports: TypeAlias = "tuple[tuple[int, int], ...] | None"
"""Ranges of ports, both ends included; None is any port."""

CODE: Final = "config.bypass"
_SPECIAL: Final = frozenset("*?[]{}\\")
_OF_ADDRESSES: Final = frozenset("0123456789abcdef.:")


class Patterns:
    """A compiled set of patterns. Immutable; a look-up costs microseconds whatever its size."""

    __slots__ = (
        "_addresses",
        "_below",
        "_count",
        "_digest",
        "_globs",
        "_names",
        "_ranges",
        "_suffixes",
        "_tokens",
        "textual",
    )

    def __init__(self, patterns: Iterable[_Pattern] = ()) -> None:
        ranges: list[tuple[int, int]] = []
        globs: list[tuple[list[Token], Ports]] = []
        self._addresses: dict[int, Ports] = {}
        self._names: dict[str, Ports] = {}
        self._suffixes: dict[str, Ports] = {}
        """`.example.com` under `example.com`: the name and what is below."""
        self._below: dict[str, Ports] = {}
        """`*.example.com` under `example.com`: only what is below."""
        self._count = 0
        self.textual = False
        """Whether a pattern that is compared as text might match an address (`10.*`)."""
        for pattern in patterns:
            self._count += 1
            for kind, key, ports in pattern:
                if isinstance(key, list):
                    globs.append((key, ports))
                    self.textual |= all(_may_be_of_address(t) for t in key if isinstance(t, str))
                elif isinstance(key, tuple):
                    ranges.append(key)
                elif isinstance(key, int):
                    _add(self._addresses, key, ports)
                else:
                    table = {"suffix": self._suffixes, "below": self._below}.get(kind, self._names)
                    _add(table, key, ports)
                    self.textual |= _may_be_of_address(key)
        self._ranges = Intervals(ranges)
        self._globs = GlobTable(globs)
        self._tokens = globs
        self._digest = ""

    def __len__(self) -> int:
        return self._count

    @property
    def ranges(self) -> Intervals:
        """The addresses that match at any port, as far as they are not single ones."""
        return self._ranges

    @property
    def addresses(self) -> Mapping[int, Ports]:
        """The single addresses that match, with their ports."""
        return self._addresses

    @property
    def digest(self) -> str:
        """What stands for the patterns that are about names: equal ones have the same. Takes a while the first time."""
        if not self._digest:
            tables = [sorted(of.items()) for of in (self._names, self._suffixes, self._below)]
            globs = [([_shown(token) for token in tokens], ports) for tokens, ports in self._tokens]
            self._digest = sha256(repr((tables, globs)).encode()).hexdigest()
        return self._digest

    def matches(self, target: Endpoint) -> bool:
        """Tell whether any pattern covers `target`; port 0 is covered by patterns for any port, and for 0."""
        host, port = target
        value = number(host)
        if value is not None:
            if value in self._ranges:
                return True
            if value in self._addresses and _covers(self._addresses[value], port):
                return True
        name = host.lower()
        if name[-1:] == ".":
            name = name[:-1]
        if name in self._names and _covers(self._names[name], port):
            return True
        if self._suffixes or self._below:
            part = name
            while part:
                if part in self._suffixes and _covers(self._suffixes[part], port):
                    return True
                _, _, part = part.partition(".")
                if part in self._below and _covers(self._below[part], port):
                    return True
        if self._globs:
            for ports in self._globs.find(name):
                if _covers(ports, port):
                    return True
        return False


def _add(table: dict[str, Ports] | dict[int, Ports], key: str | int, ports: Ports) -> None:
    known: dict[object, Ports] = table  # type: ignore[assignment]  # the key is of the table's type
    if ports is None or (key in known and known[key] is None):
        known[key] = None
    else:
        known[key] = (*(known.get(key) or ()), *ports)


def _shown(token: Token) -> tuple[str, str]:
    return ("text", token) if isinstance(token, str) else (type(token).__name__, getattr(token, "source", ""))


def _may_be_of_address(text: str) -> bool:
    """Tell whether a piece of a pattern consists of what addresses are written with."""
    return _OF_ADDRESSES.issuperset(text)


def _covers(ports: Ports, port: int) -> bool:
    return ports is None or any(low <= port <= high for low, high in ports)


# ---- from text to patterns ----------------------------------------------------------------------
_Key: TypeAlias = "str | int | tuple[int, int] | list[Token]"
_Pattern: TypeAlias = "list[tuple[str, _Key, Ports]]"


class _Bad(Exception):
    """What is wrong with a pattern."""


class _Dead(Exception):
    """Why a pattern can never match anything."""


def compile_patterns(entries: Iterable[Entry]) -> tuple[Patterns, list[Problem]]:
    """Return the usable patterns, and what is wrong: an error leaves its pattern out, a warning says it never matches.

    A pattern that never matches still counts as one: a whitelist of it alone bypasses everything.
    """
    problems: list[Problem] = []
    found: list[_Pattern] = []
    for entry in entries:
        try:
            found.append(_parse(entry.text))
        except _Bad as exc:
            problems.append(entry.error(str(exc), CODE))
        except _Dead as exc:
            problems.append(entry.warning(str(exc), CODE))
            found.append([])
    return Patterns(found), problems


def _parse(text: str) -> _Pattern:
    if "/" in text:
        network = parse_network(text)
        if network is None:
            hint = ""
            if parse_network(text.rpartition(":")[0]) is not None:
                hint = "; a network takes no port"
            raise _Bad(f"{text!r} is not a network such as 10.0.0.0/8{hint}")
        return [("range", network, None)]
    value = number(text)
    if value is not None:
        return [("range", (value, value), None)]
    low, dash, high = (part.strip() for part in text.partition("-"))
    first, last = number(low), number(high)
    if dash and first is not None and last is not None:
        if (":" in low) != (":" in high):
            raise _Bad(f"{text!r} is not a range: one end is IPv4, the other IPv6")
        if last < first:
            raise _Dead(f"{text!r} never matches: the range ends before it begins")
        return [("range", (first, last), None)]
    host, ports = _split(text)
    if any(char.isspace() for char in host):
        raise _Bad(f"{text!r} is not a pattern: it contains a blank")
    if not host:
        raise _Dead(f"{text!r} never matches: it has no host; write *{text} for any host")
    host = host.lower()
    if host.endswith(".") and host[-2:-1].isalnum():
        host = host[:-1]  # an absolute name; `*.` is not one
    if "*" in host or "?" in host:
        return _glob(text, host, ports)
    if host.startswith("."):
        return [("suffix", host[1:], ports)] if host != "." else [("name", host, ports)]
    value = number(host)
    return [("name", host, ports)] if value is None else [("address", value, ports)]


def _glob(text: str, host: str, ports: Ports) -> _Pattern:
    if host.startswith("*.") and host[2:] and not _SPECIAL.intersection(host[2:]) and host[2] != ".":
        return [("below", host[2:], ports)]  # the usual form, on the short way
    try:
        branches = parse_glob(host)
    except ValueError as exc:
        raise _Bad(f"{text!r} is not a pattern: {exc}") from exc
    keys: _Pattern = []
    for tokens in branches:
        match tokens:
            case [str(name)]:
                keys.append(("name", name, ports))
            case _:
                keys.append(("glob", tokens, ports))
    return keys


def _split(text: str) -> tuple[str, Ports]:
    """Split `host`, `host:80`, `host:80-90` and `[v6]:80`; more colons are an address or glob without a port."""
    if text.startswith("["):
        inside, bracket, rest = text[1:].partition("]")
        if bracket and ":" in inside and (not rest or rest.startswith(":")):
            return inside, _ports(text, rest[1:]) if rest else None
    host, colon, port = text.rpartition(":")
    if "*" in port or "?" in port:
        return text, None
    if not colon or (":" in host and not host.endswith("]")):
        if colon and "*" not in text and "?" not in text:
            raise _Bad(f"{text!r} is not a pattern: write an IPv6 address with a port as [ADDRESS]:PORT")
        return text, None
    return host, _ports(text, port)


def _ports(text: str, port: str) -> Ports:
    low, dash, high = port.partition("-")
    bounds = (low, high) if dash else (low, low)
    if not all(part.isascii() and part.isdigit() and int(part) <= 65535 for part in bounds):
        raise _Bad(f"{text!r}: {port!r} is not a port such as 443 or a range such as 8000-8100")
    first, last = (int(part) for part in bounds)
    if last < first:
        raise _Dead(f"{text!r} never matches: the range of ports ends before it begins")
    return ((first, last),)


# ---- the policies -------------------------------------------------------------------------------
class PatternBypass:
    """A list of patterns: as a blacklist it contains what matches, as a whitelist what does not.

    network    "tcp" or "udp" restricts it to that network, "" does not. Without patterns it contains nothing, except
               that a blacklist with a network contains all of that network (B32-B34).
    changed    called after the patterns have been replaced
    """

    __slots__ = ("changed", "network", "patterns", "whitelist")

    def __init__(self, patterns: Patterns, *, whitelist: bool = False, network: str = "") -> None:
        self.patterns = patterns
        self.whitelist = whitelist
        self.network = network
        self.changed: list[Callable[[], None]] = []

    @classmethod
    def from_patterns(
        cls, patterns: Iterable[str], *, whitelist: bool = False, network: str = "", path: str = "matchers"
    ) -> PatternBypass:
        """Compile `patterns`. Raise ConfigError that names the first bad one as `path[INDEX]`."""
        compiled, problems = compile_patterns(inline(patterns, path))
        refuse(problems)
        return cls(compiled, whitelist=whitelist, network=network)

    def replace(self, patterns: Patterns) -> None:
        """Put another set in place of the present one; an empty one too."""
        self.patterns = patterns
        for tell in self.changed:
            tell()

    def contains(self, network: Network, target: Endpoint) -> bool:
        """Decide about `target`; one without a host is never contained."""
        if not target.host or (self.network and self.network != network):
            return False
        if not self.patterns:
            return bool(self.network) and not self.whitelist
        return self.patterns.matches(target) != self.whitelist

    def contains_address(self, network: Network, target: Endpoint) -> bool:
        """Decide about an address behind a name that was let pass: a whitelist has decided by the name."""
        return not self.whitelist and self.contains(network, target)


class BypassGroup:
    """Several bypasses as one: what all whitelists contain, and what any blacklist contains (B36-B39)."""

    __slots__ = ("_blacklists", "_whitelists", "members")

    def __init__(self, members: Sequence[Bypass]) -> None:
        self.members = tuple(members)
        self._whitelists = [member for member in members if getattr(member, "whitelist", False)]
        self._blacklists = [member for member in members if not getattr(member, "whitelist", False)]

    def contains(self, network: Network, target: Endpoint) -> bool:
        """Decide about `target`."""
        if self._whitelists and all(member.contains(network, target) for member in self._whitelists):
            return True
        return any(member.contains(network, target) for member in self._blacklists)

    def contains_address(self, network: Network, target: Endpoint) -> bool:
        """Decide about an address behind a name that was let pass: whitelists have decided by the name."""
        return any(member.contains(network, target) for member in self._blacklists)


def combine(members: Sequence[Bypass]) -> Bypass | None:
    """Return one bypass for all of `members`, None for none."""
    if len(members) < 2:
        return members[0] if members else None
    return BypassGroup(members)


def check_network(network: str, path: str) -> str:
    """Return a bypass's `network` in lower case. Raise ConfigError for one that no flow has."""
    lowered = network.strip().lower()
    if lowered not in ("", "tcp", "udp"):
        raise ConfigError(path, f"{network!r} is not a network: tcp, udp, or nothing for both", code=CODE)
    return lowered
