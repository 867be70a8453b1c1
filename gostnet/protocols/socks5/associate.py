"""UDP ASSOCIATE, both sides: datagrams with a SOCKS5 header on a UDP socket, beside a control connection.

Whatever a single datagram holds, it never ends the association: what makes no sense is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from ...core.address import Endpoint
from ...core.datagrams import Datagram, Datagrams, pieces
from ...core.errors import ConnError, GostnetError, ProtocolError, ResolveError
from ...core.stream import Stream
from ...core.tasks import Scope
from ...core.udp_socket import UdpSocket
from ...wire.udp_frames import decode_datagram, encode_datagram

Lookup: TypeAlias = Callable[[Endpoint], Awaitable[Endpoint]]
"""Makes an address of an endpoint with a name. Raise ResolveError."""


async def until_end(control: Stream) -> None:
    """Read a control connection to its end, however it comes; what the peer says on it means nothing."""
    try:
        while await control.receive():
            pass
    except GostnetError:
        pass


class ClientDatagrams(Datagrams):
    """The handler's side: what the client sends to `socket`, which it owns, without the headers.

    host      the client's IP address: nobody else is listened to. Answers go to the port that sent last
    lookup    what turns names in answers into addresses, for clients that cannot read names; None leaves them
    """

    __slots__ = ("_host", "_lookup", "_peer", "_socket")

    def __init__(self, socket: UdpSocket, host: str, lookup: Lookup | None = None) -> None:
        super().__init__(socket.local)
        self._socket = socket
        self._host = host
        self._lookup = lookup
        self._peer: Endpoint | None = None

    async def receive(self) -> Sequence[Datagram]:
        while True:
            batch: list[Datagram] = []
            for datagram in await self._socket.receive():
                if datagram.peer.host != self._host:
                    continue
                try:
                    data, target = decode_datagram(bytes(datagram.data))
                except ProtocolError:
                    continue
                self._peer = datagram.peer
                batch.append(Datagram(data, target))
            if batch:
                return batch

    async def send(self, batch: Sequence[Datagram]) -> None:
        peer = self._peer
        if peer is None:
            return
        ready: list[Datagram] = []
        for datagram in batch:
            source = datagram.peer
            try:
                if self._lookup is not None and source.ip is None:
                    source = await self._lookup(source)
                ready += [Datagram(encode_datagram(part, source), peer) for part in pieces(datagram)]
            except (ProtocolError, ResolveError):
                continue
        await self._socket.send(ready)

    async def aclose(self) -> None:
        await self._socket.aclose()

    def abort(self) -> None:
        self._socket.abort()


class RelayedDatagrams(Datagrams):
    """The connector's side: datagrams through the proxy's UDP port.

    It owns `control`, whose end ends the association, and `below`, connected to the proxy's port.

    target    what every datagram goes to and is said to come from; None takes the address of each
    idle      seconds without a datagram either way after which it ends; 0: never
    """

    __slots__ = ("_below", "_closed", "_control", "_ended", "_idle", "_last", "_loop", "_scope", "_target")

    def __init__(self, control: Stream, below: Datagrams, target: Endpoint | None, idle: float = 0.0) -> None:
        super().__init__(below.local)
        self._control = control
        self._below = below
        self._target = target
        self._idle = idle
        self._ended = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._scope = Scope("socks5 association")
        self._scope.start(self._watch())

    async def _watch(self) -> None:
        """Let the receiver see the end of the control connection: the socket below cannot tell of it."""
        await until_end(self._control)
        self._end()

    def _end(self) -> None:
        if not self._closed:
            self._ended = True
        self._below.abort()
        self._control.abort()

    async def receive(self) -> Sequence[Datagram]:
        while True:
            try:
                received = await self._next()
            except ConnError:
                if self._ended:
                    return ()
                raise
            if not received:
                return ()
            batch: list[Datagram] = []
            for datagram in received:
                try:
                    data, source = decode_datagram(bytes(datagram.data))
                except ProtocolError:
                    continue
                batch.append(Datagram(data, self._target or source))
            if batch:
                self._last = self._loop.time()
                return batch

    async def _next(self) -> Sequence[Datagram]:
        """Wait for datagrams; () once nothing has passed for the idle time."""
        if not self._idle:
            return await self._below.receive()
        while True:
            left = self._last + self._idle - self._loop.time()
            if left <= 0:
                self._end()
                return ()
            try:
                async with asyncio.timeout(left):
                    return await self._below.receive()
            except TimeoutError:
                continue

    async def send(self, batch: Sequence[Datagram]) -> None:
        self._last = self._loop.time()
        ready: list[Datagram] = []
        for datagram in batch:
            peer = self._target or datagram.peer
            try:
                ready += [Datagram(encode_datagram(part, peer), peer) for part in pieces(datagram)]
            except ProtocolError:
                continue
        try:
            await self._below.send(ready)
        except ConnError:
            if not self._ended:
                raise

    async def aclose(self) -> None:
        self._closed = True
        self._ended = False
        await self._below.aclose()
        await self._control.aclose()
        await self._scope.cancel()

    def abort(self) -> None:
        """Close both; the task that watches the control connection ends with it, in the loop's next turns."""
        self._closed = True
        self._ended = False
        self._below.abort()
        self._control.abort()
