"""Probes: verdicts with inertia, what each check does, and that nothing of a command is left. Rows P01-P07, G09."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from pathlib import Path

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import DialError, NoRoute, ProtocolError, UpstreamRejected
from gostnet.core.flow import Flow
from gostnet.core.log import DEBUG, Logger, Sink
from gostnet.core.stream import CHUNK, Buffer, Stream
from gostnet.core.tasks import Scope, in_thread, run
from gostnet.pipeline.chain import Chain, ChainEntry, ChainGroup
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Latency, Marker
from gostnet.pipeline.probe import (
    CommandCheck,
    EgressCheck,
    HTTPExchange,
    NodeCheck,
    Probe,
    target_of,
)
from gostnet.pipeline.router import ServiceRouter
from gostnet.pipeline.selector import Fifo, Selector

from .kit import Direct, Label, node, run_virtual
from .test_router import TARGET


class Scripted:
    """A check that follows a script: seconds for a success, an error, or a number of seconds to hang."""

    def __init__(self, *script: float | Exception | None) -> None:
        self.script = list(script)
        self.at: list[float] = []

    async def run(self) -> float | None:
        self.at.append(asyncio.get_running_loop().time())
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        return step


class Middle(random.Random):
    """No jitter."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def probe(check: object, marker: Marker | None = None, **options: object) -> Probe:
    return Probe("node a", check, marker or Marker(), source=Middle(), **options)  # type: ignore[arg-type]


DEAD = DialError("refused")


def verdicts(made: Probe, count: int) -> list[bool]:
    async def main() -> list[bool]:
        found = []
        for _ in range(count):
            await made.once()
            found.append(made.marker.down)
        return found

    return run_virtual(main())


def test_p03_one_failure_is_dead_and_three_successes_are_alive() -> None:
    made = probe(Scripted(0.01, DEAD, 0.01, 0.01, DEAD, 0.01, 0.01, 0.01))
    assert verdicts(made, 8) == [False, True, True, True, True, True, True, False]
    assert made.marker.failures == 0


def test_thresholds() -> None:
    made = probe(Scripted(DEAD, DEAD, 0.0, DEAD, DEAD, DEAD, 0.0, 0.0), fall=3, rise=2)
    assert verdicts(made, 8) == [False] * 5 + [True] * 2 + [False]


def test_one_that_works_now_and_then_does_not_move_the_traffic_to_and_fro() -> None:
    changes = []
    for seed in range(20):
        source = random.Random(seed)
        script = [0.01 if source.random() < 0.1 else DEAD for _ in range(60)]
        found = verdicts(probe(Scripted(*script)), 60)
        changes.append(sum(before != after for before, after in zip([False, *found], found, strict=False)))
    assert sum(count > 2 for count in changes) <= 2
    assert max(changes) <= 3


def test_one_that_dies_again_soon_must_show_more_the_next_time() -> None:
    lives: list[float | Exception | None] = [0.0] * 30
    made = probe(Scripted(DEAD, 0.0, 0.0, DEAD, 0.0, 0.0, 0.0, 0.0, *lives, DEAD, 0.0, 0.0), rise=2)
    assert verdicts(made, 8) == [True, True, False, True, True, True, True, False]
    assert verdicts(made, 33)[30:] == [True, True, False]


def test_a_verdict_outlasts_the_fail_timeout_and_a_success_forgives() -> None:
    made = probe(Scripted(DEAD, None, None, None), Marker(1, 10.0), rise=1)
    assert verdicts(made, 1) == [True]
    assert made.marker.failed(1e9)
    assert verdicts(made, 1) == [False]
    made.marker.mark(0.0)
    assert verdicts(made, 1) == [False]
    assert made.marker.failures == 0


def test_latency_follows_and_is_forgotten_with_the_dead() -> None:
    latency = Latency(probed=True)
    made = probe(Scripted(0.03, 0.06, DEAD), latency=latency)
    verdicts(made, 2)
    assert latency.value == pytest.approx(0.04)
    verdicts(made, 1)
    assert latency.value is None


def test_the_first_is_at_once_then_every_interval_and_faster_while_in_doubt() -> None:
    check = Scripted(0.0, 0.0, DEAD, DEAD, 0.0, 0.0, 0.0)
    made = probe(check, interval=30.0, rise=2)

    async def main() -> None:
        scope = Scope("probes")
        begun = asyncio.get_running_loop().time()
        scope.start(made.run())
        await asyncio.sleep(160)
        await scope.cancel()
        check.at = [at - begun for at in check.at]

    run_virtual(main())
    # Dead at 60, alive once at 120, which is in doubt: the next one follows after a tenth of the interval.
    assert check.at == pytest.approx([0, 30, 60, 90, 120, 123, 153])


def test_the_interval_varies_a_little_and_has_bounds() -> None:
    made = Probe("a", Scripted(), Marker(), interval=20.0)
    pauses = [made.pause() for _ in range(100)]
    assert all(19.0 <= pause <= 21.0 for pause in pauses)
    assert len(set(pauses)) > 50
    assert Probe("a", Scripted(), Marker(), interval=1e-9).interval == 0.1
    assert (Probe("a", Scripted(), Marker()).interval, Probe("a", Scripted(), Marker()).timeout) == (30.0, 10.0)


def test_a_check_that_hangs_has_failed_after_the_timeout_and_was_cancelled() -> None:
    class Hangs:
        cancelled = False

        async def run(self) -> float | None:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.cancelled = True
                raise
            return None

    check = Hangs()
    made = probe(check, timeout=2.0)
    assert verdicts(made, 1) == [True]
    assert check.cancelled


def test_a_fault_in_a_check_is_a_failure_and_the_probe_goes_on() -> None:
    made = probe(Scripted(ValueError("odd"), 0.0), rise=1)
    assert verdicts(made, 2) == [True, False]


def test_the_log_says_what_happened() -> None:
    written = os.memfd_create("log")
    try:
        sink = Sink(written)
        made = probe(Scripted(0.0123, DEAD, 0.0, 0.0), log=Logger(sink, DEBUG), rise=2)
        verdicts(made, 4)
        sink.close()
        lines = [json.loads(line) for line in os.pread(written, 65536, 0).splitlines()]
    finally:
        os.close(written)
    assert [(line["level"], line["msg"]) for line in lines] == [
        ("debug", "probe node a: ok in 12.3ms"),
        ("debug", "probe node a: refused"),
        ("warn", "node a is dead: refused"),
        ("debug", "probe node a: ok in 0.0ms"),
        ("debug", "probe node a: ok in 0.0ms"),
        ("info", "node a is alive again in 0.0ms"),
    ]


# ---- what is checked -----------------------------------------------------------------------------
class Answering(Label):
    """A stream that answers with given pieces, and keeps what was sent."""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__(())
        self.pieces = list(pieces)
        self.sent = b""

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    async def send(self, data: Buffer) -> None:
        self.sent += bytes(data)


class Gives:
    """A way out that gives one stream, or raises."""

    def __init__(self, stream: Stream | Exception) -> None:
        self.stream = stream
        self.asked: list[Endpoint] = []

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        self.asked.append(target)
        if isinstance(self.stream, Exception):
            raise self.stream
        return self.stream


def exchanged(stream: Answering, **options: object) -> None:
    exchange = HTTPExchange.of("web.test", **options)  # type: ignore[arg-type]

    async def main() -> None:
        await EgressCheck(Gives(stream), lambda: TARGET, exchange).run()  # type: ignore[arg-type]

    run(main())


def test_p02_http_asks_for_the_path_with_its_headers_and_expects_200() -> None:
    stream = Answering(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 20", b"0 OK\r\nContent-Length: 5\r\n\r\nhel")
    exchanged(stream, path="/health?x=1", fields={"X-Token": "t", "connection": "keep-alive"})
    assert stream.sent == (
        b"GET /health?x=1 HTTP/1.1\r\nHost: web.test\r\nX-Token: t\r\nconnection: keep-alive\r\n\r\n"
    )
    assert stream.aborted


def test_p06_another_status_is_a_failure() -> None:
    with pytest.raises(ProtocolError, match="status 500 instead of 200"):
        exchanged(Answering(b"HTTP/1.1 500 Oops\r\n\r\n"))
    exchanged(Answering(b"HTTP/1.1 204 None\r\n\r\n"), expected=204)


@pytest.mark.parametrize("pieces", [(), (b"HTTP/1.1 20",), (b"SSH-2.0-x\r\n",)])
def test_p06_no_answer_is_a_failure(pieces: tuple[bytes, ...]) -> None:
    stream = Answering(*pieces)
    with pytest.raises(ProtocolError):
        exchanged(stream)
    assert stream.aborted


def test_p01_the_node_is_asked_for_the_probes_address() -> None:
    asked: list[object] = []

    def fail(step: str, target: Endpoint | None) -> UpstreamRejected | None:
        asked.append((step, target))
        return UpstreamRejected("no way", 4) if step == "connect" else None

    async def main() -> None:
        direct = Direct()
        item = node("a", 1, fail=fail)
        with pytest.raises(UpstreamRejected):
            await NodeCheck(item, direct, TARGET).run()
        assert asked == [("handshake", None), ("connect", TARGET)]
        assert direct.streams[0].aborted
        assert item.marker.failures == 0  # what real flows have found is left alone

    run(main())


def test_a_node_check_measures_the_way_to_the_node_only() -> None:
    class Lagging:
        async def handshake(self, flow: Flow, below: Stream) -> Stream:
            await asyncio.sleep(0.2)
            return below

        async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
            await asyncio.sleep(0.7)
            return below

    async def main() -> None:
        item = node("a", 1, latency=Latency())
        item.connector = Lagging()  # type: ignore[assignment]
        assert await NodeCheck(item, Direct(), TARGET).run() == pytest.approx(0.2)
        assert item.latency is not None
        assert item.latency.value is None

    run_virtual(main())


def test_p05_a_node_called_by_name_is_looked_up_as_real_flows_do() -> None:
    class Names:
        def lookup(self, host: str, family: int = 0) -> list[str]:
            return ["198.51.100.7"]

    async def main() -> None:
        direct = Direct()
        item = node("a", 1, hosts=Names())
        item.address = Endpoint("proxy.test", 1)
        await NodeCheck(item, direct, TARGET).run()
        assert direct.asked == ["198.51.100.7:1"]

    run(main())


def test_a_node_of_a_later_hop_is_reached_through_the_hops_before_it() -> None:
    async def main() -> None:
        direct = Direct()
        first, second = node("a", 1), node("b", 2)
        chain = Chain("c", [Hop("h", [first]), Hop("i", [second])], direct)
        await NodeCheck(second, chain.way_to(1), TARGET).run()
        assert direct.asked == ["192.0.2.1:1"]
        assert chain.way_to(0) is direct
        first.marker.mark(0.0)
        chain.hops = [Hop("h", []), chain.hops[1]]
        with pytest.raises(NoRoute, match="chain c"):
            await NodeCheck(second, chain.way_to(1), TARGET).run()

    run(main())


def test_g09_the_probe_of_a_chain_takes_it_out_of_its_group_and_back_in() -> None:
    direct = Direct(dead=("192.0.2.1:1",))
    chains = [Chain(name, [Hop(name, [node(name, port)])], direct) for name, port in (("a", 1), ("b", 2))]
    group = ChainGroup([ChainEntry(chain) for chain in chains], Selector(Fifo()))
    made = probe(EgressCheck(ServiceRouter(direct, chains[0]), lambda: TARGET), chains[0].marker, rise=2)

    async def main() -> None:
        def first() -> int:
            route = group.route(Flow(), TARGET, asyncio.get_running_loop().time())
            assert route is not None
            return route.stages[0].node.address.port  # type: ignore[union-attr]

        assert first() == 1
        await made.once()
        await asyncio.sleep(3600)
        assert first() == 2
        direct.dead = ()
        await made.once()
        assert first() == 2
        await made.once()
        assert first() == 1

    run_virtual(main())


def test_the_probe_of_a_hop_takes_one_of_its_targets() -> None:
    async def main() -> None:
        hop = Hop("h", [node("a", 1), node("b", 2)], Selector(Fifo()))
        choose = target_of(hop)
        assert choose() == Endpoint("192.0.2.1", 1)
        hop.nodes[0].marker.down = True
        assert choose() == Endpoint("192.0.2.1", 2)
        with pytest.raises(NoRoute, match="hop empty has no target"):
            target_of(Hop("empty", []))()

    run(main())


# ---- commands ------------------------------------------------------------------------------------
def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children() -> set[str]:
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set((task / "children").read_text().split())
    return found


def test_commands_pass_by_their_status() -> None:
    async def main() -> None:
        assert await CommandCheck("exit 0").run() is None
        with pytest.raises(DialError, match="the command ended with 3"):
            await CommandCheck("exit 3").run()
        with pytest.raises(DialError, match="killed by signal 9"):
            await CommandCheck("kill -9 $$").run()

    before = children()
    run(main())
    assert children() == before


def test_p07_a_command_that_takes_too_long_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    command = f"sleep 600 & echo $! >>{note}; (sleep 600 & echo $! >>{note}); echo $$ >>{note}; wait"

    async def main() -> None:
        made = probe(CommandCheck(command), timeout=0.3)
        began = time.monotonic()
        await made.once()
        assert made.marker.down
        assert time.monotonic() - began < 2.0

    before = children()
    run(main())
    pids = [int(line) for line in note.read_text().split()]
    assert len(pids) == 3
    deadline = time.monotonic() + 2
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        os.sched_yield()
    assert not any(alive(pid) for pid in pids)
    assert children() == before


def test_a_command_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    os.mkfifo(note)
    pids: list[int] = []

    async def main() -> None:
        scope = Scope("probes")
        scope.start(probe(CommandCheck(f"echo $$ >{note}; sleep 600")).run())
        pids.append(int(await in_thread(note.read_text)))
        await scope.cancel()

    before, descriptors = children(), len(os.listdir("/proc/self/fd"))
    run(main())
    assert not alive(pids[0])
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
