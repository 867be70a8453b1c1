"""Probe resistance: what somebody without credentials sees."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import AuthDenied, DialError, ProtocolError
from gostnet.core.flow import Flow
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.router import ServiceRouter
from gostnet.protocols.http import probe
from gostnet.testing.certificates import Authority
from gostnet.wire.http1 import encode_chunk

from ..vectors import Peer, echo_server, served
from .kit import Renamed, Users, Visit, Watched, answer_to, origin, saying, way_out

CONNECT = b"CONNECT 127.0.0.1:9 HTTP/1.1\r\nHost: 127.0.0.1:9\r\n\r\n"
NO_DECOY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\n"
CHALLENGE = (
    b'HTTP/1.1 407 Proxy Authentication Required\r\nConnection: close\r\nProxy-Authenticate: Basic realm="gost"\r\n\r\n'
)


def hidden(setting: str, **metadata: object) -> Watched:
    return Watched({"probeResist": setting, **metadata}, users=Users())


async def probed(setting: str, request: bytes = CONNECT, egress: ServiceRouter | None = None) -> bytes:
    """Return what a prober sees."""
    handler = hidden(setting)
    async with served(handler, egress or way_out()) as address:
        seen = await answer_to(address, request)
        flow, error = await handler.end()
        assert isinstance(error, AuthDenied)
        assert flow.reason.startswith("no credentials; decoy ")
        return seen


@pytest.mark.parametrize(
    ("setting", "start"),
    [
        ("code:200", b"HTTP/1.1 200 OK\r\n"),
        ("code:404", b"HTTP/1.1 404 Not Found\r\n"),
        ("code:599", b"HTTP/1.1 599 status code 599\r\n"),
    ],
)
def test_code(setting: str, start: bytes) -> None:
    assert run(probed(setting)) == start + b"Connection: close\r\n\r\n"


def test_file(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_bytes(b"<html>" * 30000)
    assert run(probed(f"file:{page}")) == (
        b"HTTP/1.1 200 OK\r\nContent-Length: 180000\r\nConnection: keep-alive\r\nContent-Type: text/html\r\n\r\n"
        + page.read_bytes()
    )
    assert run(probed(f"file:{tmp_path / 'missing'}")) == NO_DECOY
    assert run(probed(f"file:{tmp_path}")) == NO_DECOY


def test_host_gets_this_request_and_all_that_follows() -> None:
    async def main() -> None:
        async def decoy(visit: Visit) -> None:
            assert await visit.head() == (
                b"POST /p HTTP/1.1\r\nHost: x.test\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 4\r\n\r\n"
            )
            assert await visit.exactly(4) == b"body"
            await visit.send(b"first")
            assert await visit.head() == b"GET raw HTTP/1.1\r\n\r\n"
            await visit.send(b"second")

        async with origin(decoy) as server, served(hidden(f"host:127.0.0.1:{server.port}"), way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"POST http://x.test/p HTTP/1.1\r\nContent-Length: 4\r\n\r\nbo")
                await peer.send(b"dy")
                assert await peer.exactly(5) == b"first"
                await peer.send(b"GET raw HTTP/1.1\r\n\r\n")
                assert await peer.rest() == b"second"

    run(main())


def test_host_without_a_port_or_that_is_down() -> None:
    async def main() -> None:
        async with echo_server() as port:
            egress = way_out({80: port})
            async with served(hidden("host:127.0.0.1"), egress) as address:
                seen = await answer_to(address, CONNECT, shut=True)
                assert seen.startswith(b"CONNECT 127.0.0.1:9 HTTP/1.1\r\n")
        assert await probed(f"host:127.0.0.1:{port}") == NO_DECOY

    run(main())


WEB_ANSWERS = {
    "length": (
        b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 4\r\n\r\npage",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: keep-alive\r\nServer: x\r\n\r\npage",
    ),
    "not found": (
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone",
    ),
    "chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + encode_chunk(b"pa")
        + encode_chunk(b"ge")
        + b"0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\npage",
    ),
    "until the end": (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\npage",
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\npage",
    ),
    "gzip": (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
        % (len(gzip.compress(b"page", mtime=0)), gzip.compress(b"page", mtime=0)),
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\npage",
    ),
    "hints first": (
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n",
    ),
    "junk": (b"junk: content-length\r\n\r\n", NO_DECOY),
    "redirect without a place": (
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
    ),
    "redirect to nowhere": (b"HTTP/1.1 302 Found\r\nLocation: http://[x/\r\nContent-Length: 0\r\n\r\n", NO_DECOY),
    "redirect to another scheme": (b"HTTP/1.1 302 Found\r\nLocation: ftp://x/\r\nContent-Length: 0\r\n\r\n", NO_DECOY),
}


@pytest.mark.parametrize(("answer", "expected"), WEB_ANSWERS.values(), ids=WEB_ANSWERS.keys())
def test_web(answer: bytes, expected: bytes) -> None:
    async def main() -> None:
        async with origin(saying(answer)) as server:
            assert await probed(f"web:127.0.0.1:{server.port}/x?y") == expected
        assert server.seen == [
            b"GET /x?y HTTP/1.1\r\nHost: %b\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n"
            % server.at
        ]

    run(main())


def test_web_without_a_body_for_head() -> None:
    async def main() -> None:
        async with origin(saying(WEB_ANSWERS["length"][0])) as server:
            seen = await probed(f"web:127.0.0.1:{server.port}", b"HEAD http://x.test/ HTTP/1.1\r\n\r\n")
            assert seen == WEB_ANSWERS["length"][1].removesuffix(b"page")

    run(main())


def test_web_follows_redirects() -> None:
    async def main() -> None:
        def to(where: bytes) -> bytes:
            return b"HTTP/1.1 301 Moved\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % where

        async with origin(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npage")) as last:
            async with origin(saying(to(b"/relative"), to(b"http://%b/other" % last.at))) as first:
                assert (await probed(f"web:http://127.0.0.1:{first.port}/")).endswith(b"\r\n\r\npage")
                assert [head.split()[1] for head in first.seen] == [b"/", b"/relative"]
                assert last.seen[0].startswith(b"GET /other ")
        async with origin(saying(to(b"/again"))) as circle:
            assert await probed(f"web:127.0.0.1:{circle.port}") == NO_DECOY
            assert circle.connections == probe.MOST_REDIRECTS + 1

    run(main())


def test_web_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    context = authority.issue("localhost").server_context()
    page = bytes(range(256)) * 1000
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(page), page)

    async def main() -> None:
        async with origin(saying(answer), context) as server:
            # Nobody trusts this authority by default.
            assert await probed(f"web:https://localhost:{server.port}/") == NO_DECOY
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
            assert (await probed(f"web:https://localhost:{server.port}/")).endswith(page)

    run(main())


def test_web_that_breaks_off_or_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaking_off(visit: Visit) -> None:
        await visit.head()
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npage")

    async def late(visit: Visit) -> None:
        await visit.head()
        await visit.rest()

    async def main() -> None:
        async with origin(breaking_off) as server:
            assert (await probed(f"web:127.0.0.1:{server.port}")).endswith(b"page")
        monkeypatch.setattr(probe, "TIMEOUT", 0.05)
        async with origin(late) as server:
            assert await probed(f"web:127.0.0.1:{server.port}") == NO_DECOY

    run(main())


def test_decoys_are_reached_directly() -> None:
    class Nowhere:
        async def connect(self, flow: Flow, target: Endpoint) -> Stream:
            raise DialError("the way of the proxy's own clients")

        async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
            raise DialError("no")

    class Chains:
        selective = False

        def route(self, flow: Flow, target: Endpoint, now: float) -> Nowhere:
            raise DialError("the way of the proxy's own clients")

    async def main() -> None:
        async with origin(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npage")) as server:
            egress = ServiceRouter(Renamed({}), Chains())  # type: ignore[arg-type]
            assert (await probed(f"web:127.0.0.1:{server.port}", egress=egress)).endswith(b"page")

    run(main())


# ---- who sees it --------------------------------------------------------------------------------
async def seen_by(handler: Watched, request: bytes) -> bytes:
    async with served(handler, way_out()) as address:
        return await answer_to(address, request)


def test_knocking_gets_the_challenge() -> None:
    for knock, request, told in (
        ("a.test, B.test", b"CONNECT b.TEST:443 HTTP/1.1\r\n\r\n", True),
        ("a.test", b"GET http://a.test/ HTTP/1.1\r\n\r\n", True),
        ("a.test", b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n", False),
        ("a.test", b"CONNECT c.test:443 HTTP/1.1\r\n\r\n", False),
    ):
        seen = run(seen_by(hidden("code:404", knock=knock), request))
        assert (seen == CHALLENGE) is told


@pytest.mark.parametrize(
    "request_bytes", [b"garbage\r\n\r\n", b"\x16\x03\x01", b"GET / HTTP/1.1\n\n", b"PRI * HTTP/2.0\r\n\r\n"]
)
def test_malformed_requests_tell_nothing(request_bytes: bytes) -> None:
    async def main() -> None:
        handler = hidden("code:404")
        async with served(handler, way_out()) as address:
            assert await answer_to(address, request_bytes) == b""
            assert isinstance((await handler.end())[1], ProtocolError)

    run(main())


def test_a_decoy_needs_credentials_to_hide_behind() -> None:
    async def main() -> None:
        async with origin(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npage")) as server:
            async with served(Watched({"probeResist": "code:404"}), way_out()) as address:
                request = b"GET http://%b/ HTTP/1.1\r\n\r\n" % server.at
                assert (await answer_to(address, request, shut=True)).endswith(b"page")

    run(main())


def test_right_credentials_see_the_proxy() -> None:
    async def main() -> None:
        async with echo_server() as port, served(hidden("code:404"), way_out()) as address:
            request = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nProxy-Authorization: Basic dXNlcjpwYXNz\r\n\r\nx" % port
            assert (await answer_to(address, request, shut=True)).endswith(b"\r\n\r\nx")

    run(main())
