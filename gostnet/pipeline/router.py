"""The router: from a target to a way out. Names, chain, retries and one deadline over the whole route. Rows R01-R15."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from ..core.address import ANY, Endpoint
from ..core.contracts import Bypass, Dials, Hosts, Resolver, TrafficLimiter
from ..core.datagrams import Datagrams
from ..core.egress import Egress
from ..core.errors import (
    BypassDenied,
    DialError,
    DialRefused,
    DialTimeout,
    GostnetError,
    NoRoute,
    PolicyDenied,
    UpstreamRejected,
)
from ..core.flow import Flow, Shapers
from ..core.hub import current_hub
from ..core.log import Logger, quiet
from ..core.stream import Stream
from ..core.tasks import deadline
from . import chain
from .destination import refuses_address
from .direct import Direct
from .names import AnyPeer, Renamed, addresses_of, associate_any, lacks_family, other_addresses
from .race import connect_any

T = TypeVar("T")
W = TypeVar("W", Stream, Datagrams)

_FINAL = (DialRefused, UpstreamRejected, NoRoute)

PAUSE = (0.05, 0.2)
"""Seconds between attempts when there is nothing else to try: a retry at once meets the same trouble."""


class ServiceRouter:
    """The Egress that a service's handler gets.

    retries    attempts after the first one
    timeout    seconds for one attempt: all hops, handshakes and the final connect
    traffic    bandwidth limits, put on each flow as data
    selective  which way a flow takes depends on more than its target: an open connection is not for everybody
    dials      told of every target, None where nobody records them
    """

    def __init__(
        self,
        direct: Egress,
        chains: chain.Router | None = None,
        *,
        bypass: Bypass | None = None,
        hosts: Hosts | None = None,
        resolver: Resolver | None = None,
        retries: int = 0,
        timeout: float = 15.0,
        traffic: Sequence[TrafficLimiter] = (),
        dials: Dials | None = None,
        log: Logger | None = None,
    ) -> None:
        self.direct = direct
        self.chains = chains
        self.bypass = bypass
        self.hosts = hosts
        self.resolver = resolver
        self.retries = max(0, retries)
        self.timeout = timeout
        self.traffic = tuple(traffic)
        self.dials = dials
        self._log = log or quiet()
        self._plain = dials is None and chains is None and hosts is None and resolver is None and not self.retries
        self.selective = chains is not None and chains.selective
        # Where the way out looks names up by itself, the bypass must see what it finds.
        self._system = direct.resolver if bypass is not None and isinstance(direct, Direct) else None

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Open a stream to `target`. Raise PolicyDenied for a bypassed target, DialError when no attempt succeeded."""
        flow.target = target
        if self.bypass is not None:
            self._refuse_bypassed(flow, target)
        if self.traffic:
            self.shape(flow)
        if self._plain and (self._system is None or target.ip is not None):
            # Nothing to look up, choose or repeat: the common case of a proxy without a chain.
            try:
                with deadline(self.timeout):
                    return await self.direct.connect(flow, target)
            except TimeoutError as exc:
                raise DialTimeout(f"{target}: no answer within {self.timeout:g}s") from exc
        if self.dials is not None:
            return await self._told(flow, target, self._connect)
        return await self._attempts(flow, target, _CONNECT)

    async def _connect(self, flow: Flow, target: Endpoint) -> Stream:
        return await self._attempts(flow, target, _CONNECT)

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open an association. With any peer allowed (`target` None), `permits` tells which peers are bypassed."""
        flow.network = "udp"
        self.shape(flow)
        if target is not None:
            flow.target = target
            self._refuse_bypassed(flow, target)
            if self.dials is not None:
                return await self._told(flow, target, self._associate)
            return await self._associate(flow, target)
        found = await self._attempts(flow, target, _ASSOCIATE)
        if isinstance(found, AnyPeer):
            # It goes out from here, so names are for us to look up, as the service says, and to judge.
            named = self.hosts is not None or self.resolver is not None
            found.use(self._look_up if named else None, self._permits_address if self.bypass is not None else None)
        return found

    async def _associate(self, flow: Flow, target: Endpoint) -> Datagrams:
        return await self._attempts(flow, target, _ASSOCIATE)

    async def _look_up(self, host: str) -> Sequence[str]:
        """Return the addresses of a datagram's peer, as the service's hosts, resolver, or the system know them."""
        found = await addresses_of(host, self.hosts, self.resolver)
        if not found and isinstance(self.direct, Direct):
            found = await self.direct.resolver.resolve(host)
        return found

    def _permits_address(self, where: Endpoint) -> bool:
        return self.bypass is None or not refuses_address(self.bypass, "udp", where)

    def admit(self, flow: Flow, target: Endpoint) -> None:
        """Decide about `target` as `connect` does, for who uses an open connection again. Raise BypassDenied."""
        flow.target = target
        self._refuse_bypassed(flow, target)
        self.shape(flow)

    def straight(self, flow: Flow, target: Endpoint) -> Egress | None:
        """Decide about `target` as `connect` does; return the direct way out, None if nodes lie between.

        Raise BypassDenied.
        """
        self.admit(flow, target)
        nodes = self.chains.route(flow, target, current_hub().loop.time()) if self.chains is not None else None
        return self.direct if nodes is None else None

    def permits(self, peer: Endpoint) -> bool:
        """Tell whether datagrams of an association may go to, or come from, `peer`."""
        return self.bypass is None or not self.bypass.contains("udp", peer)

    def shape(self, flow: Flow) -> None:
        """Put the traffic limits on the flow, once: here, because the client id is known by now."""
        if not self.traffic:
            return
        shapers = flow.shapers
        if shapers is None:
            shapers = flow.shapers = Shapers()
        if not shapers.complete:
            shapers.complete = True
            for limiter in self.traffic:
                limiter.shape(flow, shapers)

    async def _told(self, flow: Flow, target: Endpoint, reach: Callable[[Flow, Endpoint], Awaitable[W]]) -> W:
        """Reach a target, and tell those who record it what became of it."""
        assert self.dials is not None
        self.dials.dialling(flow, target)
        try:
            way = await reach(flow, target)
        except GostnetError:
            self.dials.failed(flow, target)
            raise
        self.dials.reached(flow, target, way.local, way.remote if isinstance(way, Stream) else target)
        return way

    def _refuse_bypassed(self, flow: Flow, target: Endpoint) -> None:
        if self.bypass is not None and self.bypass.contains(flow.network, target):
            flow.reason = f"{target} is bypassed by the service"
            raise BypassDenied(flow.reason)

    async def _attempts(self, flow: Flow, target: Endpoint | None, kind: _Kind[T]) -> T:
        for attempt in range(self.retries + 1):
            try:
                return await self._attempt(flow, target, kind)
            except PolicyDenied:
                raise
            except GostnetError as exc:
                self._log.debug(f"route(retry={attempt}) {exc}", sid=flow.sid)
                # A target that refused will refuse again, a flow that no node is for has none; another node may help.
                if attempt == self.retries or (isinstance(exc, _FINAL) and not flow.tried):
                    raise
                if not flow.tried:
                    await asyncio.sleep(random.uniform(*PAUSE))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, flow: Flow, target: Endpoint | None, kind: _Kind[T]) -> T:
        routes: list[chain.Route] = []
        try:
            with deadline(self.timeout):
                if target is None:
                    return await self._through(flow, None, kind, routes)
                if self.hosts is not None or self.resolver is not None:
                    found = await addresses_of(target.host, self.hosts, self.resolver)
                    if found:
                        return await self._to_any(flow, target, found, kind, routes)
                return await self._through(flow, target, kind, routes)
        except TimeoutError as exc:
            for route in routes:
                route.blame(flow)
            raise DialTimeout(f"{target or 'association'}: no answer within {self.timeout:g}s") from exc

    async def _to_any(
        self, flow: Flow, target: Endpoint, hosts: Sequence[str], kind: _Kind[T], routes: list[chain.Route]
    ) -> T:
        """Reach one of the addresses of `target`; where they are slow or lead nowhere, of the other family as well."""
        tried = flow.tried

        def dial(where: Endpoint) -> Awaitable[T]:
            return self._through(flow, where, kind, routes)

        async def others() -> Sequence[str]:
            if flow.tried is not tried:
                return ()  # it was a node that failed
            found = await other_addresses(target.host, self.hosts, self.resolver, hosts)
            return self._allowed(flow, target, found)

        more = lacks_family(target.host, self.hosts, self.resolver, hosts)
        return await kind.any_of(dial, self._permitted(flow, target, hosts), target, others if more else None)

    async def _through(self, flow: Flow, where: Endpoint | None, kind: _Kind[T], routes: list[chain.Route]) -> T:
        """Reach `where`, a name or one of its addresses, by the route that the chain gives for it."""
        if self.chains is not None:
            route = self.chains.route(flow, where or ANY, current_hub().loop.time())
            if route is not None:
                routes.append(route)
                flow.route = route.path
                return await kind.reach(route, flow, where)
        if where is not None and self._system is not None and where.host and where.ip is None:
            found = self._permitted(flow, where, await self._system.resolve(where.host))
            return await kind.any_of(lambda address: kind.reach(self.direct, flow, address), found, where)
        return await kind.reach(self.direct, flow, where)

    def _permitted(self, flow: Flow, target: Endpoint, hosts: Sequence[str]) -> Sequence[str]:
        """Return the addresses behind an allowed name that are allowed as well. Raise BypassDenied for none (R16)."""
        found = self._allowed(flow, target, hosts)
        if hosts and not found:
            flow.reason = f"{Endpoint(hosts[0], target.port)}, behind {target.host}, is bypassed by the service"
            raise BypassDenied(flow.reason)
        return found

    def _allowed(self, flow: Flow, target: Endpoint, hosts: Sequence[str]) -> Sequence[str]:
        bypass = self.bypass
        if bypass is None:
            return hosts
        return [host for host in hosts if not refuses_address(bypass, flow.network, Endpoint(host, target.port))]


class _Kind(Protocol[T]):
    """What is asked of a way out: a stream or an association."""

    async def reach(self, way: Egress, flow: Flow, where: Endpoint | None) -> T: ...

    async def any_of(
        self,
        dial: Callable[[Endpoint], Awaitable[T]],
        hosts: Sequence[str],
        target: Endpoint,
        others: Callable[[], Awaitable[Sequence[str]]] | None = None,
    ) -> T: ...


class _Connecting:
    async def reach(self, way: Egress, flow: Flow, where: Endpoint | None) -> Stream:
        assert where is not None
        return await way.connect(flow, where)

    async def any_of(
        self,
        dial: Callable[[Endpoint], Awaitable[Stream]],
        hosts: Sequence[str],
        target: Endpoint,
        others: Callable[[], Awaitable[Sequence[str]]] | None = None,
    ) -> Stream:
        return await connect_any(dial, hosts, target.port, others)


class _Associating:
    async def reach(self, way: Egress, flow: Flow, where: Endpoint | None) -> Datagrams:
        return await way.associate(flow, where)

    async def any_of(
        self,
        dial: Callable[[Endpoint], Awaitable[Datagrams]],
        hosts: Sequence[str],
        target: Endpoint,
        others: Callable[[], Awaitable[Sequence[str]]] | None = None,
    ) -> Datagrams:
        try:
            return Renamed(await associate_any(dial, hosts, target.port), target)
        except DialError:
            found = await others() if others is not None else ()
            if not found:
                raise
            return Renamed(await associate_any(dial, found, target.port), target)


_CONNECT = _Connecting()
_ASSOCIATE = _Associating()
