"""Connectors without a protocol: the stream to the node as it is (`forward`, `tcp`), or no node at all (`direct`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.address import ANY, Endpoint
from ...core.datagrams import Datagram, Datagrams
from ...core.egress import Egress
from ...core.errors import ConnError, DialError
from ...core.flow import Flow
from ...core.options import opt
from ...core.registry import component
from ...core.stream import CHUNK, Buffer, Stream
from ...pipeline.connector import ConnectorContext


@component("connector", "forward", "tcp")
class ForwardConnector:
    """Leaves it to the node where the stream goes: a port forwarder, or a protocol that the client speaks itself."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `forward` and `tcp`: none."""

    def __init__(self, options: Options, context: ConnectorContext) -> None:
        self._name = context.name

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        """Say nothing."""
        return below

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        """Return `below`, whatever the target."""
        return below

    async def associate(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams:
        """Raise DialError: a stream as it is keeps no borders between datagrams."""
        raise DialError(
            f"a plain stream to {self._name or 'the node'} carries no datagrams",
            hint="use a connector that frames them, such as relay",
        )


@component("connector", "direct", "virtual")
class DirectConnector:
    """Connects from this host, with the node's own interface, mark and namespace; or to nowhere."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `direct` and `virtual`."""

        action: str = opt("", "`reject` connects to nothing: what is sent vanishes, and there is no answer.")

    def __init__(self, options: Options, context: ConnectorContext) -> None:
        self._reject = options.action.lower() == "reject"
        self._direct = context.direct

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        """Say nothing."""
        return below

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        """Return a connection to `target`, or one to nothing. `below` is closed. Raise DialError."""
        below.abort()
        if self._reject:
            return Nowhere()
        return await self._way(target).connect(flow, target)

    async def associate(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams:
        """Open an association from here, or one that nobody hears. `below` is closed. Raise DialError."""
        below.abort()
        if self._reject:
            return Unheard()
        return await self._way(target).associate(flow, target)

    def _way(self, target: Endpoint | None) -> Egress:
        if self._direct is None:
            raise DialError(f"there is no direct way to {target or 'other hosts'} here")
        return self._direct


class Nowhere(Stream):
    """A connection to nothing: it is at its end, and takes and forgets what is sent."""

    __slots__ = ("_closed",)

    def __init__(self) -> None:
        super().__init__(ANY, ANY)
        self._closed = False

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._closed:
            raise ConnError("closed by this side")
        return self._take_head(max_bytes)

    async def send(self, data: Buffer) -> None:
        if self._closed:
            raise ConnError("closed by this side")

    async def send_eof(self) -> None:
        return None

    async def aclose(self) -> None:
        self._closed = True

    def abort(self) -> None:
        self._closed = True


class Unheard(Datagrams):
    """An association that nobody hears: it takes and forgets datagrams, and none comes until it is closed."""

    __slots__ = ("_end",)

    def __init__(self) -> None:
        super().__init__()
        self._end = asyncio.Event()

    async def receive(self) -> Sequence[Datagram]:
        await self._end.wait()
        raise ConnError("closed by this side")

    async def send(self, batch: Sequence[Datagram]) -> None:
        if self._end.is_set():
            raise ConnError("closed by this side")

    async def aclose(self) -> None:
        self._end.set()

    def abort(self) -> None:
        self._end.set()
