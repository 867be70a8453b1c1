"""The handler `tun`: joins a TUN device with peers, as a server for many or as the client of one.

One device is one connection, and it lasts as long as the service. What goes wrong with a carrier is waited out; only
the end of the device ends it.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from ...core.address import Endpoint
from ...core.contracts import Authenticator
from ...core.datagrams import Datagrams
from ...core.egress import Egress
from ...core.errors import GostnetError
from ...core.flow import Flow, Shapers
from ...core.options import Bytes, Seconds, Secret, opt
from ...core.packets import Packets
from ...core.registry import component
from ...core.sockets import UdpSocket
from ...core.stream import Buffer
from ...core.tasks import Scope
from ...pipeline.forwarding import reach_target
from ...pipeline.handler import HandlerContext
from ...pipeline.router import ServiceRouter
from ...wire.ip_header import source
from . import codec
from .client import ClientSession, Liveness
from .limits import within
from .routes import PeerTable

RECONNECT = 1.0
"""Seconds before the server is dialled again, as in GOST."""

DEFAULT_TTL = 10.0

_BATCH = 64
"""Datagrams taken per turn."""


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
        buffer_size: Bytes = opt(
            65535,
            "Accepted for compatibility: packets of every size are passed on whole.",
            aliases=("tun.bufferSize", "readBufferSize"),
        )

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._options = options
        self._context = context
        self._passphrase = options.passphrase.reveal()
        self._ttl = options.ttl if options.ttl > 0 else DEFAULT_TTL

    async def handle(self, flow: Flow, conn: Packets, egress: Egress) -> None:
        """Serve the device until it is closed by us. Raise ConnError when somebody else has deleted it."""
        flow.network = "udp"
        if conn.carrier is None:
            await self._client(flow, conn, egress)
            return
        assert isinstance(conn.carrier, UdpSocket)
        if isinstance(egress, ServiceRouter) and egress.traffic:
            # No way out is asked for, so nobody else puts the limits on the flow.
            flow.shapers = Shapers()
            for limiter in egress.traffic:
                limiter.shape(flow, flow.shapers)
        server = _Server(flow, conn, conn.carrier, self._options, self._context)
        await first_ended(server.from_device(), server.from_peers())

    # ---- client --------------------------------------------------------------------------------
    async def _client(self, flow: Flow, device: Packets, egress: Egress) -> None:
        """Keep a session with the server up, as long as there is a device."""
        log = self._context.log
        registration = codec.encode_registration(self._passphrase, [a.ip for a in device.setup.addresses])
        while not device.closed:
            try:
                upstream = await reach_target(flow, self._context, egress.associate)
                try:
                    flow.connected = True
                    await self._session(flow, device, upstream, registration)
                finally:
                    upstream.abort()
            except GostnetError as exc:
                device.check()
                log.warn(f"{device.name}: {exc}; dialling again in {RECONNECT:g}s", sid=flow.sid)
            else:
                if not device.closed:
                    log.warn(f"{device.name}: the server closed; dialling again in {RECONNECT:g}s", sid=flow.sid)
            if not device.closed:
                await asyncio.sleep(RECONNECT)

    async def _session(self, flow: Flow, device: Packets, upstream: Datagrams, registration: bytes) -> None:
        liveness = Liveness(self._ttl if self._options.keepalive else 0.0)
        session = ClientSession(flow, device, upstream, registration, liveness)
        self._context.log.info(f"{device.name} >-< {flow.target}", sid=flow.sid)
        await session.register()
        await first_ended(session.from_device(), session.from_server(), session.attend())


class _Server:
    """One device, one socket, and the peers that have registered by it."""

    def __init__(
        self, flow: Flow, device: Packets, carrier: UdpSocket, options: TunHandler.Options, context: HandlerContext
    ) -> None:
        self._flow = flow
        self._device = device
        self._carrier = carrier
        self._log = context.log
        self._authenticator: Authenticator | None = context.authenticator
        passphrase = options.passphrase.reveal()
        self._passphrase = codec.pack_passphrase(passphrase).rstrip(b"\0") if passphrase else None
        self._p2p = options.p2p
        guarded = self._authenticator is not None or self._passphrase is not None
        self._strict = guarded if options.strict_source is None else options.strict_source
        self._own = frozenset(address.ip for address in device.setup.addresses)
        self._peers: PeerTable[tuple[Any, ...]] = PeerTable(device.setup.ways, single=options.p2p)

    async def from_device(self) -> None:
        """Send each packet to the peer that has its destination; those that nobody has are dropped."""
        device, carrier, meter = self._device, self._carrier, self._flow.meter
        find, sendto, shapers = self._peers.find, carrier.sock.sendto, self._flow.shapers
        while batch := await device.receive():
            if shapers is not None and shapers.up:
                batch = within(batch, shapers.up)
            size = 0
            for packet in batch:
                version = packet[0] >> 4
                if version == 4:
                    peer = find(bytes(packet[16:20]))
                elif version == 6:
                    peer = find(bytes(packet[24:40]))
                else:
                    continue
                if peer is None:
                    continue
                try:
                    sendto(packet, peer)
                except (BlockingIOError, InterruptedError):
                    await carrier.readiness.writable()
                    self._send(packet, peer)
                except OSError:
                    if carrier.readiness.fd < 0:
                        return
                    continue  # this peer cannot be reached now, or not with a packet of this size
                size += len(packet)
            meter.up += size
            if len(batch) >= _BATCH:
                await asyncio.sleep(0)

    async def from_peers(self) -> None:
        """Take registrations, pass packets on to other peers, and give the rest to the device."""
        device, carrier, meter = self._device, self._carrier, self._flow.meter
        recvfrom, find = carrier.sock.recvfrom, self._peers.find
        strict, p2p, shapers = self._strict, self._p2p, self._flow.shapers
        while True:
            packets: list[Buffer] = []
            count = size = 0
            for count in range(1, _BATCH + 1):
                try:
                    packet, peer = recvfrom(65535)
                except (BlockingIOError, InterruptedError):
                    count -= 1
                    break
                except OSError:
                    if carrier.readiness.fd < 0:
                        return
                    continue
                length = len(packet)
                if length <= codec.HEADER:
                    continue  # GOST: neither a registration nor a packet that carries anything
                version = packet[0] >> 4
                if version == 4:
                    if packet.startswith(codec.MAGIC):
                        self._registered(packet, peer)
                        continue
                    destination = packet[16:20]
                elif version == 6 and length >= 40:
                    destination = packet[24:40]
                else:
                    continue
                if strict and find(source(packet)) != peer:
                    continue
                if shapers is not None and shapers.down and not within((packet,), shapers.down):
                    continue
                size += length
                if not p2p:
                    other = find(destination)
                    if other is not None:
                        self._send(packet, other)
                        continue
                packets.append(packet)
            if packets:
                await device.send(packets)
            meter.down += size
            if count < _BATCH:
                await carrier.readiness.readable()
            else:
                await asyncio.sleep(0)

    def _send(self, packet: Buffer, peer: tuple[Any, ...]) -> None:
        """Send to a peer now or not at all."""
        try:
            self._carrier.sock.sendto(packet, peer)
        except OSError:
            pass  # full, or this peer cannot be reached

    def _registered(self, datagram: bytes, peer: tuple[Any, ...]) -> None:
        """Learn whose addresses these are, and answer; a registration that is refused gets no answer."""
        registration = codec.decode_registration(datagram)
        if registration is None:
            return
        client = Endpoint.from_sockaddr(peer)
        names = ", ".join(map(str, registration.addresses))
        if not self._own.isdisjoint(registration.addresses):
            self._log.debug(f"registration from {client}: {names} is an address of this device", client=str(client))
            return
        if not self._authorised(registration, client):
            self._log.info(f"registration from {client} for {names} is refused", client=str(client))
            return
        self._send(codec.encode_answer(client.host), peer)
        if self._peers.learn(registration.addresses, peer):
            self._log.info(f"{self._device.name}: {names} at {client}", client=str(client))

    def _authorised(self, registration: codec.Registration, client: Endpoint) -> bool:
        """Tell whether the credentials are those of every address; user names are the addresses' texts."""
        if self._authenticator is not None:
            password = registration.passphrase.decode("utf-8", "surrogateescape")
            return all(
                self._authenticator.authenticate(str(address), password, client) is not None
                for address in registration.addresses
            )
        return self._passphrase is None or hmac.compare_digest(self._passphrase, registration.passphrase)


async def first_ended(*works: Coroutine[Any, Any, None]) -> None:
    """Run all as fibers, which the sockets they wait for resume directly; the first to end ends the others.

    Raise the first error.
    """
    scope = Scope("tun")
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    failures: list[Exception] = []

    async def until_end(work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as exc:  # raised below, in the caller
            failures.append(exc)
        finally:
            if not ended.done():
                ended.set_result(None)

    for work in works:
        scope.launch(until_end(work))
    try:
        await ended
    finally:
        await scope.cancel()  # they wait for sockets, so they end at once
    if failures:
        raise failures[0]
