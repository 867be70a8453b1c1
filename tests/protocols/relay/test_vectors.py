"""What the real gost said in relay, said again by the handler and the connector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.contracts import Authenticator
from gostnet.core.datagrams import Datagram
from gostnet.core.errors import UpstreamRejected
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.handler import HandlerContext
from gostnet.protocols.relay.connector import RelayConnector
from gostnet.protocols.relay.handler import RelayHandler

from ..vectors import TARGET_PORT, echo_server, load, replay_client, replay_server, served
from .support import forwarder

TARGET = Endpoint("127.0.0.1", 7007)


class Users:
    """Knows user:pass."""

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        return username if (username, password) == ("user", "pass") else None


# ---- the handler --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "users", "options", "vary"),
    [
        ("relay-connect-tcp-noauth", None, {}, {}),
        ("relay-connect-tcp-auth", Users(), {}, {}),
        ("relay-connect-tcp-badauth", Users(), {}, {}),
        ("relay-connect-tcp-domain", None, {}, {}),
        ("relay-connect-tcp-nodelay", None, {"nodelay": True}, {}),
        ("relay-connect-udp-target", None, {}, {}),
        ("relay-connect-udp-target", None, {"nodelay": True}, {}),
        ("relay-udp-associate", None, {"bind": True}, {1: [slice(24, 26)]}),
        ("relay-cmd0", None, {}, {}),
        ("relay-unknown-feature", None, {}, {}),
        ("relay-bind-disabled", None, {}, {}),
        ("relay-err-associate", None, {}, {}),
        ("relay-err-badcmd", None, {}, {}),
        ("relay-err-badversion", None, {}, {}),
        ("relay-err-notarget", None, {}, {}),
        ("relay-err-unreachable", None, {}, {}),
    ],
)
def test_the_handler_answers_as_gost(
    name: str, users: Authenticator | None, options: dict[str, Any], vary: dict[int, Sequence[slice]]
) -> None:
    async def main() -> None:
        handler = RelayHandler(RelayHandler.Options(**options), HandlerContext(authenticator=users))
        async with echo_server() as port, served(handler) as address:
            await replay_client(load(name), address, replace={TARGET_PORT: port.to_bytes(2, "big")}, vary=vary)

    run(main())


@pytest.mark.parametrize("name", ["relay-forward", "relay-connect-at"])
def test_in_forward_mode_the_forwarder_decides(name: str) -> None:
    async def main() -> None:
        async with echo_server() as port:
            context = HandlerContext(hop=forwarder(Endpoint("127.0.0.1", port)))
            async with served(RelayHandler(RelayHandler.Options(), context)) as address:
                await replay_client(load(name), address)

    run(main())


def test_in_forward_mode_a_dead_target_has_its_own_status() -> None:
    async def main() -> None:
        context = HandlerContext(hop=forwarder(Endpoint("127.0.0.1", 1)))
        async with served(RelayHandler(RelayHandler.Options(), context)) as address:
            await replay_client(load("relay-forward-down"), address)

    run(main())


# ---- the connector ------------------------------------------------------------------------------
def _connector(*, user: str = "", password: str = "", **options: Any) -> RelayConnector:
    context = ConnectorContext(username=user, password=Secret(password))
    return RelayConnector(RelayConnector.Options(**options), context)


async def _connect(connector: RelayConnector, below: Stream, target: Endpoint) -> Stream:
    return await connector.connect(Flow(), await connector.handshake(Flow(), below), target)


@pytest.mark.parametrize(
    ("name", "target", "connector"),
    [
        ("relay-connect-tcp-noauth", TARGET, _connector()),
        ("relay-connect-tcp-auth", TARGET, _connector(user="user", password="pass")),
        ("relay-connect-tcp-domain", Endpoint("localhost", 7007), _connector()),
        ("relay-connect-tcp-nodelay", TARGET, _connector(nodelay=True)),
    ],
)
def test_the_connector_asks_as_gost(name: str, target: Endpoint, connector: RelayConnector) -> None:
    async def play(below: Stream) -> None:
        stream = await _connect(connector, below, target)
        await stream.send(b"hello relay")
        assert await stream.receive() == b"hello relay"
        await stream.send_eof()
        assert await stream.receive() == b""

    async def main() -> None:
        await replay_server(load(name), play)

    run(main())


def test_the_connector_asks_a_forwarding_relay_for_no_target() -> None:
    async def play(below: Stream) -> None:
        stream = await _connect(_connector(), below, Endpoint("", 0))
        await stream.send(b"abc")
        assert await stream.receive() == b"abc"

    async def main() -> None:
        await replay_server(load("relay-forward"), play)

    run(main())


def test_the_connector_sends_datagrams_to_one_target_as_gost() -> None:
    async def play(below: Stream) -> None:
        datagrams = await _connector().associate(Flow(), below, TARGET)
        await datagrams.send([Datagram(b"ping-udp", TARGET)])
        (answer,) = await datagrams.receive()
        assert (answer.data, answer.peer) == (b"ping-udp", TARGET)
        await datagrams.aclose()

    async def main() -> None:
        await replay_server(load("relay-connect-udp-target"), play)

    run(main())


def test_the_connector_opens_associations_as_gost() -> None:
    async def play(below: Stream) -> None:
        datagrams = await _connector().associate(Flow(), below, None)
        assert datagrams.local == Endpoint("::", 0xAC6C)
        await datagrams.send([Datagram(b"dgram-1", TARGET)])
        (answer,) = await datagrams.receive()
        assert (answer.data, answer.peer) == (b"dgram-1", TARGET)
        await datagrams.aclose()

    async def main() -> None:
        await replay_server(load("relay-udp-associate"), play)

    run(main())


def test_the_connector_sees_a_refusal_when_it_reads() -> None:
    async def play(below: Stream) -> None:
        stream = await _connect(_connector(user="user", password="wrong"), below, TARGET)
        await stream.send(b"x")
        with pytest.raises(UpstreamRejected, match="wrong credentials") as caught:
            await stream.receive()
        assert caught.value.reply == 2
        stream.abort()

    async def main() -> None:
        await replay_server(load("relay-connect-tcp-badauth"), play)

    run(main())


def test_the_connector_that_waits_sees_a_refusal_when_it_connects() -> None:
    async def play(below: Stream) -> None:
        with pytest.raises(UpstreamRejected, match="network unreachable") as caught:
            await _connect(_connector(nodelay=True), below, Endpoint("127.0.0.1", 1))
        assert caught.value.reply == 7

    async def main() -> None:
        await replay_server(load("relay-err-unreachable"), play)

    run(main())
