"""The resolver: names by configured DNS servers, with a cache. Rows Y01-Y17.

Servers are asked in turn until one has addresses. A server that says that there are none does not speak for the next
one, so the cache knows what each of them said.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import dns.exception
import dns.message
import dns.name
import dns.rdatatype

from ..core.errors import ResolveError
from ..core.tasks import Scope
from .bucket import Clock
from .nameserver import SERVICE, Family, NameServer, Refused, ask
from .networks import number

MAX_ENTRIES: Final = 10_000
"""Answers in the cache; the least recently used one makes room."""
MAX_TTL: Final = 86_400.0
"""Seconds that an answer is kept at most, whatever it says (RFC 8767 section 4 advises a bound)."""
MAX_NEGATIVE_TTL: Final = 60.0
"""Seconds for "there are none" (RFC 2308 section 5)."""
MAX_STALE: Final = 86_400.0
"""Seconds after its end during which an answer may still be used while it is refreshed (RFC 8767 section 5)."""
MAX_REFRESHES: Final = 32
"""Refreshes at a time, as in GOST; beyond it an answer is refreshed when next asked for."""

_Key: TypeAlias = "tuple[int, dns.name.Name, Family]"


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server said: addresses, and for how many seconds that holds."""

    addresses: tuple[str, ...]
    ttl: float


@dataclass(slots=True)
class _Entry:
    addresses: tuple[str, ...]
    expires: float


class Cache:
    """Answers by server, name and family; bounded."""

    __slots__ = ("_entries", "_limit")

    def __init__(self, limit: int = MAX_ENTRIES) -> None:
        self._limit = limit
        self._entries: dict[_Key, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: _Key) -> _Entry | None:
        """Return an entry, expired or not, and note that it is in use."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._entries[key] = entry
        return entry

    def put(self, key: _Key, entry: _Entry) -> None:
        """Store an entry, in place of the least recently used one when the cache is full."""
        self._entries.pop(key, None)
        while len(self._entries) >= self._limit:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = entry

    def drop(self, key: _Key) -> None:
        """Forget an entry."""
        self._entries.pop(key, None)


class DNSResolver:
    """Asks name servers. Belongs to one loop; `aclose` ends what is under way.

    clock    seconds, never going back
    report   takes a sentence about each server that failed, for the log
    """

    def __init__(
        self,
        servers: Sequence[NameServer],
        *,
        clock: Clock = time.monotonic,
        entries: int = MAX_ENTRIES,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.servers = tuple(servers)
        self.cache = Cache(entries)
        self._clock = clock
        self._report = report or (lambda _: None)
        self._scope: Scope | None = None
        self._closed = False
        self._running: dict[_Key, asyncio.Future[_Answer | ResolveError]] = {}
        self._refreshing = 0

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        """Return the addresses of `host`; an IP address is its own, whatever the family (Y14).

        They are of one family: the preferred one that has any. Raise ResolveError when no server knows one.
        """
        if number(host) is not None:
            return [host]
        name = _name(host)
        failure: ResolveError | None = None
        answered = False
        for index, server in enumerate(self.servers):
            try:
                addresses = await self._ask_server(index, server, name, family)
            except ResolveError as exc:
                failure = exc
                self._report(str(exc))
                continue
            if addresses:
                return list(addresses)
            answered = True
        if failure is not None and not answered:
            raise failure
        raise ResolveError(f"{host} does not exist")

    async def _ask_server(self, index: int, server: NameServer, name: dns.name.Name, asked: int) -> tuple[str, ...]:
        """Return what one server knows, () if that is nothing. Raise ResolveError if it knows nothing for sure."""
        refusal: Refused | None = None
        for family in server.families(asked):
            try:
                addresses = await self._look_up((index, name, family), server)
            except Refused as exc:
                refusal = exc  # some servers fail for the family that a name does not have
                continue
            if addresses:
                return addresses
        if refusal is not None:
            raise refusal
        return ()

    async def _look_up(self, key: _Key, server: NameServer) -> tuple[str, ...]:
        """Answer from the cache, else by the server; questions that are under way already are shared (Y17)."""
        entry = self.cache.get(key)
        if entry is not None:
            age = self._clock() - entry.expires
            if age < 0:
                return entry.addresses
            if server.stale and entry.addresses and age < MAX_STALE:
                if self._refreshing < MAX_REFRESHES and key not in self._running:
                    self._refreshing += 1
                    self._start(key, server).add_done_callback(self._refreshed)
                return entry.addresses
        running = self._running.get(key) or self._start(key, server)
        # The answer belongs to all who wait: one that is cancelled must not take it along.
        outcome = await asyncio.shield(running)
        if isinstance(outcome, ResolveError):
            raise type(outcome)(str(outcome))
        return outcome.addresses

    def _refreshed(self, _: object) -> None:
        self._refreshing -= 1

    def _start(self, key: _Key, server: NameServer) -> asyncio.Future[_Answer | ResolveError]:
        running: asyncio.Future[_Answer | ResolveError] = asyncio.get_running_loop().create_future()
        if self._closed:
            running.set_result(ResolveError("the resolver is closed"))
            return running
        if self._scope is None:
            self._scope = Scope(SERVICE)
        self._running[key] = running
        self._scope.start(self._fetch(key, server, running))
        return running

    async def _fetch(self, key: _Key, server: NameServer, running: asyncio.Future[_Answer | ResolveError]) -> None:
        """Ask, fill the cache, and give the outcome to those who wait, whatever happens."""
        outcome: _Answer | ResolveError = ResolveError(f"{server}: the question was given up")
        try:
            outcome = _read(await ask(server, key[1], key[2]), server, key[2])
            if outcome.ttl > 0:
                self.cache.put(key, _Entry(outcome.addresses, self._clock() + outcome.ttl))
            else:
                self.cache.drop(key)
        except ResolveError as exc:
            outcome = exc
        finally:
            del self._running[key]
            if not running.done():
                running.set_result(outcome)

    async def aclose(self) -> None:
        """End the questions under way; who waits for them gets ResolveError."""
        self._closed = True
        if self._scope is not None:
            await self._scope.cancel()
        for server in self.servers:
            server.kept.close()


def _name(host: str) -> dns.name.Name:
    """Return the name in lower case: the cache must not depend on how it is written (Y02)."""
    if not host.strip("."):
        raise ResolveError(f"{host[:64]!r} is not a host name")
    try:
        return dns.name.from_text(host.lower())
    except (dns.exception.DNSException, UnicodeError) as exc:
        raise ResolveError(f"{host[:64]!r} is not a host name") from exc


def _read(message: dns.message.QueryMessage, server: NameServer, family: Family) -> _Answer:
    """Return the addresses at the end of the answer's chain of aliases. Raise Refused for a broken one."""
    try:
        chain = message.resolve_chaining()
    except dns.exception.DNSException as exc:
        raise Refused(f"{server}: a broken answer: {exc}") from exc
    addresses = tuple(rdata.to_text() for rdata in chain.answer) if chain.answer is not None else ()
    ttl = float(chain.minimum_ttl)
    if not addresses and not any(rrset.rdtype == dns.rdatatype.SOA for rrset in message.authority):
        ttl = 0.0  # nothing says how long that holds
    if server.ttl < 0:
        ttl = 0.0
    elif addresses:
        ttl = min(server.ttl or ttl, MAX_TTL)
    else:
        ttl = min(ttl, MAX_NEGATIVE_TTL)
    return _Answer(addresses, ttl)
