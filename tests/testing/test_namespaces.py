"""Topologies as data, and the difference of states: what needs no kernel."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network

import pytest

from gostnet.testing.namespaces import Topology, row
from gostnet.testing.state import State, diff


def reachable(topology: Topology, source: str, target: str) -> list[str]:
    """Follow the routes from host to host and return the way, as the kernel would."""
    (target_address, *_) = topology.addresses(target, version=4)
    way = [source]
    while way[-1] != target:
        host = topology.host(way[-1])
        ends = [(link.left, link.right) for link in topology.links]
        ends += [(right, left) for left, right in ends]
        neighbours = {
            str(ip_interface(address).ip): there.host
            for here, there in ends
            if here.host == host.role
            for address in there.addresses
        }
        if target_address in neighbours:
            way.append(neighbours[target_address])
            continue
        routes = [r for r in host.routes if r.to != "default" and ":" not in r.to]
        via = next((r.via for r in routes if ip_interface(target_address).ip in ip_network(r.to)), None)
        via = via or next(r.via for r in host.routes if r.to == "default" and ":" not in r.via)
        way.append(neighbours[via])
        assert len(way) < 10, f"the packet goes round in circles: {way}"
    return way


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_row_leads_from_everyone_to_everyone(count: int) -> None:
    roles = [f"h{number}" for number in range(count)]
    topology = row(*roles)
    for source in roles:
        for target in roles:
            if source != target:
                way = reachable(topology, source, target)
                first, last = roles.index(source), roles.index(target)
                wanted = roles[first : last + 1] if first < last else roles[last : first + 1][::-1]
                assert way == wanted


def test_row_names_and_numbers_as_it_says() -> None:
    topology = row("a", "b", "c", prefix4="10.5", prefix6="fd05")
    assert topology.addresses("a") == ["10.5.1.1", "fd05:1::1"]
    assert topology.addresses("b", "lan0") == ["10.5.1.2", "fd05:1::2"]
    assert topology.addresses("b", "wan0", 4) == ["10.5.2.1"]
    assert topology.addresses("c", version=6) == ["fd05:2::2"]
    assert [host.forwarding for host in topology.hosts] == [False, True, False]
    with pytest.raises(KeyError):
        topology.addresses("d")


def state(**sections: list[str]) -> State:
    return State({name: tuple(lines) for name, lines in sections.items()})


def test_diff_is_empty_for_the_same_in_another_order() -> None:
    assert diff(state(routes=["a", "b"]), state(routes=["b", "a"])) == []


def test_diff_counts_what_is_there_twice() -> None:
    assert diff(state(rules=["a", "a"]), state(rules=["a"])) == ["- rules: a"]
    assert diff(state(rules=["a"]), state(rules=["a", "b"], nft=["t"])) == ["+ rules: b", "+ nft: t"]


def test_diff_leaves_out_settings_of_a_module_that_came_meanwhile() -> None:
    before = state(sysctls=["net/a = 1", "net/netfilter/kept = 1"])
    after = state(sysctls=["net/a = 1", "net/netfilter/kept = 2", "net/netfilter/new = 1", "net/nf_conntrack_max = 9"])
    assert diff(before, after) == ["- sysctls: net/netfilter/kept = 1", "+ sysctls: net/netfilter/kept = 2"]
    assert diff(before, state(sysctls=["net/netfilter/kept = 1"])) == ["- sysctls: net/a = 1"]


def test_state_reads_as_lines() -> None:
    assert str(state(links=["lo up"], nft=[])) == "links: lo up"
