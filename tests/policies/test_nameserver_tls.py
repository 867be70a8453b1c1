"""Name servers asked over TLS and HTTPS: certificates, connections that are kept, and HTTP that is odd."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import dns.message
import pytest

from gostnet.config import schema
from gostnet.core.address import Endpoint
from gostnet.core.errors import ConfigError, ResolveError
from gostnet.core.tasks import Scope, run
from gostnet.policies.nameserver import CONNECTIONS, KEPT, NameServer, Transport, exchange, parse_path, parse_server
from gostnet.policies.resolver import DNSResolver
from gostnet.testing.certificates import Authority
from gostnet.transports.tls import TlsLayer

from .dns_kit import Loopback, Upstream

TRUSTED = Authority()
Shape = Callable[[bytes], bytes]
"""Makes an HTTP response of the message that is the answer."""


def response(message: bytes, *fields: str, status: str = "200 OK", kind: str = "application/dns-message") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(message)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + message


class Secure:
    """A DoT or DoH server. `connections` counts them; each is closed after `serves` answers (0 never)."""

    def __init__(self, upstream: Upstream, names: Sequence[str], *, authority: Authority = TRUSTED) -> None:
        self.upstream = upstream
        self.context = authority.issue(*names).server_context()
        self.shape: Shape = response
        self.connections = 0
        self.ended = asyncio.Event()
        self.writers: list[asyncio.StreamWriter] = []
        self.serves = 0
        self.heads: list[bytes] = []
        self.names: list[str | None] = []
        self.address = Endpoint("127.0.0.1", 0)
        self.context.sni_callback = lambda sock, name, context: self.names.append(name)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        answered = 0
        try:
            while True:
                first = await reader.readexactly(2)
                if first == b"PO":
                    head = first + await reader.readuntil(b"\r\n\r\n")
                    self.heads.append(head)
                    length = re.search(rb"Content-Length: (\d+)", head)
                    assert length is not None
                    found = await self.upstream.reply(await reader.readexactly(int(length[1])), "https")
                    writer.write(self.shape(found[0]))
                else:
                    found = await self.upstream.reply(await reader.readexactly(int.from_bytes(first, "big")), "tls")
                    writer.write(len(found[0]).to_bytes(2, "big") + found[0])
                await writer.drain()
                answered += 1
                if answered == self.serves:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()
            self.ended.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Secure]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.context)
        self.address = Endpoint(*server.sockets[0].getsockname()[:2])
        try:
            yield self
        finally:
            for writer in self.writers:
                writer.transport.abort()
            server.close()
            await server.wait_closed()


@pytest.fixture
def layer(tmp_path_factory: pytest.TempPathFactory) -> TlsLayer:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    path.write_bytes(TRUSTED.certificate)
    return TlsLayer.for_client(schema.TLS(secure=True, ca_file=str(path)))


ZONE = {"a.test": {"A": ["192.0.2.1"]}, "b.test": {"A": ["192.0.2.2"]}}
BOTH = pytest.mark.parametrize("transport", ["tls", "https"])


def server_of(secure: Secure, layer: TlsLayer, transport: Transport, way: Loopback, **more: object) -> NameServer:
    options = {"hostname": "dns.test", "timeout": 5.0, **more}
    return NameServer(address=secure.address, egress=way, transport=transport, tls=layer, **options)  # type: ignore[arg-type]


@BOTH
def test_questions_share_a_connection_and_the_egress_is_used(transport: Transport, layer: TlsLayer) -> None:
    async def main() -> None:
        way = Loopback()
        async with Secure(Upstream(ZONE), ["dns.test"]).running() as secure:
            resolver = DNSResolver([server_of(secure, layer, transport, way)])
            assert await resolver.resolve("a.test") == ["192.0.2.1"]
            assert await resolver.resolve("b.test") == ["192.0.2.2"]
            assert secure.connections == 1
            assert way.opened == [f"tcp {secure.address}"]
            assert secure.names == ["dns.test"]
            assert len(resolver.servers[0].kept) == 1
            await resolver.aclose()
            assert len(resolver.servers[0].kept) == 0

    run(main())


@BOTH
@pytest.mark.parametrize("kind", ["name", "issuer"])
def test_a_server_that_cannot_prove_its_name_is_not_believed(transport: Transport, kind: str, layer: TlsLayer) -> None:
    async def main() -> None:
        upstream = Upstream(ZONE)
        names = ["other.test"] if kind == "name" else ["dns.test"]
        authority = Authority("somebody else") if kind == "issuer" else TRUSTED
        secure = Secure(upstream, names, authority=authority)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        async with secure.running():
            resolver = DNSResolver([server_of(secure, layer, transport, Loopback())])
            with pytest.raises(ResolveError, match="certificate"):
                await resolver.resolve("a.test")
            assert upstream.asked == []

    run(main())


@BOTH
def test_the_address_is_the_name_where_none_is_given(transport: Transport, layer: TlsLayer) -> None:
    async def main() -> None:
        async with Secure(Upstream(ZONE), ["127.0.0.1"]).running() as secure:
            resolver = DNSResolver([server_of(secure, layer, transport, Loopback(), hostname="")])
            assert await resolver.resolve("a.test") == ["192.0.2.1"]
            await resolver.aclose()

    run(main())


@BOTH
def test_a_kept_connection_that_died_is_replaced(transport: Transport, layer: TlsLayer) -> None:
    async def main() -> None:
        async with Secure(Upstream(ZONE), ["dns.test"]).running() as secure:
            secure.serves = 1
            resolver = DNSResolver([server_of(secure, layer, transport, Loopback())])
            assert await resolver.resolve("a.test") == ["192.0.2.1"]
            async with asyncio.timeout(5):
                await secure.ended.wait()
            assert await resolver.resolve("b.test") == ["192.0.2.2"]
            assert secure.connections == 2
            await resolver.aclose()

    run(main())


def test_many_questions_at_once_are_bounded_in_connections(layer: TlsLayer) -> None:
    async def main() -> None:
        upstream = Upstream(ZONE)
        upstream.hold = asyncio.Event()
        async with Secure(upstream, ["dns.test"]).running() as secure:
            server = server_of(secure, layer, "tls", Loopback(), timeout=20.0)
            scope = Scope("test")
            query = dns.message.make_query("a.test", "A").to_wire()
            tasks = [scope.start(exchange(server, query, lambda data: data)) for _ in range(CONNECTIONS + 8)]
            await upstream.until_asked(CONNECTIONS)
            assert secure.connections == CONNECTIONS
            upstream.hold.set()
            await scope.drain(20)
            assert len([task.result() for task in tasks]) == CONNECTIONS + 8
            assert len(server.kept) == KEPT
            server.kept.close()

    run(main())


def test_the_request_is_a_post_of_the_message(layer: TlsLayer) -> None:
    async def main() -> None:
        async with Secure(Upstream(ZONE), ["dns.test"]).running() as secure:
            resolver = DNSResolver([server_of(secure, layer, "https", Loopback(), path="/x?y=1")])
            await resolver.resolve("a.test")
            lines = secure.heads[0].decode().split("\r\n")
            assert lines[0] == "POST /x?y=1 HTTP/1.1"
            assert f"Host: dns.test:{secure.address.port}" in lines
            assert "Content-Type: application/dns-message" in lines
            assert "Accept: application/dns-message" in lines
            await resolver.aclose()

    run(main())


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/dns-message\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        (lambda m: CHUNKED + b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (5, m[:5], len(m) - 5, m[5:]), True),
        (lambda m: b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + response(m), True),
        (lambda m: response(m, kind="Application/DNS-Message; charset=x"), True),
        (lambda m: response(m, "Connection: close"), False),
        (lambda m: response(m) + b"more", False),
    ],
)
def test_answers_in_every_form(shape: Shape, kept: bool, layer: TlsLayer) -> None:
    async def main() -> None:
        async with Secure(Upstream(ZONE), ["dns.test"]).running() as secure:
            secure.shape = shape
            resolver = DNSResolver([server_of(secure, layer, "https", Loopback())])
            assert await resolver.resolve("a.test") == ["192.0.2.1"]
            assert len(resolver.servers[0].kept) == kept
            await resolver.aclose()

    run(main())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (lambda m: response(m, status="404 Not Found"), "HTTP status 404"),
        (lambda m: response(m, kind="text/html"), "not application/dns-message"),
        (lambda m: response(b""), "without a message"),
        (lambda m: response(m[:-1]), "no answer to the question"),
        (lambda m: response(b"\0" + m), "no answer to the question"),
        (lambda m: response(m, "Transfer-Encoding: gzip"), "gzip"),
        (lambda m: response(b"x" * 70000), "more than 65535"),
        (lambda m: b"SSH-2.0-x\r\n\r\n", "malformed status line"),
    ],
)
def test_answers_that_are_none(shape: Shape, message: str, layer: TlsLayer) -> None:
    async def main() -> None:
        async with Secure(Upstream(ZONE), ["dns.test"]).running() as secure:
            secure.shape = shape
            server = server_of(secure, layer, "https", Loopback())
            resolver = DNSResolver([server])
            with pytest.raises(ResolveError, match=message):
                await resolver.resolve("a.test")
            assert len(server.kept) == 0

    run(main())


@pytest.mark.parametrize(
    ("text", "transport", "address", "path"),
    [
        ("tls://9.9.9.9", "tls", Endpoint("9.9.9.9", 853), "/dns-query"),
        ("DoT://dns.test:8853", "tls", Endpoint("dns.test", 8853), "/dns-query"),
        ("https://dns.test", "https", Endpoint("dns.test", 443), "/dns-query"),
        ("https://[2001:db8::1]:8443/q{?dns}", "https", Endpoint("2001:db8::1", 8443), "/q"),
        ("https://dns.test/a/b?c#d", "https", Endpoint("dns.test", 443), "/a/b?c"),
        ("9.9.9.9", "udp", Endpoint("9.9.9.9", 53), "/dns-query"),
    ],
)
def test_addresses(text: str, transport: str, address: Endpoint, path: str) -> None:
    assert parse_server(text, "addr", secure=True) == (transport, address)
    assert parse_path(text, "addr") == path


def test_a_path_that_no_request_can_hold_is_an_error() -> None:
    for bad in ("https://dns.test/a b", "https://dns.test/\r\nx", "https://dns.test/é"):
        with pytest.raises(ConfigError, match="addr"):
            parse_path(bad, "addr")
