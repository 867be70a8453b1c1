"""The handler `http`: CONNECT, forwarded requests, UDP over HTTP.

The rows HT01, HT02, ... that comments name are those of docs/protocols/http.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ...core.address import Endpoint
from ...core.egress import Egress
from ...core.errors import AuthDenied, BypassDenied, EndOfStream, GostnetError, PolicyDenied, ProtocolError
from ...core.flow import Flow
from ...core.options import Bytes, Seconds, group, opt
from ...core.registry import component
from ...core.stream import Stream
from ...core.tasks import deadline
from ...dataplane.framed import TunDatagrams
from ...dataplane.pump import pump
from ...pipeline.handler import HandlerContext, forward
from ...pipeline.router import ServiceRouter
from ...pipeline.sniffing import InterceptionOptions, Sniffer, SniffingOptions, watched
from ...wire.http1 import HeadReader, HeadTooLarge, Request, field_problem, parse_request
from .answer import part, status_of
from .codec import AGENT, Replies, connect_target, credentials, wants_udp
from .forward import ForwardProxy, Session
from .probe import Decoy
from .probe import problem as decoy_problem
from .record import http_fields

READ: Final = 16384
"""Bytes of a read that waits for a head: most heads and their early data fit, and little is allocated."""


@component("handler", "http")
class HttpHandler:
    """An HTTP proxy: CONNECT, absolute-form requests over persistent connections, and UDP in GOST's form."""

    accepts = (Stream,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `http`."""

        read_timeout: Seconds = opt(
            15.0,
            "Time for the head of a request, and for an origin to begin its answer; negative sets no limit.",
        )
        idle_timeout: Seconds = opt(
            0.0, "Idle time after which tunnels, associations and waiting clients are closed; 0 means never."
        )
        header: dict[str, str] = opt(
            {}, "Header fields added to refusals and to the answers for UDP.", key="header", aliases=("http.header",)
        )
        keepalive: bool = opt(
            False,
            "Keep connections to origins for further requests of any client, 30 s at most.",
            key="keepalive",
            aliases=("http.keepalive",),
        )
        compression: bool = opt(
            False,
            "Ask origins for gzip where the client does not, and decode it.",
            key="compression",
            aliases=("http.compression",),
        )
        probe_resist: str = opt(
            "",
            "What clients without credentials see: code:STATUS, web:URL, host:ADDRESS or file:PATH.",
            aliases=("probe_resist",),
        )
        knock: str = opt("", "Hosts, comma-separated; who asks for one is told that this is a proxy.")
        udp: bool = opt(False, "Allow UDP over HTTP.")
        udp_buffer_size: Bytes = opt(
            4096,
            "Accepted for compatibility: datagrams of every size are passed on whole.",
            key="udp.bufferSize",
            aliases=("udpBufferSize",),
        )
        hash: str = opt("", "What the hash strategy hashes instead of the client: the target.", choices=("", "host"))
        auth_basic_realm: str = opt("gost", "Realm of the challenge.")
        proxy_agent: str = opt(AGENT, "Value of Proxy-Agent.", key="proxyAgent", aliases=("http.proxyAgent",))
        sniffing: SniffingOptions = group(SniffingOptions)
        mitm: InterceptionOptions = group(InterceptionOptions)

        def validate(self) -> Iterable[tuple[str, str]]:
            """Yield what cannot be written into an HTTP head, and decoys that make no sense."""
            for name, value in self.header.items():
                if text := field_problem(name, value):
                    yield "header", text
            for key, value in (("authBasicRealm", self.auth_basic_realm), ("proxyAgent", self.proxy_agent)):
                if text := field_problem("X", value):
                    yield key, text.replace("the value of 'X'", "it")
            if self.probe_resist and (text := decoy_problem(self.probe_resist)):
                yield "probeResist", text

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._context = context
        # GOST: 0 means the default.
        self._read_timeout = options.read_timeout or 15.0
        self._idle_timeout = max(0.0, options.idle_timeout)
        self._hash_target = options.hash == "host"
        self._sniffer = Sniffer.of(options.sniffing)
        self._udp = options.udp
        self._replies = Replies(options.proxy_agent or AGENT, options.auth_basic_realm or "gost", options.header)
        self._decoy: Decoy | None = None
        if options.probe_resist and context.authenticator is not None:
            self._decoy = Decoy(options.probe_resist, options.knock, self._idle_timeout, context.log)
        self._proxy = ForwardProxy(
            read_timeout=self._read_timeout,
            idle_timeout=self._idle_timeout,
            keepalive=options.keepalive,
            compression=options.compression,
            hash_target=self._hash_target,
            replies=self._replies,
            log=context.log,
        )

    def close(self) -> None:
        """Close the kept connections to origins; what runs goes on. They would also end by themselves, in 30 s."""
        if self._proxy.pool is not None:
            self._proxy.pool.close()

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        """Serve requests until one takes the connection over or ends it. Refusals are answered, then raised."""
        request = await self._read(conn, first=True)
        if request is None:
            return
        if self._context.authenticator is not None and not self._context.authenticate(flow, *credentials(request)):
            await self._refuse_stranger(flow, conn, egress, request)
        session: Session | None = None
        try:
            while request is not None:
                if wants_udp(request):
                    await self._associate(flow, conn, egress, request)
                    return
                if request.method == b"CONNECT":
                    await self._connect(flow, conn, egress, request)
                    return
                if session is None:
                    session = Session(self._proxy, flow, conn, egress)
                if not await session.exchange(request):
                    await part(conn)
                    return
                request = await self._read(conn, first=False)
        finally:
            if session is not None:
                session.close()

    # ---- requests ------------------------------------------------------------------------------
    async def _read(self, conn: Stream, *, first: bool) -> Request | None:
        """Return the next request, None when the client ends instead of beginning one.

        The first one has `readTimeout` from the start, a later one from its first byte (HT02). What is malformed is
        answered, unless a decoy is to hide what this is.
        """
        reader = HeadReader()
        try:
            if first:
                with deadline(self._read_timeout):
                    head = await self._head(conn, reader, b"")
            else:
                data = await self._next(conn)
                if not data:
                    return None
                with deadline(self._read_timeout):
                    head = await self._head(conn, reader, data)
            return parse_request(head) if head is not None else None
        except TimeoutError as exc:
            raise ProtocolError(f"no request within {self._read_timeout:g}s") from exc
        except EndOfStream:
            raise
        except ProtocolError as exc:
            if self._decoy is None:
                reply = self._replies.too_large if isinstance(exc, HeadTooLarge) else self._replies.bad_request
                await part(conn, reply)
            raise

    async def _next(self, conn: Stream) -> bytes:
        """Wait for more of a client whose last request has been served, b"" when it is gone."""
        try:
            with deadline(self._idle_timeout):
                return await conn.receive(READ)
        except TimeoutError:
            return b""

    async def _head(self, conn: Stream, reader: HeadReader, data: bytes) -> bytes | None:
        """Read one head, of which `data` has come; what comes after it goes back."""
        while not data or (head := reader.feed(data)) is None:
            data = await conn.receive(READ)
            if not data:
                if reader.started:
                    raise EndOfStream("the client closed inside a request")
                return None
        if reader.rest:
            conn.unread(reader.rest)
        return head

    # ---- answers -------------------------------------------------------------------------------
    async def _refuse_stranger(self, flow: Flow, conn: Stream, egress: Egress, request: Request) -> None:
        """Challenge a client without credentials, or show it the decoy. Raise AuthDenied."""
        decoy = self._decoy
        if decoy is not None and decoy.hides_from(request):
            flow.reason = f"no credentials; decoy {decoy.kind}"
            await decoy.answer(flow, conn, egress, request)
        else:
            await part(conn, self._replies.challenge(request))
        raise AuthDenied("credentials are missing or wrong")

    async def _target(self, flow: Flow, conn: Stream, request: Request) -> Endpoint:
        try:
            target = connect_target(request)
        except ProtocolError:
            await part(conn, self._replies.bad_request)
            raise
        flow.connected = False
        flow.tried = ()
        if self._hash_target:
            flow.hash = str(target)
        return target

    async def _connect(self, flow: Flow, conn: Stream, egress: Egress, request: Request) -> None:
        target = await self._target(flow, conn, request)
        if not target.host:
            await part(conn, self._replies.bad_request)
            raise ProtocolError("a CONNECT without a target")
        flow.target = target
        flow.network = "tcp"
        if flow.details is not None:
            flow.details.fields |= {"proto": "http", "http": http_fields(request, str(target))}
        established = self._replies.established
        try:
            idle = self._idle_timeout
            client, accepted = watched(self._sniffer, flow, conn, egress, lambda _: conn.send(established), idle=idle)
            await forward(flow, client, egress, accepted, idle=idle)
        except GostnetError as exc:
            if not flow.connected:
                await part(conn, self._replies.refusal(status_of(exc)))
            raise

    async def _associate(self, flow: Flow, conn: Stream, egress: Egress, request: Request) -> None:
        """Carry datagrams over the connection (HT20); the target of the request only matters to the bypass."""
        target = await self._target(flow, conn, request)
        flow.network = "udp"
        permits = egress.permits if isinstance(egress, ServiceRouter) and egress.bypass is not None else None
        if permits is not None and target.host and not permits(target):
            await part(conn, self._replies.refusal(403))
            raise BypassDenied(f"{target} is bypassed by the service")
        if not self._udp:
            await part(conn, self._replies.udp_disabled)
            raise PolicyDenied("UDP is off: udp=true allows it")
        try:
            upstream = await egress.associate(flow, None)
        except GostnetError as exc:
            await part(conn, self._replies.refusal(status_of(exc)))
            raise
        try:
            await conn.send(self._replies.udp)
            flow.connected = True
            await pump(flow, TunDatagrams(conn), upstream, self._idle_timeout, allowed=permits)
        finally:
            upstream.abort()
