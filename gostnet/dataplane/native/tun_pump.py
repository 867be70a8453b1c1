"""The pump of tun.c: a thread that moves packets between a TUN device and a UDP socket of ours.

Who is a peer, and what registrations are answered, is decided here in Python; the thread knows which addresses lead to
which peer, and leaves to Python what begins like a registration or its answer.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

from ...core.packets import Way
from ...core.sockets import Readiness
from ...core.udp_socket import UdpSocket
from ..tun_device import Descriptor, TunDevice, set_offload
from .library import Library

SERVER, SINGLE, STRICT = 1, 2, 4

_LEFT: Final = 1 << 18
_HEAD = struct.Struct("=II28s4x")
_TOTALS = 9
"""Numbers of `struct totals`: packets, bytes, dropped (each up and down), refusals, lost, errno of the end."""

_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6, _TUN_F_TSO_ECN = 1, 2, 4, 8
_RUNS = _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 | _TUN_F_TSO_ECN
"""What is asked of the device: runs of TCP segments, and checksums that are still to be made."""

Sockaddr = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """What a pump, or one peer of it, has moved since it began: `up` to peers, `down` from them. Bytes inside."""

    up: int = 0
    down: int = 0
    packets_up: int = 0
    packets_down: int = 0
    dropped_up: int = 0
    dropped_down: int = 0
    refused: int = 0


class TunPump:
    """A thread between a device and a socket, which it alone reads from now on; both stay their owners'.

    The device stops it when it is closed.
    """

    __slots__ = ("__weakref__", "_buffer", "_close", "_device", "_family", "_library", "_pump", "_readiness", "_totals")

    def __init__(
        self, library: Library, device: TunDevice, carrier: UdpSocket, flags: int = 0, ways: Iterable[Way] = ()
    ) -> None:
        """Start it. Without SERVER the socket is a connected one. Raise OSError.

        SERVER   peers are those that are learned
        SINGLE   one peer has every address
        STRICT   packets are taken only from the peer that their source leads to
        """
        self._library = library
        self._device = device
        self._family = carrier.sock.family
        news = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        pump = library.tun_open(device.readiness.fd, carrier.readiness.fd, flags, news.fileno())
        if not pump:
            news.close()
            raise OSError("the native pump could not be made")
        self._pump: int = pump
        self._buffer = ctypes.create_string_buffer(_LEFT)
        self._totals = (ctypes.c_uint64 * _TOTALS)()
        self._readiness = Readiness(cast(socket.socket, news))
        self._close = weakref.finalize(self, _close, library, pump, news)
        try:
            for way in sorted(ways, key=lambda way: way.network.prefixlen, reverse=True):
                if way.gateway is not None:
                    self._add(way)
            for readiness in (device.readiness, carrier.readiness):
                if readiness.registered:
                    readiness.hub.surrender(readiness.fd)
                    readiness.registered = False
            set_offload(device.fd, _RUNS)
            if error := library.tun_start(pump):
                raise OSError(error, os.strerror(error))
        except BaseException:
            self.close()
            raise
        device.closing = self.close

    def _add(self, way: Way) -> None:
        assert way.gateway is not None
        network = way.network.network_address.packed
        kind = 4 if len(network) == 4 else 6
        if self._library.tun_way(self._pump, kind, network, way.network.prefixlen, way.gateway.packed) < 0:
            raise OSError("no memory for the routes of peers")

    @property
    def closed(self) -> bool:
        """Whether it has been stopped by us, or with the device."""
        return not self._close.alive

    @property
    def ended(self) -> int:
        """The errno with which the thread has ended, 0 as long as it has not."""
        if not self._close.alive:
            return 0
        self._library.tun_count(self._pump, ctypes.addressof(self._totals))
        return int(self._totals[8])

    # ---- peers -------------------------------------------------------------------------------------
    def learn(self, address: bytes, peer: Sockaddr) -> bool:
        """Let a packed address, or with b"" every one, lead to a peer; return False if there is no memory for it."""
        if not self._close.alive:
            return True
        name = self._name(peer)
        done: int = self._library.tun_learn(self._pump, _kind(address), address, name, len(name))
        return done == 0

    def forget(self, address: bytes) -> None:
        """Forget whose an address is; b"" is the one of a pump with a single peer."""
        if self._close.alive:
            self._library.tun_forget(self._pump, _kind(address), address)

    def set_strict(self, strict: bool) -> None:
        """Say whether packets are taken only from the peer that their source leads to."""
        if self._close.alive:
            self._library.tun_strict(self._pump, strict)

    def _name(self, peer: Sockaddr) -> bytes:
        port = int(peer[1]).to_bytes(2, "big")
        if self._family == socket.AF_INET6:
            flow, scope = (*peer[2:], 0, 0)[:2]
            address = socket.inet_pton(socket.AF_INET6, str(peer[0]).partition("%")[0])
            return struct.pack("=H2sI16sI", self._family, port, socket.htonl(flow), address, scope)
        return struct.pack("=H2s4s8x", self._family, port, socket.inet_aton(peer[0]))

    # ---- what it leaves to Python --------------------------------------------------------------------
    async def receive(self) -> list[tuple[bytes, Sockaddr]]:
        """Return datagrams that are not for the device, with whom they are from; [] once the pump is at its end."""
        while self._close.alive:
            found = self._taken()
            if found or self.ended:
                return found
            await self._readiness.readable()
        return []

    def _taken(self) -> list[tuple[bytes, Sockaddr]]:
        try:
            os.eventfd_read(self._readiness.fd)
        except BlockingIOError:
            pass
        size: int = self._library.tun_take(self._pump, ctypes.addressof(self._buffer))
        found = []
        at = 0
        data = self._buffer.raw[:size] if size else b""
        while at < size:
            length, name_size, name = _HEAD.unpack_from(data, at)
            at += _HEAD.size
            found.append((data[at : at + length], self._sockaddr(name[:name_size])))
            at += (length + 3) & ~3
        return found

    def _sockaddr(self, name: bytes) -> Sockaddr:
        if len(name) < 8:
            return ()
        port = int.from_bytes(name[2:4], "big")
        if self._family == socket.AF_INET6:
            flow, address, scope = struct.unpack_from("=I16sI", name, 4)
            host = socket.inet_ntop(socket.AF_INET6, address)
            if scope:
                host = f"{host}%{_interface(scope)}"
            return (host, port, socket.ntohl(flow), scope)
        return (socket.inet_ntoa(name[4:8]), port)

    # ---- counts ------------------------------------------------------------------------------------
    def counts(self) -> Counts:
        """Return what has been moved; after the end, what had been."""
        totals = self._totals
        if self._close.alive:
            self._library.tun_count(self._pump, ctypes.addressof(totals))
        return Counts(totals[2], totals[3], totals[0], totals[1], totals[4], totals[5], totals[6])

    def counts_of(self, peer: Sockaddr) -> Counts | None:
        """Return what has gone to a peer and come from it, None for one that is not known."""
        four = (ctypes.c_uint64 * 4)()
        name = self._name(peer)
        if not self._close.alive or self._library.tun_peer(self._pump, name, len(name), ctypes.addressof(four)) < 0:
            return None
        return Counts(four[2], four[3], four[0], four[1])

    def close(self) -> None:
        """Stop the thread; device and socket may be read by others again. Idempotent."""
        if not self._close.alive:
            return
        device = self._device
        device.closing = None
        try:
            # Then the thread drains what has been put together for it: others take single packets.
            set_offload(device.fd, 0)
        except OSError:
            pass  # it is gone
        self._library.tun_stop(self._pump)
        counts = self.counts()
        device.received += counts.packets_up
        device.sent += counts.packets_down
        device.dropped += counts.dropped_down
        self._readiness.release()
        self._close()


def _close(library: Library, pump: int, news: Descriptor) -> None:
    library.tun_close(pump)
    news.close()


def _interface(scope: int) -> str:
    try:
        return socket.if_indextoname(scope)
    except OSError:
        return str(scope)


def _kind(address: bytes) -> int:
    return {0: 0, 4: 4}.get(len(address), 6)
