"""The lines that `gostnet plan` prints."""

from __future__ import annotations

import pytest

from gostnet.core.resources import Address, Capture, Link, NftChain, NftTable, Resource, Route, Rule, Sysctl
from gostnet.kernel.plan import Change, Step, fold, inverse

RULE = Rule(6, 18254, 18254, 0x02000000, 0x03000000, "lan0")
ROUTE = Route("10.0.0.0/8", 254, "unicast", "wan0", "192.0.2.1", 50)


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (Step("put", Sysctl("net.ipv4.ip_forward", "1")), "+ sysctl -w net.ipv4.ip_forward=1"),
        (
            Step("change", Sysctl("net.ipv4.ip_forward", "1"), Sysctl("net.ipv4.ip_forward", "0")),
            "~ sysctl -w net.ipv4.ip_forward=1",
        ),
        (Step("change", Link("tun0", 1400), Link("tun0", 1500, False)), "~ ip link set dev tun0 mtu 1400 up"),
        (Step("put", Address("tun0", "10.0.0.1/24")), "+ ip address add 10.0.0.1/24 dev tun0"),
        (Step("drop", Address("tun0", "10.0.0.1/24")), "- ip address del 10.0.0.1/24 dev tun0"),
        (
            Step("put", ROUTE),
            "+ ip route add 10.0.0.0/8 via 192.0.2.1 dev wan0 table 254 proto 250 metric 50",
        ),
        (
            Step("change", ROUTE, ROUTE),
            "~ ip route replace 10.0.0.0/8 via 192.0.2.1 dev wan0 table 254 proto 250 metric 50",
        ),
        (
            Step("drop", Route("::/0", 18254, "local", "lo")),
            "- ip -6 route del local ::/0 dev lo table 18254 proto 250",
        ),
        (
            Step("put", RULE),
            "+ ip -6 rule add pref 18254 fwmark 0x2000000/0x3000000 iif lan0 lookup 18254 protocol 250",
        ),
        (Step("drop", Rule(4, 7, 8)), "- ip rule del pref 7 lookup 8 protocol 250"),
        (Step("drop", NftTable("gostnet-x")), "- nft delete table inet gostnet-x"),
        (
            Step("keep", RULE, note="why"),
            "! ip -6 rule pref 18254 fwmark 0x2000000/0x3000000 iif lan0 lookup 18254 protocol 250: why",
        ),
        (Step("keep", Sysctl("a", "1"), note="why"), "! sysctl a: why"),
        (Step("keep", NftTable("t"), note="why"), "! nft table inet t: why"),
        (Step("keep", Link("e0", 1), note="why"), "! ip link e0: why"),
        (Step("keep", Address("e0", "10.0.0.1/8"), note="why"), "! address e0 10.0.0.1/8: why"),
    ],
)
def test_a_step_is_a_line(step: Step, line: str) -> None:
    assert str(step) == line


def test_a_table_is_a_line_for_each_statement() -> None:
    table = NftTable("t", (NftChain("c"),), owner=False)
    assert str(Step("put", table)).splitlines() == [
        '+ nft add table inet t { comment "gostnet"; }',
        "+ nft add chain inet t c",
        f"+ nft add chain inet t content_{table.digest}",
    ]
    assert str(Step("change", table, NftTable("t"))).splitlines()[0] == "~ nft delete table inet t"


def test_a_step_and_its_inverse() -> None:
    old, new = Sysctl("a", "0"), Sysctl("a", "1")
    assert inverse(Step("put", RULE)) == Step("drop", RULE)
    assert inverse(Step("drop", RULE)) == Step("put", RULE)
    assert inverse(Step("change", new, old)) == Step("change", old, new)
    table = NftTable("t", (NftChain("c"),))
    assert inverse(Step("change", table, NftTable("t"))) == Step("drop", table), "nobody knows what it held"


def test_changes_of_one_key_come_to_what_was_first_and_what_is_last() -> None:
    a, b, c = Sysctl("x", "0"), Sysctl("x", "1"), Sysctl("x", "2")
    held = fold([Change(a, b), Change(None, RULE), Change(b, c)])
    assert list(held) == [a.key, RULE.key]
    assert (held[a.key].original, held[a.key].made, held[a.key].current) == (a, (b, c), c)
    assert (held[RULE.key].original, held[RULE.key].current) == (None, RULE)


def test_order_of_kinds() -> None:
    kinds: list[type[Resource]] = [Sysctl, Link, Address, Route, Rule, NftTable]
    assert [kind.rank for kind in kinds] == sorted({kind.rank for kind in kinds})
    capture = Capture("s", "tcp", "redirect", 1, ("lan0",))
    assert capture.key == ("capture", "s", "tcp")
    with pytest.raises(TypeError):
        _ = Resource().key
