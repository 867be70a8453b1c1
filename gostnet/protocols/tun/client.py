"""One session of a client with its server: packets both ways, registrations, and whether the server still answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ...core.address import ANY, Endpoint
from ...core.datagrams import Datagram, Datagrams, pieces
from ...core.errors import ConnError
from ...core.flow import Flow
from ...core.log import Logger
from ...core.packets import Packets
from ...core.stream import Buffer
from ...core.udp_socket import UdpSocket
from ...dataplane.udp_trains import Trains, split
from ...pipeline.devices import first_ended, within
from . import codec, native
from .delivery import Delivery
from .engine import KernelPath
from .path import Path

SILENCE = 10.0
"""Without keep-alive: seconds of packets that are sent and not answered, after which the client registers again."""

TICK = 1.0
"""Seconds between two looks at the clock."""

_BATCH = 64


class Liveness:
    """Decides when to register, from what has been seen. Pure: the time is an argument.

    period   of the keep-alive in seconds, 0 for none
    """

    __slots__ = ("_answered", "_due", "_quiet_since", "period", "refused", "unanswered")

    def __init__(self, period: float) -> None:
        self.period = period
        self.refused = False
        """The server's host has said that nobody listens there."""
        self.unanswered = False
        """Something has been sent since anything came."""
        self._due = self._answered = 0.0
        self._quiet_since: float | None = None

    def begin(self, now: float) -> None:
        """The session begins, and has just registered."""
        self._answered = now
        self._due = now + self.period

    def answered(self, now: float) -> None:
        """An answer to a registration has come."""
        self._answered = now

    def wait(self, now: float) -> float:
        """Return the seconds until the next look."""
        return max(0.0, min(TICK, self._due - now)) if self.period else TICK

    def look(self, now: float) -> bool:
        """Return whether to register now. Raise ConnError when three periods have passed without an answer.

        # GOST: only answers count there, packets do not.
        """
        if self.period and now - self._answered > 3 * self.period:
            raise ConnError(f"no answer to a registration for {3 * self.period:g}s")
        register = self.refused
        self.refused = False
        if self.period:
            if now >= self._due:
                self._due = max(now, self._due + self.period)
                register = True
            return register
        if not self.unanswered:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        elif now - self._quiet_since >= SILENCE:
            self._quiet_since = None
            self.unanswered = False
            register = True
        return register


class ClientSession:
    """Passes packets between a device and an association with the server, which is the caller's to close."""

    def __init__(
        self,
        flow: Flow,
        device: Packets,
        upstream: Datagrams,
        registration: bytes,
        liveness: Liveness,
        kernel: KernelPath | None = None,
        path: Path | None = None,
        *,
        log: Logger,
    ) -> None:
        self._flow = flow
        self._device = device
        self._delivery = Delivery(device)
        self._upstream = upstream
        self._socket = upstream if isinstance(upstream, UdpSocket) else None
        self._trains = Trains(upstream) if isinstance(upstream, UdpSocket) else None
        self._registration = registration
        self._kernel = kernel
        self._path = path
        self._liveness = liveness
        self._target = flow.target or ANY
        self._turn = asyncio.Lock()
        """Held while something is written to an association that is not a socket: it takes one writer at a time."""
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._native = native.start(flow, device, upstream, log)
        liveness.begin(self._loop.time())

    def close(self) -> None:
        """Stop what moves the packets; the association is the caller's."""
        if self._native is not None:
            self._native.close()
            self._native = None

    async def serve(self) -> None:
        """Pass packets until the device is closed, or the association. Raise ConnError when the device is gone."""
        if self._native is not None:
            go_on = await self._native.serve(self._take, self._device, self._log)
            self._native = None
            if not go_on:
                return
        await first_ended(self.from_device(), self.from_server())

    async def _take(self, left: Sequence[tuple[bytes, native.Sockaddr]]) -> None:
        """Take what the pump in C leaves."""
        await self._deliver([datagram for datagram, _ in left])

    async def register(self) -> None:
        """Send the registration."""
        if self._trains is not None:
            self._trains.send_from((self._registration,), 0)
            if self._kernel is not None and self._lead_kernel():
                self._kernel.offer()
            self._note_refusal(self._trains)
            return
        async with self._turn:
            await self._upstream.send([Datagram(self._registration, self._target)])

    def _lead_kernel(self) -> bool:
        """Tell the kernel engine the way to the server; return whether it can take packets from there."""
        assert self._kernel is not None
        assert self._socket is not None
        try:
            address = self._socket.sock.getpeername()
            ours = self._socket.sock.getsockname()[0]
        except OSError:
            return False  # closed, or its address has gone
        return self._kernel.talk_to(Endpoint.from_sockaddr(address), ours)

    def _count(self) -> None:
        """Count what others have moved, and see from it whether the server is there."""
        up = down = 0
        if self._kernel is not None:
            self._lead_kernel()
            up, down = self._kernel.count(self._flow)
        if self._native is not None:
            more_up, more_down, refused = self._native.count()
            up, down = up + more_up, down + more_down
            self._liveness.refused |= refused > 0
        if down:
            self._liveness.unanswered = False
        elif up:
            self._liveness.unanswered = True

    async def attend(self) -> None:
        """Register when it is time to, and see that the way to the server stays outside the tunnel.

        Raise ConnError when it does not, or the server does not answer any more.
        """
        while True:
            await asyncio.sleep(self._liveness.wait(self._loop.time()))
            if self._path is not None:
                self._path.check()
            self._count()
            if self._liveness.look(self._loop.time()):
                await self.register()

    # ---- device to server ----------------------------------------------------------------------
    async def from_device(self) -> None:
        """Send what the kernel has routed into the device, until it is closed."""
        device, liveness, meter = self._device, self._liveness, self._flow.meter
        shapers = self._flow.shapers.up if self._flow.shapers else ()
        while batch := await device.receive():
            if shapers:
                batch = within(batch, shapers)
            if self._trains is None or self._socket is None:
                target = self._target
                async with self._turn:
                    await self._upstream.send([Datagram(bytes(packet), target) for packet in batch])
            else:
                start = 0
                while (start := self._trains.send_from(batch, start)) < len(batch):
                    await self._socket.readiness.writable()
                self._note_refusal(self._trains)
            liveness.unanswered = True
            meter.up += sum(map(len, batch))
            if len(batch) >= _BATCH:
                await asyncio.sleep(0)

    def _note_refusal(self, trains: Trains) -> None:
        if trains.refused:
            trains.refused = False
            self._liveness.refused = True

    # ---- server to device ----------------------------------------------------------------------
    async def from_server(self) -> None:
        """Give the device what the server sends, until it closes."""
        if self._trains is not None and self._socket is not None:
            await self._from_socket(self._trains, self._socket)
            return
        while batch := await self._upstream.receive():
            await self._deliver([part for datagram in batch for part in pieces(datagram)])

    async def _from_socket(self, trains: Trains, socket: UdpSocket) -> None:
        while True:
            try:
                batch = trains.receive_now()
            except ConnError:
                return
            self._note_refusal(trains)
            if batch:
                await self._deliver([packet for train, stride, _ in batch for packet in split(train, stride)])
            if trains.drained:
                await socket.readiness.readable()
            else:
                await asyncio.sleep(0)

    async def _deliver(self, batch: Sequence[Buffer]) -> None:
        liveness, delivery = self._liveness, self._delivery
        limits = self._flow.shapers.down if self._flow.shapers else ()
        size = 0
        liveness.unanswered = False
        for run, packets in delivery.runs(batch):
            packet = packets[0]
            if len(packet) <= codec.HEADER:
                if codec.is_answer(bytes(packet)):
                    liveness.answered(self._loop.time())
                    if self._kernel is not None and self._kernel.answered(bytes(packet)):
                        self._lead_kernel()
            elif packet[0] >> 4 in (4, 6):
                size += delivery.add(run, packets, limits)
        await delivery.send()
        self._flow.meter.down += size
