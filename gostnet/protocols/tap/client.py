"""One session of a client with its server: frames both ways, and whether the server still answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from ...core.address import ANY
from ...core.datagrams import Datagram, Datagrams, pieces
from ...core.errors import ConnError, ProtocolError
from ...core.flow import Flow
from ...core.packets import Packets
from ...core.stream import Buffer
from ...core.udp_socket import UdpSocket
from ...dataplane.udp_trains import Trains, split
from ...pipeline.devices import within
from ...wire.shadowsocks_packet import PacketCipher
from . import codec


class ClientSession:
    """Passes frames between a device and an association with the server, which is the caller's to close.

    period    of the keep-alive in seconds, 0 for none
    address   the hardware address of the keep-alive, which nobody else has
    """

    def __init__(
        self,
        flow: Flow,
        device: Packets,
        upstream: Datagrams,
        cipher: PacketCipher | None,
        period: float,
        address: bytes,
    ) -> None:
        self._flow = flow
        self._device = device
        self._upstream = upstream
        self._trains = Trains(upstream) if isinstance(upstream, UdpSocket) else None
        self._cipher = cipher
        self._period = period
        self._address = address
        self._test = codec.loop_test(address)
        self._target = flow.target or ANY
        self._turn = asyncio.Lock()
        """Held while something is written to an association that is no socket: it takes one writer at a time."""
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()

    async def attend(self) -> None:
        """Send loop tests. Raise ConnError when three periods have passed without a frame from the server."""
        if not self._period:
            await self._loop.create_future()
        while True:
            await self._send([self._test])
            await asyncio.sleep(self._period)
            if self._loop.time() - self._heard > 3 * self._period:
                raise ConnError(f"nothing from the server for {3 * self._period:g}s")

    async def from_device(self) -> None:
        """Send what comes out of the device, until it is closed."""
        device, meter = self._device, self._flow.meter
        shapers = self._flow.shapers.up if self._flow.shapers else ()
        while batch := await device.receive():
            if shapers:
                batch = within(batch, shapers)
            await self._send(batch)
            meter.up += sum(map(len, batch))
            await asyncio.sleep(0)

    async def _send(self, batch: Sequence[Buffer]) -> None:
        cipher, target, trains = self._cipher, self._target, self._trains
        if cipher is not None:
            batch = [cipher.seal(frame, os.urandom(cipher.salt_size)) for frame in batch]
        if trains is not None:
            sent = trains.send_from(batch, 0)
            if sent < len(batch):
                assert isinstance(self._upstream, UdpSocket)
                await self._upstream.readiness.writable()
                trains.send_from(batch, sent)
            return
        async with self._turn:
            await self._upstream.send([Datagram(data, target) for data in batch])

    async def from_server(self) -> None:
        """Give the device what the server sends, until it closes."""
        trains = self._trains
        if trains is None:
            while batch := await self._upstream.receive():
                await self._deliver([part for datagram in batch for part in pieces(datagram)])
            return
        assert isinstance(self._upstream, UdpSocket)
        while True:
            try:
                arrived = trains.receive_now()
            except ConnError:
                return  # this side has closed
            if arrived:
                await self._deliver([part for train, stride, _ in arrived for part in split(train, stride)])
            if trains.drained:
                await self._upstream.readiness.readable()

    async def _deliver(self, datagrams: Sequence[Buffer]) -> None:
        cipher = self._cipher
        shapers = self._flow.shapers.down if self._flow.shapers else ()
        frames: list[Buffer] = []
        for datagram in datagrams:
            try:
                frame = datagram if cipher is None else cipher.open(datagram)
            except ProtocolError:
                continue  # GOST: ends the session; anybody could then
            if len(frame) < codec.HEADER:
                continue
            self._heard = self._loop.time()
            if not (codec.is_loop_test(frame) and frame[:6] == self._address):
                frames.append(frame)
        if shapers:
            frames = within(frames, shapers)
        if frames:
            await self._device.send(frames)
            self._flow.meter.down += sum(map(len, frames))
        await asyncio.sleep(0)
