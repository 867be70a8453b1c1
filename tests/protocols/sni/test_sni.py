"""The sni handler and connector: names, disguises, recorded dialogues, and TLS from end to end."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.errors import ConfigError, DialError
from gostnet.core.flow import Flow
from gostnet.core.options import bind_options
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.chain import Chain
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Node
from gostnet.pipeline.router import ServiceRouter
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.policies.bypass import PatternBypass
from gostnet.protocols.forward.handler import ForwardHandler
from gostnet.protocols.sni.codec import Disguise, disguise_head, disguise_hello, reveal
from gostnet.protocols.sni.connector import SniConnector
from gostnet.protocols.sni.handler import SniHandler
from gostnet.testing import stream_pair
from gostnet.testing.certificates import Authority
from gostnet.wire.client_hello import parse_client_hello

from ..vectors import Listening, Names, Peer, load, replay_server, served

COVER = b"cover.example"
CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def hello(name: str = "secret.test") -> bytes:
    outgoing = ssl.MemoryBIO()
    tls = CONTEXT.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


HELLO = hello()


def get(host: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 4\r\n\r\nbody".encode()


class Rerouted(ServiceRouter):
    """A way out that notes where to, and goes to one server."""

    def __init__(self, server: Endpoint, *bypassed: str) -> None:
        super().__init__(Direct(Names()), bypass=PatternBypass.from_patterns(bypassed) if bypassed else None)
        self._server = server
        self.asked: list[Endpoint] = []

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        self.asked.append(target)
        self.admit(flow, target)
        return await super().connect(flow, self._server)


def handler(**metadata: object) -> SniHandler:
    return SniHandler(bind_options(SniHandler.Options, metadata), HandlerContext())


# ---- codec ----------------------------------------------------------------------------------------
@given(st.from_regex(r"[a-z][a-z0-9]{0,30}(\.[a-z]{1,20}){0,4}\.secret", fullmatch=True))
def test_disguise_comes_off_without_a_trace(name: str) -> None:
    first = hello(name) + b"more"
    hidden = disguise_hello(first, COVER)
    assert name.encode() not in hidden
    size = int.from_bytes(hidden[3:5], "big")
    assert parse_client_hello(hidden[5 : 5 + size]).server_name == "cover.example"
    assert reveal(hidden) == first


@pytest.mark.parametrize("host", ["secret.test", "secret.test:8080", "[2001:db8::1]:80"])
def test_disguise_of_a_request_comes_off_without_a_trace(host: str) -> None:
    hidden = disguise_head(get(host), COVER)
    assert b"Host: cover.example\r\n" in hidden
    assert host.encode() not in hidden
    assert reveal(hidden) == get(host)


@pytest.mark.parametrize(
    "data", [b"", b"\x16", b"SSH-2.0-x\r\n", hello()[:60], hello(), get("a.test"), b"GET / HTTP/1.1\r\n\r\n"]
)
def test_what_has_no_disguise_stays_as_it_is(data: bytes) -> None:
    assert reveal(data) == data


def test_a_damaged_disguise_counts_as_none() -> None:
    hidden = disguise_hello(hello(), COVER)
    damaged = hidden[:-1] + bytes((hidden[-1] ^ 1,))
    assert reveal(damaged) == damaged


@given(st.binary(max_size=200), st.integers(0, 517))
def test_reveal_never_raises(noise: bytes, at: int) -> None:
    hidden = disguise_hello(hello("a.test"), COVER)
    reveal(noise)
    reveal(hidden[:at] + noise)


@pytest.mark.parametrize("first", [hello(), get("secret.test")])
def test_first_bytes_are_held_until_the_name_is_there(first: bytes) -> None:
    disguise = Disguise(COVER)
    end = first.index(b"body") if b"body" in first else len(first)
    for index in range(end - 1):
        assert disguise.feed(first[index : index + 1]) is None
    sent = disguise.feed(first[end - 1 : end])
    assert sent is not None
    assert COVER in sent
    assert b"secret.test" not in sent


def test_requests_of_one_connection_go_each_to_its_own_host() -> None:
    async def main() -> None:
        with Listening() as server:
            egress = Rerouted(server.address, "bad.test")
            async with served(handler(hash="host"), egress) as address:
                with await Peer.connect(address) as client:
                    for host, following in (("a.test", "b.test"), ("b.test", "bad.test")):
                        if host == "a.test":
                            await client.send(get(host))
                        with await server.accept() as target:
                            assert await target.exactly(len(get(host))) == get(host)
                            await target.send(b"answer")
                            assert await client.exactly(6) == b"answer"
                            await client.send(get(following))
                            assert await target.rest() == b""
                    assert (await client.rest()).startswith(b"HTTP/1.1 403 ")
            assert egress.asked[:2] == [Endpoint("a.test", 80), Endpoint("b.test", 80)]

    run(main())


@pytest.mark.parametrize("first", [b"SSH-2.0-x\r\nmore", b"\x16\x09", b"\x00"])
def test_other_protocols_pass_at_once(first: bytes) -> None:
    assert Disguise(COVER).feed(first) == first


def recorded(name: str) -> bytes:
    path = Path(__file__).parents[2] / "data" / "vectors" / f"{name}.json"
    return bytes.fromhex(json.loads(path.read_text())["steps"][0]["hex"])


@pytest.mark.parametrize(("name", "real"), [("sni-tls", b"localhost"), ("sni-http", b"localhost:8000")])
def test_disguise_is_the_recorded_one(name: str, real: bytes) -> None:
    hidden = recorded(name)
    shown = reveal(hidden)
    assert real in shown
    assert COVER not in shown
    put = disguise_hello(shown, COVER) if name == "sni-tls" else disguise_head(shown, COVER)
    assert put == hidden


# ---- handler --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("first", "sent", "to"),
    [
        (HELLO, HELLO, Endpoint("secret.test", 443)),
        (get("a.test"), get("a.test"), Endpoint("a.test", 80)),
        (get("a.test:81"), get("a.test:81"), Endpoint("a.test", 81)),
        (disguise_head(get("a.test:81"), COVER), get("a.test:81"), Endpoint("a.test", 81)),
        (recorded("sni-http"), reveal(recorded("sni-http")), Endpoint("localhost", 8000)),
        (recorded("sni-tls"), reveal(recorded("sni-tls")), Endpoint("localhost", 443)),
        (recorded("sni-tls-plain"), recorded("sni-tls-plain"), Endpoint("localhost", 443)),
    ],
    ids=["tls", "http", "http port", "disguised", "recorded http", "recorded tls", "recorded plain"],
)
def test_connection_goes_to_the_name_with_the_bytes_that_its_client_made(
    first: bytes, sent: bytes, to: Endpoint
) -> None:
    async def main() -> None:
        with Listening() as server:
            egress = Rerouted(server.address)
            async with served(handler(), egress) as address:
                with await Peer.connect(address) as client:
                    await client.send(first[:9])
                    await client.send(first[9:])
                    with await server.accept() as target:
                        assert await target.exactly(len(sent)) == sent
                        await target.send(b"answer")
                        assert await client.exactly(6) == b"answer"
            assert egress.asked == [to]

    run(main())


@pytest.mark.parametrize("first", [b"SSH-2.0-x\r\n", b"GET / HTTP/1.0\r\n\r\n", b"\x00", b"*1\r\n", b""])
def test_client_that_names_nobody_is_closed_without_an_answer(first: bytes) -> None:
    async def main() -> None:
        async with served(handler(), Rerouted(Endpoint("192.0.2.1", 1))) as address:
            with await Peer.connect(address) as client:
                await client.send(first)
                client.shut()
                assert await client.rest() == b""

    run(main())


def test_silent_client_is_closed_when_its_time_is_up() -> None:
    async def main() -> None:
        async with served(handler(readTimeout="50ms"), Rerouted(Endpoint("192.0.2.1", 1))) as address:
            with await Peer.connect(address) as client:
                assert await client.rest() == b""

    run(main())


def test_time_for_the_hello_does_not_bound_what_follows() -> None:
    async def main() -> None:
        with Listening() as server:
            async with served(handler(readTimeout="50ms"), Rerouted(server.address)) as address:
                with await Peer.connect(address) as client:
                    await client.send(hello())
                    with await server.accept() as target:
                        await target.exactly(len(hello()))
                        await asyncio.sleep(0.1)  # twice the time, which is what is tested
                        await client.send(b"later")
                        assert await target.exactly(5) == b"later"

    run(main())


def test_bypassed_name_is_refused() -> None:
    async def main() -> None:
        with Listening() as server:
            async with served(handler(), Rerouted(server.address, "*.test")) as address:
                with await Peer.connect(address) as client:
                    await client.send(hello())
                    assert await client.rest() == b""
                with await Peer.connect(address) as client:
                    await client.send(get("a.test"))
                    assert (await client.rest()).startswith(b"HTTP/1.1 403 ")

    run(main())


# ---- connector ------------------------------------------------------------------------------------
def connector(**metadata: object) -> SniConnector:
    return SniConnector(bind_options(SniConnector.Options, metadata), ConnectorContext())


def test_without_a_cover_nothing_stays_around_the_stream() -> None:
    async def main() -> None:
        below, _ = stream_pair()
        assert await connector().connect(Flow(), below, Endpoint("a.test", 443)) is below
        with pytest.raises(DialError):
            await connector().associate(Flow(), below, None)

    run(main())


def test_cover_is_put_on_and_then_nothing_stays_around_the_stream() -> None:
    async def main() -> None:
        below, peer = stream_pair()
        stream = await connector(host="cover.example").connect(Flow(), below, Endpoint("a.test", 443))
        assert stream.transparent_over() is None
        await stream.send(hello()[:20])
        await stream.send(hello()[20:] + b"more")
        assert stream.transparent_over() is below
        got = await peer.receive()
        assert got.endswith(b"more")
        assert COVER in got

    run(main())


def test_what_is_held_goes_out_with_the_end() -> None:
    async def main() -> None:
        below, peer = stream_pair()
        stream = await connector(host="cover.example").connect(Flow(), below, Endpoint("a.test", 443))
        await stream.send(b"\x16\x03")
        await stream.send_eof()
        assert await peer.receive() == b"\x16\x03"
        assert await peer.receive() == b""

    run(main())


def test_recorded_request_of_the_connector() -> None:
    async def play(below: Stream) -> None:
        stream = await connector(host="cover.example").connect(Flow(), below, Endpoint("localhost", 8000))
        await stream.send(b"GET /s HTTP/1.1\r\nHost: localhost:8000\r\nUser-Agent: t\r\n\r\n")
        assert await stream.receive() == b""
        await stream.aclose()

    run(replay_server(load("sni-http"), play))


@pytest.mark.parametrize("host", ["a b", "192.0.2.1", "x" * 300])
def test_cover_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="is not a host name"):
        connector(host=host)


def test_tls_through_connector_and_handler_under_another_name() -> None:
    """A handshake succeeds only if server and client saw the same hello."""
    authority = Authority()
    identity = authority.issue("secret.test")

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(4))
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=identity.server_context())
        egress = Rerouted(Endpoint.from_sockaddr(server.sockets[0].getsockname()))
        async with served(handler(), egress) as proxy:
            direct = Direct(Names())
            node = Node("sni", proxy, Transport("tcp", StreamDialer()), connector(host="cover.example"))
            chained = ServiceRouter(direct, Chain("chain", [Hop("hop", [node])], direct))
            made = ForwardHandler(bind_options(ForwardHandler.Options, {"sniffing": True}), HandlerContext())
            async with served(made, chained) as entry:
                trust = authority.client_context()
                reader, writer = await asyncio.open_connection(
                    entry.host, entry.port, ssl=trust, server_hostname="secret.test"
                )
                writer.write(b"ping")
                assert await reader.readexactly(4) == b"ping"
                writer.close()
                await writer.wait_closed()
        assert egress.asked == [Endpoint("secret.test", 443)]
        server.close()
        await server.wait_closed()

    run(main())
