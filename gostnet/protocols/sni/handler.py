"""The handler `sni`: TLS and HTTP go to the server that they name.

The rows SI01, SI02, ... that comments name are those of docs/protocols/sni.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core.egress import Egress
from ...core.errors import GostnetError, PolicyDenied, ProtocolError
from ...core.flow import Flow, Sniffed
from ...core.options import Seconds, group, opt
from ...core.registry import component
from ...core.stream import Stream
from ...pipeline.handler import HandlerContext
from ...pipeline.sniffing import InterceptionOptions, Sniffer, forward_requests, named, note, refuse_http
from .codec import reveal


@component("handler", "sni")
class SniHandler:
    """Relays, unopened, to the host in the ClientHello at port 443, or in the Host field at its port or 80."""

    accepts = (Stream,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `sni`."""

        read_timeout: Seconds = opt(15.0, "Time for the hello or the head of the request.")
        hash: str = opt("", "What the hash strategy hashes instead of the client: the target.", choices=("", "host"))
        websocket: bool = opt(
            False, "Accepted for compatibility: WebSocket frames are not recorded.", key="sniffing.websocket"
        )
        sample_rate: float = opt(0.0, "Accepted for compatibility.", key="sniffing.websocket.sampleRate")
        mitm: InterceptionOptions = group(InterceptionOptions)

    def __init__(self, options: Options, context: HandlerContext) -> None:
        # GOST: a value that makes no sense means the default.
        self._sniffer = Sniffer(options.read_timeout if options.read_timeout > 0 else 15.0)
        self._hash_target = options.hash == "host"

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        """Find the name, take a disguise off, relay. Who names nobody is closed without an answer (SI03)."""
        found = await self._sniffer.look(flow, conn)
        first = conn.take_unread()
        real = reveal(first)
        conn.unread(real)
        if real != first:
            found = await self._sniffer.look(flow, conn)
        if found is None or not found.host:
            raise ProtocolError("no TLS or HTTP that names a server")

        async def reach(found: Sniffed) -> Stream:
            note(flow, found)
            target = named(found)
            if self._hash_target:
                flow.hash = str(target)
            try:
                return await egress.connect(flow, target)
            except GostnetError as exc:
                if found.method:
                    await refuse_http(conn, 403 if isinstance(exc, PolicyDenied) else 503)
                raise

        await forward_requests(flow, conn, found, reach)
