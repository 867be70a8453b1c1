"""The handler `tap`: joins a TAP device with peers, as a switch for many or as the client of one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...core.address import Endpoint
from ...core.datagrams import Datagrams
from ...core.egress import Egress
from ...core.errors import ConnError, ProtocolError
from ...core.flow import Flow
from ...core.options import Bytes, Seconds, Secret, opt
from ...core.packets import Packets
from ...core.registry import component
from ...core.stream import Buffer
from ...core.udp_socket import UdpSocket
from ...dataplane.udp_trains import Trains, split
from ...pipeline.devices import as_client, first_ended, within
from ...pipeline.handler import HandlerContext
from ...pipeline.router import ServiceRouter
from ...wire.shadowsocks_packet import PacketCipher
from . import codec
from .client import ClientSession
from .switch import Switch

RECONNECT = (1.0, 2.0, 4.0, 6.0)
"""Seconds before the server is dialled again, as in GOST."""

DEFAULT_TTL = 10.0

SWEEP = 600.0
"""Seconds between two looks for peers that are gone."""


@component("handler", "tap")
class TapHandler:
    """Serves a device: without a target as a switch between it and whoever sends frames, with one as its client."""

    accepts = (Packets,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `tap` (protocols 20)."""

        key: Secret = opt(Secret(), "The cipher's key itself, in place of one that is made of the password.")
        keepalive: bool = opt(
            False,
            "Client: send a loop test every `ttl`, and dial anew when nothing comes for three of them.",
            aliases=("tap.keepalive",),
        )
        ttl: Seconds = opt(DEFAULT_TTL, "Client: period of the keep-alive.", aliases=("tap.ttl",))
        buffer_size: Bytes = opt(
            65535,
            "Accepted for compatibility: frames of every size are passed on whole.",
            aliases=("tap.bufferSize", "readBufferSize"),
        )

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._context = context
        key = options.key.reveal()
        self._cipher = codec.cipher_of(context.username, context.password.reveal(), key, context.path)
        ttl = options.ttl if options.ttl > 0 else DEFAULT_TTL
        self._period = ttl if options.keepalive else 0.0

    async def handle(self, flow: Flow, conn: Packets, egress: Egress) -> None:
        """Serve the device until it is closed by us. Raise ConnError when somebody else has deleted it."""
        flow.network = "udp"
        if conn.carrier is None:
            await self._client(flow, conn, egress)
            return
        assert isinstance(conn.carrier, UdpSocket)
        if isinstance(egress, ServiceRouter):
            egress.shape(flow)  # no way out is asked for, so nobody else does
        server = _Server(flow, conn, conn.carrier, self._cipher, self._context)
        await first_ended(server.from_device(), server.from_peers(), server.sweep())

    async def _client(self, flow: Flow, device: Packets, egress: Egress) -> None:
        # Locally administered, and of one service in one life: the server finds a client that has moved by it.
        address = bytes([0x02]) + os.urandom(codec.ADDRESS - 1)

        async def session(upstream: Datagrams) -> None:
            self._context.log.info(f"{device.name} >-< {flow.target}", sid=flow.sid)
            one = ClientSession(flow, device, upstream, self._cipher, self._period, address)
            await first_ended(one.from_device(), one.from_server(), one.attend())

        await as_client(flow, device, self._context, egress.associate, session, RECONNECT)


class _Server:
    """One device, one socket, and the peers whose frames have come by it."""

    def __init__(
        self,
        flow: Flow,
        device: Packets,
        carrier: UdpSocket,
        cipher: PacketCipher | None,
        context: HandlerContext,
    ) -> None:
        self._flow = flow
        self._device = device
        self._carrier = carrier
        self._trains = Trains(carrier)
        self._cipher = cipher
        self._log = context.log
        self._switch: Switch[tuple[Any, ...]] = Switch()
        self._loop = asyncio.get_running_loop()
        self._crowded = False

    async def from_device(self) -> None:
        """Send each frame to the peer that has its destination, and to all if nobody knows where that is.

        GOST drops frames to addresses that are not known, and multicast.
        """
        device, switch, shapers = self._device, self._switch, self._flow.shapers
        while batch := await device.receive():
            if shapers is not None and shapers.up:
                batch = within(batch, shapers.up)
            now = self._loop.time()
            size = 0
            outgoing = _Runs()
            for frame in batch:
                if len(frame) < codec.HEADER:
                    continue
                switch.learn(bytes(frame[6:12]), None, now)
                peers = self._where(bytes(frame[:6]), None, now)
                if peers:
                    size += len(frame)
                    outgoing.add(frame, peers)
            if not self._send(outgoing):
                await self._carrier.readiness.writable()
            self._flow.meter.up += size
            await asyncio.sleep(0)

    def _where(self, destination: bytes, source: tuple[Any, ...] | None, now: float) -> Sequence[tuple[Any, ...]]:
        """Return the peers that a frame goes to."""
        if not codec.is_group(destination):
            try:
                peer = self._switch.find(destination, now)
            except KeyError:
                pass
            else:
                return (peer,) if peer is not None and peer != source else ()
        return self._switch.others(source)

    async def from_peers(self) -> None:
        """Learn who is where, pass frames on to other peers, and give the device those that may be behind it."""
        device, carrier, meter, shapers = self._device, self._carrier, self._flow.meter, self._flow.shapers
        while True:
            try:
                trains = self._trains.receive_now()
            except ConnError:
                return  # the socket has been closed
            frames: list[Buffer] = []
            outgoing = _Runs()
            size = 0
            now = self._loop.time()
            for train, stride, peer in trains:
                for datagram in split(train, stride):
                    frame = self._taken(datagram, peer, now)
                    if frame is None or (shapers is not None and shapers.down and not within((frame,), shapers.down)):
                        continue
                    size += len(frame)
                    destination = bytes(frame[:6])
                    peers = self._where(destination, peer, now)
                    if peers:
                        outgoing.add(frame, peers)
                    if codec.is_group(destination) or self._may_be_here(destination, now):
                        frames.append(frame)
            self._send(outgoing)
            if frames:
                await device.send(frames)
            meter.down += size
            if self._trains.drained:
                await carrier.readiness.readable()
            else:
                await asyncio.sleep(0)

    async def sweep(self) -> None:
        """Forget silent peers from time to time."""
        while True:
            await asyncio.sleep(SWEEP)
            self._switch.sweep(self._loop.time())

    def _may_be_here(self, destination: bytes, now: float) -> bool:
        try:
            return self._switch.find(destination, now) is None
        except KeyError:
            return True

    def _taken(self, datagram: memoryview, peer: tuple[Any, ...], now: float) -> Buffer | None:
        """Return the frame in a datagram once its source is known to be at `peer`; None if it goes no further."""
        frame: Buffer = datagram
        if self._cipher is not None:
            try:
                frame = self._cipher.open(datagram)
            except ProtocolError:
                return None
        if len(frame) < codec.HEADER or codec.is_group(frame[6:12]):
            return None  # nobody has the address of a group
        new = self._switch.heard(peer, now)
        if new is None:
            if not self._crowded:
                self._log.warn(f"{self._device.name}: {Endpoint.from_sockaddr(peer)} is one peer too many")
            self._crowded = True
            return None
        if new:
            self._crowded = False
            self._log.info(f"{self._device.name}: a peer at {Endpoint.from_sockaddr(peer)}")
        self._switch.learn(bytes(frame[6:12]), peer, now)
        if codec.is_loop_test(frame):
            back = _Runs()
            back.add(frame, (peer,))
            self._send(back)
            return None
        return frame

    def _send(self, outgoing: _Runs) -> bool:
        """Send frames to their peers, now or not at all; False if the socket is full."""
        cipher, send = self._cipher, self._trains.send_from
        for frames, peers in outgoing.runs:
            # The same datagram for all: who has the key reads the frame anyway.
            data = frames if cipher is None else [cipher.seal(f, os.urandom(cipher.salt_size)) for f in frames]
            for peer in peers:
                if send(data, 0, peer) < len(data):
                    return False
        return True


class _Runs:
    """Frames on their way out, those next to each other with the same peers together."""

    __slots__ = ("runs",)

    def __init__(self) -> None:
        self.runs: list[tuple[list[Buffer], Sequence[tuple[Any, ...]]]] = []

    def add(self, frame: Buffer, peers: Sequence[tuple[Any, ...]]) -> None:
        if self.runs and self.runs[-1][1] == peers:
            self.runs[-1][0].append(frame)
        else:
            self.runs.append(([frame], peers))
