"""Sniffing in every handler that has it: what is decided by the name, and that nobody waits for nothing."""

from __future__ import annotations

import re
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.errors import BypassDenied, ConfigError, DialRefused, GostnetError, ResolveError
from gostnet.core.flow import Flow
from gostnet.core.options import bind_options
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope, run
from gostnet.pipeline.chain import Chain
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Node
from gostnet.pipeline.router import ServiceRouter
from gostnet.pipeline.sniffing import OriginalOptions, Sniffer, forward_as_sniffed
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.policies.auth import StaticAuthenticator, Users
from gostnet.policies.bypass import PatternBypass
from gostnet.protocols.auto.handler import AutoHandler
from gostnet.protocols.forward.connector import ForwardConnector
from gostnet.protocols.forward.handler import ForwardHandler
from gostnet.protocols.http.handler import HttpHandler
from gostnet.protocols.relay.codec import Command, Request, encode_request
from gostnet.protocols.relay.handler import RelayHandler
from gostnet.protocols.socks4.handler import Socks4Handler
from gostnet.protocols.socks5.handler import Socks5Handler
from gostnet.protocols.transparent.handler import RedHandler, ReduHandler
from gostnet.testing import datagrams_pair, stream_pair

from .vectors import Listening, Names, Peer, closed_port, served

LONG = "1h"
"""A timeout that no test lives to see: what passes with it does not wait."""


def hello(name: str | None = "secret.test") -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = name is not None
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def get(host: str = "secret.test", path: str = "/") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def way_out(*bypassed: str, **names: list[str]) -> ServiceRouter:
    bypass = PatternBypass.from_patterns(bypassed) if bypassed else None
    return ServiceRouter(Direct(Names(**{"secret.test": ["127.0.0.1"], **names})), bypass=bypass)


@asynccontextmanager
async def client_of(handler: Any, egress: Any) -> AsyncIterator[Peer]:
    async with served(handler, egress) as address:
        with await Peer.connect(address) as client:
            yield client


@asynccontextmanager
async def tunnel_of(name: str, egress: Any, **metadata: Any) -> AsyncIterator[tuple[Peer, Peer]]:
    """Yield the client's and the server's end of a connection through a proxy that has said yes."""
    handler, dialogue = proxy(name, **metadata)
    with Listening() as server:
        async with client_of(handler, egress) as client:
            await dialogue(client, server.address)
            with await server.accept() as target:
                yield client, target


class Captured:
    """A handler of captured connections whose original destination the test says; keeps the flows it has seen."""

    accepts = (Stream,)

    def __init__(self, target: Endpoint, **metadata: Any) -> None:
        self.target = target
        self.handler = RedHandler(bind_options(RedHandler.Options, metadata), HandlerContext())
        self.flows: list[Flow] = []

    async def handle(self, flow: Flow, conn: Stream, egress: Any) -> None:
        flow.target = self.target
        self.flows.append(flow)
        await self.handler.handle(flow, conn, egress)


# ---- captured connections -------------------------------------------------------------------------
@pytest.mark.parametrize("first", [hello(), get()], ids=["tls", "http"])
def test_captured_connection_goes_to_the_name_at_the_original_port(first: bytes) -> None:
    async def main() -> None:
        with Listening() as server:
            red = Captured(Endpoint("127.0.0.9", server.address.port), sniffing=True, **{"sniffing.timeout": LONG})
            egress = way_out()
            async with client_of(red, egress) as client:
                await client.send(first[:7])
                await client.send(first[7:])
                with await server.accept() as target:
                    assert await target.exactly(len(first)) == first
                    await target.send(b"answer")
                    assert await client.exactly(6) == b"answer"
            (flow,) = red.flows
            assert flow.target == Endpoint("secret.test", server.address.port)
            assert flow.host == "secret.test"
            assert flow.sniffed is not None
            assert flow.reason == f"{flow.sniffed.protocol} for secret.test"

    run(main())


@pytest.mark.parametrize("first", [hello(), get()], ids=["tls", "http"])
@pytest.mark.parametrize("original", [False, True])
def test_bypass_of_the_name_ends_a_captured_connection(first: bytes, original: bool) -> None:
    async def main() -> None:
        with Listening() as server:
            red = Captured(server.address, sniffing=True, **{"sniffing.dialOriginalDst": original})
            async with client_of(red, way_out("*.test")) as client:
                await client.send(first)
                assert await client.rest() == b""
            assert isinstance(red.flows[0].error, BypassDenied)
            assert "secret.test" in str(red.flows[0].error)

    run(main())


def test_bypass_of_the_address_comes_before_any_look() -> None:
    async def main() -> None:
        red = Captured(Endpoint("192.0.2.1", 443), sniffing=True, **{"sniffing.timeout": LONG})
        async with client_of(red, way_out("192.0.2.0/24")) as client:
            assert await client.rest() == b""
        assert isinstance(red.flows[0].error, BypassDenied)

    run(main())


@pytest.mark.parametrize("form", [b"GET http://%b/ HTTP/1.1", b"CONNECT %b:443 HTTP/1.1"])
def test_request_to_a_proxy_goes_to_that_proxy(form: bytes) -> None:
    def request(host: bytes) -> bytes:
        return form % host + b"\r\nHost: " + host + b"\r\n\r\n"

    async def main() -> None:
        with Listening() as server:
            red = Captured(server.address, sniffing=True)
            async with client_of(red, way_out("bad.test")) as client:
                await client.send(request(b"one.test"))
                with await server.accept() as target:
                    for host in (b"two.test", b"three.test"):
                        await target.receive()
                        await target.send(b"answer")
                        assert await client.exactly(6) == b"answer"
                        await client.send(request(host))
                    await target.receive()
                    await client.send(request(b"bad.test"))
                    assert await client.rest() == b""
            assert red.flows[0].target == server.address
            assert isinstance(red.flows[0].error, BypassDenied)

    run(main())


def test_original_destination_is_kept_when_that_is_asked_for() -> None:
    async def main() -> None:
        with Listening() as server:
            red = Captured(server.address, sniffing=True, **{"sniffing.dialOriginalDst": True})
            async with client_of(red, way_out(**{"secret.test": ["192.0.2.1"]})) as client:
                await client.send(hello())
                with await server.accept():
                    pass
            (flow,) = red.flows
            assert flow.target == server.address
            assert flow.host == "secret.test"

    run(main())


@pytest.mark.parametrize("fallback", [False, True])
def test_original_destination_stands_in_for_a_name_that_fails_only_with_fallback(fallback: bool) -> None:
    async def main() -> None:
        with Listening() as server:
            red = Captured(server.address, sniffing=True, **{"sniffing.fallback": fallback})
            async with client_of(red, way_out()) as client:
                await client.send(hello("unknown.test"))
                if fallback:
                    with await server.accept() as target:
                        assert await target.exactly(5) == hello("unknown.test")[:5]
                else:
                    assert await client.rest() == b""
            (flow,) = red.flows
            if fallback:
                assert "connected to 127.0.0.1" in flow.reason
            else:
                assert isinstance(flow.error, ResolveError)

    run(main())


@pytest.mark.parametrize("first", [b"hello world", b"\x00", b"SSH-2.0-x\r\n", b"HELO x\r\n", b"GET\x00", hello(None)])
def test_what_names_no_host_goes_to_the_original_destination_at_once(first: bytes) -> None:
    async def main() -> None:
        with Listening() as server:
            red = Captured(server.address, sniffing=True, **{"sniffing.timeout": LONG})
            async with client_of(red, way_out("*.test")) as client:
                await client.send(first)
                with await server.accept() as target:
                    assert await target.exactly(len(first)) == first

    run(main())


def test_client_that_waits_for_its_server_is_connected_and_still_watched() -> None:
    async def main() -> None:
        with Listening() as server:
            red = Captured(server.address, sniffing=True)
            async with client_of(red, way_out("*.test")) as client:
                with await server.accept() as target:
                    await target.send(b"220 ready\r\n")
                    assert await client.exactly(11) == b"220 ready\r\n"
                    await client.send(b"EHLO\r\n")
                    assert await target.exactly(6) == b"EHLO\r\n"
            async with client_of(red, way_out("*.test")) as client:
                with await server.accept() as target:
                    await client.send(hello())
                    assert await client.rest() == b""
                    assert await target.rest() == b""

    run(main())


def test_hello_that_stops_half_way_is_passed_on_when_time_is_up() -> None:
    async def main() -> None:
        with Listening() as server:
            red = Captured(server.address, sniffing=True, **{"sniffing.timeout": "50ms"})
            async with client_of(red, way_out()) as client:
                await client.send(hello()[:100])
                with await server.accept() as target:
                    assert len(await target.exactly(100)) == 100
                    await target.send(b"x")
                    assert await client.exactly(1) == b"x"

    run(main())


@pytest.mark.parametrize("first", [b"", b"\x16\x03", b"GET / HT"])
def test_client_that_ends_early_is_passed_on_with_its_end(first: bytes) -> None:
    async def main() -> None:
        with Listening() as server:
            red = Captured(server.address, sniffing=True, **{"sniffing.timeout": LONG})
            async with client_of(red, way_out()) as client:
                await client.send(first)
                client.shut()
                with await server.accept() as target:
                    assert await target.rest() == first
                    await target.send(b"bye")
                    target.shut()
                    assert await client.rest() == b"bye"

    run(main())


@pytest.mark.parametrize(("name", "passes"), [("secret.test", True), ("other.test", False)])
def test_whitelist_of_names_lets_those_names_pass(name: str, passes: bool) -> None:
    async def main() -> None:
        with Listening() as server:
            red = Captured(Endpoint("192.0.2.1", server.address.port), sniffing=True)
            bypass = PatternBypass.from_patterns(["secret.test"], whitelist=True)
            names = Names(**{"secret.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]})
            async with client_of(red, ServiceRouter(Direct(names), bypass=bypass)) as client:
                await client.send(hello(name))
                if passes:
                    with await server.accept() as target:
                        assert await target.exactly(1) == b"\x16"
                else:
                    assert await client.rest() == b""
            async with client_of(red, ServiceRouter(Direct(names), bypass=bypass)) as client:
                await client.send(b"no name at all")
                assert await client.rest() == b""

    run(main())


@pytest.mark.parametrize("whitelist", [False, True])
@pytest.mark.parametrize("at", ["hop", "node"])
def test_route_to_the_original_destination_is_chosen_by_the_name(whitelist: bool, at: str) -> None:
    """A hop or node that is not for the name is left out, although it is an address that is dialled."""

    async def main() -> None:
        patterns = ["secret.test"]
        bypass = PatternBypass.from_patterns(patterns, whitelist=whitelist)
        with Listening() as server, Listening() as proxy:
            direct = Direct(Names())
            connector = ForwardConnector(ForwardConnector.Options(), ConnectorContext())
            node = Node("proxy", proxy.address, Transport("tcp", StreamDialer()), connector)
            node.bypass = bypass if at == "node" else None
            hop = Hop("hop", [node], bypass=bypass if at == "hop" else None)
            egress = ServiceRouter(direct, Chain("chain", [hop], direct))
            red = Captured(server.address, sniffing=True, **{"sniffing.dialOriginalDst": True})
            async with served(red, egress) as address:
                for name in ("secret.test", "other.test"):
                    with await Peer.connect(address) as client:
                        await client.send(hello(name))
                        straight = (name == "secret.test") != whitelist
                        with await (server if straight else proxy).accept() as target:
                            assert await target.exactly(1) == b"\x16"
            assert {flow.target for flow in red.flows} == {server.address}

    run(main())


# ---- proxies --------------------------------------------------------------------------------------
Dialogue = Callable[[Peer, Endpoint], Awaitable[None]]


async def by_socks5(client: Peer, to: Endpoint) -> None:
    await client.send(b"\x05\x01\x00")
    assert await client.exactly(2) == b"\x05\x00"
    await client.send(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + to.port.to_bytes(2, "big"))
    assert (await client.exactly(10))[1] == 0


async def by_socks4(client: Peer, to: Endpoint) -> None:
    await client.send(struct.pack("!BBH", 4, 1, to.port) + b"\x7f\x00\x00\x01\x00")
    assert (await client.exactly(8))[1] == 90


async def by_http(client: Peer, to: Endpoint) -> None:
    await client.send(f"CONNECT 127.0.0.1:{to.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (await client.receive()).startswith(b"HTTP/1.1 200 ")


async def by_relay(client: Peer, to: Endpoint) -> None:
    await client.send(encode_request(Request(Command.CONNECT, target=Endpoint("127.0.0.1", to.port))))
    assert await client.exactly(4) == b"\x01\x00\x00\x00"


PROXIES: dict[str, tuple[Any, dict[str, Any], Dialogue]] = {
    "socks5": (Socks5Handler, {}, by_socks5),
    "socks4": (Socks4Handler, {}, by_socks4),
    "http": (HttpHandler, {}, by_http),
    "relay": (RelayHandler, {"nodelay": True}, by_relay),
    "auto socks5": (AutoHandler, {}, by_socks5),
    "auto http": (AutoHandler, {}, by_http),
}


def proxy(name: str, **metadata: Any) -> tuple[Any, Dialogue]:
    kind, extra, dialogue = PROXIES[name]
    metadata = {"sniffing": True, **extra, **metadata}
    return kind(bind_options(kind.Options, metadata), HandlerContext(metadata=metadata)), dialogue


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("first", [hello(), get()], ids=["tls", "http"])
def test_proxy_ends_a_connection_whose_name_is_bypassed(name: str, first: bytes) -> None:
    async def main() -> None:
        async with tunnel_of(name, way_out("secret.test"), **{"sniffing.timeout": LONG}) as (client, target):
            await client.send(first[:1])
            await client.send(first[1:])
            assert await client.rest() == b""
            assert await target.rest() == b""

    run(main())


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("first", [hello("other.example"), get("other.example"), b"x", b"SSH-2.0-x\r\n"])
def test_proxy_relays_what_is_not_bypassed_as_it_came(name: str, first: bytes) -> None:
    async def main() -> None:
        async with tunnel_of(name, way_out("secret.test"), **{"sniffing.timeout": LONG}) as (client, target):
            await client.send(first)
            assert await target.exactly(len(first)) == first
            await target.send(b"answer")
            assert await client.exactly(6) == b"answer"
            client.shut()
            assert await target.rest() == b""

    run(main())


@pytest.mark.parametrize("name", PROXIES)
def test_server_that_speaks_first_is_heard_at_once(name: str) -> None:
    async def main() -> None:
        async with tunnel_of(name, way_out("secret.test"), **{"sniffing.timeout": LONG}) as (client, target):
            await target.send(b"220 ready\r\n")
            assert await client.exactly(11) == b"220 ready\r\n"
            await client.send(b"QUIT\r\n")
            assert await target.exactly(6) == b"QUIT\r\n"
            target.shut()
            assert await client.rest() == b""

    run(main())


def test_payload_that_comes_with_the_request_is_looked_at() -> None:
    async def main() -> None:
        handler, _ = proxy("socks5", **{"sniffing.timeout": LONG})
        with Listening() as server:
            async with client_of(handler, way_out("secret.test")) as client:
                request = b"\x05\x01\x00\x01\x7f\x00\x00\x01" + server.address.port.to_bytes(2, "big")
                await client.send(b"\x05\x01\x00" + request + hello())
                assert len(await client.rest()) == 2 + 10

    run(main())


@pytest.mark.parametrize("bypassed", [False, True])
def test_relay_without_nodelay_answers_with_the_first_bytes_that_come_back(bypassed: bool) -> None:
    async def main() -> None:
        metadata = {"sniffing": True, "sniffing.timeout": LONG}
        handler = RelayHandler(bind_options(RelayHandler.Options, metadata), HandlerContext())
        with Listening() as server:
            async with client_of(handler, way_out("secret.test") if bypassed else way_out()) as client:
                await client.send(encode_request(Request(Command.CONNECT, target=server.address)) + hello())
                with await server.accept() as target:
                    if bypassed:
                        assert await client.rest() == b""
                        return
                    assert await target.exactly(len(hello())) != b""
                    await target.send(b"answer")
                    assert await client.exactly(10) == b"\x01\x00\x00\x00answer"

    run(main())


def test_nothing_is_looked_at_unless_sniffing_is_on() -> None:
    async def main() -> None:
        async with tunnel_of("socks5", way_out("secret.test"), sniffing=False) as (client, target):
            await client.send(hello())
            assert (await target.exactly(5))[:1] == b"\x16"

    run(main())


@pytest.mark.parametrize("speaker", ["client", "server", "both"])
def test_streams_that_are_no_sockets_lose_nothing_while_both_sides_are_watched(speaker: str) -> None:
    async def main() -> None:
        client, inside = stream_pair()
        upstream, outside = stream_pair()
        flow = Flow(target=Endpoint("192.0.2.1", 443))
        scope = Scope("test")
        if speaker != "client":
            await outside.send(b"banner")
        if speaker != "server":
            await client.send(get("other.test"))
        task = scope.start(Sniffer(60).watch(flow, inside, upstream, way_out("secret.test"), 0), "watch")
        await task
        if speaker != "client":
            assert await upstream.receive() == b"banner"
        if speaker != "server":
            assert await inside.receive() == get("other.test")
        assert (flow.host == "other.test") == (speaker != "server")

    run(main())


# ---- auto -----------------------------------------------------------------------------------------
def test_auto_passes_tls_on_by_its_name() -> None:
    async def main() -> None:
        egress = way_out("*.bad")
        asked: list[Endpoint] = []

        class Out(ServiceRouter):
            async def connect(self, flow: Flow, target: Endpoint) -> Stream:
                asked.append(target)
                return await super().connect(flow, Endpoint("127.0.0.1", server.address.port))

        with Listening() as server:
            handler = AutoHandler(AutoHandler.Options(), HandlerContext())
            async with client_of(handler, Out(egress.direct)) as client:
                await client.send(hello()[:3])
                await client.send(hello()[3:])
                with await server.accept() as target:
                    assert (await target.exactly(3)) == b"\x16\x03\x01"
        assert asked == [Endpoint("secret.test", 443)]

    run(main())


def test_auto_does_not_let_tls_around_its_credentials() -> None:
    async def main() -> None:
        users = StaticAuthenticator(Users({"me": "word"}))
        handler = AutoHandler(AutoHandler.Options(), HandlerContext(authenticator=users))
        async with client_of(handler, way_out()) as client:
            await client.send(hello())
            assert await client.rest() == b""

    run(main())


# ---- forwarders -----------------------------------------------------------------------------------
def forwarder(*targets: Endpoint, **metadata: Any) -> ForwardHandler:
    transport = Transport("tcp", StreamDialer())
    nodes = [Node(str(target), target, transport, object()) for target in targets]  # type: ignore[arg-type]
    context = HandlerContext(service="web", hop=Hop("forward", nodes) if targets else None)
    metadata = {"sniffing": True, "sniffing.timeout": LONG, **metadata}
    return ForwardHandler(bind_options(ForwardHandler.Options, metadata), context)


def test_forwarder_tells_http_clients_why_nothing_was_reached() -> None:
    async def main() -> None:
        for handler, egress, status in (
            (forwarder(Endpoint("127.0.0.1", closed_port())), way_out("secret.test"), b"403 Forbidden"),
            (forwarder(Endpoint("127.0.0.1", closed_port())), way_out(), b"503 Service Unavailable"),
        ):
            async with client_of(handler, egress) as client:
                await client.send(get())
                assert await client.rest() == (
                    b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            async with client_of(handler, egress) as client:
                await client.send(hello())
                assert await client.rest() == b""

    run(main())


def test_forwarder_without_targets_goes_where_its_clients_ask() -> None:
    async def main() -> None:
        with Listening() as server:
            async with client_of(forwarder(), way_out()) as client:
                first = get(f"secret.test:{server.address.port}")
                await client.send(first)
                with await server.accept() as target:
                    assert await target.exactly(len(first)) == first

    run(main())


def test_selection_of_a_target_finds_what_was_sniffed_on_the_flow() -> None:
    async def main() -> None:
        seen: list[Any] = []

        class Watching(Hop):
            def pick(self, flow: Flow, target: Endpoint, now: float, host: str = "") -> Sequence[Node]:
                seen.append(flow.sniffed)
                return super().pick(flow, target, now, host)

        with Listening() as server:
            handler = forwarder(server.address)
            hop = handler._context.hop
            assert hop is not None
            handler._context.hop = Watching("forward", hop.nodes)
            async with client_of(handler, way_out()) as client:
                await client.send(get(path="/a?b=c"))
                with await server.accept():
                    pass
        assert (seen[0].protocol, seen[0].host, seen[0].path, seen[0].query) == ("http", "secret.test", "/a", "b=c")

    run(main())


# ---- several requests of one connection -----------------------------------------------------------
def test_captured_requests_go_each_to_its_own_host() -> None:
    async def main() -> None:
        with Listening() as one, Listening("127.0.0.2") as two:
            port = one.address.port

            class Out(ServiceRouter):
                async def connect(self, flow: Flow, target: Endpoint) -> Stream:
                    self.admit(flow, target)
                    server = {"one.test": one, "two.test": two}[target.host]
                    return await self.direct.connect(flow, server.address)

            red = Captured(Endpoint("127.0.0.9", port), sniffing=True)
            bypass = PatternBypass.from_patterns(["bad.test"])
            async with served(red, Out(Direct(Names()), bypass=bypass)) as address:
                with await Peer.connect(address) as client:
                    await client.send(get("one.test"))
                    with await one.accept() as server:
                        for _ in range(2):
                            assert await server.exactly(len(get("one.test"))) == get("one.test")
                            await server.send(b"one")
                            assert await client.exactly(3) == b"one"
                            await client.send(get("one.test"))
                        assert await server.exactly(len(get("one.test"))) == get("one.test")
                        await client.send(get("two.test"))
                        assert await server.rest() == b""
                    with await two.accept() as server:
                        assert await server.exactly(len(get("two.test"))) == get("two.test")
                        await server.send(b"two")
                        assert await client.exactly(3) == b"two"
                        await client.send(get("bad.test"))
                        assert await server.rest() == b""
                    assert await client.rest() == b""
            assert isinstance(red.flows[0].error, BypassDenied)

    run(main())


@pytest.mark.parametrize("name", PROXIES)
def test_proxy_ends_a_connection_whose_later_request_is_for_a_bypassed_host(name: str) -> None:
    async def main() -> None:
        async with tunnel_of(name, way_out("secret.test")) as (client, target):
            for host in ("open.test", "other.test"):
                await client.send(get(host))
                assert await target.exactly(len(get(host))) == get(host)
                await target.send(b"answer")
                assert await client.exactly(6) == b"answer"
            await client.send(get())
            assert await client.rest() == b""
            assert await target.rest() == b""

    run(main())


@pytest.mark.parametrize("targets", [1, 2])
def test_forwarder_answers_a_later_request_that_is_refused(targets: int) -> None:
    async def main() -> None:
        with Listening() as server:
            handler = forwarder(*[server.address] * targets)
            async with client_of(handler, way_out("secret.test")) as client:
                await client.send(get("open.test"))
                with await server.accept() as target:
                    await target.exactly(len(get("open.test")))
                    await target.send(b"answer")
                    assert await client.exactly(6) == b"answer"
                    await client.send(get())
                    assert await target.rest() == b""
                assert (await client.rest()).startswith(b"HTTP/1.1 403 Forbidden\r\n")

    run(main())


@pytest.mark.parametrize(("targets", "keepalive", "connections"), [(1, False, 1), (2, True, 1), (2, False, 2)])
def test_forwarder_chooses_a_target_for_each_request_where_there_is_a_choice(
    targets: int, keepalive: bool, connections: int
) -> None:
    async def main() -> None:
        with Listening() as server:
            handler = forwarder(*[server.address] * targets, **{"http.keepalive": keepalive})
            async with client_of(handler, way_out()) as client:
                await client.send(get("open.test"))
                target = await server.accept()
                for number in range(2):
                    assert await target.exactly(len(get("open.test"))) == get("open.test")
                    await target.send(b"answer")
                    assert await client.exactly(6) == b"answer"
                    if not number:
                        await client.send(get("open.test"))
                        if connections == 2:
                            assert await target.rest() == b""
                            target.close()
                            target = await server.accept()
                target.close()

    run(main())


# ---- datagrams ------------------------------------------------------------------------------------
def initials(name: str, size: int = 0) -> list[bytes]:
    alpn = ["h3", *(f"{number:03}" + "x" * 200 for number in range(size))]
    connection = QuicConnection(configuration=QuicConfiguration(is_client=True, server_name=name, alpn_protocols=alpn))
    connection.connect(("192.0.2.1", 443), now=0.0)
    return [data for data, _ in connection.datagrams_to_send(now=0.0)]


class UdpOut(ServiceRouter):
    """A way out whose associations the test plays."""

    def __init__(self, *bypassed: str) -> None:
        super().__init__(Direct(Names()), bypass=PatternBypass.from_patterns(bypassed) if bypassed else None)
        self.asked: list[Endpoint | None] = []
        self.ours, self.theirs = datagrams_pair()

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        self.asked.append(target)
        return self.ours


@pytest.mark.parametrize("size", [0, 20], ids=["one datagram", "several"])
def test_captured_quic_is_known_by_its_name(size: int) -> None:
    parts = initials("secret.test", size)
    assert (len(parts) > 1) == bool(size)

    async def main() -> None:
        target = Endpoint("192.0.2.1", 443)
        redu = ReduHandler(bind_options(ReduHandler.Options, {"sniffing": True}), HandlerContext())
        for bypassed in (False, True):
            client, inside = datagrams_pair()
            egress = UdpOut("secret.test") if bypassed else UdpOut("other.test")
            flow = Flow(target=target)
            for part in parts:
                await client.send([Datagram(part, target)])
            scope = Scope("redu")
            problem: list[GostnetError] = []

            async def serve(flow: Flow = flow, inside: Datagrams = inside, egress: UdpOut = egress) -> None:
                try:
                    await redu.handle(flow, inside, egress)
                except GostnetError as exc:
                    problem.append(exc)  # noqa: B023

            task = scope.start(serve(), "redu")
            if bypassed:
                await task
                assert isinstance(problem[0], BypassDenied)
                assert egress.asked == []
            else:
                got: list[bytes] = []
                while len(got) < len(parts):
                    got += [bytes(datagram.data) for datagram in await egress.theirs.receive()]
                assert got == parts
                assert egress.asked == [target]
                assert flow.host == "secret.test"
                await scope.cancel()

    run(main())


def test_half_a_quic_hello_passes_when_time_is_up_and_anything_else_at_once() -> None:
    async def main() -> None:
        target = Endpoint("192.0.2.1", 443)
        for timeout, payload in ((0.05, initials("secret.test", 20)[0]), (3600.0, b"anything")):
            client, inside = datagrams_pair()
            await client.send([Datagram(payload, target)])
            flow = Flow(target=target)
            replayed = await Sniffer(timeout).look_at_datagrams(flow, inside)
            assert [bytes(datagram.data) for datagram in await replayed.receive()] == [payload]
            assert replayed.transparent_over() is inside
            assert flow.sniffed is None

    run(main())


# ---- options --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind", [AutoHandler, ForwardHandler, HttpHandler, RelayHandler, Socks4Handler, Socks5Handler, RedHandler]
)
@pytest.mark.parametrize("key", ["mitm.certFile", "mitm.caKeyFile"])
def test_decryption_is_refused_by_name(kind: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}: .*not available"):
        bind_options(kind.Options, {key: "ca.pem"}, "metadata")


def test_fallback_never_goes_around_a_bypass() -> None:
    async def main() -> None:
        client, inside = stream_pair()
        await client.send(hello())
        flow = Flow(target=Endpoint("192.0.2.1", 443))
        with pytest.raises(BypassDenied):
            await forward_as_sniffed(flow, inside, way_out("secret.test"), Sniffer(60), OriginalOptions(fallback=True))

        class Broken(ServiceRouter):
            async def connect(self, flow: Flow, target: Endpoint) -> Stream:
                raise DialRefused(f"no {target}")

        client, inside = stream_pair()
        await client.send(hello())
        with pytest.raises(DialRefused, match=r"192\.0\.2\.1"):
            await forward_as_sniffed(
                Flow(target=Endpoint("192.0.2.1", 443)),
                inside,
                Broken(Direct(Names())),
                Sniffer(60),
                OriginalOptions(fallback=True),
            )

    run(main())
