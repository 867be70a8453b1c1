"""Parts that several tests of relay are made of."""

from __future__ import annotations

from typing import Any

from gostnet.core.address import Endpoint
from gostnet.pipeline.chain import Chain
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Node
from gostnet.pipeline.router import ServiceRouter
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.relay.connector import RelayConnector

from ..vectors import Names

TCP = Transport("tcp", StreamDialer())


def connector(**options: Any) -> RelayConnector:
    """Return a connector without credentials."""
    return RelayConnector(RelayConnector.Options(**options), ConnectorContext())


def forwarder(*targets: Endpoint) -> Hop:
    """Return a forwarder to `targets`."""
    return Hop("forward", [Node(str(target), target, TCP, connector()) for target in targets])


def through(*relays: Endpoint, **options: Any) -> ServiceRouter:
    """Return a way out through relays, one behind the other; `options` are those of the connectors."""
    direct = Direct(Names())
    hops = [Hop(f"hop-{index}", [Node("relay", at, TCP, connector(**options))]) for index, at in enumerate(relays)]
    return ServiceRouter(direct, Chain("chain", hops, direct))
