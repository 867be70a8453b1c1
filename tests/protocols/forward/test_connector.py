"""Connectors that speak no protocol."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.errors import ConnError, DialError, DialRefused
from gostnet.core.flow import Flow
from gostnet.core.registry import COMPONENTS
from gostnet.core.tasks import run, together
from gostnet.dataplane.relay import relay
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.protocols import declare
from gostnet.protocols.forward.connector import DirectConnector, ForwardConnector
from gostnet.testing import stream_pair

from ..vectors import Names, closed_port, echo_server

TARGET = Endpoint("192.0.2.1", 80)


def direct(**options: Any) -> DirectConnector:
    return DirectConnector(DirectConnector.Options(**options), ConnectorContext(direct=Direct(Names())))


def test_the_names_stand_for_these_connectors() -> None:
    declare()
    assert {COMPONENTS.connectors.get(name) for name in ("forward", "tcp")} == {ForwardConnector}
    assert {COMPONENTS.connectors.get(name) for name in ("direct", "virtual")} == {DirectConnector}


def test_forward_passes_the_stream_itself_on() -> None:
    async def main() -> None:
        left, _ = stream_pair()
        connector = ForwardConnector(ForwardConnector.Options(), ConnectorContext(name="node.example"))
        assert await connector.handshake(Flow(), left) is left
        assert await connector.connect(Flow(), left, TARGET) is left
        assert left.sent == 0
        for target in (TARGET, None):
            with pytest.raises(DialError, match=r"node\.example carries no datagrams"):
                await connector.associate(Flow(), left, target)

    run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_direct_connects_from_here_and_closes_what_it_does_not_need(host: str) -> None:
    async def main() -> None:
        async with echo_server() as port:
            left, _ = stream_pair()
            connector = direct()
            stream = await connector.connect(Flow(), await connector.handshake(Flow(), left), Endpoint(host, port))
            assert left.closed
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
            stream.abort()
            left, _ = stream_pair()
            datagrams = await connector.associate(Flow(), left, Endpoint(host, port))
            assert left.closed
            await datagrams.send([Datagram(b"ping", ANY)])
            (answer,) = await datagrams.receive()
            assert answer.data == b"ping"
            datagrams.abort()

    run(main())


def test_direct_reports_what_it_cannot_reach() -> None:
    async def main() -> None:
        left, _ = stream_pair()
        with pytest.raises(DialRefused):
            await direct().connect(Flow(), left, Endpoint("127.0.0.1", closed_port()))
        nowhere = DirectConnector(DirectConnector.Options(), ConnectorContext())
        with pytest.raises(DialError, match="no direct way"):
            await nowhere.connect(Flow(), left, TARGET)

    run(main())


@pytest.mark.parametrize("action", ["reject", "REJECT"])
def test_a_rejected_connection_swallows_everything_and_answers_nothing(action: str) -> None:
    async def main() -> None:
        left, _ = stream_pair()
        stream = await direct(action=action).connect(Flow(), left, TARGET)
        client, inner = stream_pair()
        await client.send(b"hello")
        await client.send_eof()
        flow = Flow()
        await relay(flow, inner, stream)
        assert (flow.meter.up, flow.meter.down) == (5, 0)
        assert await client.receive() == b""
        await stream.aclose()
        with pytest.raises(ConnError):
            await stream.send(b"too late")
        with pytest.raises(ConnError):
            await stream.receive()

    run(main())


def test_a_rejected_association_hears_nothing_until_it_is_closed() -> None:
    async def main() -> None:
        left, _ = stream_pair()
        datagrams = await direct(action="reject").associate(Flow(), left, None)
        await datagrams.send([Datagram(b"x", TARGET)])
        closing = asyncio.Event()

        async def listen() -> None:
            closing.set()
            with pytest.raises(ConnError):
                await datagrams.receive()

        async def close() -> None:
            await closing.wait()
            await datagrams.aclose()

        await together(listen(), close())
        with pytest.raises(ConnError):
            await datagrams.send([])

    run(main())
