"""Names on the way out: nodes and targets with several addresses, datagrams to names, and what bypasses see of them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram, Datagrams
from gostnet.core.errors import BypassDenied, DialRefused, ResolveError
from gostnet.core.flow import Flow
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.pipeline.chain import Chain
from gostnet.pipeline.direct import Direct as RealDirect
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.names import MAX_HELD, AnyPeer, addresses_of
from gostnet.pipeline.race import FALLBACK_DELAY
from gostnet.pipeline.router import ServiceRouter
from gostnet.policies.bypass import PatternBypass, combine

from .kit import Direct, Label, node, run_virtual
from .test_router import TARGET, Matches, Table, way


class Slow(Table):
    """A resolver whose answers wait until they are let go."""

    def __init__(self, **names: list[str]) -> None:
        super().__init__(**names)
        self.asked: list[str] = []
        self.gate: asyncio.Event | None = None

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        self.asked.append(host)
        if self.gate is not None and host.startswith("slow"):
            await self.gate.wait()
        return await super().resolve(host, family)


def test_hosts_go_before_the_resolver_and_neither_touches_what_it_does_not_know() -> None:
    async def main() -> None:
        hosts, resolver = Table(a_test=["192.0.2.1"]), Table(a_test=["192.0.2.9"], b_test=["192.0.2.2", "192.0.2.3"])
        assert await addresses_of("a.test", hosts, resolver) == ["192.0.2.1"]
        assert await addresses_of("b.test", hosts, resolver) == ["192.0.2.2", "192.0.2.3"]
        assert await addresses_of("b.test", hosts, None) == ()
        assert await addresses_of("192.0.2.7", None, resolver) == ()
        assert await addresses_of("", hosts, resolver) == ()
        with pytest.raises(ResolveError):
            await addresses_of("c.test", hosts, resolver)

    run(main())


# ---- targets -------------------------------------------------------------------------------------
def test_y15_a_target_is_tried_by_all_its_addresses() -> None:
    direct = Direct(dead=("192.0.2.1:80",))
    router = ServiceRouter(direct, resolver=Table(web_test=["192.0.2.1", "192.0.2.2"]))
    assert way(router, Endpoint("web.test", 80)) == ("tcp 192.0.2.2:80",)
    assert direct.asked == ["192.0.2.1:80", "192.0.2.2:80"]


def test_y15_hosts_give_all_their_addresses_to_a_chain_as_well() -> None:
    def refuse_first(step: str, target: Endpoint | None) -> DialRefused | None:
        return DialRefused("refused") if target == Endpoint("192.0.2.1", 80) else None

    direct = Direct()
    item = node("proxy", 1, fail=refuse_first)
    routes = Chain("c", [Hop("h", [item])], direct)
    router = ServiceRouter(direct, routes, hosts=Table(web_test=["192.0.2.1", "192.0.2.2"]))
    assert way(router, Endpoint("web.test", 80)) == ("tcp 192.0.2.1:1", "proxy 192.0.2.2:80")
    assert item.marker.failures == 0


def test_r13_each_address_has_the_route_that_is_for_it() -> None:
    direct = Direct(dead=("192.0.2.1:7",))
    routes = Chain("c", [Hop("h", [node("proxy", 7)], bypass=Matches("198.51.100.2:80"))], direct)
    router = ServiceRouter(direct, routes, resolver=Table(web_test=["198.51.100.1", "198.51.100.2"]))
    assert way(router, Endpoint("web.test", 80)) == ("tcp 198.51.100.2:80",)


def test_r16_of_several_addresses_the_refused_ones_are_never_tried() -> None:
    direct = Direct(dead=("192.0.2.2:80",))
    router = ServiceRouter(
        direct, resolver=Table(web_test=["10.0.0.1", "192.0.2.2", "192.0.2.3"]), bypass=Matches("10.0.0.1:80")
    )
    assert way(router, Endpoint("web.test", 80)) == ("tcp 192.0.2.3:80",)
    assert direct.asked == ["192.0.2.2:80", "192.0.2.3:80"]


def test_r16_a_whitelist_has_decided_by_the_name() -> None:
    allowed = PatternBypass.from_patterns(["web.test"], whitelist=True)
    router = ServiceRouter(Direct(), resolver=Table(web_test=["192.0.2.1"], no_test=["192.0.2.1"]), bypass=allowed)
    assert way(router, Endpoint("web.test", 80)) == ("tcp 192.0.2.1:80",)
    with pytest.raises(BypassDenied):
        way(router, Endpoint("no.test", 80))
    inner = PatternBypass.from_patterns(["192.0.2.0/24"])
    both = combine([allowed, inner])
    router = ServiceRouter(Direct(), resolver=Table(web_test=["192.0.2.1"]), bypass=both)
    with pytest.raises(BypassDenied):
        way(router, Endpoint("web.test", 80))


def test_r16_the_systems_resolver_does_not_lead_around_the_bypass_either() -> None:
    bypass = PatternBypass.from_patterns(["127.0.0.0/8"])

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            target = Endpoint("inner.test", server.getsockname()[1])
            for routes in (None, Chain("c", [Hop("h", [])], Direct())):
                router = ServiceRouter(RealDirect(Table(inner_test=["127.0.0.1"])), routes, bypass=bypass)
                with pytest.raises(BypassDenied, match=r"127\.0\.0\.1.*behind inner\.test"):
                    await router.connect(Flow(), target)
                with pytest.raises(BypassDenied):
                    await router.associate(Flow(), target)
            router = ServiceRouter(RealDirect(Table(inner_test=["127.0.0.1"])), bypass=Matches("10.0.0.1:1"))
            stream = await router.connect(Flow(), target)
            await stream.aclose()

    run(main())


class Families:
    """A resolver that gives addresses of the family that it prefers, unless it is asked for the other one."""

    def __init__(self, four: list[str], six: list[str]) -> None:
        self.known = {0: six or four, 4: four, 6: six}
        self.asked: list[int] = []

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        self.asked.append(family)
        if not self.known[family]:
            raise ResolveError(f"{host} has no address")
        return self.known[family]


def test_the_other_family_is_asked_for_when_the_preferred_one_leads_nowhere() -> None:
    direct = Direct(dead=("[2001:db8::1]:80", "192.0.2.1:80"))
    resolver = Families(["192.0.2.1", "192.0.2.2"], ["2001:db8::1"])
    router = ServiceRouter(direct, resolver=resolver, bypass=Matches("192.0.2.9:80"))
    assert way(router, Endpoint("web.test", 80)) == ("tcp 192.0.2.2:80",)
    assert resolver.asked == [0, 4]
    assert way(ServiceRouter(Direct(), resolver=resolver), Endpoint("web.test", 80)) == ("tcp [2001:db8::1]:80",)
    assert resolver.asked == [0, 4, 0]


def test_the_other_family_is_refused_by_the_bypass_as_well() -> None:
    direct = Direct(dead=("[2001:db8::1]:80",))
    resolver = Families(["10.0.0.1"], ["2001:db8::1"])
    with pytest.raises(DialRefused):
        way(ServiceRouter(direct, resolver=resolver, bypass=Matches("10.0.0.1:80")), Endpoint("web.test", 80))
    assert direct.asked == ["[2001:db8::1]:80"]
    assert resolver.asked == [0, 4]


class SlowDirect(Direct):
    """A direct way on which connections take their time, by address; whose never end are those of None."""

    def __init__(self, **seconds: float | None) -> None:
        super().__init__()
        self.seconds = {key.replace("_", "."): value for key, value in seconds.items()}
        self.begun: list[tuple[str, float]] = []

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        self.begun.append((target.host, round(asyncio.get_running_loop().time(), 3)))
        seconds = self.seconds.get("v6" if ":" in target.host else f"v4.{target.host}", 0.0)
        if seconds is None:
            await asyncio.Event().wait()
        else:
            await asyncio.sleep(seconds)
        return await super().connect(flow, target)


def reached(router: ServiceRouter) -> tuple[str, ...]:
    """Return the way to a name, by a clock that does not wait."""

    async def main() -> tuple[str, ...]:
        found = await router.connect(Flow(), Endpoint("web.test", 80))
        assert isinstance(found, Label)
        return found.way

    return run_virtual(main())


@pytest.mark.parametrize("seconds", [None, 5.0])
def test_the_other_family_is_tried_beside_the_preferred_one_when_that_is_slow(seconds: float | None) -> None:
    direct = SlowDirect(v6=seconds)
    resolver = Families(["192.0.2.1"], ["2001:db8::1"])
    assert reached(ServiceRouter(direct, resolver=resolver)) == ("tcp 192.0.2.1:80",)
    (first, began), (second, later) = direct.begun
    assert (first, second, round(later - began, 3)) == ("2001:db8::1", "192.0.2.1", FALLBACK_DELAY)
    assert resolver.asked == [0, 4]


def test_a_preferred_family_that_answers_in_time_is_the_only_one_that_is_asked_for() -> None:
    direct = SlowDirect(v6=FALLBACK_DELAY - 0.01)
    resolver = Families(["192.0.2.1"], ["2001:db8::1"])
    assert reached(ServiceRouter(direct, resolver=resolver)) == ("tcp [2001:db8::1]:80",)
    assert resolver.asked == [0]


def test_the_families_take_turns_once_both_are_known() -> None:
    direct = SlowDirect(v6=9.0, v4_192_0_2_1=9.0)
    resolver = Families(["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2", "2001:db8::3"])
    assert reached(ServiceRouter(direct, resolver=resolver)) == ("tcp 192.0.2.2:80",)
    assert [host for host, _ in direct.begun] == [
        *("2001:db8::1", "2001:db8::2", "192.0.2.1", "2001:db8::3", "192.0.2.2"),
    ]


def test_a_family_that_is_the_only_one_stays_so() -> None:
    class Pinned(Families):
        async def resolve(self, host: str, family: int = 0) -> list[str]:
            return await super().resolve(host, 4)

    direct = SlowDirect(v4_192_0_2_1=5.0)
    router = ServiceRouter(direct, resolver=Pinned(["192.0.2.1"], ["2001:db8::1"]))
    assert reached(router) == ("tcp 192.0.2.1:80",)
    assert len(direct.begun) == 1


def test_who_gives_both_families_is_asked_once() -> None:
    class Both(Families):
        both_families = True

    resolver = Both(["192.0.2.1"], [])
    assert reached(ServiceRouter(SlowDirect(v4_192_0_2_1=5.0), resolver=resolver)) == ("tcp 192.0.2.1:80",)
    assert resolver.asked == [0]


def test_a_bypass_that_refuses_the_other_family_says_nothing_about_the_flow() -> None:
    async def main() -> None:
        flow = Flow()
        resolver = Families(["192.0.2.1"], ["2001:db8::1"])
        router = ServiceRouter(SlowDirect(v6=1.0), resolver=resolver, bypass=Matches("192.0.2.1:80"))
        await router.connect(flow, Endpoint("web.test", 80))
        assert flow.reason == ""

    run_virtual(main())


def test_without_another_family_the_failure_stays_what_it_was() -> None:
    for resolver in (Families([], ["2001:db8::1"]), Families(["192.0.2.1"], [])):
        dead = f"{Endpoint(resolver.known[0][0], 80)}"
        with pytest.raises(DialRefused, match="refused"):
            way(ServiceRouter(Direct(dead=(dead,)), resolver=resolver), Endpoint("web.test", 80))
        assert len(resolver.asked) == 2


def test_a_node_that_fails_is_no_reason_to_ask_for_the_other_family() -> None:
    direct = Direct(dead=("192.0.2.1:1",))
    resolver = Families(["192.0.2.80"], ["2001:db8::1"])
    with pytest.raises(DialRefused):
        way(ServiceRouter(direct, Chain("c", [Hop("h", [node("a", 1)])], direct), resolver=resolver), Endpoint("w", 80))
    assert resolver.asked == [0]


# ---- nodes ---------------------------------------------------------------------------------------
def test_a_node_is_reached_by_any_of_its_addresses_and_keeps_its_name_for_tls() -> None:
    names: list[str] = []

    class Layer:
        async def client(self, flow: Flow, below: Label, name: str) -> Label:
            names.append(name)
            return below

    direct = Direct(dead=("198.51.100.1:1080",))
    item = node("proxy", 1080, resolver=Table(proxy_test=["198.51.100.1", "198.51.100.2"]))
    item.address = Endpoint("proxy.test", 1080)
    item.transport = type(item.transport)("tls", item.transport.dialer, (Layer(),))  # type: ignore[arg-type]
    assert way(ServiceRouter(direct, Chain("c", [Hop("h", [item])], direct))) == (
        "tcp 198.51.100.2:1080",
        f"proxy {TARGET}",
    )
    assert names == ["proxy.test"]
    assert item.marker.failures == 0


def test_a_second_node_is_tried_by_all_its_addresses_each_through_the_first() -> None:
    def refuse(step: str, target: Endpoint | None) -> DialRefused | None:
        return DialRefused("refused") if target == Endpoint("198.51.100.1", 2) else None

    direct = Direct()
    first, second = node("a", 1, fail=refuse), node("b", 2, hosts=Table(b_test=["198.51.100.1", "198.51.100.2"]))
    second.address = Endpoint("b.test", 2)
    routes = Chain("c", [Hop("h", [first]), Hop("i", [second])], direct)
    assert way(ServiceRouter(direct, routes)) == ("tcp 192.0.2.1:1", "a 198.51.100.2:2", f"b {TARGET}")
    assert direct.asked == ["192.0.2.1:1"] * 2
    assert (first.marker.failures, second.marker.failures) == (0, 0)
    assert direct.streams[0].aborted


def test_a_node_is_reached_by_the_other_family_when_the_preferred_one_leads_nowhere() -> None:
    direct = Direct(dead=("[2001:db8::7]:1",))
    item = node("proxy", 1, resolver=Families(["198.51.100.7"], ["2001:db8::7"]))
    item.address = Endpoint("proxy.test", 1)
    assert way(ServiceRouter(direct, Chain("c", [Hop("h", [item])], direct)))[0] == "tcp 198.51.100.7:1"
    assert item.marker.failures == 0


def test_c08_a_node_whose_name_has_no_address_is_marked() -> None:
    direct = Direct()
    item = node("proxy", 1, resolver=Table())
    item.address = Endpoint("proxy.test", 1)
    with pytest.raises(ResolveError):
        way(ServiceRouter(direct, Chain("c", [Hop("h", [item])], direct)))
    assert item.marker.failures == 1
    assert direct.asked == []


# ---- datagrams -----------------------------------------------------------------------------------
def peers(count: int) -> list[socket.socket]:
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(count)]
    for each in made:
        each.bind(("127.0.0.1", 0))
        each.setblocking(False)
    return made


async def heard(sock: socket.socket) -> bytes:
    async with asyncio.timeout(5):
        return await asyncio.get_running_loop().sock_recv(sock, 2048)


def silent(sock: socket.socket) -> bool:
    try:
        sock.recv(1)
    except BlockingIOError:
        return True
    return False


def to(sock: socket.socket, name: str, data: bytes = b"x") -> Datagram:
    return Datagram(data, Endpoint(name, sock.getsockname()[1]))


def test_a_slow_name_holds_back_no_other_datagram() -> None:
    async def main() -> None:
        resolver = Slow(slow_test=["127.0.0.1"], fast_test=["::1", "127.0.0.1"])
        resolver.gate = asyncio.Event()
        one, two = peers(2)
        with one, two:
            association = await RealDirect(resolver).associate(Flow(), None)
            assert isinstance(association, AnyPeer)
            try:
                await association.send([to(one, "slow.test", b"1"), to(one, "Slow.test", b"2"), to(two, "fast.test")])
                await association.send([Datagram(b"4", Endpoint("127.0.0.1", two.getsockname()[1]))])
                assert {await heard(two), await heard(two)} == {b"x", b"4"}
                assert silent(one)
                resolver.gate.set()
                assert [await heard(one), await heard(one)] == [b"1", b"2"]
                await association.send([to(one, "slow.test", b"3")])
                assert await heard(one) == b"3"
                assert sorted(resolver.asked) == ["fast.test", "slow.test"]
            finally:
                association.abort()

    run(main())


def test_names_without_an_address_are_dropped_and_what_waits_is_bounded() -> None:
    async def main() -> None:
        resolver = Slow(slow_test=["127.0.0.1"], fast_test=["127.0.0.1"])
        resolver.gate = asyncio.Event()
        one, two = peers(2)
        with one, two:
            association = await RealDirect(resolver).associate(Flow(), None)
            try:
                await association.send([to(one, "nowhere.test")])
                batch = Datagram(b"ab" * (MAX_HELD + 10), Endpoint("slow.test", one.getsockname()[1]), 2)
                await association.send([batch, to(two, "fast.test"), Datagram(b"y", Endpoint("fast.test", 0))])
                resolver.gate.set()
                # One place was taken by the name that has no address.
                got = [await heard(one) for _ in range(MAX_HELD - 1)]
                assert got == [b"ab"] * (MAX_HELD - 1)
                await association.send([to(two, "fast.test", b"later")])
                # There was no room for it while the others waited.
                assert await heard(two) == b"later"
                assert silent(one)
            finally:
                await association.aclose()

    run(main())


def test_datagrams_follow_the_services_hosts_resolver_and_bypass() -> None:
    async def main() -> None:
        one, two = peers(2)
        with one, two:
            bypass = PatternBypass.from_patterns([f"127.0.0.1:{two.getsockname()[1]}"])
            router = ServiceRouter(
                RealDirect(Table()),
                hosts=Table(one_test=["127.0.0.1"]),
                resolver=Table(two_test=["127.0.0.1"]),
                bypass=bypass,
            )
            association: Datagrams = await router.associate(Flow(), None)
            try:
                await association.send([to(two, "two.test"), to(one, "one.test", b"1")])
                assert await heard(one) == b"1"
                await association.send([to(two, "one.test"), to(one, "two.test", b"2")])
                assert await heard(one) == b"2"
                assert silent(two)
            finally:
                association.abort()

    run(main())


def test_the_peer_of_an_association_keeps_the_name_that_was_asked_for() -> None:
    async def main() -> None:
        (server,) = peers(1)
        with server:
            router = ServiceRouter(RealDirect(Table()), resolver=Table(echo_test=["127.0.0.1"]))
            target = Endpoint("echo.test", server.getsockname()[1])
            association = await router.associate(Flow(), target)
            try:
                await association.send([Datagram(b"ping", target)])
                server.sendto(await heard(server), ("127.0.0.1", association.local.port))
                batch: Sequence[Datagram] = await association.receive()
                assert [(bytes(each.data), each.peer) for each in batch] == [(b"ping", target)]
            finally:
                association.abort()

    run(main())


def test_aborting_an_association_ends_its_look_ups() -> None:
    async def main() -> None:
        resolver = Slow(slow_test=["127.0.0.1"])
        resolver.gate = asyncio.Event()
        (one,) = peers(1)
        with one:
            association = await RealDirect(resolver).associate(Flow(), None)
            await association.send([to(one, "slow.test")])
            await asyncio.sleep(0)
            assert resolver.asked == ["slow.test"]
            association.abort()
            await asyncio.sleep(0)
            resolver.gate.set()
            await asyncio.sleep(0)
            assert silent(one)

    run_virtual(main())
