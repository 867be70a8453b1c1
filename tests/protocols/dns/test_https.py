"""DNS over HTTPS from end to end: the listener's mode https, name servers asked by it, and clients that are odd."""

from __future__ import annotations

import asyncio
import gc
import ssl
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import dns.message
import dns.rcode
import pytest

from gostnet.config import schema
from gostnet.core.address import Endpoint
from gostnet.core.errors import ConnError
from gostnet.core.flow import Flow
from gostnet.core.sockets import connect_tcp
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope, run
from gostnet.pipeline.handler import HandlerContext
from gostnet.policies import doh
from gostnet.protocols.dns.handler import DnsHandler
from gostnet.testing.certificates import Authority
from gostnet.transports import dns_https
from gostnet.transports.dns_https import ALPN, query_of
from gostnet.transports.tls import TlsLayer
from gostnet.wire.http2_messages import ShortMessages

from .kit import Upstream, answer, ask, handler, serving, targets, texts

AUTHORITY = Authority()
IDENTITY = AUTHORITY.issue("127.0.0.1")
MEDIA = b"application/dns-message"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("ca") / "ca.pem"
    path.write_bytes(AUTHORITY.certificate)
    return str(path)


def server_side(alpn: Sequence[str] = ALPN) -> TlsLayer:
    return TlsLayer(IDENTITY.server_context(*alpn))


def client_side(ca: str, alpn: Sequence[str] = ALPN) -> TlsLayer:
    return TlsLayer.for_client(schema.TLS(secure=True, ca_file=ca), alpn=alpn)


def asking(address: str, layer: TlsLayer, **options: object) -> DnsHandler:
    """Return a handler whose upstream is asked by HTTPS."""
    hop, written = targets(address)
    context = HandlerContext(service="dns", hop=hop, addresses=written, upstream_tls=layer, upstream_https=layer)
    return DnsHandler(DnsHandler.Options(**options), context)  # type: ignore[arg-type]


def one() -> Upstream:
    return Upstream(lambda query: answer(query, "A 192.0.2.1"))


@asynccontextmanager
async def connected(address: Endpoint, ca: str, alpn: Sequence[str] = ALPN) -> AsyncIterator[Stream]:
    """Connect with TLS."""
    stream = await client_side(ca, alpn).client(Flow(), await connect_tcp(*address), "127.0.0.1")
    try:
        yield stream
    finally:
        stream.abort()


async def everything(stream: Stream) -> bytes:
    found = b""
    try:
        while data := await stream.receive():
            found += data
    except ConnError:
        pass
    return found


# ---- both ends ------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpn", [ALPN, ("http/1.1",), ()])
def test_queries_travel_by_https_and_share_connections(alpn: Sequence[str], ca: str) -> None:
    async def main() -> None:
        async with (
            one().running() as upstream,
            serving(handler(str(upstream.address)), mode="https", tls=server_side()) as secure,
        ):
            made = asking(f"https://{secure}/any/path", client_side(ca, alpn))
            async with serving(made) as address:
                for n in range(3):
                    assert texts(await ask(address, dns.message.make_query(f"n{n}.test", "A"))) == ["192.0.2.1"]
                servers = list(made._by_node.values())
                assert [len(server.kept) for server in servers] == [1]
                assert (servers[0].kept.http2 is not None) == ("h2" in alpn)
                made.close()
                assert len(servers[0].kept) == 0
                assert texts(await ask(address, dns.message.make_query("again.test", "A"))) == ["192.0.2.1"]
            assert len(servers[0].kept) == 0, "the service closes its handler"
            assert len(upstream.asked) == 4

    run(main())


def test_many_queries_are_in_flight_in_one_connection(ca: str) -> None:
    async def main() -> None:
        async with (
            one().running() as upstream,
            serving(handler(f"tcp://{upstream.address}"), mode="https", tls=server_side()) as secure,
        ):
            upstream.hold = asyncio.Event()
            made = asking(f"https://{secure}", client_side(ca))
            async with serving(made) as address:
                scope = Scope("test")
                queries = [dns.message.make_query(f"n{n}.test", "A") for n in range(40)]
                answers = [scope.start(ask(address, query)) for query in queries]
                await upstream.until_asked(len(queries))
                upstream.hold.set()
                await scope.drain(20)
                for query, reply in zip(queries, answers, strict=True):
                    assert query.is_response(dns.message.from_wire(reply.result()))
                (server,) = made._by_node.values()
                assert len(server.kept) == 1

    run(main())


def test_a_full_connection_gives_its_place_to_another_and_ends(ca: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doh, "IN_FLIGHT", 2)

    async def main() -> None:
        async with (
            one().running() as upstream,
            serving(handler(f"tcp://{upstream.address}"), mode="https", tls=server_side()) as secure,
        ):
            upstream.hold = asyncio.Event()
            made = asking(f"https://{secure}", client_side(ca))
            async with serving(made) as address:
                scope = Scope("test")
                answers = [scope.start(ask(address, dns.message.make_query(f"n{n}.test", "A"))) for n in range(3)]
                await upstream.until_asked(3)
                (server,) = made._by_node.values()
                last = server.kept.http2
                upstream.hold.set()
                await scope.drain(20)
                assert [texts(reply.result()) for reply in answers] == [["192.0.2.1"]] * 3
                assert server.kept.http2 is last
                assert last is not None
                assert not last.ended
                sessions = [item for item in gc.get_objects() if isinstance(item, doh.Http2) and not item.ended]
                assert sessions == [last]

    run(main())


def test_an_answer_is_never_cut_for_its_size(ca: str) -> None:
    async def main() -> None:
        records = [f"A 10.{n >> 8}.{n & 255}.1" for n in range(3000)]
        async with (
            Upstream(lambda query: answer(query, *records)).running() as upstream,
            serving(handler(f"tcp://{upstream.address}"), mode="https", tls=server_side()) as secure,
            serving(asking(f"https://{secure}", client_side(ca)), mode="tcp") as address,
        ):
            reader, writer = await asyncio.open_connection(*address)
            query = dns.message.make_query("a.test", "A").to_wire()
            writer.write(len(query).to_bytes(2, "big") + query)
            data = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            assert len(texts(data)) == len(records)
            writer.close()
            await writer.wait_closed()

    run(main())


# ---- an upstream that is odd ------------------------------------------------------------------------
class Odd:
    """A server of HTTP/2 that does as it is told with each request: `act(messages, stream, query)`."""

    def __init__(self) -> None:
        self.acts: list[str] = []
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.address = Endpoint("127.0.0.1", 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        messages = ShortMessages(client=False, limit=65535)
        try:
            while True:
                writer.write(messages.outgoing())
                await writer.drain()
                data = await reader.read(65536)
                if not data:
                    break
                for request in messages.receive(data):
                    if request.fields and not self._act(messages, request.stream, request.body):
                        return
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    def _act(self, messages: ShortMessages, stream: int, body: bytes) -> bool:
        act = self.acts.pop(0) if self.acts else "answer"
        reply = answer(dns.message.from_wire(body), "A 192.0.2.7")
        ok = [(b":status", b"200"), (b"content-type", MEDIA)]
        if act == "close":
            return False
        if act == "end":
            messages.end()
        elif act == "reset":
            messages.cancel(stream)
        elif act == "status":
            messages.respond(stream, [(b":status", b"503"), (b"content-type", MEDIA)], reply)
        elif act == "kind":
            messages.respond(stream, [(b":status", b"200"), (b"content-type", b"text/html")], reply)
        elif act == "other":
            messages.respond(stream, ok, bytes((reply[0] ^ 1,)) + reply[1:])
        elif act == "question":
            messages.respond(stream, ok, reply.replace(b"\4test", b"\4tesx"))
        elif act == "large":
            messages.respond(stream, ok, reply + bytes(66000))
        elif act != "silence":
            messages.respond(stream, ok, reply)
        return True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Odd]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=IDENTITY.server_context("h2"))
        self.address = Endpoint(*server.sockets[0].getsockname()[:2])
        try:
            yield self
        finally:
            for writer in self.writers:
                writer.transport.abort()
            server.close()
            await server.wait_closed()


@pytest.mark.parametrize(
    ("act", "answered", "connections"),
    [
        ("close", True, 2),
        ("end", True, 2),
        ("reset", True, 1),
        ("status", False, 1),
        ("kind", False, 1),
        ("other", False, 1),
        ("question", False, 1),
        ("large", False, 1),
        ("silence", False, 1),
    ],
)
def test_what_goes_wrong_with_one_question_is_not_the_next_ones(
    act: str, answered: bool, connections: int, ca: str
) -> None:
    async def main() -> None:
        async with Odd().running() as odd:
            made = asking(f"https://{odd.address}", client_side(ca), timeout=0.3 if act == "silence" else 5.0)
            async with serving(made) as address:
                assert texts(await ask(address, dns.message.make_query("first.test", "A"))) == ["192.0.2.7"]
                odd.acts = [act]
                reply = dns.message.from_wire(await ask(address, dns.message.make_query("odd.test", "A")))
                assert reply.rcode() == (dns.rcode.NOERROR if answered else dns.rcode.SERVFAIL)
                assert texts(await ask(address, dns.message.make_query("last.test", "A"))) == ["192.0.2.7"]
                assert odd.connections == connections

    run(main())


# ---- clients that are odd -----------------------------------------------------------------------------
QUERY = dns.message.make_query("a.test", "A", id=0).to_wire()
ENCODED = urlsafe_b64encode(QUERY).rstrip(b"=")


@pytest.mark.parametrize(
    ("method", "target", "kind", "body", "found"),
    [
        (b"POST", b"/x", MEDIA, QUERY, QUERY),
        (b"POST", b"/x", b"Application/DNS-message; a=b", QUERY, QUERY),
        (b"POST", b"/x?dns=" + ENCODED, b"text/plain", b"", 415),
        (b"GET", b"/?dns=" + ENCODED, b"", b"", QUERY),
        (b"GET", b"/?a=b&dns=" + ENCODED + b"==", b"", b"", QUERY),
        (b"GET", b"/?dns=a", b"", b"", 400),
        (b"GET", b"/", b"", b"", 400),
        (b"GET", b"/?dns=%%%", b"", b"", 400),
        (b"PUT", b"/", MEDIA, QUERY, 405),
        (b"POST", b"/", MEDIA, QUERY[:11], 400),
        (b"POST", b"/", MEDIA, QUERY[:2] + b"\x80" + QUERY[3:], 400),
        (b"GET", b"/?dns=" + urlsafe_b64encode(QUERY + bytes(65536)), b"", b"", 413),
    ],
)
def test_where_a_request_has_its_query(method: bytes, target: bytes, kind: bytes, body: bytes, found: object) -> None:
    assert query_of(method, target, kind, body) == found


@pytest.mark.parametrize(
    ("request_", "starts"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", [b"HTTP/1.1 400"]),
        (b"BREW / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", [b"HTTP/1.1 405"]),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: x/y\r\nContent-Length: 2\r\n\r\nab", [b"HTTP/1.1 415"]),
        (b"GET /?dns=" + ENCODED + b" HTTP/1.1\r\nHost: a\r\n\r\n", [b"HTTP/1.1 200"]),
        (b"GET /?dns=" + ENCODED + b" HTTP/1.0\r\n\r\n", [b"HTTP/1.1 200"]),
        (b"nonsense\r\n\r\n", [b"HTTP/1.1 400"]),
        (b"GET /" + b"x" * 90000 + b" HTTP/1.1\r\n\r\n", [b"HTTP/1.1 431"]),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/dns-message\r\nContent-Length: 99999\r\n\r\n"
            + bytes(99999),
            [b"HTTP/1.1 413"],
        ),
        (
            b"GET /?dns=%b HTTP/1.1\r\nHost: a\r\n\r\n" % ENCODED * 2
            + b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Type: application/dns-message\r\n"
            + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(QUERY), QUERY),
            [b"HTTP/1.1 200"] * 3,
        ),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/dns-message\r\nExpect: 100-continue\r\n"
            b"Content-Length: %d\r\n\r\n" % len(QUERY),
            [b"HTTP/1.1 100"],
        ),
    ],
)
def test_requests_over_http1(request_: bytes, starts: list[bytes], ca: str) -> None:
    async def main() -> None:
        async with (
            one().running() as upstream,
            serving(handler(str(upstream.address)), mode="https", tls=server_side()) as address,
            connected(address, ca, ("http/1.1",)) as stream,
        ):
            try:
                await stream.send(request_)
            except ConnError:
                pass  # it has been refused before its end
            if starts == [b"HTTP/1.1 100"]:
                assert (await stream.receive()).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
                await stream.send(QUERY)
                starts[:] = [b"HTTP/1.1 200"]
            try:
                await stream.send_eof()
            except ConnError:
                pass
            found = await everything(stream)
            lines = [line for line in found.split(b"\r\n") if b"HTTP/1.1" in line]
            assert [line[line.index(b"HTTP/") :][:12] for line in lines] == starts
            if starts[-1] == b"HTTP/1.1 200":
                assert b"Content-Type: application/dns-message\r\nCache-Control: max-age=" in found
                assert texts(found[-40:])

    run(main())


def test_silent_and_slow_clients_are_let_go(ca: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_https, "IDLE", 0.05)
    monkeypatch.setattr(dns_https, "REQUEST_TIME", 0.05)

    async def main() -> None:
        async with (
            one().running() as upstream,
            serving(handler(str(upstream.address)), mode="https", tls=server_side()) as address,
        ):
            for alpn in ALPN:
                async with connected(address, ca, (alpn,)) as stream:
                    found = await everything(stream)
                    assert found == b"" if alpn != "h2" else found
            async with connected(address, ca, ("http/1.1",)) as stream:
                await stream.send(b"GET / HT")
                assert (await everything(stream)).startswith(b"HTTP/1.1 400")

    run(main())


class Budget:
    """Lets some requests pass."""

    def __init__(self, left: int) -> None:
        self.left = left

    def allow(self, client: Endpoint) -> bool:
        self.left -= 1
        return self.left >= 0


@pytest.mark.parametrize("mode", ["tcp", "https"])
def test_every_query_of_a_connection_counts_against_the_rate_limit(mode: str, ca: str) -> None:
    async def main() -> None:
        async with one().running() as upstream:
            hop, written = targets(str(upstream.address))
            budget = Budget(2)
            context = HandlerContext(service="dns", hop=hop, addresses=written, requests=budget)
            made = DnsHandler(DnsHandler.Options(), context)
            async with serving(made, mode=mode, tls=server_side()) as address:
                # The first of a connection is the service's to count, which has no limit here.
                if mode == "tcp":
                    stream: Stream = await connect_tcp(*address)
                    request = len(QUERY).to_bytes(2, "big") + QUERY
                else:
                    stream = await client_side(ca, ("http/1.1",)).client(
                        Flow(), await connect_tcp(*address), "127.0.0.1"
                    )
                    request = b"GET /?dns=%b HTTP/1.1\r\nHost: a\r\n\r\n" % ENCODED
                await stream.send(request * 5)
                found = await everything(stream)
                assert found.count(b"\xc0\0\2\1") == 3
                assert budget.left == -1
                stream.abort()

    run(main())


def test_who_takes_requests_back_gets_no_more_of_them_in(ca: str) -> None:
    async def main() -> None:
        async with (
            one().running() as upstream,
            serving(handler(str(upstream.address)), mode="https", tls=server_side()) as address,
            connected(address, ca) as stream,
        ):
            upstream.hold = asyncio.Event()
            client = ShortMessages(client=True, limit=65535)
            fields = [(b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"a"), (b":path", b"/")]
            for n in range(3 * dns_https.PIPELINED):
                query = dns.message.make_query(f"n{n}.test", "A").to_wire()
                client.cancel(client.request([*fields, (b"content-type", MEDIA)], query))
                await stream.send(client.outgoing())
            await stream.send(client.outgoing())
            await upstream.until_asked(1)
            assert len(upstream.asked) <= dns_https.PIPELINED
            upstream.hold.set()
            query = dns.message.make_query("last.test", "A").to_wire()
            number = client.request([*fields, (b"content-type", MEDIA)], query)
            await stream.send(client.outgoing())
            async with asyncio.timeout(10):
                while True:
                    found = client.receive(await stream.receive())
                    await stream.send(client.outgoing())
                    if any(message.stream == number and message.body for message in found):
                        break

    run(main())
