"""The books of a service: counters, what observers are told of them, quotas that cut."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.errors import (
    BypassDenied,
    ConnError,
    DialRefused,
    EndOfStream,
    IdleTimeout,
    ProtocolError,
    QuotaDenied,
    RateDenied,
)
from gostnet.core.flow import Flow
from gostnet.core.sockets import SocketStream
from gostnet.core.tasks import Scope, run
from gostnet.policies.build import FINISH, Build
from gostnet.policies.observer import Events, Reporter
from gostnet.policies.post import PostError
from gostnet.policies.quota import Quota, Terms
from gostnet.policies.recorders import CLIENT, Record, Recorder, Records, Use
from gostnet.policies.stats import Reading, ServiceBooks, Stats, is_fault


class Told:
    """An observer that remembers, or fails."""

    name = "told"

    def __init__(self) -> None:
        self.batches: list[Events] = []
        self.failing = False
        self.came = asyncio.Event()

    def submit(self, events: Events) -> asyncio.Future[None]:
        self.came.set()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.failing:
            future.set_exception(PostError("told: no"))
        else:
            self.batches.append(events)
            future.set_result(None)
        return future

    async def until(self, count: int) -> None:
        while len(self.batches) < count:
            self.came.clear()
            await self.came.wait()


def begun(books: ServiceBooks, user: str = "") -> tuple[Flow, Any]:
    flow = Flow("s", Endpoint("192.0.2.1", 5), ANY)
    entry = books.enter(flow, object())
    flow.user = user
    return flow, entry


def test_e02_e03_a_client_counts_what_is_relayed_and_deltas_where_asked() -> None:
    books = ServiceBooks("s", by_client=True)
    service, clients = Reading(reset=True), Reading(reset=True)
    flow, entry = begun(books, "u1")
    flow.connected = True
    flow.meter.up, flow.meter.down = 5, 15
    one = {"totalConns": 1, "currentConns": 1, "inputBytes": 5, "outputBytes": 15, "totalErrs": 0}
    assert books.service_events(service) == [{"kind": "service", "service": "s", "type": "stats", "stats": one}]
    assert books.client_events(clients) == [
        {"kind": "handler", "service": "s", "client": "u1", "type": "stats", "stats": one}
    ]
    flow.meter.up, flow.meter.down = 10, 20
    entry.leave()
    then = {**one, "currentConns": 0, "inputBytes": 5, "outputBytes": 5}
    assert books.service_events(service)[0]["stats"] == then
    assert books.client_events(clients)[0]["stats"] == then
    assert books.stats.snapshot()["inputBytes"] == 10, "a reader with resets disturbs nobody else"


def test_e04_nothing_is_told_when_nothing_happens() -> None:
    books = ServiceBooks("s", by_client=True)
    reading = Reading()
    assert books.service_events(reading) == []
    begun(books)
    assert len(books.service_events(reading)) == 1
    assert books.service_events(reading) == []
    assert books.client_events(Reading()) == [], "a client that was not served yet has no id"


def test_e05_e06_what_counts_as_an_error() -> None:
    books = ServiceBooks("s")
    faults = (DialRefused("no"), ConnError("reset"), ProtocolError("odd"), ZeroDivisionError())
    for error in faults:
        flow, entry = begun(books)
        flow.error = error
        entry.leave()
    ends = (None, RateDenied(), BypassDenied(""), EndOfStream(""), IdleTimeout(""), TimeoutError())
    for end in ends:
        assert not is_fault(end)
    flow, entry = begun(books)
    flow.error = RateDenied()
    entry.leave(refused=True)
    assert books.stats == Stats(total=5, current=0, errors=4)


def test_the_wire_counts_for_the_service_unless_payload_passes_beside_it() -> None:
    async def main() -> None:
        near, far = socket.socketpair()
        near.setblocking(False)
        stream = SocketStream(near)
        books = ServiceBooks("s")
        flow = Flow("s")
        entry = books.enter(flow, stream)
        stream.received, stream.sent = 31, 19
        flow.meter.up, flow.meter.down = 5, 5
        books.settle()
        assert (books.stats.received, books.stats.sent) == (31, 19)
        flow.meter.up = 5000  # UDP of a SOCKS client
        entry.leave()
        assert (books.stats.received, books.stats.sent) == (5000, 19)
        stream.abort()
        far.close()

    run(main())


def test_counts_go_on_in_the_next_configuration() -> None:
    old = ServiceBooks("s", by_client=True)
    flow, entry = begun(old, "u")
    flow.connected = True
    new = ServiceBooks("s", by_client=True, before=old)
    flow.meter.up = 5
    new.settle()
    assert new.stats == Stats(total=1, current=1, received=5)
    entry.leave()
    assert new.stats.current == 0
    assert new.clients == {"u": Stats(total=1, current=0, received=5)}


# ---- quotas --------------------------------------------------------------------------------------
def test_q05_a_quota_that_is_used_up_ends_what_runs() -> None:
    quota = Quota("q", Terms(100))
    books = ServiceBooks("s", quotas=(quota,))
    ended: list[str] = []
    talker, first = begun(books)
    idler, second = begun(books)
    first.running(lambda: ended.append("talker"))
    second.running(lambda: ended.append("idler"))
    talker.meter.up = 99
    books.settle()
    assert (quota.used, ended) == (99, [])
    talker.meter.down = 1
    books.settle()
    assert (quota.used, ended) == (100, ["talker", "idler"])
    assert isinstance(idler.error, QuotaDenied)
    books.settle()
    assert len(ended) == 2
    first.leave()
    second.leave()
    assert (quota.used, books.stats.errors) == (100, 0)


def test_two_services_share_a_quota() -> None:
    quota = Quota("q", Terms(100))
    one, two = ServiceBooks("one", quotas=(quota,)), ServiceBooks("two", quotas=(quota,))
    for books in (one, two):
        flow, entry = begun(books)
        flow.meter.up = 30
        entry.leave()
    assert quota.used == 60


# ---- observers -----------------------------------------------------------------------------------
async def running(reporter: Reporter) -> Scope:
    scope = Scope("reporter")
    scope.start(reporter.run())
    await asyncio.sleep(0)
    return scope


def test_e01_changes_of_state_are_told_at_once_and_in_order() -> None:
    async def main() -> None:
        told = Told()
        reporter = Reporter(told, states=True)
        books = ServiceBooks("s", reporters=[reporter])
        books.become("running", "service s is running")
        books.become("ready", "service s is ready")
        scope = await running(reporter)
        await told.until(2)
        assert told.batches[0] == [
            {
                "kind": "service",
                "service": "s",
                "type": "status",
                "status": {"state": "running", "msg": "service s is running"},
            }
        ]
        assert told.batches[1][0]["status"]["state"] == "ready"
        await scope.cancel()
        books.become("closed", "service s is closed")
        await reporter.finish()
        assert told.batches[-1][0]["status"]["state"] == "closed"

    run(main())


def test_a_report_that_fails_is_sent_again_before_anything_newer() -> None:
    async def main() -> None:
        complaints: list[str] = []
        told = Told()
        reporter = Reporter(told, report=complaints.append)
        reporter.period = 0.01
        batches = iter(([{"n": 1}], [{"n": 2}], [{"n": 3}]))
        reporter.collect = lambda: next(batches, [])
        told.failing = True
        scope = await running(reporter)
        for _ in range(3):
            told.came.clear()
            await told.came.wait()
        assert complaints == ["observer told: told: no"]
        told.failing = False
        await told.until(3)
        assert told.batches == [[{"n": 1}], [{"n": 2}], [{"n": 3}]]
        await scope.cancel()

    run(main())


def test_what_is_under_way_at_the_end_is_not_sent_twice() -> None:
    class Slow(Told):
        def submit(self, events: Events) -> asyncio.Future[None]:
            self.batches.append(events)
            self.came.set()
            self.flight: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            return self.flight

    async def main() -> None:
        told = Slow()
        reporter = Reporter(told, states=True)
        reporter.status("s", "ready", "")
        scope = await running(reporter)
        await told.came.wait()
        await scope.cancel()
        reporter.status("s", "closed", "")
        end = Scope("end")
        task = end.start(reporter.finish())
        await asyncio.sleep(0)
        told.came.clear()
        told.flight.set_result(None)
        await told.came.wait()
        told.flight.set_result(None)
        await task
        assert [batch[0]["status"]["state"] for batch in told.batches] == ["ready", "closed"]

    run(main())


@pytest.mark.parametrize(("given", "holds"), [(0.2, 1.0), (0.0, 5.0), (-1.0, 5.0), (7.0, 7.0)])
def test_e07_the_period_has_a_bound(given: float, holds: float) -> None:
    assert Reporter(Told(), period=given).period == holds


def test_e08_an_observer_that_hangs_holds_nobody_up() -> None:
    class Hanging(Told):
        def submit(self, events: Events) -> asyncio.Future[None]:
            self.came.set()
            return asyncio.get_running_loop().create_future()

    async def main() -> None:
        told = Hanging()
        reporter = Reporter(told, states=True)
        books = ServiceBooks("s", reporters=[reporter])
        scope = await running(reporter)
        for number in range(1000):
            books.become("ready", f"{number}")
        await told.came.wait()
        assert len(reporter._waiting) <= 64
        build = Build(reporters=[reporter])
        await scope.cancel()
        begun = asyncio.get_running_loop().time()
        await build.aclose()
        assert asyncio.get_running_loop().time() - begun < FINISH + 1

    run(main())


def test_a_client_is_recorded_when_it_is_known() -> None:
    class Kept:
        data: list[bytes]

        def write(self, records: Sequence[Record]) -> None:
            self.data += [item.data for item in records]

        def close(self) -> None:
            pass

    for prefaced in (False, True):
        sink = Kept()
        sink.data = []
        recorder = Recorder("r", sink)
        books = ServiceBooks("s", records=Records("s", {CLIENT: Use(recorder, {})}), prefaced=prefaced)
        flow, entry = begun(books)
        if prefaced:
            flow.client = Endpoint("203.0.113.9", 1)
            books.announced(flow)
        entry.leave()
        recorder.close()
        assert sink.data == [b"203.0.113.9" if prefaced else b"192.0.2.1"]
