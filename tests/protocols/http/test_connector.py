"""The HTTP connector against peers that behave, and peers that do not."""

from __future__ import annotations

import asyncio

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.errors import (
    ConfigError,
    DialTimeout,
    EndOfStream,
    GostnetError,
    ProtocolError,
    UpstreamRejected,
)
from gostnet.core.flow import Flow
from gostnet.core.options import Secret, bind_options
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.chain import Chain
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Node
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.http.connector import HttpConnector
from gostnet.testing.memory import Trickle, stream_pair

from ..vectors import PATIENCE, UdpPeer, echo_server, served
from .kit import Renamed, Users, Visit, Watched, answer_to, origin, way_out

OK = b"HTTP/1.1 200 Connection established\r\n\r\n"
TARGET = Endpoint("a.test", 443)


def connector(username: str = "", password: str = "", **options: object) -> HttpConnector:
    return HttpConnector(bind_options(HttpConnector.Options, options), ConnectorContext(username, Secret(password)))


def through(made: HttpConnector, proxy: Endpoint) -> Chain:
    """Return a chain of one node."""
    node = Node("proxy", proxy, Transport("tcp", StreamDialer()), made)
    return Chain("chain", [Hop("hop", [node])], Renamed({}))


@pytest.mark.parametrize("piece", [0, 1])
def test_bytes_behind_the_answer_are_kept(piece: int) -> None:
    """HT24: a server that speaks first may do so in the segment of the answer; GOST loses that."""

    async def main() -> None:
        ours, theirs = stream_pair()
        await theirs.send(OK + b"220 smtp.test")
        below: Stream = Trickle(ours) if piece else ours
        stream = await connector().connect(Flow(), below, TARGET)
        assert stream is below
        seen = b""
        while len(seen) < 13:
            seen += await stream.receive()
        assert seen == b"220 smtp.test"
        ours.abort()
        theirs.abort()

    run(main())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", EndOfStream),
        (b"HTTP/1.1 200 OK\r\n", EndOfStream),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", UpstreamRejected),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", UpstreamRejected),
        (b"SSH-2.0-OpenSSH\r\n\r\n\r\n", ProtocolError),
        (b"x" * 300000, ProtocolError),
    ],
)
def test_answers_that_are_no_yes(answer: bytes, error: type[GostnetError]) -> None:
    async def answering(visit: Visit) -> None:
        await visit.head()
        await visit.send(answer)

    async def main() -> None:
        async with origin(answering) as proxy:
            chain = through(connector(), Endpoint("127.0.0.1", proxy.port))
            for udp in (False, True):
                route = chain.route(Flow(), TARGET, 0.0)
                assert route is not None
                with pytest.raises(error) as caught:
                    if udp:
                        await route.associate(Flow(), None)
                    else:
                        await route.connect(Flow(), TARGET)
                if isinstance(caught.value, UpstreamRejected):
                    assert caught.value.reply == int(answer[9:12])

    run(main())


def test_proxy_that_does_not_answer_in_time() -> None:
    async def silent(visit: Visit) -> None:
        await visit.head()
        await visit.rest()

    async def main() -> None:
        async with origin(silent) as proxy:
            chain = through(connector(timeout="50ms"), Endpoint("127.0.0.1", proxy.port))
            route = chain.route(Flow(), TARGET, 0.0)
            assert route is not None
            with pytest.raises(DialTimeout):
                await route.connect(Flow(), TARGET)

    run(main())


def test_configured_fields_are_checked() -> None:
    with pytest.raises(ConfigError):
        bind_options(HttpConnector.Options, {"header": {"X": "a\nb"}})


def test_configured_fields_stay_with_their_request() -> None:
    """HT26: GOST's map is shared: after one association every CONNECT asks for UDP too."""

    async def main() -> None:
        made = connector(header={"X-A": "1"})
        for udp in (True, False):
            ours, theirs = stream_pair()
            await theirs.send(OK)
            if udp:
                await made.associate(Flow(), ours, TARGET)
            else:
                await made.connect(Flow(), ours, TARGET)
            sent = await theirs.receive()
            assert b"\r\nX-A: 1\r\n" in sent
            assert (b"X-Gost-Protocol" in sent) is udp
            ours.abort()
            theirs.abort()

    run(main())


# ---- our handler behind our connector -----------------------------------------------------------
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tcp_through_our_own_handler(host: str) -> None:
    async def main() -> None:
        async with echo_server() as port, served(Watched(users=Users()), way_out()) as address:
            chain = through(connector("user", "pass"), address)
            async with served(Watched(), way_out(chains=chain)) as front:
                request = b"CONNECT %b:%d HTTP/1.1\r\n\r\nhello" % (host.encode(), port)
                assert (await answer_to(front, request, shut=True)).endswith(b"\r\n\r\nhello")
            wrong = through(connector("user", "wrong"), address)
            async with served(Watched(), way_out(chains=wrong)) as front:
                assert (await answer_to(front, request)).startswith(b"HTTP/1.1 503 ")

    run(main())


def test_udp_through_our_own_handler() -> None:
    async def main() -> None:
        handler = Watched({"udp": True})
        async with served(handler, way_out()) as address:
            chain = through(connector(), address)
            with UdpPeer() as peer:
                for target in (peer.address, None):
                    flow = Flow()
                    route = chain.route(flow, peer.address, 0.0)
                    assert route is not None
                    association = await route.associate(flow, target)
                    await association.send([Datagram(b"one", peer.address), Datagram(b"two", peer.address)])
                    assert (await peer.receive())[0] == b"one"
                    data, sender = await peer.receive()
                    assert data == b"two"
                    await peer.send(b"three", sender)
                    async with asyncio.timeout(PATIENCE):
                        (answer,) = await association.receive()
                    assert (bytes(answer.data), answer.peer) == (b"three", peer.address)
                    await association.aclose()
                    assert (await handler.end())[1] is None

    run(main())


def test_udp_that_the_proxy_refuses() -> None:
    async def main() -> None:
        async with served(Watched(), way_out()) as address:
            route = through(connector(), address).route(Flow(), TARGET, 0.0)
            assert route is not None
            with pytest.raises(UpstreamRejected) as caught:
                await route.associate(Flow(), None)
            assert caught.value.reply == 403

    run(main())


def test_names_that_cannot_be_asked_for() -> None:
    async def main() -> None:
        ours, theirs = stream_pair()
        with pytest.raises(ProtocolError):
            await connector().connect(Flow(), ours, Endpoint("a b", 80))
        assert ours.sent == 0
        ours.abort()
        theirs.abort()

    run(main())


def test_names_travel_as_they_are() -> None:
    async def main() -> None:
        ours, theirs = stream_pair()
        await theirs.send(OK)
        await connector().connect(Flow(), ours, TARGET)
        assert (await theirs.receive()).startswith(b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n")
        ours.abort()
        theirs.abort()

    run(main())
