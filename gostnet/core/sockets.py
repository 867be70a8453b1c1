"""Streams and datagrams that own a kernel socket, and how such sockets are made.

This is the border at which `OSError` becomes one of our errors.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import ECONNREFUSED, EINVAL, EMSGSIZE, ENODEV, ENOTCONN
from select import EPOLLERR, EPOLLHUP, EPOLLRDHUP
from typing import TypeAlias

from . import batches
from .address import ANY, Endpoint, parse_ip
from .batches import Ancillary
from .datagrams import MAX_UDP_PAYLOAD, Datagram, Datagrams, pieces
from .errors import ConfigError, ConnError, KernelError, conn_error, dial_error
from .fiber import Fiber, Waker, suspend
from .hub import READABLE, WRITABLE, Hub, OnEvents, current_hub
from .stream import CHUNK, Buffer, Stream

_NONBLOCK = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
SO_BINDTODEVICE = 25
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
IPPROTO_MPTCP = 262
HUNG_UP = EPOLLRDHUP | EPOLLHUP | EPOLLERR
_LINGER_RESET = struct.pack("ii", 1, 0)

KEEPALIVE_IDLE = 15
KEEPALIVE_INTERVAL = 15
KEEPALIVE_COUNT = 9
"""Go's defaults, which every TCP socket of GOST carries: probes after 15 s, every 15 s, dead after 9."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """TCP keepalive: seconds before the first probe, between probes, and how many unanswered ones end it."""

    idle: int = KEEPALIVE_IDLE
    interval: int = KEEPALIVE_INTERVAL
    count: int = KEEPALIVE_COUNT

    def apply(self, sock: socket.socket) -> None:
        """Set the options on a TCP socket; on a listening socket accepted ones inherit them."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, self.idle)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, self.interval)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, self.count)


DEFAULT_KEEPALIVE = Keepalive()


class Readiness:
    """One non-blocking socket and its single registration: who waits to read, who waits to write.

    It owns the descriptor: `release` forgets, closes, and wakes whoever still waits; the operation it repeats then
    finds the socket closed and raises.

    events     the epoll bits of the last edge
    pending    an edge has come that no read has followed yet: an engine that takes over reads at once
    drained    a read has emptied the socket, and no edge has come since: another read would be in vain
    """

    __slots__ = ("_reader", "_writer", "drained", "events", "fd", "hub", "pending", "registered", "sock")

    def __init__(self, sock: socket.socket, hub: Hub | None = None) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.hub = hub or current_hub()
        self.events = 0
        self.pending = False
        self.drained = False
        self.registered = False
        self._reader: Fiber | Waker | None = None
        self._writer: Fiber | Waker | None = None

    def on_events(self, events: int) -> None:
        """Wake the waiters that the epoll bits concern."""
        self.events = events
        if events & READABLE:
            self.drained = False
            reader = self._reader
            if reader is not None:
                self._reader = None
                reader.wake()
            else:
                self.pending = True
        if events & WRITABLE:
            writer = self._writer
            if writer is not None:
                self._writer = None
                writer.wake()

    def register(self) -> None:
        """Register with the hub unless that is done: the first wait does it, so who never waits pays nothing."""
        if not self.registered:
            if self.fd < 0:
                raise ConnError("closed by this side")
            self.hub.register(self.fd, self.on_events)
            self.registered = True

    async def readable(self) -> None:
        """Wait for the edge that follows an EAGAIN of a read, or that registering brings if something is there."""
        if self._reader is not None:
            raise RuntimeError("two tasks read the same socket")
        if not self.registered:
            self.register()
        self.pending = False
        fiber = self.hub.fiber
        if fiber is not None:
            self._reader = fiber
            fiber.waiting = self
            await suspend()
            return
        waker = self._reader = Waker(self.hub.loop.create_future())
        try:
            await waker.future
        finally:
            if self._reader is waker:
                self._reader = None

    async def writable(self) -> None:
        """Wait for the edge that follows an EAGAIN of a write, or a connect in progress."""
        if self._writer is not None:
            raise RuntimeError("two tasks write the same socket")
        if not self.registered:
            self.register()
        fiber = self.hub.fiber
        if fiber is not None:
            self._writer = fiber
            fiber.waiting = self
            await suspend()
            return
        waker = self._writer = Waker(self.hub.loop.create_future())
        try:
            await waker.future
        finally:
            if self._writer is waker:
                self._writer = None

    def leave(self, fiber: Fiber) -> None:
        """Forget a fiber that is cancelled while it waits here."""
        if self._reader is fiber:
            self._reader = None
        if self._writer is fiber:
            self._writer = None

    def claim(self, on_events: OnEvents) -> int:
        """Give the socket's events to an engine and return its descriptor; `unclaim` gives them back."""
        self.register()
        self.hub.replace(self.fd, on_events)
        return self.fd

    def unclaim(self) -> None:
        """Take the events back from an engine."""
        self.drained = False
        if self.registered:
            self.hub.replace(self.fd, self.on_events)

    def release(self) -> None:
        """Close the socket. Idempotent."""
        if self.fd < 0:
            return
        if self.registered:
            self.hub.forget(self.fd)
            self.registered = False
        self.fd = -1
        self.sock.close()
        for waiter in (self._reader, self._writer):
            if waiter is not None:
                waiter.wake_later()
        self._reader = self._writer = None


async def any_readable(*places: Readiness) -> None:
    """Wait for an edge at one of `places`, after reads of all of them have said EAGAIN."""
    waker = Waker(places[0].hub.loop.create_future())
    try:
        for readiness in places:
            if readiness._reader is not None:
                raise RuntimeError("two tasks read the same socket")
            readiness._reader = waker
            readiness.register()  # tells by an edge if something is there
            readiness.pending = False
        await waker.future
    finally:
        for readiness in places:
            if readiness._reader is waker:
                readiness._reader = None


class SocketStream(Stream):
    """A stream socket (TCP or unix).

    received, sent    bytes that crossed the socket, whoever moved them: the wire counters of GOST's statistics
    """

    __slots__ = ("_eof_sent", "_sock", "readiness", "received", "sent")

    def __init__(
        self, sock: socket.socket, local: Endpoint = ANY, remote: Endpoint = ANY, hub: Hub | None = None
    ) -> None:
        """Take a connected, non-blocking socket; it is ours to close from now on."""
        self.local = local
        self.remote = remote
        self._head = b""
        self._sock = sock
        self.readiness = Readiness(sock, hub)
        self.received = 0
        self.sent = 0
        self._eof_sent = False

    @property
    def sock(self) -> socket.socket:
        """The socket, for options and addresses; reading or writing it belongs to the stream and the engines."""
        return self._sock

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._head:
            return self._take_head(max_bytes)
        readiness = self.readiness
        if readiness.drained or not readiness.registered:
            # The peer has rarely spoken yet: registering tells, a vain read would cost more.
            await readiness.readable()
        while True:
            try:
                data = self._sock.recv(max_bytes)
            except (BlockingIOError, InterruptedError):
                await readiness.readable()
            except OSError as exc:
                raise conn_error(exc) from exc
            else:
                got = len(data)
                self.received += got
                if got == max_bytes:
                    readiness.pending = True
                elif not readiness.events & HUNG_UP:
                    # epoll(7): a short read has emptied a stream, so more brings an edge; the end has brought its own.
                    readiness.drained = True
                return data

    def receive_now(self, max_bytes: int = CHUNK) -> bytes | None:
        """Return what has arrived, b"" at end of stream, None if nothing is there yet."""
        if self._head:
            return self._take_head(max_bytes)
        try:
            data = self._sock.recv(max_bytes)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as exc:
            raise conn_error(exc) from exc
        self.received += len(data)
        return data

    async def send(self, data: Buffer) -> None:
        try:
            count = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError as exc:
            raise conn_error(exc) from exc
        self.sent += count
        if count < len(data):
            await self._send_rest(memoryview(data)[count:])

    async def _send_rest(self, rest: memoryview) -> None:
        while rest:
            await self.readiness.writable()
            try:
                count = self._sock.send(rest)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as exc:
                raise conn_error(exc) from exc
            self.sent += count
            rest = rest[count:]

    async def send_eof(self) -> None:
        try:
            self.shut()
        except OSError as exc:
            raise conn_error(exc) from exc

    def shut(self) -> None:
        """Send the end of our direction, once; nothing where the peer has reset, as nobody is left to hear it.

        Raise OSError.
        """
        if self._eof_sent or self.readiness.fd < 0:
            return
        self._eof_sent = True
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            if exc.errno != ENOTCONN:
                raise

    async def aclose(self) -> None:
        self.readiness.release()

    def abort(self) -> None:
        self.readiness.release()

    def reset(self) -> None:
        """Close with a TCP reset, as a peer that crashed would: tells the other side that data was lost."""
        if self.readiness.fd >= 0:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            except OSError:
                pass
        self.readiness.release()

    def mark_eof_sent(self) -> None:
        """Note that an engine has shut our direction down."""
        self._eof_sent = True

    async def wait_connected(self, where: Endpoint) -> None:
        """Wait until a connect in progress has ended. Raise DialError."""
        readiness = self.readiness
        while not readiness.events & WRITABLE:
            await readiness.writable()
        if readiness.events & (EPOLLERR | EPOLLHUP):
            code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise dial_error(OSError(code, os.strerror(code)), where)
            # Connected and hung up in one edge: what it had to say, and its end, are still to be read.


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

SockAddr: TypeAlias = tuple[str, int] | tuple[str, int, int, int]


def sockaddr_of(host: str, port: int, netns: str = "") -> SockAddr:
    """Return an IP address as the calls of a socket take it, its zone (a name or a number) as the scope id.

    `netns` is where the zone's name is looked up. Raise OSError for one that is no interface.
    """
    address, percent, zone = host.partition("%")
    if not percent:
        return (host, port)
    if zone.isascii() and zone.isdigit():
        return (address, port, 0, int(zone))
    return (address, port, 0, _index_of(zone, netns))


def _index_of(interface: str, netns: str) -> int:
    if netns:
        from .netns import inside

        with inside(netns):
            return _index_of(interface, "")
    try:
        return socket.if_nametoindex(interface)
    except OSError as exc:
        raise OSError(ENODEV, os.strerror(ENODEV)) from exc


# ---- making sockets -----------------------------------------------------------------------------
def make_socket(family: int, kind: int, netns: str = "", proto: int = 0) -> socket.socket:
    """Make a non-blocking socket, in the network namespace `netns` (a name or a path) if given."""
    if netns:
        from .netns import inside  # brings ctypes along, which only services in another namespace need

        with inside(netns):
            return socket.socket(family, kind | _NONBLOCK, proto)
    return socket.socket(family, kind | _NONBLOCK, proto)


@dataclass(frozen=True, slots=True)
class ListenOptions:
    """How a listening socket is made.

    transparent   IP_TRANSPARENT / IPV6_TRANSPARENT: accepts connections to foreign addresses (needs CAP_NET_ADMIN)
    mark          SO_MARK of the socket and of what it accepts, 0 for none
    """

    reuse_port: bool = False
    mptcp: bool = False
    transparent: bool = False
    keepalive: Keepalive | None = DEFAULT_KEEPALIVE
    netns: str = ""
    backlog: int = 4096
    mark: int = 0


def _family_of(address: Endpoint) -> tuple[int, str]:
    """Return (family, host to bind): "" and :: are dual stack, a name is looked up by the C library."""
    if address.host in ("", "::"):
        return socket.AF_INET6, "::"
    ip = parse_ip(address.host)
    if ip is not None:
        return (socket.AF_INET6, address.host) if ip.version == 6 else (socket.AF_INET, str(ip))
    try:
        found = socket.getaddrinfo(address.host, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise ConfigError("", f"address {address}: {address.host!r} has no address: {exc.strerror}") from exc
    family, _, _, _, sockaddr = min(found, key=lambda item: item[0] != socket.AF_INET)
    return family, str(sockaddr[0])


def _bound(address: Endpoint, kind: int, options: ListenOptions) -> socket.socket:
    family, host = _family_of(address)
    proto = IPPROTO_MPTCP if options.mptcp and kind == socket.SOCK_STREAM else 0
    try:
        sock = make_socket(family, kind, options.netns, proto)
    except OSError as exc:
        if family != socket.AF_INET6 or host != "::":
            raise KernelError(f"listen {address}", exc.errno or 0) from exc
        family, host = socket.AF_INET, "0.0.0.0"  # a host without IPv6
        sock = make_socket(family, kind, options.netns, proto)
    try:
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if options.reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        if options.transparent:
            set_transparent(sock)
        if options.mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, options.mark)
        sock.bind(sockaddr_of(host, address.port, options.netns))
        return sock
    except OSError as exc:
        sock.close()
        hint = ""
        if exc.errno == 13 and address.port < 1024:
            hint = "ports below 1024 need CAP_NET_BIND_SERVICE"
        raise KernelError(f"listen {address}", exc.errno or 0, hint=hint) from exc
    except BaseException:
        sock.close()
        raise


def is_own_address(host: str, netns: str = "") -> bool:
    """Tell whether an IP address is this machine's, or that namespace's: others take IP_TRANSPARENT to be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with make_socket(family, socket.SOCK_DGRAM, netns) as probe:
        try:
            probe.bind(sockaddr_of(host, 0, netns))
        except OSError:
            return False
    return True


def set_transparent(sock: socket.socket) -> None:
    """Let a socket bind and accept foreign addresses. Raise KernelError that names the capability."""
    try:
        sock.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    except OSError as exc:
        raise KernelError("IP_TRANSPARENT", exc.errno or 0, hint="transparent sockets need CAP_NET_ADMIN") from exc


def listen_tcp(address: Endpoint, options: ListenOptions = ListenOptions()) -> socket.socket:
    """Return a listening socket; an empty host is both families. Raise KernelError or ConfigError."""
    sock = _bound(address, socket.SOCK_STREAM, options)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        if options.keepalive is not None:
            options.keepalive.apply(sock)
        sock.listen(options.backlog)
    except OSError as exc:
        sock.close()
        raise KernelError(f"listen {address}", exc.errno or 0) from exc
    return sock


def listen_udp(address: Endpoint, options: ListenOptions = ListenOptions()) -> socket.socket:
    """Return a bound UDP socket with large buffers. Raise KernelError or ConfigError."""
    sock = _bound(address, socket.SOCK_DGRAM, options)
    enlarge_buffers(sock)
    return sock


def listening_udp(address: Endpoint, options: ListenOptions = ListenOptions()) -> UdpSocket:
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


@dataclass(frozen=True, slots=True)
class DialOptions:
    """How outgoing sockets are made.

    mark        SO_MARK, 0 for none
    interface   an interface name (bind to device) or a source address
    strict      fail when `interface` cannot be used, instead of going on without it
    netns       a network namespace by name or path
    """

    mark: int = 0
    interface: str = ""
    strict: bool = False
    netns: str = ""
    keepalive: Keepalive = DEFAULT_KEEPALIVE

    def apply(self, sock: socket.socket, target: str) -> None:
        """Set mark and interface on a socket that will talk to the IP address `target` ("" for any)."""
        if self.mark:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self.mark)
            except OSError as exc:
                raise KernelError("SO_MARK", exc.errno or 0, hint="marking sockets needs CAP_NET_ADMIN") from exc
        if self.interface:
            self._bind_interface(sock, target)

    def _bind_interface(self, sock: socket.socket, target: str) -> None:
        source = parse_ip(self.interface)
        if source is not None:
            wanted = socket.AF_INET6 if source.version == 6 else socket.AF_INET
            if sock.family == wanted:
                sock.bind(sockaddr_of(self.interface, 0, self.netns))
            elif self.strict:
                raise OSError(97, f"{self.interface} cannot reach the other address family")
            return
        ip = parse_ip(target)
        # GOST: addresses that are not global unicast are reached without the device binding (transports 1.9).
        if ip is None or not (ip.is_loopback or ip.is_multicast or ip.is_link_local or ip.is_unspecified):
            sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, self.interface.encode() + b"\0")


PLAIN = DialOptions()


async def connect_tcp(host: str, port: int, options: DialOptions = PLAIN) -> SocketStream:
    """Connect to an IP address. Raise DialError; a cancelled connect leaves no socket."""
    where = Endpoint(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = make_socket(family, socket.SOCK_STREAM, options.netns)
    except OSError as exc:
        raise dial_error(exc, where) from exc
    stream: SocketStream | None = None
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        options.keepalive.apply(sock)
        if options is not PLAIN:
            options.apply(sock, host)
        stream = SocketStream(sock, ANY, where)
        code = sock.connect_ex((host, port) if "%" not in host else sockaddr_of(host, port, options.netns))
        if code == 115:  # EINPROGRESS
            await stream.wait_connected(where)
        elif code:
            raise OSError(code, os.strerror(code))
        stream.local = Endpoint.from_sockaddr(sock.getsockname())
        return stream
    except OSError as exc:
        _drop(stream, sock)
        raise dial_error(exc, where) from exc
    except BaseException:
        _drop(stream, sock)
        raise


def _drop(stream: SocketStream | None, sock: socket.socket) -> None:
    if stream is not None:
        stream.abort()
    else:
        sock.close()


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
