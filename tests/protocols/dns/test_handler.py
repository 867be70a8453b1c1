"""The name service over loopback: what it answers by itself, what it asks upstream, and what it survives."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rrset
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gostnet.config import schema
from gostnet.core.address import Endpoint
from gostnet.core.errors import ConfigError
from gostnet.core.tasks import Scope, run
from gostnet.pipeline.handler import HandlerContext
from gostnet.policies.bypass import PatternBypass, compile_patterns
from gostnet.policies.entries import inline
from gostnet.policies.hosts import HostTable, Mapping, StaticHosts
from gostnet.policies.matcher import FilterMatcher
from gostnet.policies.nameserver import NameServer
from gostnet.policies.resolver import DNSResolver
from gostnet.protocols.dns.handler import DnsHandler, system_servers
from gostnet.testing.certificates import Authority
from gostnet.transports.tls import TlsLayer
from gostnet.wire import dns_message as wire

from ..vectors import Peer, UdpPeer, closed_port, router
from .kit import Upstream, answer, ask, handler, serving, targets, texts


def question(name: str = "a.test", kind: str = "A", **options: object) -> dns.message.QueryMessage:
    return dns.message.make_query(name, kind, **options)  # type: ignore[arg-type]


def one(*records: str, **options: object) -> Upstream:
    return Upstream(lambda query: answer(query, *(records or ("A 192.0.2.1",)), **options))  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ---- forwarding -----------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["", "udp://", "tcp://"])
def test_a_query_goes_upstream_and_the_answer_comes_back(scheme: str) -> None:
    async def main() -> None:
        async with one().running() as upstream, serving(handler(f"{scheme}{upstream.address}")) as address:
            query = question()
            data = await ask(address, query)
            assert query.is_response(dns.message.from_wire(data))
            assert texts(data) == ["192.0.2.1"]
            assert [transport for transport, _ in upstream.asked] == ["tcp" if scheme == "tcp://" else "udp"]
            assert upstream.asked[0][1][2:] == query.to_wire()[2:]

    run(main())


def test_many_queries_are_in_flight_at_once_and_answered_as_they_come() -> None:
    async def main() -> None:
        async with one().running() as upstream, serving(handler(str(upstream.address))) as address:
            upstream.hold = asyncio.Event()
            with UdpPeer() as peer:
                queries = {query.id: query for query in (question(f"n{n}.test", id=n) for n in range(100))}
                for query in queries.values():
                    await peer.send(query.to_wire(), address)
                await upstream.until_asked(100)
                upstream.hold.set()
                for _ in range(100):
                    message = dns.message.from_wire((await peer.receive())[0])
                    assert queries.pop(message.id).is_response(message)
            assert len({data[:2] for _, data in upstream.asked}) > 90  # ids of our own, at random

    run(main())


def test_equal_questions_at_the_same_time_are_one() -> None:
    async def main() -> None:
        async with one().running() as upstream, serving(handler(str(upstream.address))) as address:
            upstream.hold = asyncio.Event()
            with UdpPeer() as peer:
                for n in range(20):
                    await peer.send(question("a.test" if n % 2 else "A.Test", id=n).to_wire(), address)
                await upstream.until_asked(1)
                upstream.hold.set()
                found = [await peer.receive() for _ in range(20)]
            assert sorted(int.from_bytes(data[:2], "big") for data, _ in found) == list(range(20))
            assert {b"A\4Test" in data for data, _ in found} == {True, False}  # each in its own letters
            assert len(upstream.asked) == 1

    run(main())


def test_forged_answers_are_passed_over() -> None:
    async def main() -> None:
        with UdpPeer() as server, UdpPeer() as client:
            async with serving(handler(str(server.address))) as address:
                await client.send(question().to_wire(), address)
                asked, source = await server.receive()
                real = answer(dns.message.from_wire(asked), "A 192.0.2.1")
                other_name = answer(question("b.test", id=int.from_bytes(asked[:2], "big")), "A 192.0.2.66")
                other_id = answer(question(id=int.from_bytes(asked[:2], "big") ^ 1), "A 192.0.2.66")
                for wrong in (other_id, other_name, asked, b"", real[:20], real[:-3], real):
                    await server.send(wrong, source)
                assert texts((await client.receive())[0]) == ["192.0.2.1"]

    run(main())


def test_the_next_upstream_is_asked_when_one_fails_and_the_dead_one_is_left_out() -> None:
    async def main() -> None:
        refusing = Upstream(lambda query: answer(query, rcode=dns.rcode.REFUSED))
        async with one().running() as good, refusing.running() as bad:
            made = handler(f"tcp://127.0.0.1:{closed_port()}", str(bad.address), str(good.address))
            async with serving(made) as address:
                for n in range(6):
                    assert texts(await ask(address, question(f"n{n}.test"))) == ["192.0.2.1"]
            hop = made._context.hop
            assert hop is not None
            assert hop.nodes[0].marker.failures == 1
            assert hop.nodes[1].marker.failures == 0  # it works: an error code is about the question

    run(main())


def test_a_target_may_be_for_some_names_only() -> None:
    async def main() -> None:
        async with one("A 192.0.2.1").running() as special, one("A 192.0.2.2").running() as other:
            hop, written = targets(str(special.address), str(other.address))
            hop.nodes[0].matcher = FilterMatcher(".a.test")
            made = DnsHandler(DnsHandler.Options(), HandlerContext(service="dns", hop=hop, addresses=written))
            async with serving(made) as address:
                for n in range(3):
                    assert texts(await ask(address, question(f"{n}.b.test"))) == ["192.0.2.2"]
                hop.nodes[1].matcher = FilterMatcher("c.test")
                for n in range(3):
                    assert texts(await ask(address, question(f"{n}.a.test"))) == ["192.0.2.1"]
                reply = dns.message.from_wire(await ask(address, question("none.test")))
                assert reply.rcode() == dns.rcode.SERVFAIL

    run(main())


def test_without_an_answer_the_client_is_told() -> None:
    async def main() -> None:
        silent = Upstream(lambda query: None)
        async with silent.running() as upstream:
            async with serving(handler(str(upstream.address), timeout=0.05)) as address:
                message = dns.message.from_wire(await ask(address, question()))
                assert message.rcode() == dns.rcode.SERVFAIL
                assert message.question == question().question

    run(main())


def test_an_error_code_of_the_last_upstream_is_passed_on_and_not_kept() -> None:
    async def main() -> None:
        async with Upstream(lambda query: answer(query, rcode=dns.rcode.REFUSED)).running() as upstream:
            made = handler(str(upstream.address))
            async with serving(made) as address:
                for _ in range(2):
                    assert dns.message.from_wire(await ask(address, question())).rcode() == dns.rcode.REFUSED
            assert len(upstream.asked) == 2

    run(main())


# ---- sizes ----------------------------------------------------------------------------------------
MANY = [f"A 192.0.2.{n}" for n in range(1, 101)]


@pytest.mark.parametrize(("payload", "whole"), [(None, False), (512, False), (1232, False), (4096, True)])
def test_an_answer_over_the_clients_size_is_truncated(payload: int | None, whole: bool) -> None:
    async def main() -> None:
        async with one(*MANY).running() as upstream, serving(handler(str(upstream.address))) as address:
            query = question() if payload is None else question(use_edns=0, payload=payload)
            data = await ask(address, query)
            message = dns.message.from_wire(data, raise_on_truncation=False)
            assert len(data) <= max(512, payload or 0)
            assert bool(message.flags & dns.flags.TC) != whole
            assert len(texts(data)) == (100 if whole else 0)
            assert (message.edns >= 0) == (payload is not None)

    run(main())


def test_a_truncated_answer_of_the_upstream_is_asked_for_over_tcp() -> None:
    async def main() -> None:
        def script(query: dns.message.Message) -> bytes:
            cut = len(upstream.asked) == 1
            return answer(query, *([] if cut else MANY), flags=dns.flags.TC if cut else dns.flags.RA)

        async with Upstream(script).running() as upstream, serving(handler(str(upstream.address)), mode="tcp") as at:
            with await Peer.connect(at) as peer:
                wire = question().to_wire()
                await peer.send(len(wire).to_bytes(2, "big") + wire)
                size = int.from_bytes(await peer.exactly(2), "big")
                assert len(texts(await peer.exactly(size))) == 100
            assert [transport for transport, _ in upstream.asked] == ["udp", "tcp"]

    run(main())


# ---- EDNS -----------------------------------------------------------------------------------------
def test_edns_is_passed_on_without_what_concerns_only_this_hop() -> None:
    async def main() -> None:
        async with one().running() as upstream, serving(handler(str(upstream.address))) as address:
            cookie = dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")
            subnet = dns.edns.ECSOption("198.51.100.0", 24)
            query = question(want_dnssec=True, payload=1400, options=[cookie, subnet])
            reply = dns.message.from_wire(await ask(address, query))
            assert reply.edns == 0
            asked = dns.message.from_wire(upstream.asked[0][1])
            assert asked.ednsflags & dns.flags.DO
            assert asked.payload == 1400
            assert list(asked.options) == [subnet]

    run(main())


def test_a_version_of_edns_that_is_not_known_is_answered() -> None:
    async def main() -> None:
        async with serving(handler("127.0.0.1")) as address:
            reply = dns.message.from_wire(await ask(address, question(use_edns=1)))
            assert reply.rcode() == dns.rcode.BADVERS

    run(main())


# ---- without upstreams ----------------------------------------------------------------------------
def test_hosts_answer_both_families() -> None:
    table = StaticHosts(HostTable([Mapping("a.test", "192.0.2.7"), Mapping(".b.test", "2001:db8::7")]))

    async def main() -> None:
        async with one().running() as upstream:
            async with serving(handler(str(upstream.address)), router(hosts=table)) as address:
                reply = dns.message.from_wire(await ask(address, question("A.test", use_edns=0)))
                assert [str(item) for item in reply.answer] == ["A.test. 3600 IN A 192.0.2.7"]
                assert reply.edns == 0
                assert reply.flags & (dns.flags.RA | dns.flags.AA) == dns.flags.RA
                assert texts(await ask(address, question("x.b.test", "AAAA"))) == ["2001:db8::7"]
                assert texts(await ask(address, question("a.test", "AAAA"))) == []  # not asked for elsewhere
                assert upstream.asked == []
                await ask(address, question("a.test", "TXT"))
                assert len(upstream.asked) == 1

    run(main())


def test_bypassed_names_are_answered_with_nothing() -> None:
    patterns, _ = compile_patterns(inline(["*.ads.test"], "bypass"))
    bypass = PatternBypass(patterns, whitelist=False, network="")

    async def main() -> None:
        async with one().running() as upstream:
            async with serving(handler(str(upstream.address)), router(bypass=bypass)) as address:
                reply = dns.message.from_wire(await ask(address, question("x.ads.test")))
                assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])
                assert reply.flags & dns.flags.RA  # without it the C library takes it for a lame server's
                assert upstream.asked == []
                assert texts(await ask(address, question())) == ["192.0.2.1"]

    run(main())


def test_a_whitelist_is_about_names_and_not_about_upstreams() -> None:
    patterns, _ = compile_patterns(inline(["a.test"], "bypass"))
    bypass = PatternBypass(patterns, whitelist=True, network="")

    async def main() -> None:
        async with one().running() as upstream:
            async with serving(handler(str(upstream.address)), router(bypass=bypass)) as address:
                assert texts(await ask(address, question())) == ["192.0.2.1"]
                assert texts(await ask(address, question("b.test"))) == []

    run(main())


def test_without_a_forwarder_the_services_resolver_is_asked_for_every_type() -> None:
    async def main() -> None:
        async with one('TXT "x"').running() as upstream:
            direct = router().direct
            resolver = DNSResolver([NameServer(address=upstream.address, egress=direct)])
            async with serving(handler(), router(resolver=resolver)) as address:
                assert texts(await ask(address, question(kind="TXT"))) == ['"x"']
            await resolver.aclose()

    run(main())


def test_the_option_dns_names_upstreams() -> None:
    async def main() -> None:
        async with one().running() as upstream:
            made = handler(dns=[f"tcp://127.0.0.1:{closed_port()}", f"tcp://{upstream.address}"])
            async with serving(made) as address:
                assert texts(await ask(address, question())) == ["192.0.2.1"]

    run(main())


def test_the_systems_servers_are_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("# x\nnameserver 192.0.2.1\nnameserver\nnameserver fe80::1%eth0\nsearch nameserver\nnameserver x\n")
    assert system_servers(path) == [Endpoint("192.0.2.1", 53), Endpoint("fe80::1%eth0", 53)]
    assert system_servers(tmp_path / "none") == []

    async def main() -> None:
        monkeypatch.setattr(DnsHandler, "RESOLV_CONF", str(path))
        async with one().running() as upstream:
            monkeypatch.setattr("gostnet.protocols.dns.handler.PORT", upstream.address.port)
            path.write_text("nameserver 127.0.0.1\n")
            async with serving(handler()) as address:
                assert texts(await ask(address, question())) == ["192.0.2.1"]

    run(main())


def test_a_service_that_is_its_own_upstream_answers_that_it_failed() -> None:
    async def main() -> None:
        hop_later = handler("127.0.0.1:1", timeout=0.2)
        async with serving(hop_later) as address:
            hop = hop_later._context.hop
            assert hop is not None
            hop_later._context.addresses = {hop.nodes[0]: (str(address), "nodes[0]")}
            assert dns.message.from_wire(await ask(address, question())).rcode() == dns.rcode.SERVFAIL

    run(main())


# ---- the cache ------------------------------------------------------------------------------------
def test_answers_are_kept_for_their_shortest_ttl_and_counted_down() -> None:
    async def main() -> None:
        clock = Clock()
        async with one("A 192.0.2.1", ttl=10).running() as upstream:
            async with serving(handler(str(upstream.address), clock=clock)) as address:

                async def ttl() -> int:
                    return int(dns.message.from_wire(await ask(address, question())).answer[0].ttl)

                assert await ttl() == 10
                clock.now += 3.5
                assert await ttl() == 6
                clock.now += 6.4
                assert await ttl() == 1
                assert len(upstream.asked) == 1
                clock.now += 0.2
                assert await ttl() == 10
                assert len(upstream.asked) == 2

    run(main())


@pytest.mark.parametrize(
    ("options", "records", "soa", "later", "asked"),
    [
        ({"ttl": 30.0}, ["A 192.0.2.1"], None, 29.0, 1),
        ({"ttl": 30.0}, ["A 192.0.2.1"], None, 31.0, 2),
        ({"ttl": -1.0}, ["A 192.0.2.1"], None, 0.0, 2),
        ({}, [], 20, 19.0, 1),
        ({}, [], 20, 21.0, 2),
        ({}, [], 9000, 59.0, 1),  # RFC 2308 section 5 wants a bound
        ({}, [], 9000, 61.0, 2),
        ({}, [], None, 0.0, 2),  # nothing says how long
    ],
)
def test_how_long_answers_are_kept(
    options: dict[str, float], records: list[str], soa: int | None, later: float, asked: int
) -> None:
    async def main() -> None:
        clock = Clock()
        rcode = dns.rcode.NOERROR if records else dns.rcode.NXDOMAIN
        async with Upstream(lambda query: answer(query, *records, soa=soa, rcode=rcode)).running() as upstream:
            async with serving(handler(str(upstream.address), clock=clock, **options)) as address:
                for _ in range(2):
                    assert dns.message.from_wire(await ask(address, question())).rcode() == rcode
                    clock.now += later
            assert len(upstream.asked) == asked

    run(main())


def test_a_ttl_of_zero_is_not_kept() -> None:
    async def main() -> None:
        async with one(ttl=0).running() as upstream, serving(handler(str(upstream.address))) as address:
            for _ in range(2):
                await ask(address, question())
            assert len(upstream.asked) == 2

    run(main())


def test_an_expired_answer_is_given_and_refreshed_behind_the_scenes() -> None:
    async def main() -> None:
        clock = Clock()
        async with Upstream(
            lambda query: answer(query, f"A 192.0.2.{len(upstream.asked)}", ttl=5)
        ).running() as upstream:
            made = handler(str(upstream.address), clock=clock, stale=True)
            async with serving(made) as address:
                assert texts(await ask(address, question())) == ["192.0.2.1"]
                clock.now += 100
                upstream.hold = asyncio.Event()
                for _ in range(3):
                    stale = dns.message.from_wire(await ask(address, question()))
                    assert (str(stale.answer[0][0]), stale.answer[0].ttl) == ("192.0.2.1", 30)
                await upstream.until_asked(2)
                upstream.hold.set()
                async with asyncio.timeout(10):
                    while texts(await ask(address, question())) != ["192.0.2.2"]:
                        pass  # each is a round trip
                assert len(upstream.asked) == 2

    run(main())


# ---- streams --------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["tcp", "tls"])
def test_a_connection_carries_many_queries_at_once(mode: str) -> None:
    authority = Authority()
    layer = TlsLayer(authority.issue("dns.test").server_context()) if mode == "tls" else None

    async def main() -> None:
        async with one().running() as upstream, serving(handler(str(upstream.address)), mode=mode, tls=layer) as at:
            context = authority.client_context() if mode == "tls" else None
            reader, writer = await asyncio.open_connection(
                *at, ssl=context, server_hostname="dns.test" if context else None
            )
            upstream.hold = asyncio.Event()
            frames = []
            for n in range(100):
                wire = question(f"n{n}.test", id=n).to_wire()
                frames.append(len(wire).to_bytes(2, "big") + wire)
            writer.write(b"".join(frames))
            await upstream.until_asked(64)
            upstream.hold.set()
            seen = set()
            async with asyncio.timeout(10):
                for _ in range(100):
                    size = int.from_bytes(await reader.readexactly(2), "big")
                    seen.add(dns.message.from_wire(await reader.readexactly(size)).id)
            assert seen == set(range(100))
            writer.close()

    run(main())


def test_a_silent_connection_is_closed_and_a_half_closed_one_gets_its_answers() -> None:
    async def main() -> None:
        async with one().running() as upstream:
            async with serving(handler(str(upstream.address), read_timeout=0.05), mode="tcp") as address:
                with await Peer.connect(address) as peer:
                    assert await peer.rest() == b""
                with await Peer.connect(address) as peer:
                    upstream.hold = asyncio.Event()
                    wire = question().to_wire()
                    await peer.send(len(wire).to_bytes(2, "big") + wire)
                    await upstream.until_asked(1)
                    peer.shut()
                    upstream.hold.set()
                    assert texts((await peer.rest())[2:]) == ["192.0.2.1"]

    run(main())


def test_an_upstream_over_tls_must_prove_its_name(tmp_path: Path) -> None:
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    layer = TlsLayer.for_client(schema.TLS(secure=True, ca_file=str(tmp_path / "ca.pem")))

    async def main() -> None:
        upstream = one()
        async with (
            upstream.running(),
            serving(
                handler(str(upstream.address)), mode="tls", tls=TlsLayer(authority.issue("127.0.0.1").server_context())
            ) as secure,
        ):
            made = handler(f"tls://{secure}", tls=layer)
            async with serving(made) as address:
                for n in range(3):
                    assert texts(await ask(address, question(f"n{n}.test"))) == ["192.0.2.1"]
            made.close()
            wrong = handler(f"tls://localhost:{secure.port}", tls=layer)
            async with serving(wrong) as address:
                assert dns.message.from_wire(await ask(address, question("x.test"))).rcode() == dns.rcode.SERVFAIL
            assert len(upstream.asked) == 3

    run(main())


# ---- what is no query -----------------------------------------------------------------------------
def test_what_is_malformed_is_refused_or_dropped() -> None:
    good = question(id=7).to_wire()

    async def main() -> None:
        async with one().running() as upstream, serving(handler(str(upstream.address))) as address:
            with UdpPeer() as peer:
                for data in (b"", b"\0", good[:11], bytes((*good[:2], good[2] | 0x80, *good[3:]))):
                    await peer.send(data, address)
                for data in (good[:12], good[:-1], good[:12] + b"\xc0\x0c\0\1\0\1", good[:5] + b"\2" + good[6:] * 2):
                    reply = await ask(address, data, peer)
                    assert (reply[:2], reply[3] & 15, len(reply)) == (good[:2], dns.rcode.FORMERR, 12)
                update = dns.message.make_query("a.test", "SOA", id=7)
                update.set_opcode(dns.opcode.NOTIFY)
                assert (await ask(address, update, peer))[3] & 15 == dns.rcode.NOTIMP
                assert (await ask(address, question(kind="AXFR"), peer))[3] & 15 == dns.rcode.NOTIMP
                assert texts(await ask(address, good, peer)) == ["192.0.2.1"]  # it still works

    run(main())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: question().to_wire()[:12] + tail)))
def test_any_bytes_leave_the_service_alive(messages: list[bytes]) -> None:
    good = question(id=99).to_wire()

    async def main() -> None:
        failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
        hosts = StaticHosts(HostTable([Mapping(".", "192.0.2.1")]))
        async with serving(handler(f"tcp://127.0.0.1:{PORT}"), router(hosts=hosts)) as address:
            with UdpPeer() as peer:
                for data in messages:
                    await peer.send(data, address)
                await peer.send(good, address)
                while True:
                    data, _ = await peer.receive()
                    if data[:2] == good[:2] and data[6:8] == b"\0\1":
                        break
        assert failures == []

    run(main())


PORT = closed_port()


def test_upstreams_that_cannot_be_read_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"nodes\[0\]"):
        handler("quic://9.9.9.9")
    with pytest.raises(ConfigError, match="dns: dns"):
        handler(dns=["9.9.9.9:x"])
    with pytest.raises(ConfigError, match="clientIP"):
        DnsHandler(DnsHandler.Options(client_ip="x"), HandlerContext(service="dns"))


def test_questions_in_work_end_with_the_service() -> None:
    async def main() -> None:
        async with one().running() as upstream:
            upstream.hold = asyncio.Event()
            made = handler(str(upstream.address))
            async with serving(made) as address:
                with UdpPeer() as peer:
                    await peer.send(question().to_wire(), address)
                    await upstream.until_asked(1)
            assert made._running == {}

    run(main())


# ---- who is told of answers ---------------------------------------------------------------------
def test_who_wants_to_know_hears_of_addresses_before_the_client_has_them_also_from_the_cache() -> None:
    told: list[tuple[str, list[str], int]] = []
    heard = asyncio.Event()
    leave = asyncio.Event()

    async def listen(name: str, addresses: Sequence[bytes], ttl: int) -> None:
        told.append((name, sorted(socket.inet_ntop(2 if len(a) == 4 else 10, a) for a in addresses), ttl))
        heard.set()
        await leave.wait()

    def script(query: dns.message.Message) -> bytes:
        reply = dns.message.make_response(query)
        name, kind = query.question[0].name, query.question[0].rdtype
        reply.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", "b.test."))
        values = {1: ("A", "192.0.2.1", "192.0.2.2"), 28: ("AAAA", "2001:db8::1")}.get(kind)
        if values is not None:
            reply.answer.append(dns.rrset.from_text("b.test.", 300, "IN", *values))
        return reply.to_wire()

    async def main() -> None:
        async with Upstream(script).running() as upstream:
            made = handler(f"{upstream.address}")
            made.answered = listen
            async with serving(made) as address:
                asking = Scope("test").start(ask(address, question("A.test")))
                await heard.wait()
                assert not asking.done()
                leave.set()
                assert "192.0.2.1" in texts(await asking)
                await ask(address, question("a.test"))
                await ask(address, question("a.test", "AAAA"))
                await ask(address, question("a.test", "TXT"))
                await ask(address, question("a.test", rdclass="CH"))
        assert told == [
            ("a.test", ["192.0.2.1", "192.0.2.2"], 60),
            ("a.test", ["192.0.2.1", "192.0.2.2"], 60),
            ("a.test", ["2001:db8::1"], 60),
        ]

    run(main())


@pytest.mark.parametrize("options", [{"rcode": dns.rcode.NXDOMAIN}, {"flags": dns.flags.TC}])
def test_what_is_no_answer_is_not_told(options: dict[str, Any]) -> None:
    told: list[str] = []

    async def listen(name: str, addresses: Sequence[bytes], ttl: int) -> None:
        told.append(name)

    async def main() -> None:
        async with one(**options).running() as upstream:
            made = handler(f"{upstream.address}")
            made.answered = listen
            async with serving(made) as address:
                await ask(address, question())
        assert told == []

    run(main())


@given(st.binary(max_size=100), st.sampled_from([wire.A, wire.AAAA]))
def test_addresses_of_any_bytes_are_whole_ones(data: bytes, kind: int) -> None:
    for message in (data, data[:4].ljust(4, b"\0") + b"\0\1\0\1\0\0\0\0" + data[4:]):
        found, ttl = wire.addresses_of(message, kind)
        assert all(len(each) == (4 if kind == wire.A else 16) for each in found)
        assert 0 <= ttl < 1 << 31
