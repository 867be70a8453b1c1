"""Route look-ups against routes, rules and their refusals."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest

from gostnet.core.errors import DialUnreachable, KernelError
from gostnet.core.resources import MARK_DIVERTED, MARK_MASK, Route, Rule
from gostnet.kernel import netns
from gostnet.kernel.netlink import RouteNetlink
from gostnet.kernel.routeget import RouteLookup
from gostnet.testing.namespaces import Network

pytestmark = pytest.mark.netns


@pytest.fixture
def net(three: Network) -> Network:
    with RouteNetlink(three["gateway"]) as netlink:
        for version, far, everything in ((4, "192.0.2.{}/32", "0.0.0.0/0"), (6, "2001:db8::{}/128", "::/0")):
            for last, kind in enumerate(("blackhole", "unreachable", "prohibit"), 1):
                netlink.put_route(Route(far.format(last), type=kind))  # type: ignore[arg-type]
            netlink.put_route(Route(everything, 18254, "local", "lo"))
            netlink.put_rule(Rule(version, 18254, 18254, MARK_DIVERTED, MARK_MASK, "lo"))  # type: ignore[arg-type]
    return three


@pytest.fixture
def lookup(net: Network) -> Iterator[RouteLookup]:
    with RouteLookup(net["gateway"]) as found:
        yield found


def index(net: Network, role: str, name: str) -> int:
    with net.inside(role):
        return socket.if_nametoindex(name)


@pytest.mark.parametrize(
    ("neighbour", "mine", "prefix"),
    [("10.99.2.2", "10.99.2.1", 24), ("fd99:2::2", "fd99:2::1", 64)],
)
def test_neighbour_gives_device_and_source(
    net: Network, lookup: RouteLookup, neighbour: str, mine: str, prefix: int
) -> None:
    route = lookup.get(neighbour)
    assert (route.type, route.device, route.gateway, route.source) == (
        "unicast",
        index(net, "gateway", "wan0"),
        "",
        mine,
    )
    assert route.table == 254
    assert lookup.get(neighbour, matched=True).prefix == prefix


@pytest.mark.parametrize(("far", "via"), [("192.0.2.77", "10.99.1.2"), ("2001:db8::77", "fd99:1::2")])
def test_default_route_gives_the_gateway(net: Network, far: str, via: str) -> None:
    with RouteLookup(net["client"]) as lookup:
        route = lookup.get(far)
        assert (route.gateway, lookup.get(far, matched=True).prefix) == (via, 0)


@pytest.mark.parametrize("own", ["10.99.1.2", "fd99:1::2", "127.0.0.1", "::1"])
def test_own_address_is_local(lookup: RouteLookup, own: str) -> None:
    assert (lookup.get(own).type, lookup.get(own).table) == ("local", 255)


@pytest.mark.parametrize("target", ["10.99.2.2", "fd99:2::2"])
def test_mark_leads_to_another_table(lookup: RouteLookup, target: str) -> None:
    assert lookup.get(target).table == 254
    marked = lookup.get(target, mark=MARK_DIVERTED | 0x77)
    assert (marked.table, marked.type, marked.device) == (18254, "local", 1)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("192.0.2.1", "blackhole"),
        ("192.0.2.2", "unreachable"),
        ("192.0.2.3", "prohibit"),
        ("2001:db8::1", "blackhole"),
        ("2001:db8::2", "unreachable"),
        ("2001:db8::3", "prohibit"),
        ("198.51.100.1", "no route"),
        ("2001:db8:1::1", "no route"),
    ],
)
def test_no_way_says_why(lookup: RouteLookup, target: str, reason: str) -> None:
    with pytest.raises(DialUnreachable, match=reason):
        lookup.get(target)


def test_device_narrows_and_a_missing_one_is_refused(net: Network, lookup: RouteLookup) -> None:
    lan = index(net, "gateway", "lan0")
    assert lookup.get("10.99.1.1", device=lan).device == lan
    with pytest.raises((KernelError, DialUnreachable)):
        lookup.get("10.99.1.1", device=9999)


def test_mtu_of_the_route(net: Network, lookup: RouteLookup) -> None:
    with netns.inside(net["gateway"]):
        subprocess.run(["ip", "route", "add", "203.0.113.0/24", "via", "10.99.2.2", "mtu", "1350"], check=True)
    assert lookup.get("203.0.113.5").mtu == 1350
    assert lookup.get("10.99.2.2").mtu == 0
