"""SOCKS4 and SOCKS5 with the real gost on the other side, in both roles, TCP and UDP."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.errors import UpstreamRejected
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.sockets import SocketStream
from gostnet.core.stream import Stream
from gostnet.core.tasks import in_thread, run
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.node import Node, NodeEgress
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.socks4.connector import Socks4Connector
from gostnet.protocols.socks4.handler import Socks4Handler
from gostnet.protocols.socks5.connector import Socks5Connector
from gostnet.testing.processes import Process
from gostnet.transports.certificates import Certificates
from gostnet.transports.tls import TlsLayer, TlsStream

from ..vectors import PATIENCE, Listening, Names, Peer, UdpPeer, closed_port, echo_server, served
from .kit import Observed, Users

GOST = os.environ.get("GOST_BIN", "")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not GOST, reason="GOST_BIN is not set: it is the path of a gost binary"),
]

_LISTENING = re.compile(r"listening on 127\.0\.0\.1:([0-9]+)/(tcp|udp)")

# What a client and a server need to end up with each method of SOCKS5.
METHODS = [
    pytest.param("", "notls=true", id="00"),
    pytest.param("user:pass@", "notls=true", id="02"),
    pytest.param("", "", id="80"),
    pytest.param("user:pass@", "", id="82"),
]


@asynccontextmanager
async def gost(*words: str) -> AsyncIterator[dict[str, Endpoint]]:
    """Run gost; yield where it listens, by network. It has one service for each network at most."""
    process = Process([GOST, *words], name="gost")
    ports: dict[str, Endpoint] = {}

    def note(line: str) -> bool:
        if found := _LISTENING.search(line):
            ports[found[2]] = Endpoint("127.0.0.1", int(found[1]))
        return len(ports) == sum(word.startswith("-L") for word in words)

    try:
        await in_thread(process.start)
        await in_thread(process.wait_for, note)
        yield ports
    finally:
        await in_thread(process.stop)


def way(address: Endpoint, connector: Any) -> NodeEgress:
    return NodeEgress(Node("gost", address, Transport("tcp", StreamDialer()), connector), Direct(Names()))


def context(auth: str) -> ConnectorContext:
    user, _, password = auth.rstrip("@").partition(":")
    return ConnectorContext(
        username=user,
        password=Secret(password),
        tls=TlsLayer.for_client(None),
        name="127.0.0.1",
        direct=Direct(Names()),
    )


def ours(auth: str, metadata: str, **options: Any) -> Socks5Connector:
    made = Socks5Connector.Options(no_tls=bool(metadata), **options)
    return Socks5Connector(made, context(auth))


# ---- gost serves --------------------------------------------------------------------------------
@pytest.mark.parametrize(("auth", "metadata"), METHODS)
def test_our_connector_with_gost_as_the_proxy(auth: str, metadata: str) -> None:
    async def main() -> None:
        async with echo_server() as port, gost("-L", f"socks5://{auth}127.0.0.1:0?udp=true&{metadata}") as at:
            proxy = way(at["tcp"], ours(auth, metadata))
            for host in ("127.0.0.1", "localhost"):
                stream = await proxy.connect(Flow(), Endpoint(host, port))
                assert type(stream) is (SocketStream if metadata else TlsStream)
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
                await stream.send_eof()
                assert await stream.receive() == b""
                await stream.aclose()
            with pytest.raises(UpstreamRejected) as caught:
                await proxy.connect(Flow(), Endpoint("127.0.0.1", closed_port()))
            assert caught.value.reply == 3

            for relay in ("", "udp"):
                proxy = way(at["tcp"], ours(auth, metadata, relay=relay))
                target = Endpoint("127.0.0.1", port)
                association = await proxy.associate(Flow(), None)
                # Empty ones cannot travel over TCP; what follows them must not suffer.
                for data in (b"one", b"", bytes(4000), b"last"):
                    await association.send([Datagram(data, target)])
                    if data or relay:
                        async with asyncio.timeout(PATIENCE):
                            (answer,) = await association.receive()
                        assert (answer.data, answer.peer) == (data, target)
                await association.aclose()

    run(main())


def test_an_answer_after_our_half_close_comes_through_gost() -> None:
    async def main() -> None:
        with Listening() as target:
            async with gost("-L", "socks5://127.0.0.1:0?notls=true") as at:
                stream = await way(at["tcp"], ours("", "notls=true")).connect(Flow(), target.address)
                with await target.accept() as server:
                    await stream.send(b"question")
                    await stream.send_eof()
                    assert await server.rest() == b"question"
                    await server.send(b"answer")
                    server.shut()
                    assert await stream.receive() == b"answer"
                    assert await stream.receive() == b""
                await stream.aclose()

    run(main())


def test_wrong_credentials_are_refused_by_gost() -> None:
    async def main() -> None:
        async with gost("-L", "socks5://user:pass@127.0.0.1:0") as at:
            for auth, message in (("user:bad@", "does not accept the credentials"), ("", "none of the methods")):
                with pytest.raises(UpstreamRejected, match=message):
                    await way(at["tcp"], ours(auth, "")).connect(Flow(), Endpoint("127.0.0.1", 9))

    run(main())


@pytest.mark.parametrize("disable_4a", [False, True])
def test_our_socks4_connector_with_gost_as_the_proxy(disable_4a: bool) -> None:
    async def main() -> None:
        async with echo_server() as port, gost("-L", "socks4://127.0.0.1:0") as at:
            connector = Socks4Connector(
                Socks4Connector.Options(disable_4a=disable_4a), ConnectorContext(username="me", resolver=Names())
            )
            for host in ("127.0.0.1", "localhost"):
                stream = await way(at["tcp"], connector).connect(Flow(), Endpoint(host, port))
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
                await stream.aclose()
            with pytest.raises(UpstreamRejected) as caught:
                await way(at["tcp"], connector).connect(Flow(), Endpoint("127.0.0.1", closed_port()))
            assert caught.value.reply == 0x5B

    run(main())


# ---- gost asks ----------------------------------------------------------------------------------
class Counting:
    """A server's TLS layer that counts its uses."""

    def __init__(self, layer: TlsLayer) -> None:
        self._layer = layer
        self.uses = 0

    async def server(self, flow: Flow, below: Stream) -> Stream:
        self.uses += 1
        return await self._layer.server(flow, below)

    async def client(self, flow: Flow, below: Stream, name: str) -> Stream:
        raise AssertionError("a handler is no client")


@pytest.fixture(scope="module")
def server_tls(tmp_path_factory: pytest.TempPathFactory) -> TlsLayer:
    directory: Path = tmp_path_factory.mktemp("certificates")
    return TlsLayer.for_server(None, Certificates(working=directory, saved=directory))


async def _echo_through(at: Endpoint, data: bytes = b"hello") -> None:
    with await Peer.connect(at) as peer:
        await peer.send(data)
        assert await peer.exactly(len(data)) == data


@pytest.mark.parametrize(("auth", "metadata"), METHODS)
@pytest.mark.parametrize("relay", ["", "udp"])
def test_gost_with_our_handler_as_the_proxy(auth: str, metadata: str, relay: str, server_tls: TlsLayer) -> None:
    async def main() -> None:
        layer = Counting(server_tls)
        handler = Observed(users=Users() if auth else None, tls=layer, udp=True)
        async with echo_server() as port, served(handler) as address:
            chain = f"socks5://{auth}{address}?relay={relay}&{metadata}"
            forwards = [f"-L={network}://127.0.0.1:0/127.0.0.1:{port}?keepalive=true" for network in ("tcp", "udp")]
            async with gost(*forwards, "-F", chain) as at:
                await _echo_through(at["tcp"], bytes(range(256)) * 1000)
                flow, error = await handler.end()
                assert error is None
                assert flow.user == ("id-of-user" if auth else "")
                assert layer.uses == (0 if metadata else 1)
                with UdpPeer() as client:
                    for data in (b"one", bytes(4000), b"last"):
                        await client.send(data, at["udp"])
                        assert await client.receive() == (data, at["udp"])

    run(main())


def test_a_refusal_of_ours_is_understood_by_gost() -> None:
    async def main() -> None:
        handler = Observed()
        async with served(handler) as address:
            forward = f"-L=tcp://127.0.0.1:0/127.0.0.1:{closed_port()}"
            async with gost(forward, "-F", f"socks5://{address}?notls=true") as at:
                with await Peer.connect(at["tcp"]) as peer:
                    assert await peer.rest() == b""
                assert await handler.failure() is not None

    run(main())


@pytest.mark.parametrize("metadata", ["", "disable4a=true"])
def test_gost_with_our_socks4_handler_as_the_proxy(metadata: str) -> None:
    async def main() -> None:
        handler = Socks4Handler(Socks4Handler.Options(), HandlerContext())
        async with echo_server() as port, served(handler) as address:
            for host in ("127.0.0.1", "localhost"):
                forward = f"-L=tcp://127.0.0.1:0/{host}:{port}"
                async with gost(forward, "-F", f"socks4://me@{address}?{metadata}") as at:
                    await _echo_through(at["tcp"])

    run(main())


# ---- the same bytes -----------------------------------------------------------------------------
TRANSCRIPTS: list[tuple[str, list[str]]] = [
    ("nothing in common", ["050102"]),
    ("no methods", ["0500"]),
    ("the fifth method", ["0506010304050600", "05010001{echo}"]),
    ("BIND", ["050100", "05020001000000000000"]),
    ("MBIND", ["050100", "05f20001000000000000"]),
    ("UDP-TUN with a port", ["050100", "05f3000100000000fde8"]),
    ("RESOLVE", ["050100", "05f0000309" + b"localhost".hex() + "0000"]),
    ("RESOLVE_PTR", ["050100", "05f100017f0000010000"]),
    ("command 0", ["050100", "05000001{echo}"]),
    ("command 4", ["050100", "05040001{echo}"]),
    ("RSV", ["050100", "05017701{echo}"]),
    ("version in the request", ["050100", "04010001{echo}"]),
    ("address type", ["050100", "05010002{echo}"]),
    ("refused", ["050100", "050100017f0000010001"]),
    ("no such name", ["050100", "050100030f" + b"nowhere.invalid".hex() + "0050"]),
    ("connect", ["050100", "05010001{echo}"]),
    ("name", ["050100", "0501000309" + b"localhost".hex() + "{port}"]),
    ("empty name", ["050100", "0501000300{port}"]),
    ("UDP off", ["050100", "05030001000000000000"]),
    ("UDP-TUN off", ["050100", "05f30001000000000000"]),
]


async def _transcript(address: Endpoint, script: list[str], port: int) -> list[str]:
    """Return what a server answers to each line of the script; the bound port is left out."""
    fill = {"port": port.to_bytes(2, "big").hex(), "echo": "7f000001" + port.to_bytes(2, "big").hex()}
    answers: list[str] = []
    with await Peer.connect(address) as peer:
        for line in script:
            await peer.send(bytes.fromhex(line.format(**fill)))
            answer = await peer.receive()
            while 2 < len(answer) < 10 and (more := await peer.receive()):
                answer += more
            if answer[:2] == b"\x05\x00" and len(answer) >= 10:
                answer = answer[:-2]
            answers.append(answer.hex())
            if not answer:
                break
        peer.shut()
        answers.append((await peer.rest()).hex())
    return answers


@pytest.fixture(scope="module")
def transcripts() -> dict[str, tuple[list[str], list[str]]]:
    """Return what gost and we answer to every script."""

    async def main() -> dict[str, tuple[list[str], list[str]]]:
        found: dict[str, tuple[list[str], list[str]]] = {}
        async with echo_server() as port, gost("-L", "socks5://127.0.0.1:0?notls=true") as at:
            async with served(Observed(no_tls=True)) as address:
                for name, script in TRANSCRIPTS:
                    theirs = await _transcript(at["tcp"], script, port)
                    found[name] = (theirs, await _transcript(address, script, port))
        return found

    return run(main())


@pytest.mark.parametrize("name", [name for name, _ in TRANSCRIPTS])
def test_we_answer_as_gost(name: str, transcripts: dict[str, tuple[list[str], list[str]]]) -> None:
    theirs, mine = transcripts[name]
    assert mine == theirs
