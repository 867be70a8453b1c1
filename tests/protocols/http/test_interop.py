"""The real gost beside ours: the same requests, the same bytes at both ends; and each as the other's proxy."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.tasks import in_thread, run
from gostnet.pipeline.chain import Chain
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Node
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.http.connector import HttpConnector

from ..vectors import Peer, UdpPeer, echo_server, served
from .kit import Origin, Renamed, Users, Visit, Watched, answer_to, origin, saying, way_out

GOST = os.environ.get("GOST_BIN", "")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not GOST, reason="GOST_BIN is not set: it is the path of a gost binary"),
]

_LISTENING = re.compile(rb"listening on 127\.0\.0\.1:([0-9]+)/")


def _start(*words: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start gost on a free port; return the process and the port that its log names."""
    process = subprocess.Popen([GOST, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    for line in process.stdout:
        if found := _LISTENING.search(line):
            return process, int(found[1])
    raise AssertionError(f"gost {words} did not start")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@asynccontextmanager
async def gost(*words: str) -> AsyncIterator[Endpoint]:
    process, port = await in_thread(_start, *words)
    try:
        yield Endpoint("127.0.0.1", port)
    finally:
        await in_thread(_stop, process)


# ---- the same bytes -----------------------------------------------------------------------------
REQUESTS = {
    "plain": b"GET http://@/x?y=1 HTTP/1.1\r\nHost: @\r\n\r\n",
    "fields": b"GET http://@/ HTTP/1.1\r\nHost: no\r\nx-b: 2\r\nCookie: b\r\nX-A: 1\r\nCOOKIE: a\r\n\r\n",
    "agent": b"GET http://@/ HTTP/1.1\r\nHost: @\r\nuser-agent: t\r\n\r\n",
    "no agent": b"GET http://@/ HTTP/1.1\r\nHost: @\r\nUser-Agent:\r\n\r\n",
    "no path": b"GET http://@ HTTP/1.1\r\nHost: @\r\n\r\n",
    "query only": b"DELETE http://@?q HTTP/1.1\r\nHost: @\r\n\r\n",
    "POST without body": b"POST http://@/ HTTP/1.1\r\nHost: @\r\n\r\n",
    "POST": b"POST http://@/ HTTP/1.1\r\nHost: @\r\nContent-Length: 4\r\nContent-Type: a\r\n\r\nbody",
    "own method": b"BREW http://@/pot HTTP/1.1\r\nHost: @\r\n\r\n",
    "HEAD": b"HEAD http://@/ HTTP/1.1\r\nHost: @\r\n\r\n",
    "HTTP/1.0": b"GET http://@/ HTTP/1.0\r\nHost: @\r\n\r\n",
    "proxy fields": b"GET http://@/ HTTP/1.1\r\nProxy-Authorization: x\r\nGost-Record: off\r\nGost-Target: x\r\n\r\n",
    "other scheme": b"GET https://@/ HTTP/1.1\r\nHost: @\r\n\r\n",
    "origin form": b"GET /x HTTP/1.1\r\nHost: @\r\n\r\n",
    "CONNECT refused": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n",
    "down": b"GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n",
    "down, HTTP/1.0": b"GET http://127.0.0.1:1/ HTTP/1.0\r\n\r\n",
    "switch declined": b"GET http://@/ HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
}

ANSWERS = {
    "length": b"HTTP/1.1 200 Fine\r\nserver: x\r\nContent-Length: 2\r\nSet-Cookie: b\r\nSet-Cookie: a\r\n\r\nok",
    "close": b"HTTP/1.1 200 OK\r\nServer: x\r\nConnection: close\r\nContent-Length: 2\r\nAge: 1\r\n\r\nok",
    "until the end": b"HTTP/1.1 200 OK\r\nServer: x\r\nAge: 1\r\n\r\nok",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n2\r\nok\r\n0\r\nX-T: 1\r\n\r\n",
    "empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nA: b\r\n\r\n",
    "204": b"HTTP/1.1 204 No Content\r\nA: b\r\n\r\n",
    "switch": b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello",
}

# Not here, since ours does better on purpose: what Connection asks of the hop, and a HEAD whose answer has no length.
ALIKE = [
    (request, answer, keepalive)
    for keepalive in ("false", "true")
    for request, answer in (
        *[(name, "length") for name in REQUESTS],
        *[("plain", name) for name in ANSWERS if name != "switch"],
        ("switch declined", "switch"),
    )
    if (request, keepalive) != ("HTTP/1.0", "true")  # GOST passes the client's wish to end on to the origin
]


async def _seen_at_both_ends(proxy: Endpoint, request: bytes, answer: bytes) -> tuple[bytes, list[bytes]]:
    async def once(visit: Visit) -> None:
        head = await visit.head()
        if b"\r\nContent-Length: 4\r\n" in head:
            visit.seen.append(await visit.exactly(4))
        await visit.send(answer)

    def neutral(data: bytes, server: Origin) -> bytes:
        return data.replace(server.at, b"@")

    async with origin(once) as server:
        seen = await answer_to(proxy, request.replace(b"@", server.at), shut=True)
        return neutral(seen, server), [neutral(data, server) for data in server.seen]


@pytest.mark.parametrize(("request_name", "answer_name", "keepalive"), ALIKE)
def test_both_say_the_same(request_name: str, answer_name: str, keepalive: str) -> None:
    async def main() -> None:
        request, answer = REQUESTS[request_name], ANSWERS[answer_name]
        async with gost("-L", f"http://127.0.0.1:0?keepalive={keepalive}") as theirs:
            expected = await _seen_at_both_ends(theirs, request, answer)
        with Watched({"keepalive": keepalive}) as handler:
            async with served(handler, way_out()) as ours:
                assert await _seen_at_both_ends(ours, request, answer) == expected

    run(main())


# ---- each as the other's proxy ------------------------------------------------------------------
def test_gost_as_our_client() -> None:
    async def main() -> None:
        handler = Watched({"udp": True}, users=Users())
        async with echo_server() as port, served(handler, way_out()) as proxy:
            node = f"http://user:pass@{proxy}"
            async with gost("-L", f"tcp://127.0.0.1:0/127.0.0.1:{port}", "-F", node) as front:
                assert await answer_to(front, b"hello", shut=True) == b"hello"
            async with gost("-L", f"udp://127.0.0.1:0/127.0.0.1:{port}", "-F", node) as front:
                with UdpPeer() as peer:
                    await peer.send(b"datagram", front)
                    assert (await peer.receive())[0] == b"datagram"
            async with gost("-L", "http://127.0.0.1:0", "-F", node) as front:
                async with origin(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")) as server:
                    request = b"GET http://%b/ HTTP/1.1\r\n\r\n" % server.at
                    assert (await answer_to(front, request, shut=True)).endswith(b"ok")
            async with gost("-L", f"tcp://127.0.0.1:0/127.0.0.1:{port}", "-F", f"http://user:no@{proxy}") as front:
                assert await answer_to(front, b"hello", shut=True) == b""

    run(main())


def test_gost_as_our_server() -> None:
    async def main() -> None:
        async with echo_server() as port, gost("-L", "http://user:pass@127.0.0.1:0?udp=true") as proxy:
            made = HttpConnector(HttpConnector.Options(), ConnectorContext("user", Secret("pass")))
            node = Node("gost", proxy, Transport("tcp", StreamDialer()), made)
            chain = Chain("chain", [Hop("hop", [node])], Renamed({}))
            async with served(Watched(), way_out(chains=chain)) as front:
                request = b"CONNECT localhost:%d HTTP/1.1\r\n\r\nhello" % port
                assert (await answer_to(front, request, shut=True)).endswith(b"\r\n\r\nhello")
                with await Peer.connect(front) as peer:
                    await peer.send(b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n\r\n")
                    assert (await peer.rest()).startswith(b"HTTP/1.1 503 ")
            target = Endpoint("127.0.0.1", port)
            for asked in (target, None):
                flow = Flow()
                route = chain.route(flow, target, 0.0)
                assert route is not None
                association = await route.associate(flow, asked)
                await association.send([Datagram(b"datagram", target)])
                (answer,) = await association.receive()
                assert (bytes(answer.data), answer.peer) == (b"datagram", target)
                await association.aclose()

    run(main())
