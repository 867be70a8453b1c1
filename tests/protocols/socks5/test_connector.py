"""The SOCKS5 connector through the handler, in the clear and inside TLS; and against proxies that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.errors import (
    ConnError,
    DialError,
    DialTimeout,
    EndOfStream,
    GostnetError,
    ProtocolError,
    UpstreamRejected,
)
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.sockets import SocketStream
from gostnet.core.tasks import run
from gostnet.core.udp_socket import UdpSocket, listen_udp, open_udp
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.node import Node, NodeEgress
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.socks5.associate import ClientDatagrams, RelayedDatagrams
from gostnet.protocols.socks5.connector import Socks5Connector
from gostnet.testing import check_datagrams
from gostnet.transports.certificates import Certificates
from gostnet.transports.tls import TlsLayer, TlsStream

from ..vectors import PATIENCE, Listening, Names, Peer, UdpPeer, closed_port, echo_server, served
from .kit import Observed, Users, request

ZERO_REPLY = bytes.fromhex("05000001000000000000")


@pytest.fixture(scope="module")
def server_tls(tmp_path_factory: pytest.TempPathFactory) -> TlsLayer:
    """Return the layer of a service without certificates of its own."""
    directory: Path = tmp_path_factory.mktemp("certificates")
    return TlsLayer.for_server(None, Certificates(working=directory, saved=directory))


def connector(user: str = "", password: str = "", tls: bool = False, **options: float | str | bool) -> Socks5Connector:
    context = ConnectorContext(
        username=user,
        password=Secret(password),
        tls=TlsLayer.for_client(None) if tls else None,
        name="127.0.0.1",
        direct=Direct(Names()),
    )
    return Socks5Connector(Socks5Connector.Options(**options), context)  # type: ignore[arg-type]


def through(address: Endpoint, made: Socks5Connector) -> NodeEgress:
    return NodeEgress(Node("proxy", address, Transport("tcp", StreamDialer()), made), Direct(Names()))


async def _several(datagrams: Datagrams, count: int) -> list[tuple[bytes, Endpoint]]:
    found: list[tuple[bytes, Endpoint]] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < count:
            found += [(bytes(datagram.data), datagram.peer) for datagram in await datagrams.receive()]
    return found


async def _next(datagrams: Datagrams) -> tuple[bytes, Endpoint]:
    (one,) = await _several(datagrams, 1)
    return one


ways = pytest.mark.parametrize(
    ("user", "tls"), [("", False), ("user", False), ("", True), ("user", True)], ids=["00", "02", "80", "82"]
)


@ways
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_streams_go_through_every_method(user: str, tls: bool, host: str, server_tls: TlsLayer) -> None:
    async def main() -> None:
        handler = Observed(users=Users() if user else None, tls=server_tls)
        async with echo_server() as port, served(handler) as address:
            stream = await through(address, connector(user, "pass", tls)).connect(Flow(), Endpoint(host, port))
            assert type(stream) is (TlsStream if tls else SocketStream), "nothing remains around the connection"
            data = bytes(range(256)) * 2000
            async with asyncio.TaskGroup() as group:

                async def write() -> None:
                    await stream.send(data)
                    await stream.send_eof()

                group.create_task(write())
                received = b""
                while piece := await stream.receive():
                    received += piece
            assert received == data
            await stream.aclose()
            flow, error = await handler.end()
            assert error is None
            assert flow.user == ("id-of-user" if user else "")

    run(main())


@ways
@pytest.mark.parametrize("relay", ["", "udp"])
def test_datagrams_go_through_every_method(user: str, tls: bool, relay: str, server_tls: TlsLayer) -> None:
    async def main() -> None:
        handler = Observed(users=Users() if user else None, tls=server_tls, udp=True)
        async with echo_server() as one, echo_server() as two, served(handler) as address:
            way = through(address, connector(user, "pass", tls, relay=relay))
            anywhere = await way.associate(Flow(), None)
            for port in (one, two):
                target = Endpoint("127.0.0.1", port)
                await anywhere.send([Datagram(bytes(5000), target)])
                assert await _next(anywhere) == (bytes(5000), target)
            await anywhere.aclose()
            _, error = await handler.end()
            assert error is None
            # With a target, names included, that is what every datagram is said to come from.
            target = Endpoint("localhost", one)
            fixed = await way.associate(Flow(), target)
            await fixed.send([Datagram(b"x", Endpoint("192.0.2.1", 9)), Datagram(b"yyzz", target, 2)])
            assert sorted(await _several(fixed, 3)) == [(b"x", target), (b"yy", target), (b"zz", target)]
            fixed.abort()
            await handler.end()

    run(main())


def test_tls_keeps_a_half_close_both_ways(server_tls: TlsLayer) -> None:
    async def main() -> None:
        with Listening() as target:
            async with served(Observed(tls=server_tls)) as address:
                stream = await through(address, connector(tls=True)).connect(Flow(), target.address)
                with await target.accept() as server:
                    await stream.send(b"question")
                    await stream.send_eof()
                    assert await server.rest() == b"question"
                    await server.send(b"late answer")
                    server.shut()
                    assert await stream.receive() == b"late answer"
                    assert await stream.receive() == b""
                await stream.aclose()

    run(main())


def test_a_refusal_inside_tls_is_read(server_tls: TlsLayer) -> None:
    async def main() -> None:
        async with served(Observed(users=Users(), tls=server_tls)) as address:
            with pytest.raises(UpstreamRejected, match=r"network unreachable \(3\)") as caught:
                await through(address, connector("user", "pass", True)).connect(
                    Flow(), Endpoint("127.0.0.1", closed_port())
                )
            assert caught.value.reply == 3
            with pytest.raises(UpstreamRejected, match="does not accept the credentials"):
                await through(address, connector("user", "bad", True)).connect(Flow(), Endpoint("192.0.2.1", 9))

    run(main())


def test_a_tls_handshake_that_never_comes_hits_the_deadline(server_tls: TlsLayer) -> None:
    async def main() -> None:
        handler = Observed(tls=server_tls, read_timeout=0.2)
        async with served(handler) as address:
            for sent in (b"", b"\x16\x03\x01\x00"):
                with await Peer.connect(address) as peer:
                    await peer.send(b"\x05\x01\x80" + sent)
                    assert await peer.rest() == b"\x05\x80"
                assert "no request within" in str(await handler.failure())
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x80" + b"\x05\x01\x00\x01\x7f\0\0\x01\0\x50")
                assert (await peer.rest())[:2] == b"\x05\x80"
            assert isinstance(await handler.failure(), GostnetError)

    run(main())


@pytest.mark.parametrize("no_tls", [False, True])
def test_notls_is_kept_by_both_sides(no_tls: bool, server_tls: TlsLayer) -> None:
    async def main() -> None:
        async with served(Observed(tls=server_tls, no_tls=no_tls)) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x02\x00\x80")
                assert await peer.exactly(2) == (b"\x05\x00" if no_tls else b"\x05\x80")
        with Listening() as proxy:
            way = through(proxy.address, connector("user", "pass", True, no_tls=no_tls))

            async def ask() -> None:
                with pytest.raises(EndOfStream):
                    await way.connect(Flow(), Endpoint("192.0.2.1", 9))

            async with asyncio.TaskGroup() as group:
                group.create_task(ask())
                with await proxy.accept() as peer:
                    offered = b"\x05\x02\x00\x02" if no_tls else b"\x05\x04\x00\x02\x80\x82"
                    assert await peer.exactly(len(offered)) == offered

    run(main())


# ---- proxies that misbehave ---------------------------------------------------------------------
@asynccontextmanager
async def scripted(*script: tuple[int, bytes]) -> AsyncIterator[Endpoint]:
    """Be a proxy that reads so many bytes and answers, step by step, then waits for the client's end."""
    with Listening() as proxy:

        async def serve() -> None:
            with await proxy.accept() as peer:
                for count, answer in script:
                    await peer.exactly(count)
                    await peer.send(answer)
                peer.shut()
                await peer.rest()

        async with asyncio.TaskGroup() as group:
            group.create_task(serve())
            yield proxy.address


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ([(3, b"")], EndOfStream, "closed during the handshake"),
        ([(3, b"\x05")], EndOfStream, "closed during the handshake"),
        ([(3, b"HTTP/1.1 400 Bad Request\r\n\r\n")], ProtocolError, "version 72"),
        ([(3, b"\x05\xff")], UpstreamRejected, "takes none of the methods"),
        ([(3, b"\x05\x03")], ProtocolError, "was not offered"),
        ([(3, b"\x05\x00"), (10, b"")], EndOfStream, "closed during the handshake"),
        ([(3, b"\x05\x00"), (10, b"\x05\x05")], UpstreamRejected, r"refuses 192\.0\.2\.1:9: connection refused"),
        ([(3, b"\x05\x00"), (10, b"\x05\x00\x00\x07")], EndOfStream, "closed"),
    ],
)
def test_a_proxy_that_makes_no_sense_is_refused_and_closed(
    script: list[tuple[int, bytes]], error: type[GostnetError], message: str
) -> None:
    async def main() -> None:
        async with scripted(*script) as address:
            with pytest.raises(error, match=message):
                await through(address, connector()).connect(Flow(), Endpoint("192.0.2.1", 9))

    run(main())


def test_what_the_target_says_first_is_kept() -> None:
    async def main() -> None:
        async with scripted((3, b"\x05\x00"), (10, ZERO_REPLY + b"220 ready")) as address:
            stream = await through(address, connector()).connect(Flow(), Endpoint("192.0.2.1", 9))
            assert await stream.receive() == b"220 ready"
            await stream.aclose()

    run(main())


@pytest.mark.parametrize("steps", [0, 1])
def test_a_proxy_that_does_not_answer_is_given_up(steps: int) -> None:
    async def main() -> None:
        script = [(3, b"\x05\x00")][:steps]
        with Listening() as proxy:

            async def ask() -> None:
                with pytest.raises(DialTimeout, match=r"within 0\.1s"):
                    await through(proxy.address, connector(timeout=0.1)).connect(Flow(), Endpoint("192.0.2.1", 9))

            async with asyncio.TaskGroup() as group:
                group.create_task(ask())
                with await proxy.accept() as peer:
                    for count, answer in script:
                        await peer.exactly(count)
                        await peer.send(answer)
                    await peer.rest()

    run(main())


def test_credentials_that_can_never_be_sent_are_refused_at_once() -> None:
    with pytest.raises(ProtocolError, match="at most 255 bytes"):
        connector("user", "x" * 256)


# ---- relay=udp ----------------------------------------------------------------------------------
def test_an_unspecified_relay_address_is_the_proxys() -> None:
    async def main() -> None:
        with UdpPeer() as relay:
            reply = b"\x05\x00\x00\x01\0\0\0\0" + relay.address.port.to_bytes(2, "big")
            with Listening() as proxy:

                async def serve() -> Peer:
                    peer = await proxy.accept()
                    assert await peer.exactly(3) == b"\x05\x01\x00"
                    await peer.send(b"\x05\x00")
                    assert await peer.exactly(10) == request(3, Endpoint("0.0.0.0", 0))
                    await peer.send(reply)
                    return peer

                async with asyncio.TaskGroup() as group:
                    serving = group.create_task(serve())
                    way = through(proxy.address, connector(relay="udp"))
                    association = await way.associate(Flow(), Endpoint("192.0.2.1", 9))
                with serving.result() as peer:
                    await association.send([Datagram(b"hi", Endpoint("192.0.2.1", 9))])
                    data, sender = await relay.receive()
                    assert data == b"\0\0\0\x01\xc0\0\x02\x01\0\x09hi"
                    # Nonsense costs itself only; then the end of the control connection ends it all.
                    for odd in (b"", b"\0\0\0\x05", b"\0\0\0\x01\xc0\0\x02\x01\0\x09good"):
                        await relay.send(odd, sender)
                    assert await _next(association) == (b"good", Endpoint("192.0.2.1", 9))
                    peer.shut()
                    assert list(await association.receive()) == []
                    assert list(await association.receive()) == []
                    await association.send([Datagram(b"too late", Endpoint("192.0.2.1", 9))])
                await association.aclose()

    run(main())


def test_an_association_on_no_port_is_refused() -> None:
    async def main() -> None:
        async with scripted((3, b"\x05\x00"), (10, ZERO_REPLY)) as address:
            with pytest.raises(ProtocolError, match="for UDP"):
                await through(address, connector(relay="udp")).associate(Flow(), None)

    run(main())


def test_udp_that_the_proxy_does_not_allow_is_an_error() -> None:
    async def main() -> None:
        for relay in ("", "udp"):
            async with served(Observed()) as address:
                with pytest.raises(UpstreamRejected, match="refuses UDP: not allowed") as caught:
                    await through(address, connector(relay=relay)).associate(Flow(), None)
                assert caught.value.reply == 2

    run(main())


def test_without_a_direct_way_there_is_no_relay_by_udp() -> None:
    async def main() -> None:
        reply = b"\x05\x00\x00\x01\x7f\0\0\x01\x00\x09"
        async with scripted((3, b"\x05\x00"), (10, reply)) as address:
            made = Socks5Connector(Socks5Connector.Options(relay="udp"), ConnectorContext())
            with pytest.raises(DialError, match="no direct way"):
                await through(address, made).associate(Flow(), None)

    run(main())


def test_an_idle_association_ends_and_a_used_one_does_not() -> None:
    async def main() -> None:
        handler = Observed(udp=True)
        async with echo_server() as port, served(handler) as address:
            target = Endpoint("127.0.0.1", port)
            association = await through(address, connector(relay="udp", udp_timeout=0.3)).associate(Flow(), target)
            loop = asyncio.get_running_loop()
            began = loop.time()
            while loop.time() - began < 0.6:
                await association.send([Datagram(b"x", target)])
                assert await _next(association) == (b"x", target)
                await asyncio.sleep(0.05)
            last = loop.time()
            assert list(await association.receive()) == []
            assert loop.time() - last > 0.2
            _, error = await handler.end()
            assert error is None, "the control connection is closed with it"
            await association.aclose()

    run(main())


def test_both_sides_of_an_association_do_what_all_datagrams_do() -> None:
    @asynccontextmanager
    async def pair() -> AsyncIterator[tuple[Datagrams, Datagrams]]:
        with Listening() as proxy:
            control = await Direct(Names()).connect(Flow(), proxy.address)
            with await proxy.accept():
                sock = listen_udp(Endpoint("127.0.0.1", 0))
                inner = UdpSocket(sock, Endpoint.from_sockaddr(sock.getsockname()))
                near: Datagrams = RelayedDatagrams(control, open_udp(inner.local), None)
                far: Datagrams = ClientDatagrams(inner, "127.0.0.1")
                # The handler's side speaks to whoever has spoken.
                await near.send([Datagram(b"first", inner.local)])
                await far.receive()
                yield near, far

    run(check_datagrams(pair))


def test_an_association_that_is_aborted_refuses_further_use() -> None:
    async def main() -> None:
        handler = Observed(udp=True)
        async with served(handler) as address:
            association = await through(address, connector(relay="udp")).associate(Flow(), None)
            association.abort()
            with pytest.raises(ConnError):
                await association.receive()
            await handler.end()

    run(main())
