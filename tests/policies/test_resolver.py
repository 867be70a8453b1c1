"""The resolver: every row of the table, against scripted servers on loopback and a clock that the tests move."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import dns.message
import dns.rcode
import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import DialRefused, ResolveError
from gostnet.core.tasks import Scope, run
from gostnet.policies import resolver as module
from gostnet.policies.nameserver import NameServer
from gostnet.policies.resolver import DNSResolver

from .dns_kit import Loopback, Upstream, Zone, serving, wire_of


class Hand:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A resolver with one server for each zone."""

    def __init__(self, upstreams: list[Upstream], options: Sequence[dict[str, Any]], entries: int) -> None:
        self.clock = Hand()
        self.egress = Loopback()
        self.upstreams = upstreams
        self.reports: list[str] = []
        servers = [
            NameServer(address=upstream.address, egress=self.egress, **more)
            for upstream, more in zip(upstreams, options, strict=True)
        ]
        self.resolver = DNSResolver(servers, clock=self.clock, entries=entries, report=self.reports.append)

    async def resolve(self, host: str, family: int = 0) -> list[str] | str:
        """Return addresses, or the message of the error."""
        try:
            return await self.resolver.resolve(host, family)
        except ResolveError as exc:
            return str(exc)

    def asked(self, index: int = 0) -> list[str]:
        """What a server was asked since the last time, without the transport."""
        upstream = self.upstreams[index]
        found = [line.partition(" ")[2] for line in upstream.asked]
        upstream.asked.clear()
        return found

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        assert self.resolver._scope is not None
        assert await self.resolver._scope.drain(20) == 0


def rigged(
    work: Callable[[Rig], Awaitable[None]],
    *zones: Zone,
    options: Sequence[dict[str, Any]] = (),
    entries: int = 100,
    ttl: int = 300,
    soa: tuple[int, int] | None = (30, 30),
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            upstreams = [await stack.enter_async_context(serving(Upstream(zone, ttl=ttl, soa=soa))) for zone in zones]
            rig = Rig(upstreams, options or [{}] * len(zones), entries)
            try:
                await work(rig)
            finally:
                await rig.resolver.aclose()
                assert not rig.resolver._running
                assert rig.resolver._refreshing == 0

    run(main())


TWO = {"a.test": {"A": ["192.0.2.1", "192.0.2.2"]}}


def test_row_y01_answers_are_cached() -> None:
    async def work(rig: Rig) -> None:
        assert await rig.resolve("a.test") == ["192.0.2.1", "192.0.2.2"]
        assert await rig.resolve("a.test") == ["192.0.2.1", "192.0.2.2"]
        assert rig.asked() == ["a.test A"]

    rigged(work, TWO)


def test_row_y02_the_case_of_a_name_makes_no_difference() -> None:
    async def work(rig: Rig) -> None:
        await rig.resolve("a.test")
        assert await rig.resolve("A.TesT.") == ["192.0.2.1", "192.0.2.2"]
        assert rig.asked() == ["a.test A"]

    rigged(work, TWO)


def test_row_y03_the_next_server_is_asked_when_the_first_knows_no_name() -> None:
    async def work(rig: Rig) -> None:
        assert await rig.resolve("fall.test") == ["192.0.2.3"]
        assert (rig.asked(0), rig.asked(1)) == (["fall.test A", "fall.test AAAA"], ["fall.test A"])
        assert await rig.resolve("fall.test") == ["192.0.2.3"]
        assert (rig.asked(0), rig.asked(1)) == ([], [])

    rigged(work, {}, {"fall.test": {"A": ["192.0.2.3"]}})


@pytest.mark.parametrize("soa", [(30, 30), None])
def test_row_y04_an_empty_answer_does_not_speak_for_the_next_server(soa: tuple[int, int] | None) -> None:
    async def work(rig: Rig) -> None:
        for _ in range(2):
            assert await rig.resolve("nodata.test") == ["192.0.2.4"]
        again = [] if soa else ["nodata.test A", "nodata.test AAAA"]
        assert rig.asked(0) == ["nodata.test A", "nodata.test AAAA", *again]
        assert rig.asked(1) == ["nodata.test A"]

    rigged(work, {"nodata.test": {}}, {"nodata.test": {"A": ["192.0.2.4"]}}, soa=soa)


def test_row_y05_the_other_family_is_asked_when_the_first_is_empty() -> None:
    async def work(rig: Rig) -> None:
        assert await rig.resolve("v6.test") == ["::1"]
        assert rig.asked() == ["v6.test A", "v6.test AAAA"]

    rigged(work, {"v6.test": {"AAAA": ["::1"]}})


def test_row_y06_an_answer_with_ttl_0_is_not_cached() -> None:
    async def work(rig: Rig) -> None:
        for _ in range(2):
            assert await rig.resolve("a.test") == ["192.0.2.1", "192.0.2.2"]
        assert rig.asked() == ["a.test A", "a.test A"]
        assert len(rig.resolver.cache) == 0

    rigged(work, TWO, ttl=0)


@pytest.mark.parametrize(("row", "ttl", "option"), [("Y07", 1, 0.0), ("Y09", 300, 1.0)])
def test_row_an_answer_expires(row: str, ttl: int, option: float) -> None:
    async def work(rig: Rig) -> None:
        await rig.resolve("a.test")
        await rig.resolve("a.test")
        assert rig.asked() == ["a.test A"]
        rig.clock.now += 2
        await rig.resolve("a.test")
        assert rig.asked() == ["a.test A"]

    rigged(work, TWO, ttl=ttl, options=[{"ttl": option}])


def test_row_y08_a_negative_ttl_caches_nothing() -> None:
    async def work(rig: Rig) -> None:
        await rig.resolve("a.test")
        await rig.resolve("a.test")
        assert rig.asked() == ["a.test A", "a.test A"]

    rigged(work, TWO, options=[{"ttl": -1.0}])


def test_row_y10_only_is_never_widened() -> None:
    async def work(rig: Rig) -> None:
        assert await rig.resolve("a.test") == "a.test does not exist"
        assert rig.asked() == ["a.test AAAA"]

    rigged(work, TWO, options=[{"only": 6}])


def test_row_y11_prefer_is_only_the_first_try() -> None:
    async def work(rig: Rig) -> None:
        assert await rig.resolve("a.test") == ["192.0.2.1", "192.0.2.2"]
        assert rig.asked() == ["a.test AAAA", "a.test A"]

    rigged(work, TWO, options=[{"prefer": 6}])


def test_row_y12_the_clients_network_reaches_the_server() -> None:
    async def work(rig: Rig) -> None:
        assert await rig.resolve("a.test") == ["192.0.2.1", "192.0.2.2"]
        assert rig.upstreams[0].subnets == ["ECS 1.2.3.0/24 scope/0"]

    rigged(work, TWO, options=[{"subnet": "1.2.3.4"}])


def test_row_y13_a_stale_answer_is_used_and_refreshed_behind_the_scenes() -> None:
    zone = {"t.test": {"A": ["192.0.2.1"]}}

    async def work(rig: Rig) -> None:
        for _ in range(2):
            assert await rig.resolve("t.test") == ["192.0.2.1"]
        assert rig.asked() == ["t.test A"]
        rig.clock.now += 2
        zone["t.test"] = {"A": ["192.0.2.2"]}
        for _ in range(3):
            assert await rig.resolve("t.test") == ["192.0.2.1"]
        await rig.settled()
        assert rig.asked() == ["t.test A"]
        assert await rig.resolve("t.test") == ["192.0.2.2"]
        # A refresh that fails leaves the old answer, but not for ever.
        rig.upstreams[0].script = lambda query, transport: wire_of(query, rcode=dns.rcode.SERVFAIL)
        rig.clock.now += module.MAX_STALE
        assert await rig.resolve("t.test") == ["192.0.2.2"]
        await rig.settled()
        assert rig.asked() == ["t.test A"]
        rig.clock.now += 2
        assert "SERVFAIL" in str(await rig.resolve("t.test"))

    rigged(work, zone, ttl=1, options=[{"stale": True}])


def test_refreshes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REFRESHES", 3)
    names = [f"n{number}.test" for number in range(6)]

    async def work(rig: Rig) -> None:
        for name in names:
            await rig.resolve(name)
        rig.asked()
        rig.clock.now += 2
        hold = rig.upstreams[0].hold = asyncio.Event()
        for name in names:
            assert await rig.resolve(name) == ["192.0.2.1"]
        await rig.upstreams[0].until_asked(3)
        hold.set()
        await rig.settled()
        assert rig.asked() == [f"{name} A" for name in names[:3]]

    rigged(work, {name: {"A": ["192.0.2.1"]} for name in names}, ttl=1, options=[{"stale": True}])


@pytest.mark.parametrize("literal", ["127.0.0.1", "::1", "fe80::1%eth0"])
def test_row_y14_an_address_is_its_own(literal: str) -> None:
    async def work(rig: Rig) -> None:
        assert await rig.resolve(literal) == [literal]
        assert await rig.resolve(literal, 4) == [literal]
        assert rig.asked() == []

    rigged(work, TWO)


def test_row_y15_all_addresses_are_returned_in_order() -> None:
    many = [f"192.0.2.{number}" for number in range(20, 0, -1)]

    async def work(rig: Rig) -> None:
        assert await rig.resolve("many.test") == many

    rigged(work, {"many.test": {"A": many}})


@pytest.mark.parametrize(
    ("row", "only", "family", "asked"),
    [("Y16", 6, 4, "AAAA"), ("caller", 0, 6, "AAAA"), ("caller", 0, 4, "A"), ("only", 4, 0, "A")],
)
def test_row_y16_only_wins_over_the_caller_who_wins_over_prefer(row: str, only: int, family: int, asked: str) -> None:
    async def work(rig: Rig) -> None:
        expected = ["192.0.2.1"] if asked == "A" else ["::1"]
        assert await rig.resolve("both.test", family) == expected
        assert rig.asked() == [f"both.test {asked}"]
        assert await rig.resolve("none.test", family) == "none.test does not exist"
        assert rig.asked() == [f"none.test {asked}"]

    zone = {"both.test": {"A": ["192.0.2.1"], "AAAA": ["::1"]}, "none.test": {}}
    rigged(work, zone, options=[{"only": only, "prefer": 4 if family == 6 else 6}])


def test_row_y17_equal_questions_at_the_same_time_are_one() -> None:
    async def work(rig: Rig) -> None:
        hold = rig.upstreams[0].hold = asyncio.Event()
        answers: list[list[str] | str] = []

        async def one() -> None:
            answers.append(await rig.resolve("a.test"))

        scope = Scope("clients")
        for _ in range(5):
            scope.start(one())
            scope.launch(one())  # a fiber, as connections are
        await rig.upstreams[0].until_asked(1)
        hold.set()
        assert await scope.drain(20) == 0
        assert answers == [["192.0.2.1", "192.0.2.2"]] * 10
        assert rig.asked() == ["a.test A"]

    rigged(work, TWO)


def test_one_that_is_cancelled_does_not_take_the_answer_along() -> None:
    async def work(rig: Rig) -> None:
        hold = rig.upstreams[0].hold = asyncio.Event()
        answers: list[list[str] | str] = []

        async def one() -> None:
            answers.append(await rig.resolve("a.test"))

        scope = Scope("clients")
        first, fiber = scope.start(one()), scope.launch(one())
        scope.start(one())
        await rig.upstreams[0].until_asked(1)
        first.cancel()
        fiber.cancel()
        hold.set()
        assert await scope.drain(20) == 0
        assert answers == [["192.0.2.1", "192.0.2.2"]]
        assert rig.asked() == ["a.test A"]

    rigged(work, TWO)


def test_closing_ends_what_is_under_way() -> None:
    async def work(rig: Rig) -> None:
        hold = rig.upstreams[0].hold = asyncio.Event()
        answers: list[list[str] | str] = []

        async def one() -> None:
            answers.append(await rig.resolve("a.test"))

        scope = Scope("clients")
        scope.start(one())
        await rig.upstreams[0].until_asked(1)
        await rig.resolver.aclose()
        assert await scope.drain(20) == 0
        assert "given up" in str(answers)
        assert await rig.resolve("b.test") == "the resolver is closed"
        hold.set()

    rigged(work, TWO)


# ---- failures -----------------------------------------------------------------------------------
def test_a_server_that_fails_is_passed_over_and_reported() -> None:
    async def work(rig: Rig) -> None:
        rig.upstreams[0].script = lambda query, transport: wire_of(query, rcode=dns.rcode.SERVFAIL)
        assert await rig.resolve("a.test") == ["192.0.2.1", "192.0.2.2"]
        assert rig.asked(0) == ["a.test A", "a.test AAAA"]
        assert len(rig.reports) == 1
        assert "SERVFAIL for a.test" in rig.reports[0]
        await rig.resolve("a.test")
        assert rig.asked(0) == ["a.test A", "a.test AAAA"]  # failures are not cached

    rigged(work, TWO, TWO)


def test_a_server_that_is_silent_is_asked_for_one_family_only() -> None:
    async def work(rig: Rig) -> None:
        rig.upstreams[0].script = lambda query, transport: None
        assert await rig.resolve("a.test") == ["192.0.2.1", "192.0.2.2"]
        assert rig.asked(0) == ["a.test A"]

    rigged(work, TWO, TWO, options=[{"timeout": 0.05}, {}])


def test_a_server_may_fail_for_the_family_that_a_name_does_not_have() -> None:
    async def work(rig: Rig) -> None:
        upstream = rig.upstreams[0]

        def script(query: dns.message.Message, transport: str) -> bytes:
            if upstream.asked[-1].endswith("AAAA"):
                return wire_of(query, rcode=dns.rcode.NOTIMP)
            return upstream.answer(query)

        upstream.script = script
        assert await rig.resolve("a.test") == ["192.0.2.1", "192.0.2.2"]

    rigged(work, TWO, options=[{"prefer": 6}])


def test_when_every_server_fails_the_last_error_is_told() -> None:
    async def work(rig: Rig) -> None:
        rig.egress.error = DialRefused("no way out")
        answer = await rig.resolve("a.test")
        assert answer == f"udp://{rig.upstreams[1].address}: no way out"
        assert len(rig.reports) == 2

    rigged(work, TWO, TWO)


def test_a_failure_beside_an_empty_answer_does_not_hide_it() -> None:
    async def work(rig: Rig) -> None:
        rig.upstreams[1].script = lambda query, transport: wire_of(query, rcode=dns.rcode.REFUSED)
        assert await rig.resolve("none.test") == "none.test does not exist"

    rigged(work, TWO, TWO)


@pytest.mark.parametrize("host", ["", ".", "a..b", "x" * 64 + ".test", ".".join(["x" * 60] * 5), "\\400.test"])
def test_what_is_no_name_is_not_asked_for(host: str) -> None:
    async def work(rig: Rig) -> None:
        assert "is not a host name" in str(await rig.resolve(host))
        assert rig.asked() == []

    rigged(work, TWO)


def test_names_in_other_scripts_are_encoded() -> None:
    async def work(rig: Rig) -> None:
        assert await rig.resolve("B\u00dccher.test") == ["192.0.2.9"]

    rigged(work, {"xn--bcher-kva.test": {"A": ["192.0.2.9"]}})


# ---- answers ------------------------------------------------------------------------------------
def scripted(*answers: tuple[str, int, str, str]) -> Callable[[dns.message.Message, str], bytes]:
    return lambda query, transport: wire_of(query, answers)


def test_aliases_are_followed_within_the_answer_and_the_shortest_ttl_counts() -> None:
    async def work(rig: Rig) -> None:
        rig.upstreams[0].script = scripted(
            ("b.test", 300, "A", "192.0.2.7"), ("a.test", 5, "CNAME", "b.test."), ("c.test", 300, "A", "192.0.2.66")
        )
        assert await rig.resolve("a.test") == ["192.0.2.7"]
        rig.asked()
        rig.clock.now += 4
        await rig.resolve("a.test")
        assert rig.asked() == []
        rig.clock.now += 2
        await rig.resolve("a.test")
        assert rig.asked() == ["a.test A"]

    rigged(work, {})


def test_records_of_other_names_are_not_taken() -> None:
    async def work(rig: Rig) -> None:
        rig.upstreams[0].script = scripted(("evil.test", 300, "A", "192.0.2.66"))
        assert await rig.resolve("a.test") == "a.test does not exist"

    rigged(work, {})


def test_aliases_in_a_circle_are_a_refusal() -> None:
    async def work(rig: Rig) -> None:
        rig.upstreams[0].script = scripted(("a.test", 5, "CNAME", "b.test."), ("b.test", 5, "CNAME", "a.test."))
        assert "a broken answer" in str(await rig.resolve("a.test"))

    rigged(work, {})


@pytest.mark.parametrize(
    ("soa", "seconds"), [((30, 20), 20), ((10, 20), 10), ((3600, 3600), 60), ((0, 20), 0), ((20, 0), 0)]
)
def test_absence_is_cached_as_long_as_the_zone_says_up_to_a_minute(soa: tuple[int, int], seconds: int) -> None:
    async def work(rig: Rig) -> None:
        for name in ("nodata.test", "nxdomain.test"):
            await rig.resolve(name, 4)
            rig.asked()
            if seconds:
                rig.clock.now += seconds - 0.5
                assert await rig.resolve(name, 4) == f"{name} does not exist"
                assert rig.asked() == []
                rig.clock.now += 1
            await rig.resolve(name, 4)
            assert rig.asked() == [f"{name} A"]

    rigged(work, {"nodata.test": {}}, soa=soa)


def test_no_answer_is_kept_longer_than_a_day() -> None:
    async def work(rig: Rig) -> None:
        await rig.resolve("a.test")
        rig.asked()
        rig.clock.now += module.MAX_TTL + 1
        await rig.resolve("a.test")
        assert rig.asked() == ["a.test A"]

    rigged(work, TWO, ttl=10_000_000)


def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    names = [f"n{number}.test" for number in range(12)]

    async def work(rig: Rig) -> None:
        await rig.resolve("kept.test")
        for name in names:
            await rig.resolve(name)
            assert await rig.resolve("kept.test") == ["192.0.2.1"]
        assert len(rig.resolver.cache) == 5
        rig.asked()
        await rig.resolve("kept.test")
        await rig.resolve(names[-1])
        assert rig.asked() == []
        await rig.resolve(names[0])
        assert rig.asked() == [f"{names[0]} A"]

    rigged(work, {name: {"A": ["192.0.2.1"]} for name in [*names, "kept.test"]}, entries=5)


def test_each_server_has_answers_of_its_own() -> None:
    async def work(rig: Rig) -> None:
        assert await rig.resolve("a.test") == ["::1"]
        assert await rig.resolve("a.test", 4) == ["::1"]
        assert await rig.resolve("b.test") == ["192.0.2.2"]
        assert rig.asked(0) == ["a.test AAAA", "b.test AAAA"]
        assert rig.asked(1) == ["b.test A"]

    zones = {"a.test": {"AAAA": ["::1"]}, "b.test": {}}, {"b.test": {"A": ["192.0.2.2"]}}
    rigged(work, *zones, options=[{"only": 6}, {}])


def test_without_servers_nothing_exists() -> None:
    resolver = DNSResolver([])
    with pytest.raises(ResolveError, match="does not exist"):
        run(resolver.resolve("a.test"))
    run(resolver.aclose())


def test_a_server_is_shown_without_secrets() -> None:
    server = NameServer(address=Endpoint("::1", 53), egress=Loopback(), transport="tcp")
    assert str(server) == "tcp://[::1]:53"
