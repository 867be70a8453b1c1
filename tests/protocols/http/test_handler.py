"""The HTTP handler in a service on loopback: CONNECT, refusals, credentials, UDP, hostile clients."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import (
    AuthDenied,
    BypassDenied,
    ConfigError,
    ConnError,
    DialError,
    DialRefused,
    DialTimeout,
    EndOfStream,
    GostnetError,
    IdleTimeout,
    LimitDenied,
    NoRoute,
    ProtocolError,
    ResolveError,
    UpstreamRejected,
)
from gostnet.core.flow import Flow, Network
from gostnet.core.options import bind_options, markdown
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.protocols.http.connector import HttpConnector
from gostnet.protocols.http.handler import HttpHandler
from gostnet.wire.http1 import MAX_HEAD
from gostnet.wire.udp_frames import TunFrames, encode_tun_frames

from ..vectors import Peer, UdpPeer, echo_server, served
from .kit import Users, Watched, answer_to, way_out

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\nProxy-Agent: gost/3.0\r\n\r\n"
REFUSED_403 = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nProxy-Agent: gost/3.0\r\n\r\n"
REFUSED_503 = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nProxy-Agent: gost/3.0\r\n\r\n"
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
CHALLENGE = (
    b'HTTP/1.1 407 Proxy Authentication Required\r\nConnection: close\r\nProxy-Authenticate: Basic realm="gost"\r\n\r\n'
)


def connect_to(port: int, *lines: bytes, host: bytes = b"127.0.0.1") -> bytes:
    return b"\r\n".join((b"CONNECT %b:%d HTTP/1.1" % (host, port), b"Host: %b:%d" % (host, port), *lines, b"", b""))


class Refusing:
    """A way out that only fails."""

    def __init__(self, error: GostnetError) -> None:
        self.error = error

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        raise self.error

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        raise self.error


class Bypassed:
    """A bypass of some hosts."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts

    def contains(self, network: Network, target: Endpoint) -> bool:
        return target.host in self.hosts


# ---- CONNECT ------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", [b"127.0.0.1", b"localhost"])
def test_connect_relays_both_ways(host: bytes) -> None:
    async def main() -> None:
        handler = Watched()
        async with echo_server() as port, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(connect_to(port, host=host))
                assert await peer.exactly(len(ESTABLISHED)) == ESTABLISHED
                await peer.send(b"hello")
                assert await peer.exactly(5) == b"hello"
                peer.shut()
                assert await peer.rest() == b""
            flow, error = await handler.end()
            assert error is None
            assert flow.target == Endpoint(host.decode(), port)
            assert (flow.meter.up, flow.meter.down) == (5, 5)

    run(main())


def test_connect_without_a_port_goes_to_80() -> None:
    async def main() -> None:
        async with echo_server() as port:
            egress = way_out({80: port})
            async with served(Watched(), egress) as address:
                assert (
                    await answer_to(address, b"CONNECT 127.0.0.1 HTTP/1.1\r\n\r\nhi", shut=True) == ESTABLISHED + b"hi"
                )

    run(main())


def test_early_data_is_kept_and_a_length_is_not_for_it() -> None:
    """HT03, RFC 9110 section 9.3.6: CONNECT has no body; what follows the head is the tunnel's."""

    async def main() -> None:
        async with echo_server() as port, served(Watched(), way_out()) as address:
            request = connect_to(port, b"Content-Length: 2") + b"early data"
            assert await answer_to(address, request, shut=True) == ESTABLISHED + b"early data"
            request = connect_to(port, b"Transfer-Encoding: chunked") + b"not a chunk"
            assert await answer_to(address, request, shut=True) == ESTABLISHED + b"not a chunk"

    run(main())


def test_connect_byte_by_byte() -> None:
    async def main() -> None:
        async with echo_server() as port, served(Watched(), way_out()) as address:
            with await Peer.connect(address) as peer:
                for byte in connect_to(port, b"User-Agent: x"):
                    await peer.send(bytes((byte,)))
                    await asyncio.sleep(0)
                assert await peer.exactly(len(ESTABLISHED)) == ESTABLISHED
                await peer.send(b"x")
                assert await peer.exactly(1) == b"x"

    run(main())


def test_half_close_is_passed_on_and_a_late_answer_comes() -> None:
    """HT21."""

    async def main() -> None:
        heard = asyncio.Event()
        release = asyncio.Event()

        async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.read() == b"question"
            heard.set()
            await release.wait()
            writer.write(b"answer")
            writer.close()

        server = await asyncio.start_server(late, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with served(Watched(), way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(connect_to(port) + b"question")
                peer.shut()
                await heard.wait()
                assert await peer.exactly(len(ESTABLISHED)) == ESTABLISHED
                release.set()
                assert await peer.rest() == b"answer"
        server.close()

    run(main())


def test_server_that_ends_first_leaves_our_direction_open() -> None:
    async def main() -> None:
        rest: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 ready")
            writer.write_eof()
            rest.set_result(await reader.read())
            writer.close()

        server = await asyncio.start_server(first, "127.0.0.1", 0)
        async with served(Watched(), way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(connect_to(server.sockets[0].getsockname()[1]))
                assert await peer.rest() == ESTABLISHED + b"220 ready"
                await peer.send(b"still here")
                peer.shut()
                assert await rest == b"still here"
        server.close()

    run(main())


def test_idle_tunnels_are_closed() -> None:
    async def main() -> None:
        handler = Watched({"idleTimeout": "50ms"})
        async with echo_server() as port, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(connect_to(port))
                assert await peer.rest() == ESTABLISHED
            assert isinstance((await handler.end())[1], IdleTimeout)

    run(main())


def test_hash_can_be_the_target() -> None:
    async def main() -> None:
        for metadata, expected in (({}, "127.0.0.1"), ({"hash": "host"}, "localhost:9")):
            handler = Watched(metadata)
            async with served(handler, Refusing(DialRefused("no"))) as address:
                await answer_to(address, b"CONNECT localhost:9 HTTP/1.1\r\n\r\n")
                assert (await handler.end())[0].hash == expected

    run(main())


# ---- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (DialRefused("no"), REFUSED_503),
        (DialTimeout("no"), REFUSED_503),
        (ResolveError("no"), REFUSED_503),
        (NoRoute("no"), REFUSED_503),
        (UpstreamRejected("no", 407), REFUSED_503),
        (DialError("no"), REFUSED_503),
        (ProtocolError("the proxy on the way talks nonsense"), REFUSED_503),
        (ConnError("the proxy on the way is gone"), REFUSED_503),
        (BypassDenied("no"), REFUSED_403),
        (LimitDenied("no"), REFUSED_503),
    ],
)
def test_failures_of_connect_are_told(error: GostnetError, reply: bytes) -> None:
    async def main() -> None:
        handler = Watched()
        async with served(handler, Refusing(error)) as address:
            assert await answer_to(address, connect_to(9)) == reply
            flow, raised = await handler.end()
            assert raised is error
            assert flow.target == Endpoint("127.0.0.1", 9)

    run(main())


def test_bypassed_target_is_forbidden() -> None:
    async def main() -> None:
        egress = way_out(bypass=Bypassed("127.0.0.9"))
        async with served(Watched(), egress) as address:
            assert await answer_to(address, connect_to(9, host=b"127.0.0.9")) == REFUSED_403

    run(main())


def test_refusal_is_not_overtaken_by_a_reset() -> None:
    """HT23: a client that sends more than is read must still be able to read the answer."""

    async def main() -> None:
        async with served(Watched(users=Users()), way_out()) as address:
            with await Peer.connect(address) as peer:
                head = b"POST http://127.0.0.1:9/ HTTP/1.1\r\nContent-Length: 600000\r\n\r\n"
                await peer.send(head + bytes(600000))
                assert await peer.rest() == CHALLENGE

    run(main())


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"CONNECT /x HTTP/1.1\r\n\r\n",
        b"CONNECT a:b HTTP/1.1\r\n\r\n",
        b"CONNECT  HTTP/1.1\r\nHost: \r\n\r\n",
        b"CONNECT :80 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x05\x01\x00",
        b"GET https://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    ],
)
def test_malformed_requests_are_answered_at_once(request_bytes: bytes) -> None:
    """HT02, HT12."""

    async def main() -> None:
        handler = Watched()
        async with served(handler, Refusing(DialError("nobody asks"))) as address:
            assert await answer_to(address, request_bytes) == BAD_REQUEST
            assert isinstance((await handler.end())[1], ProtocolError)

    run(main())


def test_head_that_is_too_large() -> None:
    async def main() -> None:
        async with served(Watched(), way_out()) as address:
            answer = await answer_to(address, b"GET / HTTP/1.1\r\nX: " + b"y" * MAX_HEAD)
            assert answer == b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"

    run(main())


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"CONN", b"CONNECT 127.0.0.1:9 HTTP/1.1\r\nHost: x\r\n"])
def test_client_that_says_nothing_or_half_of_it_is_closed_in_time(sent: bytes) -> None:
    async def main() -> None:
        handler = Watched({"readTimeout": "50ms"})
        async with served(handler, way_out()) as address:
            assert await answer_to(address, sent) == b""
            assert isinstance((await handler.end())[1], ProtocolError)

    run(main())


def test_client_that_leaves() -> None:
    async def main() -> None:
        handler = Watched()
        async with served(handler, way_out()) as address:
            assert await answer_to(address, b"", shut=True) == b""
            assert (await handler.end())[1] is None
            assert await answer_to(address, b"CONNECT a:1 HT", shut=True) == b""
            assert isinstance((await handler.end())[1], EndOfStream)

    run(main())


# ---- credentials --------------------------------------------------------------------------------
def test_right_credentials_open_and_the_client_id_is_noted() -> None:
    async def main() -> None:
        users = Users()
        handler = Watched(users=users)
        async with echo_server() as port, served(handler, way_out()) as address:
            request = connect_to(port, b"Proxy-Authorization: Basic dXNlcjpwYXNz") + b"x"
            assert await answer_to(address, request, shut=True) == ESTABLISHED + b"x"
            assert (await handler.end())[0].user == "id-of-user"
            assert users.asked == [("user", "pass")]

    run(main())


@pytest.mark.parametrize("line", [b"X: y", b"Proxy-Authorization: Basic dXNlcjpwYXN4", b"Proxy-Authorization: x"])
def test_wrong_credentials_are_challenged_and_the_connection_ends(line: bytes) -> None:
    async def main() -> None:
        handler = Watched(users=Users())
        async with served(handler, Refusing(DialError("nobody gets here"))) as address:
            twice = connect_to(9, line) + connect_to(9, b"Proxy-Authorization: Basic dXNlcjpwYXNz")
            assert await answer_to(address, twice) == CHALLENGE
            flow, error = await handler.end()
            assert isinstance(error, AuthDenied)
            assert flow.user == ""

    run(main())


def test_credentials_are_ignored_where_nobody_asks() -> None:
    async def main() -> None:
        async with echo_server() as port, served(Watched(), way_out()) as address:
            request = connect_to(port, b"Proxy-Authorization: nonsense") + b"x"
            assert await answer_to(address, request, shut=True) == ESTABLISHED + b"x"

    run(main())


# ---- UDP ----------------------------------------------------------------------------------------
UDP_OPEN = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"CONNECT  HTTP/1.1\r\nHost: \r\nX-Gost-Protocol: udp\r\n\r\n",
        b"CONNECT a.test:1 HTTP/1.1\r\nX-Gost-Protocol: udp\r\n\r\n",
        b"POST http://a.test/ HTTP/1.1\r\nX-Gost-Protocol: udp\r\n\r\n",
    ],
)
def test_udp_goes_to_any_peer(request_bytes: bytes) -> None:
    """HT20: whole, whatever their size; names are looked up here."""

    async def main() -> None:
        handler = Watched({"udp": True})
        async with served(handler, way_out()) as address:
            with UdpPeer() as one, UdpPeer() as two, await Peer.connect(address) as peer:
                frames = encode_tun_frames(
                    [(b"first", one.address), (b"second", Endpoint("localhost", two.address.port))]
                )
                await peer.send(request_bytes + frames)
                assert await peer.exactly(len(UDP_OPEN)) == UDP_OPEN
                data, sender = await one.receive()
                assert data == b"first"
                assert (await two.receive())[0] == b"second"
                big = bytes(9000)
                await one.send(big, sender)
                parser = TunFrames()
                found: list[Any] = []
                while not found:
                    found = parser.feed(await peer.receive())
                assert found == [(big, one.address)]
                peer.shut()
                assert await peer.rest() == b""
            flow, error = await handler.end()
            assert error is None
            assert flow.network == "udp"
            assert flow.meter.up == 11

    run(main())


def test_udp_that_is_not_allowed_or_not_possible() -> None:
    request = b"CONNECT 127.0.0.9:1 HTTP/1.1\r\nX-Gost-Protocol: udp\r\n\r\n"

    async def main() -> None:
        async with served(Watched(), way_out()) as address:
            assert await answer_to(address, request) == b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
        async with served(Watched({"udp": True}), way_out(bypass=Bypassed("127.0.0.9"))) as address:
            assert await answer_to(address, request) == REFUSED_403
        async with served(Watched({"udp": True}), Refusing(DialError("no"))) as address:
            assert await answer_to(address, request) == REFUSED_503

    run(main())


def test_single_datagrams_are_bypassed() -> None:
    async def main() -> None:
        async with served(Watched({"udp": True}), way_out(bypass=Bypassed("localhost"))) as address:
            with UdpPeer() as udp, await Peer.connect(address) as peer:
                refused = Endpoint("localhost", udp.address.port)
                frames = encode_tun_frames([(b"refused", refused), (b"allowed", udp.address)])
                await peer.send(b"CONNECT  HTTP/1.1\r\nX-Gost-Protocol: udp\r\n\r\n" + frames)
                assert (await udp.receive())[0] == b"allowed"

    run(main())


# ---- options ------------------------------------------------------------------------------------
def test_options_take_gosts_names() -> None:
    options = bind_options(
        HttpHandler.Options,
        {
            "readTimeout": "5s",
            "idleTimeout": 3,
            "http.header": {"A": 1},
            "http.keepalive": "true",
            "http.compression": 1,
            "probe_resist": "code:404",
            "udpBufferSize": "9000",
            "http.proxyAgent": "x",
            "authBasicRealm": "y",
        },
    )
    assert (options.read_timeout, options.idle_timeout, options.header) == (5.0, 3.0, {"A": "1"})
    assert options.keepalive
    assert options.compression
    assert (options.probe_resist, options.udp_buffer_size) == ("code:404", 9000)
    assert (options.proxy_agent, options.auth_basic_realm) == ("x", "y")


@pytest.mark.parametrize(
    "metadata",
    [
        {"header": {"X": "a\r\nb"}},
        {"header": {"X Y": "a"}},
        {"proxyAgent": "a\nb"},
        {"authBasicRealm": "a\0"},
        {"probeResist": "404"},
        {"probeResist": "code:4"},
        {"probeResist": "code:x"},
        {"probeResist": "web:"},
        {"probeResist": "web:http://a b/"},
        {"probeResist": "host:a:b:c"},
        {"probeResist": "page:x"},
        {"hash": "client"},
    ],
)
def test_options_that_cannot_work_are_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        bind_options(HttpHandler.Options, metadata)


def test_options_are_documented_as_they_are() -> None:
    page = (Path(__file__).parents[3] / "docs" / "protocols" / "http.md").read_text()
    for options in (HttpHandler.Options, HttpConnector.Options):
        assert markdown(options) in page


def test_zero_read_timeout_is_the_default_and_a_negative_one_is_none() -> None:
    assert Watched({"readTimeout": 0}).handler._read_timeout == 15.0

    async def main() -> None:
        handler = Watched({"readTimeout": -1})
        async with echo_server() as port, served(handler, way_out()) as address:
            assert await answer_to(address, connect_to(port) + b"x", shut=True) == ESTABLISHED + b"x"

    run(main())
