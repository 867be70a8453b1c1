"""Datagrams that own a UDP socket, and how such sockets are made."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from errno import ECONNREFUSED, EINVAL, EMSGSIZE

from . import batches
from .address import ANY, Endpoint
from .batches import Ancillary
from .datagrams import MAX_UDP_PAYLOAD, Datagram, Datagrams, pieces
from .errors import ConnError, KernelError, dial_error
from .sockets import (
    PLAIN,
    DialOptions,
    ListenOptions,
    Readiness,
    SockAddr,
    bound_socket,
    make_socket,
    sockaddr_of,
)
from .stream import Buffer

_LISTEN = ListenOptions()


class UdpSocket(Datagrams):
    """A UDP socket, unconnected or connected to `peer`.

    An ICMP error that the kernel reports on a later call concerns one datagram and is dropped, never raised, unless
    `tells_refusal` says otherwise.

    cuts       the longest datagram that the kernel may be given in a train to be cut (UDP_SEGMENT), 0 for none
    dropped    datagrams that could not be sent
    pinned     `local` of datagrams is the address of this host that a peer has asked, and answers leave from there
    refused    a connected socket's peer has said that nobody listens there; whoever reads it sets it back
    tells_refusal    `receive` raises DialRefused for that, as long as the peer has never answered
    """

    __slots__ = (
        "_connected",
        "_cuts",
        "_sock",
        "_v6",
        "dropped",
        "pinned",
        "readiness",
        "received",
        "refused",
        "sent",
        "tells_refusal",
    )

    def __init__(
        self, sock: socket.socket, local: Endpoint = ANY, peer: Endpoint | None = None, *, pinned: bool = False
    ) -> None:
        """Take a non-blocking socket that is bound, or connected to `peer`; it is ours to close from now on.

        `pinned` needs a socket for which `core.batches.pin` has been called.
        """
        Datagrams.__init__(self, local)
        self._sock = sock
        self.readiness = Readiness(sock)
        self._v6 = sock.family == socket.AF_INET6
        self._connected = peer
        self._cuts: int | None = None
        self.pinned = pinned
        self.received = 0
        self.sent = 0
        self.dropped = 0
        self.refused = False
        self.tells_refusal = False

    @property
    def sock(self) -> socket.socket:
        """The socket, for options and addresses."""
        return self._sock

    @property
    def peer(self) -> Endpoint | None:
        """What it is connected to."""
        return self._connected

    @property
    def cuts(self) -> int:
        """The longest datagram that may be in a train."""
        if self._cuts is None:
            try:
                self._sock.setsockopt(batches.SOL_UDP, batches.UDP_SEGMENT, 0)
                self._cuts = MAX_UDP_PAYLOAD
            except OSError:
                self._cuts = 0
        return self._cuts

    @cuts.setter
    def cuts(self, longest: int) -> None:
        self._cuts = longest

    # ---- in --------------------------------------------------------------------------------------
    async def receive(self) -> Sequence[Datagram]:
        readiness = self.readiness
        while True:
            if not readiness.drained or readiness.fd < 0:
                batch = self.receive_now()
                if batch:
                    return batch
                if self.refused and self.tells_refusal and not self.received:
                    raise dial_error(OSError(ECONNREFUSED, ""), self._connected)
            await readiness.readable()

    def receive_now(self) -> list[Datagram]:
        """Return what has arrived, [] if nothing. Raise ConnError once closed."""
        readiness, connected = self.readiness, self._connected
        room = batches.arena(readiness.hub)
        count = 0
        for _ in range(_TRIES):
            try:
                if readiness.fd < 0:
                    raise ConnError("closed by this side")
                count = room.receive(readiness.fd)
                break
            except OSError as exc:
                self._note(exc)  # it has taken the place of what may be there
        if not count:
            readiness.drained = True
            return []
        payload, name, batch = room.payload, room.name, []
        size = 28 if self._v6 else 16
        received = 0
        for index in range(count):
            data = payload(index)
            received += len(data)
            peer = connected if connected is not None else batches.endpoint_of(name(index, size))
            batch.append(Datagram(data, peer))
        if self.pinned:
            port = self.local.port
            for index in range(count):
                host = batches.asked_address(room.control(index))
                if host:
                    batch[index].local = Endpoint(host, port)
        room.reset(count)
        self.received += received
        # epoll(7): what comes after a batch with room left brings an edge.
        readiness.drained = count < batches.BATCH
        return batch

    # ---- out -------------------------------------------------------------------------------------
    async def send(self, batch: Sequence[Datagram]) -> None:
        for packets, address, control in self._runs(batch):
            start = self.send_from(packets, 0, address, control)
            if start < len(packets):
                await self.readiness.writable()
                self.dropped += len(packets) - self.send_from(packets, start, address, control)

    def send_now(self, batch: Sequence[Datagram]) -> None:
        """Send without waiting: what does not fit is dropped."""
        for packets, address, control in self._runs(batch):
            self.dropped += len(packets) - self.send_from(packets, 0, address, control)

    def _runs(self, batch: Sequence[Datagram]) -> Iterator[tuple[Sequence[Buffer], SockAddr | None, Ancillary]]:
        """Yield packets in a row to one peer, with its address and control data; skip those without an address."""
        index, count = 0, len(batch)
        while index < count:
            datagram = batch[index]
            peer, local = datagram.peer, datagram.local
            index += 1
            if not datagram.stride and (index == count or batch[index].peer != peer):
                packets: list[Buffer] = [datagram.data]
            else:
                packets = pieces(datagram)
                while index < count and batch[index].peer == peer and batch[index].local == local:
                    packets += pieces(batch[index])
                    index += 1
            try:
                address = None if self._connected is not None else self.sockaddr(peer)
                control = batches.pinned(local.host, self._v6) if local is not None and self.pinned else ()
            except OSError:  # a zone that is no interface
                self.dropped += len(packets)
                continue
            yield packets, address, control

    def send_from(
        self, packets: Sequence[Buffer], start: int, address: SockAddr | None = None, control: Ancillary = ()
    ) -> int:
        """Send packets in order, from the one at `start`; return where it stopped because the socket is full.

        `address` is None for a connected socket. Packets of one size in a row go as a train. One that cannot be sent is
        left out and counts as dropped. Raise ConnError once closed.
        """
        count = len(packets)
        while start < count:
            end = start + 1
            if end < count and (longest := self.cuts):
                end = batches.train_end(packets, start, longest)
            if end - start > 1:
                sent = self._send_train(packets[start:end], address, control)
                if sent is None:
                    # Larger than the way takes, or it cannot be cut: as datagrams of their own they may be fragmented.
                    for index in range(start, end):
                        if not self._send_one(packets[index], address, control):
                            return index
                elif not sent:
                    return start
            elif not self._send_one(packets[start], address, control):
                return start
            start = end
        return start

    def _send_train(self, train: Sequence[Buffer], address: SockAddr | None, control: Ancillary) -> bool | None:
        """Send a train; return False if the socket is full, None if it has to be sent as single datagrams."""
        size = len(train[0])
        ancillary = (*control, (batches.SOL_UDP, batches.UDP_SEGMENT, size.to_bytes(2, sys.byteorder)))
        for _ in range(_TRIES):
            try:
                if address is None:
                    self.sent += self._sock.sendmsg(train, ancillary)
                else:
                    self.sent += self._sock.sendmsg(train, ancillary, 0, address)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as exc:
                if self._note(exc):
                    continue
                # Too long for the way; or a device without checksums, on kernels that then do not cut (before 6.11).
                self.cuts = size - 1 if exc.errno in (EMSGSIZE, EINVAL) else 0
                if not self.cuts:
                    self.readiness.hub.give_way("trains of datagrams", "single ones", str(exc.strerror))
                return None
            return True
        return True

    def _send_one(self, packet: Buffer, address: SockAddr | None, control: Ancillary) -> bool:
        """Send one datagram; False if the socket is full."""
        for _ in range(_TRIES):
            try:
                if control:
                    self.sent += self._sock.sendmsg((packet,), control, 0, address)
                elif address is None:
                    self.sent += self._sock.send(packet)
                else:
                    self.sent += self._sock.sendto(packet, address)
            except (BlockingIOError, InterruptedError):
                return False
            except (OSError, OverflowError, ValueError) as exc:
                if isinstance(exc, OSError) and self._note(exc):
                    continue
                if not control:
                    break
                control = ()  # an address that is ours no more: better from another one than not at all
            else:
                return True
        self.dropped += 1
        return True

    def _note(self, exc: OSError) -> bool:
        """Note an error that concerns one datagram; True if it was about an earlier one, and this one is still here."""
        if self.readiness.fd < 0:
            raise ConnError("closed by this side") from exc
        if exc.errno == ECONNREFUSED:
            self.refused = True
            return True
        return False

    def sockaddr(self, peer: Endpoint) -> SockAddr:
        """Return `peer`, an IP address, in the form that this socket's family takes."""
        host, port = peer
        if self._v6 and ":" not in host:
            return ("::ffff:" + host, port)
        return (host, port) if "%" not in host else sockaddr_of(host, port)

    async def aclose(self) -> None:
        self.readiness.release()

    def abort(self) -> None:
        self.readiness.release()


_TRIES = 4
"""Of a call that told of an error of an earlier datagram."""


def listen_udp(address: Endpoint, options: ListenOptions = _LISTEN) -> socket.socket:
    """Return a bound UDP socket with large buffers. Raise KernelError or ConfigError."""
    sock = bound_socket(address, socket.SOCK_DGRAM, options)
    enlarge_buffers(sock)
    return sock


def listening_udp(address: Endpoint, options: ListenOptions = _LISTEN) -> UdpSocket:
    """Bind a UDP socket that answers from where it was asked: one for all addresses pins. Raise as `listen_udp`."""
    sock = listen_udp(address, options)
    local = Endpoint.from_sockaddr(sock.getsockname())
    everywhere = local.host in ("::", "0.0.0.0")
    try:
        if everywhere:
            batches.pin(sock)
    except OSError as exc:
        sock.close()
        raise KernelError(f"listen {address}", exc.errno or 0) from exc
    return UdpSocket(sock, local, pinned=everywhere)


UDP_BUFFER = 4 << 20
"""Bytes of socket buffer asked for UDP: the default of 208 KiB loses bursts at a gigabit."""


def enlarge_buffers(sock: socket.socket, size: int = UDP_BUFFER) -> None:
    """Ask for socket buffers of `size` bytes, beyond the system's limit where we may."""
    for forced, plain in ((33, socket.SO_RCVBUF), (32, socket.SO_SNDBUF)):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, size)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, plain, size)


def open_udp(target: Endpoint | None, options: DialOptions = PLAIN) -> UdpSocket:
    """Open a UDP socket: connected to `target` (an IP address), or free for peers of both families when None."""
    family = socket.AF_INET if target is not None and ":" not in target.host else socket.AF_INET6
    try:
        sock = make_socket(family, socket.SOCK_DGRAM, options.netns)
    except OSError as exc:
        if target is not None:
            raise dial_error(exc, target) from exc
        sock = make_socket(socket.AF_INET, socket.SOCK_DGRAM, options.netns)  # a host without IPv6
    try:
        enlarge_buffers(sock)
        if options is not PLAIN:
            options.apply(sock, target.host if target is not None else "")
        if target is not None:
            sock.connect(sockaddr_of(target.host, target.port, options.netns))
        else:
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if sock.getsockname()[1] == 0:
                sock.bind(("::" if sock.family == socket.AF_INET6 else "0.0.0.0", 0))
        return UdpSocket(sock, Endpoint.from_sockaddr(sock.getsockname()), target)
    except OSError as exc:
        sock.close()
        raise dial_error(exc, target if target is not None else "udp") from exc
    except BaseException:
        sock.close()
        raise
