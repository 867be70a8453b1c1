"""Each check fails for a stream or for datagrams with the very fault that it is there for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.errors import ConnError
from gostnet.core.sockets import SocketStream, connect_tcp, listen_tcp
from gostnet.core.stream import CHUNK, Buffer, Stream
from gostnet.core.tasks import run
from gostnet.core.udp_socket import UdpSocket, listen_udp
from gostnet.testing import check_datagrams, check_stream, conformance, datagrams_pair, stream_pair

LOOPS = pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])


class Wrapped(Stream):
    """Passes everything on; the mutants below change one thing each."""

    def __init__(self, below: Stream) -> None:
        Stream.__init__(self, below.local, below.remote)
        self.below = below

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._head:
            return self._take_head(max_bytes)
        return await self.below.receive(max_bytes)

    async def send(self, data: Buffer) -> None:
        await self.below.send(data)

    async def send_eof(self) -> None:
        await self.below.send_eof()

    async def aclose(self) -> None:
        await self.below.aclose()

    def abort(self) -> None:
        self.below.abort()


class Drops(Wrapped):
    async def send(self, data: Buffer) -> None:
        await self.below.send(data[:-1] if len(data) > 1000 else data)


class TooMuch(Wrapped):
    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        return self._take_head(max_bytes) if self._head else await self.below.receive(max_bytes + 10)


class ForgetsUnread(Wrapped):
    def unread(self, data: bytes) -> None:
        pass


class UnreadOutOfOrder(Wrapped):
    def unread(self, data: bytes) -> None:
        self._head = self._head + data


class UnreadAfterEnd(Wrapped):
    """Loses what was put back once the stream below has ended."""

    ended = False

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self.ended:
            return b""
        data = await Wrapped.receive(self, max_bytes)
        self.ended = not data
        return data


class EndOnce(Wrapped):
    """Reports the end of the stream once, then waits."""

    ended = False

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self.ended and not self._head:
            await asyncio.Event().wait()
        data = await Wrapped.receive(self, max_bytes)
        self.ended = not data
        return data


class NoEnd(Wrapped):
    async def send_eof(self) -> None:
        pass


class EndClosesAll(Wrapped):
    async def send_eof(self) -> None:
        await self.below.aclose()


class KeepsBuffer(Wrapped):
    """Sends later what it was given, without a copy."""

    kept: Buffer = b""

    async def send(self, data: Buffer) -> None:
        await self.below.send(bytes(self.kept))
        self.kept = data
        if not isinstance(data, bytearray):
            await self.below.send(bytes(data))
            self.kept = b""


class LosesWhenCancelled(Wrapped):
    """A cancelled receive takes the next bytes with it."""

    lose = False

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self.lose:
            self.lose = False
            await self.below.receive(1)
        try:
            return await Wrapped.receive(self, max_bytes)
        except asyncio.CancelledError:
            self.lose = True
            raise


class NoBackPressure(Wrapped):
    """Takes everything and keeps it."""

    def __init__(self, below: Stream) -> None:
        Wrapped.__init__(self, below)
        self.queue: list[bytes] = []

    async def send(self, data: Buffer) -> None:
        if len(data) < 1000:
            await self.below.send(data)
        else:
            self.queue.append(bytes(data))
            await asyncio.sleep(0)


class SilentAfterClose(Wrapped):
    closed = False

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        return b"" if self.closed else await Wrapped.receive(self, max_bytes)

    async def aclose(self) -> None:
        self.closed = True
        await self.below.aclose()


class CloseOnce(Wrapped):
    closed = False

    async def aclose(self) -> None:
        if self.closed:
            raise ConnError("closed before")
        self.closed = True
        await self.below.aclose()


class AbortLeavesReader(Wrapped):
    def abort(self) -> None:
        pass


class PeerNeverGone(Wrapped):
    """Does not let a writer know that the peer is gone."""

    async def send(self, data: Buffer) -> None:
        try:
            await self.below.send(data)
        except ConnError as exc:
            if "this side" in str(exc):
                raise


class AnyReaders(Wrapped):
    """Lets two tasks read, one after the other."""

    def __init__(self, below: Stream) -> None:
        Wrapped.__init__(self, below)
        self.lock = asyncio.Lock()

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        async with self.lock:
            return await Wrapped.receive(self, max_bytes)


class Bytearrays(Wrapped):
    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        return bytearray(await Wrapped.receive(self, max_bytes))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (Drops, "half close|cancelled send|back pressure|large transfer"),
        (TooMuch, "sizes"),
        (ForgetsUnread, "unread"),
        (UnreadOutOfOrder, "unread"),
        (UnreadAfterEnd, "unread before end"),
        (EndOnce, "unread before end|end of stream"),
        (NoEnd, "unread before end"),
        (EndClosesAll, "half close|large transfer"),
        (KeepsBuffer, "kinds of buffers"),
        (LosesWhenCancelled, "cancelled receive"),
        (NoBackPressure, "cancelled send|back pressure"),
        (SilentAfterClose, "after close"),
        (CloseOnce, "close twice"),
        (AbortLeavesReader, "abort|after close|cancelled send"),
        (PeerNeverGone, "peer closes"),
        (AnyReaders, "two readers"),
        (Bytearrays, "sizes"),
    ],
)
def test_check_stream_finds(mutant: Callable[[Stream], Stream], check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def pair() -> tuple[Stream, Stream]:
        left, right = stream_pair()
        return mutant(left), mutant(right)

    # Hanging is one of the faults: it need not be waited for as long as on a busy machine.
    monkeypatch.setattr(conformance, "_HANG", 0.5)
    with pytest.raises(AssertionError, match=f"^({check}): "):
        run(check_stream(pair, transfer=100_000, most_buffered=1_000_000))


class Other(Datagrams):
    """Passes everything on; the mutants below change one thing each."""

    def __init__(self, below: Datagrams) -> None:
        Datagrams.__init__(self, below.local, below.max_payload)
        self.below = below

    async def receive(self) -> Sequence[Datagram]:
        return await self.below.receive()

    async def send(self, batch: Sequence[Datagram]) -> None:
        await self.below.send(batch)

    async def aclose(self) -> None:
        await self.below.aclose()

    def abort(self) -> None:
        self.below.abort()


class Joins(Other):
    """Runs datagrams of one batch together."""

    async def send(self, batch: Sequence[Datagram]) -> None:
        if len(batch) > 1:
            batch = [Datagram(b"".join(bytes(d.data) for d in batch), batch[0].peer)]
        await self.below.send(batch)


class Cuts(Other):
    async def send(self, batch: Sequence[Datagram]) -> None:
        await self.below.send([Datagram(bytes(d.data)[:1500], d.peer, d.stride) for d in batch])


class DropsEmpty(Other):
    async def send(self, batch: Sequence[Datagram]) -> None:
        await self.below.send([d for d in batch if d.data])


class IgnoresStride(Other):
    async def send(self, batch: Sequence[Datagram]) -> None:
        await self.below.send([Datagram(d.data, d.peer) for d in batch])


class DiesOfLarge(Other):
    async def send(self, batch: Sequence[Datagram]) -> None:
        if any(len(d.data) > 65535 for d in batch):
            raise ConnError("message too long")
        await self.below.send(batch)


class NobodyAsks(Other):
    async def receive(self) -> Sequence[Datagram]:
        return [Datagram(d.data, Endpoint("", 0)) for d in await self.below.receive()]


class NoEndSeen(Other):
    async def receive(self) -> Sequence[Datagram]:
        batch = await self.below.receive()
        if not batch:
            await asyncio.Event().wait()
        return batch


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (Joins, "burst"),
        (Cuts, "boundaries"),
        (DropsEmpty, "empty"),
        (IgnoresStride, "strides"),
        (DiesOfLarge, "too large"),
        (NobodyAsks, "answers"),
        (NoEndSeen, "datagrams end"),
    ],
)
def test_check_datagrams_finds(
    mutant: Callable[[Datagrams], Datagrams], check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pair() -> tuple[Datagrams, Datagrams]:
        left, right = datagrams_pair()
        return mutant(left), mutant(right)

    monkeypatch.setattr(conformance, "_HANG", 0.5)
    with pytest.raises(AssertionError, match=f"^({check}): "):
        run(check_datagrams(pair, sees_end=True))


@LOOPS
def test_sockets_keep_the_contract_of_streams(uvloop: bool) -> None:
    async def pair() -> tuple[Stream, Stream]:
        with listen_tcp(Endpoint("127.0.0.1", 0)) as listening:
            left = await connect_tcp(*listening.getsockname()[:2])
            accepted, _ = listening.accept()
        accepted.setblocking(False)
        return left, SocketStream(accepted)

    run(check_stream(pair), uvloop=uvloop)


@LOOPS
def test_sockets_keep_the_contract_of_datagrams(uvloop: bool) -> None:
    async def pair() -> tuple[Datagrams, Datagrams]:
        socks = [listen_udp(Endpoint("127.0.0.1", 0)) for _ in range(2)]
        left, right = (UdpSocket(sock, Endpoint.from_sockaddr(sock.getsockname())) for sock in socks)
        return left, right

    run(check_datagrams(pair), uvloop=uvloop)


def test_pair_may_come_from_a_context_manager() -> None:
    held: list[str] = []

    @asynccontextmanager
    async def pair() -> AsyncIterator[tuple[Stream, Stream]]:
        held.append("open")
        yield stream_pair()
        held.append("closed")

    run(check_stream(pair, transfer=1000))
    assert held == ["open", "closed"] * (len(held) // 2)
    assert len(held) > 20


def test_options_leave_out_what_a_stream_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pair() -> tuple[Any, Any]:
        left, right = stream_pair()
        return AnyReaders(left), AnyReaders(right)

    monkeypatch.setattr(conformance, "_HANG", 2.0)
    run(check_stream(pair, two_readers=False, half_close=False, transfer=1000))
