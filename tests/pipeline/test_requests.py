"""Requests told apart on one connection: what passes, what waits for another server, what ends it all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.errors import BypassDenied, ProtocolError
from gostnet.core.flow import Flow, Sniffed
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope, run
from gostnet.pipeline.requests import Requests, relay_requests
from gostnet.testing import stream_pair


def get(host: str, path: str = "/", extra: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{extra}\r\n".encode()


def post(host: str, body: bytes, *, chunked: bool = False) -> bytes:
    if chunked:
        return get(host, extra="Transfer-Encoding: chunked\r\n") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return get(host, extra=f"Content-Length: {len(body)}\r\n") + body


FIRST = Sniffed("http", "a.test", method="GET")


def same_host(found: Sniffed) -> bool:
    return found.host == "a.test"


async def passed(data: list[bytes], decide: Callable[[Sniffed], bool] = same_host) -> tuple[bytes, Requests, bytes]:
    """Return what passes of `data`, the stream, and what waits below it."""
    client, inside = stream_pair(window=1 << 20)
    requests = Requests(inside, decide)
    requests.arm(FIRST)
    for piece in data:
        await client.send(piece)
    await client.send_eof()
    got = b""
    while piece := await requests.receive():
        got += piece
    waiting = b""
    if requests.pending is not None:
        while piece := await inside.receive():
            waiting += piece
    return got, requests, waiting


SAME = [
    get("a.test"),
    post("a.test", b"GET / HTTP/1.1\r\nHost: b.test\r\n\r\n"),
    post("a.test", b"x" * 50, chunked=True),
]
OTHER = get("b.test", "/other") + b"what follows"


@given(st.data())
@settings(max_examples=80)
def test_all_passes_up_to_a_request_for_another_host_however_it_is_cut(data: st.DataObject) -> None:
    whole = b"".join(SAME) + OTHER
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=10)))
    edges = [0, *cuts, len(whole)]
    pieces = [whole[start:end] for start, end in pairwise(edges)]

    async def main() -> None:
        got, requests, waiting = await passed(pieces)
        assert got == b"".join(SAME)
        assert requests.pending is not None
        assert (requests.pending.host, requests.pending.path) == ("b.test", "/other")
        assert waiting == OTHER

    run(main())


def test_a_head_that_is_cut_off_passes_with_the_end() -> None:
    async def main() -> None:
        got, requests, _ = await passed([get("a.test"), b"GET /x HT"])
        assert got == get("a.test") + b"GET /x HT"
        assert requests.pending is None

    run(main())


@pytest.mark.parametrize(
    "bad", [b"\x00", b"GET / HTTP/1.1\nHost: b.test\n\n", b"GET / HTTP/1.1\r\nHost : b.test\r\n\r\n"]
)
def test_what_is_no_request_ends_the_connection(bad: bytes) -> None:
    async def main() -> None:
        with pytest.raises(ProtocolError):
            await passed([get("a.test"), bad])

    run(main())


@pytest.mark.parametrize(
    "upgrade", [get("a.test", extra="Connection: Upgrade\r\nUpgrade: websocket\r\n"), get("a.test")]
)
def test_other_protocols_pass_after_an_upgrade_only(upgrade: bytes) -> None:
    frames = b"\x81\x85\x00\x00\x00\x00hello" + get("b.test")

    async def main() -> None:
        if b"Upgrade" in upgrade:
            got, _, _ = await passed([upgrade, frames])
            assert got == upgrade + frames
            # A server that does not care for it goes on with requests, and so do we.
            got, requests, _ = await passed([upgrade, get("a.test"), get("b.test")])
            assert got == upgrade + get("a.test")
            assert requests.pending is not None
            with pytest.raises(ProtocolError):
                await passed([upgrade, b"GET / HTTP/1.1\nHost: b.test\n\n"])
        else:
            with pytest.raises(ProtocolError):
                await passed([upgrade, frames])

    run(main())


@pytest.mark.parametrize(
    "first", [Sniffed("tls", "a.test"), Sniffed("http", "a.test", method="GET", headers=(("Connection", "close"),))]
)
def test_nothing_stays_around_a_stream_without_further_requests(first: Sniffed) -> None:
    async def main() -> None:
        _, inside = stream_pair()
        requests = Requests(inside, same_host)
        assert requests.transparent_over() is inside
        requests.arm(first)
        assert requests.transparent_over() is inside
        requests.arm(FIRST)
        assert requests.transparent_over() is None

    run(main())


class Servers:
    """Servers whose ends the test gets, in the order in which they are reached."""

    def __init__(self) -> None:
        self.ends: asyncio.Queue[tuple[str, Stream]] = asyncio.Queue()
        self.current = ""

    async def reach(self, found: Sniffed) -> Stream:
        self.current = found.host
        ours, theirs = stream_pair()
        self.ends.put_nowait((found.host, theirs))
        return ours

    def stays(self, found: Sniffed) -> bool:
        return found.host == self.current


async def relaying() -> tuple[Stream, Servers, Scope]:
    """Begin to relay from a client whose first request is FIRST; return its end, the servers, and what runs."""
    client, inside = stream_pair()
    servers = Servers()
    requests = Requests(inside, servers.stays)
    requests.arm(FIRST)
    scope = Scope("relay")
    scope.start(relay_requests(Flow(), requests, await servers.reach(FIRST), servers.reach))
    return client, servers, scope


def test_each_host_gets_its_own_connection_and_the_client_keeps_one() -> None:
    async def main() -> None:
        client, servers, scope = await relaying()
        server: Stream | None = None
        for host in ("a.test", "b.test", "a.test"):
            await client.send(get(host))
            if server is not None:
                assert await server.receive() == b""  # it is told that no more comes, and leaves
                await server.aclose()
            name, server = await servers.ends.get()
            assert name == host
            for number in range(2):
                assert await server.receive() == get(host)
                await server.send(b"from " + host.encode())
                assert await client.receive() == b"from " + host.encode()
                if not number:
                    await client.send(get(host))
        await client.send_eof()
        assert server is not None
        assert await server.receive() == b""
        await server.send_eof()
        assert await client.receive() == b""
        await scope.drain(10)
        assert not len(scope)

    run(main())


def test_server_that_does_not_leave_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gostnet.pipeline.requests.GRACE", 0.02)

    async def main() -> None:
        client, servers, scope = await relaying()
        await client.send(get("a.test"))
        _, first = await servers.ends.get()
        assert await first.receive() == get("a.test")
        await first.send(b"one")
        assert await client.receive() == b"one"
        await client.send(get("b.test"))
        assert await first.receive() == b""
        name, second = await servers.ends.get()  # although the first one holds on
        assert name == "b.test"
        assert await second.receive() == get("b.test")
        await second.send(b"two")
        assert await client.receive() == b"two"
        await scope.cancel()

    run(main())


def test_no_server_is_asked_for_a_client_that_was_told_the_end() -> None:
    async def main() -> None:
        client, servers, scope = await relaying()
        await client.send(get("a.test"))
        _, server = await servers.ends.get()
        assert await server.receive() == get("a.test")
        await server.aclose()
        assert await client.receive() == b""
        await client.send(get("b.test"))
        await scope.drain(10)
        assert not len(scope)
        assert servers.ends.empty()

    run(main())


def test_refusal_of_a_later_request_ends_the_connection() -> None:
    async def main() -> None:
        client, inside = stream_pair()
        servers = Servers()

        def decide(found: Sniffed) -> bool:
            if found.host == "b.test":
                raise BypassDenied("b.test is refused")
            return True

        requests = Requests(inside, decide)
        requests.arm(FIRST)
        await client.send(get("a.test") + get("b.test"))
        with pytest.raises(BypassDenied):
            await relay_requests(
                Flow(target=Endpoint("a.test", 80)), requests, await servers.reach(FIRST), servers.reach
            )

    run(main())
