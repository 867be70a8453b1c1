"""What the real gost said in SOCKS4, said again by the handler and the connector."""

from __future__ import annotations

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.flow import Flow
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.handler import HandlerContext
from gostnet.protocols.socks4.connector import Socks4Connector
from gostnet.protocols.socks4.handler import Socks4Handler

from ..vectors import TARGET_PORT, echo_server, load, replay_client, replay_server, served


class Users:
    """Knows `user` and any password, as the recording's auther did."""

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        return username if (username, password) == ("user", "") else None


@pytest.mark.parametrize(
    ("name", "users"),
    [
        ("socks4-connect", None),
        ("socks4-connect", Users()),
        ("socks4a-connect", None),
        ("socks4-client", None),
        ("socks4-client-disable4a", None),
        ("socks4-err-bind", None),
        ("socks4-err-failed", None),
        ("socks4-err-userid", Users()),
    ],
)
def test_the_handler_answers_as_gost(name: str, users: Users | None) -> None:
    async def main() -> None:
        handler = Socks4Handler(Socks4Handler.Options(), HandlerContext(authenticator=users))
        async with echo_server() as port, served(handler) as address:
            await replay_client(load(name), address, replace={TARGET_PORT: port.to_bytes(2, "big")})

    run(main())


@pytest.mark.parametrize(("name", "disable_4a"), [("socks4-client", False), ("socks4-client-disable4a", True)])
def test_the_connector_asks_as_gost(name: str, disable_4a: bool) -> None:
    async def play(below: Stream) -> None:
        connector = Socks4Connector(Socks4Connector.Options(disable_4a=disable_4a), ConnectorContext())
        flow = Flow()
        stream = await connector.handshake(flow, below)
        assert await connector.connect(flow, stream, Endpoint("127.0.0.1", 7007)) is below
        await below.send(b"hello")
        assert await below.receive() == b"hello"
        await below.send_eof()
        assert await below.receive() == b""

    async def main() -> None:
        await replay_server(load(name), play)

    run(main())
