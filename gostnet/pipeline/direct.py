"""The direct way out: sockets of this host, with the system's or the user's names behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ..core.address import Endpoint, parse_ip
from ..core.contracts import Resolver
from ..core.datagrams import Datagram, Datagrams
from ..core.errors import DialError, ResolveError
from ..core.flow import Flow
from ..core.sockets import PLAIN, DialOptions, SocketStream, UdpSocket, connect_tcp, open_udp
from ..core.stream import Stream
from ..core.tasks import Scope

FALLBACK_DELAY = 0.3
"""Seconds before the next address is tried beside the one at hand: Go's happy-eyeballs delay (RFC 8305)."""


class Direct:
    """Connects from this host.

    options    alternatives in order: GOST's `interface` list; the next is tried when one fails, unless it is strict
    """

    def __init__(self, resolver: Resolver, options: Sequence[DialOptions] = (PLAIN,)) -> None:
        self._resolver = resolver
        self._options = tuple(options)

    @property
    def resolver(self) -> Resolver:
        """What names are looked up with."""
        return self._resolver

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Connect to `target`, a name by all its addresses. Raise DialError."""
        host = target.host or "127.0.0.1"
        if parse_ip(host) is not None:
            return await self._connect_ip(host, target.port, flow)
        addresses = await self._resolver.resolve(host)
        if not addresses:
            raise ResolveError(f"{host} has no address")
        if len(addresses) == 1:
            return await self._connect_ip(addresses[0], target.port, flow)
        return await self._race(addresses, target, flow)

    async def _connect_ip(self, host: str, port: int, flow: Flow) -> SocketStream:
        error: DialError | None = None
        for options in self._options:
            try:
                return await connect_tcp(host, port, options)
            except DialError as exc:
                error = exc
                if options.strict:
                    break
        assert error is not None
        raise error

    async def _race(self, addresses: Sequence[str], target: Endpoint, flow: Flow) -> SocketStream:
        """Try the addresses in order, the next one FALLBACK_DELAY later or as soon as one fails; the first wins."""
        loop = asyncio.get_running_loop()
        scope = Scope("dial")
        won: asyncio.Future[SocketStream] = loop.create_future()
        errors: list[DialError] = []
        wake = asyncio.Event()
        running = 0

        async def attempt(host: str) -> None:
            nonlocal running
            try:
                stream = await self._connect_ip(host, target.port, flow)
            except DialError as exc:
                errors.append(exc)
            else:
                if won.done():
                    stream.abort()
                else:
                    won.set_result(stream)
            finally:
                running -= 1
                wake.set()

        try:
            waiting = list(addresses)
            while not won.done():
                if waiting:
                    running += 1
                    scope.start(attempt(waiting.pop(0)))
                elif not running:
                    raise errors[0]
                wake.clear()
                try:
                    async with asyncio.timeout(FALLBACK_DELAY if waiting else None):
                        await wake.wait()
                except TimeoutError:
                    pass
            return won.result()
        except asyncio.CancelledError:
            if won.done() and not won.cancelled():
                won.result().abort()
            raise
        finally:
            await scope.cancel()

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open a UDP socket, connected to `target`; without one, for any peer, names resolved per datagram."""
        options = self._options[0]
        if target is None:
            return _AnyPeer(open_udp(None, options), self._resolver)
        if target.ip is None:
            addresses = await self._resolver.resolve(target.host)
            if not addresses:
                raise ResolveError(f"{target.host} has no address")
            return _Renamed(open_udp(Endpoint(addresses[0], target.port), options), target)
        return open_udp(target, options)


class _Renamed(Datagrams):
    """A connected socket whose peer is called by the name that was asked for."""

    __slots__ = ("_below", "_target")

    def __init__(self, below: UdpSocket, target: Endpoint) -> None:
        super().__init__(below.local)
        self._below = below
        self._target = target

    async def receive(self) -> Sequence[Datagram]:
        batch = await self._below.receive()
        for datagram in batch:
            datagram.peer = self._target
        return batch

    async def send(self, batch: Sequence[Datagram]) -> None:
        await self._below.send(batch)

    async def aclose(self) -> None:
        await self._below.aclose()

    def abort(self) -> None:
        self._below.abort()


class _AnyPeer(Datagrams):
    """An unconnected socket that resolves names of peers. A datagram whose peer has no address is dropped."""

    __slots__ = ("_below", "_resolver")

    def __init__(self, below: UdpSocket, resolver: Resolver) -> None:
        super().__init__(below.local)
        self._below = below
        self._resolver = resolver

    async def receive(self) -> Sequence[Datagram]:
        return await self._below.receive()

    async def send(self, batch: Sequence[Datagram]) -> None:
        ready: list[Datagram] = []
        for datagram in batch:
            peer = datagram.peer
            if peer.port == 0 or not peer.host:
                continue
            if peer.ip is None:
                try:
                    addresses = await self._resolver.resolve(peer.host)
                except ResolveError:
                    continue
                if not addresses:
                    continue
                # GOST prefers the first IPv4 address for names inside datagrams (protocols 1.2).
                host = next((text for text in addresses if ":" not in text), addresses[0])
                datagram = Datagram(datagram.data, Endpoint(host, peer.port), datagram.stride)
            ready.append(datagram)
        await self._below.send(ready)

    async def aclose(self) -> None:
        await self._below.aclose()

    def abort(self) -> None:
        self._below.abort()
