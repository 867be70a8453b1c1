"""Flow: what is known of one connection or association, carried as an argument through the whole pipeline.

Policies decide once and leave their verdict here as data (shapers, taps, user); the relay honours it. Nothing wraps
the connection.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias

from .address import ANY, Endpoint

Network: TypeAlias = Literal["tcp", "udp", "ip"]


@dataclass(slots=True)
class Meter:
    """Payload bytes moved so far: `up` from client to target, `down` back."""

    up: int = 0
    down: int = 0


class Shaper(Protocol):
    """A traffic limit of one direction, shared by whoever it is configured for."""

    def take(self, wanted: int) -> int:
        """Return how many bytes may move now, 0..wanted, and count them as moved.

        Raise PolicyDenied to end the flow: the quota that it counts is used up.
        """

    def give_back(self, unused: int) -> None:
        """Return bytes that `take` granted and that did not move."""

    def delay(self) -> float:
        """Seconds until `take` may return more than 0."""


@dataclass(slots=True)
class Shapers:
    """The limits that hold for one flow, per direction.

    complete   the router has put its limits on the flow; before, there may be the service's quotas only
    """

    up: list[Shaper] = field(default_factory=list)
    down: list[Shaper] = field(default_factory=list)
    complete: bool = False

    def __bool__(self) -> bool:
        return bool(self.up or self.down)


@dataclass(frozen=True, slots=True)
class Sniffed:
    """What the first bytes of a client say; "" and () where they do not say it.

    protocol   tls, http, quic, ssh, redis, dns; "" for anything else
    host       the name in the hello, or in the Host field or absolute target, without port
    port       the port beside that name, 0 where none was written
    alpn       protocols offered in the hello; ("h2",) for HTTP/2 with prior knowledge
    proxied    the request is one to a proxy: `host` is where that is to go, not whom the client has connected to
    ech        the hello has an encrypted one inside, so `host` is the public name of the provider
    method, path, query, headers, body   of an HTTP request: the path starts with "/", the query comes without "?",
               header names are as sent, `body` is what of it had arrived with the head
    """

    protocol: str = ""
    host: str = ""
    port: int = 0
    alpn: tuple[str, ...] = ()
    ech: bool = False
    proxied: bool = False
    method: str = ""
    path: str = ""
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


@dataclass(slots=True)
class Details:
    """What handlers and the router tell for the record of a flow; only there where somebody records.

    fields     what the flow's own record gets besides what the flow knows, by the names of GOST's record
    emit       writes a record with these fields besides what the flow knows
    emitted    parts that have their record: the flow then has none of its own
    """

    emit: Callable[[Mapping[str, Any]], None]
    fields: dict[str, Any] = field(default_factory=dict)
    emitted: int = 0

    def add_part(self, fields: Mapping[str, Any]) -> None:
        """Record a part of the flow: one HTTP request, one DNS query. `begun` is when, in seconds since 1970."""
        self.emitted += 1
        self.emit({**self.fields, **fields})


_NO_LABELS: Final[Mapping[str, str]] = {}

Tap: TypeAlias = Callable[[bytes, bool], None]
"""Sees every chunk: (data, True if it goes from client to target). A tap forces the copy engine."""

_BASE = int.from_bytes(os.urandom(5), "big")
_COUNT = itertools.count(int.from_bytes(os.urandom(3), "big"))
_ALPHABET = "0123456789abcdefghijklmnopqrstuv"
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
_begun: tuple[int, str] = (0, "")


def new_sid() -> str:
    """Return a session id: 20 characters of base 32, sortable by time, as GOST's logs show (the xid form).

    96 bits and four zeros, 5 bits a character: seconds since 1970 32 | of this process 40 | count 24. The first 14
    characters change once a second.
    """
    global _begun
    second = int(time.time())
    if _begun[0] != second:
        head = (second & 0xFFFFFFFF) << 38 | _BASE >> 2
        _begun = (second, "".join(_ALPHABET[head >> shift & 31] for shift in range(65, -1, -5)))
    rest = (_BASE & 3) << 28 | (next(_COUNT) & 0xFFFFFF) << 4
    return f"{_begun[1]}{_PAIRS[rest >> 20]}{_PAIRS[rest >> 10 & 1023]}{_PAIRS[rest & 1023]}"


class Flow:
    """One connection or association on its way through the pipeline.

    client     the peer's address, the PROXY protocol's source where that is in use
    ingress    the address at which it was accepted
    target     where it wants to go; known before the handler for captured and forwarded flows, set by it otherwise
    user       the client id that an authenticator returned, "" for none
    hash       what the hash selector hashes: the client's IP unless a handler says the target
    route      names of the nodes it goes through, then the target; for logs and records
    tried      nodes that failed in the present attempt to connect
    started    when it was accepted (time.monotonic)
    connected  the upstream was open and the client knew: what fails later is an end, not a refusal
    packets    datagrams passed, both ways together
    details    what goes into records besides, None where nobody records
    sniffed    what the client's first bytes say, None where nobody looked or nothing was recognised
    host       the name that was sniffed, for logs
    engine     how its bytes are moved: what is asked for before the relay, what does it then ("copy: tls")
    reason     why the flow went where it went, or was refused: one phrase for logs and explain
    """

    __slots__ = (
        "_sid",
        "client",
        "connected",
        "details",
        "engine",
        "error",
        "hash",
        "host",
        "ingress",
        "labels",
        "meter",
        "network",
        "packets",
        "reason",
        "route",
        "service",
        "shapers",
        "sniffed",
        "started",
        "taps",
        "target",
        "tried",
        "user",
    )

    def __init__(
        self,
        service: str = "",
        client: Endpoint = ANY,
        ingress: Endpoint = ANY,
        network: Network = "tcp",
        target: Endpoint | None = None,
        started: float = 0.0,
    ) -> None:
        self._sid = ""
        self.service = service
        self.client = client
        self.ingress = ingress
        self.network: Network = network
        self.target = target
        self.started = started
        self.user = ""
        self.hash = client.host
        self.host = ""
        self.sniffed: Sniffed | None = None
        self.route: tuple[str, ...] = ()
        self.tried: tuple[object, ...] = ()
        self.meter = Meter()
        self.shapers: Shapers | None = None
        self.taps: list[Tap] | None = None
        self.labels: Mapping[str, str] = _NO_LABELS
        self.error: BaseException | None = None
        self.reason = ""
        self.packets = 0
        self.details: Details | None = None
        self.engine = "auto"
        self.connected = False

    @property
    def sid(self) -> str:
        """The session id, made when first asked for."""
        if not self._sid:
            self._sid = new_sid()
        return self._sid
