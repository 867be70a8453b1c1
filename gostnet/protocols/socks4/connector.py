"""The connectors `socks4` and `socks4a`."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.address import Endpoint
from ...core.datagrams import Datagrams
from ...core.drive import run_handshake
from ...core.errors import DialError, DialTimeout, ResolveError
from ...core.flow import Flow
from ...core.options import Seconds, opt
from ...core.registry import component
from ...core.stream import Stream
from ...core.tasks import deadline
from ...pipeline.connector import ConnectorContext
from .codec import ask, encode_request


@component("connector", "socks4", "socks4a")
class Socks4Connector:
    """Asks a SOCKS4 proxy. TCP only."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `socks4`."""

        timeout: Seconds = opt(0.0, "Time for the proxy's reply; 0 leaves it to the route.")
        disable_4a: bool = opt(
            False, "Send IPv4 addresses, and look names up here, instead of letting the proxy do it.", key="disable4a"
        )

    def __init__(self, options: Options, context: ConnectorContext) -> None:
        self._timeout = options.timeout
        self._by_address = options.disable_4a
        self._resolver = context.resolver
        self._userid = context.username.encode("utf-8", "replace")

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        """Nothing is said before the target is known."""
        return below

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        """Return `below` once the proxy has connected it. Raise UpstreamRejected or another DialError."""
        if not target.host:
            target = Endpoint("127.0.0.1", target.port)
        if self._by_address:
            target = await self._ipv4(target)
        # GOST: the host goes as text (4a) even if it is an address.
        request = encode_request(target, self._userid, by_address=self._by_address)
        try:
            with deadline(self._timeout):
                await run_handshake(below, ask(request, target))
        except TimeoutError as exc:
            raise DialTimeout(f"no reply from the SOCKS4 proxy within {self._timeout:g}s") from exc
        return below

    async def _ipv4(self, target: Endpoint) -> Endpoint:
        ip = target.ip
        if ip is not None:
            if ip.version != 4:
                raise DialError(f"{target}: SOCKS4 reaches IPv6 only with disable4a off")
            return target
        if self._resolver is None:
            raise ResolveError(f"{target.host}: nothing to look names up with, as disable4a asks")
        addresses = await self._resolver.resolve(target.host, 4)
        if not addresses:
            raise ResolveError(f"{target.host} has no IPv4 address")
        return Endpoint(addresses[0], target.port)

    async def associate(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams:
        """SOCKS4 has no datagrams. Raise DialError."""
        raise DialError("SOCKS4 carries no UDP")
