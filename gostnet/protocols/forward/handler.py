"""The handlers `tcp`, `udp` and `forward`: whatever comes goes to a target of the service's forwarder.

The rows FW01, FW02, ... that comments name are those of docs/protocols/forward.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ...core.address import ANY
from ...core.datagrams import Datagram, Datagrams
from ...core.egress import Egress
from ...core.errors import GostnetError, PolicyDenied
from ...core.flow import Flow, Sniffed
from ...core.options import Bytes, Seconds, group, opt
from ...core.registry import component
from ...core.stream import Stream
from ...dataplane.pump import pump
from ...pipeline.forwarding import Dial, NoTarget, reach_target
from ...pipeline.handler import HandlerContext, relay_with
from ...pipeline.hop import Targets
from ...pipeline.router import ServiceRouter
from ...pipeline.sniffing import (
    InterceptionOptions,
    Sniffer,
    SniffingOptions,
    admit,
    forward_requests,
    named,
    note,
    refuse_http,
    watched,
)
from ...wire.proxy_header import encode_proxy_header

T = TypeVar("T")


@component("handler", "tcp", "udp", "forward")
class ForwardHandler:
    """Forwards connections and datagrams, whichever the listener hands out; one client address is one association."""

    accepts: ClassVar[tuple[type[Any], ...]] = (Stream, Datagrams)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `tcp`, `udp` and `forward`."""

        idle_timeout: Seconds = opt(
            0.0, "Time without a byte or datagram after which a connection ends; 0 leaves it open."
        )
        read_timeout: Seconds = opt(15.0, "With `stateless`: time for the target's answer.")
        stateless: bool = opt(
            False, "UDP: do not keep an association longer than it takes to answer; set it on the listener as well."
        )
        proxy_protocol: int = opt(
            0, "Tell targets the client's address by a PROXY protocol header of this version, 1 or 2; 0 for none."
        )
        buffer_size: Bytes = opt(
            4096,
            "Accepted for compatibility: datagrams of every size are passed on whole.",
            aliases=("readBufferSize", "udp.bufferSize"),
        )
        engine: str = opt(
            "user",
            "Who forwards: this process, or the kernel (DNAT), with one target by address and no policy in between. On"
            " the command line the key is the service's too: its other values are `user` here.",
            choices=("user", "kernel", "auto", "copy", "splice", "native"),
        )
        keepalive: bool = opt(
            False,
            "With sniffing and several targets: requests of one connection for the same host stay with one target.",
            key="http.keepalive",
        )
        sniffing: SniffingOptions = group(SniffingOptions)
        mitm: InterceptionOptions = group(InterceptionOptions)

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._context = context
        self._idle = max(0.0, options.idle_timeout)
        # GOST: a value that makes no sense means the default.
        self._read_timeout = options.read_timeout if options.read_timeout > 0 else 15.0
        self._stateless = options.stateless
        self._proxy_protocol = options.proxy_protocol
        self._keepalive = options.keepalive
        self._sniffer = Sniffer.of(options.sniffing)
        self.engine = "kernel" if options.engine == "kernel" else "user"

    @property
    def sniffs(self) -> bool:
        """Whether it looks into connections."""
        return self._sniffer is not None

    @property
    def targets(self) -> Targets | None:
        """What it chooses its targets from."""
        return self._context.hop

    @property
    def demand(self) -> str:
        """Say what it does to a connection beside passing it on, "" for nothing."""
        if self._proxy_protocol > 0:
            return "proxyProtocol puts a header before the first byte"
        if self._idle > 0:
            return "idleTimeout ends connections"
        return "stateless ends associations" if self._stateless else ""

    async def handle(self, flow: Flow, conn: Stream | Datagrams, egress: Egress) -> None:
        """Reach a target and pass on what comes. Nothing is said to a client whose target cannot be reached."""
        if isinstance(conn, Datagrams):
            await self._datagrams(flow, conn, egress)
            return
        if self._sniffer is None:
            await relay_with(flow, conn, await self._introduced(flow, egress), idle=self._idle)
            return
        found = await self._sniffer.look(flow, conn)
        if found is None:
            client, accepted = watched(self._sniffer, flow, conn, egress, idle=self._idle)
            await relay_with(flow, client, await self._introduced(flow, egress), accepted, idle=self._idle)
            return

        async def reach(found: Sniffed) -> Stream:
            note(flow, found)
            try:
                self._admit(flow, egress)
                return await self._introduced(flow, egress)
            except GostnetError as exc:
                if found.method:
                    denied, nowhere = isinstance(exc, PolicyDenied), isinstance(exc, NoTarget)
                    await refuse_http(conn, 403 if denied else 502 if nowhere else 503)
                raise

        hop = self._context.hop
        nodes = hop.nodes if hop is not None else ()
        unconditional = hop is not None and len(nodes) == 1 and not hop.selective

        def stays(current: Sniffed, following: Sniffed) -> bool:
            if following.host == current.host:
                return self._keepalive or unconditional or not nodes
            if unconditional:
                note(flow, following)
                try:
                    self._admit(flow, egress)
                except PolicyDenied:
                    return False  # which `reach` answers
            return unconditional

        await forward_requests(flow, conn, found, reach, stays, idle=self._idle)

    async def _introduced(self, flow: Flow, egress: Egress) -> Stream:
        """Connect to a target, and tell it who the client is if it wants to know."""
        upstream = await self._reached(flow, egress, egress.connect)
        if self._proxy_protocol > 0:
            await self._introduce(flow, upstream)
        return upstream

    def _admit(self, flow: Flow, egress: Egress) -> None:
        """Let the service decide about the host that the client asks for. Raise BypassDenied."""
        if flow.sniffed is not None and flow.sniffed.host:
            admit(flow, egress, named(flow.sniffed))

    async def _reached(self, flow: Flow, egress: Egress, dial: Dial[T]) -> T:
        if self._context.hop is not None:
            return await reach_target(flow, self._context, dial)
        if flow.sniffed is not None and flow.sniffed.host:
            return await dial(flow, named(flow.sniffed))
        if isinstance(egress, ServiceRouter) and egress.chains is None:
            raise NoTarget(
                f"{self._context.service or 'forward'}: nothing says where to",
                hint="write the target behind the port, as in tcp://:8080/192.0.2.1:80, or add a forwarder",
            )
        # GOST: without a target of its own, the service leaves it to the end of its chain to know one (FW03).
        return await dial(flow, ANY)

    async def _introduce(self, flow: Flow, upstream: Stream) -> None:
        try:
            await upstream.send(encode_proxy_header(self._proxy_protocol, flow.client, flow.ingress))
        except BaseException:
            upstream.abort()
            raise

    async def _datagrams(self, flow: Flow, conn: Datagrams, egress: Egress) -> None:
        """Join one client's datagrams with a target; how long it may be silent the listener says (FW04)."""
        flow.network = "udp"
        if self._sniffer is not None:
            conn = await self._sniffer.look_at_datagrams(flow, conn)
            self._admit(flow, egress)
        upstream = await self._reached(flow, egress, egress.associate)
        try:
            flow.connected = True
            if self._proxy_protocol > 0:
                header = encode_proxy_header(self._proxy_protocol, flow.client, flow.ingress, udp=True)
                if header:
                    await upstream.send([Datagram(header, flow.target or ANY)])
            await pump(flow, conn, upstream, self._read_timeout if self._stateless else self._idle)
        finally:
            upstream.abort()
