"""Streams, datagrams and devices in memory, with faults on request: what the tests of codecs and layers run on.

They keep the contracts of `core.stream`, `core.datagrams` and `core.packets` to the letter, back-pressure and
half-close included, and need no socket. Both ends of a pair belong to one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import MAX_UDP_PAYLOAD, Datagram, Datagrams
from gostnet.core.errors import ConnError
from gostnet.core.packets import NO_SETUP, Medium, Packets, Setup
from gostnet.core.passing import PassingStream
from gostnet.core.stream import CHUNK, Buffer, Stream

LEFT = Endpoint("192.0.2.1", 40001)
RIGHT = Endpoint("192.0.2.2", 443)
"""Addresses of the two ends unless others are given (RFC 5737)."""

WINDOW = 1 << 16


@dataclass(slots=True)
class Faults:
    """What goes wrong at one end; None for what does not.

    piece            at most so many bytes are delivered by one `receive`
    fail_receive_at  after so many bytes delivered, `receive` raises ConnError for ever
    fail_send_at     after so many bytes taken, `send` raises ConnError for ever; what fits before goes through
    end_at           after so many bytes delivered, `receive` reports the end of the stream
    """

    piece: int | None = None
    fail_receive_at: int | None = None
    fail_send_at: int | None = None
    end_at: int | None = None


class _Pipe:
    """One direction: bytes on their way, the writer's end and the reader's end."""

    __slots__ = ("broken", "buffer", "eof", "reader", "reader_gone", "window", "writer")

    def __init__(self, window: int) -> None:
        self.window = window
        self.buffer = bytearray()
        self.eof = False
        self.broken = False
        self.reader_gone = False
        self.reader: asyncio.Future[None] | None = None
        self.writer: asyncio.Future[None] | None = None

    def wake(self) -> None:
        for waiter in (self.reader, self.writer):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    async def until_readable(self) -> None:
        if self.reader is not None:
            raise RuntimeError("two tasks read the same stream")
        self.reader = asyncio.get_running_loop().create_future()
        try:
            await self.reader
        finally:
            self.reader = None

    async def until_writable(self) -> None:
        if self.writer is not None:
            raise RuntimeError("two tasks write the same stream")
        self.writer = asyncio.get_running_loop().create_future()
        try:
            await self.writer
        finally:
            self.writer = None


class MemoryStream(Stream):
    """One end of a pair made by `stream_pair`.

    `aclose` is the orderly end: the peer reads what is on its way, then the end of the stream. `abort` loses what is
    on its way and breaks the connection for the peer, as a reset does.
    """

    __slots__ = ("_closed", "_incoming", "_outgoing", "faults", "received", "sent")

    def __init__(self, incoming: _Pipe, outgoing: _Pipe, local: Endpoint, remote: Endpoint, faults: Faults) -> None:
        Stream.__init__(self, local, remote)
        self._incoming = incoming
        self._outgoing = outgoing
        self._closed = False
        self.faults = faults
        self.received = 0
        self.sent = 0

    @property
    def closed(self) -> bool:
        """Whether this end has been closed or aborted."""
        return self._closed

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._closed:
            raise ConnError("closed by this side")
        if self._head:
            return self._take_head(max_bytes)
        pipe, faults = self._incoming, self.faults
        limit = max_bytes
        if faults.fail_receive_at is not None:
            limit = min(limit, faults.fail_receive_at - self.received)
            if limit <= 0:
                raise ConnError("broken on purpose")
        if faults.end_at is not None:
            limit = min(limit, faults.end_at - self.received)
            if limit <= 0:
                return b""
        if faults.piece is not None:
            limit = min(limit, faults.piece)
        while not pipe.buffer:
            if self._closed:
                raise ConnError("closed by this side")
            if pipe.broken:
                raise ConnError("reset by the peer")
            if pipe.eof:
                return b""
            await pipe.until_readable()
        data = bytes(pipe.buffer[:limit])
        del pipe.buffer[:limit]
        self.received += len(data)
        pipe.wake()
        return data

    async def send(self, data: Buffer) -> None:
        pipe, faults = self._outgoing, self.faults
        rest = bytes(data)
        fails = False
        if faults.fail_send_at is not None and self.sent + len(rest) > faults.fail_send_at:
            fails = True
            rest = rest[: max(0, faults.fail_send_at - self.sent)]
        while True:
            if self._closed or pipe.eof:
                raise ConnError("closed by this side")
            if pipe.broken or pipe.reader_gone:
                raise ConnError("reset by the peer" if pipe.broken else "broken pipe")
            room = pipe.window - len(pipe.buffer)
            if room > 0 and rest:
                pipe.buffer += rest[:room]
                self.sent += min(room, len(rest))
                rest = rest[room:]
                pipe.wake()
            if not rest:
                break
            await pipe.until_writable()
        if fails:
            raise ConnError("broken on purpose")

    async def send_eof(self) -> None:
        self._outgoing.eof = True
        self._outgoing.wake()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._outgoing.eof = True
            self._incoming.reader_gone = True
            self._incoming.buffer.clear()
            self._wake()

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            for pipe in (self._outgoing, self._incoming):
                pipe.broken = True
                pipe.buffer.clear()
            self._wake()

    def _wake(self) -> None:
        self._outgoing.wake()
        self._incoming.wake()


def stream_pair(
    *,
    window: int = WINDOW,
    left: Faults | None = None,
    right: Faults | None = None,
    addresses: tuple[Endpoint, Endpoint] = (LEFT, RIGHT),
) -> tuple[MemoryStream, MemoryStream]:
    """Return two connected streams. At most `window` bytes (at least 1) are on their way in each direction."""
    to_right, to_left = _Pipe(window), _Pipe(window)
    return (
        MemoryStream(to_left, to_right, addresses[0], addresses[1], left or Faults()),
        MemoryStream(to_right, to_left, addresses[1], addresses[0], right or Faults()),
    )


class Trickle(PassingStream):
    """A stream that delivers what another one receives in pieces of at most `piece` bytes, by default one.

    It owns the stream below and passes everything else on to it. What a parser does right on whole reads only, it
    does wrong here.
    """

    __slots__ = ("_kept", "_piece")

    def __init__(self, below: Stream, piece: int = 1) -> None:
        super().__init__(below)
        self._piece = piece
        self._kept = below.take_unread()

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._head:
            return self._take_head(min(max_bytes, self._piece))
        if not self._kept:
            self._kept = await self._below.receive()
        size = min(max_bytes, self._piece)
        data, self._kept = self._kept[:size], self._kept[size:]
        return data

    async def aclose(self) -> None:
        self._kept = b""
        await self._below.aclose()

    def abort(self) -> None:
        self._kept = b""
        self._below.abort()


Fate = Callable[[int], int]
"""Takes the number of a datagram, from 0, and returns how many copies arrive: 0 loses it, 2 doubles it."""


class _Queue:
    __slots__ = ("capacity", "closed", "items", "waiter")

    def __init__(self, capacity: int) -> None:
        self.items: deque[Datagram] = deque()
        self.capacity = capacity
        self.closed = False
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class MemoryDatagrams(Datagrams):
    """One end of a pair made by `datagrams_pair`; every datagram received carries the other end's address.

    dropped   datagrams that this end sent and that were lost: too large, no room, or by `fate`
    """

    __slots__ = ("_closed", "_fate", "_incoming", "_outgoing", "dropped", "sent")

    BATCH = 32

    def __init__(self, incoming: _Queue, outgoing: _Queue, local: Endpoint, max_payload: int, fate: Fate) -> None:
        Datagrams.__init__(self, local, max_payload)
        self._incoming = incoming
        self._outgoing = outgoing
        self._closed = False
        self._fate = fate
        self.dropped = 0
        self.sent = 0

    @property
    def closed(self) -> bool:
        """Whether this end has been closed or aborted."""
        return self._closed

    async def receive(self) -> Sequence[Datagram]:
        queue = self._incoming
        while True:
            if self._closed:
                raise ConnError("closed by this side")
            if queue.items:
                return [queue.items.popleft() for _ in range(min(self.BATCH, len(queue.items)))]
            if queue.closed:
                return ()
            if queue.waiter is not None:
                raise RuntimeError("two tasks read the same datagrams")
            queue.waiter = asyncio.get_running_loop().create_future()
            try:
                await queue.waiter
            finally:
                queue.waiter = None

    async def send(self, batch: Sequence[Datagram]) -> None:
        if self._closed:
            raise ConnError("closed by this side")
        for datagram in batch:
            data = bytes(datagram.data)
            step = datagram.stride or max(1, len(data))
            for start in range(0, max(1, len(data)), step):
                self._send_one(data[start : start + step])

    def _send_one(self, data: bytes) -> None:
        queue = self._outgoing
        copies = self._fate(self.sent)
        self.sent += 1
        fits = len(data) <= self.max_payload and len(queue.items) < queue.capacity and not queue.closed
        if not copies or not fits:
            self.dropped += 1
            return
        queue.items.extend(Datagram(data, self.local) for _ in range(copies))
        queue.wake()

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            self._outgoing.closed = True
            self._incoming.closed = True
            self._outgoing.wake()
            self._incoming.wake()


def datagrams_pair(
    *,
    capacity: int = 256,
    max_payload: int = MAX_UDP_PAYLOAD,
    fate: Fate = lambda number: 1,
    addresses: tuple[Endpoint, Endpoint] = (LEFT, RIGHT),
) -> tuple[MemoryDatagrams, MemoryDatagrams]:
    """Return two connected ends. A direction holds `capacity` datagrams, more are dropped; `fate` rules both ways."""
    to_right, to_left = _Queue(capacity), _Queue(capacity)
    return (
        MemoryDatagrams(to_left, to_right, addresses[0], max_payload, fate),
        MemoryDatagrams(to_right, to_left, addresses[1], max_payload, fate),
    )


# ---- devices --------------------------------------------------------------------------------------------------------
class MemoryDevice(Packets):
    """A device whose kernel is the test: `put` routes a packet into it, `taken` is what came out towards the kernel.

    gone   somebody else has deleted it
    """

    def __init__(self, setup: Setup = NO_SETUP, medium: Medium = Medium.IP) -> None:
        super().__init__("memory", 1420, medium, setup=setup)
        self._in: asyncio.Queue[bytes] = asyncio.Queue()
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._closed = self._given = False
        self.gone = False

    @property
    def closed(self) -> bool:
        return self._closed

    def check(self) -> None:
        if self.gone:
            raise ConnError("device memory is gone")

    async def receive(self) -> Sequence[Buffer]:
        if self._given:
            self._in.task_done()
        self._given = False
        packet = await self._in.get()
        self._given = True
        self.check()
        return [packet] if packet else []

    async def send(self, batch: Sequence[Buffer]) -> None:
        self.check()
        for packet in batch:
            self._out.put_nowait(bytes(packet))

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            self._in.put_nowait(b"")
            self._tell_closed()

    def delete(self) -> None:
        """Let somebody else delete the device."""
        self.gone = True
        self._in.put_nowait(b"")

    def put(self, packet: bytes) -> None:
        """Let the kernel route a packet into the device."""
        self._in.put_nowait(packet)

    async def handled(self, patience: float = 10.0) -> None:
        """Wait until everything that was put has been sent on, or dropped. Raise TimeoutError."""
        async with asyncio.timeout(patience):
            await self._in.join()

    async def taken(self, patience: float = 10.0) -> bytes:
        """Return the next packet that came out. Raise TimeoutError."""
        async with asyncio.timeout(patience):
            return await self._out.get()

    @property
    def untouched(self) -> bool:
        """Whether the kernel has got nothing that was not taken."""
        return self._out.empty()
