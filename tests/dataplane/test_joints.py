"""UDP flows from a listener to their targets: through the native library, and without it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.batches import SOL_UDP, UDP_SEGMENT
from gostnet.core.datagrams import Datagram
from gostnet.core.errors import DialRefused, GostnetError
from gostnet.core.flow import Flow, Shapers
from gostnet.core.tasks import Scope, run
from gostnet.core.udp_socket import UdpSocket, listen_udp, open_udp
from gostnet.dataplane.native import joints, library
from gostnet.dataplane.pump import pump
from gostnet.transports.udp import UdpOptions, UdpSource

from .kit import until

LOCAL = Endpoint("127.0.0.1", 0)
SIZES = [0, 1, 1200, 1200, 1200, 300, 0, 1200, 1200, 9000, 9000, 65507, 7, 7, 7, 7, 1, 0, 1472, 1473]


@pytest.fixture(params=["native", "plain"], autouse=True)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "plain":
        monkeypatch.setattr(joints, "load", lambda: (None, "switched off by a test"))
        return False
    if library.load()[0] is None:
        pytest.skip(library.load()[1])
    return True


class Place:
    """A listener that passes everything on to a target, and what became of its flows."""

    def __init__(self, source: UdpSource, target: Endpoint) -> None:
        self.source = source
        self.target = target
        self.scope = Scope("test")
        self._flows: list[Flow] = []
        self.shapers: Callable[[], Shapers | None] = lambda: None
        self.idle = 0.0

    @property
    def address(self) -> Endpoint:
        return self.source.address

    @property
    def sessions(self) -> Any:
        return self.source._sessions

    @property
    def flows(self) -> list[Flow]:
        """The flows, with the counts of this moment."""
        if self.sessions is not None:
            self.sessions.collect()
        return self._flows

    async def serve(self) -> None:
        while True:
            for flow, session in await self.source.accept():
                self._flows.append(flow)
                self.scope.launch(self.pass_on(flow, session))

    async def pass_on(self, flow: Flow, session: Any) -> None:
        flow.shapers = self.shapers()
        upstream = open_udp(self.target)
        try:
            await pump(flow, session, upstream, self.idle)
        except GostnetError as exc:
            flow.error = exc
        finally:
            flow.reason = "ended"
            upstream.abort()
            session.abort()


@asynccontextmanager
async def listening(target: Endpoint, at: Endpoint = LOCAL, **options: Any) -> AsyncIterator[Place]:
    source = UdpSource(at, UdpOptions(**{"keepalive": True, **options}))
    await source.open()
    place = Place(source, target)
    place.scope.start(place.serve())
    try:
        yield place
    finally:
        await place.scope.cancel()
        source.abort()


class Echo:
    """A server that sends everything back."""

    def __init__(self, at: Endpoint = LOCAL) -> None:
        self.socket = UdpSocket(sock := listen_udp(at), Endpoint.from_sockaddr(sock.getsockname()))
        self.address = self.socket.local
        self.peers: set[Endpoint] = set()
        self.scope = Scope("echo")
        self.scope.start(self.run())

    async def run(self) -> None:
        while batch := await self.socket.receive():
            self.peers |= {datagram.peer for datagram in batch}
            await self.socket.send(batch)

    async def close(self) -> None:
        await self.scope.cancel()
        self.socket.abort()


async def gathered(client: UdpSocket, count: int) -> list[bytes]:
    found: list[bytes] = []
    async with asyncio.timeout(5):
        while len(found) < count:
            found += [bytes(datagram.data) for datagram in await client.receive()]
    return found


def payloads(sizes: list[int]) -> list[bytes]:
    return [bytes([index % 251]) * size for index, size in enumerate(sizes)]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
def test_bytes_boundaries_order_and_counts_are_exact(host: str, native: bool) -> None:
    async def main() -> None:
        echo = Echo(Endpoint("::1" if host == "::1" else "127.0.0.1", 0))
        async with listening(echo.address, Endpoint(host, 0)) as place:
            client = open_udp(Endpoint("127.0.0.1" if host == "::" else host, place.address.port))
            await client.send([Datagram(b"first", place.address)])
            assert await gathered(client, 1) == [b"first"]
            sent = payloads(SIZES)
            await client.send([Datagram(data, place.address) for data in sent])
            assert await gathered(client, len(sent)) == sent
            (flow,) = place.flows
            size = 5 + sum(SIZES)
            assert (flow.meter.up, flow.meter.down) == (size, size)
            assert flow.packets == 2 * (1 + len(SIZES))
            assert (place.sessions.joints is not None and len(place.sessions.joints) == 1) == native
            assert place.sessions.dropped == 0
            client.abort()
        await echo.close()

    run(main())


def test_a_train_that_the_kernel_has_joined_is_its_datagrams_again() -> None:
    """On loopback a train arrives as it was sent, at a socket that takes trains (UDP_GRO)."""

    async def main() -> None:
        echo = Echo()
        async with listening(echo.address) as place:
            client = open_udp(place.address)
            cut = [(SOL_UDP, UDP_SEGMENT, (1000).to_bytes(2, "little"))]
            for _ in range(3):  # the first opens the session, the others find it joined
                data = bytes(range(250)) * 22 + b"end"
                client.sock.sendmsg([data], cut)
                expected = [data[start : start + 1000] for start in range(0, len(data), 1000)]
                assert await gathered(client, len(expected)) == expected
            assert place.flows[0].packets == 6 * 6
            assert place.flows[0].meter.up == place.flows[0].meter.down == 3 * 5503
            client.abort()
        await echo.close()

    run(main())


def test_every_peer_gets_its_own_answers() -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(echo.address) as place:
            clients = [open_udp(place.address) for _ in range(100)]
            for turn in range(4):
                for number, client in enumerate(clients):
                    batch = [Datagram(f"{number} {turn} {index}".encode(), place.address) for index in range(5)]
                    await client.send(batch)
                for number, client in enumerate(clients):
                    expected = [f"{number} {turn} {index}".encode() for index in range(5)]
                    assert await gathered(client, 5) == expected
            assert len(place.flows) == len(place.sessions) == len(echo.peers) == 100
            assert all(flow.packets == 40 for flow in place.flows)
            for client in clients:
                client.abort()
        await echo.close()

    run(main())


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_answers_leave_from_the_address_that_was_asked(host: str) -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(echo.address, Endpoint(host, 0)) as place:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.bind(("127.0.0.1", 0))
                client.setblocking(False)
                udp = UdpSocket(client)
                for asked in ("127.0.0.1", "127.0.0.2", "127.77.0.3", "127.0.0.2"):
                    where = Endpoint(asked, place.address.port)
                    for _ in range(2):
                        await udp.send([Datagram(b"x", where)])
                        async with asyncio.timeout(5):
                            (answer,) = await udp.receive()
                        assert answer.peer == where
                udp.abort()
            assert [flow.ingress.host for flow in place.flows] == ["127.0.0.1", "127.0.0.2", "127.77.0.3"]
        await echo.close()

    run(main())


def test_a_target_where_nobody_listens_ends_the_flow() -> None:
    async def main() -> None:
        echo = Echo()
        await echo.close()
        async with listening(echo.address) as place:
            client = open_udp(place.address)
            await client.send([Datagram(b"anybody?", place.address)])
            await until(lambda: bool(place.flows and place.flows[0].reason))
            assert isinstance(place.flows[0].error, DialRefused)
            assert len(place.sessions) == 0
            # The next one tries anew.
            echo = Echo(echo.address)
            await client.send([Datagram(b"now?", place.address)])
            assert await gathered(client, 1) == [b"now?"]
            client.abort()
        await echo.close()

    run(main())


def test_a_server_that_restarts_keeps_its_flows() -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(echo.address) as place:
            client = open_udp(place.address)
            await client.send([Datagram(b"one", place.address)])
            assert await gathered(client, 1) == [b"one"]
            await echo.close()
            for turn in range(1, 4):
                await client.send([Datagram(b"lost", place.address)])
                await until(lambda turn=turn: place.flows[0].meter.up == 3 + 4 * turn)  # type: ignore[misc]
            echo = Echo(echo.address)
            await client.send([Datagram(b"two", place.address)])
            assert await gathered(client, 1) == [b"two"]
            assert len(place.flows) == 1
            client.abort()
        await echo.close()

    run(main())


def test_without_keepalive_one_answer_ends_the_session() -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(echo.address, keepalive=False) as place:
            client = open_udp(place.address)
            for turn in range(3):
                await client.send([Datagram(b"x", place.address)])
                assert await gathered(client, 1) == [b"x"]
                await until(lambda turn=turn: bool(place.flows[turn].reason))  # type: ignore[misc]
            assert [(flow.meter.up, flow.meter.down) for flow in place.flows] == [(1, 1)] * 3
            assert len(place.sessions) == 0
            client.abort()
        await echo.close()

    run(main())


def test_idle_flows_end_and_leave_no_timer() -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(echo.address, ttl=0.6) as place:
            client = open_udp(place.address)
            for _ in range(10):
                await client.send([Datagram(b"x", place.address)])
                await gathered(client, 1)
                await asyncio.sleep(0.03)
            assert len(place.flows) == 1
            await until(lambda: bool(place.flows[0].reason))
            assert len(place.sessions) == 0
            assert place.sessions._timer is None
            assert not place.sessions.joints
            client.abort()
        await echo.close()

    run(main())


def test_the_handlers_idle_time_holds_too() -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(echo.address, ttl=60) as place:
            place.idle = 0.05
            client = open_udp(place.address)
            await client.send([Datagram(b"x", place.address)])
            await gathered(client, 1)
            await until(lambda: bool(place.flows[0].reason))
            assert place.flows[0].error is None
            client.abort()
        await echo.close()

    run(main())


def test_a_full_table_ends_the_flow_that_is_idle_longest() -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(echo.address) as place:
            place.sessions.limit = 3
            clients = [open_udp(place.address) for _ in range(4)]
            for index in (0, 1, 2, 0, 3):
                await clients[index].send([Datagram(b"x", place.address)])
                await gathered(clients[index], 1)
            await until(lambda: bool(place.flows[1].reason))
            assert [flow.reason for flow in place.flows] == ["", "ended", "", ""]
            for client in clients:
                client.abort()
        await echo.close()

    run(main())


def test_a_client_that_floods_does_not_starve_another() -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(echo.address) as place:
            quiet, loud = open_udp(place.address), open_udp(place.address)
            for client in (quiet, loud):
                await client.send([Datagram(b"x", place.address)])
                await gathered(client, 1)
            flooding = True

            async def flood() -> None:
                while flooding:
                    loud.send_now([Datagram(bytes(100), place.address)] * 256)
                    await asyncio.sleep(0)

            place.scope.start(flood())
            for turn in range(20):
                await quiet.send([Datagram(str(turn).encode(), place.address)])
                assert await gathered(quiet, 1) == [str(turn).encode()]
            flooding = False
            for client in (quiet, loud):
                client.abort()
        await echo.close()

    run(main())


class Allowance:
    """A shaper that lets a number of bytes through."""

    def __init__(self, size: int) -> None:
        self.size = size

    def take(self, wanted: int) -> int:
        got = min(wanted, self.size)
        self.size -= got
        return got

    def give_back(self, unused: int) -> None:
        self.size += unused

    def delay(self) -> float:
        return 1.0


def test_limits_hold() -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(echo.address) as place:
            place.shapers = lambda: Shapers([Allowance(250)], [])
            client = open_udp(place.address)
            await client.send([Datagram(bytes([n]) * 100, place.address) for n in range(5)])
            assert await gathered(client, 2) == [bytes(100), b"\1" * 100]
            await client.send([Datagram(b"", place.address)])
            assert await gathered(client, 1) == [b""]
            assert (place.flows[0].meter.up, place.flows[0].meter.down) == (200, 200)
            client.abort()
        await echo.close()

    run(main())


@pytest.mark.parametrize("limited", [True, False])
def test_a_batch_may_be_longer_than_the_queue_of_a_peer(limited: bool) -> None:
    """The queue is for what a flow is not ready for."""

    async def main() -> None:
        echo = Echo()
        async with listening(echo.address, read_queue_size=4) as place:
            if limited:
                place.shapers = lambda: Shapers([Allowance(1 << 30)], [])
            client = open_udp(place.address)
            await client.send([Datagram(b"first", place.address)])
            assert await gathered(client, 1) == [b"first"]
            sent = [bytes([number]) * (1 + number % 2) for number in range(60)]
            await client.send([Datagram(data, place.address) for data in sent])
            assert await gathered(client, len(sent)) == sent
            assert place.sessions.dropped == 0
            client.abort()
        await echo.close()

    run(main())


def test_order_is_kept_while_a_flow_is_joined() -> None:
    """What comes before, during and after the opening of a flow takes three ways to the target."""

    async def main() -> None:
        echo = Echo()
        for _ in range(10):
            async with listening(echo.address, read_queue_size=10_000) as place:
                client = open_udp(place.address)
                sent = [f"{number}".encode() * (1 + number % 3) for number in range(600)]
                for start in range(0, len(sent), 60):
                    await client.send([Datagram(data, place.address) for data in sent[start : start + 60]])
                    await asyncio.sleep(0)
                assert await gathered(client, len(sent)) == sent
                assert place.flows[0].packets == 2 * len(sent)
                client.abort()
        await echo.close()

    run(main())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_cancelled_listener_leaves_nothing() -> None:
    async def main() -> None:
        echo = Echo()
        before = descriptors()
        async with listening(echo.address) as place:
            clients = [open_udp(place.address) for _ in range(20)]
            for client in clients:
                await client.send([Datagram(b"x", place.address)])
            for client in clients:
                await gathered(client, 1)
                client.abort()
        assert descriptors() == before
        await echo.close()

    run(main())
