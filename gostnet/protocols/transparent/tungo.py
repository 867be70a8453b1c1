"""The handler `tungo`: what was routed into a device, as streams, associations and echo requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from ...core.address import parse_ip
from ...core.datagrams import Datagrams
from ...core.egress import Egress
from ...core.errors import DialError
from ...core.flow import Flow
from ...core.options import Bytes, CommaList, Seconds, group, opt
from ...core.registry import component
from ...core.sockets import SocketStream
from ...core.stream import Stream
from ...dataplane.echo import EchoSocket
from ...dataplane.pump import pump
from ...pipeline.direct import Direct
from ...pipeline.handler import HandlerContext
from ...pipeline.router import ServiceRouter
from .handler import RedHandler, ReduHandler


class Routed:
    """The shape of what the listener `tungo` yields: a Stream or Datagrams, by `flow.network`.

    Of the network `ip` a datagram is an ICMP echo message, requests from the client and replies back.
    """


@component("handler", "tungo")
class TungoHandler:
    """Relays what was routed into a device to where it was going.

    TCP and UDP go through `red` and `redu`. A TCP connection whose destination cannot be reached is reset.
    """

    accepts = (Routed,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `tungo`."""

        udp_timeout: Seconds = opt(
            30.0, "Seconds without a datagram after which a UDP flow ends.", aliases=("tungo.udpTimeout",)
        )
        ping: str = opt(
            "auto",
            "Echo requests: sent on where the way out is direct and answered for the destination behind a proxy (auto),"
            " always answered (answer), or dropped (drop).",
            key="tungo.ping",
            choices=("auto", "answer", "drop"),
        )
        udp_buffer_size: Bytes = opt(
            4096,
            "Accepted for compatibility; datagrams are never cut.",
            key="udp.bufferSize",
            aliases=("udpBufferSize",),
        )
        multicast_groups: CommaList = opt(
            [],
            "Accepted for compatibility: multicast is never captured.",
            aliases=("tungo.multicastGroups",),
        )
        ipv6: bool = opt(False, "Accepted for compatibility: both IP versions work.")
        tcp_send_buffer_size: Bytes = opt(
            0, "Accepted for compatibility: the kernel tunes it.", aliases=("tungo.tcpSendBufferSize",)
        )
        tcp_receive_buffer_size: Bytes = opt(
            0, "Accepted for compatibility: the kernel tunes it.", aliases=("tungo.tcpReceiveBufferSize",)
        )
        tcp_moderate_receive_buffer: bool = opt(
            False, "Accepted for compatibility: the kernel tunes it.", aliases=("tungo.tcpModerateReceiveBuffer",)
        )
        red: RedHandler.Options = group(RedHandler.Options)

        def validate(self) -> Iterator[tuple[str, str]]:
            """Yield groups that are none."""
            for text in self.multicast_groups:
                ip = parse_ip(text)
                if ip is None or not ip.is_multicast:
                    yield "multicastGroups", f"{text[:64]!r} is not a multicast address such as 224.0.0.251"

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._red = RedHandler(options.red, context)
        datagrams = ReduHandler.Options(sniffing=options.red.sniffing)
        self._redu = ReduHandler(datagrams, context, idle=options.udp_timeout if options.udp_timeout > 0 else 30.0)
        self._ping = options.ping

    @property
    def sniffs(self) -> bool:
        """Whether it looks into connections."""
        return self._red.sniffs

    async def handle(self, flow: Flow, conn: Stream | Datagrams, egress: Egress) -> None:
        """Relay to `flow.target`."""
        if flow.network == "tcp":
            await self._stream(flow, cast(Stream, conn), egress)
        elif flow.network == "udp":
            await self._redu.handle(flow, cast(Datagrams, conn), egress)
        else:
            await self._echo(flow, cast(Datagrams, conn), egress)

    async def _stream(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        try:
            await self._red.handle(flow, conn, egress)
        except DialError:
            # The client took it for connected already: a reset says what an orderly end would hide.
            if not flow.connected and isinstance(conn, SocketStream):
                conn.reset()
            raise

    async def _echo(self, flow: Flow, conn: Datagrams, egress: Egress) -> None:
        assert flow.target is not None
        if self._ping == "drop":
            flow.reason = "echo requests are dropped"
            return
        way: Egress | None = None
        if isinstance(egress, ServiceRouter):
            way = egress.straight(flow, flow.target)
        if self._ping != "auto" or not isinstance(way, Direct) or flow.target.ip is None:
            # GOST: its TCP/IP stack has every address, so it answers for every one.
            flow.reason = "answered for the destination"
            await _answer(flow, conn)
            return
        upstream = EchoSocket(flow.target.ip, way.options)
        try:
            flow.connected = True
            await pump(flow, conn, upstream)
        finally:
            upstream.abort()


async def _answer(flow: Flow, conn: Datagrams) -> None:
    """Give every message back, until the listener ends the session."""
    flow.connected = True
    while batch := await conn.receive():
        size = sum(len(datagram.data) for datagram in batch)
        flow.meter.up += size
        flow.meter.down += size
        flow.packets += 2 * len(batch)
        await conn.send(batch)
