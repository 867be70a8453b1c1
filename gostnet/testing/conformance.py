"""What every Stream and every Datagrams must do, as checks that any test runner can await.

    asyncio.run(check_stream(make_pair))

`make_pair` is a coroutine function that returns two new, connected ends each time; they are closed here. Whoever
cannot make the two ends without more (a server, a task that drives a session) gives an async context manager
function instead: what it holds lives until the check at hand has ended. Failures are AssertionErrors whose message
begins with the name of the check. A few hundred bytes must be able to be on their way without being read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Generic, TypeAlias, TypeVar

from gostnet.core.address import ANY
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.errors import ConnError
from gostnet.core.fiber import Fiber
from gostnet.core.hub import current_hub
from gostnet.core.stream import Closable, Stream
from gostnet.core.tasks import Scope

from .servers import pattern

T = TypeVar("T", bound=Closable)
R = TypeVar("R")
Pair: TypeAlias = tuple[Stream, Stream]
MakePair: TypeAlias = Callable[[], Awaitable[Pair] | AbstractAsyncContextManager[Pair]]
DatagramsPair: TypeAlias = tuple[Datagrams, Datagrams]
MakeDatagrams: TypeAlias = Callable[[], Awaitable[DatagramsPair] | AbstractAsyncContextManager[DatagramsPair]]

_HANG = 10.0
"""Seconds after which an operation that should end is said to hang: far beyond what a busy machine needs."""

_STILL = 0.03
"""Seconds without progress after which a writer is said to wait."""

_TURNS = 20
"""Turns of the loop that are given to tasks before they are said to wait: nothing here depends on their number, a
layer with more queues than that is only checked less closely."""


# ---- streams ------------------------------------------------------------------------------------
async def check_stream(
    make_pair: MakePair,
    *,
    half_close: bool = True,
    most_buffered: int = 64 << 20,
    transfer: int = 4 << 20,
    two_readers: bool = True,
) -> None:
    """Check a kind of stream in both directions, by tasks and by fibers.

    half_close     whether the end of one direction leaves the other open; without, `send_eof` may close fully
    most_buffered  bytes that may be on their way before `send` has to wait
    transfer       bytes of the large transfer, each way
    two_readers    whether a second `receive` at a time is refused with RuntimeError
    """
    runs: list[tuple[Callable[..., Coroutine[Any, Any, None]], dict[str, Any]]] = [
        (_exchange, {}),
        (_kinds_of_buffers, {}),
        (_sizes, {}),
        (_unread, {}),
        (_unread_before_end, {}),
        (_end_of_stream, {}),
        (_cancelled_receive, {}),
        (_cancelled_send, {"most": most_buffered}),
        (_back_pressure, {"most": most_buffered}),
        (_large_transfer, {"size": transfer}),
        (_close_twice, {}),
        (_after_close, {}),
        (_peer_closes, {"most": most_buffered}),
        (_peer_aborts, {"most": most_buffered}),
        (_abort_wakes_reader, {}),
        (_abort_wakes_writer, {"most": most_buffered}),
    ]
    if half_close:
        runs.append((_half_close, {}))
    if two_readers:
        runs.append((_two_readers, {}))
    await _run_all(runs, make_pair)


async def _exchange(a: Stream, b: Stream) -> None:
    await a.send(b"ping")
    _equal(await receive_exactly(b, 4), b"ping")
    await b.send(b"pong")
    _equal(await receive_exactly(a, 4), b"pong")


async def _kinds_of_buffers(a: Stream, b: Stream) -> None:
    await a.send(b"")
    reused = bytearray(b"bytearray")
    await a.send(reused)
    reused[:] = bytes(len(reused))  # what was given to send is the caller's again
    await a.send(memoryview(b"xxmemoryviewxx")[2:-2])
    await a.send(b"bytes")
    _equal(await receive_exactly(b, 24), b"bytearraymemoryviewbytes")


async def _sizes(a: Stream, b: Stream) -> None:
    await a.send(b"abcdef")
    first = await b.receive(1)
    assert isinstance(first, bytes), f"receive returned {type(first).__name__}"
    assert len(first) == 1, f"receive(1) returned {len(first)} bytes"
    second = await b.receive(2)
    assert 1 <= len(second) <= 2, f"receive(2) returned {len(second)} bytes"
    rest = await receive_exactly(b, 6 - len(first) - len(second))
    _equal(first + second + rest, b"abcdef")


async def _unread(a: Stream, b: Stream) -> None:
    await a.send(b"tail")
    head = await receive_exactly(b, 4)
    b.unread(head)
    b.unread(b"first ")
    _equal(await b.receive(3), b"fir")
    _equal(await receive_exactly(b, 7), b"st tail")
    b.unread(b"taken")
    _equal(b.take_unread(), b"taken")
    _equal(b.take_unread(), b"")
    await a.send(b"next")
    _equal(await receive_exactly(b, 4), b"next")


async def _unread_before_end(a: Stream, b: Stream) -> None:
    await a.send(b"all")
    await a.send_eof()
    data = await receive_all(b)
    _equal(data, b"all")
    b.unread(data)
    _equal(await receive_all(b), b"all")


async def _end_of_stream(a: Stream, b: Stream) -> None:
    await a.send(b"last words")
    await a.send_eof()
    await a.send_eof()
    _equal(await receive_all(b), b"last words")
    _equal(await b.receive(), b"")


async def _half_close(a: Stream, b: Stream) -> None:
    await a.send_eof()
    _equal(await b.receive(), b"")
    answer = pattern(100_000)
    async with _Works() as works:
        sending = works.start(b.send(answer))
        _equal(await receive_exactly(a, len(answer)), answer)
        await sending.result()
    await b.send_eof()
    _equal(await a.receive(), b"")


async def _cancelled_receive(a: Stream, b: Stream) -> None:
    for number in range(3):
        async with _Works() as works:
            waiting = works.start(b.receive())
            await _turns()
            assert not waiting.done(), "receive returned though nothing was sent"
            waiting.cancel()
        word = b"word %d" % number
        await a.send(word)
        _equal(await receive_exactly(b, len(word)), word)


async def _cancelled_send(a: Stream, b: Stream, most: int) -> None:
    async with _Works() as works:
        sending, _ = await _fill(works, a, most)
        sending.cancel()
    a.abort()
    await _drains(b)


async def _back_pressure(a: Stream, b: Stream, most: int) -> None:
    async with _Works() as works:
        sending, total = await _fill(works, a, most)
        received = 0
        while received < total:
            data = await b.receive()
            assert data, f"the stream ended after {received} of {total} bytes"
            _equal(data, pattern(len(data), received))
            received += len(data)
        await sending.result()
        _equal(received, total)


async def _large_transfer(a: Stream, b: Stream, size: int) -> None:
    async def give(stream: Stream, shift: int) -> None:
        offset, step = 0, 1
        while offset < size:
            count = min(step, size - offset)
            await stream.send(pattern(count, offset + shift))
            offset += count
            step = step * 3 % 200_003 + 1
        await stream.send_eof()

    async def take(stream: Stream, shift: int) -> None:
        offset = 0
        # Without half-close the peer's end may come as the end of both directions: the size is all that is asked for.
        while offset < size:
            data = await stream.receive(1 + offset % 70_001)
            assert data, f"the stream ended after {offset} of {size} bytes"
            assert len(data) <= 1 + offset % 70_001, "receive returned more than was asked for"
            _equal(data, pattern(len(data), offset + shift))
            offset += len(data)

    async with _Works() as works:
        for work in [works.start(work) for work in (give(a, 0), take(b, 0), take(a, 7), give(b, 7))]:
            await work.result()


async def _close_twice(a: Closable, b: Closable) -> None:
    await a.aclose()
    await a.aclose()
    a.abort()
    b.abort()
    b.abort()
    await b.aclose()


async def _after_close(a: Stream, b: Stream) -> None:
    await a.aclose()
    await _raises(a.receive(), "receive after aclose")
    await _raises(a.send(b"too late"), "send after aclose")
    b.abort()
    await _raises(b.receive(), "receive after abort")
    await _raises(b.send(b"too late"), "send after abort")


async def _peer_closes(a: Stream, b: Stream, most: int) -> None:
    await a.send(b"bye")
    await a.aclose()
    _equal(await receive_exactly(b, 3), b"bye")
    await _ends(b)
    await _send_fails(b, most)


async def _peer_aborts(a: Stream, b: Stream, most: int) -> None:
    async with _Works() as works:
        waiting = works.start(_ends(b))
        await _turns()
        a.abort()
        await waiting.result()
    await _send_fails(b, most)


async def _abort_wakes_reader(a: Stream, b: Stream) -> None:
    async with _Works() as works:
        waiting = works.start(_raises(b.receive(), "receive while this side aborts"))
        await _turns()
        b.abort()
        await waiting.result()
    await _ends(a)


async def _abort_wakes_writer(a: Stream, b: Stream, most: int) -> None:
    async with _Works() as works:
        sending, _ = await _fill(works, a, most)
        a.abort()
        await _raises(sending.result(), "send while this side aborts")
    await _drains(b)


async def _two_readers(a: Stream, b: Stream) -> None:
    async with _Works() as works:
        first = works.start(b.receive())
        await _turns()
        try:
            await b.receive()
        except RuntimeError:
            pass
        else:
            raise AssertionError("a second receive at the same time was not refused")
        await a.send(b"for the first")
        _equal(await first.result(), b"for the first")


# ---- datagrams ----------------------------------------------------------------------------------
async def check_datagrams(
    make_pair: MakeDatagrams,
    *,
    largest: int = 8192,
    empty: bool = True,
    sees_end: bool = False,
    two_readers: bool = True,
) -> None:
    """Check a kind of datagrams in both directions, by tasks and by fibers.

    The ends know each other: what one sends to the peer it last heard of, or to ANY, reaches the other.

    largest      bytes of the largest datagram that must arrive whole
    empty        whether datagrams without payload are carried
    sees_end     whether the close of one end ends the other
    two_readers  whether a second `receive` at a time is refused with RuntimeError
    """
    runs: list[tuple[Callable[..., Coroutine[Any, Any, None]], dict[str, Any]]] = [
        (_boundaries, {"largest": largest}),
        (_answers, {}),
        (_reused_buffer, {}),
        (_strides, {}),
        (_burst, {}),
        (_too_large, {}),
        (_cancelled_datagram, {}),
        (_close_twice, {}),
        (_datagrams_after_close, {}),
        (_datagrams_abort_wakes, {}),
    ]
    if empty:
        runs.append((_empty, {}))
    if sees_end:
        runs.append((_datagrams_end, {}))
    if two_readers:
        runs.append((_datagrams_two_readers, {}))
    await _run_all(runs, make_pair)


async def _boundaries(a: Datagrams, b: Datagrams, largest: int) -> None:
    for size in (1, 2, 1200, 1472, largest):
        for number in range(3):
            data = pattern(size, number)
            await a.send([Datagram(data, b.local)])
            _equal(await _next(b), data)


async def _answers(a: Datagrams, b: Datagrams) -> None:
    await a.send([Datagram(b"question", b.local)])
    (question,) = await b.receive()
    _equal(bytes(question.data), b"question")
    await b.send([Datagram(b"answer", question.peer)])
    (answer,) = await a.receive()
    _equal(bytes(answer.data), b"answer")
    assert answer.peer.port, f"the sender {answer.peer} has no port"


async def _reused_buffer(a: Datagrams, b: Datagrams) -> None:
    reused = bytearray(b"kept")
    await a.send([Datagram(reused, b.local)])
    reused[:] = bytes(len(reused))
    _equal(await _next(b), b"kept")
    await a.send([Datagram(memoryview(b"xviewx")[1:-1], b.local)])
    _equal(await _next(b), b"view")


async def _strides(a: Datagrams, b: Datagrams) -> None:
    await a.send([Datagram(b"aaabbbcccd", b.local, 3)])
    found: list[bytes] = []
    while len(found) < 4:
        found += split(await b.receive())
    _equal(found, [b"aaa", b"bbb", b"ccc", b"d"])


async def _empty(a: Datagrams, b: Datagrams) -> None:
    await a.send([Datagram(b"", b.local), Datagram(b"after", b.local)])
    found: list[bytes] = []
    while len(found) < 2:
        found += split(await b.receive())
    _equal(found, [b"", b"after"])


async def _burst(a: Datagrams, b: Datagrams) -> None:
    """What does not fit is dropped, nothing waits, and what comes is whole."""
    count = 2000
    batch = [Datagram(pattern(100, number), b.local) for number in range(count)]
    for start in range(0, count, 50):
        await a.send(batch[start : start + 50])
    whole = {pattern(100, number) for number in range(251)}
    found = split(await b.receive())
    assert found, "nothing of a burst arrived"
    for data in found:
        assert data in whole, f"a datagram arrived changed: {data[:64]!r}"


async def _too_large(a: Datagrams, b: Datagrams) -> None:
    """A datagram that is too large is lost without harm to the next."""
    await a.send([Datagram(bytes(70_000), b.local)])
    await a.send([Datagram(b"next", b.local)])
    _equal(await _next(b), b"next")


async def _cancelled_datagram(a: Datagrams, b: Datagrams) -> None:
    for number in range(3):
        async with _Works() as works:
            waiting = works.start(b.receive())
            await _turns()
            assert not waiting.done(), "receive returned though nothing was sent"
            waiting.cancel()
        word = b"word %d" % number
        await a.send([Datagram(word, b.local)])
        _equal(await _next(b), word)


async def _datagrams_after_close(a: Datagrams, b: Datagrams) -> None:
    await a.aclose()
    await _raises(a.receive(), "receive after aclose")
    await _raises(a.send([Datagram(b"too late", b.local)]), "send after aclose")


async def _datagrams_abort_wakes(a: Datagrams, b: Datagrams) -> None:
    async with _Works() as works:
        waiting = works.start(_raises(b.receive(), "receive while this side aborts"))
        await _turns()
        b.abort()
        await waiting.result()
    await a.send([Datagram(b"into the void", ANY)])


async def _datagrams_end(a: Datagrams, b: Datagrams) -> None:
    await a.send([Datagram(b"last", b.local)])
    await a.aclose()
    _equal(await _next(b), b"last")
    _equal(list(await b.receive()), [])
    _equal(list(await b.receive()), [])


async def _datagrams_two_readers(a: Datagrams, b: Datagrams) -> None:
    async with _Works() as works:
        first = works.start(b.receive())
        await _turns()
        try:
            await b.receive()
        except RuntimeError:
            pass
        else:
            raise AssertionError("a second receive at the same time was not refused")
        await a.send([Datagram(b"for the first", b.local)])
        _equal(split(await first.result()), [b"for the first"])


# ---- for tests of their own ---------------------------------------------------------------------
async def receive_exactly(stream: Stream, size: int) -> bytes:
    """Receive `size` bytes. Raise AssertionError when the stream ends before."""
    data = b""
    while len(data) < size:
        more = await stream.receive(size - len(data))
        assert more, f"the stream ended after {len(data)} of {size} bytes: {data[:64]!r}"
        data += more
    return data


async def receive_all(stream: Stream) -> bytes:
    """Receive to the end of the stream."""
    data = b""
    while more := await stream.receive():
        data += more
    return data


def split(batch: Sequence[Datagram]) -> list[bytes]:
    """Return the single datagrams' bytes of a batch, those joined with a stride taken apart."""
    found = []
    for datagram in batch:
        data = bytes(datagram.data)
        step = datagram.stride or max(1, len(data))
        found += [data[start : start + step] for start in range(0, max(1, len(data)), step)]
    return found


# ---- parts --------------------------------------------------------------------------------------
@asynccontextmanager
async def _opened(
    make_pair: Callable[[], Awaitable[tuple[T, T]] | AbstractAsyncContextManager[tuple[T, T]]],
) -> AsyncIterator[tuple[T, T]]:
    made = make_pair()
    if isinstance(made, AbstractAsyncContextManager):
        async with made as pair:
            yield pair
        return
    ends = await made
    try:
        yield ends
    finally:
        for end in ends:
            end.abort()


async def _run_all(
    runs: Sequence[tuple[Callable[..., Coroutine[Any, Any, None]], dict[str, Any]]],
    make_pair: Callable[[], Awaitable[tuple[T, T]] | AbstractAsyncContextManager[tuple[T, T]]],
) -> None:
    """Run each check in both directions, by tasks and by fibers: connections are served by fibers."""
    for check, options in runs:
        for swapped in (False, True):
            for in_fiber in (False, True):
                async with _opened(make_pair) as (left, right):
                    ends = (right, left) if swapped else (left, right)
                    if in_fiber:
                        await _by_fiber(_run(check, ends, options))
                    else:
                        await _run(check, ends, options)


async def _by_fiber(work: Coroutine[Any, Any, None]) -> None:
    failure: list[BaseException] = []

    async def body() -> None:
        try:
            await work
        except AssertionError as exc:
            failure.append(exc)

    ended = asyncio.get_running_loop().create_future()
    Scope("conformance").launch(body()).add_done_callback(lambda _: ended.set_result(None))
    await ended
    if failure:
        raise failure[0]


async def _run(check: Callable[..., Coroutine[Any, Any, None]], ends: tuple[Any, Any], options: dict[str, Any]) -> None:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        async with asyncio.timeout(_HANG):
            await check(*ends, **options)
    except TimeoutError:
        raise AssertionError(f"{name}: hangs") from None
    except AssertionError as exc:
        raise AssertionError(f"{name}: {exc}") from exc
    except Exception as exc:
        raise AssertionError(f"{name}: {type(exc).__name__}: {exc}") from exc
    finally:
        for end in ends:
            end.abort()
        await _turns()


class _Work(Generic[R]):
    """A task, or a fiber if started by one, whose outcome is kept for whoever asks for it."""

    def __init__(self, scope: Scope, work: Awaitable[R]) -> None:
        self._results: list[R] = []
        self._error: BaseException | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        start = scope.start if current_hub().fiber is None else scope.launch
        self._handle: asyncio.Task[None] | Fiber = start(self._body(work))
        self._handle.add_done_callback(self._end)

    async def _body(self, work: Awaitable[R]) -> None:
        try:
            self._results.append(await work)
        except (Exception, asyncio.CancelledError) as exc:
            self._error = exc

    def _end(self, _handle: object) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def done(self) -> bool:
        return self._handle.done()

    def cancel(self) -> None:
        self._handle.cancel()

    async def result(self) -> R:
        await self._ended
        if self._error is not None:
            raise self._error
        return self._results[0]


class _Works:
    """Starts work that is cancelled when the check ends."""

    def __init__(self) -> None:
        self._scope = Scope("conformance")

    def start(self, work: Awaitable[R]) -> _Work[R]:
        return _Work(self._scope, work)

    async def __aenter__(self) -> _Works:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._scope.cancel()


async def _turns() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


_PIECE = 50_000


async def _fill(works: _Works, stream: Stream, most: int) -> tuple[_Work[None], int]:
    """Send `pattern` until `send` waits; return the task, which ends with that `send`, and the bytes sent by then."""
    sent = 0
    enough = False
    moved = asyncio.Event()

    async def work() -> None:
        nonlocal sent
        while not enough:
            await stream.send(pattern(_PIECE, sent))
            sent += _PIECE
            assert sent <= most, f"send never waits: {sent} bytes are on their way and nobody reads"
            moved.set()

    task = works.start(work())
    while True:
        moved.clear()
        # Real time, not turns of the loop: a kernel or a thread may be taking the bytes.
        try:
            async with asyncio.timeout(_STILL):
                await moved.wait()
        except TimeoutError:
            break
    if task.done():
        await task.result()
    enough = True
    return task, sent + _PIECE


async def _next(datagrams: Datagrams) -> bytes:
    batch = split(await datagrams.receive())
    assert len(batch) == 1, f"{len(batch)} datagrams arrived instead of one"
    return batch[0]


async def _raises(work: Awaitable[object], what: str) -> None:
    try:
        await work
    except ConnError:
        return
    raise AssertionError(f"{what} did not raise ConnError")


async def _ends(stream: Stream) -> None:
    """Expect the end of the stream, or the error of a broken one."""
    try:
        data = await stream.receive()
    except ConnError:
        return
    _equal(data, b"")


async def _drains(stream: Stream) -> None:
    """Expect the end, after whatever was on its way."""
    try:
        await receive_all(stream)
    except ConnError:
        pass


async def _send_fails(stream: Stream, most: int) -> None:
    """Expect that writing to a peer that is gone fails sooner or later, and that it never waits for ever."""
    sent = 0
    try:
        while sent <= most:
            await stream.send(pattern(50_000))
            sent += 50_000
            await asyncio.sleep(0)
    except ConnError:
        return
    raise AssertionError(f"{sent} bytes could be sent to a peer that is gone")


def _equal(got: object, wanted: object) -> None:
    if got != wanted:
        raise AssertionError(f"got {_short(got)} instead of {_short(wanted)}")


def _short(value: object) -> str:
    if isinstance(value, bytes) and len(value) > 64:
        return f"{value[:64]!r}... ({len(value)} bytes)"
    return repr(value)


__all__ = ["check_datagrams", "check_stream", "receive_all", "receive_exactly", "split"]
