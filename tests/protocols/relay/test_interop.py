"""Relay with the real gost on the other side of the wire, in both roles, over loopback."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.egress import Egress
from gostnet.core.errors import UpstreamRejected
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.stream import Stream
from gostnet.core.tasks import run, together
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.node import Node
from gostnet.protocols.relay.connector import RelayConnector
from gostnet.protocols.relay.handler import RelayHandler
from gostnet.testing.processes import Process
from gostnet.testing.servers import pattern
from gostnet.wire.udp_frames import decode_datagram, encode_datagram

from ..vectors import Listening, Names, Peer, UdpPeer, closed_port, echo_server, served
from .support import TCP

GOST = os.environ.get("GOST_BIN", "")

pytestmark = [pytest.mark.interop, pytest.mark.skipif(not GOST, reason="GOST_BIN is not set: a path of gost")]

NODELAY = pytest.mark.parametrize("nodelay", [False, True], ids=["lazy", "nodelay"])


def _announces(service: str, line: str) -> bool:
    return "listening on" in line and service in line


@contextmanager
def gost(*words: str) -> Iterator[list[Endpoint]]:
    """Run gost with listeners on port 0; yield their addresses in order."""
    with Process([GOST, *words], name="gost") as process:
        found: dict[str, Endpoint] = {}
        for index in range(words.count("-L")):
            service = f'"service":"service-{index}"'
            line = process.wait_for(partial(_announces, service))
            match = re.search(r"listening on ([0-9.]+):([0-9]+)", line)
            assert match is not None
            found[service] = Endpoint(match[1], int(match[2]))
        yield list(found.values())


def connector(*, user: str = "", password: str = "", **options: Any) -> RelayConnector:
    return RelayConnector(RelayConnector.Options(**options), ConnectorContext(username=user, password=Secret(password)))


async def connected(relay: Endpoint, target: Endpoint, made: RelayConnector) -> Stream:
    return await _node(relay, made).connect(Flow(), target)


async def associated(relay: Endpoint, target: Endpoint | None, made: RelayConnector) -> Datagrams:
    return await _node(relay, made).associate(Flow(), target)


def _node(relay: Endpoint, made: RelayConnector) -> Egress:
    return Node("relay", relay, TCP, made).over(Direct(Names()))


async def read_all(stream: Stream) -> bytes:
    parts = []
    while data := await stream.receive():
        parts.append(data)
    return b"".join(parts)


# ---- our connector, gost's handler --------------------------------------------------------------
@NODELAY
def test_a_late_answer_comes_back_through_gost(nodelay: bool) -> None:
    answer = pattern(200_000)

    async def main() -> None:
        with Listening() as target, gost("-L", f"relay://u:p@127.0.0.1:0?nodelay={nodelay}") as (relay,):
            made = connector(user="u", password="p", nodelay=nodelay)
            stream = await connected(relay, target.address, made)
            await stream.send(b"question")
            await stream.send_eof()
            with await target.accept() as server:
                assert await server.rest() == b"question"

                async def read() -> None:
                    assert await read_all(stream) == answer

                async def late() -> None:
                    await server.send(answer)
                    server.shut()

                await together(read(), late())
            stream.abort()

    run(main())


@NODELAY
def test_a_server_speaks_first_through_gost(nodelay: bool) -> None:
    async def main() -> None:
        with Listening() as target, gost("-L", f"relay://127.0.0.1:0?nodelay={nodelay}") as (relay,):

            async def client() -> None:
                stream = await connected(relay, target.address, connector(nodelay=nodelay))
                assert await stream.receive() == b"220 ready"
                await stream.send(b"QUIT")
                assert await stream.receive() == b""
                stream.abort()

            async def server() -> None:
                with await target.accept() as peer:
                    await peer.send(b"220 ready")
                    assert await peer.exactly(4) == b"QUIT"

            await together(client(), server())

    run(main())


def test_gosts_refusals_are_understood() -> None:
    async def main() -> None:
        nowhere = Endpoint("127.0.0.1", closed_port())
        with gost("-L", "relay://u:p@127.0.0.1:0", "-L", f"relay://127.0.0.1:0/{nowhere}") as (relay, forwarding):
            for at, user, status in ((relay, "u", 7), (relay, "x", 2), (forwarding, "", 6)):
                stream = await connected(at, nowhere, connector(user=user, password="p" if user else ""))
                with pytest.raises(UpstreamRejected) as caught:
                    await stream.receive()
                assert caught.value.reply == status
                stream.abort()
            with pytest.raises(UpstreamRejected) as caught:
                await associated(relay, None, connector(user="u", password="p"))
            assert caught.value.reply == 3

    run(main())


def test_a_gost_that_forwards_is_asked_for_its_own_target() -> None:
    async def main() -> None:
        async with echo_server() as port:
            with gost("-L", f"relay://127.0.0.1:0/127.0.0.1:{port}") as (relay,):
                stream = await connected(relay, Endpoint("", 0), connector())
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
                stream.abort()

    run(main())


@NODELAY
def test_datagrams_go_to_one_target_through_gost(nodelay: bool) -> None:
    async def main() -> None:
        async with echo_server() as port:
            target = Endpoint("localhost", port)
            with gost("-L", f"relay://127.0.0.1:0?nodelay={nodelay}") as (relay,):
                datagrams = await associated(relay, target, connector(nodelay=nodelay))
                for size in (1, 1400, 4000):
                    await datagrams.send([Datagram(bytes(size), target)])
                    (answer,) = await datagrams.receive()
                    assert (len(answer.data), answer.peer) == (size, target)
                datagrams.abort()

    run(main())


def test_datagrams_go_to_any_peer_through_gost() -> None:
    async def main() -> None:
        async with echo_server() as first, echo_server() as second:
            with gost("-L", "relay://u:p@127.0.0.1:0?bind=true") as (relay,):
                datagrams = await associated(relay, None, connector(user="u", password="p"))
                assert datagrams.local.port
                for port in (first, second, first):
                    await datagrams.send([Datagram(b"ping", Endpoint("127.0.0.1", port))])
                    (answer,) = await datagrams.receive()
                    assert (answer.data, answer.peer) == (b"ping", Endpoint("127.0.0.1", port))
                datagrams.abort()

    run(main())


# ---- gost's connector, our handler --------------------------------------------------------------
class Users:
    """Knows u:p."""

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        return username if (username, password) == ("u", "p") else None


def handler(**options: Any) -> RelayHandler:
    return RelayHandler(RelayHandler.Options(**options), HandlerContext(authenticator=Users()))


@NODELAY
def test_gost_connects_through_us(nodelay: bool) -> None:
    data = os.urandom(300_000)

    async def main() -> None:
        async with echo_server() as port, served(handler(nodelay=nodelay)) as relay:
            node = f"relay://u:p@{relay}?nodelay={nodelay}"
            with gost("-L", f"tcp://127.0.0.1:0/127.0.0.1:{port}", "-F", node) as (entry,):
                for _ in range(2):
                    with await Peer.connect(entry) as peer:

                        async def write(peer: Peer = peer) -> None:
                            await peer.send(data)

                        async def read(peer: Peer = peer) -> None:
                            assert await peer.exactly(len(data)) == data

                        await together(write(), read())

    run(main())


def test_gost_that_waits_keeps_half_close_through_us() -> None:
    """Without nodelay gost's own connector closes fully: nothing that we could better."""

    async def main() -> None:
        with Listening() as target:
            async with served(handler(nodelay=True)) as relay:
                node = f"relay://u:p@{relay}?nodelay=true"
                with gost("-L", f"tcp://127.0.0.1:0/{target.address}", "-F", node) as (entry,):
                    with await Peer.connect(entry) as client:
                        await client.send(b"question")
                        client.shut()
                        with await target.accept() as server:
                            assert await server.rest() == b"question"
                            await server.send(b"late")
                            server.shut()
                            assert await client.rest() == b"late"

    run(main())


def test_gost_sees_our_refusals() -> None:
    async def main() -> None:
        async with served(handler()) as relay:
            for user, port in (("u:p@", closed_port()), ("u:wrong@", closed_port())):
                node = f"relay://{user}{relay}"
                with gost("-L", f"tcp://127.0.0.1:0/127.0.0.1:{port}", "-F", node) as (entry,):
                    with await Peer.connect(entry) as peer:
                        await peer.send(b"anyone?")
                        assert await peer.rest() == b""

    run(main())


@NODELAY
def test_gost_sends_datagrams_to_one_target_through_us(nodelay: bool) -> None:
    async def main() -> None:
        async with echo_server() as port, served(handler(nodelay=nodelay)) as relay:
            entry_url = f"udp://127.0.0.1:0/127.0.0.1:{port}?keepalive=true&ttl=30s"
            with gost("-L", entry_url, "-F", f"relay://u:p@{relay}?nodelay={nodelay}") as (entry,):
                with UdpPeer() as peer:
                    for size in (1, 1400, 4000):
                        await peer.send(bytes(size), entry)
                        data, _ = await peer.receive()
                        assert len(data) == size

    run(main())


def test_gost_opens_associations_through_us() -> None:
    async def main() -> None:
        async with echo_server() as first, echo_server() as second, served(handler(bind=True)) as relay:
            with gost("-L", "socks5://127.0.0.1:0?udp=true", "-F", f"relay://u:p@{relay}") as (entry,):
                with await Peer.connect(entry) as control, UdpPeer() as peer:
                    await control.send(b"\x05\x01\x00")
                    assert await control.exactly(2) == b"\x05\x00"
                    await control.send(bytes.fromhex("05030001000000000000"))
                    reply = await control.exactly(10)
                    assert reply[:4] == b"\x05\0\0\x01"
                    inside = Endpoint("127.0.0.1", int.from_bytes(reply[8:], "big"))
                    for there in (Endpoint("127.0.0.1", first), Endpoint("localhost", second)):
                        await peer.send(encode_datagram(b"ping", there), inside)
                        data, source = decode_datagram((await peer.receive())[0])
                        assert (data, source) == (b"ping", Endpoint("127.0.0.1", there.port))

    run(main())
