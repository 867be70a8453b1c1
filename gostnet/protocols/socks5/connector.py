"""The connectors `socks5` and `socks`."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.address import Endpoint
from ...core.datagrams import Datagrams
from ...core.drive import run_handshake
from ...core.errors import DialError, DialTimeout, ProtocolError
from ...core.flow import Flow
from ...core.options import Bytes, Seconds, opt
from ...core.registry import component
from ...core.stream import Stream
from ...core.tasks import deadline
from ...dataplane.framed import TunDatagrams
from ...pipeline.connector import ConnectorContext
from .associate import RelayedDatagrams
from .codec import Command, Method, ask, encode_credentials, log_in, negotiate

_UNSPECIFIED = ("", "::", "0.0.0.0")


@component("connector", "socks5", "socks")
class Socks5Connector:
    """Asks a SOCKS5 proxy: method negotiation when the node is dialled, requests after that."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `socks5`."""

        timeout: Seconds = opt(0.0, "Time for the negotiation, and again for each request; 0 leaves both to the route.")
        no_tls: bool = opt(False, "Do not offer TLS inside the dialogue (methods 0x80 and 0x82).", key="notls")
        relay: str = opt("", "How UDP travels: `udp` by UDP ASSOCIATE, anything else over TCP in GOST's form.")
        udp_buffer_size: Bytes = opt(
            4096,
            "Accepted for compatibility: datagrams of every size are passed on whole.",
            key="udp.bufferSize",
            aliases=("udpBufferSize",),
        )
        udp_timeout: Seconds = opt(
            0.0, "With `relay=udp`: idle time after which an association ends; 0 means never.", key="udp.timeout"
        )

    def __init__(self, options: Options, context: ConnectorContext) -> None:
        self._context = context
        self._timeout = options.timeout
        self._tls = None if options.no_tls else context.tls
        self._by_udp = options.relay == "udp"
        self._udp_timeout = max(0.0, options.udp_timeout)
        methods = [Method.NONE]
        if context.authenticates:
            methods.append(Method.PASSWORD)
        if self._tls is not None:
            methods.append(Method.TLS)
            if context.authenticates:
                methods.append(Method.TLS_PASSWORD)
        self._offered = bytes(methods)
        encode_credentials(context.username, context.password.reveal())  # raise now what could never be sent

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        """Negotiate and log in; return `below`, or the TLS stream on it.

        Raise UpstreamRejected, DialTimeout, ProtocolError. `below` is the caller's to abort then.
        """
        stream = below
        try:
            with deadline(self._timeout):
                method = await run_handshake(below, negotiate(self._offered))
                if method is Method.TLS or method is Method.TLS_PASSWORD:
                    assert self._tls is not None, "offered without a TLS layer"
                    stream = await self._tls.client(flow, below, self._context.name)
                if method is Method.PASSWORD or method is Method.TLS_PASSWORD:
                    context = self._context
                    await run_handshake(stream, log_in(context.username, context.password.reveal()))
        except TimeoutError as exc:
            stream.abort()
            raise DialTimeout(f"no answer from the SOCKS5 proxy within {self._timeout:g}s") from exc
        except BaseException:
            stream.abort()
            raise
        return stream

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        """Return `below` once the proxy has connected it. Raise UpstreamRejected with the reply's code."""
        if not target.host:
            target = Endpoint("127.0.0.1", target.port)
        await self._ask(below, Command.CONNECT, target)
        return below

    async def _ask(self, below: Stream, command: Command, target: Endpoint) -> Endpoint:
        try:
            with deadline(self._timeout):
                return await run_handshake(below, ask(command, target))
        except TimeoutError as exc:
            raise DialTimeout(f"no reply from the SOCKS5 proxy within {self._timeout:g}s") from exc

    async def associate(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams:
        """Open an association that owns `below`: UDP over TCP, or by the proxy's UDP port with `relay=udp`."""
        if not self._by_udp:
            await self._ask(below, Command.UDP_TUN, _ZERO)
            return TunDatagrams(below, target, below.local)
        port = await self._ask(below, Command.ASSOCIATE, _ZERO)
        if port.port == 0:
            raise ProtocolError(f"the SOCKS5 proxy names {port} for UDP")
        if port.host in _UNSPECIFIED:
            # The proxy does not know how we reach it; we do.
            port = Endpoint(below.remote.host or self._context.name, port.port)
        direct = self._context.direct
        if direct is None:
            raise DialError("there is no direct way for UDP to the SOCKS5 proxy")
        return RelayedDatagrams(below, await direct.associate(flow, port), target, self._udp_timeout)


_ZERO = Endpoint("0.0.0.0", 0)
