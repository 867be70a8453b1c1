"""The connector `http`: CONNECT, and UDP in GOST's form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...core.address import Endpoint
from ...core.datagrams import Datagrams
from ...core.drive import run_handshake
from ...core.errors import DialTimeout
from ...core.flow import Flow
from ...core.options import Seconds, opt
from ...core.registry import component
from ...core.stream import Stream
from ...core.tasks import deadline
from ...dataplane.framed import TunDatagrams
from ...pipeline.connector import ConnectorContext
from ...wire.http1 import field_problem
from .codec import ConnectRequest, connect


@component("connector", "http")
class HttpConnector:
    """Asks an HTTP proxy. Nothing is said before the target is known, and nothing stays around the stream after it."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `http`."""

        timeout: Seconds = opt(0.0, "Time for the proxy to answer CONNECT; 0 leaves it to the route.")
        header: dict[str, str] = opt({}, "Header fields added to CONNECT.", key="header")

        def validate(self) -> Iterable[tuple[str, str]]:
            """Yield fields that cannot be written into an HTTP head."""
            for name, value in self.header.items():
                if text := field_problem(name, value):
                    yield "header", text

    def __init__(self, options: Options, context: ConnectorContext) -> None:
        self._timeout = options.timeout
        self._request = ConnectRequest(options.header, context.username, context.password.reveal())

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        """Return `below`: the dialogue begins with the target."""
        return below

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        """Return `below` once the proxy has connected it.

        Raise UpstreamRejected with the status as its reply, DialTimeout, ProtocolError, ConnError.
        """
        await self._ask(below, self._request.to(target))
        return below

    async def associate(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams:
        """Open an association that owns `below`. Raise as `connect` does."""
        await self._ask(below, self._request.to(target, udp=True))
        return TunDatagrams(below, target, below.local)

    async def _ask(self, below: Stream, request: bytes) -> None:
        try:
            with deadline(self._timeout):
                await run_handshake(below, connect(request))
        except TimeoutError as exc:
            raise DialTimeout(f"no answer from the HTTP proxy within {self._timeout:g}s") from exc
