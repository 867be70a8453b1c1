"""Forwarded requests on loopback: framing both ways, persistence, switches, failures, kept connections."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import socket
import struct
import tracemalloc

import h11
import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import BypassDenied, ConnError, DialRefused, DialTimeout, EndOfStream, ProtocolError
from gostnet.core.flow import Flow, Meter, Network, Shaper, Shapers
from gostnet.core.log import Logger, NullSink
from gostnet.core.tasks import run
from gostnet.protocols.http.pool import Pool
from gostnet.testing.memory import stream_pair
from gostnet.wire.gost_target import encode_target
from gostnet.wire.http1 import encode_chunk

from ..vectors import PATIENCE, Peer, echo_server, served
from .kit import OK, Origin, Users, Visit, Watched, answer_to, origin, saying, way_out

EMPTY_503 = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
EMPTY_403 = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"


def get(server: Origin, *lines: bytes, method: bytes = b"GET", version: bytes = b"1.1", path: bytes = b"/") -> bytes:
    start = b"%b http://%b%b HTTP/%b" % (method, server.at, path, version)
    return b"\r\n".join((start, b"Host: " + server.at, *lines, b"", b""))


class Bypassed:
    """A bypass of one port, that can be switched on."""

    def __init__(self, port: int, on: bool = True) -> None:
        self.port = port
        self.on = on

    def contains(self, network: Network, target: Endpoint) -> bool:
        return self.on and target.port == self.port


async def through(
    answer: bytes, *lines: bytes, method: bytes = b"GET", version: bytes = b"1.1", **metadata: object
) -> tuple[bytes, bool]:
    """Send one request to an origin that gives `answer`; return what the client sees up to the end, and whether the

    connection would have gone on: then it was the test that ended it.
    """
    with Watched(dict(metadata)) as handler:
        async with origin(saying(answer)) as server, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server, *lines, method=method, version=version))
                seen = b""
                while piece := await peer.receive():
                    seen += piece
                    if b"\r\n\r\n" in seen and handler.ends.empty() and _complete(seen, method):
                        break
                # What goes on answers the next request; what does not has ended.
                try:
                    await peer.send(get(server, method=method, version=version))
                    more = await peer.receive()
                except OSError:
                    more = b""
                return seen, bool(more)


def _complete(seen: bytes, method: bytes) -> bool:
    head, _, body = seen.partition(b"\r\n\r\n")
    low = head.lower()
    if low.startswith((b"http/1.1 103", b"http/1.1 100")):
        return _complete(body, method)
    if method == b"HEAD" or b" 204 " in low or b" 304 " in low:
        return True
    if b"transfer-encoding: chunked" in low:
        return body.endswith(b"0\r\n\r\n") or (b"\r\n0\r\n" in body and body.endswith(b"\r\n\r\n"))
    for line in low.split(b"\r\n"):
        if line.startswith(b"content-length: "):
            return len(body) >= int(line[16:])
    return False


# ---- answers ------------------------------------------------------------------------------------
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

ANSWERS = {
    "length": (b"GET", OK, OK, True),
    "empty": (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", None, True),
    "length and close": (
        b"GET",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        None,
        False,
    ),
    "until the end": (
        b"GET",
        b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nall of it",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nX: y\r\n\r\nall of it",
        False,
    ),
    "HTTP/1.0": (
        b"GET",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        False,
    ),
    "HTTP/1.0 that goes on": (
        b"GET",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok",
        OK,
        True,
    ),
    "chunks": (b"GET", CHUNKED + b"2\r\nok\r\n0\r\n\r\n", None, True),
    "chunks are said anew": (
        b"GET",
        CHUNKED + b"01;ext=1\r\no\r\n1\r\nk\r\n0;end\r\nX-T: v\r\nHost: evil\r\n\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\nX-T: v\r\n\r\n",
        True,
    ),
    "a length beside chunks is dropped": (
        b"GET",
        b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        CHUNKED + b"2\r\nok\r\n0\r\n\r\n",
        True,
    ),
    "HEAD": (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 70\r\n\r\n", None, True),
    "HEAD of chunks": (b"HEAD", CHUNKED, None, True),
    "HEAD without a length": (b"HEAD", b"HTTP/1.1 200 OK\r\nX: content-length\r\n\r\n", None, True),
    "204": (b"GET", b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n", None, True),
    "204 with a length": (
        b"GET",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        True,
    ),
    "304 keeps its length": (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", None, True),
    "hints": (b"GET", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, None, True),
}


@pytest.mark.parametrize(("method", "answer", "expected", "goes_on"), ANSWERS.values(), ids=ANSWERS.keys())
def test_answers_reach_the_client(method: bytes, answer: bytes, expected: bytes | None, goes_on: bool) -> None:
    assert run(through(answer, method=method)) == (answer if expected is None else expected, goes_on)


HTTP_1_0 = {
    "length": (OK, b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok"),
    "chunks": (
        CHUNKED + b"2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nok",
    ),
    "until the end": (
        b"HTTP/1.1 200 OK\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nok",
    ),
    "hints are not for it": (
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok",
    ),
}


@pytest.mark.parametrize(("answer", "expected"), HTTP_1_0.values(), ids=HTTP_1_0.keys())
def test_clients_of_http_1_0(answer: bytes, expected: bytes) -> None:
    """HT16: it did not ask to go on, so its connection ends; what the head says is GOST's."""

    assert run(through(answer, version=b"1.0")) == (expected, False)


def test_http_1_0_client_that_goes_on() -> None:
    for line in (b"Connection: Keep-Alive", b"Proxy-Connection: keep-alive"):
        assert run(through(OK, line, version=b"1.0"))[1]
        assert not run(through(CHUNKED + b"0\r\n\r\n", line, version=b"1.0"))[1]


@pytest.mark.parametrize("line", [b"Connection: close", b"Proxy-Connection: close", b"Connection: x, CLOSE"])
def test_client_that_wants_to_end(line: bytes) -> None:
    """HT15."""

    expected = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    assert run(through(OK, line)) == (expected, False)


def test_answer_byte_by_byte() -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\n\r\n" + CHUNKED + b"5;x\r\nhello\r\n3\r\nyou\r\n0\r\nA: b\r\n\r\n"

    async def slowly(visit: Visit) -> None:
        await visit.head()
        for byte in answer:
            await visit.send(bytes((byte,)))
            await asyncio.sleep(0)
        await visit.head()

    async def main() -> None:
        async with origin(slowly) as server, served(Watched(), way_out()) as address:
            client = h11.Connection(h11.CLIENT)
            with await Peer.connect(address) as peer:
                await peer.send(get(server))
                client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
                client.send(h11.EndOfMessage())
                body = b""
                while not isinstance(event := client.next_event(), h11.EndOfMessage):
                    if event is h11.NEED_DATA:
                        client.receive_data(await peer.receive())
                    elif isinstance(event, h11.Data):
                        body += bytes(event.data)
                assert body == b"helloyou"
                assert list(event.headers) == [(b"a", b"b")]

    run(main())


BAD_ANSWERS = {
    "nothing": b"",
    "junk": b"junk\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nX: y\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a coding nobody asked for": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "a switch nobody asked for": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
}


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_answers_that_make_no_sense_are_503(answer: bytes) -> None:
    async def once(visit: Visit) -> None:
        await visit.head()
        await visit.send(answer)

    async def main() -> None:
        async with origin(once) as server, served(Watched(), way_out()) as address:
            assert await answer_to(address, get(server)) == EMPTY_503

    run(main())


def test_origin_that_does_not_answer_in_time() -> None:
    async def silent(visit: Visit) -> None:
        await visit.head()
        assert await visit.rest() == b""

    async def main() -> None:
        handler = Watched({"readTimeout": "50ms"})
        async with origin(silent) as server, served(handler, way_out()) as address:
            assert await answer_to(address, get(server)) == EMPTY_503
            assert isinstance((await handler.end())[1], DialTimeout)

    run(main())


def test_time_for_the_answer_begins_when_the_request_has_ended() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def silent(visit: Visit) -> None:
            await visit.head()
            assert await visit.exactly(10) == b"firstlast!"
            ended.set()
            assert await visit.rest() == b""

        handler = Watched({"readTimeout": "100ms"})
        async with origin(silent) as server, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server, b"Content-Length: 10", method=b"POST") + b"first")
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):  # longer than the origin has, but the client is not done
                        await ended.wait()
                await peer.send(b"last!")
                await ended.wait()
                assert await peer.rest() == EMPTY_503
            assert isinstance((await handler.end())[1], DialTimeout)

    run(main())


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"half"),
        (CHUNKED + b"9\r\nhalf", encode_chunk(b"half")),
        (CHUNKED + b"4\r\nhalf\r\n0\r\nX: y", encode_chunk(b"half")),
    ],
)
def test_answer_cut_off_stays_cut_off(answer: bytes, seen: bytes) -> None:
    """HT22: what the framing does not complete must not look complete: no last chunk, no full length."""

    async def breaking_off(visit: Visit) -> None:
        await visit.head()
        await visit.send(answer)

    async def main() -> None:
        handler = Watched()
        async with origin(breaking_off) as server, served(handler, way_out()) as address:
            assert (await answer_to(address, get(server))).partition(b"\r\n\r\n")[2] == seen
            assert isinstance((await handler.end())[1], EndOfStream)

    run(main())


def test_answer_that_only_a_reset_ends_does_not_end_in_order() -> None:
    async def main() -> None:
        read = asyncio.Event()

        async def resetting(visit: Visit) -> None:
            await visit.head()
            await visit.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
            await read.wait()
            sock = visit.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            visit.writer.transport.abort()

        handler = Watched()
        async with origin(resetting) as server, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server))
                expected = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf"
                assert await peer.exactly(len(expected)) == expected
                read.set()
                with pytest.raises(ConnectionResetError):
                    await asyncio.get_running_loop().sock_recv(peer.sock, 65536)
            assert isinstance((await handler.end())[1], ConnError)

    run(main())


# ---- requests -----------------------------------------------------------------------------------
def test_requests_in_a_row_and_pipelined() -> None:
    async def main() -> None:
        async with origin(saying(OK)) as server, origin(saying(OK.replace(b"ok", b"OK"))) as other:
            async with served(Watched(users=Users()), way_out()) as address:
                # Credentials are shown once: the connection is the client's (HT08).
                first = get(server, b"Proxy-Authorization: Basic dXNlcjpwYXNz")
                rest = get(other) + get(server, path=b"/2") + get(other, b"Connection: close")
                with await Peer.connect(address) as peer:
                    await peer.send(first)
                    assert await peer.exactly(len(OK)) == OK
                    await peer.send(rest)
                    seen = await peer.rest()
        bodies = [part[-2:] for part in seen.split(b"HTTP/1.1 200")[1:]]
        assert bodies == [b"OK", b"ok", b"OK"]
        assert server.connections == 2
        assert all(b"Proxy-Authorization" not in head for head in server.seen + other.seen)

    run(main())


BODIES = {
    "length": (b"Content-Length: 11", b"hello world", b"hello world"),
    "chunks": (b"Transfer-Encoding: chunked", b"5;x\r\nhello\r\n06\r\n world\r\n0\r\nX-T: v\r\n\r\n", b"hello world"),
    "no chunks": (b"Transfer-Encoding: chunked", b"0\r\n\r\n", b""),
}


@pytest.mark.parametrize(("line", "data", "payload"), BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("piece", [0, 1, 7])
def test_request_bodies_arrive_and_the_next_request_is_found(
    line: bytes, data: bytes, payload: bytes, piece: int
) -> None:
    """The origin is h11: it takes nothing that is not strictly HTTP."""

    async def strict(visit: Visit) -> None:
        parser = h11.Connection(h11.SERVER)
        body, trailers = b"", b""
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                parser.receive_data(await visit.reader.read(65536))
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                trailers = b"".join(name + b"=" + value for name, value in event.headers)
                break
            elif isinstance(event, h11.ConnectionClosed):
                return
        answer = body + b"|" + trailers
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))

    async def main() -> None:
        async with origin(strict) as server, served(Watched(), way_out()) as address:
            with await Peer.connect(address) as peer:
                message = get(server, line, method=b"POST") + data
                both = message + get(server, b"Connection: close")
                for start in range(0, len(both), piece or len(both)):
                    await peer.send(both[start : start + (piece or len(both))])
                    await asyncio.sleep(0)
                seen = await peer.rest()
        answers = [part.partition(b"\r\n\r\n")[2] for part in seen.split(b"HTTP/1.1 200 OK")[1:]]
        assert answers == [payload + (b"|x-t=v" if b"X-T" in data else b"|"), b"|"]

    run(main())


def test_bodies_stream_both_ways_at_once() -> None:
    """A dialogue: every piece of the request is answered before the next one is sent."""

    async def echo(visit: Visit) -> None:
        head = await visit.head()
        assert b"Transfer-Encoding: chunked" in head
        await visit.send(CHUNKED)
        while (size := int(await visit.until(b"\r\n"), 16)) > 0:
            data = await visit.exactly(size + 2)
            await visit.send(encode_chunk(data[:-2].upper()))
        await visit.exactly(2)
        await visit.send(b"0\r\n\r\n")

    async def main() -> None:
        handler = Watched()
        async with origin(echo) as server, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server, b"Transfer-Encoding: chunked", method=b"POST"))
                # The end of the request is not known yet, so the client is told that this is the last exchange.
                head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
                assert await peer.exactly(len(head)) == head
                for word in (b"one", b"two", b"three"):
                    await peer.send(encode_chunk(word))
                    reply = encode_chunk(word.upper())
                    assert await peer.exactly(len(reply)) == reply
                await peer.send(b"0\r\n\r\n")
                assert await peer.rest() == b"0\r\n\r\n"
            assert (await handler.end())[1] is None

    run(main())


def test_large_bodies_are_not_held() -> None:
    """16 MiB up and down; test, proxy and origin together never hold more than a few reads of it."""
    size = 16 << 20
    block = bytes(range(256)) * 256

    async def upload(visit: Visit) -> None:
        await visit.head()
        digest, left = hashlib.sha256(), size
        while left:
            data = await visit.reader.read(min(left, 65536))
            digest.update(data)
            left -= len(data)
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // len(block)):
            await visit.send(block)
        answer.append(digest.hexdigest())

    answer: list[str] = []
    expected = hashlib.sha256(block * (size // len(block))).hexdigest()

    async def main() -> None:
        async with origin(upload) as server, served(Watched(), way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server, b"Content-Length: %d" % size, method=b"PUT"))
                for _ in range(size // len(block)):
                    await peer.send(block)
                assert (await peer.exactly(17)).startswith(b"HTTP/1.1 200 OK")
                while (await peer.exactly(1)) != b"\n" or (await peer.exactly(2)) != b"\r\n":
                    pass
                digest, left = hashlib.sha256(), size
                while left:
                    data = await peer.receive(262144)
                    digest.update(data)
                    left -= len(data)
                assert digest.hexdigest() == expected
        assert answer == [expected]

    tracemalloc.start()
    try:
        run(main())
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_expectation_is_the_origins_to_meet() -> None:
    """HT13."""

    async def expecting(visit: Visit) -> None:
        assert b"Expect: 100-continue" in await visit.head()
        await visit.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await visit.exactly(4) == b"body"
        await visit.send(OK)

    async def main() -> None:
        async with origin(expecting) as server, served(Watched(), way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server, b"Content-Length: 4", b"Expect: 100-continue", method=b"POST"))
                go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
                assert await peer.exactly(len(go_on)) == go_on
                await peer.send(b"body")
                assert await peer.exactly(len(OK)) == OK

    run(main())


def test_early_refusal_reaches_a_client_that_is_still_sending() -> None:
    answer = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nno!"

    async def refusing(visit: Visit) -> None:
        await visit.head()
        await visit.send(answer)

    async def main() -> None:
        handler = Watched()
        async with origin(refusing) as server, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server, b"Content-Length: 1000000", method=b"POST") + bytes(1000))
                expected = answer.replace(b"\r\nContent-L", b"\r\nConnection: close\r\nContent-L")
                assert await peer.exactly(len(expected)) == expected
                await peer.send(bytes(100000))
                assert await peer.rest() == b""
            assert (await handler.end())[1] is None

    run(main())


def test_origin_that_hangs_up_on_a_request() -> None:
    async def hanging_up(visit: Visit) -> None:
        await visit.head()
        sock = visit.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        visit.writer.transport.abort()

    async def main() -> None:
        handler = Watched()
        async with origin(hanging_up) as server, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server, b"Content-Length: 4000000", method=b"POST") + bytes(500000))
                assert await peer.rest() == EMPTY_503
            assert isinstance((await handler.end())[1], ConnError | EndOfStream)

    run(main())


def test_client_that_breaks_its_body() -> None:
    async def reading(visit: Visit) -> None:
        await visit.head()
        await visit.rest()

    async def main() -> None:
        handler = Watched()
        async with origin(reading) as server, served(handler, way_out()) as address:
            for cut in (True, False):
                request = get(server, b"Transfer-Encoding: chunked", method=b"POST")
                with await Peer.connect(address) as peer:
                    await peer.send(request + (b"" if cut else b"zz\r\n"))
                    if cut:
                        await peer.send(b"zz\r\n")
                    assert await peer.rest() == BAD_REQUEST
                assert isinstance((await handler.end())[1], ProtocolError)
            with await Peer.connect(address) as peer:
                await peer.send(get(server, b"Content-Length: 10", method=b"POST") + b"half")
                peer.shut()
                assert await peer.rest() == BAD_REQUEST
            assert isinstance((await handler.end())[1], EndOfStream)

    run(main())


def test_half_closed_client_gets_its_late_answer() -> None:
    async def main() -> None:
        asked, release = asyncio.Event(), asyncio.Event()

        async def late(visit: Visit) -> None:
            await visit.head()
            asked.set()
            await release.wait()
            await visit.send(OK)

        async with origin(late) as server, served(Watched(), way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server))
                peer.shut()
                await asked.wait()
                release.set()
                assert await peer.rest() == OK

    run(main())


@pytest.mark.parametrize("lines", [(b"Gost-Target: %b",), (b"Gost-Target: x", b"X-Gost-Target: %b")])
def test_hidden_target(lines: tuple[bytes, ...]) -> None:
    async def main() -> None:
        async with origin(saying(OK)) as server, served(Watched(), way_out()) as address:
            value = encode_target(server.at)
            filled = [line % value if b"%b" in line else line for line in lines]
            for start in (b"GET http://front.test/x HTTP/1.1", b"GET /x HTTP/1.1"):
                request = b"\r\n".join((start, b"Host: front.test", *filled, b"Connection: close", b"", b""))
                assert (await answer_to(address, request)).endswith(b"ok")
            assert server.seen == 2 * [
                b"GET /x HTTP/1.1\r\nHost: %b\r\nUser-Agent: Go-http-client/1.1\r\nConnection: close\r\n\r\n"
                % server.at
            ]

    run(main())


def test_connect_after_a_forwarded_request() -> None:
    """HT18."""

    async def main() -> None:
        async with origin(saying(OK)) as server, echo_server() as port, served(Watched(), way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server))
                assert await peer.exactly(len(OK)) == OK
                await peer.send(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\nhello" % port)
                established = b"HTTP/1.1 200 Connection established\r\nProxy-Agent: gost/3.0\r\n\r\n"
                assert await peer.exactly(len(established) + 5) == established + b"hello"

    run(main())


# ---- waiting clients ----------------------------------------------------------------------------
def test_waiting_client_is_closed_when_idle_and_a_slow_head_in_time() -> None:
    async def main() -> None:
        handler = Watched({"idleTimeout": "50ms"})
        async with origin(saying(OK)) as server, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server))
                assert await peer.rest() == OK
            assert (await handler.end())[1] is None
        handler = Watched({"readTimeout": "50ms"})
        async with origin(saying(OK)) as server, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                await peer.send(get(server) + b"GET http://half")
                assert await peer.rest() == OK
            assert isinstance((await handler.end())[1], ProtocolError)

    run(main())


# ---- switches -----------------------------------------------------------------------------------
def test_switch_of_protocols_joins_the_connections() -> None:
    """HT19."""

    switch = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n"

    async def websocket(visit: Visit) -> None:
        head = await visit.head()
        assert b"\r\nConnection: Upgrade\r\nUpgrade: websocket, other\r\n" in head
        assert b"close" not in head
        await visit.send(switch + b"first frame")
        await visit.send((await visit.rest()).upper())

    async def main() -> None:
        handler = Watched()
        async with origin(websocket) as server, served(handler, way_out()) as address:
            with await Peer.connect(address) as peer:
                lines = (b"Connection: keep-alive, Upgrade", b"Upgrade: websocket, other")
                await peer.send(get(server, *lines) + b"early ")
                assert await peer.exactly(len(switch) + 11) == switch + b"first frame"
                await peer.send(b"frames")
                peer.shut()
                assert await peer.rest() == b"EARLY FRAMES"
            assert (await handler.end())[1] is None

    run(main())


def test_switch_that_is_declined_goes_on_as_http() -> None:
    assert run(through(OK, b"Connection: Upgrade", b"Upgrade: h2c")) == (OK, True)


# ---- failures and policies ----------------------------------------------------------------------
def test_origin_that_is_down() -> None:
    async def main() -> None:
        handler = Watched()
        async with origin(saying(OK)) as gone:
            pass
        async with served(handler, way_out()) as address:
            assert await answer_to(address, get(gone)) == EMPTY_503
            assert isinstance((await handler.end())[1], DialRefused)
            assert await answer_to(address, get(gone, version=b"1.0")) == EMPTY_503.replace(b"/1.1", b"/1.0")
            assert await answer_to(address, b"GET /origin-form HTTP/1.1\r\nHost: a.test\r\n\r\n") == EMPTY_503

    run(main())


def test_every_request_is_bypassed_by_itself() -> None:
    """HT18."""

    async def main() -> None:
        handler = Watched()
        async with origin(saying(OK)) as server, origin(saying(OK)) as refused:
            async with served(handler, way_out(bypass=Bypassed(refused.port))) as address:
                assert await answer_to(address, get(refused)) == (
                    b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nProxy-Agent: gost/3.0\r\n\r\n"
                )
                assert isinstance((await handler.end())[1], BypassDenied)
                assert await answer_to(address, get(server) + get(refused) + get(server)) == OK + EMPTY_403
        assert refused.connections == 0

    run(main())


class Slow:
    """A limit that lets seven bytes through at a time and tells how many moved."""

    def __init__(self) -> None:
        self.moved = 0

    def take(self, wanted: int) -> int:
        got = min(7, wanted)
        self.moved += got
        return got

    def give_back(self, unused: int) -> None:
        self.moved -= unused

    def delay(self) -> float:
        return 0.0


class Limiter:
    """Puts the same two limits on every flow."""

    def __init__(self) -> None:
        self.up, self.down = Slow(), Slow()

    def shape(self, flow: Flow, into: Shapers) -> None:
        up: Shaper = self.up
        into.up.append(up)
        into.down.append(self.down)


@pytest.mark.parametrize("keepalive", [False, True])
def test_limits_counts_and_taps_see_every_byte(keepalive: bool) -> None:
    tapped: list[tuple[bytes, bool]] = []

    class Tapping(Watched):
        async def handle(self, flow, conn, egress):  # type: ignore[no-untyped-def]
            flow.taps = [lambda data, up: tapped.append((bytes(data), up))]
            await super().handle(flow, conn, egress)

    async def main() -> None:
        limiter = Limiter()
        with Tapping({"keepalive": keepalive}) as handler:
            async with origin(saying(OK)) as server, served(handler, way_out(traffic=[limiter])) as address:
                for _ in range(2):
                    assert (await answer_to(address, get(server), shut=True)) == OK
                flows = [(await handler.end())[0] for _ in range(2)]
            seen = b"".join(server.seen)
            assert server.connections == (1 if keepalive else 2)
        assert b"".join(data for data, up in tapped if up) == seen
        assert b"".join(data for data, up in tapped if not up) == OK + OK
        assert (limiter.up.moved, limiter.down.moved) == (len(seen), 2 * len(OK))
        assert [flow.meter for flow in flows] == [Meter(len(seen) // 2, len(OK))] * 2

    run(main())


def test_hash_can_be_the_target_and_requests_are_logged() -> None:
    class Lines(NullSink):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[dict[str, object]] = []

        def write(self, line: bytes) -> None:
            self.lines.append(json.loads(line))

    async def main() -> None:
        sink = Lines()
        handler = Watched({"hash": "host"}, log=Logger(sink))
        async with origin(saying(OK)) as server, served(handler, way_out()) as address:
            assert await answer_to(address, get(server, path=b"/secret"), shut=True) == OK
            assert (await handler.end())[0].hash == server.at.decode()
        (line,) = sink.lines
        assert (line["dst"], line["method"], line["status"]) == (server.at.decode(), "GET", 200)
        assert (line["inputBytes"], line["outputBytes"]) == (len(server.seen[0]), len(OK))
        assert "secret" not in str(line)

    run(main())


# ---- compression --------------------------------------------------------------------------------
ZIPPED = gzip.compress(b"hello " * 1000)
TEXT = b"hello " * 1000


def zipped_answer(framing: bytes, data: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Encoding: GZIP\r\n" + framing + b"\r\n" + data


@pytest.mark.parametrize(
    "answer",
    [
        zipped_answer(b"Content-Length: %d\r\n" % len(ZIPPED), ZIPPED),
        zipped_answer(b"Transfer-Encoding: chunked\r\n", encode_chunk(ZIPPED) + b"0\r\n\r\n"),
    ],
)
def test_decoded_answers_are_delimited(answer: bytes) -> None:
    """GOST leaves them without any framing on a connection that stays open (HT14)."""
    seen, goes_on = run(through(answer, compression=True))
    head, _, body = seen.partition(b"\r\n\r\n")
    assert head == b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked"
    assert body == encode_chunk(TEXT) + b"0\r\n\r\n"
    assert goes_on
    assert run(through(answer, version=b"1.0", compression=True)) == (
        b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n" + TEXT,
        False,
    )


def test_decoded_answer_that_ends_with_the_connection() -> None:
    expected = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + TEXT
    assert run(through(zipped_answer(b"", ZIPPED), compression=True)) == (expected, False)


@pytest.mark.parametrize("line", [b"Accept-Encoding: gzip", b"Range: bytes=0-5"])
def test_answers_are_not_decoded_for_who_asked_for_them_so(line: bytes) -> None:
    answer = zipped_answer(b"Content-Length: %d\r\n" % len(ZIPPED), ZIPPED)
    seen, goes_on = run(through(answer, line, compression=True))
    assert seen.endswith(b"Content-Encoding: GZIP\r\n\r\n" + ZIPPED)
    assert goes_on


def test_gzip_that_breaks_off_is_not_completed() -> None:
    broken = ZIPPED[:-4]

    async def main() -> None:
        handler = Watched({"compression": True})
        answer = zipped_answer(b"Content-Length: %d\r\n" % len(broken), broken)
        async with origin(saying(answer)) as server, served(handler, way_out()) as address:
            seen = await answer_to(address, get(server))
            assert not seen.endswith(b"0\r\n\r\n")
            assert isinstance((await handler.end())[1], ProtocolError)

    run(main())


# ---- kept connections ---------------------------------------------------------------------------
def test_kept_connections_serve_any_client() -> None:
    """HT17."""

    async def main() -> None:
        with Watched({"keepalive": True}) as handler:
            async with origin(saying(OK)) as server, served(handler, way_out()) as address:
                for _ in range(3):
                    assert await answer_to(address, get(server), shut=True) == OK
                assert server.connections == 1
                assert len(server.seen) == 3
                assert all(b"Connection" not in head for head in server.seen)

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        OK.replace(b"\r\n", b"\r\nConnection: close\r\n", 1),
        OK + b"unasked",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ],
    ids=["close", "more than the answer", "two framings"],
)
def test_connections_in_doubt_are_not_kept(answer: bytes) -> None:
    async def main() -> None:
        with Watched({"keepalive": True}) as handler:
            async with origin(saying(answer)) as server, served(handler, way_out()) as address:
                for _ in range(2):
                    await answer_to(address, get(server), shut=True)
                assert server.connections == 2

    run(main())


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_kept_connection_that_has_been_closed_is_not_used(method: bytes) -> None:
    async def once(visit: Visit) -> None:
        await visit.head()
        await visit.send(OK)

    async def main() -> None:
        with Watched({"keepalive": True}) as handler:
            async with origin(once) as server, served(handler, way_out()) as address:
                for count in (1, 2, 3):
                    assert await answer_to(address, get(server, method=method), shut=True) == OK
                    assert server.connections == count
                    await handler.end()

    run(main())


def test_request_is_repeated_when_a_kept_connection_closes_on_it() -> None:
    """Only if nothing has been answered, and only where repeating does no harm."""

    async def second_unanswered(visit: Visit) -> None:
        await visit.head()
        await visit.send(OK)
        await visit.head()

    async def main() -> None:
        with Watched({"keepalive": True}) as handler:
            async with origin(second_unanswered) as server, served(handler, way_out()) as address:
                assert await answer_to(address, get(server), shut=True) == OK
                assert await answer_to(address, get(server), shut=True) == OK
                assert server.connections == 2
                assert await answer_to(address, get(server, method=b"POST"), shut=True) == EMPTY_503
                assert server.connections == 2

    run(main())


def test_policies_hold_for_kept_connections() -> None:
    async def main() -> None:
        with Watched({"keepalive": True}) as handler:
            async with origin(saying(OK)) as server:
                bypass = Bypassed(server.port, on=False)
                async with served(handler, way_out(bypass=bypass)) as address:
                    assert await answer_to(address, get(server), shut=True) == OK
                    bypass.on = True
                    assert b" 403 " in await answer_to(address, get(server))
                    assert len(server.seen) == 1

    run(main())


def test_connections_that_authenticate_belong_to_one_client() -> None:
    """HT17: NTLM and Negotiate log a connection in: nobody else may get it."""
    challenge = OK.replace(b"\r\n", b"\r\nWWW-Authenticate: NTLM abc\r\n", 1)

    async def main() -> None:
        for request_line, answers in (
            (b"X: y", [challenge, OK]),
            (b"Authorization: Negotiate abc", [OK]),
        ):
            with Watched({"keepalive": True}) as handler:
                async with origin(saying(*answers)) as server, served(handler, way_out()) as address:
                    with await Peer.connect(address) as peer:
                        for _ in range(3):
                            await peer.send(get(server, request_line))
                            assert (await peer.receive()).endswith(b"ok")
                        assert server.connections == 1
                        other = await answer_to(address, get(server), shut=True)
                        assert other.endswith(b"ok")
                        assert server.connections == 2

    run(main())


def test_bound_connection_ends_when_its_client_goes_elsewhere() -> None:
    challenge = OK.replace(b"\r\n", b"\r\nWWW-Authenticate: Negotiate\r\n", 1)

    async def main() -> None:
        ended = asyncio.Event()

        async def bound(visit: Visit) -> None:
            await visit.head()
            await visit.send(challenge)
            assert await visit.rest() == b""
            ended.set()

        with Watched({"keepalive": True}) as handler:
            async with origin(bound) as one, origin(saying(OK)) as two, served(handler, way_out()) as address:
                with await Peer.connect(address) as peer:
                    await peer.send(get(one) + get(two))
                    assert (await peer.exactly(len(challenge) + len(OK))).endswith(OK)
                    await ended.wait()

    run(main())


def test_pool_takes_streams_that_are_no_sockets_only_where_repeating_is_safe() -> None:
    async def main() -> None:
        ours, theirs = stream_pair()
        pool, where = Pool(), Endpoint("a", 80)
        pool.put(ours, ("node",), where)
        assert pool.take(where, certain=True) is None
        idle = pool.take(where)
        assert idle is not None
        assert (idle.stream, idle.route) == (ours, ("node",))
        ours.abort()
        theirs.abort()
        pool.close()

    run(main())


def test_pool_is_bounded_and_forgets_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "PER_ORIGIN", 2)
    monkeypatch.setattr(Pool, "TOTAL", 3)

    async def main() -> None:
        begins: asyncio.Queue[int] = asyncio.Queue()
        ends: asyncio.Queue[int] = asyncio.Queue()

        async def watched(visit: Visit) -> None:
            number = server.connections
            begins.put_nowait(number)
            assert await visit.rest() == b""
            ends.put_nowait(number)

        egress = way_out()
        async with origin(watched) as server:

            async def open_to(host: str) -> None:
                stream = await egress.connect(Flow(), Endpoint("127.0.0.1", server.port))
                await begins.get()
                pool.put(stream, (), Endpoint(host, 80))

            pool = Pool()
            for host in ("a", "a", "a"):
                await open_to(host)
            assert await ends.get() == 1  # the oldest of this origin makes room
            for host in ("b", "c"):
                await open_to(host)
            assert await ends.get() == 2  # the oldest of all
            assert len(pool) == 3
            assert pool.take(Endpoint("d", 80)) is None
            taken = pool.take(Endpoint("b", 80), certain=True)
            assert taken is not None
            assert len(pool) == 2
            taken.stream.abort()
            assert await ends.get() == 4
            pool.close()
            assert {await ends.get(), await ends.get()} == {3, 5}
            monkeypatch.setattr(Pool, "IDLE", 0.02)
            await open_to("a")
            async with asyncio.timeout(PATIENCE):
                assert await ends.get() == 6
            assert len(pool) == 0

    run(main())
