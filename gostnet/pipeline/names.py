"""Names on the way out: which addresses stand behind a target, and datagrams to peers that are called by name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from ..core.address import Endpoint
from ..core.contracts import Hosts, Resolver
from ..core.datagrams import Datagram, Datagrams, pieces
from ..core.egress import Egress
from ..core.errors import GostnetError, ResolveError
from ..core.flow import Flow
from ..core.passing import PassingDatagrams
from ..core.stream import Stream
from ..core.tasks import Scope
from ..core.udp_socket import UdpSocket
from .race import connect_any

KEEP = 10.0
"""Seconds that a datagram peer's address is kept: it must not change with every datagram of a conversation."""

MAX_NAMES = 256
"""Names that one association knows at a time; the oldest one makes room."""

MAX_HELD = 64
"""Datagrams of one association that wait for look-ups; more are dropped."""


async def addresses_of(host: str, hosts: Hosts | None, resolver: Resolver | None, family: int = 0) -> Sequence[str]:
    """Return the addresses that `hosts`, else `resolver`, has for `host`, in their order of preference.

    () means that neither speaks for it: the name travels on as it is. `hosts` are asked about addresses too, the
    resolver is not. Raise ResolveError from the resolver.
    """
    if not host:
        return ()
    if hosts is not None:
        found = hosts.lookup(host, family)
        if found:
            return found
    if resolver is not None and Endpoint(host, 0).ip is None:
        answer = await resolver.resolve(host, family)
        if not answer:
            raise ResolveError(f"{host} has no address")
        return answer
    return ()


async def other_addresses(
    host: str, hosts: Hosts | None, resolver: Resolver | None, known: Sequence[str]
) -> Sequence[str]:
    """Return the addresses of `host` in the family that `known` has none of: for when those are slow or lead nowhere.

    A resolver gives those of the family that it prefers, so that usually one question is enough. () for none.
    """
    if resolver is None or not lacks_family(host, hosts, resolver, known):
        return ()
    six = [":" in address for address in known]
    try:
        found = await resolver.resolve(host, 4 if six[0] else 6)
    except ResolveError:
        return ()
    return [address for address in found if address not in known]


def lacks_family(host: str, hosts: Hosts | None, resolver: Resolver | None, known: Sequence[str]) -> bool:
    """Tell whether there may be addresses of `host` in another family than `known` has, which nobody has asked for."""
    if resolver is None or getattr(resolver, "both_families", False) or Endpoint(host, 0).ip is not None:
        return False
    return len({":" in address for address in known}) == 1 and not (hosts is not None and hosts.lookup(host))


async def resolved(address: Endpoint, hosts: Hosts | None, resolver: Resolver | None, family: int = 0) -> Endpoint:
    """Return `address` with its name made the first address of it: for messages, which have room for one."""
    found = await addresses_of(address.host, hosts, resolver, family)
    return Endpoint(found[0], address.port) if found else address


class Named:
    """A way out that looks names up before it asks the one below, which then gets an address."""

    __slots__ = ("_hosts", "_lower", "_resolver")

    def __init__(self, lower: Egress, hosts: Hosts | None, resolver: Resolver | None) -> None:
        self._lower = lower
        self._hosts = hosts
        self._resolver = resolver

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Connect to any address of `target`. Raise what the first failure was."""
        found = await addresses_of(target.host, self._hosts, self._resolver)
        if not found:
            return await self._lower.connect(flow, target)

        def dial(where: Endpoint) -> Awaitable[Stream]:
            return self._lower.connect(flow, where)

        if not lacks_family(target.host, self._hosts, self._resolver, found):
            return await connect_any(dial, found, target.port)
        tried = flow.tried

        async def others() -> Sequence[str]:
            if flow.tried is not tried:
                return ()  # it was a node before this one that failed
            return await other_addresses(target.host, self._hosts, self._resolver, found)

        return await connect_any(dial, found, target.port, others)

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open an association to the first address of `target` for which that works."""
        found = await addresses_of(target.host, self._hosts, self._resolver) if target is not None else ()
        if target is None or not found:
            return await self._lower.associate(flow, target)
        return await associate_any(lambda where: self._lower.associate(flow, where), found, target.port)


async def associate_any(
    associate: Callable[[Endpoint], Awaitable[Datagrams]], hosts: Sequence[str], port: int
) -> Datagrams:
    """Open an association to the first of the addresses for which it can be opened: datagrams tell no more."""
    error: GostnetError | None = None
    for host in hosts:
        try:
            return await associate(Endpoint(host, port))
        except GostnetError as exc:
            error = error or exc
    assert error is not None
    raise error


LookUp = Callable[[str], Awaitable[Sequence[str]]]
Permits = Callable[[Endpoint], bool]


@dataclass(slots=True)
class _Peer:
    """What is known of a name: its addresses until a time, or the datagrams that wait for them."""

    hosts: Sequence[str] = ()
    until: float = 0.0
    held: list[Datagram] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class Renamed(PassingDatagrams):
    """An association with one peer, which is called by the name that was asked for."""

    __slots__ = ("_peer",)

    def __init__(self, below: Datagrams, peer: Endpoint) -> None:
        super().__init__(below)
        self._peer = peer

    async def receive(self) -> Sequence[Datagram]:
        batch = await self._below.receive()
        for datagram in batch:
            datagram.peer = self._peer
        return batch

    def transparent_over(self) -> Datagrams:
        """Return the association below: its one peer is the same, whatever it is called."""
        return self._below


class AnyPeer(Datagrams):
    """An unconnected socket that looks up the names of peers, each by itself: a slow one holds back no other.

    A datagram whose peer has no address, or none that is permitted, is dropped.
    """

    __slots__ = ("_below", "_count", "_look_up", "_loop", "_peers", "_permits", "_scope")

    def __init__(self, below: UdpSocket, look_up: LookUp) -> None:
        super().__init__(below.local)
        self._below = below
        self._look_up = look_up
        self._permits: Permits | None = None
        self._peers: dict[str, _Peer] = {}
        self._count = 0
        self._scope: Scope | None = None
        self._loop = asyncio.get_running_loop()

    def use(self, look_up: LookUp | None, permits: Permits | None) -> None:
        """Look names up by `look_up` from now on, where given; `permits` decides about the addresses that are found."""
        if look_up is not None:
            self._look_up = look_up
        self._permits = permits

    async def receive(self) -> Sequence[Datagram]:
        return await self._below.receive()

    async def send(self, batch: Sequence[Datagram]) -> None:
        ready: list[Datagram] = []
        for datagram in batch:
            peer = datagram.peer
            if peer.port == 0 or not peer.host:
                continue
            if peer.ip is not None:
                ready.append(datagram)
            elif (named := self._named(datagram)) is not None:
                ready.append(named)
        if ready:
            await self._below.send(ready)

    def _named(self, datagram: Datagram) -> Datagram | None:
        """Return the datagram with its peer's address if that is known; else it waits, or is dropped."""
        name = datagram.peer.host.lower()
        peer = self._peers.get(name)
        if peer is None or (peer.task is None and peer.until <= self._loop.time()):
            self._peers.pop(name, None)
            if len(self._peers) >= MAX_NAMES and not self._forget():
                return None
            peer = self._peers[name] = _Peer()
            if self._scope is None:
                self._scope = Scope("datagram names")
            peer.task = self._scope.start(self._find(name, peer))
        if peer.task is not None:
            for data in map(bytes, pieces(datagram)):
                if self._count < MAX_HELD:
                    self._count += 1
                    peer.held.append(Datagram(data, datagram.peer))
            return None
        return self._addressed(peer, datagram)

    def _addressed(self, peer: _Peer, datagram: Datagram) -> Datagram | None:
        port = datagram.peer.port
        for host in peer.hosts:
            where = Endpoint(host, port)
            if self._permits is None or self._permits(where):
                return Datagram(datagram.data, where, datagram.stride)
        return None

    def _forget(self) -> bool:
        """Make room for a name; False if all are being looked up."""
        for name, peer in self._peers.items():
            if peer.task is None:
                del self._peers[name]
                return True
        return False

    async def _find(self, name: str, peer: _Peer) -> None:
        """Look a name up, keep what came of it for a while, and send what waited."""
        try:
            hosts = await self._look_up(name)
        except GostnetError:
            hosts = ()  # that is kept as well: a name that does not exist is not asked about for every datagram
        # GOST prefers the first IPv4 address for names inside datagrams (protocols 1.2).
        peer.hosts = sorted(hosts, key=lambda host: ":" in host)
        peer.until = self._loop.time() + KEEP
        peer.task = None
        held, peer.held = peer.held, []
        self._count -= len(held)
        ready = [found for datagram in held if (found := self._addressed(peer, datagram)) is not None]
        if ready:
            self._below.send_now(ready)

    def _end(self) -> None:
        for peer in self._peers.values():
            if peer.task is not None:
                peer.task.cancel()
        self._peers = {}

    async def aclose(self) -> None:
        self._end()
        await self._below.aclose()

    def abort(self) -> None:
        self._end()
        self._below.abort()
