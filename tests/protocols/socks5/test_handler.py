"""The SOCKS5 handler in a service on loopback: CONNECT, refusals, hostile clients."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import (
    AuthDenied,
    BypassDenied,
    DialError,
    DialRefused,
    DialTimeout,
    DialUnreachable,
    EndOfStream,
    GostnetError,
    LimitDenied,
    NoRoute,
    ProtocolError,
    ResolveError,
    UpstreamRejected,
)
from gostnet.core.flow import Flow, Network
from gostnet.core.log import WARN, Logger, Sink
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.handler import HandlerContext
from gostnet.protocols.socks5.handler import Socks5Handler

from ..vectors import Listening, Peer, closed_port, echo_server, router, served
from .kit import Failing, Observed, Users, opened, request


def refusal(code: int) -> bytes:
    return bytes((5, code)) + bytes.fromhex("0001000000000000")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_connect_reaches_addresses_and_names(host: str) -> None:
    async def main() -> None:
        handler = Observed()
        async with echo_server() as port, served(handler) as address:
            with await opened(address, Endpoint(host, port)) as peer:
                await peer.send(b"hello")
                assert await peer.exactly(5) == b"hello"
                peer.shut()
                assert await peer.rest() == b""
            flow, error = await handler.end()
            assert error is None
            assert flow.target == Endpoint(host, port)
            assert flow.connected
            assert (flow.meter.up, flow.meter.down) == (5, 5)

    run(main())


def test_connect_reaches_ipv6_and_tells_the_local_address() -> None:
    async def main() -> None:
        async with served(Observed(), host="::1") as address:
            with Listening("::1") as target, await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00")
                assert await peer.exactly(2) == b"\x05\x00"
                await peer.send(request(1, target.address))
                reply = await peer.exactly(22)
                with await target.accept() as server:
                    remote = Endpoint.from_sockaddr(server.sock.getpeername())
                    assert reply == request(0, remote)

    run(main())


def test_an_empty_host_is_this_host() -> None:
    async def main() -> None:
        handler = Observed()
        async with echo_server() as port, served(handler) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00" + b"\x05\x01\x00\x03\x00" + port.to_bytes(2, "big") + b"hi")
                assert (await peer.exactly(12))[:4] == b"\x05\x00\x05\x00"
                assert await peer.exactly(2) == b"hi"
            flow, _ = await handler.end()
            assert flow.target == Endpoint("127.0.0.1", port)

    run(main())


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_nothing_that_comes_early_is_lost(size: int) -> None:
    """GOST throws away what follows the request in the same read."""

    async def main() -> None:
        async with echo_server() as port, served(Observed(users=Users())) as address:
            dialogue = b"\x05\x02\x00\x02" + b"\x01\x04user\x04pass" + request(1, Endpoint("127.0.0.1", port))
            data = dialogue + b"early payload"
            with await Peer.connect(address) as peer:
                for start in range(0, len(data), size):
                    await peer.send(data[start : start + size])
                assert (await peer.exactly(14))[:8] == b"\x05\x02\x01\x00\x05\x00\x00\x01"
                assert await peer.exactly(13) == b"early payload"

    run(main())


def test_an_answer_that_comes_long_after_the_client_has_said_its_last_arrives_whole() -> None:
    async def main() -> None:
        answer = bytes(range(256)) * 4096
        handler = Observed()
        with Listening() as target:
            async with served(handler) as address:
                with await opened(address, target.address) as peer, await target.accept() as server:
                    await peer.send(b"question")
                    peer.shut()
                    assert await server.rest() == b"question"
                    later = asyncio.get_running_loop().create_future()
                    asyncio.get_running_loop().call_later(0.3, later.set_result, None)
                    await later
                    async with asyncio.TaskGroup() as group:
                        received = group.create_task(peer.rest())
                        await server.send(answer)
                        server.close()
                    assert received.result() == answer
                _, error = await handler.end()
                assert error is None

    run(main())


def test_a_client_may_go_on_after_the_target_has_said_its_last() -> None:
    """GOST closes the client's connection then."""

    async def main() -> None:
        with Listening() as target:
            async with served(Observed()) as address:
                with await opened(address, target.address) as peer, await target.accept() as server:
                    await server.send(b"bye")
                    server.shut()
                    assert await peer.rest() == b"bye"
                    await peer.send(b"still here")
                    peer.shut()
                    assert await server.rest() == b"still here"

    run(main())


# ---- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BypassDenied("no"), 2),
        (LimitDenied("no"), 2),
        (AuthDenied("no"), 2),
        (DialRefused("no"), 3),
        (DialUnreachable("no"), 3),
        (DialTimeout("no"), 3),
        (ResolveError("no"), 3),
        (NoRoute("no"), 3),
        (UpstreamRejected("no", 5), 3),
        (DialError("no"), 3),
        (ProtocolError("no"), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_failure_has_the_reply_of_gost(error: GostnetError, code: int) -> None:
    """SK05: 2 for what a policy refuses, 3 for whatever else goes wrong."""

    async def main() -> None:
        handler = Observed()
        async with served(handler, Failing(error)) as address, asyncio.timeout(10):
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00" + request(1, Endpoint("192.0.2.1", 80)))
                assert await peer.rest() == b"\x05\x00" + refusal(code)
            assert await handler.failure() is error

    run(main())


def test_a_refusal_reaches_a_client_that_has_sent_more() -> None:
    async def main() -> None:
        handler = Observed()
        async with served(handler) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00" + request(1, Endpoint("127.0.0.1", closed_port())) + bytes(20_000))
                assert await peer.exactly(12) == b"\x05\x00" + refusal(3)
            assert isinstance(await handler.failure(), DialRefused)

    run(main())


class Bypass:
    """Refuses one host, in every network."""

    def __init__(self, host: str) -> None:
        self.host = host

    def contains(self, network: Network, target: Endpoint) -> bool:
        return target.host == self.host


def test_a_bypassed_target_is_not_allowed() -> None:
    async def main() -> None:
        async with echo_server() as port, served(Observed(), router(bypass=Bypass("127.0.0.1"))) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00" + request(1, Endpoint("127.0.0.1", port)))
                assert await peer.rest() == b"\x05\x00" + refusal(2)
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00\x05\x01\x00\x03\x00" + port.to_bytes(2, "big"))
                assert await peer.rest() == b"\x05\x00" + refusal(2), "an empty host goes around the bypass"

    run(main())


@pytest.mark.parametrize(
    ("command", "target", "options", "code"),
    [
        (0x02, Endpoint("0.0.0.0", 0), {"bind": True}, 2),
        (0xF2, Endpoint("0.0.0.0", 0), {"bind": True}, 2),
        (0xF3, Endpoint("0.0.0.0", 9000), {"bind": True, "udp": True}, 2),
        (0xF3, Endpoint("0.0.0.0", 0), {}, 2),
        (0x03, Endpoint("0.0.0.0", 0), {}, 2),
        (0xF0, Endpoint("example.com", 0), {"tor": True}, 7),
        (0xF1, Endpoint("192.0.2.1", 0), {"tor": True}, 7),
        (0x00, Endpoint("192.0.2.1", 80), {}, 7),
        (0x77, Endpoint("192.0.2.1", 80), {}, 7),
    ],
)
def test_commands_that_are_off_are_refused_as_gost_does(
    command: int, target: Endpoint, options: dict[str, Any], code: int
) -> None:
    async def main() -> None:
        async with served(Observed(**options)) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00" + request(command, target))
                assert await peer.rest() == b"\x05\x00" + refusal(code)

    run(main())


class Lines(Sink):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.lines: list[str] = []

    def write(self, line: bytes) -> None:
        self.lines.append(line.decode())


def test_features_that_are_not_there_are_named_when_they_are_asked_for() -> None:
    sink = Lines()
    context = HandlerContext(log=Logger(sink, WARN))
    Socks5Handler(Socks5Handler.Options(bind=True, tor=True), context)
    assert [name in line for name, line in zip(("bind", "tor"), sink.lines, strict=True)] == [True, True]
    sink.lines.clear()
    Socks5Handler(Socks5Handler.Options(), context)
    assert sink.lines == []


# ---- who is it ----------------------------------------------------------------------------------
def test_the_client_id_is_on_the_flow_before_the_way_out_is_asked() -> None:
    class Way(Failing):
        seen = ""

        async def connect(self, flow: Flow, target: Endpoint) -> Stream:
            self.seen = flow.user
            raise self.error

    async def main() -> None:
        way = Way(DialRefused("no"))
        async with served(Observed(users=Users()), way) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x02" + b"\x01\x04user\x04pass" + request(1, Endpoint("192.0.2.1", 80)))
                assert await peer.rest() == b"\x05\x02\x01\x00" + refusal(3)
        assert way.seen == "id-of-user"

    run(main())


@pytest.mark.parametrize(("option", "hashed"), [("", "127.0.0.1"), ("host", "192.0.2.1:80")])
def test_the_hash_is_of_the_client_or_of_the_target(option: str, hashed: str) -> None:
    async def main() -> None:
        handler = Observed(hash=option)
        async with served(handler, Failing(DialRefused("no"))) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00" + request(1, Endpoint("192.0.2.1", 80)))
                await peer.rest()
            flow, _ = await handler.end()
            assert flow.hash == hashed

    run(main())


# ---- hostile clients ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sent", "answer", "error"),
    [
        ("", "", EndOfStream),
        ("05", "", EndOfStream),
        ("0503", "", EndOfStream),
        ("050100", "0500", EndOfStream),
        ("050100" + "05010003ff", "0500", EndOfStream),
        ("0400", "", ProtocolError),
        ("160301", "", ProtocolError),
        ("474554202f20485454502f312e310d0a0d0a", "", ProtocolError),
        ("0500", "", ProtocolError),
        ("050102", "05ff", ProtocolError),
        ("050100" + "0401", "0500", EndOfStream),
        ("050100" + "04010001aa", "0500", ProtocolError),
        ("050100" + "05010002aabbccdd0050", "0500", ProtocolError),
        ("050100" + "0501000302ff000050", "0500", ProtocolError),
        ("050100" + "05010003040a0d0a0d0050", "0500", ProtocolError),
        ("05ff" + "00" * 255 + "05010001", "0500", EndOfStream),
    ],
)
def test_nonsense_is_closed_without_a_reply(sent: str, answer: str, error: type[GostnetError]) -> None:
    async def main() -> None:
        handler = Observed()
        async with served(handler) as address:
            with await Peer.connect(address) as peer:
                await peer.send(bytes.fromhex(sent))
                peer.shut()
                assert (await peer.rest()).hex() == answer
            assert type(await handler.failure()) is error

    run(main())


@pytest.mark.parametrize("sent", ["", "05", "050100", "050100" + "050100017f00"])
def test_a_client_that_falls_silent_is_closed_at_the_deadline(sent: str) -> None:
    async def main() -> None:
        handler = Observed(read_timeout=0.2)
        async with served(handler) as address:
            loop = asyncio.get_running_loop()
            before = loop.time()
            with await Peer.connect(address) as peer:
                await peer.send(bytes.fromhex(sent))
                assert await peer.rest() == (b"\x05\x00" if len(sent) > 2 else b"")
                assert 0.15 < loop.time() - before < 5
            assert "no request within 0.2s" in str(await handler.failure())

    run(main())


def test_a_client_that_trickles_does_not_extend_the_deadline() -> None:
    async def main() -> None:
        handler = Observed(read_timeout=0.2)
        async with served(handler) as address:
            with await Peer.connect(address) as peer:

                async def trickle() -> None:
                    try:
                        for byte in b"\x05\xff" + bytes(255):
                            await peer.send(bytes((byte,)))
                            await asyncio.sleep(0.02)
                    except OSError:
                        pass

                async with asyncio.TaskGroup() as group:
                    task = group.create_task(trickle())
                    assert "no request" in str(await handler.failure())
                    task.cancel()

    run(main())


def test_the_deadline_ends_with_the_request() -> None:
    async def main() -> None:
        handler = Observed(read_timeout=0.1)
        async with echo_server() as port, served(handler) as address:
            with await opened(address, Endpoint("127.0.0.1", port)) as peer:
                passed = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_later(0.25, passed.set_result, None)
                await passed
                await peer.send(b"late")
                assert await peer.exactly(4) == b"late"

    run(main())


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_read_timeout_that_makes_no_sense_is_the_default(value: float) -> None:
    handler = Socks5Handler(Socks5Handler.Options(read_timeout=value), HandlerContext())
    assert handler._read_timeout == 15.0


def test_names_go_to_the_way_out_as_they_are() -> None:
    class Way(Failing):
        asked: Endpoint | None = None

        async def connect(self, flow: Flow, target: Endpoint) -> Stream:
            self.asked = target
            raise self.error

    async def main() -> None:
        way = Way(ResolveError("no"))
        async with served(Observed(), way) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x05\x01\x00" + request(1, Endpoint("Example.COM.", 80)))
                assert await peer.rest() == b"\x05\x00" + refusal(3)
        assert way.asked == Endpoint("Example.COM.", 80)

    run(main())
