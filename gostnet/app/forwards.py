"""Port forwards by the kernel: which services ask for one, whether they can have it, and what it is."""

from __future__ import annotations

from typing import Literal

from ..core.errors import ConfigError
from ..core.resources import PortForward
from ..core.sockets import is_own_address
from ..pipeline.hop import Hop
from ..pipeline.router import ServiceRouter
from ..pipeline.service import Service

Network = Literal["tcp", "udp"]


def forward_of(service: Service, obstacle: str) -> PortForward | None:
    """Return the forward that a service asks for, None for none.

    obstacle    why the service has to see its connections, "" if it has not

    Raise ConfigError, with the reason, where the kernel cannot do the same as the service would.
    """
    if getattr(service.handler, "engine", "user") != "kernel":
        return None
    found, reason = _forward_of(service, obstacle)
    if found is None:
        raise ConfigError(
            f"service {service.name}: handler.metadata.engine", f"the kernel cannot forward: {reason}", code="engine"
        )
    return found


def _forward_of(service: Service, obstacle: str) -> tuple[PortForward | None, str]:
    """Return the forward, or None and the reason."""
    if obstacle:
        return None, obstacle
    from ..protocols.forward.handler import ForwardHandler  # whoever has no forward need not load it

    handler, router, listener = service.handler, service.egress, service.listener
    assert isinstance(handler, ForwardHandler)
    assert isinstance(router, ServiceRouter)
    kind = listener.name
    if kind not in ("tcp", "udp"):
        return None, f"a {kind} listener has more to do than to accept"
    if listener.layers:
        return None, "its connections are not plain"
    if router.chains is not None:
        return None, "its connections go through a chain"
    if router.bypass is not None:
        return None, "a bypass decides about the target"
    if handler.demand:
        return None, handler.demand
    hop = handler.targets
    nodes = list(hop.nodes) if hop is not None else []
    if hop is None or len(nodes) != 1:
        return None, f"it takes exactly one target, and there are {len(nodes)}"
    if hop.selective or not isinstance(hop, Hop) or hop.bypass is not None or nodes[0].bypass is not None:
        return None, "its target is not for everybody"
    target, here = nodes[0].address, listener.source.address
    address = target.ip
    if address is None:
        return None, f"the target {target.host} is not an address"
    if address.is_loopback or is_own_address(target.host, listener.netns):
        return None, f"the target {target.host} is this host itself"
    own = here.ip
    if own is not None and not own.is_unspecified and (own.is_loopback or own.version != address.version):
        return None, f"who comes to {here.host} cannot be sent on to {target.host}"
    if not here.port:
        return None, "it takes a port of its own, not 0"
    where = "" if own is None or own.is_unspecified else here.host
    network: Network = "udp" if kind == "udp" else "tcp"
    return PortForward(service.name, network, where, here.port, str(address), target.port), ""
