"""Port forwarding over loopback: streams and datagrams, targets that fail, and services without any."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.contracts import Policies
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.egress import Egress
from gostnet.core.errors import BypassDenied, DialRefused, GostnetError
from gostnet.core.flow import Flow, Network
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope, run, together
from gostnet.pipeline.chain import Chain
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.forwarding import NoTarget
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Node
from gostnet.pipeline.router import ServiceRouter
from gostnet.pipeline.service import Service
from gostnet.pipeline.transport import Listener, StreamDialer, Transport
from gostnet.protocols.forward.connector import ForwardConnector
from gostnet.protocols.forward.handler import ForwardHandler
from gostnet.testing import datagrams_pair, stream_pair
from gostnet.transports.udp import UdpOptions, UdpSource

from ..vectors import Listening, Names, Peer, UdpPeer, closed_port, echo_server, router, served

TCP = Transport("tcp", StreamDialer())
PLAIN = ForwardConnector(ForwardConnector.Options(), ConnectorContext())


def nodes(*targets: Endpoint) -> list[Node]:
    return [Node(str(target), target, TCP, PLAIN) for target in targets]


def handler(*targets: Endpoint, **options: Any) -> ForwardHandler:
    context = HandlerContext(service="web", hop=Hop("forward", nodes(*targets)) if targets else None)
    return ForwardHandler(ForwardHandler.Options(**options), context)


def chained(*nodes_at: Endpoint) -> ServiceRouter:
    """Return a way out through plain nodes, which decide for themselves where they lead."""
    direct = Direct(Names())
    return ServiceRouter(direct, Chain("chain", [Hop("hop", nodes(at)) for at in nodes_at], direct))


@asynccontextmanager
async def served_udp(made: ForwardHandler, egress: Egress | None = None, **options: Any) -> AsyncIterator[Endpoint]:
    source = UdpSource(Endpoint("127.0.0.1", 0), UdpOptions(**options))
    service = Service("test", Listener("udp", source), made, egress or router(), Policies())
    await service.open()
    scope = Scope("served")
    task = scope.start(service.serve(), "serve")
    try:
        yield source.address
    finally:
        task.cancel()
        await service.aclose()
        await service.drain(0)
        await scope.cancel()


# ---- streams ------------------------------------------------------------------------------------
def test_a_connection_goes_to_the_target_and_keeps_half_close() -> None:
    async def main() -> None:
        with Listening() as target:
            async with served(handler(target.address)) as address:
                with await Peer.connect(address) as client:
                    await client.send(b"question")
                    client.shut()
                    with await target.accept() as server:
                        assert await server.rest() == b"question"
                        await server.send(b"late answer")
                        server.shut()
                        assert await client.rest() == b"late answer"

    run(main())


def test_much_is_passed_on_whole() -> None:
    data = os.urandom(2_000_001)

    async def main() -> None:
        async with echo_server() as port, served(handler(Endpoint("localhost", port))) as address:
            with await Peer.connect(address) as client:

                async def write() -> None:
                    await client.send(data)
                    client.shut()

                async def read() -> None:
                    assert await client.rest() == data

                await together(write(), read())

    run(main())


def test_the_next_target_is_tried_when_one_is_dead() -> None:
    async def main() -> None:
        async with echo_server() as port:
            made = handler(Endpoint("127.0.0.1", closed_port()), Endpoint("127.0.0.1", port))
            async with served(made) as address:
                for _ in range(3):
                    with await Peer.connect(address) as client:
                        await client.send(b"hello")
                        assert await client.exactly(5) == b"hello"

    run(main())


def test_a_client_whose_target_is_dead_is_closed_on() -> None:
    async def main() -> None:
        async with served(handler(Endpoint("127.0.0.1", closed_port()))) as address:
            with await Peer.connect(address) as client:
                assert await client.rest() == b""

    run(main())


def test_targets_are_subject_to_the_services_bypass() -> None:
    class Everything:
        def contains(self, network: Network, target: Endpoint) -> bool:
            return True

    async def main() -> None:
        _, right = stream_pair()
        with pytest.raises(BypassDenied):
            await handler(Endpoint("127.0.0.1", 80)).handle(Flow(), right, router(bypass=Everything()))

    run(main())


@pytest.mark.parametrize("shape", [stream_pair, datagrams_pair])
def test_a_service_without_any_target_says_so(shape: Any) -> None:
    async def main() -> None:
        _, right = shape()
        with pytest.raises(NoTarget, match="web: nothing says where to") as caught:
            await handler().handle(Flow(), right, router())
        assert "tcp://:8080/" in caught.value.hint

    run(main())


def test_without_a_target_the_end_of_the_chain_knows_one() -> None:
    async def main() -> None:
        async with echo_server() as port, served(handler(Endpoint("127.0.0.1", port))) as node:
            async with served(handler(), chained(node)) as address:
                with await Peer.connect(address) as client:
                    await client.send(b"hello")
                    assert await client.exactly(5) == b"hello"

    run(main())


def test_an_idle_connection_ends_when_it_has_a_limit() -> None:
    async def main() -> None:
        with Listening() as target:
            async with served(handler(target.address, idle_timeout=0.05)) as address:
                with await Peer.connect(address) as client, await target.accept() as server:
                    await client.send(b"x")
                    assert await server.exactly(1) == b"x"
                    assert await client.rest() == b""
                    assert await server.rest() == b""

    run(main())


@pytest.mark.parametrize("version", [1, 2])
def test_targets_are_told_whom_the_connection_is_for(version: int) -> None:
    async def main() -> None:
        with Listening() as target:
            async with served(handler(target.address, proxy_protocol=version)) as address:
                with await Peer.connect(address) as client, await target.accept() as server:
                    await client.send(b"payload")
                    ports = (client.address.port, address.port)
                    if version == 1:
                        expected = b"PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n" % ports
                    else:
                        expected = bytes.fromhex("0d0a0d0a000d0a515549540a2111000c7f0000017f000001")
                        expected += b"".join(port.to_bytes(2, "big") for port in ports)
                    assert await server.exactly(len(expected) + 7) == expected + b"payload"

    run(main())


# ---- datagrams ----------------------------------------------------------------------------------
def test_datagrams_go_to_the_target_for_as_long_as_the_client_sends() -> None:
    async def main() -> None:
        async with echo_server() as port:
            async with served_udp(handler(Endpoint("localhost", port)), keepalive=True) as address:
                with UdpPeer() as one, UdpPeer() as other:
                    for size in (0, 1, 1400, 60_000):
                        for peer in (one, other):
                            await peer.send(bytes(size), address)
                            assert await peer.receive() == (bytes(size), address)

    run(main())


def test_each_client_has_its_own_source_towards_the_target() -> None:
    async def main() -> None:
        with UdpPeer() as target:
            async with served_udp(handler(target.address), keepalive=True) as address:
                with UdpPeer() as one, UdpPeer() as other:
                    sources = []
                    for peer in (one, one, other):
                        await peer.send(b"x", address)
                        sources.append((await target.receive())[1])
                    assert sources[0] == sources[1] != sources[2]
                    await target.send(b"unasked", sources[2])
                    assert await other.receive() == (b"unasked", address)

    run(main())


def test_without_keepalive_an_association_ends_with_its_first_answer() -> None:
    """It is the listener that ends it (transports 11.1): the next datagram comes from a new source."""

    async def main() -> None:
        with UdpPeer() as target:
            async with served_udp(handler(target.address)) as address:
                with UdpPeer() as peer:
                    sources = []
                    for number in (b"1", b"2"):
                        await peer.send(b"ask " + number, address)
                        data, source = await target.receive()
                        assert data == b"ask " + number
                        sources.append(source)
                        await target.send(b"answer " + number, source)
                        assert await peer.receive() == (b"answer " + number, address)
                    assert sources[0] != sources[1]

    run(main())


@pytest.mark.parametrize("options", [{"idle_timeout": 0.04}, {"stateless": True, "read_timeout": 0.04}])
def test_an_association_ends_when_it_is_idle(options: dict[str, Any]) -> None:
    async def main() -> None:
        with UdpPeer() as target:
            left, right = datagrams_pair()
            flow = Flow(client=Endpoint("192.0.2.1", 1))
            await left.send([Datagram(b"x", ANY)])
            await handler(target.address, **options).handle(flow, right, router())
            assert (await target.receive())[0] == b"x"
            assert (flow.meter.up, flow.packets, flow.network, flow.connected) == (1, 1, "udp", True)

    run(main())


def test_a_proxy_header_is_a_datagram_of_its_own() -> None:
    async def main() -> None:
        with UdpPeer() as target:
            async with served_udp(handler(target.address, proxy_protocol=2), keepalive=True) as address:
                with UdpPeer() as peer:
                    await peer.send(b"payload", address)
                    header, _ = await target.receive()
                    ports = peer.address.port.to_bytes(2, "big") + address.port.to_bytes(2, "big")
                    assert header.hex() == "0d0a0d0a000d0a515549540a2112000c7f0000017f000001" + ports.hex()
                    assert (await target.receive())[0] == b"payload"

    run(main())


def test_a_datagram_target_that_fails_is_marked_and_another_one_taken() -> None:
    class Half:
        """Opens associations to port 2 only."""

        async def connect(self, flow: Flow, target: Endpoint) -> Stream:
            raise AssertionError("a stream was asked for")

        async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
            assert target is not None
            if target.port != 2:
                raise DialRefused("no")
            left, _right = datagrams_pair()
            left.abort()
            return left

    async def main() -> None:
        made = handler(Endpoint("192.0.2.1", 1), Endpoint("192.0.2.1", 2))
        _, right = datagrams_pair()
        with pytest.raises(GostnetError, match="closed"):
            await made.handle(Flow(), right, Half())
        hop = made._context.hop
        assert hop is not None
        assert [node.marker.failures for node in hop.nodes] == [1, 0]

    run(main())
