"""An engine that cannot do something leaves it to the next one: every byte arrives, and one line says why."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.flow import Flow, Shapers
from gostnet.core.hub import current_hub
from gostnet.core.sockets import SocketStream
from gostnet.core.tasks import run, together
from gostnet.core.udp_socket import UdpSocket, open_udp
from gostnet.dataplane import pipes
from gostnet.dataplane.native import engine as native
from gostnet.dataplane.native import joints, library
from gostnet.dataplane.pipes import PipePool, pipe_pool
from gostnet.dataplane.pump import pump
from gostnet.dataplane.sessions import Session

from .kit import read_all
from .test_relay import Rig

LOADED, WHY_NOT = library.load()
NATIVE = pytest.mark.skipif(LOADED is None, reason=f"native relay: {WHY_NOT}")
BULK = os.urandom(3_000_000)


async def transfer(wanted: str, size: int = len(BULK)) -> Rig:
    """Send both ways through a relay, and see that all of it arrives and is counted."""
    rig = Rig(wanted)
    data = BULK[:size]

    async def send(stream: SocketStream) -> None:
        await stream.send(data)
        await stream.send_eof()

    async def receive(stream: SocketStream) -> None:
        assert hashlib.sha256(await read_all(stream)).digest() == hashlib.sha256(data).digest()

    await together(rig.run(), send(rig.client), receive(rig.server), send(rig.server), receive(rig.client))
    assert (rig.flow.meter.up, rig.flow.meter.down) == (size, size)
    rig.close()
    return rig


def lines_of(work: Callable[[], Any]) -> list[str]:
    """Run `work` on a loop, and return what engines have said meanwhile."""
    lines: list[str] = []

    async def main() -> None:
        current_hub().tell = lines.append
        try:
            await work()
            assert pipe_pool(current_hub()).out == 0
        finally:
            pipe_pool(current_hub()).close()

    run(main())
    return lines


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda reason: monkeypatch.setattr(native, "load", lambda: (None, reason))


# ---- splice ---------------------------------------------------------------------------------------
@pytest.fixture
def no_descriptors() -> Iterator[Callable[[], None]]:
    """Let the process open nothing more, when called."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def forbid() -> None:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))

    yield forbid
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_for_pipes_bytes_are_copied(no_descriptors: Callable[[], None]) -> None:
    async def work() -> None:
        rigs = [Rig("splice"), Rig("splice")]
        no_descriptors()
        for rig in rigs:

            async def send(rig: Rig = rig) -> None:
                await rig.client.send(BULK)
                await rig.client.send_eof()

            async def answer(rig: Rig = rig) -> None:
                assert await read_all(rig.server) == BULK
                await rig.server.send_eof()

            async def end(rig: Rig = rig) -> None:
                assert await read_all(rig.client) == b""

            await together(rig.run(), send(), answer(), end())
            assert rig.flow.meter.up == len(BULK)
            rig.close()

    assert lines_of(work) == ["engine splice gives way to copy: no pipe: Too many open files"]


def test_pipes_that_are_too_small_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def control(fd: int, command: int, *rest: int) -> int:
        if command == 1031 and rest[0] == pipes.PIPE_SIZE:
            real(fd, command, 8192)  # what a pipe gets beyond the limit
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return real(fd, command, *rest)

    monkeypatch.setattr(fcntl, "fcntl", control)

    async def work() -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            await transfer("splice")
        assert len(os.listdir("/proc/self/fd")) == before

    (line,) = lines_of(work)
    assert line == "engine splice gives way to copy: pipes are too small: fs.pipe-user-pages-soft is used up"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
@pytest.mark.parametrize("after", [0, 1, 4, 5])
def test_a_kernel_that_stops_splicing_loses_no_byte(monkeypatch: pytest.MonkeyPatch, number: int, after: int) -> None:
    """`after` calls: even ones read from a socket, odd ones write to one, so that bytes are in the pipe."""
    calls = 0
    real = os.splice

    def refuse(*arguments: Any, **named: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    monkeypatch.setattr(os, "splice", refuse)

    async def work() -> None:
        for _ in range(2):
            await transfer("splice")

    assert lines_of(work) == [f"engine splice gives way to copy: a socket is not spliced: {os.strerror(number)}"]


def test_a_pool_of_its_own_says_nothing() -> None:
    pool = PipePool()
    pool.refuse("nobody listens")
    taken = pool.take()
    assert taken is not None
    pool.put(taken, empty=True)
    pool.close()


@NATIVE
def test_the_thread_without_descriptors_for_pipes_copies_and_it_is_told(
    no_descriptors: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "REFRESH", 0.01)
    told: list[str] = []

    async def work() -> None:
        hub = current_hub()
        native.engine(hub)
        rig = Rig("native")
        no_descriptors()
        heard = asyncio.Event()

        def tell(line: str) -> None:
            told.append(line)
            heard.set()

        hub.tell = tell

        async def send() -> None:
            await rig.client.send(BULK)
            await heard.wait()
            await rig.client.send_eof()

        async def answer() -> None:
            assert await read_all(rig.server) == BULK
            await rig.server.send_eof()

        async def end() -> None:
            assert await read_all(rig.client) == b""

        await together(rig.run(), send(), answer(), end())
        assert rig.flow.engine == "native: asked for"
        assert rig.flow.meter.up == len(BULK)
        rig.close()

    lines_of(work)
    assert told == ["engine splice gives way to copy: no pipe: Too many open files"]


# ---- native ---------------------------------------------------------------------------------------
def test_without_the_library_flows_are_spliced_and_it_is_said_once(no_library: Callable[[str], None]) -> None:
    no_library("not built")

    async def work() -> None:
        for _ in range(2):
            assert (await transfer("auto")).flow.engine == "splice: native is not built"

    assert lines_of(work) == ["engine native gives way to splice: not built"]


def test_a_library_that_nobody_wants_is_not_missed(no_library: Callable[[str], None]) -> None:
    no_library(library.OFF)

    async def work() -> None:
        assert (await transfer("auto")).flow.engine.startswith("splice: native is switched off")

    assert lines_of(work) == []


@NATIVE
def test_threads_that_do_not_start_are_asked_for_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0
    real = native.Engine.__init__

    def refuse(self: native.Engine, *arguments: Any) -> None:
        nonlocal tried
        tried += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(native.Engine, "__init__", refuse)

    async def work() -> None:
        for _ in range(3):
            assert (await transfer("auto", 100_000)).flow.engine == "splice: native is Too many open files"
        assert tried == 1
        monkeypatch.setattr(native.Engine, "__init__", real)
        monkeypatch.setattr(native, "RETRY", 0.0)
        current_hub().native = native._Refused("", 0.0)
        assert (await transfer("native")).flow.engine == "native: asked for"

    assert lines_of(work) == ["engine native gives way to splice: Too many open files"]


@NATIVE
def test_the_thread_without_descriptors_is_replaced(no_descriptors: Callable[[], None]) -> None:
    async def work() -> None:
        no_descriptors()
        found, reason = native.engine(current_hub())
        assert found is None
        assert reason == "Too many open files"

    assert lines_of(work) == ["engine native gives way to splice: Too many open files"]


@NATIVE
def test_a_flow_that_the_thread_does_not_take_goes_on_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LOADED is not None
    monkeypatch.setattr(LOADED, "add", lambda *arguments: -1)

    async def work() -> None:
        for _ in range(2):
            assert (await transfer("auto")).flow.engine == "splice: native has not taken the flow"

    assert lines_of(work) == ["engine native gives way to splice: no memory, or no epoll watches, for another flow"]


# ---- datagrams --------------------------------------------------------------------------------------
class Silent(Datagrams):
    """An end of which nothing comes."""

    async def receive(self) -> tuple[()]:
        return ()

    async def send(self, batch: Sequence[Datagram]) -> None:
        raise AssertionError("there is nothing to send")

    async def aclose(self) -> None:
        pass

    def abort(self) -> None:
        pass


class OfListener(Session[Any]):
    """A session of a listener that has ended, or one that the library does not take."""

    def __init__(self) -> None:
        pass

    async def receive(self) -> tuple[()]:
        return ()

    async def joined(self, flow: Flow, upstream: UdpSocket, idle: float, native: bool) -> None:
        pass


class Everything:
    """A limit that allows it."""

    def take(self, wanted: int) -> int:
        return wanted

    def give_back(self, unused: int) -> None:
        pass

    def delay(self) -> float:
        return 0.0


def engine_of(client: Datagrams, *, connected: bool = True, wanted: str = "auto", **options: Any) -> str:
    """Return what a flow of datagrams says of its engine after its end."""
    flow = Flow()
    flow.engine = wanted
    flow.shapers = options.pop("shapers", None)

    async def main() -> None:
        peer = Endpoint("127.0.0.1", 9)
        upstream = open_udp(peer) if connected else Silent()
        try:
            await pump(flow, client, upstream, **options)
        finally:
            upstream.abort()

    run(main())
    return flow.engine


def test_a_flow_of_datagrams_says_why_it_is_not_the_threads() -> None:
    assert engine_of(Silent()) == "copy: one end is no plain socket"
    assert engine_of(OfListener(), connected=False) == "copy: one end is no plain socket"
    assert engine_of(OfListener(), wanted="copy") == engine_of(Silent(), wanted="splice") == "copy: asked for"
    assert engine_of(OfListener(), allowed=lambda peer: True) == "copy: somebody looks at the datagrams"
    limited = Shapers(up=[Everything()])
    assert engine_of(OfListener(), shapers=limited) == "copy: there are limits"


def test_and_so_it_does_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gostnet.dataplane.pump.load", lambda: (None, "not built"))
    assert engine_of(OfListener()) == "copy: native is not built"
    monkeypatch.setattr("gostnet.dataplane.pump.load", lambda: (object(), ""))
    assert engine_of(OfListener()) == "copy: native has not taken the flow"


@pytest.mark.parametrize(("reason", "told"), [("not built", True), (library.OFF, False)])
def test_datagrams_without_the_library_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, reason: str, told: bool
) -> None:
    monkeypatch.setattr(joints, "load", lambda: (None, reason))

    async def work() -> None:
        sock = open_udp(Endpoint("127.0.0.1", 9))
        for _ in range(2):
            assert joints.joints(sock.readiness, lambda arrivals: None, print) is None
        sock.abort()

    assert lines_of(work) == ([f"engine native gives way to copy: datagrams: {reason}"] if told else [])
