"""What the real gost said in HTTP, said again by the handler and the connector."""

from __future__ import annotations

from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.connector import ConnectorContext
from gostnet.protocols.http.connector import HttpConnector

from ..vectors import TARGET_PORT, echo_server, load, replay_client, replay_server, served
from .kit import Users, Watched, origin, recorded, way_out

TARGET = Endpoint("127.0.0.1", 7007)


@pytest.mark.parametrize(
    ("name", "users", "metadata"),
    [
        ("http-connect", False, {}),
        ("http-client-connect", False, {}),
        ("http-client-connect-auth", True, {}),
        ("http-connect-407", True, {}),
        ("http-connect-407-keepalive", True, {"authBasicRealm": "myrealm"}),
        ("http-connect-503", False, {}),
        ("http-connect-probe-code", True, {"probeResist": "code:404"}),
        ("http-connect-probe-host", True, {"probeResist": "host:127.0.0.1:8000"}),
        ("http-connect-probe-knock", True, {"probe_resist": "code:404", "knock": "127.0.0.1"}),
        ("http-connect-probe-web", True, {"probeResist": "web:127.0.0.1:8000/"}),
        ("http-custom-header", False, {"header": {"X-A": "1"}}),
        ("http-forward-400", False, {}),
        ("http-forward-503", False, {}),
        ("http-forward-get", False, {}),
        ("http-forward-get-compression", False, {"keepalive": "true", "compression": "true"}),
        ("http-forward-get-keepalive", False, {"http.keepalive": True}),
        ("http-forward-http10", False, {}),
        ("http-forward-origin-form", False, {}),
        ("http-gost-target", False, {}),
        ("http-udp", False, {"udp": True}),
        ("http-udp-disabled", False, {}),
        ("http-client-udp", False, {"udp": True}),
        ("http-client-udp-assoc", False, {"udp": True}),
    ],
)
def test_handler_says_what_gost_said(name: str, users: bool, metadata: dict[str, Any]) -> None:
    async def main() -> None:
        with Watched(metadata, users=Users() if users else None) as handler:
            async with echo_server() as echo, origin(recorded) as server:
                egress = way_out({7007: echo, 8000: server.port})
                async with served(handler, egress) as address:
                    # UDP goes by the address in the frames, so there the port itself is exchanged.
                    replace = {TARGET_PORT: echo.to_bytes(2, "big")} if "udp" in name else {}
                    await replay_client(load(name), address, replace=replace)

    run(main())


@pytest.mark.parametrize("name", ["http-client-connect", "http-client-connect-auth"])
def test_connector_says_what_gost_said(name: str) -> None:
    context = ConnectorContext("user", Secret("pass")) if name.endswith("-auth") else ConnectorContext()
    connector = HttpConnector(HttpConnector.Options(), context)

    async def play(below: Stream) -> None:
        ready = await connector.handshake(Flow(), below)
        assert ready is below
        stream = await connector.connect(Flow(), below, TARGET)
        assert stream is below
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"
        await stream.send_eof()
        assert await stream.receive() == b""

    run(replay_server(load(name), play))


@pytest.mark.parametrize(
    ("name", "target", "peer"),
    [
        ("http-client-udp", TARGET, Endpoint("", 0)),
        ("http-client-udp-assoc", None, TARGET),
    ],
)
def test_connector_associates_as_gost_did(name: str, target: Endpoint | None, peer: Endpoint) -> None:
    connector = HttpConnector(HttpConnector.Options(), ConnectorContext())
    payload = b"ping-udp" if target is not None else b"dgram-1"

    async def play(below: Stream) -> None:
        association = await connector.associate(Flow(), below, target)
        await association.send([Datagram(payload, peer)])
        (answer,) = await association.receive()
        assert (bytes(answer.data), answer.peer) == (payload, TARGET)
        await association.aclose()

    run(replay_server(load(name), play))
