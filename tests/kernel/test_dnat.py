"""Port forwards compiled to rules."""

from __future__ import annotations

from gostnet.core.resources import NftChain, NftRule, PortForward, Sysctl
from gostnet.kernel.dnat import statements_of, sysctls_of

WEB = PortForward("web", "tcp", "", 8080, "192.0.2.1", 80)
NAMES = PortForward("names", "udp", "2001:db8::1", 53, "2001:db8:1::1", 5353)


def rules(chain: str, *wanted: PortForward) -> list[str]:
    return [item.text for item in statements_of(wanted) if isinstance(item, NftRule) and item.chain == chain]


def test_nothing_is_made_of_nothing() -> None:
    assert statements_of(()) == ()
    assert sysctls_of(()) == ()


def test_loopback_addresses_are_left_to_the_listener_before_anything_else() -> None:
    for chain in ("forward_in", "forward_out"):
        assert rules(chain, WEB)[:2] == ["ip daddr 127.0.0.0/8 accept", "ip6 daddr ::1/128 accept"]


def test_only_what_begins_a_connection_to_this_host_is_sent_on() -> None:
    expected = (
        "meta nfproto ipv4 tcp flags & (fin | syn | rst | ack) == syn fib daddr type @forward_here tcp dport 8080"
        " ct mark set ct mark | 0x04000000 counter dnat ip to 192.0.2.1:80"
    )
    assert rules("forward_in", WEB)[2:] == rules("forward_out", WEB)[2:] == [expected]
    (text,) = rules("forward_in", NAMES)[2:]
    assert "meta l4proto udp ip6 daddr 2001:db8::1/128 udp dport 53" in text
    assert text.endswith("dnat ip6 to [2001:db8:1::1]:5353")


def test_sources_are_hidden_of_what_was_sent_on_and_of_nothing_else() -> None:
    assert rules("forward_back", WEB) == [
        "ip daddr 192.0.2.1/32 tcp dport 80 ct status dnat ct mark & 0x04000000 == 0x04000000 counter masquerade"
    ]


def test_chains_stand_where_others_look_for_such_changes() -> None:
    chains = {
        item.name: (item.hook, item.type, item.priority) for item in statements_of((WEB,)) if isinstance(item, NftChain)
    }
    assert chains == {
        "forward_in": ("prerouting", "nat", -100),
        "forward_out": ("output", "nat", -100),
        "forward_back": ("postrouting", "nat", 100),
    }


def test_the_host_forwards_the_ip_versions_of_the_targets() -> None:
    assert sysctls_of((WEB,)) == (Sysctl("net.ipv4.ip_forward", "1"),)
    assert sysctls_of((WEB, NAMES)) == (
        Sysctl("net.ipv4.ip_forward", "1"),
        Sysctl("net.ipv6.conf.all.forwarding", "1"),
    )
