"""The table of peers."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from gostnet.policies.routers import RouteEntry, RouteTable, StaticRouter
from gostnet.protocols.tun import routes
from gostnet.protocols.tun.routes import PeerTable

from .kit import setup

WAYS = setup(
    ways=[
        ("10.0.0.0/8", "192.168.0.1"),
        ("10.1.0.0/16", "192.168.0.2"),
        ("10.2.0.0/16", ""),
        ("fd01::/16", "fd00::2"),
        ("0.0.0.0/0", "192.168.0.3"),
    ]
).ways


def find(table: PeerTable[str], address: str) -> str | None:
    return table.find(ip_address(address).packed)


def learn(table: PeerTable[str], peer: str, *addresses: str) -> bool:
    return table.learn([ip_address(address) for address in addresses], peer)


def test_an_address_belongs_to_who_registered_it_last() -> None:
    table: PeerTable[str] = PeerTable()
    assert find(table, "192.168.0.2") is None
    assert learn(table, "a", "192.168.0.2", "fd00::2")
    assert not learn(table, "a", "192.168.0.2")
    assert (find(table, "192.168.0.2"), find(table, "fd00::2"), find(table, "192.168.0.3")) == ("a", "a", None)
    assert learn(table, "b", "192.168.0.2")
    assert (find(table, "192.168.0.2"), find(table, "fd00::2")) == ("b", "a")


def test_networks_lead_to_the_peer_with_their_gateway_the_longest_prefix_first() -> None:
    table: PeerTable[str] = PeerTable(WAYS)
    assert find(table, "10.1.2.3") is None  # and is remembered, until somebody registers
    learn(table, "one", "192.168.0.1")
    learn(table, "two", "192.168.0.2", "fd00::2")
    learn(table, "three", "192.168.0.3")
    assert find(table, "10.1.2.3") == "two"
    assert find(table, "10.2.0.1") == "one"  # a network behind the device itself says nothing about peers
    assert find(table, "192.0.2.1") == "three"
    assert find(table, "fd01::1") == "two"
    assert find(table, "fd02::1") is None
    learn(table, "other", "192.168.0.2")
    assert find(table, "10.1.2.3") == "other"


def test_a_longer_prefix_whose_gateway_is_away_does_not_fall_back() -> None:
    table: PeerTable[str] = PeerTable(WAYS)
    learn(table, "one", "192.168.0.1")
    assert find(table, "10.1.2.3") is None
    assert find(table, "10.9.2.3") == "one"


def test_with_a_single_peer_everything_goes_to_the_last_one() -> None:
    table: PeerTable[str] = PeerTable(WAYS, single=True)
    assert find(table, "10.1.2.3") is None
    learn(table, "a", "192.168.0.1")
    learn(table, "b", "192.168.0.2")
    assert {find(table, address) for address in ("10.1.2.3", "192.168.0.1", "fd00::1")} == {"b"}
    assert len(table) == 1


def test_the_table_is_bounded_and_known_addresses_may_still_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MOST_PEERS", 2)
    table: PeerTable[str] = PeerTable()
    learn(table, "a", "192.168.0.1", "192.168.0.2", "192.168.0.3")
    assert len(table) == 2
    assert find(table, "192.168.0.3") is None
    assert not learn(table, "b", "192.168.0.3")
    assert learn(table, "b", "192.168.0.1")
    assert find(table, "192.168.0.1") == "b"


def test_what_is_remembered_of_foreign_destinations_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_MOST_CACHED", 10)
    table: PeerTable[str] = PeerTable(WAYS)
    learn(table, "three", "192.168.0.3")
    for number in range(100):
        assert table.find((0xC0000200 + number).to_bytes(4, "big")) == "three"
        assert len(table._cache) <= 10


def test_a_router_knows_the_networks_and_a_change_of_it_holds_at_once() -> None:
    router = StaticRouter(RouteTable([RouteEntry("10.1.0.0/16", "192.168.0.2"), RouteEntry("fd01::/16", "no-address")]))
    table: PeerTable[str] = PeerTable(WAYS, router=router)
    learn(table, "one", "192.168.0.1")
    learn(table, "two", "192.168.0.2")
    assert find(table, "10.1.2.3") == "two"
    assert find(table, "10.2.2.3") is None
    assert find(table, "fd01::1") is None
    router.replace(RouteTable([RouteEntry("10.0.0.0/8", "192.168.0.1")]))
    assert find(table, "10.1.2.3") == "one"
    assert find(table, "10.2.2.3") == "one"
