"""The handler `relay`.

The rows RL01, RL02, ... that comments name are those of docs/protocols/relay.md.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

from ...core.address import Endpoint
from ...core.datagrams import Datagrams
from ...core.drive import run_handshake
from ...core.egress import Egress
from ...core.errors import AuthDenied, ConnError, GostnetError, PolicyDenied, ProtocolError
from ...core.flow import Flow
from ...core.options import Bytes, Seconds, group, opt
from ...core.registry import component
from ...core.sockets import SocketStream
from ...core.stream import Stream
from ...dataplane.framed import LengthDatagrams, TunDatagrams
from ...dataplane.opening import Opening
from ...dataplane.pump import Filter, pump
from ...pipeline.forwarding import NoTarget, reach_target
from ...pipeline.handler import Accepted, HandlerContext, relay_with, request_deadline
from ...pipeline.router import ServiceRouter
from ...pipeline.sniffing import InterceptionOptions, Sniffer, SniffingOptions, watched
from .codec import Command, Network, Request, Status, encode_response, read_request

T = TypeVar("T")

OK: Final = encode_response(Status.OK)

_UNSPECIFIED = ("", "::", "0.0.0.0")

_DRAIN = 16
"""Reads of what a refused client has sent already: a payload that came with its request, not an upload."""


@component("handler", "relay")
class RelayHandler:
    """Takes CONNECT for TCP and UDP, and UDP associations; with a forwarder, whatever is asked goes to its targets."""

    accepts: ClassVar[tuple[type[Any], ...]] = (Stream,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `relay`."""

        read_timeout: Seconds = opt(15.0, "Time for the client's request.")
        nodelay: bool = opt(
            False,
            "Answer a request at once; otherwise the answer travels with the first bytes that come back."
            " Needed by clients that wait for it, such as connectors with nodelay=true.",
        )
        bind: bool = opt(
            False,
            "Allow UDP associations with any number of peers. Listening for the client (BIND) is not available in this"
            " version and is refused.",
        )
        hash: str = opt("", "What the hash strategy hashes instead of the client: the target.", choices=("", "host"))
        udp_buffer_size: Bytes = opt(
            4096,
            "Accepted for compatibility: datagrams of every size are passed on whole.",
            key="udp.bufferSize",
            aliases=("udpBufferSize",),
        )
        sniffing: SniffingOptions = group(SniffingOptions)
        mitm: InterceptionOptions = group(InterceptionOptions)

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._context = context
        # GOST: a value that makes no sense means the default.
        self._read_timeout = options.read_timeout if options.read_timeout > 0 else 15.0
        self._nodelay = options.nodelay
        self._bind = options.bind
        self._hash_target = options.hash == "host"
        self._sniffer = Sniffer.of(options.sniffing)

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        """Read the request and do what it asks. Every refusal is answered, then raised for the record."""
        with request_deadline(self._read_timeout):
            request = await run_handshake(conn, read_request())
        context = self._context
        if context.authenticator is not None:
            user, password = request.credentials or ("", "")
            if not context.authenticate(flow, user, password):
                await _refuse(conn, Status.UNAUTHORIZED)
                raise AuthDenied(f"user {user[:64]!r} is not accepted")
        udp = request.network == Network.UDP
        if context.hop is not None:
            await self._forward(flow, conn, udp, egress)
        elif request.command == Command.CONNECT or request.command == 0:
            await self._connect(flow, conn, request, egress)
        elif request.command == Command.BIND:
            await self._listen(flow, conn, request, egress)
        else:
            await _refuse(conn, Status.BAD_REQUEST)
            raise ProtocolError(f"command {request.command} is not supported")

    async def _connect(self, flow: Flow, conn: Stream, request: Request, egress: Egress) -> None:
        target = request.target
        if target is None:
            await _refuse(conn, Status.BAD_REQUEST)
            raise ProtocolError("a request without a target")
        if request.network not in (Network.TCP, Network.UDP):
            await _refuse(conn, Status.BAD_REQUEST)
            raise ProtocolError(f"network {request.network.name.lower()} is not available in this version")
        flow.target = target
        if self._hash_target:
            flow.hash = str(target)
        if request.network == Network.UDP:
            flow.network = "udp"
            association = await _answered(conn, egress.associate(flow, target), Status.NETWORK_UNREACHABLE)
            await self._exchange(flow, conn, association, target)
        else:
            upstream = await _answered(conn, egress.connect(flow, target), Status.NETWORK_UNREACHABLE)
            await self._join(flow, conn, upstream, egress)

    async def _forward(self, flow: Flow, conn: Stream, udp: bool, egress: Egress) -> None:
        """Go to a target of the forwarder; command and address of the request do not count (RL07)."""
        context = self._context
        if udp:
            flow.network = "udp"
            association = await _answered(conn, reach_target(flow, context, egress.associate), Status.HOST_UNREACHABLE)
            await self._exchange(flow, conn, association, flow.target or Endpoint("", 0))
        else:
            upstream = await _answered(conn, reach_target(flow, context, egress.connect), Status.HOST_UNREACHABLE)
            await self._join(flow, conn, upstream, None)

    async def _join(self, flow: Flow, conn: Stream, upstream: Stream, egress: Egress | None) -> None:
        """Join the two; what a client asks for of its own choice is looked at, a target of the forwarder is not."""

        async def accept(upstream: Stream) -> None:
            await conn.send(OK)

        accepted: Accepted | None = accept if self._nodelay else None
        client = conn if self._nodelay else Opening(conn, prefix=OK)
        if egress is not None:
            client, accepted = watched(self._sniffer, flow, client, egress, accepted)
        await relay_with(flow, client, upstream, accepted)

    async def _exchange(self, flow: Flow, conn: Stream, upstream: Datagrams, target: Endpoint) -> None:
        """Pass datagrams of one target, in length frames. It lives as long as the connection, however idle."""
        try:
            if self._nodelay:
                await conn.send(OK)
            else:
                conn = Opening(conn, prefix=OK)
            flow.connected = True
            await pump(flow, LengthDatagrams(conn, target), upstream)
        finally:
            upstream.abort()

    async def _listen(self, flow: Flow, conn: Stream, request: Request, egress: Egress) -> None:
        """BIND: of all kinds only the one that is a UDP association, with port 0 of any address (RL05, RL06)."""
        target = request.target
        anywhere = target is None or (target.port == 0 and target.host in _UNSPECIFIED)
        if not self._bind or request.network != Network.UDP or not anywhere:
            await _refuse(conn, Status.FORBIDDEN)
            if self._bind:
                raise PolicyDenied("listening for clients is not available in this version")
            raise PolicyDenied("associations are off: bind=true allows them")
        flow.network = "udp"
        upstream = await _answered(conn, egress.associate(flow, None), Status.UNAVAILABLE)
        try:
            local = upstream.local
            if local.host in _UNSPECIFIED:
                local = Endpoint("::", local.port)
            await conn.send(encode_response(Status.OK, local))
            flow.connected = True
            await pump(flow, TunDatagrams(conn, local=local), upstream, allowed=_filter(egress))
        finally:
            upstream.abort()


async def _answered(conn: Stream, reached: Awaitable[T], failure: Status) -> T:
    """Return what is reached, or tell the client why not: the one place where errors become statuses (RL03).

    What a policy refuses is forbidden, a forwarder without a live target is unavailable, all else is `failure`.
    """
    try:
        return await reached
    except GostnetError as exc:
        if isinstance(exc, PolicyDenied):
            failure = Status.FORBIDDEN
        elif isinstance(exc, NoTarget):
            failure = Status.UNAVAILABLE
        await _refuse(conn, failure)
        raise


async def _refuse(conn: Stream, status: Status) -> None:
    """Send a refusal; that the client may be gone does not matter any more."""
    try:
        await conn.send(encode_response(status))
        if isinstance(conn, SocketStream):
            # Closing with unread bytes would send a reset, which may overtake the answer.
            for _ in range(_DRAIN):
                if not conn.receive_now():
                    break
    except ConnError:
        pass


def _filter(egress: Egress) -> Filter | None:
    """Return the service's word on single datagrams, None where it has no bypass."""
    return egress.permits if isinstance(egress, ServiceRouter) and egress.bypass is not None else None
