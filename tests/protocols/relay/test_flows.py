"""Connections through relays, end to end over loopback: late answers, half-close, who speaks first, bulk.

A plain forwarding service stands in front, so the client sees nothing but bytes; behind it come one or two relays.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import DialTimeout, GostnetError, UpstreamRejected
from gostnet.core.flow import Flow
from gostnet.core.stream import Stream
from gostnet.core.tasks import run, together
from gostnet.dataplane import copy
from gostnet.pipeline.handler import HandlerContext, forward
from gostnet.protocols.relay.handler import RelayHandler
from gostnet.testing import stream_pair
from gostnet.testing.servers import pattern

from ..vectors import Listening, Peer, closed_port, served
from .support import connector, through

MODES = pytest.mark.parametrize("nodelay", [False, True], ids=["lazy", "nodelay"])
HOPS = pytest.mark.parametrize("hops", [1, 2])


class Front:
    """Forwards what comes to `target`, and keeps the errors."""

    accepts = (Stream,)

    def __init__(self, target: Endpoint) -> None:
        self.target = target
        self.flows: list[Flow] = []
        self.errors: list[GostnetError] = []

    async def handle(self, flow: Flow, conn: Stream, egress: Any) -> None:
        """Forward."""
        flow.target = self.target
        self.flows.append(flow)
        try:
            await forward(flow, conn, egress)
        except GostnetError as exc:
            self.errors.append(exc)
            raise


@asynccontextmanager
async def path(target: Endpoint, hops: int, nodelay: bool) -> AsyncIterator[tuple[Endpoint, Front]]:
    """Set up the front and `hops` relays before `target`; yield the front's address and the front."""
    async with AsyncExitStack() as stack:
        relays = []
        for _ in range(hops):
            handler = RelayHandler(RelayHandler.Options(nodelay=nodelay), HandlerContext())
            relays.append(await stack.enter_async_context(served(handler)))
        front = Front(target)
        address = await stack.enter_async_context(served(front, through(*relays, nodelay=nodelay)))
        yield address, front


@HOPS
@MODES
def test_an_answer_that_comes_after_the_clients_end_arrives_whole(hops: int, nodelay: bool) -> None:
    answer = pattern(300_000)

    async def main() -> None:
        with Listening() as target:
            async with path(target.address, hops, nodelay) as (address, front):
                with await Peer.connect(address) as client:
                    await client.send(b"question")
                    client.shut()
                    with await target.accept() as server:
                        assert await server.rest() == b"question"

                        async def late() -> None:
                            await server.send(answer)
                            server.shut()

                        async def read() -> None:
                            assert await client.rest() == answer

                        await together(late(), read())
                    assert (front.flows[0].meter.up, front.flows[0].meter.down) == (8, 300_000)

    run(main())


@HOPS
@MODES
def test_the_client_goes_on_after_the_servers_end(hops: int, nodelay: bool) -> None:
    async def main() -> None:
        with Listening() as target:
            async with path(target.address, hops, nodelay) as (address, _):
                with await Peer.connect(address) as client:
                    await client.send(b"first")
                    with await target.accept() as server:
                        assert await server.exactly(5) == b"first"
                        await server.send(b"that is all")
                        server.shut()
                        assert await client.rest() == b"that is all"
                        await client.send(b", one more thing")
                        client.shut()
                        assert await server.rest() == b", one more thing"

    run(main())


@HOPS
@MODES
def test_a_server_may_speak_first(hops: int, nodelay: bool) -> None:
    """GOST 3.3.0 hangs here in the lazy mode: neither side of its relay moves before the client does."""

    async def main() -> None:
        with Listening() as target:
            async with path(target.address, hops, nodelay) as (address, _):
                with await Peer.connect(address) as client, await target.accept() as server:
                    await server.send(b"220 ready\r\n")
                    assert await client.exactly(11) == b"220 ready\r\n"
                    await client.send(b"QUIT\r\n")
                    assert await server.exactly(6) == b"QUIT\r\n"
                    server.shut()
                    assert await client.rest() == b""

    run(main())


@HOPS
@MODES
@pytest.mark.parametrize("first", ["client", "server"])
def test_ends_without_a_byte_are_passed_on(hops: int, nodelay: bool, first: str) -> None:
    async def main() -> None:
        with Listening() as target:
            async with path(target.address, hops, nodelay) as (address, front):
                with await Peer.connect(address) as client, await target.accept() as server:
                    one, other = (client, server) if first == "client" else (server, client)
                    one.shut()
                    assert await other.rest() == b""
                    other.shut()
                    assert await one.rest() == b""
            assert front.errors == []

    run(main())


@HOPS
@MODES
def test_much_goes_both_ways_at_once_and_is_spliced(hops: int, nodelay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_copy(*_: Any) -> None:
        raise AssertionError("the copy engine was used")

    monkeypatch.setattr(copy, "relay", no_copy)
    up, down = os.urandom(1_500_001), os.urandom(2_000_003)

    async def main() -> None:
        with Listening() as target:
            async with path(target.address, hops, nodelay) as (address, front):
                with await Peer.connect(address) as client, await target.accept() as server:

                    async def write(peer: Peer, data: bytes) -> None:
                        await peer.send(data)
                        peer.shut()

                    async def read(peer: Peer, data: bytes) -> None:
                        assert await peer.rest() == data

                    await together(write(client, up), write(server, down), read(server, up), read(client, down))
            meter = front.flows[0].meter
            assert (meter.up, meter.down) == (len(up), len(down))

    run(main())


@MODES
def test_a_target_that_cannot_be_reached_is_reported(nodelay: bool) -> None:
    async def main() -> None:
        async with path(Endpoint("127.0.0.1", closed_port()), 1, nodelay) as (address, front):
            with await Peer.connect(address) as client:
                await client.send(b"anyone?")
                assert await client.rest() == b""
            (error,) = front.errors
            assert isinstance(error, UpstreamRejected)
            assert error.reply == 7
            # Only who waits for the answer can tell the client before it says yes.
            assert front.flows[0].connected != nodelay

    run(main())


def test_a_second_relay_is_asked_without_waiting_for_the_first() -> None:
    async def main() -> None:
        with Listening() as relay:
            router = through(relay.address, Endpoint("192.0.2.2", 8443))
            stream = await router.connect(Flow(), Endpoint("192.0.2.3", 80))
            await stream.send(b"hello")
            with await relay.accept() as peer:
                sent = "0101000a02000701c000020220fb" + "0101000a02000701c00002030050" + b"hello".hex()
                assert (await peer.exactly(len(sent) // 2)).hex() == sent
                await peer.send(bytes.fromhex("01000000" + "01000000") + b"hi")
                assert await stream.receive() == b"hi"
            stream.abort()

    run(main())


@pytest.mark.parametrize("target", [Endpoint("192.0.2.1", 53), None])
def test_a_relay_that_does_not_answer_is_not_waited_for(target: Endpoint | None) -> None:
    async def main() -> None:
        left, _right = stream_pair()
        impatient = connector(connect_timeout=0.02, nodelay=True)
        with pytest.raises(DialTimeout, match=r"within 0.02s"):
            await impatient.associate(Flow(), left, target)
        if target is not None:
            with pytest.raises(DialTimeout):
                await impatient.connect(Flow(), left, target)

    run(main())
