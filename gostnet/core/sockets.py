"""Streams that own a kernel socket, and how such sockets, and those of datagrams, are made.

This is the border at which `OSError` becomes one of our errors.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from errno import ENODEV, ENOTCONN
from select import EPOLLERR, EPOLLHUP, EPOLLRDHUP
from typing import TypeAlias

from .address import ANY, Endpoint, parse_ip
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

    __slots__ = ("_eof_sent", "_local", "_sock", "readiness", "received", "sent")

    def __init__(
        self, sock: socket.socket, local: Endpoint | None = ANY, remote: Endpoint = ANY, hub: Hub | None = None
    ) -> None:
        """Take a connected, non-blocking socket; it is ours to close from now on.

        With None for `local` the kernel is asked when somebody wants to know.
        """
        self._local = local
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

    @property
    def local(self) -> Endpoint:
        """Our address: few ask for that of a connection we have made, and it costs a system call."""
        local = self._local
        if local is None:
            try:
                local = Endpoint.from_sockaddr(self._sock.getsockname())
            except OSError:  # closed by now
                local = ANY
            self._local = local
        return local

    @local.setter
    def local(self, local: Endpoint) -> None:
        self._local = local

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

    def surrender(self) -> int:
        """Leave the socket's edges to an engine, and return the descriptor, which stays ours to close."""
        readiness = self.readiness
        if readiness.registered:
            readiness.hub.surrender(readiness.fd)
            readiness.registered = False
        return readiness.fd

    def lend(self) -> int:
        """Give the descriptor away to an engine that will close it, or have it given back by `regain`.

        Until then the stream is as good as closed: who aborts it does nothing.
        """
        self.surrender()
        self.readiness.fd = -1
        return self._sock.detach()

    def regain(self, descriptor: int) -> None:
        """Own the descriptor again that was lent."""
        self._sock = self.readiness.sock = socket.socket(fileno=descriptor)
        self._sock.setblocking(False)
        self.readiness.fd = descriptor

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


def bound_socket(address: Endpoint, kind: int, options: ListenOptions) -> socket.socket:
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
    sock = bound_socket(address, socket.SOCK_STREAM, options)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        if options.keepalive is not None:
            options.keepalive.apply(sock)
        sock.listen(options.backlog)
    except OSError as exc:
        sock.close()
        raise KernelError(f"listen {address}", exc.errno or 0) from exc
    return sock


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
        stream = SocketStream(sock, None, where)
        code = sock.connect_ex((host, port) if "%" not in host else sockaddr_of(host, port, options.netns))
        if code == 115:  # EINPROGRESS
            await stream.wait_connected(where)
        elif code:
            raise OSError(code, os.strerror(code))
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
