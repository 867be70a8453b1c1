"""The name service with the real gost beside it, in front of it, and behind it; and what gost was recorded to say."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dns.edns
import dns.message
import pytest

from gostnet.config import schema
from gostnet.core.address import Endpoint
from gostnet.core.tasks import run
from gostnet.policies.hosts import HostTable, Mapping, StaticHosts
from gostnet.policies.nameserver import HTTP_ALPN
from gostnet.testing.certificates import Authority
from gostnet.testing.processes import Process
from gostnet.transports.dns_https import ALPN
from gostnet.transports.tls import TlsLayer

from ..vectors import VECTORS, UdpPeer, closed_port, router
from .kit import Upstream, answer, ask, handler, serving, texts

GOST = os.environ.get("GOST_BIN", "")
needs_gost = pytest.mark.skipif(not GOST, reason="GOST_BIN is not set: a path of gost")


@contextmanager
def gost(target: str, query: str = "", authorities: str = "") -> Iterator[Endpoint]:
    """Run gost's name service, which trusts `authorities`; yield its address.

    It says that it listens before it does, and not where.
    """
    address = Endpoint("127.0.0.1", closed_port())
    environment = {"SSL_CERT_FILE": authorities} if authorities else {}
    with Process([GOST, "-L", f"dns://{address}/{target}{query}"], name="gost", env=environment) as process:
        process.wait_for("listening on")
        yield address


async def insist(address: Endpoint, query: dns.message.Message) -> bytes:
    """Ask again until there is an answer: what is sent before gost has bound its socket is lost."""
    wire = query.to_wire()
    with UdpPeer() as peer:
        for _ in range(50):
            await peer.send(wire, address)
            try:
                async with asyncio.timeout(0.2):
                    return (await peer.receive())[0]
            except (TimeoutError, ConnectionRefusedError):
                continue
    raise AssertionError(f"{address} does not answer")


def one() -> Upstream:
    return Upstream(lambda query: answer(query, "A 192.0.2.1"))


@pytest.mark.interop
@needs_gost
@pytest.mark.parametrize("mode", ["udp", "tcp", "tls", "https"])
def test_gost_is_our_upstream(mode: str, tmp_path: Path) -> None:
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    certificate, key = authority.issue("127.0.0.1").save(tmp_path)
    layer = TlsLayer.for_client(schema.TLS(secure=True, ca_file=str(tmp_path / "ca.pem")), alpn=HTTP_ALPN)

    async def main() -> None:
        async with one().running() as upstream:
            with gost(str(upstream.address), f"?mode={mode}&cert={certificate}&key={key}") as real:
                async with serving(handler(f"{mode}://{real}", tls=layer)) as address:
                    async with asyncio.timeout(10):
                        while (await ask(address, dns.message.make_query("ready.test", "A")))[3] & 15:
                            pass  # by TCP a connection is refused until gost listens
                    for name in ("a.test", "b.test", "A.Test"):
                        query = dns.message.make_query(name, "A")
                        data = await ask(address, query)
                        assert query.is_response(dns.message.from_wire(data))
                        assert texts(data) == ["192.0.2.1"]

    run(main())


@pytest.mark.interop
@needs_gost
@pytest.mark.parametrize("mode", ["udp", "tcp", "tls", "https"])
def test_we_are_gosts_upstream(mode: str, tmp_path: Path) -> None:
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    layer = TlsLayer(authority.issue("127.0.0.1").server_context(*ALPN))  # by tls gost does not look at it

    async def main() -> None:
        async with one().running() as upstream:
            async with serving(handler(str(upstream.address)), mode=mode, tls=layer) as ours:
                with gost(f"{mode}://{ours}", authorities=str(tmp_path / "ca.pem")) as real:
                    for name in ("a.test", "b.test"):
                        assert texts(await insist(real, dns.message.make_query(name, "A"))) == ["192.0.2.1"]
            assert len(upstream.asked) == 2

    run(main())


@pytest.mark.interop
@needs_gost
@pytest.mark.parametrize("words", [["a.test", "A"], ["own.test", "A"], ["own.test", "MX"], ["a.test", "A", "edns"]])
def test_the_same_answers_as_gost(words: list[str]) -> None:
    hosts = StaticHosts(HostTable([Mapping("own.test", "192.0.2.9")]))

    async def main() -> None:
        async with one().running() as upstream:
            query = dns.message.make_query(words[0], words[1], use_edns=0 if "edns" in words else None, id=4711)
            with gost(str(upstream.address), "?hosts=own.test:192.0.2.9") as real:
                theirs = await insist(real, query)
            async with serving(handler(str(upstream.address)), router(hosts=hosts)) as address:
                ours = await ask(address, query)
        left, right = dns.message.from_wire(theirs), dns.message.from_wire(ours)
        assert (left.question, left.answer, left.rcode()) == (right.question, right.answer, right.rcode())
        assert [rrset.ttl for rrset in left.answer] == [rrset.ttl for rrset in right.answer]

    run(main())


def test_the_recorded_dialogue_with_a_client_subnet_and_a_fixed_ttl() -> None:
    raw = json.loads((VECTORS / "dns-udp-ecs.json").read_text())
    steps = [bytes.fromhex(step["hex"]) for step in raw["steps"]]
    (asked,) = [bytes.fromhex(text) for text in raw["upstream_queries"]]
    # gost passes the upstream's OPT on to a client that sent none; that is left out here (DN09).
    opt = bytes.fromhex("0000292000000000000000")
    first, second = (step.removesuffix(opt)[:11] + b"\0" + step.removesuffix(opt)[12:] for step in steps[1::2])
    now = [100.0]

    async def main() -> None:
        upstream = Upstream(lambda query: query.id.to_bytes(2, "big") + steps[1][2:])
        async with upstream.running():
            made = handler(dns=[str(upstream.address)], client_ip="198.51.100.77", ttl=30.0, clock=lambda: now[0])
            async with serving(made) as address:
                assert await ask(address, steps[0]) == first
                now[0] += 0.5
                assert await ask(address, steps[2]) == second
        assert [data[2:] for _, data in upstream.asked] == [asked[2:]]

    run(main())


@pytest.mark.parametrize(
    ("address", "told"), [("198.51.100.77", "198.51.100.0/24"), ("2001:db8:1:2ff::9", "2001:db8:1:200::/56")]
)
def test_the_configured_network_takes_the_place_of_what_the_client_tells(address: str, told: str) -> None:
    async def main() -> None:
        async with one().running() as upstream, serving(handler(str(upstream.address), client_ip=address)) as at:
            mine = dns.edns.ECSOption("203.0.113.0", 24)
            await ask(at, dns.message.make_query("a.test", "A", options=[mine]))
            (option,) = dns.message.from_wire(upstream.asked[0][1]).options
            assert f"{option.address}/{option.srclen}" == told  # type: ignore[attr-defined]

    run(main())
