"""Datagrams: the second of the three data shapes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from .address import ANY, Endpoint
from .stream import Buffer, Closable

MAX_UDP_PAYLOAD = 65507
"""Bytes: 65,535 less the IPv4 and UDP headers."""


@dataclass(slots=True)
class Datagram:
    """A payload and whom it comes from (received) or goes to (sent).

    With `stride` > 0, `data` holds several datagrams of `stride` bytes each, the last one possibly shorter (GRO/GSO).
    `local` is the address of this host that it was sent to (received) or shall leave from (sent), where that is told.
    """

    data: Buffer
    peer: Endpoint
    stride: int = 0
    local: Endpoint | None = None


def pieces(datagram: Datagram) -> list[Buffer]:
    """Return the payloads of the single datagrams that `datagram` stands for: itself, or its pieces."""
    data, stride = datagram.data, datagram.stride
    if not stride or stride >= len(data):
        return [data]
    view = memoryview(data)
    return [view[start : start + stride] for start in range(0, len(view), stride)]


class Datagrams(Closable):
    """A datagram socket or anything that behaves like one; read by one task, written by one task."""

    __slots__ = ("local", "max_payload")

    def __init__(self, local: Endpoint = ANY, max_payload: int = MAX_UDP_PAYLOAD) -> None:
        self.local = local
        self.max_payload = max_payload

    @abstractmethod
    async def receive(self) -> Sequence[Datagram]:
        """Return one or more datagrams that have arrived; an empty sequence only at the end (closed by the peer).

        A transient error of one datagram (an ICMP error reported by the kernel) is never raised here.
        """

    @abstractmethod
    async def send(self, batch: Sequence[Datagram]) -> None:
        """Send each datagram to its `peer`. May drop, never blocks for long."""

    def transparent_over(self) -> Datagrams | None:
        """Return the datagrams below if this one adds nothing, else None."""
        return None
