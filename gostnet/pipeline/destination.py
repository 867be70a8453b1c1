"""Asking a bypass about a destination of which more is known than what is dialled."""

from __future__ import annotations

from ..core.address import Endpoint
from ..core.contracts import Bypass
from ..core.flow import Flow, Network


def refuses_address(bypass: Bypass, network: Network, where: Endpoint) -> bool:
    """Ask a bypass about an address that stands behind a name which it has let pass, or is to be asked about next.

    A whitelist decides by the name, and knows nothing of the addresses behind it.
    """
    ask = getattr(bypass, "contains_address", bypass.contains)
    return bool(ask(network, where))


def left_out_for(bypass: Bypass, flow: Flow, target: Endpoint) -> Endpoint | None:
    """Return for what a hop or node is left out on the way to `target`, None where it is not.

    Where that is an address and a name was sniffed, the name decides, and the address where it is listed itself.
    """
    sniffed = flow.sniffed
    if sniffed is None or not sniffed.host or target.ip is None:
        return target if bypass.contains(flow.network, target) else None
    named = Endpoint(sniffed.host, target.port)
    if bypass.contains(flow.network, named):
        return named
    return target if refuses_address(bypass, flow.network, target) else None
