"""The router: from a target to a way out. Names, chain, retries and one deadline over the whole route. Rows R01-R15."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ..core.address import Endpoint
from ..core.contracts import Bypass, Hosts, Resolver, TrafficLimiter
from ..core.datagrams import Datagrams
from ..core.egress import Egress
from ..core.errors import BypassDenied, DialRefused, DialTimeout, GostnetError, PolicyDenied, UpstreamRejected
from ..core.flow import Flow, Shapers
from ..core.hub import current_hub
from ..core.log import Logger, quiet
from ..core.stream import Stream
from ..core.tasks import deadline
from . import chain
from .node import resolved

T = TypeVar("T")

PAUSE = (0.05, 0.2)
"""Seconds between attempts when there is nothing else to try: a retry at once meets the same trouble."""


class ServiceRouter:
    """The Egress that a service's handler gets.

    retries    attempts after the first one
    timeout    seconds for one attempt: all hops, handshakes and the final connect
    traffic    bandwidth limits, put on each flow as data
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
        self._log = log or quiet()
        self._plain = chains is None and hosts is None and resolver is None and not self.retries

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Open a stream to `target`. Raise PolicyDenied for a bypassed target, DialError when no attempt succeeded."""
        flow.target = target
        if self.bypass is not None:
            self._refuse_bypassed(flow, target)
        if self.traffic:
            self._shape(flow)
        if self._plain:
            # Nothing to look up, choose or repeat: the common case of a proxy without a chain.
            try:
                with deadline(self.timeout):
                    return await self.direct.connect(flow, target)
            except TimeoutError as exc:
                raise DialTimeout(f"{target}: no answer within {self.timeout:g}s") from exc
        return await self._attempts(flow, target, lambda way, where: way.connect(flow, where))

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open an association. With any peer allowed (`target` None), `permits` tells which peers are bypassed."""
        flow.network = "udp"
        self._shape(flow)
        if target is None:
            return await self._attempts(flow, None, lambda way, _: way.associate(flow, None))
        flow.target = target
        self._refuse_bypassed(flow, target)
        return await self._attempts(flow, target, lambda way, where: way.associate(flow, where))

    def admit(self, flow: Flow, target: Endpoint) -> None:
        """Decide about `target` as `connect` does, for who uses an open connection again. Raise BypassDenied."""
        flow.target = target
        self._refuse_bypassed(flow, target)
        self._shape(flow)

    def permits(self, peer: Endpoint) -> bool:
        """Tell whether datagrams of an association may go to, or come from, `peer`."""
        return self.bypass is None or not self.bypass.contains("udp", peer)

    def _shape(self, flow: Flow) -> None:
        """Put the traffic limits on the flow: here, because the client id is known by now."""
        if self.traffic and flow.shapers is None:
            shapers = flow.shapers = Shapers()
            for limiter in self.traffic:
                limiter.shape(flow, shapers)

    def _refuse_bypassed(self, flow: Flow, target: Endpoint) -> None:
        if self.bypass is not None and self.bypass.contains(flow.network, target):
            flow.reason = f"{target} is bypassed by the service"
            raise BypassDenied(flow.reason)

    async def _attempts(
        self, flow: Flow, target: Endpoint | None, reach: Callable[[Egress, Endpoint], Awaitable[T]]
    ) -> T:
        for attempt in range(self.retries + 1):
            try:
                return await self._attempt(flow, target, reach)
            except PolicyDenied:
                raise
            except GostnetError as exc:
                self._log.debug(f"route(retry={attempt}) {exc}", sid=flow.sid)
                # A target that refused will refuse again; what helps is another node.
                if attempt == self.retries or (isinstance(exc, DialRefused | UpstreamRejected) and not flow.tried):
                    raise
                if not flow.tried:
                    await asyncio.sleep(random.uniform(*PAUSE))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(
        self, flow: Flow, target: Endpoint | None, reach: Callable[[Egress, Endpoint], Awaitable[T]]
    ) -> T:
        route: chain.Route | None = None
        try:
            with deadline(self.timeout):
                where = target or Endpoint("", 0)
                if target is not None and (self.hosts is not None or self.resolver is not None):
                    where = await resolved(target, self.hosts, self.resolver)
                    if self.bypass is not None and where != target:
                        # The address behind an allowed name may be one that is refused.
                        self._refuse_bypassed(flow, where)
                way: Egress = self.direct
                if self.chains is not None:
                    route = self.chains.route(flow, where, current_hub().loop.time())
                    if route is not None:
                        way = route
                        flow.route = tuple(f"{node.name}@{node.address}" for node in route.nodes)
                return await reach(way, where)
        except TimeoutError as exc:
            if route is not None:
                route.blame(flow, current_hub().loop.time())
            raise DialTimeout(f"{target or 'association'}: no answer within {self.timeout:g}s") from exc
