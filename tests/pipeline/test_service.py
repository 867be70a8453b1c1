"""Services: accepting, refusing, failing, draining. Names of tests carry the ids of docs/compatibility.md."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.contracts import Policies
from gostnet.core.egress import Egress
from gostnet.core.flow import Flow
from gostnet.core.log import LEVELS, Logger, NullSink
from gostnet.core.sockets import SocketStream, connect_tcp
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope, run
from gostnet.pipeline.service import Service, State
from gostnet.pipeline.transport import AcceptError, Listener, Source
from gostnet.policies.limits import RateLimits
from gostnet.policies.quota import Quota, Terms
from gostnet.policies.stats import ServiceBooks
from gostnet.transports.tcp import TcpOptions, TcpSource

from .kit import Direct


class Echo:
    """Answers each chunk; fails on command."""

    accepts = (Stream,)

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        while data := await conn.receive():
            if data == b"crash":
                raise ZeroDivisionError("a fault of ours")
            await conn.send(data)


class Limit:
    """At most `most` connections."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    def acquire(self, client: Endpoint) -> Limit | None:
        if self.held >= self.most:
            return None
        self.held += 1
        return self

    def release(self) -> None:
        self.held -= 1


class Nobody:
    def admits(self, client: Endpoint) -> bool:
        return False


async def started(policies: Policies | None = None, layers: Sequence[Any] = ()) -> tuple[Service, Scope]:
    source = TcpSource(Endpoint("127.0.0.1", 0), TcpOptions())
    service = Service("test", Listener("tcp", source, layers), Echo(), Direct(), policies)
    await service.open()
    scope = Scope("service")
    scope.start(service.serve())
    return service, scope


async def stop(service: Service, scope: Scope) -> None:
    await service.aclose()
    await scope.cancel()
    await service.drain(1)
    assert not service.flows


async def client(service: Service) -> SocketStream:
    address = service.listener.source.address
    return await connect_tcp(address.host, address.port)


async def ask(stream: SocketStream, data: bytes) -> bytes:
    await stream.send(data)
    return await stream.receive()


def test_connections_are_served_and_a_fault_takes_only_its_own() -> None:
    async def main() -> None:
        service, scope = await started()
        first, second = await client(service), await client(service)
        assert await ask(first, b"one") == b"one"
        assert await ask(second, b"two") == b"two"
        assert await ask(first, b"crash") == b""
        assert await ask(second, b"three") == b"three"
        assert service.state is State.READY
        for stream in (first, second):
            stream.abort()
        await stop(service, scope)
        assert service.state is State.CLOSED

    run(main())


def test_s14_over_the_limit_is_refused_and_the_service_lives_on() -> None:
    async def main() -> None:
        limit = Limit(1)
        service, scope = await started(Policies(connections=limit))
        first = await client(service)
        assert await ask(first, b"in") == b"in"
        for _ in range(3):
            refused = await client(service)
            assert await refused.receive() == b""
            refused.abort()
        first.abort()
        while limit.held:  # noqa: ASYNC110 - the slot tells nobody
            await asyncio.sleep(0)
        again = await client(service)
        assert await ask(again, b"again") == b"again"
        again.abort()
        await stop(service, scope)
        assert limit.held == 0

    run(main())


def test_k07_requests_over_the_rate_are_closed_without_a_byte_and_hold_no_slot() -> None:
    async def main() -> None:
        now = [0.0]
        rates = RateLimits.from_lines(["$$ 3"], clock=lambda: now[0])
        limit = Limit(100)
        service, scope = await started(Policies(connections=limit, requests=rates))
        streams = [await client(service) for _ in range(8)]
        for stream in streams[:4]:
            assert await ask(stream, b"served") == b"served"
        for stream in streams[4:]:
            assert await stream.receive() == b""
        assert (len(service.flows), limit.held, service.total) == (4, 4, 8)
        now[0] += 1 / 3
        late = await client(service)
        assert await ask(late, b"served") == b"served"
        for stream in (*streams, late):
            stream.abort()
        await stop(service, scope)
        assert limit.held == 0

    run(main())


def test_k07_who_speaks_for_a_client_decides_whose_rate_it_is() -> None:
    class Preface:
        """Every connection comes from the next host, as a PROXY header may say."""

        hosts = iter(("192.0.2.1", "192.0.2.2", "192.0.2.1"))

        async def server(self, flow: Flow, below: Stream) -> Stream:
            flow.client = Endpoint(next(self.hosts), 1)
            return below

        async def client(self, flow: Flow, below: Stream, name: str) -> Stream:
            return below

    async def main() -> None:
        rates = RateLimits.from_lines(["192.0.2.0/24 0.1"], clock=lambda: 0.0)
        service, scope = await started(Policies(requests=rates))
        service.listener.preface = Preface()
        first, second, third = await client(service), await client(service), await client(service)
        assert await ask(first, b"one") == b"one"
        assert await ask(second, b"two") == b"two"
        assert await third.receive() == b""
        for stream in (first, second, third):
            stream.abort()
        await stop(service, scope)

    run(main())


def test_a_client_that_is_not_admitted_gets_nothing() -> None:
    async def main() -> None:
        service, scope = await started(Policies(admissions=(Nobody(),)))
        refused = await client(service)
        assert await refused.receive() == b""
        refused.abort()
        await stop(service, scope)

    run(main())


def test_a_layer_that_never_finishes_ends_with_the_handshake_deadline() -> None:
    class Stuck:
        async def server(self, flow: Flow, below: Stream) -> Stream:
            await below.receive()
            raise AssertionError("nothing comes")

        async def client(self, flow: Flow, below: Stream, name: str) -> Stream:
            return below

    async def main() -> None:
        service, scope = await started(layers=(Stuck(),))
        service.HANDSHAKE = 0.05  # type: ignore[misc]
        silent = await client(service)
        assert await silent.receive() == b""
        silent.abort()
        await stop(service, scope)

    run(main())


def test_s12_accepting_fails_for_a_while_then_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flaky(Source[Any]):
        def __init__(self, below: TcpSource) -> None:
            self.below = below
            self.failures = 2

        async def open(self) -> None:
            await self.below.open()
            self.address = self.below.address

        async def accept(self) -> Sequence[tuple[Flow, Any]]:
            if self.failures:
                self.failures -= 1
                raise AcceptError("too many open files")
            return await self.below.accept()

        async def aclose(self) -> None:
            await self.below.aclose()

        def abort(self) -> None:
            self.below.abort()

    async def main() -> None:
        monkeypatch.setattr(Service, "BACKOFF", (0.01, 0.02))
        source = Flaky(TcpSource(Endpoint("127.0.0.1", 0), TcpOptions()))
        service = Service("test", Listener("tcp", source), Echo(), Direct())
        await service.open()
        scope = Scope("service")
        scope.start(service.serve())
        stream = await client(service)
        assert await ask(stream, b"late") == b"late"
        states = [event for _, event in service.events if "failed" in event]
        assert len(states) == 2
        assert service.state is State.READY
        assert service.last_error is None
        stream.abort()
        await stop(service, scope)

    run(main())


def test_what_connections_need_of_a_listener_stays_until_the_drain_ends_which_may_be_hastened() -> None:
    class Device(TcpSource):
        closed = 0

        async def retire(self) -> None:
            assert not self.closed

        def abort(self) -> None:
            self.closed += 1
            super().abort()

    async def main() -> None:
        source = Device(Endpoint("127.0.0.1", 0), TcpOptions())
        service = Service("test", Listener("tcp", source), Echo(), Direct())
        await service.open()
        scope = Scope("service")
        scope.start(service.serve())
        stream = await client(service)
        assert await ask(stream, b"a") == b"a"
        await scope.cancel()
        await service.retire()
        draining = Scope("drain")
        draining.start(service.drain(60))
        assert await ask(stream, b"still") == b"still"
        assert source.closed == 0
        await service.hasten()
        await draining.drain(5)
        assert len(draining) == 0
        assert await stream.receive() == b""
        assert source.closed == 1
        stream.abort()

    run(main())


def test_s10_draining_lets_a_connection_finish_and_cancels_the_rest() -> None:
    async def main() -> None:
        service, scope = await started()
        polite, rude = await client(service), await client(service)
        assert await ask(polite, b"a") == b"a"
        assert await ask(rude, b"b") == b"b"
        await service.aclose()
        await scope.cancel()
        draining = Scope("drain")
        draining.start(service.drain(0.2))
        assert await ask(polite, b"still") == b"still"
        await polite.send_eof()
        assert await polite.receive() == b""
        assert await rude.receive() == b""
        await draining.drain(5)
        assert not service.flows
        polite.abort()
        rude.abort()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(service.listener.source.address)

    run(main())


class Lasting(Echo):
    """Hands its connections over at a reload."""

    def __init__(self) -> None:
        self.told: list[tuple[object, Egress]] = []

    def hand_over(self, successor: Lasting, egress: Egress) -> None:
        self.told.append((successor, egress))


def test_adopt_lets_a_handler_hand_its_connections_over_and_leaves_others_alone() -> None:
    async def body() -> None:
        service, scope = await started()
        first, second = Lasting(), Lasting()
        for handler in (first, second, Echo()):
            fresh = Service("test", Listener("tcp", service.listener.source), handler, Direct())
            service.adopt(fresh)
            if handler is second:
                assert first.told == [(second, fresh.egress)]
            assert service.handler is handler
        assert not second.told, "a handler of another kind cannot take over"
        await stop(service, scope)

    run(body())


class Letting(Echo):
    """Has something to let go of."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_a_handler_lets_go_when_it_is_replaced_and_when_the_service_ends() -> None:
    async def body() -> None:
        service, scope = await started()
        first, second = Letting(), Letting()
        for handler in (first, second):
            service.adopt(Service("test", Listener("tcp", service.listener.source), handler, Direct()))
        assert (first.closed, second.closed) == (1, 0)
        await stop(service, scope)
        assert (first.closed, second.closed) == (1, 1)

    run(body())


class Associating(Echo):
    """Says yes without a target, as associations of datagrams do, if it is asked to."""

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        flow.connected = await conn.receive() == b"associate"
        await conn.send(b"done")


class Lines(NullSink):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, line: bytes) -> None:
        self.written.append(line)


def test_an_association_is_recorded_and_a_look_is_not() -> None:
    async def body() -> None:
        service, scope = await started()
        lines = Lines()
        log = Logger(lines, LEVELS["info"])
        service.adopt(Service("test", Listener("tcp", service.listener.source), Associating(), Direct(), log=log))
        for question in (b"look", b"associate"):
            stream = await client(service)
            assert await ask(stream, question) == b"done"
            assert await stream.receive() == b""
            stream.abort()
        await stop(service, scope)
        assert len([line for line in lines.written if b">-<" in line]) == 1

    run(body())


def test_the_status_is_what_gosts_api_shows() -> None:
    async def body() -> None:
        quota = Quota("q", Terms(10))
        books = ServiceBooks("test", quotas=[quota], shown=True)
        service, scope = await started(Policies(quotas=(quota,), books=books))
        stream = await client(service)
        assert await ask(stream, b"01234") == b"01234"
        status = service.status()
        assert [event["msg"].split(" is ")[1].split(" on ")[0] for event in status["events"]] == [  # type: ignore[attr-defined]
            "running",
            "listening",
            "ready",
        ]
        assert (status["state"], status["stoppedByLimit"]) == ("ready", True)
        assert status["stats"] == {
            "totalConns": 1,
            "currentConns": 1,
            "inputBytes": 5,
            "outputBytes": 5,
            "totalErrs": 0,
        }
        shown = {"name": "q", "used": 10, "limit": 10, "active": True, "blocked": True, "direction": "total"}
        assert status["quotas"] == [shown]
        assert await stream.receive() == b""  # what a quota does not allow any more is cut
        stream.abort()
        await stop(service, scope)
        assert "stats" not in ServiceBooks("test").status()

    run(body())
