"""Port forwards by the kernel, compiled to rules in the instance's table, and sysctls.

Destinations are changed where connections begin, those of others in prerouting, the host's own in output; sources are
hidden behind the host's own address, so that answers come back through it. What the host sends to a loopback address
is left to the listener, which stays where it is: the kernel would not let answers from outside back to such an address.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from gostnet.core.resources import (
    CONNECTION_DIRECT,
    NftChain,
    NftRule,
    NftSet,
    NftStatement,
    PortForward,
    Resource,
    Sysctl,
)

from . import nft_expr as nft
from .masquerade import FORWARDING, SOURCE_NAT
from .nft_expr import Term

DESTINATION_NAT = -100
"""Priority at which nftables changes destinations."""

_HERE = "forward_here"
_IN, _OUT, _BACK = "forward_in", "forward_out", "forward_back"
_NUMBERS = {"tcp": nft.TCP, "udp": nft.UDP}


def sysctls_of(wanted: Sequence[PortForward]) -> tuple[Resource, ...]:
    """Return what makes the host forward, for the IP versions of the targets."""
    versions = {ip_address(item.target).version for item in wanted}
    return tuple(Sysctl(FORWARDING[version], "1") for version in sorted(versions))


def statements_of(wanted: Sequence[PortForward]) -> tuple[NftStatement, ...]:
    """Return a set, chains and rules for the instance's table, () for none."""
    if not wanted:
        return ()
    return (
        NftSet(_HERE, "fib_addrtype", ("local",)),
        NftChain(_IN, "prerouting", "nat", DESTINATION_NAT),
        NftChain(_OUT, "output", "nat", DESTINATION_NAT),
        NftChain(_BACK, "postrouting", "nat", SOURCE_NAT),
        *_rules(wanted),
    )


def _rules(wanted: Sequence[PortForward]) -> Iterator[NftRule]:
    for chain in (_IN, _OUT):
        for loopback in ("127.0.0.0/8", "::1/128"):
            yield _rule(chain, nft.destination_within(loopback), nft.accept())
        for item in wanted:
            version = ip_address(item.target).version
            # A connection that is older than the rule, and is not known to conntrack, stays with the listener.
            begins = nft.first_segment() if item.protocol == "tcp" else nft.protocol(nft.UDP)
            here = nft.destination_within(item.address) if item.address else nft.address_type_in(_HERE)
            port = nft.port_is(_NUMBERS[item.protocol], item.port)
            change = nft.set_connection_mark(CONNECTION_DIRECT), nft.count(), nft.redirect(item.to, item.target)
            yield _rule(chain, nft.ip_version(version), begins, here, port, *change, comment=item.service)
    for item in wanted:
        there = nft.destination_within(item.target), nft.port_is(_NUMBERS[item.protocol], item.to)
        ours = nft.translated(), nft.connection_mark(CONNECTION_DIRECT)
        yield _rule(_BACK, *there, *ours, nft.count(), nft.masquerade(), comment=f"{item.service}: answers")


def _rule(chain: str, *terms: Term, comment: str = "") -> NftRule:
    text, code = nft.compose(*terms)
    return NftRule(chain, text, code, comment)
