"""Forwarding for those behind a device, compiled to kernel resources: rules in the instance's table, and sysctls.

What leaves by another device gets the host's address there; conntrack brings the answers back. A firewall whose own
forward chain drops (as Docker's does) still decides: no table can accept what another one drops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_network

from gostnet.core.errors import ConfigError
from gostnet.core.resources import Masquerade, NftChain, NftRule, NftStatement, Resource, Sysctl

from . import nft_expr as nft
from .nft_expr import Term

SOURCE_NAT = 100
"""Priority at which nftables changes sources."""

MANGLE = -150
"""Priority at which it changes packets, before anything filters them."""

FORWARDING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}
"""The setting by which the host forwards, by IP version."""


def sysctls_of(wanted: Sequence[Masquerade]) -> tuple[Resource, ...]:
    """Return what makes the host forward, for the IP versions that are in use."""
    versions = {ip_network(text).version for item in wanted for text in item.networks}
    return tuple(Sysctl(FORWARDING[version], "1") for version in sorted(versions))


def statements_of(wanted: Sequence[Masquerade]) -> tuple[NftStatement, ...]:
    """Return chains and rules for the instance's table, () for none. Raise ConfigError."""
    for item in wanted:
        for text in item.networks:
            if ip_network(text).prefixlen == 0:
                raise ConfigError(item.service, f"{text} cannot be masqueraded: that would be everybody")
    if not wanted:
        return ()
    chains = (
        NftChain("masquerade", "postrouting", "nat", SOURCE_NAT),
        NftChain("segments", "forward", "filter", MANGLE),
    )
    return (*chains, *_rules(wanted))


def _rules(wanted: Sequence[Masquerade]) -> Iterator[NftRule]:
    for item in wanted:
        for network in item.networks:
            away = nft.leaves_by(item.device, negate=True)
            yield _rule(
                "masquerade",
                item,
                nft.source_within(network),
                away,
                nft.leaves_by("lo", negate=True),
                nft.count(),
                nft.masquerade(),
            )
        for side in (nft.enters_by, nft.leaves_by):
            yield _rule("segments", item, side(item.device), nft.clamp_segments())


def _rule(chain: str, item: Masquerade, *terms: Term) -> NftRule:
    text, code = nft.compose(*terms)
    return NftRule(chain, text, code, item.service)
