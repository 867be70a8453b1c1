"""The relay handler: what it refuses and how, forward mode, associations."""

from __future__ import annotations

from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import (
    AuthDenied,
    BypassDenied,
    DialRefused,
    DialTimeout,
    GostnetError,
    LimitDenied,
    NoRoute,
    PolicyDenied,
    ProtocolError,
    ResolveError,
    UpstreamRejected,
)
from gostnet.core.flow import Flow, Network
from gostnet.core.stream import Stream
from gostnet.core.tasks import run, together
from gostnet.pipeline.forwarding import NoTarget
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.protocols.relay.handler import RelayHandler
from gostnet.testing import stream_pair
from gostnet.wire.udp_frames import TunFrames, encode_length_frames, encode_tun_frames

from ..vectors import Peer, UdpPeer, echo_server, router, served
from .support import forwarder, through

CONNECT = bytes.fromhex("0101000a02000701")
ASSOCIATE = bytes.fromhex("0182000f040002000102000701000000000000")


def connect_to(target: Endpoint, command: int = 1) -> bytes:
    address = bytes(map(int, target.host.split(".")))
    return bytes((1, command)) + CONNECT[2:] + address + target.port.to_bytes(2, "big")


def handler(**options: Any) -> RelayHandler:
    return RelayHandler(RelayHandler.Options(**options), HandlerContext())


class Fails:
    """A way out that leads nowhere, for a reason of choice."""

    def __init__(self, error: GostnetError) -> None:
        self.error = error

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        raise self.error

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        raise self.error


async def refused(
    sent: bytes, error: GostnetError | None, expected: type[GostnetError], **options: Any
) -> tuple[bytes, Flow]:
    """Have a handler refuse `sent`; return what it says and the flow."""
    left, right = stream_pair()
    await left.send(sent)
    flow = Flow(client=Endpoint("192.0.2.7", 1234))
    context = options.pop("context", HandlerContext())
    egress = router() if error is None else Fails(error)
    with pytest.raises(expected):
        await RelayHandler(RelayHandler.Options(**options), context).handle(flow, right, egress)
    await right.aclose()
    said = b""
    while data := await left.receive():
        said += data
    return said, flow


# ---- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BypassDenied("no"), 3),
        (LimitDenied("no"), 3),
        (DialRefused("no"), 7),
        (DialTimeout("no"), 7),
        (ResolveError("no"), 7),
        (NoRoute("no"), 7),
        (UpstreamRejected("no", 5), 7),
        (ProtocolError("no"), 7),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
@pytest.mark.parametrize("command", [0x01, 0x81])
@pytest.mark.parametrize("nodelay", [False, True])
def test_errors_of_the_way_out_have_a_status(error: GostnetError, status: int, command: int, nodelay: bool) -> None:
    async def main() -> None:
        sent = connect_to(Endpoint("192.0.2.1", 80), command) + b"payload"
        said, flow = await refused(sent, error, type(error), nodelay=nodelay)
        assert said == bytes((1, status, 0, 0))
        assert not flow.connected
        assert flow.target == Endpoint("192.0.2.1", 80)

    run(main())


@pytest.mark.parametrize(
    ("sent", "options", "status", "expected"),
    [
        ("0101000a020007017f0000010050", {"user": True}, 2, AuthDenied),
        ("0101000f0400020010020007017f0000010050", {}, 1, ProtocolError),
        ("0101000f0400020011020007017f0000010050", {}, 1, ProtocolError),
        ("0101000f0400020002020007017f0000010050", {}, 1, ProtocolError),
        ("01010000", {}, 1, ProtocolError),
        ("0103000a020007017f0000010050", {}, 1, ProtocolError),
        ("0102000a020007017f0000010000", {}, 3, PolicyDenied),
        ("0102000a020007017f0000010000", {"bind": True}, 3, PolicyDenied),
        ("0102000f040002001002000701000000000000", {"bind": True}, 3, PolicyDenied),
        ("0182000a02000701000000000000", {}, 3, PolicyDenied),
        ("0182000a0200070100000000270f", {"bind": True}, 3, PolicyDenied),
        ("0182000a020007017f0000010000", {"bind": True}, 3, PolicyDenied),
    ],
    ids=[
        "no credentials",
        "unix",
        "serial",
        "ip",
        "no target",
        "associate",
        "bind off",
        "bind",
        "bind unix",
        "association off",
        "bind udp",
        "bind udp at an address",
    ],
)
def test_requests_that_are_refused(
    sent: str, options: dict[str, Any], status: int, expected: type[GostnetError]
) -> None:
    class Nobody:
        def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
            assert (username, password) == ("", "")
            return None

    async def main() -> None:
        options_ = dict(options)
        context = HandlerContext(authenticator=Nobody() if options_.pop("user", False) else None)
        said, _ = await refused(bytes.fromhex(sent), None, expected, context=context, **options_)
        assert said == bytes((1, status, 0, 0))

    run(main())


@pytest.mark.parametrize("sent", ["00", "0301", "0101000302", "01010004ff000500"])
def test_what_is_no_request_gets_no_answer(sent: str) -> None:
    async def main() -> None:
        left, right = stream_pair()
        await left.send(bytes.fromhex(sent))
        await left.send_eof()
        with pytest.raises(ProtocolError):
            await handler().handle(Flow(), right, router())
        assert right.sent == 0

    run(main())


def test_a_client_that_asks_nothing_is_not_waited_for() -> None:
    async def main() -> None:
        async with served(handler(read_timeout=0.05)) as address:
            with await Peer.connect(address) as peer:
                await peer.send(b"\x01\x01")
                assert await peer.rest() == b""

    run(main())


def test_a_refusal_arrives_though_the_client_sends_on() -> None:
    async def main() -> None:
        async with served(handler(), Fails(DialRefused("no"))) as address:
            for _ in range(20):
                with await Peer.connect(address) as peer:
                    await peer.send(connect_to(Endpoint("192.0.2.1", 80)) + bytes(60_000))
                    assert await peer.exactly(4) == b"\x01\x07\0\0"
                    assert await peer.rest() == b""

    run(main())


def test_the_client_id_and_the_hash_are_noted() -> None:
    class Anybody:
        def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
            assert client == Endpoint("192.0.2.7", 1234)
            return f"id of {username}"

    async def main() -> None:
        wire = "01010015" + "010008" + "0475736572" + "027077" + "02000701c00002010050"
        context = HandlerContext(authenticator=Anybody())
        _, flow = await refused(bytes.fromhex(wire), DialRefused("no"), DialRefused, context=context, hash="host")
        assert (flow.user, flow.hash) == ("id of user", "192.0.2.1:80")
        _, flow = await refused(bytes.fromhex(wire), DialRefused("no"), DialRefused, context=context)
        assert flow.hash == "192.0.2.7"

    run(main())


# ---- forward mode -------------------------------------------------------------------------------
@pytest.mark.parametrize("sent", [b"\x01\x01\0\0", b"\x01\x02\0\0", b"\x01\x0f\0\0"])
def test_forward_mode_tries_the_next_target_and_marks_the_dead_one(sent: bytes) -> None:
    async def main() -> None:
        async with echo_server() as port:
            hop = forwarder(Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", port))
            async with served(RelayHandler(RelayHandler.Options(), HandlerContext(hop=hop))) as address:
                for _ in range(3):
                    with await Peer.connect(address) as peer:
                        await peer.send(sent + b"abc")
                        assert await peer.exactly(7) == b"\x01\0\0\0abc"
            assert [node.marker.failures for node in hop.nodes] == [1, 0]

    run(main())


@pytest.mark.parametrize("command", [0x01, 0x81])
@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [(DialRefused("no"), 6, DialRefused), (NoRoute("chain"), 6, NoRoute), (BypassDenied("no"), 3, BypassDenied)],
)
def test_forward_mode_has_its_own_status(
    command: int, error: GostnetError, status: int, expected: type[GostnetError]
) -> None:
    async def main() -> None:
        context = HandlerContext(hop=forwarder(Endpoint("192.0.2.1", 80), Endpoint("192.0.2.2", 80)))
        said, _ = await refused(bytes((1, command, 0, 0)), error, expected, context=context)
        assert said == bytes((1, status, 0, 0))

    run(main())


def test_forward_mode_without_targets_is_unavailable() -> None:
    async def main() -> None:
        context = HandlerContext(hop=Hop("forward", []))
        said, _ = await refused(b"\x01\x01\0\0", None, NoTarget, context=context)
        assert said == b"\x01\x05\0\0"

    run(main())


def test_forward_mode_passes_datagrams() -> None:
    async def main() -> None:
        async with echo_server() as port:
            context = HandlerContext(hop=forwarder(Endpoint("127.0.0.1", port)))
            async with served(RelayHandler(RelayHandler.Options(), context)) as address:
                with await Peer.connect(address) as peer:
                    await peer.send(b"\x01\x81\0\0" + encode_length_frames([b"one"]))
                    assert await peer.exactly(9) == b"\x01\0\0\0\0\x03one"

    run(main())


# ---- datagrams ----------------------------------------------------------------------------------
@pytest.mark.parametrize("hops", [0, 1, 2])
def test_an_association_reaches_any_peer_also_through_a_chain(hops: int) -> None:
    """GOST opens it on the relay's host whatever the chain: what the relay's operator configured holds here."""

    async def main() -> None:
        async with echo_server() as first, echo_server() as second, served(handler(bind=True)) as inner:
            async with served(handler(bind=True)) as outer:
                egress = through(*(outer, inner)[:hops]) if hops else router()
                async with served(handler(bind=True), egress) as address:
                    with await Peer.connect(address) as peer:
                        await peer.send(ASSOCIATE)
                        reply = await peer.exactly(26)
                        assert reply[:24] == bytes.fromhex("010000160200130400000000000000000000000000000000")
                        assert reply[24:] != b"\0\0"
                        frames = TunFrames()
                        for size in (1, 60_000):
                            for port in (first, second):
                                there = Endpoint("127.0.0.1", port)
                                await peer.send(encode_tun_frames([(bytes(size), there)]))
                                got: list[Any] = []
                                while not got:
                                    got = frames.feed(await peer.receive())
                                assert got == [(bytes(size), there)]

    run(main())


def test_an_association_carries_names_and_survives_bad_datagrams() -> None:
    async def main() -> None:
        async with echo_server() as port, served(handler(bind=True)) as address:
            with await Peer.connect(address) as peer:
                await peer.send(ASSOCIATE + encode_tun_frames([(b"lost", Endpoint("no.such.name", 53))]))
                await peer.send(encode_tun_frames([(b"none", Endpoint("127.0.0.1", 0))]))
                await peer.send(encode_tun_frames([(b"", Endpoint("127.0.0.1", port))]))
                await peer.send(encode_tun_frames([(b"found", Endpoint("localhost", port))]))
                await peer.exactly(26)
                frames = TunFrames()
                got: list[Any] = []
                while not got:
                    got = frames.feed(await peer.receive())
                assert got == [(b"found", Endpoint("127.0.0.1", port))]

    run(main())


def test_an_association_leaves_out_what_is_bypassed() -> None:
    async def main() -> None:
        with UdpPeer() as allowed, UdpPeer() as hidden:

            class Hidden:
                def contains(self, network: Network, target: Endpoint) -> bool:
                    assert network == "udp"
                    return target.port == hidden.address.port

            async with served(handler(bind=True), router(bypass=Hidden())) as address:
                with await Peer.connect(address) as peer:
                    await peer.send(ASSOCIATE)
                    await peer.exactly(26)
                    await peer.send(encode_tun_frames([(b"a", hidden.address), (b"b", allowed.address)]))
                    data, outside = await allowed.receive()
                    assert data == b"b"
                    here = Endpoint("127.0.0.1", outside.port)
                    await hidden.send(b"unasked", here)
                    await allowed.send(b"answer", here)
                    frame = encode_tun_frames([(b"answer", allowed.address)])
                    assert await peer.exactly(len(frame)) == frame
            with pytest.raises(BlockingIOError):
                hidden.sock.recv(100)

    run(main())


def test_an_association_that_cannot_be_opened_is_unavailable() -> None:
    async def main() -> None:
        said, _ = await refused(ASSOCIATE, DialRefused("no"), DialRefused, bind=True)
        assert said == b"\x01\x05\0\0"

    run(main())


def test_datagrams_of_one_target_are_whole_and_counted() -> None:
    async def main() -> None:
        async with echo_server() as port:
            left, right = stream_pair(window=1 << 20)
            flow = Flow()
            sizes = (0, 1, 1400, 65_000)

            async def client() -> None:
                await left.send(connect_to(Endpoint("127.0.0.1", port), 0x81))
                got = b""
                for index, size in enumerate(sizes):
                    await left.send(encode_length_frames([bytes([index]) * size]))
                    expected = (b"\x01\0\0\0" if not index else b"") + encode_length_frames([bytes([index]) * size])
                    while len(got) < len(expected):
                        got += await left.receive()
                    assert got == expected
                    got = b""
                await left.aclose()

            await together(handler().handle(flow, right, router()), client())
            assert (flow.meter.up, flow.meter.down, flow.packets) == (sum(sizes), sum(sizes), 2 * len(sizes))
            assert flow.network == "udp"
            assert flow.connected

    run(main())


def test_an_association_ends_with_its_connection_and_with_the_service() -> None:
    async def main() -> None:
        with UdpPeer() as there:
            async with served(handler(bind=True)) as address:
                with await Peer.connect(address) as peer:
                    await peer.send(ASSOCIATE + encode_tun_frames([(b"x", there.address)]))
                    _, outside = await there.receive()
                    peer.shut()
                    assert len(await peer.rest()) == 26
                last = await Peer.connect(address)
                await last.send(ASSOCIATE + encode_tun_frames([(b"x", there.address)]))
                await there.receive()
            assert len(await last.rest()) == 26
            last.close()
            await there.send(b"gone", outside)
