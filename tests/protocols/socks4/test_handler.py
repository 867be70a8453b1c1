"""SOCKS4 in a service on loopback, and the connector through it."""

from __future__ import annotations

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import (
    BypassDenied,
    DialError,
    DialRefused,
    DialTimeout,
    GostnetError,
    LimitDenied,
    ResolveError,
    UpstreamRejected,
)
from gostnet.core.flow import Flow
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.node import Node, NodeEgress
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.socks4.connector import Socks4Connector
from gostnet.protocols.socks4.handler import Socks4Handler

from ..vectors import Listening, Names, Peer, closed_port, echo_server, router, served

CONNECT = b"\x04\x01"


def handler(**options: float | str) -> Socks4Handler:
    return Socks4Handler(Socks4Handler.Options(**options), HandlerContext())  # type: ignore[arg-type]


class Failing:
    """A way out that is none; it remembers the flow."""

    def __init__(self, error: GostnetError) -> None:
        self.error = error
        self.flow = Flow()

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        self.flow = flow
        raise self.error

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BypassDenied("no"), 0x5C),
        (LimitDenied("no"), 0x5C),
        (DialRefused("no"), 0x5B),
        (DialTimeout("no"), 0x5B),
        (ResolveError("no"), 0x5B),
        (UpstreamRejected("no", 5), 0x5B),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_failure_has_the_code_of_gost(error: GostnetError, code: int) -> None:
    async def main() -> None:
        async with served(handler(), Failing(error)) as address:
            with await Peer.connect(address) as peer:
                await peer.send(CONNECT + b"\0\x50\x7f\0\0\x01user\0" + b"more than that")
                assert await peer.rest() == bytes((0, code, 0, 0, 0, 0, 0, 0))

    run(main())


def test_payload_that_comes_with_the_request_is_kept() -> None:
    async def main() -> None:
        async with echo_server() as port, served(handler()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(CONNECT + port.to_bytes(2, "big") + b"\0\0\0\x01\0localhost\0early")
                assert await peer.exactly(13) == b"\0\x5a" + bytes(6) + b"early"

    run(main())


def test_half_close_is_kept_both_ways() -> None:
    async def main() -> None:
        with Listening() as target:
            async with served(handler()) as address:
                with await Peer.connect(address) as peer:
                    await peer.send(CONNECT + target.address.port.to_bytes(2, "big") + b"\x7f\0\0\x01\0")
                    assert await peer.exactly(8) == b"\0\x5a" + bytes(6)
                    with await target.accept() as server:
                        await server.send(b"greeting")
                        server.shut()
                        assert await peer.rest() == b"greeting"
                        await peer.send(b"late words")
                        peer.shut()
                        assert await server.rest() == b"late words"

    run(main())


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\x04",
        b"\x05\x01\0",
        b"GET / HTTP/1.1\r\n\r\n",
        CONNECT + b"\0\x50\x7f\0\0\x01" + b"x" * 600,
        CONNECT + b"\0\x50\0\0\0\x01\0" + b"x" * 600,
        CONNECT + b"\0\x50\0\0\0\x01\0a\nb\0",
        b"\x04\x02\0\x50\x7f\0\0\x01\0",
        b"\x04\x09\0\x50\x7f\0\0\x01\0",
    ],
)
def test_nonsense_is_closed_without_a_reply(sent: bytes) -> None:
    async def main() -> None:
        async with served(handler()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(sent)
                peer.shut()
                assert await peer.rest() == b""

    run(main())


def test_a_client_that_falls_silent_is_closed_at_the_deadline() -> None:
    async def main() -> None:
        async with served(handler(read_timeout=0.1)) as address:
            with await Peer.connect(address) as peer:
                await peer.send(CONNECT + b"\0\x50")
                assert await peer.rest() == b""

    run(main())


@pytest.mark.parametrize(("option", "hashed"), [("", "127.0.0.1"), ("host", "192.0.2.1:80")])
def test_the_hash_is_of_the_client_or_of_the_target(option: str, hashed: str) -> None:
    async def main() -> None:
        way = Failing(DialRefused("no"))
        async with served(handler(hash=option), way) as address:
            with await Peer.connect(address) as peer:
                await peer.send(CONNECT + b"\0\x50\xc0\0\x02\x01\0")
                await peer.rest()
        assert way.flow.hash == hashed

    run(main())


# ---- the connector ------------------------------------------------------------------------------
def through(address: Endpoint, context: ConnectorContext | None = None, **options: float | bool) -> NodeEgress:
    connector = Socks4Connector(
        Socks4Connector.Options(**options),  # type: ignore[arg-type]
        context or ConnectorContext(resolver=Names()),
    )
    node = Node("proxy", address, Transport("tcp", StreamDialer()), connector)
    return NodeEgress(node, Direct(Names()))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("disable_4a", [False, True])
def test_the_connector_goes_through_the_handler(host: str, disable_4a: bool) -> None:
    async def main() -> None:
        async with echo_server() as port, served(handler()) as address:
            stream = await through(address, disable_4a=disable_4a).connect(Flow(), Endpoint(host, port))
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
            await stream.send_eof()
            assert await stream.receive() == b""
            await stream.aclose()

    run(main())


def test_an_empty_host_is_that_of_the_proxy() -> None:
    async def main() -> None:
        async with echo_server() as port, served(handler()) as address:
            stream = await through(address).connect(Flow(), Endpoint("", port))
            await stream.aclose()

    run(main())


def test_a_refusal_has_its_code_and_leaves_nothing_open() -> None:
    async def main() -> None:
        async with served(handler(), router()) as address:
            with pytest.raises(UpstreamRejected, match="rejected or failed") as caught:
                await through(address).connect(Flow(), Endpoint("127.0.0.1", closed_port()))
            assert caught.value.reply == 0x5B

    run(main())


def test_what_socks4_cannot_do_is_said_in_words() -> None:
    async def main() -> None:
        async with served(handler()) as address:
            way = through(address, disable_4a=True)
            with pytest.raises(DialError, match="disable4a off"):
                await way.connect(Flow(), Endpoint("::1", 80))
            with pytest.raises(ResolveError, match="nowhere"):
                await way.connect(Flow(), Endpoint("nowhere.example", 80))
            with pytest.raises(ResolveError, match="nothing to look names up with"):
                await through(address, ConnectorContext(), disable_4a=True).connect(Flow(), Endpoint("localhost", 80))
            with pytest.raises(DialError, match="no UDP"):
                await way.associate(Flow(), None)

    run(main())


def test_a_proxy_that_does_not_answer_is_given_up() -> None:
    async def main() -> None:
        with Listening() as target:
            with pytest.raises(DialTimeout, match=r"within 0\.1s"):
                await through(target.address, timeout=0.1).connect(Flow(), Endpoint("192.0.2.1", 80))
            with await target.accept() as peer:
                assert (await peer.rest()).startswith(CONNECT)

    run(main())
