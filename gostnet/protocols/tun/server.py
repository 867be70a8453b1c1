"""One device, one UDP socket, and the peers that have registered by it."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any

from ...core.address import Endpoint, IPAddress
from ...core.contracts import Authenticator
from ...core.errors import ConnError
from ...core.flow import Flow
from ...core.packets import Packets
from ...core.stream import Buffer
from ...core.udp_socket import UdpSocket
from ...dataplane.udp_trains import Trains, split
from ...pipeline.devices import first_ended, within
from ...pipeline.handler import HandlerContext
from . import codec, engine, native
from .delivery import Delivery
from .routes import PeerTable

RECHECK = 10.0
"""Seconds between two looks at whether peers may still have what they have registered: users may be taken away."""

TICK = 1.0
"""Seconds between two looks at what the kernel has moved."""

_BATCH = 64
"""Packets of the device per turn."""

Sockaddr = tuple[Any, ...]


class PeerServer:
    """Passes packets between a device and the peers that register, and from peer to peer."""

    def __init__(
        self,
        flow: Flow,
        device: Packets,
        carrier: UdpSocket,
        context: HandlerContext,
        *,
        passphrase: str = "",
        p2p: bool = False,
        strict_source: bool | None = None,
        choice: engine.Choice = "auto",
    ) -> None:
        self._flow = flow
        self._device = device
        self._carrier = carrier
        self._trains = Trains(carrier)
        self._delivery = Delivery(device)
        self._p2p = p2p
        self._strict_wanted = strict_source
        self._own = frozenset(address.ip for address in device.setup.addresses)
        self._peers: PeerTable[Sockaddr] = PeerTable(device.setup.ways, single=p2p, router=device.setup.router)
        self._credentials: dict[IPAddress, tuple[bytes, Endpoint]] = {}
        self._choice: engine.Choice = choice
        self._adopt(context, passphrase)
        self._kernel = self._start_engine()
        self._native = native.start(flow, device, carrier, self._log, server=True, single=p2p, strict=self._strict)
        if self._trains.missing:
            self._log.info(f"{device.name}: the kernel lacks {self._trains.missing}: datagrams go one by one")

    def _start_engine(self) -> engine.KernelPath | None:
        return engine.start(
            self._choice,
            self._flow,
            self._device,
            self._carrier,
            self._log,
            place=self._place,
            strict=self._strict,
            single=self._p2p,
            relays=True,
        )

    def close(self) -> None:
        """Stop the engines; socket and device are others'."""
        self._close_kernel()
        self._close_native()

    def _close_kernel(self) -> None:
        if self._kernel is not None:
            self._kernel.close(self._flow)
            self._kernel = None

    def _close_native(self) -> None:
        if self._native is not None:
            self._native.close()
            self._native = None

    def _adopt(self, context: HandlerContext, passphrase: str) -> None:
        self._log = context.log
        self._place = context.netns
        self._authenticator: Authenticator | None = context.authenticator
        self._passphrase = codec.pack_passphrase(passphrase).rstrip(b"\0") if passphrase else None
        guarded = self._authenticator is not None or self._passphrase is not None
        self._strict = guarded if self._strict_wanted is None else self._strict_wanted

    def renew(self, context: HandlerContext, passphrase: str) -> None:
        """Go on with other users; who is none of them any more is forgotten at once."""
        strict = self._strict
        self._adopt(context, passphrase)
        if self._kernel is not None and self._strict != strict:
            self._close_kernel()
            self._kernel = self._start_engine()
        if self._native is not None:
            self._native.set_strict(self._strict)
        self.check_peers()

    async def serve(self) -> None:
        """Pass packets until the device is closed, or the socket. Raise ConnError when the device is gone."""
        if self._native is not None:
            go_on = await self._native.serve(self._take, self._device, self._log)
            self._native = None
            if not go_on:
                return
        await first_ended(self.from_device(), self.from_peers())

    async def _take(self, left: Sequence[tuple[bytes, Sockaddr]]) -> None:
        """Take what the pump in C leaves."""
        for datagram, peer in left:
            self._flow.meter.down += self._sort((datagram,), peer)
        await self._delivery.send()

    # ---- device to peers -------------------------------------------------------------------------
    async def from_device(self) -> None:
        """Send each packet to the peer that has its destination; those that nobody has are dropped."""
        device, meter = self._device, self._flow.meter
        find, shapers = self._peers.find, self._flow.shapers
        while batch := await device.receive():
            if shapers is not None and shapers.up:
                batch = within(batch, shapers.up)
            size = 0
            run: list[Buffer] = []
            last, peer, run_peer = b"", None, None
            for packet in batch:
                version = packet[0] >> 4
                if version == 4:
                    destination = bytes(packet[16:20])
                elif version == 6:
                    destination = bytes(packet[24:40])
                else:
                    continue
                if destination != last:
                    last, peer = destination, find(destination)
                    if peer is not run_peer:
                        if run and not await self._send_all(run, run_peer):
                            return
                        run, run_peer = [], peer
                if peer is not None:
                    run.append(packet)
                    size += len(packet)
            if run and not await self._send_all(run, run_peer):
                return
            meter.up += size
            if len(batch) >= _BATCH:
                await asyncio.sleep(0)

    async def _send_all(self, packets: Sequence[Buffer], peer: Sockaddr | None) -> bool:
        """Send in order, waiting where the socket is full; False once it is closed."""
        try:
            start = 0
            while (start := self._trains.send_from(packets, start, peer)) < len(packets):
                await self._carrier.readiness.writable()
        except ConnError:
            return False
        return True

    # ---- peers to device -------------------------------------------------------------------------
    async def from_peers(self) -> None:
        """Take registrations, pass packets on to other peers, and give the rest to the device."""
        trains, meter, delivery = self._trains, self._flow.meter, self._delivery
        while True:
            try:
                packets: list[Buffer] = []
                last: Sockaddr = ()
                for train, stride, peer in trains.receive_now():
                    if peer != last:
                        if packets:
                            meter.down += self._sort(packets, last)
                        packets, last = [], peer
                    packets += split(train, stride)
                if packets:
                    meter.down += self._sort(packets, last)
            except ConnError:
                return
            await delivery.send()
            if trains.drained:
                await self._carrier.readiness.readable()
            else:
                await asyncio.sleep(0)

    def _sort(self, packets: Sequence[Buffer], peer: Sockaddr) -> int:
        """Let go to the device what is for it, pass on what is for other peers; return the bytes of both."""
        find, strict, p2p, shapers = self._peers.find, self._strict, self._p2p, self._flow.shapers
        limits = shapers.down if shapers is not None else ()
        delivery = self._delivery
        size = 0
        last, other, refused = b"", None, False
        onward: list[Buffer] = []
        onward_to = None
        for run, of in delivery.runs(packets):
            packet = of[0]
            length = len(packet)
            if length <= codec.HEADER:
                if self._kernel is not None and packet == codec.OFFER:
                    self._kernel.offered(Endpoint.from_sockaddr(peer))
                continue  # GOST: neither a registration nor a packet that carries anything
            version = packet[0] >> 4
            if version == 4:
                if packet[0] == codec.MAGIC[0] and packet[:4] == codec.MAGIC:
                    self._registered(bytes(packet), peer)
                    last = b""
                    continue
                ends = bytes(packet[12:20])
            elif version == 6 and length >= 40:
                ends = bytes(packet[8:40])
            else:
                continue
            if ends != last:
                # Whose they are is looked up once for packets that follow each other between the same two ends.
                last, half = ends, len(ends) // 2
                refused = strict and find(ends[:half]) != peer
                other = find(ends[half:]) if not p2p else None
            if refused:
                continue
            if other is None:
                size += delivery.add(run, of, limits)
                continue
            if other is not onward_to:
                self._pass_on(onward, onward_to)
                onward, onward_to = [], other
            passing = within(of, limits) if limits else of
            size += sum(map(len, passing))
            onward += passing
        self._pass_on(onward, onward_to)
        return size

    def _pass_on(self, packets: Sequence[Buffer], peer: Sockaddr | None) -> None:
        """Send to a peer now or not at all."""
        if packets:
            self._trains.send_from(packets, 0, peer)

    # ---- registrations ---------------------------------------------------------------------------
    def _registered(self, datagram: bytes, peer: Sockaddr) -> None:
        """Learn whose addresses these are, and answer; a registration that is refused gets no answer."""
        registration = codec.decode_registration(datagram)
        if registration is None:
            return
        client = Endpoint.from_sockaddr(peer)
        names = ", ".join(map(str, registration.addresses))
        if not self._own.isdisjoint(registration.addresses):
            self._log.debug(f"registration from {client}: {names} is an address of this device", client=str(client))
            return
        if not all(self._authorised(address, registration.passphrase, client) for address in registration.addresses):
            self._log.info(f"registration from {client} for {names} is refused", client=str(client))
            return
        self._pass_on((codec.encode_answer(client.host),), peer)
        if self._kernel is not None:
            self._kernel.registered(registration.addresses, client)
        if self._peers.learn(registration.addresses, peer):
            if self._native is not None:
                kept = [address for address in registration.addresses if self._peers.find(address.packed) == peer]
                self._native.learn(kept, peer)
            self._log.info(f"{self._device.name}: {names} at {client}", client=str(client))
        if self._authenticator is not None or self._passphrase is not None:
            for address in registration.addresses:
                if self._peers.find(address.packed) is not None:
                    self._credentials[address] = (registration.passphrase, client)

    def _authorised(self, address: IPAddress, passphrase: bytes, client: Endpoint) -> bool:
        """Tell whether the credentials are those of an address; user names are the addresses' texts."""
        if self._authenticator is not None:
            password = passphrase.decode("utf-8", "surrogateescape")
            return self._authenticator.authenticate(str(address), password, client) is not None
        return self._passphrase is None or hmac.compare_digest(self._passphrase, passphrase)

    async def attend(self) -> None:
        """Look from time to time whether the peers may still be peers, and count what the kernel has moved."""
        checked = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(TICK)
            if self._kernel is not None:
                self._kernel.count(self._flow)
                self._kernel.refresh()
            if self._native is not None:
                self._native.count()
            now = asyncio.get_running_loop().time()
            if now - checked >= RECHECK:
                checked = now
                self.check_peers()

    def check_peers(self) -> None:
        """Forget the peers whose credentials are not accepted any more."""
        if self._authenticator is None and self._passphrase is None:
            return
        for address, (passphrase, client) in list(self._credentials.items()):
            if not self._authorised(address, passphrase, client):
                del self._credentials[address]
                if self._p2p:
                    self._peers.clear()
                self._peers.forget(address)
                if self._kernel is not None:
                    self._kernel.forget(address)
                if self._native is not None:
                    self._native.forget(address)
                self._log.info(f"{self._device.name}: {address} at {client} is no peer any more", client=str(client))
