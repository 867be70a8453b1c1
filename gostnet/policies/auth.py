"""Authentication: users and passwords, and clients that need none. Rows U01-U09."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final

from ..core.address import Endpoint
from ..core.contracts import Authenticator
from ..core.errors import ConfigError
from ..core.options import Problem
from .entries import Entry
from .networks import Networks, parse_range

CODE: Final = "config.auth"

_KEY: Final = os.urandom(32)


def _digest(text: str) -> bytes:
    """Hash to one length, with a key of this process, so that a comparison tells nothing about the stored text."""
    return blake2b(text.encode("utf-8", "surrogatepass"), key=_KEY, digest_size=32).digest()


class Users:
    """A table of users, of which only digests are kept. An empty password accepts any (U02)."""

    __slots__ = ("_digests",)

    def __init__(self, passwords: Mapping[str, str]) -> None:
        self._digests = {user: _digest(password) if password else None for user, password in passwords.items()}

    def __len__(self) -> int:
        return len(self._digests)

    def accepts(self, username: str, password: str) -> bool:
        """Check a pair, in a time that does not depend on what is stored."""
        known = username in self._digests
        stored = self._digests.get(username)
        equal = hmac.compare_digest(_digest(password), stored if stored is not None else _NOBODY)
        return known and (stored is None or equal)


_NOBODY: Final = os.urandom(32)


def compile_users(inline: Mapping[str, str], entries: Iterable[Entry]) -> tuple[Users, list[Problem]]:
    """Return the users of the configuration and of lines `user password`; later ones replace earlier ones.

    The password is the rest of the line, blanks inside included; a line of one word is a user whose password is empty.
    """
    passwords = dict(inline)
    for entry in entries:
        words = entry.text.replace("\t", " ").split(" ", 1)
        passwords[words[0]] = words[1].strip() if len(words) == 2 else ""
    return Users(passwords), []


class StaticAuthenticator:
    """Checks against a table; an empty one refuses everybody (U05). The client id is the user name."""

    __slots__ = ("users",)

    def __init__(self, users: Users) -> None:
        self.users = users

    def replace(self, users: Users) -> None:
        """Put another table in place of the present one."""
        self.users = users

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        """Return `username` if the pair is right, else None."""
        return username if self.users.accepts(username, password) else None


class AnyOf:
    """Accepts what any of its members accepts, the first one's client id counting."""

    __slots__ = ("_members",)

    def __init__(self, members: Sequence[Authenticator]) -> None:
        self._members = tuple(members)

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        """Ask the members in order; without members refuse."""
        for member in self._members:
            client_id = member.authenticate(username, password, client)
            if client_id is not None:
                return client_id
        return None


class SkipAuth:
    """Lets clients of certain networks in without asking, with an empty client id (U06); others prove themselves."""

    __slots__ = ("_inner", "networks")

    def __init__(self, inner: Authenticator, networks: Networks) -> None:
        self._inner = inner
        self.networks = networks

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        """Return "" for a client of the networks, else the inner verdict."""
        return "" if client in self.networks else self._inner.authenticate(username, password, client)


def parse_skipauth(value: Any, path: str) -> Networks:
    """Return the clients that a handler's `skipauth` names: a list, or a string with commas. Raise ConfigError."""
    texts = value.split(",") if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise ConfigError(path, f"{value!r} is not a list of addresses and networks", code=CODE)
    ranges = []
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            continue
        found = parse_range(text.strip())
        if found is None:
            raise ConfigError(path, f"{text.strip()!r} is not an address or a network such as 10.0.0.0/8", code=CODE)
        ranges.append(found)
    return Networks(ranges)


def authenticator_of(
    authers: Sequence[Authenticator], username: str = "", password: str = "", skip: Networks | None = None
) -> Authenticator | None:
    """Return what a handler or listener asks, None where nobody has to prove anything.

    `authers` are those it names; only without any does its own pair count, and that only with a user name.
    """
    chosen: Authenticator | None = None
    if len(authers) > 1:
        chosen = AnyOf(authers)
    elif authers:
        chosen = authers[0]
    elif username:
        chosen = StaticAuthenticator(Users({username: password}))
    return SkipAuth(chosen, skip) if chosen is not None and skip else chosen
