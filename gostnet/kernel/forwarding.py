"""Firewalls of this host that are in the way of what it forwards."""

from __future__ import annotations

from gostnet.core.errors import KernelError

from .nft import Nft, ObservedChain

_OURS = "gostnet-"


def closed_chains() -> list[ObservedChain]:
    """Return the chains of others, in the thread's namespace, that let only pass what a rule of theirs accepts.

    Such as those of Docker and firewalld. What their rules accept is not looked into. [] where we may not look. The
    tables of iptables-legacy are not seen.
    """
    try:
        with Nft() as nft:
            chains = nft.forwarding()
    except KernelError:
        return []
    return [chain for chain in chains if chain.drops and not chain.table.startswith(_OURS)]
