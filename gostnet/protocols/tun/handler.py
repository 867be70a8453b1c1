"""The handler `tun`: joins a TUN device with peers, as a server for many or as the client of one.

One device is one connection, and it lasts as long as the service. What goes wrong with a carrier is waited out; only
the end of the device ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from ...core.address import Endpoint
from ...core.contracts import Handler
from ...core.datagrams import Datagrams
from ...core.egress import Egress
from ...core.flow import Flow
from ...core.options import Advice, Bytes, Seconds, Secret, opt
from ...core.packets import Packets
from ...core.registry import component
from ...core.udp_socket import UdpSocket
from ...pipeline.devices import as_client, first_ended
from ...pipeline.handler import HandlerContext
from ...pipeline.router import ServiceRouter
from . import codec
from .client import ClientSession, Liveness
from .engine import Choice, start
from .path import Path
from .server import PeerServer

RECONNECT = 1.0
"""Seconds before the server is dialled again, as in GOST."""

DEFAULT_TTL = 10.0


@component("handler", "tun")
class TunHandler:
    """Serves a device: without a target for whoever registers, with one as its client."""

    accepts = (Packets,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `tun` (protocols 7.4)."""

        keepalive: bool = opt(
            False,
            "Client: register again every `ttl`, and dial anew when no answer comes for three of them.",
            aliases=("tun.keepalive",),
        )
        ttl: Seconds = opt(DEFAULT_TTL, "Client: period of the keep-alive.", aliases=("tun.ttl",))
        passphrase: Secret = opt(
            Secret(),
            "At most 16 bytes. Client: sent with registrations. Server without an auther: what they must carry.",
            aliases=("token", "tun.token"),
        )
        p2p: bool = opt(False, "Server: there is one peer, and everything goes to it.", aliases=("tun.p2p",))
        strict_source: bool | None = opt(
            None,
            "Server: take packets only from the peer that has registered their source; by default where registrations"
            " must carry credentials.",
            key="strictSource",
            aliases=("tun.strictSource",),
        )
        engine: str = opt(
            "auto",
            "What moves the packets over plain UDP: the kernel by itself, to peers that have it too, or `pump`, this"
            " process; `kernel` sends this way to every peer that a network card reaches.",
            key="tun.engine",
            choices=("auto", "kernel", "pump"),
        )
        buffer_size: Bytes = opt(
            65535,
            "Accepted for compatibility: packets of every size are passed on whole.",
            aliases=("tun.bufferSize", "readBufferSize"),
        )

        def validate(self) -> Iterator[tuple[str, str]]:
            """Yield a passphrase of which only a part counts: GOST sends and compares no more either."""
            if len(self.passphrase.reveal().encode("utf-8", "surrogateescape")) > codec.PASSPHRASE_SIZE:
                yield "passphrase", Advice(f"only its first {codec.PASSPHRASE_SIZE} bytes count")

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._options = options
        self._context = context
        self._passphrase = options.passphrase.reveal()
        self._ttl = options.ttl if options.ttl > 0 else DEFAULT_TTL
        self._choice = cast(Choice, options.engine)
        self._server: PeerServer | None = None
        self._egress: Egress | None = None

    def hand_over(self, successor: Handler[Any], egress: Egress) -> None:
        """Go on with the users and the way out of the new configuration: the device stays, and so does its handler."""
        heir = cast(TunHandler, successor)
        heir._server, heir._egress = self._server, egress
        self._context, self._egress = heir._context, egress
        if self._server is not None:
            self._server.renew(heir._context, heir._passphrase)

    async def handle(self, flow: Flow, conn: Packets, egress: Egress) -> None:
        """Serve the device until it is closed by us. Raise ConnError when somebody else has deleted it."""
        flow.network = "udp"
        if conn.carrier is None:
            await self._client(flow, conn, egress)
            return
        assert isinstance(conn.carrier, UdpSocket)
        if isinstance(egress, ServiceRouter):
            egress.shape(flow)  # no way out is asked for, so nobody else does
        self._server = server = PeerServer(
            flow,
            conn,
            conn.carrier,
            self._context,
            passphrase=self._passphrase,
            p2p=self._options.p2p,
            strict_source=self._options.strict_source,
            choice=self._choice,
        )
        try:
            await first_ended(server.serve(), server.attend())
        finally:
            server.close()
            self._server = None

    # ---- client --------------------------------------------------------------------------------
    async def _client(self, flow: Flow, device: Packets, egress: Egress) -> None:
        """Keep a session with the server up, as long as there is a device."""
        self._egress = egress
        registration = codec.encode_registration(self._passphrase, [a.ip for a in device.setup.addresses])

        async def dial(flow: Flow, target: Endpoint) -> Datagrams:
            assert self._egress is not None
            return await self._egress.associate(flow, target)

        async def session(upstream: Datagrams) -> None:
            await self._session(flow, device, upstream, registration)

        await as_client(flow, device, self._context, dial, session, (RECONNECT,))

    async def _session(self, flow: Flow, device: Packets, upstream: Datagrams, registration: bytes) -> None:
        liveness = Liveness(self._ttl if self._options.keepalive else 0.0)
        self._context.log.info(f"{device.name} >-< {flow.target}", sid=flow.sid)
        place = self._context.netns
        path = Path(flow, device, upstream, self._context.log, place)
        path.check()
        kernel = start(self._choice, flow, device, upstream, self._context.log, place=place, single=True)
        session = None
        try:
            session = ClientSession(flow, device, upstream, registration, liveness, kernel, path, log=self._context.log)
            await session.register()
            await first_ended(session.serve(), session.attend())
        finally:
            if session is not None:
                session.close()
            if kernel is not None:
                kernel.close(flow)
