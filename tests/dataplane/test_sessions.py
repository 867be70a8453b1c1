"""Sessions of a shared datagram socket."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import tracemalloc

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.flow import Flow
from gostnet.core.log import Logger, Sink
from gostnet.core.tasks import Scope, run
from gostnet.core.udp_socket import open_udp
from gostnet.dataplane.sessions import Sessions
from gostnet.transports.udp import UdpOptions, UdpSource


def drop(_: object) -> None:
    """Answer nobody."""


PEER = Endpoint("192.0.2.1", 1000)
HERE = Endpoint("192.0.2.9", 53)


def test_a_full_queue_drops_the_new_and_keeps_the_old() -> None:
    async def main() -> None:
        sessions: Sessions[int] = Sessions(ttl=10, queue_size=2)
        session = sessions.open(1, PEER, HERE, lambda batch: None)
        assert [session.offer(Datagram(bytes([n]), PEER)) for n in range(3)] == [True, True, False]
        assert [datagram.data for datagram in await session.receive()] == [b"\0", b"\1"]
        sessions.close()

    run(main())


def test_an_idle_session_ends_and_a_used_one_does_not() -> None:
    async def main() -> None:
        sessions: Sessions[int] = Sessions(ttl=0.1)
        idle = sessions.open(1, PEER, HERE, lambda batch: None)
        used = sessions.open(2, PEER, HERE, lambda batch: None)
        for _ in range(8):
            await asyncio.sleep(0.025)
            assert sessions.find(2) is used
        assert list(await idle.receive()) == []
        assert idle.ended
        assert not used.ended
        assert len(sessions) == 1
        sessions.close()

    run(main())


def test_the_table_is_bounded_by_ending_who_is_idle_longest() -> None:
    async def main() -> None:
        sessions: Sessions[int] = Sessions(ttl=10, limit=2)
        first = sessions.open(1, PEER, HERE, lambda batch: None)
        second = sessions.open(2, PEER, HERE, lambda batch: None)
        assert sessions.find(1) is first
        sessions.open(3, PEER, HERE, lambda batch: None)
        assert second.ended
        assert not first.ended
        sessions.close()

    run(main())


def test_many_sessions_expire_a_few_at_a_time_and_leave_no_timer() -> None:
    async def main() -> None:
        sessions: Sessions[int] = Sessions(ttl=0.05, limit=100_000)
        made = [sessions.open(n, PEER, HERE, lambda batch: None) for n in range(1000)]
        left: list[int] = []
        while len(sessions):
            await asyncio.sleep(0)
            left.append(len(sessions))
        assert all(session.ended for session in made)
        assert max(before - after for before, after in itertools.pairwise(left)) <= 64
        assert sessions._timer is None

    run(main())


def test_a_table_of_many_is_cheap_to_use_and_to_fill_beyond_its_limit() -> None:
    async def main() -> None:
        sessions: Sessions[int] = Sessions(ttl=60, limit=100_000)
        for number in range(100_000):
            sessions.open(number, PEER, HERE, lambda batch: None)
        begun = time.process_time()
        for number in range(0, 20_000, 2):
            assert sessions.find(number) is not None
        for number in range(100_000, 110_000):
            sessions.open(number, PEER, HERE, lambda batch: None)
        # A scan of the table for each of these would take minutes.
        assert time.process_time() - begun < 5
        assert len(sessions) == 100_000
        assert sessions.find(0) is not None
        assert sessions.find(1) is None
        assert sessions.find(20_001) is not None
        sessions.close()

    run(main())


def test_a_client_that_floods_takes_no_sessions_of_others() -> None:
    lines: list[str] = []

    class Lines(Sink):
        def write(self, line: bytes) -> None:
            lines.append(json.loads(line)["msg"])

    async def main() -> None:
        sessions: Sessions[int] = Sessions(ttl=60, limit=1000, log=Logger(Lines(-1)))
        modest = [sessions.open(n, Endpoint(f"192.0.2.{n}", 1), HERE, lambda batch: None) for n in range(1, 11)]
        flooding = Endpoint("198.51.100.1", 1)
        loud = [sessions.open(n, flooding, HERE, lambda batch: None) for n in range(100, 3100)]
        busy = [session for session in loud if not session.ended]
        for session in busy:
            sessions.touch(session)  # whoever is idle longest is one of the modest
        more = [sessions.open(n, Endpoint(f"192.0.2.{n}", 1), HERE, lambda batch: None) for n in range(11, 51)]
        assert not any(session.ended for session in modest + more)
        assert len(sessions) == 1000
        assert sum(not session.ended for session in loud) == 950
        assert lines == ["1000 sessions are open, which is the limit: for each new one another one ends"]
        sessions.close()
        sessions.open(1, PEER, HERE, lambda batch: None).end()
        assert not sessions._clients

    run(main())


def test_a_session_takes_little_memory_and_its_end_little_time() -> None:
    async def main() -> None:
        count = 100_000
        sessions: Sessions[tuple[Endpoint, Endpoint]] = Sessions(ttl=60, limit=2 * count)
        peers = [Endpoint(f"10.{n >> 14 & 255}.{n >> 7 & 127}.{n & 127}", 1000) for n in range(count)]
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for peer in peers:
                sessions.open((peer, HERE), peer, HERE, drop)
            each = (tracemalloc.get_traced_memory()[0] - before) / count
        finally:
            tracemalloc.stop()
        assert each < 1024
        sessions.ttl = 0
        begun = time.process_time()
        while len(sessions):
            sessions._sweep()
        assert (time.process_time() - begun) / count < 50e-6
        assert sessions._timer is None

    run(main())


def test_udp_source_gives_each_peer_a_session_and_survives_odd_datagrams() -> None:
    async def main() -> None:
        source = UdpSource(Endpoint("127.0.0.1", 0), UdpOptions(keepalive=True))
        await source.open()
        scope = Scope("test")
        flows: list[Flow] = []

        async def serve() -> None:
            while True:
                for flow, session in await source.accept():
                    flows.append(flow)
                    scope.start(echo(session))

        async def echo(session: object) -> None:
            while batch := await session.receive():  # type: ignore[attr-defined]
                await session.send(batch)  # type: ignore[attr-defined]

        scope.start(serve())
        clients = [open_udp(source.address) for _ in range(3)]
        for client in clients:
            for payload in (b"", b"x", b"y" * 9000):
                await client.send([Datagram(payload, source.address)])
                (answer,) = await client.receive()
                assert answer.data == payload
        assert [flow.client for flow in flows] == [client.local for client in clients]
        for client in clients:
            client.abort()
        await scope.cancel()
        source.abort()

    run(main())


def test_without_keepalive_a_session_ends_after_one_reply() -> None:
    async def main() -> None:
        source = UdpSource(Endpoint("127.0.0.1", 0), UdpOptions())
        await source.open()
        client = open_udp(source.address)
        for payload in (b"one", b"two"):
            await client.send([Datagram(payload, source.address)])
            ((_, session),) = await source.accept()
            batch = await session.receive()
            assert [datagram.data for datagram in batch] == [payload]
            await session.send(batch)
            assert list(await session.receive()) == []
            assert (await client.receive())[0].data == payload
        client.abort()
        source.abort()

    run(main())
