"""Egress: the one outbound contract. Direct sockets, every node of a chain and the router implement it."""

from __future__ import annotations

from typing import Protocol

from .address import Endpoint
from .datagrams import Datagrams
from .flow import Flow
from .stream import Stream


class Egress(Protocol):
    """A way out."""

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Open a stream to `target` (a name travels as it is). Raise DialError or PolicyDenied."""

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open a datagram association: to one `target`, or to any peer when it is None.

        With a target, every datagram received carries it as `peer` and `peer` of sent ones is ignored.
        """
