"""The native relay: which flows it takes, what it tells while they run, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gostnet.core.errors import ConnError
from gostnet.core.flow import Flow, Meter, Shapers
from gostnet.core.hub import current_hub
from gostnet.core.sockets import SocketStream
from gostnet.core.tasks import Scope, run
from gostnet.dataplane import splice
from gostnet.dataplane.native import build, library
from gostnet.dataplane.native.engine import REFRESH, Engine, engine, threads_here
from gostnet.dataplane.relay import relay
from gostnet.testing.processes import gostnet

from .kit import be_bound, tcp_pair, until

LOADED, WHY_NOT = library.load()
pytestmark = pytest.mark.skipif(LOADED is None, reason=f"native relay: {WHY_NOT}")


class Rig:
    """client == relay == server, with the relay as a task of `scope`."""

    def __init__(self, scope: Scope, wanted: str = "auto", idle: float = 0.0) -> None:
        self.client, self.left = tcp_pair()
        self.right, self.server = tcp_pair()
        self.flow = Flow()
        self.flow.engine = wanted
        self.error: BaseException | None = None
        self.ended = asyncio.Event()
        scope.start(self._run(idle))
        scope.start(self._close_at_the_end())

    async def _run(self, idle: float) -> None:
        try:
            await relay(self.flow, self.left, self.right, idle)
        except ConnError as exc:
            self.error = exc
        finally:
            self.left.abort()
            self.right.abort()
            self.ended.set()

    async def _close_at_the_end(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.close()

    async def exchange(self, times: int = 1) -> None:
        for _ in range(times):
            await self.client.send(b"ping")
            assert await self.server.receive() == b"ping"
            await self.server.send(b"pong!")
            assert await self.client.receive() == b"pong!"

    def close(self) -> None:
        self.client.abort()
        self.server.abort()


def scoped(work: Callable[[Scope], Awaitable[None]]) -> None:
    async def main() -> None:
        scope = Scope("test")
        try:
            async with asyncio.timeout(20):
                await work(scope)
        finally:
            await scope.cancel()

    run(main())


def inside() -> int:
    found = current_hub().native
    return 0 if found is None else len(found)


def test_a_short_flow_stays_in_python_and_one_that_lives_moves() -> None:
    async def work(scope: Scope) -> None:
        rig = Rig(scope)
        await rig.exchange()
        assert inside() == 0
        assert rig.flow.engine == "splice: short"
        await rig.exchange(8)
        assert inside() == 1
        assert rig.flow.engine == "native: lives on"
        await rig.exchange(100)
        rig.close()
        await rig.ended.wait()
        assert inside() == 0
        assert rig.flow.meter == Meter(109 * 4, 109 * 5)
        assert (rig.left.received, rig.right.sent) == (109 * 4, 109 * 4)
        assert (rig.right.received, rig.left.sent) == (109 * 5, 109 * 5)

    scoped(work)


def test_bulk_moves_at_once() -> None:
    async def work(scope: Scope) -> None:
        rig = Rig(scope)
        await rig.client.send(bytes(200_000))
        left = 200_000
        while left:
            left -= len(await rig.server.receive())
        assert rig.flow.engine == "native: lives on"
        rig.close()
        await rig.ended.wait()

    scoped(work)


def test_a_flow_that_moves_in_the_middle_of_its_work_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice, "BUDGET", 1)  # so that more is always to be done when an edge makes it move
    sent = {patience: os.urandom(400_000) for patience in range(1, 9)}
    pump = splice._Half.pump
    flows: list[Flow] = []
    after: list[str] = []

    def watched(half: splice._Half, last: bool) -> bool:
        if flows[-1].engine.startswith("native"):
            after.append("pumped by two")
        return pump(half, last)

    monkeypatch.setattr(splice._Half, "pump", watched)

    async def send_slowly(stream: SocketStream, data: bytes) -> None:
        for start in range(0, len(data), 9000):
            await stream.send(data[start : start + 9000])
            await asyncio.sleep(0)

    async def work(scope: Scope) -> None:
        be_bound(current_hub(), False)  # which it is after a while, and then nothing moves in the middle
        for patience, data in sent.items():
            monkeypatch.setattr(splice, "PATIENCE", patience)
            rig = Rig(scope)
            flows.append(rig.flow)
            scope.start(send_slowly(rig.client, data))
            scope.start(send_slowly(rig.server, data))
            up, down = bytearray(), bytearray()
            while len(up) < len(data) or len(down) < len(data):
                if len(up) < len(data):
                    up += await rig.server.receive()
                if len(down) < len(data):
                    down += await rig.client.receive()
            assert rig.flow.engine == "native: lives on"
            (passage,) = current_hub().native._inside.values()
            passage._at_end.__self__._go()  # a turn that was asked for before the move
            assert up == data
            assert down == data
            rig.close()
            await rig.ended.wait()
        assert after == []

    scoped(work)


def closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def test_a_busy_loop_leaves_short_flows_to_the_thread_which_closes_them() -> None:
    async def work(scope: Scope) -> None:
        for flows in (1, 20):
            rigs = [Rig(scope) for _ in range(flows)]
            descriptors = [end.readiness.fd for rig in rigs for end in (rig.left, rig.right)]
            be_bound(current_hub())
            await asyncio.sleep(0)  # their relays begin
            assert inside() == flows
            for rig in rigs:
                await rig.exchange()
                assert rig.flow.engine == "native: the loop is busy"
                await rig.client.send(b"last")
                await rig.client.send_eof()
                assert await rig.server.receive() == b"last"
                assert await rig.server.receive() == b""
                await rig.server.send_eof()
                await rig.ended.wait()
                assert rig.error is None
                assert (rig.flow.meter.up, rig.flow.meter.down) == (8, 5)
                assert (rig.left.received, rig.right.sent, rig.right.received, rig.left.sent) == (8, 8, 5, 5)
                assert await rig.client.receive() == b""
            assert inside() == 0
            assert all(map(closed, descriptors))
            for rig in rigs:
                rig.close()

    scoped(work)


def test_what_the_thread_has_closed_is_not_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_news", lambda *_: None)  # nobody hears of the end

    async def work(scope: Scope) -> None:
        own = Scope("own")
        rig = Rig(own)
        descriptors = [rig.left.readiness.fd, rig.right.readiness.fd]
        be_bound(current_hub())
        await asyncio.sleep(0)
        await rig.exchange()
        await rig.client.send_eof()
        await rig.server.send_eof()
        await until(lambda: all(map(closed, descriptors)))
        others = [os.dup(0) for _ in descriptors]
        assert sorted(others) == sorted(descriptors)  # the numbers are somebody else's by now
        await own.cancel()
        assert [end.readiness.fd for end in (rig.left, rig.right)] == [-1, -1]
        assert (rig.flow.meter.up, rig.flow.meter.down) == (4, 5)
        for descriptor in others:
            os.close(descriptor)  # is still open

    scoped(work)


def test_meters_of_running_flows_are_brought_up_to_date() -> None:
    async def work(scope: Scope) -> None:
        rig = Rig(scope, "native")
        await rig.exchange(3)
        assert rig.flow.meter == Meter()
        refreshed = asyncio.Event()
        current_hub().loop.call_later(REFRESH + 0.1, refreshed.set)
        await refreshed.wait()
        assert inside() == 1
        assert rig.flow.meter == Meter(12, 15)
        rig.close()
        await rig.ended.wait()
        assert rig.flow.meter == Meter(12, 15)

    scoped(work)


def test_a_direction_that_has_ended_before_stays_ended() -> None:
    async def work(scope: Scope) -> None:
        rig = Rig(scope)
        await rig.client.send(b"request")
        await rig.client.send_eof()
        assert await rig.server.receive() == b"request"
        assert await rig.server.receive() == b""
        answer = os.urandom(3_000_000)
        scope.start(rig.server.send(answer))
        got = b""
        while len(got) < len(answer):
            got += await rig.client.receive()
        assert got == answer
        assert rig.flow.engine == "native: lives on"
        rig.server.abort()
        assert await rig.client.receive() == b""
        await rig.ended.wait()
        assert rig.error is None

    scoped(work)


def test_many_flows_come_and_go_while_others_run() -> None:
    async def work(scope: Scope) -> None:
        steady = [Rig(scope, "native") for _ in range(4)]
        for generation in range(30):
            rigs = [Rig(scope, "native") for _ in range(8)]
            for rig in rigs:
                await rig.exchange(2)
            for index, rig in enumerate(rigs):
                match (index + generation) % 4:
                    case 0:
                        rig.close()
                    case 1:
                        rig.client.reset()
                    case 2:
                        rig.server.reset()
                    case _:
                        await rig.client.send_eof()
                        rig.server.abort()
            for rig in steady:
                await rig.exchange()
            for rig in rigs:
                await rig.ended.wait()
                assert rig.flow.meter == Meter(8, 10)
                rig.close()
        assert inside() == len(steady)
        for rig in steady:
            rig.close()
            await rig.ended.wait()
            assert rig.flow.meter == Meter(30 * 4, 30 * 5)

    scoped(work)


def test_flows_are_spread_over_threads_and_keep_apart() -> None:
    async def work(scope: Scope) -> None:
        assert LOADED is not None
        hub = current_hub()
        hub.native = Engine(hub, LOADED, threads=3)
        limit = Allowance()
        limit.left = 1 << 20
        rigs = []
        for index in range(12):
            rig = Rig(scope, "native")
            if index % 2:
                rig.flow.shapers = Shapers(down=[limit])
            rigs.append(rig)
            await rig.exchange(index + 1)
        assert inside() == 12
        for index, rig in enumerate(rigs):
            await rig.exchange()
            if index % 3 == 0:
                rig.close()
                await rig.ended.wait()
                assert rig.flow.meter == Meter(4 * (index + 2), 5 * (index + 2))
        assert inside() == 8
        assert (1 << 20) - limit.left == sum(5 * (index + 2) for index in range(1, 12, 2))

    scoped(work)


def test_cancelling_in_the_middle_of_bulk_gives_the_sockets_back() -> None:
    async def work(scope: Scope) -> None:
        engine(current_hub())
        before = None
        for _ in range(20):
            own = Scope("flows")
            rigs = [Rig(own, "native") for _ in range(3)]
            writers = Scope("writers")
            for rig in rigs:
                writers.start(_flood(rig.client))
            for rig in rigs:
                await rig.server.receive()
            await own.cancel()
            await writers.cancel()
            for rig in rigs:
                assert rig.ended.is_set()
                rig.close()
            now = len(os.listdir("/proc/self/fd"))
            before = before or now
            # Each thread keeps empty pipes, two descriptors each, for as many flows as ran at once.
            assert now <= before + 2 * 2 * len(rigs) * threads_here()
        assert inside() == 0

    scoped(work)


async def _flood(stream: SocketStream) -> None:
    try:
        while True:
            await stream.send(bytes(65536))
    except ConnError:
        pass


class Allowance:
    """A limit that grants what it is given."""

    def __init__(self) -> None:
        self.left = 0
        self.returned = 0

    def take(self, wanted: int) -> int:
        granted = min(wanted, self.left)
        self.left -= granted
        return granted

    def give_back(self, unused: int) -> None:
        self.left += unused
        self.returned += unused

    def delay(self) -> float:
        return 0.001


def test_limits_hold_inside_the_thread() -> None:
    async def work(scope: Scope) -> None:
        limit = Allowance()
        rig = Rig(scope, "native")
        rig.flow.shapers = Shapers(up=[limit])
        await asyncio.sleep(0)
        scope.start(rig.client.send(bytes(100_000)))
        for allowed in (1, 999, 50_000, 49_000):
            limit.left += allowed
            got = 0
            while got < allowed:
                got += len(await rig.server.receive())
            assert got == allowed
        await rig.server.send(b"not limited")
        assert await rig.client.receive() == b"not limited"
        assert inside() == 1
        rig.close()
        await rig.ended.wait()
        assert rig.flow.meter == Meter(100_000, 11)
        assert limit.left == 0

    scoped(work)


def test_a_second_process_image_is_not_confused_by_a_fork() -> None:
    script = """
        import asyncio, gc, os
        from gostnet.core.hub import Hub
        from gostnet.dataplane.native.engine import REFRESH, Engine, engine, threads_here
        loop = asyncio.new_event_loop()
        hub = Hub(loop)
        found, _ = engine(hub)
        assert found is not None
        child = os.fork()
        if child == 0:
            found.close()  # has no thread to wait for
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        hub.close()
        loop.close()
        print("threads", len(os.listdir("/proc/self/task")))
    """
    done = _python(script)
    assert done.stdout.strip() == "threads 1", done.stderr


def test_a_process_ends_with_flows_inside() -> None:
    script = """
        import asyncio
        from tests.dataplane.test_native import Rig
        from gostnet.core.tasks import Scope
        async def main():
            scope = Scope("x")
            rig = Rig(scope, "native")
            await rig.exchange(3)
            print("inside", flush=True)
            await asyncio.sleep(60)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "inside\n"
            process.send_signal(number)
            assert process.wait(10) == -number


@pytest.mark.parametrize(("wanted", "used"), [("splice", "splice: asked for"), ("native", "native: asked for")])
def test_a_service_chooses_its_engine_and_its_records_tell(wanted: str, used: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as origin:
        config = tmp_path / "gostnet.yaml"
        config.write_text(
            f"""
            log: {{level: debug}}
            services:
            - name: s
              addr: 127.0.0.1:0
              handler: {{type: tcp}}
              listener: {{type: tcp}}
              metadata: {{engine: {wanted}}}
              forwarder: {{nodes: [{{name: t, addr: "127.0.0.1:{origin.getsockname()[1]}"}}]}}
            """
        )
        with gostnet("-C", str(config)) as daemon:
            daemon.wait_ready()
            line = daemon.wait_for("listening on 127.0.0.1:")
            port = int(line.partition("listening on 127.0.0.1:")[2].partition("/")[0])
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"ping")
                upstream, _ = origin.accept()
                with upstream:
                    assert upstream.recv(4) == b"ping"
                    upstream.sendall(b"pong")
                    assert client.recv(4) == b"pong"
            daemon.wait_for('"engine"')
            assert used in [record.get("engine") for record in daemon.records]


def _python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **environment},
        check=False,
    )


def test_it_can_be_switched_off() -> None:
    script = "from gostnet.dataplane.native.library import load; print(load())"
    assert _python(script, GOSTNET_NATIVE="0").stdout == "(None, 'switched off by GOSTNET_NATIVE')\n"


def test_without_a_compiler_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compile_relay(tmp_path / "x.so") == "no C compiler"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in build.compile_relay(tmp_path / "x.so")
    assert list(tmp_path.iterdir()) == []


def movers(wanted: int) -> int:
    """Count the kernel's threads that are movers, once they are as many as `wanted`, or after 5 s.

    One that has been joined is listed for a moment longer, as are the threads of tests before, which have other names.
    """
    deadline = time.monotonic() + 5
    while True:
        names = []
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it has gone meanwhile
                names.append((task / "comm").read_text().strip())
        count = names.count("gostnet-relay")
        if count == wanted or time.monotonic() > deadline:
            return count
        time.sleep(0.001)


def test_the_threads_end_with_the_hub() -> None:
    before = threading.active_count(), movers(0)
    assert before[1] == 0

    async def work(scope: Scope) -> None:
        rig = Rig(scope, "native")
        await rig.exchange()
        assert movers(threads_here()) == threads_here()

    scoped(work)
    assert (threading.active_count(), movers(0)) == before
