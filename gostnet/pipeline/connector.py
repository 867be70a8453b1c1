"""What connectors are built with."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.contracts import Layer, Resolver
from ..core.egress import Egress
from ..core.log import Logger, quiet
from ..core.options import Secret


@dataclass(slots=True)
class ConnectorContext:
    """What a connector is built with.

    username, password   the node's credentials; `authenticates` tells whether there are any
    tls                  the TLS layer for dialogues that switch to TLS (SOCKS5 methods 0x80 and 0x82)
    name                 the node's host, shown as SNI
    direct               for connectors that dial from here: `direct`, and the UDP socket of a SOCKS5 UDP ASSOCIATE
    resolver             for connectors that look names up here: SOCKS4 without 4a
    """

    username: str = ""
    password: Secret = field(default_factory=Secret)
    tls: Layer | None = None
    name: str = ""
    direct: Egress | None = None
    resolver: Resolver | None = None
    log: Logger = field(default_factory=quiet)

    @property
    def authenticates(self) -> bool:
        """Whether the node has credentials."""
        return bool(self.username or self.password)
