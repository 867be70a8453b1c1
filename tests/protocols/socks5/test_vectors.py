"""What the real gost said in SOCKS5, said again by the handler and the connector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.errors import DialError, EndOfStream, UpstreamRejected
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.handler import HandlerContext
from gostnet.protocols.socks5.connector import Socks5Connector
from gostnet.protocols.socks5.handler import Socks5Handler
from gostnet.transports.certificates import Certificates
from gostnet.transports.tls import TlsLayer
from gostnet.wire.socks_addr import decode_address

from ..vectors import TARGET_PORT, echo_server, load, replay_client, replay_server, served

TARGET = Endpoint("127.0.0.1", 7007)

BOUND = slice(8, 10)
"""The port in a reply to an IPv4 request."""


class Users:
    """Knows user:pass."""

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        return username if (username, password) == ("user", "pass") else None


def _relay(said: bytes) -> Endpoint:
    """Find the address of the last reply, after a method of two bytes."""
    return decode_address(said[5:])


@pytest.mark.parametrize(
    ("name", "users", "options", "vary"),
    [
        ("socks5-connect-noauth", None, {}, {3: [BOUND]}),
        ("socks5-connect-domain", None, {}, {3: [BOUND]}),
        ("socks5-client-notls", None, {}, {3: [BOUND]}),
        ("socks5-client-auth-notls", Users(), {}, {5: [BOUND]}),
        ("socks5-auth-ok", Users(), {}, {5: [BOUND]}),
        ("socks5-auth-bad", Users(), {}, {}),
        ("socks5-no-acceptable", Users(), {}, {}),
        ("socks5-err-badcmd", None, {}, {}),
        ("socks5-err-bind-disabled", None, {}, {}),
        ("socks5-err-udp-disabled", None, {}, {}),
        ("socks5-err-unreachable", None, {}, {}),
        ("socks5-udp-associate", None, {"udp": True}, {3: [BOUND]}),
        ("socks5-client-udp-tun", None, {"udp": True}, {3: [BOUND]}),
    ],
)
def test_the_handler_answers_as_gost(
    name: str, users: Users | None, options: dict[str, Any], vary: dict[int, Sequence[slice]]
) -> None:
    async def main() -> None:
        handler = Socks5Handler(Socks5Handler.Options(**options), HandlerContext(authenticator=users))
        async with echo_server() as port, served(handler) as address:
            await replay_client(
                load(name), address, replace={TARGET_PORT: port.to_bytes(2, "big")}, vary=vary, relay=_relay
            )

    run(main())


def test_the_handler_keeps_frames_that_come_with_the_request() -> None:
    """The recording has no reply of its own: its port belongs to the step with the first frame."""

    async def main() -> None:
        handler = Socks5Handler(Socks5Handler.Options(udp=True), HandlerContext())
        async with echo_server() as port, served(handler) as address:
            vector = load("socks5-udp-tun")
            assert vector.steps[3].data.startswith(b"\0\7\xff"), "the reply is merged with a frame"
            reply = b"\x05\0\0\x01\0\0\0\0.."
            patterns = {3: reply + b"\0\7\xff\x01\x7f\0\0\x01..dgram-1"}
            await replay_client(vector, address, replace={TARGET_PORT: port.to_bytes(2, "big")}, patterns=patterns)

    run(main())


def _connector(user: bool = False, tls: TlsLayer | None = None, **options: Any) -> Socks5Connector:
    context = ConnectorContext(tls=tls)
    if user:
        context = replace(context, username="user", password=Secret("pass"))
    return Socks5Connector(Socks5Connector.Options(**options), context)


@pytest.mark.parametrize(("name", "user"), [("socks5-client-notls", False), ("socks5-client-auth-notls", True)])
def test_the_connector_asks_as_gost(name: str, user: bool) -> None:
    async def play(below: Stream) -> None:
        connector, flow = _connector(user, no_tls=True), Flow()
        stream = await connector.handshake(flow, below)
        assert await connector.connect(flow, stream, TARGET) is below
        await below.send(b"hello")
        assert await below.receive() == b"hello"
        await below.send_eof()
        assert await below.receive() == b""

    async def main() -> None:
        await replay_server(load(name), play)

    run(main())


HELLO = rb"\x16\x03[\x01\x03]..\x01.*"
"""A TLS record with a ClientHello."""


@pytest.mark.parametrize(("name", "user"), [("socks5-client-tls", False), ("socks5-client-auth-tls", True)])
def test_the_connector_switches_to_tls_where_gost_does(name: str, user: bool) -> None:
    """What follows the ClientHello belongs to other keys; the whole is in the tests of the connector."""

    async def play(below: Stream) -> None:
        with pytest.raises((EndOfStream, DialError)):
            await _connector(user, tls=TlsLayer.for_client(None)).handshake(Flow(), below)

    async def main() -> None:
        await replay_server(load(name), play, patterns={2: HELLO}, until=3)

    run(main())


@pytest.mark.parametrize(("name", "users"), [("socks5-client-tls", None), ("socks5-client-auth-tls", Users())])
def test_the_handler_switches_to_tls_where_gost_does(name: str, users: Users | None, tmp_path: Path) -> None:
    async def main() -> None:
        layer = TlsLayer.for_server(None, Certificates(working=tmp_path, saved=tmp_path))
        handler = Socks5Handler(Socks5Handler.Options(), HandlerContext(authenticator=users, tls=layer))
        vector = load(name)
        async with served(handler) as address:
            # gost's ClientHello is answered with a ServerHello.
            seen = await replay_client(
                replace(vector, steps=vector.steps[:4]), address, patterns={3: rb"\x16\x03\x03..\x02.*"}
            )
            assert seen[3]

    run(main())


def test_the_connector_sends_udp_as_gost() -> None:
    async def play(below: Stream) -> None:
        connector, flow = _connector(), Flow()
        stream = await connector.handshake(flow, below)
        datagrams = await connector.associate(flow, stream, TARGET)
        await datagrams.send([Datagram(b"ping-udp", TARGET)])
        (answer,) = await datagrams.receive()
        assert (answer.data, answer.peer) == (b"ping-udp", TARGET)
        await datagrams.aclose()

    async def main() -> None:
        await replay_server(load("socks5-client-udp-tun"), play)

    run(main())


@pytest.mark.parametrize(
    ("name", "reply"),
    [("socks5-err-unreachable", 3), ("socks5-no-acceptable", 0xFF)],
)
def test_the_connector_reports_the_code_of_a_refusal(name: str, reply: int) -> None:
    async def play(below: Stream) -> None:
        connector, flow = _connector(), Flow()
        with pytest.raises(UpstreamRejected) as caught:
            await connector.connect(flow, await connector.handshake(flow, below), Endpoint("127.0.0.1", 1))
        assert caught.value.reply == reply

    async def main() -> None:
        await replay_server(load(name), play)

    run(main())


def test_the_connector_reports_that_its_credentials_are_wrong() -> None:
    async def play(below: Stream) -> None:
        context = ConnectorContext(username="user", password=Secret("bad"))
        connector = Socks5Connector(Socks5Connector.Options(), context)
        with pytest.raises(UpstreamRejected, match="does not accept the credentials"):
            await connector.handshake(Flow(), below)

    async def main() -> None:
        await replay_server(load("socks5-auth-bad"), play)

    run(main())
