"""The sni handler and connector, and sniffing, with the real gost on the other side."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.flow import Flow
from gostnet.core.options import bind_options
from gostnet.core.tasks import in_thread, run
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.node import Node
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.sni.connector import SniConnector
from gostnet.protocols.sni.handler import SniHandler
from gostnet.protocols.socks5.handler import Socks5Handler
from gostnet.testing.certificates import Authority
from gostnet.testing.processes import Process

from ..vectors import Listening, Names, served
from .test_sni import Rerouted

GOST = os.environ.get("GOST_BIN", "")

pytestmark = [pytest.mark.interop, pytest.mark.skipif(not GOST, reason="GOST_BIN is not set: a path of gost")]

_LISTENING = re.compile(r"listening on 127\.0\.0\.1:([0-9]+)/tcp")


@asynccontextmanager
async def gost(*words: str) -> AsyncIterator[Endpoint]:
    """Run gost with one service; yield where it listens."""
    process = Process([GOST, *words], name="gost")
    await in_thread(process.start)
    try:
        line = await in_thread(process.wait_for, lambda line: _LISTENING.search(line) is not None)
        found = _LISTENING.search(line)
        assert found is not None
        yield Endpoint("127.0.0.1", int(found[1]))
    finally:
        await in_thread(process.stop)


@asynccontextmanager
async def tls_server(authority: Authority, name: str) -> AsyncIterator[Endpoint]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(await reader.readexactly(4))
        except (OSError, asyncio.IncompleteReadError):
            pass
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=authority.issue(name).server_context())
    try:
        yield Endpoint.from_sockaddr(server.sockets[0].getsockname())
    finally:
        server.close()


async def ask(proxy: Endpoint, name: str, target: str, trust: ssl.SSLContext) -> bytes:
    """CONNECT through the HTTP proxy, handshake as a client of `name`; return the answer to `ping`, b"" for none."""
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    try:
        await writer.start_tls(trust, server_hostname=name)
        writer.write(b"ping")
        return await reader.read(4)
    except OSError:
        return b""
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass


@pytest.mark.parametrize("cover", ["", "?host=cover.example"])
def test_tls_of_a_client_of_gosts_connector(cover: str) -> None:
    """With a cover the handshake fails against gost's own handler, which does not take it off again."""
    authority = Authority()

    async def main() -> None:
        made = SniHandler(bind_options(SniHandler.Options, {}), HandlerContext())
        async with tls_server(authority, "secret.test") as server:
            egress = Rerouted(server)
            async with (
                served(made, egress) as ours,
                gost("-L", "http://127.0.0.1:0", "-F", f"sni://{ours}{cover}") as at,
            ):
                assert await ask(at, "secret.test", "secret.test:443", authority.client_context()) == b"ping"
            assert egress.asked == [Endpoint("secret.test", 443)]

    run(main())


def test_request_of_our_connector_to_gosts_handler() -> None:
    async def main() -> None:
        connector = SniConnector(bind_options(SniConnector.Options, {}), ConnectorContext())
        with Listening() as server:
            async with gost("-L", "sni://127.0.0.1:0") as at:
                node = Node("sni", at, Transport("tcp", StreamDialer()), connector)
                stream = await node.over(Direct(Names())).connect(Flow(), Endpoint("unused.test", 80))
                await stream.send(f"GET /x HTTP/1.1\r\nHost: localhost:{server.address.port}\r\n\r\n".encode())
                with await server.accept() as target:
                    assert (await target.receive()).startswith(b"GET /x HTTP/1.1\r\n")
                    await target.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
                    assert b"200 OK" in await stream.receive()
                await stream.aclose()

    run(main())


@pytest.mark.parametrize(("name", "passes"), [("open.test", True), ("www.blocked.test", False)])
def test_sniffing_of_what_gost_brings(name: str, passes: bool) -> None:
    authority = Authority()

    async def main() -> None:
        made = Socks5Handler(bind_options(Socks5Handler.Options, {"sniffing": True, "notls": True}), HandlerContext())
        async with tls_server(authority, name) as server:
            egress = Rerouted(server, "*.blocked.test")
            node = "socks5://{}?notls=true"
            async with served(made, egress) as ours, gost("-L", "http://127.0.0.1:0", "-F", node.format(ours)) as at:
                answer = await ask(at, name, "192.0.2.1:443", authority.client_context())
                assert answer == (b"ping" if passes else b"")

    run(main())
