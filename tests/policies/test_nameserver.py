"""One question to one server: what counts as its answer, resending, truncation, time-outs, nothing left open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.errors import ConfigError, DialRefused, ResolveError
from gostnet.core.flow import Flow
from gostnet.core.sockets import SocketStream
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.core.udp_socket import UdpSocket
from gostnet.policies import nameserver
from gostnet.policies.nameserver import (
    NameServer,
    Refused,
    ask,
    make_query,
    parse_answer,
    parse_family,
    parse_server,
    parse_subnet,
)

from .dns_kit import Loopback, Upstream, serving, wire_of

NAME = dns.name.from_text("a.test")
ZONE = {"a.test": {"A": ["192.0.2.1"]}}


def asking(
    work: Callable[[Upstream, NameServer], Awaitable[None]], *, uvloop: bool | None = None, **options: Any
) -> Loopback:
    """Run `work` with a server; check that every socket is closed at the end."""
    egress = Loopback()

    async def main() -> None:
        async with serving(Upstream(ZONE)) as upstream:
            await work(upstream, NameServer(address=upstream.address, egress=egress, **options))

    run(main(), uvloop=uvloop)
    for held in egress.held:
        assert isinstance(held, SocketStream | UdpSocket)
        assert held.readiness.fd < 0
    return egress


def addresses(message: dns.message.QueryMessage) -> list[str]:
    answer = message.resolve_chaining().answer
    return [rdata.to_text() for rdata in answer] if answer is not None else []


@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("uvloop", [False, True])
def test_a_question_is_answered(transport: str, uvloop: bool) -> None:
    async def work(upstream: Upstream, server: NameServer) -> None:
        assert addresses(await ask(server, NAME, 4)) == ["192.0.2.1"]
        assert upstream.asked == [f"{transport} a.test A"]

    egress = asking(work, transport=transport, uvloop=uvloop)
    assert len(egress.opened) == 1
    flow = egress.flows[0]
    assert (flow.network, flow.target is not None, flow.service) == (transport, True, "resolver")


def test_each_question_has_an_id_and_a_socket_of_its_own() -> None:
    async def work(upstream: Upstream, server: NameServer) -> None:
        for _ in range(8):
            await ask(server, NAME, 4)
        assert len(set(upstream.ids)) > 4

    assert len(asking(work).opened) == 8


def test_what_is_not_the_answer_is_waited_past() -> None:
    async def work(upstream: Upstream, server: NameServer) -> None:
        def script(query: dns.message.Message, transport: str) -> list[bytes]:
            other = dns.message.make_query("evil.test", "A", id=query.id)
            forged = [("a.test", 300, "A", "203.0.113.66")]
            return [
                wire_of(query, forged, id=query.id ^ 1),
                wire_of(other, [("evil.test", 300, "A", "203.0.113.66")]),
                query.to_wire(),
                b"",
                b"\0" * 11,
                query.id.to_bytes(2, "big") + b"\x80" + b"\xff" * 30,
                upstream.answer(query),
            ]

        upstream.script = script
        assert addresses(await ask(server, NAME, 4)) == ["192.0.2.1"]

    asking(work)


def test_a_truncated_answer_is_asked_for_again_over_tcp() -> None:
    async def work(upstream: Upstream, server: NameServer) -> None:
        def script(query: dns.message.Message, transport: str) -> bytes:
            if transport == "tcp":
                return upstream.answer(query)
            whole = bytearray(wire_of(query, [("a.test", 300, "A", "203.0.113.66")], flags=dns.flags.TC))
            return bytes(whole[:-2])  # cut within a record

        upstream.script = script
        assert addresses(await ask(server, NAME, 4)) == ["192.0.2.1"]
        assert upstream.asked == ["udp a.test A", "tcp a.test A"]

    asking(work)


def test_a_lost_question_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameserver, "RESEND", (0.01, 0.01))

    async def work(upstream: Upstream, server: NameServer) -> None:
        upstream.script = lambda query, transport: upstream.answer(query) if len(upstream.asked) == 3 else None
        assert addresses(await ask(server, NAME, 4)) == ["192.0.2.1"]
        assert len(upstream.asked) == 3
        assert len(set(upstream.ids)) == 1

    assert len(asking(work).opened) == 1


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_silence_ends_with_the_time_out(transport: str) -> None:
    async def work(upstream: Upstream, server: NameServer) -> None:
        upstream.hold = asyncio.Event()
        began = time.monotonic()
        with pytest.raises(ResolveError, match=r"no answer about a\.test within 0\.05s"):
            await ask(server, NAME, 4)
        assert time.monotonic() - began < 5
        upstream.hold.set()

    asking(work, transport=transport, timeout=0.05)


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.FORMERR])
def test_an_error_code_is_a_refusal(rcode: dns.rcode.Rcode) -> None:
    async def work(upstream: Upstream, server: NameServer) -> None:
        def script(query: dns.message.Message, transport: str) -> bytes:
            reply = dns.message.make_response(query)
            reply.set_rcode(rcode)
            if rcode == dns.rcode.FORMERR:
                reply.question = []
            return reply.to_wire()

        upstream.script = script
        with pytest.raises(Refused, match=dns.rcode.to_text(rcode)):
            await ask(server, NAME, 4)

    asking(work)


def test_an_answer_cut_short_over_tcp_is_an_error() -> None:
    async def work(upstream: Upstream, server: NameServer) -> None:
        class Cut(bytes):
            def __len__(self) -> int:
                return super().__len__() + 7

        upstream.script = lambda query, transport: [Cut(upstream.answer(query))]
        with pytest.raises(ResolveError, match="ended before the answer was complete"):
            await ask(server, NAME, 4)
        upstream.script = lambda query, transport: upstream.answer(query, id=query.id ^ 1)
        with pytest.raises(ResolveError, match="no answer to the question"):
            await ask(server, NAME, 4)

    asking(work, transport="tcp")


def test_a_way_that_is_closed_is_a_failure_to_resolve() -> None:
    async def work(upstream: Upstream, server: NameServer) -> None:
        assert isinstance(server.egress, Loopback)
        server.egress.error = DialRefused("dial 192.0.2.53:53: refused")
        with pytest.raises(ResolveError, match=r"udp://127\.0\.0\.1:\d+: dial 192\.0\.2\.53:53: refused"):
            await ask(server, NAME, 4)

    asking(work)


class Canned(Datagrams):
    """Datagrams of which the first ones are given, then the end."""

    def __init__(self, make: Callable[[bytes], list[Datagram]]) -> None:
        super().__init__()
        self.make = make
        self.batch: list[Datagram] = []
        self.closed = False

    async def receive(self) -> list[Datagram]:
        batch, self.batch = self.batch, []
        return batch

    async def send(self, batch: Any) -> None:
        self.batch = self.make(bytes(batch[0].data))

    async def aclose(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class CannedEgress:
    def __init__(self, datagrams: Canned) -> None:
        self.datagrams = datagrams

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        raise AssertionError("nothing asks for a stream")

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        return self.datagrams


def test_datagrams_that_came_together_are_taken_apart_and_the_end_is_an_error() -> None:
    where = Endpoint("192.0.2.53", 53)

    def joined(data: bytes) -> list[Datagram]:
        query = dns.message.from_wire(data)
        answer = wire_of(query, [("a.test", 300, "A", "192.0.2.1")])
        return [Datagram(b"x" * len(answer) + answer, where, len(answer))]

    for make, found in ((joined, True), (lambda data: [Datagram(b"", where)], False)):
        canned = Canned(make)
        server = NameServer(address=where, egress=CannedEgress(canned))
        if found:
            assert addresses(run(ask(server, NAME, 4))) == ["192.0.2.1"]
        else:
            with pytest.raises(ResolveError, match="the association ended"):
                run(ask(server, NAME, 4))
        assert canned.closed


def test_a_cancelled_question_leaves_no_socket() -> None:
    async def work(upstream: Upstream, server: NameServer) -> None:
        upstream.hold = asyncio.Event()
        for transport in ("udp", "tcp"):
            task = asyncio.get_running_loop().create_task(
                ask(NameServer(address=server.address, egress=server.egress, transport=transport), NAME, 4)
            )
            await upstream.until_asked(len(upstream.asked) + 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        upstream.hold.set()

    assert len(asking(work).held) == 2


# ---- messages -----------------------------------------------------------------------------------
def query_for(**options: Any) -> dns.message.QueryMessage:
    server = NameServer(address=Endpoint("192.0.2.53", 53), egress=Loopback(), **options)
    return make_query(server, NAME, 4)


@given(st.binary(max_size=80))
def test_any_bytes_are_an_answer_or_nothing(data: bytes) -> None:
    query = query_for()
    head = query.id.to_bytes(2, "big") + b"\x80\x00"
    for packet in (data, head + data):
        answer = parse_answer(packet, query)
        assert answer is None or answer.id == query.id


@given(st.data())
def test_a_damaged_answer_is_an_answer_or_nothing(data: st.DataObject) -> None:
    query = query_for()
    wire = bytearray(wire_of(query, [("a.test", 300, "CNAME", "b.test."), ("b.test", 60, "A", "192.0.2.1")]))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(2, len(wire) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(wire)))
    for packet in (bytes(wire), bytes(wire[:cut])):
        answer = parse_answer(packet, query)
        assert answer is None or not answer.question or answer.question == query.question


@pytest.mark.parametrize(
    ("row", "client", "expected"),
    [("Y12", "1.2.3.4", "ECS 1.2.3.4/24 scope/0"), ("Y12", "2001:db8::1", "ECS 2001:db8::1/128 scope/0")],
)
def test_row_y12_the_clients_network(row: str, client: str, expected: str) -> None:
    query = query_for(subnet=client)
    assert [option.to_text() for option in query.options] == [expected]
    sent = dns.message.from_wire(query.to_wire())
    assert [option.to_text() for option in sent.options] == [expected.replace("1.2.3.4", "1.2.3.0")]
    assert query_for().edns < 0


# ---- configuration ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.8.8.8", ("udp", Endpoint("8.8.8.8", 53))),
        ("8.8.8.8:5353", ("udp", Endpoint("8.8.8.8", 5353))),
        ("UDP://dns.example", ("udp", Endpoint("dns.example", 53))),
        ("tcp://[2001:db8::1]:54", ("tcp", Endpoint("2001:db8::1", 54))),
        ("2001:db8::1", ("udp", Endpoint("2001:db8::1", 53))),
        (" tcp://1.1.1.1/ ", ("tcp", Endpoint("1.1.1.1", 53))),
    ],
)
def test_addresses_of_servers(text: str, expected: tuple[str, Endpoint]) -> None:
    assert parse_server(text, "addr") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tls://1.1.1.1", "not available in this version"),
        ("dot://1.1.1.1", "not available in this version"),
        ("https://1.1.1.1/dns-query", "not available in this version"),
        ("upd://1.1.1.1", "did you mean 'udp'"),
        ("udp://:53", "has no host"),
        ("1.1.1.1:x", "is not a port"),
    ],
)
def test_bad_addresses_of_servers(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^resolvers\[0\]\.nameservers\[1\]\.addr: ") as caught:
        parse_server(text, "resolvers[0].nameservers[1].addr")
    assert message in str(caught.value)


def test_words_for_families_and_clients() -> None:
    assert [parse_family(word, "x") for word in ("", "ipv4", "IP4", "ipv6", "ip6")] == [0, 4, 4, 6, 6]
    with pytest.raises(ConfigError, match="x: 'inet' is neither"):
        parse_family("inet", "x")
    assert parse_subnet(" 1.2.3.4 ", "x") == "1.2.3.4"
    with pytest.raises(ConfigError, match="x: 'me' is not an IP address"):
        parse_subnet("me", "x")
