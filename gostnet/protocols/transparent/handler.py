"""The handlers `red`, `redir`, `redirect` (TCP) and `redu` (UDP): the target is known, nothing is said to clients."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.address import Endpoint
from ...core.datagrams import Datagrams
from ...core.egress import Egress
from ...core.errors import ProtocolError
from ...core.flow import Flow
from ...core.options import Seconds, group, opt
from ...core.registry import component
from ...core.stream import Stream
from ...dataplane.pump import pump
from ...pipeline.handler import HandlerContext
from ...pipeline.sniffing import (
    InterceptionOptions,
    OriginalOptions,
    Sniffer,
    SniffingOptions,
    admit,
    forward_as_sniffed,
)


def _require_target(flow: Flow) -> None:
    if flow.target is None:
        raise ProtocolError(flow.reason or "the original destination is not known")


@component("handler", "red", "redir", "redirect")
class RedHandler:
    """Relays captured TCP connections to their original destination."""

    accepts = (Stream,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `red`."""

        tproxy: bool = opt(False, "Set on the listener; the handler knows the target either way.")
        read_timeout: Seconds = opt(15.0, "Accepted for compatibility: no answer of a server is waited for.")
        sniffing: SniffingOptions = group(SniffingOptions)
        original: OriginalOptions = group(OriginalOptions)
        mitm: InterceptionOptions = group(InterceptionOptions)

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._context = context
        self._sniffer = Sniffer.of(options.sniffing)
        self._original = options.original

    @property
    def sniffs(self) -> bool:
        """Whether it looks into connections."""
        return self._sniffer is not None

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        """Relay to `flow.target`, or to the host that the client asks for."""
        _require_target(flow)
        await forward_as_sniffed(flow, conn, egress, self._sniffer, self._original)


@component("handler", "redu")
class ReduHandler:
    """Relays captured UDP flows to their original destination."""

    accepts = (Datagrams,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `redu`."""

        tproxy: bool = opt(True, "Captured UDP is always taken by TPROXY.")
        sniffing: SniffingOptions = group(SniffingOptions)

    def __init__(self, options: Options, context: HandlerContext, *, idle: float = 0.0) -> None:
        """`idle`: seconds without a datagram after which a flow ends, 0 for as long as the listener lets it."""
        self._context = context
        self._idle = idle
        self._sniffer = Sniffer.of(options.sniffing)

    @property
    def sniffs(self) -> bool:
        """Whether it looks into flows."""
        return self._sniffer is not None

    async def handle(self, flow: Flow, conn: Datagrams, egress: Egress) -> None:
        """Relay to `flow.target` until the flow is idle or the listener ends the session."""
        _require_target(flow)
        assert flow.target is not None
        flow.network = "udp"
        if self._sniffer is not None:
            admit(flow, egress, flow.target)
            conn = await self._sniffer.look_at_datagrams(flow, conn)
            if flow.host:
                admit(flow, egress, Endpoint(flow.host, flow.target.port))
        upstream = await egress.associate(flow, flow.target)
        try:
            flow.connected = True
            await pump(flow, conn, upstream, self._idle)
        finally:
            upstream.abort()
