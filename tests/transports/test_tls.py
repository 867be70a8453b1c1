"""TLS over streams in memory and over sockets: the conversation, its ends, its faults, and hostile peers."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config import schema
from gostnet.core.errors import ConnError, DialError, DialTimeout, EndOfStream, GostnetError, ProtocolError
from gostnet.core.flow import Flow
from gostnet.core.sockets import SocketStream
from gostnet.core.stream import CHUNK, Buffer, Stream
from gostnet.core.tasks import Scope, run
from gostnet.testing import check_stream, stream_pair
from gostnet.testing.memory import Faults, MemoryStream
from gostnet.testing.servers import pattern
from gostnet.transports import tls as module
from gostnet.transports.certificates import Certificates, Identity, generate
from gostnet.transports.tls import Records, TlsLayer, TlsStream

LOOPS = pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
VERSIONS = pytest.mark.parametrize("version", ["VersionTLS12", "VersionTLS13"])


class Fixed(Certificates):
    """Certificates whose default is made once for all tests: nothing is read or written."""

    def default(self) -> Identity:
        return _identity()


@cache
def _identity() -> Identity:
    return Identity(generate("gost.run"))


def tls(**options: Any) -> schema.TLS:
    fine = {
        name: options.pop(name) for name in ("min_version", "max_version", "cipher_suites", "alpn") if name in options
    }
    return schema.TLS(options=schema.TLSOptions(**fine) if fine else None, **options)


def server(**options: Any) -> TlsLayer:
    return TlsLayer.for_server(tls(**options), Fixed())


def client(**options: Any) -> TlsLayer:
    return TlsLayer.for_client(tls(**options))


def up_to(version: str) -> tuple[TlsLayer, TlsLayer]:
    return server(max_version=version), client()


async def handshake(
    accepting: TlsLayer, dialling: TlsLayer, below: tuple[Stream, Stream], name: str = "gost.run"
) -> tuple[TlsStream, TlsStream]:
    """Return (client, server) over the two ends of `below`. Raise the client's error, else the server's."""
    scope = Scope("handshake")
    accepted = scope.start(settled(accepting.server(Flow(), below[1])))
    opened = await settled(dialling.client(Flow(), below[0], name))
    if isinstance(opened, BaseException):
        below[0].abort()
    done = await accepted
    for outcome in (opened, done):
        if isinstance(outcome, BaseException):
            raise outcome
    assert isinstance(opened, TlsStream)
    assert isinstance(done, TlsStream)
    return opened, done


async def settled(work: Coroutine[Any, Any, TlsStream]) -> TlsStream | GostnetError:
    try:
        return await work
    except GostnetError as exc:
        return exc


async def everything(stream: Stream) -> bytes:
    found = bytearray()
    while data := await stream.receive():
        found += data
    return bytes(found)


async def exactly(stream: Stream, size: int) -> bytes:
    found = b""
    while len(found) < size:
        data = await stream.receive(size - len(found))
        assert data, f"the stream ended after {len(found)} of {size} bytes"
        found += data
    return found


async def raw(stream: Stream) -> bytes:
    """Return what lies in a memory stream at the moment."""
    assert isinstance(stream, MemoryStream)
    return await stream.receive(1 << 20)


def sockets() -> tuple[SocketStream, SocketStream]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        left = socket.create_connection(listening.getsockname())
        right, _ = listening.accept()
    for each in (left, right):
        each.setblocking(False)
    return SocketStream(left), SocketStream(right)


# ---- the contract of streams ------------------------------------------------------------------------------
@VERSIONS
def test_stream_keeps_the_contract_in_memory(version: str) -> None:
    layers = up_to(version)
    run(check_stream(lambda: handshake(*layers, stream_pair())))


@VERSIONS
def test_stream_keeps_the_contract_byte_by_byte(version: str) -> None:
    layers = up_to(version)

    async def pair() -> tuple[Stream, Stream]:
        return await handshake(*layers, stream_pair(window=4096, left=Faults(piece=1), right=Faults(piece=1)))

    run(check_stream(pair, transfer=40_000))


@LOOPS
def test_stream_keeps_the_contract_over_sockets(uvloop: bool) -> None:
    layers = server(), client()
    run(check_stream(lambda: handshake(*layers, sockets())), uvloop=uvloop)


def test_stream_keeps_the_contract_inside_itself() -> None:
    layers = server(), client()

    async def pair() -> tuple[Stream, Stream]:
        return await handshake(*layers, await handshake(*layers, stream_pair()))

    run(check_stream(pair))


def test_stream_is_never_transparent_and_knows_the_ends() -> None:
    async def main() -> None:
        near, far = stream_pair()
        left, right = await handshake(server(), client(), (near, far))
        assert left.transparent_over() is None
        assert right.transparent_over() is None
        assert (left.local, left.remote) == (near.local, near.remote)
        assert (right.local, right.remote) == (far.local, far.remote)
        assert left.version == right.version == "TLSv1.3"
        assert left.alpn == right.alpn == ""
        assert ssl.DER_cert_to_PEM_cert(left.peer_certificate).encode() == _identity().pair.certificate
        assert right.peer_certificate == b""

    run(main())


# ---- data ---------------------------------------------------------------------------------------------
@VERSIONS
def test_16_mib_cross_each_other(version: str) -> None:
    size = 16 << 20

    async def give(stream: Stream, shift: int) -> None:
        sent = 0
        for step in (1, 16_383, 16_384, 16_385, 65_536, 65_537, 262_144, 1 << 20):
            await stream.send(pattern(step, sent + shift))
            sent += step
        while sent < size:
            step = min(1 << 19, size - sent)
            await stream.send(memoryview(pattern(step, sent + shift)))
            sent += step
        await stream.send_eof()

    async def take(stream: Stream, shift: int) -> int:
        received = 0
        while data := await stream.receive(262_144):
            assert data == pattern(len(data), received + shift)
            received += len(data)
        return received

    async def main() -> None:
        left, right = await handshake(*up_to(version), sockets())
        scope = Scope("transfer")
        scope.launch(give(left, 0))
        scope.launch(give(right, 7))
        ends = scope.start(take(right, 0)), scope.start(take(left, 7))
        assert [await end for end in ends] == [size, size]
        await left.aclose()
        await right.aclose()

    run(main())


def test_large_reads_return_many_records() -> None:
    async def main() -> None:
        left, right = await handshake(server(), client(), stream_pair(window=1 << 20))
        await left.send(pattern(300_000))
        first = await right.receive(262_144)
        # The first read below is small; what it brings is whole records and a cut one.
        assert len(first) == 16_384
        second = await right.receive(262_144)
        assert len(second) > 200_000
        assert first + second + await exactly(right, 300_000 - len(first) - len(second)) == pattern(300_000)

    run(main())


def test_each_limit_of_receive_is_kept() -> None:
    async def main() -> None:
        left, right = await handshake(server(), client(), stream_pair(window=1 << 20))
        for limit in (1, 2, 100, 16_383, 16_384, 16_385, 50_000):
            await left.send(pattern(50_000))
            found = b""
            while len(found) < 50_000:
                data = await right.receive(limit)
                assert 1 <= len(data) <= limit
                found += data
            assert found == pattern(50_000)

    run(main())


def test_data_that_come_with_the_handshake_are_kept() -> None:
    """A client's first words right behind its last flight, and what a caller has read too much before."""

    async def main() -> None:
        near, far = stream_pair()
        accepting = Scope("server").start(server().server(Flow(), far))
        left = await client().client(Flow(), near, "gost.run")
        # The server has not run since: all of this waits for it in one piece.
        await left.send(b"first words")
        await left.send(pattern(20_000))
        await left.send_eof()
        right = await accepting
        assert await everything(right) == b"first words" + pattern(20_000)
        await right.send(b"answer")
        await right.aclose()
        assert await everything(left) == b"answer"

    run(main())


def test_handshake_takes_what_was_put_back() -> None:
    async def main() -> None:
        near, far = stream_pair()
        accepting = Scope("server").start(client().client(Flow(), near, ""))
        await asyncio.sleep(0)
        hello = await far.receive()
        far.unread(hello)
        right = await server().server(Flow(), far)
        left = await accepting
        await right.send(b"ok")
        assert await left.receive() == b"ok"

    run(main())


# ---- the end of a direction ---------------------------------------------------------------------------------
@VERSIONS
@pytest.mark.parametrize("closing", ["client", "server"])
def test_answer_comes_after_a_half_close(version: str, closing: str) -> None:
    async def main() -> None:
        near, far = stream_pair()
        left, right = await handshake(*up_to(version), (near, far))
        if closing == "server":
            left, right, near, far = right, left, far, near
        await left.send(b"question")
        await left.send_eof()
        assert await everything(right) == b"question"
        await right.send(pattern(40_000))
        assert await exactly(left, 40_000) == pattern(40_000)
        with pytest.raises(ConnError, match="closed by this side"):
            await left.send(b"more")
        await right.send(b"late")
        await right.send_eof()
        assert await everything(left) == b"late"
        assert await left.receive() == b""
        assert not near.closed
        assert not far.closed
        await left.aclose()
        await right.aclose()
        assert near.closed
        assert far.closed

    run(main())


def test_half_close_leaves_tcp_open() -> None:
    """GOST sends close_notify and no FIN: a firewall would soon forget a half-closed TCP connection."""

    async def main() -> None:
        near, far = stream_pair()
        left, _ = await handshake(server(), client(), (near, far))
        await left.send_eof()
        assert (await raw(far))[0] in (21, 23)
        waiting = Scope("fin").start(far.receive())
        await asyncio.sleep(0)
        assert not waiting.done()
        await left.aclose()
        assert await waiting == b""

    run(main())


@VERSIONS
def test_half_close_loses_nothing_that_has_arrived(version: str) -> None:
    """OpenSSL takes data that it meets in a shutdown for an error; they may stand at any byte of their records."""
    layers = up_to(version)
    words = b"w" * 300 + pattern(17_000)

    async def cut_at(offset: int, first: int) -> None:
        near, far = stream_pair(window=1 << 20)
        left, right = await handshake(*layers, (near, far))
        await left.send(words[:300])
        await left.send(words[300:])
        await left.send_eof()
        cipher = await raw(far)
        far.unread(cipher[:offset])
        scope = Scope("server")
        received = await right.receive(first) if offset > 400 else b""
        reading = scope.start(everything(right))
        await asyncio.sleep(0)
        await right.send_eof()
        await near.send(cipher[offset:])
        received += await reading
        assert received == words
        assert await left.receive() == b""

    async def main() -> None:
        for offset in (0, 1, 4, 5, 6, 100, 329, 330, 335, 401, 600, 10_000, 16_700, 17_000, 17_300):
            await cut_at(offset, 10)
        await cut_at(17_000, 20_000)

    run(main())


@VERSIONS
def test_end_of_tcp_is_the_end_between_records_and_an_error_within(version: str) -> None:
    layers = up_to(version)
    texts = (b"one", pattern(20_000), b"three")

    async def cut_at(offset: int, cipher_of: Callable[[bytes], list[int]]) -> tuple[bytes, bool, bool]:
        near, far = stream_pair(window=1 << 20)
        left, right = await handshake(*layers, (near, far))
        for text in texts:
            await left.send(text)
        cipher = await raw(far)
        ends = cipher_of(cipher)
        await near.send_eof()
        if offset:
            far.unread(cipher[:offset])
        found = bytearray()
        broken = ""
        try:
            while data := await right.receive():
                found += data
        except ConnError as exc:
            broken = str(exc)
        if not broken:
            assert await right.receive() == b""
            await right.send(b"still heard")
            assert await exactly(left, 11) == b"still heard"
        else:
            with pytest.raises(ConnError, match="middle of a TLS record"):
                await right.receive()
        return bytes(found), not broken, offset in ends

    def ends_of(cipher: bytes) -> list[int]:
        ends = [0]
        while ends[-1] < len(cipher):
            at = ends[-1]
            ends.append(at + 5 + int.from_bytes(cipher[at + 3 : at + 5]))
        assert ends[-1] == len(cipher)
        return ends

    async def main() -> None:
        near, far = stream_pair(window=1 << 20)
        left, _ = await handshake(*layers, (near, far))
        for text in texts:
            await left.send(text)
        ends = ends_of(await raw(far))
        assert len(ends) == 5
        whole = b"".join(texts)
        offsets = {end + step for end in ends for step in (-5, -4, -1, 0, 1, 3, 4, 5, 6, 100)}
        for offset in sorted(offset for offset in offsets if 0 <= offset <= ends[-1]):
            found, clean, boundary = await cut_at(offset, ends_of)
            assert clean == boundary, f"cut at {offset}, records end at {ends}"
            assert whole.startswith(found)
            complete = sum(end <= offset for end in ends) - 1
            assert len(found) == (0, 3, 16_387, 20_003, 20_008)[complete]

    run(main())


def test_nothing_after_close_notify_counts() -> None:
    async def main() -> None:
        near, far = stream_pair()
        left, right = await handshake(server(), client(), (near, far))
        await left.send(b"all")
        await left.send_eof()
        await near.send(b"\x17\x03\x03 garbage")
        assert await everything(right) == b"all"
        await right.send(b"fine")
        assert await exactly(left, 4) == b"fine"

    run(main())


# ---- closing --------------------------------------------------------------------------------------------
def test_close_tells_the_peer() -> None:
    async def main() -> None:
        near, far = stream_pair()
        left, right = await handshake(server(), client(), (near, far))
        await left.aclose()
        cipher = await raw(far)
        assert len(cipher) == 24, "one alert of TLS 1.3: 5 + 2 + 1 + 16 bytes"
        far.unread(cipher)
        assert await right.receive() == b""

    run(main())


def test_close_does_not_wait_long_for_a_peer_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE", 0.02)

    async def main() -> None:
        near, far = stream_pair(window=1000)
        left, _ = await handshake(server(), client(), (near, far))
        await near.send(bytes(1000))
        await left.aclose()
        assert near.closed

    run(main())


def test_cancelled_close_closes() -> None:
    async def main() -> None:
        near, _ = ends = stream_pair(window=1000)
        left, _ = await handshake(server(), client(), ends)
        await near.send(bytes(1000))
        closing = Scope("close").start(left.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert near.closed

    run(main())


def test_close_says_nothing_while_another_task_sends() -> None:
    """In the middle of a record close_notify would only make the record wrong."""

    async def main() -> None:
        near, far = stream_pair(window=5000)
        left, _ = await handshake(server(), client(), (near, far))
        sending = Scope("send").start(left.send(bytes(20_000)))
        await asyncio.sleep(0)
        await left.aclose()
        with pytest.raises(ConnError):
            await sending
        assert len(await raw(far)) == 5000

    run(main())


def test_reset_reaches_the_socket() -> None:
    async def main() -> None:
        near, far = sockets()
        left, right = await handshake(server(), client(), (near, far))
        left.reset()
        with pytest.raises(ConnError, match="reset"):
            await right.receive()
        right.abort()
        over_memory, other = await handshake(server(), client(), stream_pair())
        over_memory.reset()
        with pytest.raises(ConnError):
            await other.receive()

    run(main())


# ---- cancellation -----------------------------------------------------------------------------------------
class Steps(Stream):
    """A stream that stops before each operation until it is told to go on; `count` tells how many there were."""

    __slots__ = ("below", "count", "limit", "stopped")

    def __init__(self, below: Stream, limit: int) -> None:
        super().__init__(below.local, below.remote)
        self.below = below
        self.limit = limit
        self.count = 0
        self.stopped = asyncio.Event()

    async def _step(self) -> None:
        self.count += 1
        if self.count > self.limit:
            self.stopped.set()
            await asyncio.Event().wait()

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        await self._step()
        return await self.below.receive(max_bytes)

    async def send(self, data: Buffer) -> None:
        await self._step()
        await self.below.send(data)

    async def send_eof(self) -> None:
        await self._step()
        await self.below.send_eof()

    async def aclose(self) -> None:
        await self.below.aclose()

    def abort(self) -> None:
        self.below.abort()


@VERSIONS
@pytest.mark.parametrize("side", ["client", "server"])
def test_handshake_can_be_cancelled_at_every_step(version: str, side: str) -> None:
    accepting, dialling = up_to(version)

    async def stop_at(limit: int) -> bool:
        """Return whether the handshake came to its end before step `limit`."""
        near, far = stream_pair()
        scope = Scope("handshake")
        steps = Steps(near if side == "client" else far, limit)
        if side == "client":
            other = scope.start(settled(accepting.server(Flow(), far)))
            work = scope.start(dialling.client(Flow(), steps, "gost.run"))
        else:
            other = scope.start(settled(dialling.client(Flow(), near, "gost.run")))
            work = scope.start(accepting.server(Flow(), steps))
        stopped = scope.start(steps.stopped.wait())
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            opened = work.result()
            assert isinstance(opened, TlsStream)
            # A client's last words follow by themselves.
            await asyncio.wait((other, stopped), return_when=asyncio.FIRST_COMPLETED)
            if other.done():
                stopped.cancel()
                assert isinstance(other.result(), TlsStream)
                return True
            opened.abort()
        else:
            stopped.cancel()
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            steps.abort()
        outcome = await other
        assert isinstance(outcome, TlsStream if isinstance(outcome, TlsStream) else GostnetError)
        return False

    async def main() -> None:
        limit = 0
        while not await stop_at(limit):
            limit += 1
        assert limit >= 2
        # The layer is as good as before.
        left, right = await handshake(accepting, dialling, stream_pair())
        await left.send(b"fine")
        assert await right.receive() == b"fine"

    run(main())


def test_cancelled_send_breaks_only_sending() -> None:
    """Part of a record may be on its way: what follows could not be understood."""

    async def main() -> None:
        near, far = stream_pair(window=5000)
        left, right = await handshake(server(), client(), (near, far))
        sending = Scope("send").start(left.send(bytes(30_000)))
        await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(ConnError, match="an earlier send was interrupted"):
            await left.send(b"more")
        with pytest.raises(ConnError, match="an earlier send was interrupted"):
            await left.send_eof()
        await right.send(b"still heard")
        assert await left.receive() == b"still heard"
        await left.aclose()
        with pytest.raises(ConnError, match="middle of a TLS record"):
            await everything(right)

    run(main())


def test_cancelled_half_close_breaks_only_sending() -> None:
    async def main() -> None:
        near, _ = ends = stream_pair(window=1000)
        left, right = await handshake(server(), client(), ends)
        await near.send(bytes(1000))
        closing = Scope("close").start(left.send_eof())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await left.send_eof()  # done, as far as it could be
        with pytest.raises(ConnError):
            await left.send(b"more")
        await right.send(b"still heard")
        assert await left.receive() == b"still heard"

    run(main())


def test_receiving_and_sending_can_be_cancelled_while_the_other_goes_on() -> None:
    async def main() -> None:
        left, right = await handshake(server(), client(), sockets())
        scope = Scope("both")
        sending = scope.start(left.send(pattern(8 << 20)))
        for _ in range(20):
            reading = scope.start(left.receive())
            await asyncio.sleep(0)
            reading.cancel()
        assert await exactly(right, 8 << 20) == pattern(8 << 20)
        await sending
        await right.send(b"fine")
        assert await exactly(left, 4) == b"fine"
        await left.aclose()
        await right.aclose()

    run(main())


def test_two_tasks_may_not_send_at_once() -> None:
    async def main() -> None:
        near, far = stream_pair(window=1000)
        left, right = await handshake(server(), client(), (near, far))
        sending = Scope("send").start(left.send(bytes(30_000)))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await left.send(b"second")
        with pytest.raises(RuntimeError):
            await left.send_eof()
        assert await exactly(right, 30_000) == bytes(30_000)
        await sending

    run(main())


# ---- hostile and unlucky peers -------------------------------------------------------------------------------
async def server_fed(*pieces: bytes, end: bool = True) -> GostnetError:
    near, far = stream_pair()
    for piece in pieces:
        await near.send(piece)
    if end:
        await near.send_eof()
    outcome = await settled(server().server(Flow(), far))
    assert isinstance(outcome, GostnetError)
    return outcome


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", r"does not speak TLS: b'GET / HTTP"),
        (b"\x05\x01\x00", "does not speak TLS"),
        (b"\x80\x2e\x01\x03\x01", "does not speak TLS"),
        (b"\x17\x03\x03\x00\x01x", "does not speak TLS"),
        (b"SSH-2.0-x\r\n" * 100, "does not speak TLS"),
        (b"\x16\x03\x01\xff\xff" + bytes(200), "(packet|record|length|version|unexpected)"),
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", "(length|decode|short)"),
        (b"\x16\x05\x05\x00\x05" + bytes(5), "version"),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", "unexpected message"),
        (b"\x15\x03\x01\x00\x02\x02\x28", "(refuses|unexpected)"),
    ],
)
def test_server_refuses_what_is_no_handshake(data: bytes, message: str) -> None:
    async def main() -> None:
        error = await server_fed(data)
        assert isinstance(error, ProtocolError)
        assert not isinstance(error, EndOfStream)
        assert len(str(error)) < 300
        assert re.search(message, str(error))

    run(main())


def test_server_and_client_say_when_the_peer_closes() -> None:
    async def main() -> None:
        assert isinstance(await server_fed(), EndOfStream)
        near, far = stream_pair()
        await far.send_eof()
        outcome = await settled(client().client(Flow(), near, "a.example"))
        assert isinstance(outcome, DialError)
        assert str(outcome) == "tls handshake with a.example: the peer closed during the TLS handshake"

    run(main())


def test_client_says_when_the_server_speaks_something_else() -> None:
    async def main() -> None:
        near, far = stream_pair()
        await far.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        outcome = await settled(client().client(Flow(), near, "192.0.2.1"))
        assert isinstance(outcome, DialError)
        assert "the peer does not speak TLS: b'HTTP/1.1 400" in str(outcome)

    run(main())


@given(st.binary(max_size=300), st.booleans())
def test_server_survives_any_bytes(data: bytes, record: bool) -> None:
    head = b"\x16\x03\x01" + len(data).to_bytes(2) if record else b""
    error = run(server_fed(head + data), uvloop=False)
    assert isinstance(error, ProtocolError)


@VERSIONS
@pytest.mark.parametrize("side", ["client", "server"])
def test_handshake_cut_anywhere_fails(version: str, side: str) -> None:
    accepting_layer = server(max_version=version)

    async def cut_at(count: int | None) -> int:
        faults = Faults(end_at=count)
        near, far = stream_pair(left=faults if side == "client" else None, right=faults if side == "server" else None)
        scope = Scope("handshake")
        accepting = scope.start(settled(accepting_layer.server(Flow(), far)))
        opening = scope.start(settled(client().client(Flow(), near, "gost.run")))
        cut, other, below = (opening, accepting, near) if side == "client" else (accepting, opening, far)
        outcome = await cut
        if count is None:
            await other
            return below.received
        assert isinstance(outcome, GostnetError), f"the handshake went through with {count} bytes"
        assert isinstance(outcome, DialError if side == "client" else EndOfStream)
        below.abort()
        await other
        return 0

    async def main() -> None:
        total = await cut_at(None)
        # The length of a signature varies by a few bytes.
        for count in [*range(0, 12), *range(12, total - 10, 17), total - 10]:
            await cut_at(count)

    run(main())


@VERSIONS
def test_changed_record_breaks_the_connection_and_the_peer_is_told(version: str) -> None:
    async def main() -> None:
        near, far = stream_pair(window=1 << 20)
        left, right = await handshake(*up_to(version), (near, far))
        await left.send(b"good")
        await left.send(b"bad")
        cipher = bytearray(await raw(far))
        cipher[-1] ^= 1
        far.unread(bytes(cipher))
        assert await right.receive() == b"good"
        with pytest.raises(ConnError, match="decryption failed or bad record mac"):
            await right.receive()
        with pytest.raises(ConnError, match="decryption failed or bad record mac"):
            await right.receive()
        with pytest.raises(ConnError, match="decryption failed or bad record mac"):
            await right.send(b"more")
        with pytest.raises(ConnError, match="the peer refuses: bad record mac"):
            await left.receive()
        await right.aclose()
        await left.aclose()

    run(main())


def test_alert_does_not_wait_for_a_peer_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_WORDS", 0.02)

    async def main() -> None:
        near, far = stream_pair(window=5000)
        _, right = await handshake(server(), client(), (near, far))
        await far.send(bytes(5000))
        await near.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ConnError, match="decryption failed"):
            await right.receive()

    run(main())


def test_broken_connection_below_is_an_error_of_the_stream() -> None:
    async def main() -> None:
        near, far = stream_pair()
        left, right = await handshake(server(), client(), (near, far))
        near.faults = Faults(fail_receive_at=0)
        with pytest.raises(ConnError, match="broken on purpose"):
            await left.receive()
        far.faults = Faults(fail_send_at=0)
        with pytest.raises(ConnError, match="broken on purpose"):
            await right.send(b"x")
        with pytest.raises(ConnError):
            await right.send(b"x")

    run(main())


def test_client_reports_a_reset_as_a_failed_dial() -> None:
    async def main() -> None:
        near, far = stream_pair()
        far.abort()
        with pytest.raises(DialError, match=r"^tls handshake with a\.example: "):
            await client().client(Flow(), near, "a.example")

    run(main())


def test_client_gives_up_after_its_own_deadline() -> None:
    async def main() -> None:
        near, _far = stream_pair()
        layer = TlsLayer.for_client(None, handshake_timeout=0.01)
        with pytest.raises(DialTimeout, match=r"tls handshake with a\.example"):
            await layer.client(Flow(), near, "a.example")

    run(main())


def test_answers_that_nobody_takes_do_not_pile_up() -> None:
    async def main() -> None:
        near, far = stream_pair()
        left, right = await handshake(server(), client(), (near, far))
        tickets = right._outgoing.read()
        assert tickets
        left._outgoing.write(bytes(module.OVERFLOW + 1))  # what refusals of renegotiation would add up to
        await far.send(tickets)
        with pytest.raises(ConnError, match="asks for answers and reads none"):
            await left.receive()

    run(main())


# ---- records ------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 40), max_size=30), st.lists(st.integers(1, 25), min_size=1, max_size=200), st.data())
def test_records_are_followed_through_any_cut(sizes: list[int], cuts: list[int], data: st.DataObject) -> None:
    stream = b"".join(b"\x17\x03\x03" + size.to_bytes(2) + os.urandom(size) for size in sizes)
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + 5 + size)
    records = Records()
    at = 0
    for cut in cuts:
        end = min(at + cut, len(stream))
        padding = data.draw(st.integers(0, 3))
        records.advance(bytes(padding) + stream[at:end] + b"tail", padding, padding + end - at)
        at = end
        assert records.partial == at - max(each for each in ends if each <= at)


# ---- memory -------------------------------------------------------------------------------------------------
def test_idle_streams_keep_no_data() -> None:
    """A large transfer must not leave its buffers with a connection that is idle from then on."""

    async def main() -> None:
        left, right = await handshake(server(), client(), stream_pair(window=1 << 22))
        await left.send(bytes(1 << 21))
        assert len(await exactly(right, 1 << 21)) == 1 << 21
        assert right._cipher == b""
        assert right._head == b""
        assert not right._incoming.pending
        assert not left._outgoing.pending

    run(main())
