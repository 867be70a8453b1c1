"""Captured UDP: the listener `redu`, by TPROXY.

Answers leave by a raw socket with the original destination as their source. No socket is ever bound to that address:
another process may hold its port (a local name server on 53), or want it later.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address

from ..core import batches
from ..core.address import Endpoint, IPAddress
from ..core.datagrams import Datagram, Datagrams, pieces
from ..core.errors import ConnError, DialError, KernelError
from ..core.flow import Flow
from ..core.hub import READABLE
from ..core.log import Logger
from ..core.options import Bytes, Seconds, group, opt
from ..core.registry import register
from ..core.resources import MARK_OWN, Resource
from ..core.sockets import ListenOptions, Readiness, is_own_address, make_socket
from ..core.stream import Buffer
from ..core.udp_socket import enlarge_buffers, listen_udp
from ..dataplane.native.joints import CAPTURED, joints
from ..dataplane.sessions import Inlet, Session, Sessions, in_turns, offer
from ..pipeline.transport import Listener, ListenerContext, Source
from ..wire import icmp
from ..wire.ip import UDP, UdpWay, ipv4_packets, ipv6_packets, udp_payload
from .capture import CaptureOptions, CaptureRequest

MIN_MTU = 1280
"""Bytes: fragments of this size pass any IPv6 link and, in practice, any IPv4 one."""

Pair = tuple[Endpoint, Endpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduOptions:
    """Options of the listener for captured UDP (transports 9)."""

    ttl: Seconds = opt(30.0, "Idle time after which a flow ends.")
    read_buffer_size: Bytes = opt(65535, "Accepted for compatibility; datagrams are never cut.")
    reuseport: bool = opt(False, "Let several processes share the port (SO_REUSEPORT).")
    capture: CaptureOptions = group(CaptureOptions)


class RawSender:
    """Sends UDP datagrams from addresses that are not ours."""

    def __init__(self, netns: str) -> None:
        """Open the raw sockets. Raise KernelError that names the capability."""
        self._ident = itertools.count(int.from_bytes(os.urandom(4), "big"))
        self.dropped = 0
        self._v6: socket.socket | None = None
        try:
            self._v4 = self._open(socket.AF_INET, netns)
        except OSError as exc:
            raise KernelError("raw socket", exc.errno or 0, hint="answers to captured UDP need CAP_NET_RAW") from exc
        try:
            self._v6 = self._open(socket.AF_INET6, netns)
        except OSError:
            pass  # a host without IPv6 has no IPv6 flows to answer

    @staticmethod
    def _open(family: int, netns: str) -> socket.socket:
        # IPPROTO_RAW: we write the IP header ourselves, for both families.
        sock = make_socket(family, socket.SOCK_RAW, netns, socket.IPPROTO_RAW)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK_OWN)
            enlarge_buffers(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    @property
    def descriptors(self) -> tuple[int, int]:
        """The sockets of IPv4 and IPv6, -1 for none."""
        return self._v4.fileno(), self._v6.fileno() if self._v6 is not None else -1

    def send(self, source: Endpoint, destination: Endpoint, data: bytes) -> None:
        """Send one datagram; what the kernel refuses is dropped and counted."""
        here, there = source.ip, destination.ip
        if here is None or there is None or here.version != there.version:
            self.dropped += 1
            return
        payload = udp_payload(here.packed, there.packed, source.port, destination.port, data)
        self.send_packet(here, there, payload, UDP)

    def send_by(self, way: UdpWay, destination: str, data: Buffer) -> bool:
        """Send one datagram as a packet whose headers are prepared; False if it takes fragments, or more effort."""
        sock = self._v6 if ":" in destination else self._v4
        if sock is None or len(data) > way.largest:
            return False
        try:
            sock.sendto(way.packet(data), (destination, 0))
        except (BlockingIOError, InterruptedError):
            self.dropped += 1
        except OSError:
            return False
        return True

    def refuse(self, client: Endpoint, target: Endpoint, size: int) -> None:
        """Answer a datagram of `size` bytes as a host does that has nobody at this port."""
        here, there = target.ip, client.ip
        if here is not None and there is not None and here.version == there.version:
            message = icmp.port_unreachable(there, client.port, here, target.port, size)
            self.send_packet(here, there, message, icmp.PROTOCOL[here.version])

    def send_packet(self, here: IPAddress, there: IPAddress, payload: bytes, protocol: int) -> None:
        """Send an IP packet, in fragments where it must be; what the kernel refuses is dropped and counted."""
        sock = self._v4 if here.version == 4 else self._v6
        if sock is None:
            self.dropped += 1
            return
        ident = next(self._ident)
        for mtu in (65535, 1500, MIN_MTU):
            if mtu < 65535 or len(payload) + 40 <= 1500:
                try:
                    self._send_packets(sock, here, there, payload, mtu, ident, protocol)
                except (BlockingIOError, InterruptedError):
                    break
                except OSError as exc:
                    if exc.errno != errno.EMSGSIZE:
                        break
                else:
                    return
        self.dropped += 1

    @staticmethod
    def _send_packets(
        sock: socket.socket, here: IPAddress, there: IPAddress, payload: bytes, mtu: int, ident: int, protocol: int
    ) -> None:
        if isinstance(here, IPv4Address):
            assert isinstance(there, IPv4Address)
            packets = ipv4_packets(here, there, payload, mtu, ident & 0xFFFF, protocol)
        else:
            assert isinstance(there, IPv6Address)
            packets = ipv6_packets(here, there, payload, mtu, ident & 0xFFFFFFFF, protocol)
        for packet in packets:
            sock.sendto(packet, (str(there), 0))

    def close(self) -> None:
        """Close the sockets."""
        self._v4.close()
        if self._v6 is not None:
            self._v6.close()


class _Captured(Sessions[Pair]):
    """Sessions whose clients are told when their flow could not be opened."""

    def __init__(self, ttl: float, sender: RawSender, log: Logger) -> None:
        super().__init__(ttl, log=log)
        self._sender = sender
        self._begun: dict[Pair, tuple[Flow, int]] = {}

    def note(self, key: Pair, flow: Flow, size: int) -> None:
        """Remember a session's flow, and the size of the datagram that began it."""
        self._begun[key] = (flow, size)

    def forget(self, session: Session[Pair]) -> None:
        """Take a session out; a destination that could not be reached is a port that nobody listens at, to its client.

        So is one whose own host has said so: what has come from there is told on.
        """
        super().forget(session)
        flow, size = self._begun.pop(session.key, (None, 0))
        if flow is not None and isinstance(flow.error, DialError):
            self._sender.refuse(*session.key, size)


class ReduSource(Source[Session[Pair]]):
    """A transparent UDP socket; each pair of client and original destination is a session and a flow."""

    network = "udp"
    yields = Datagrams

    def __init__(
        self, address: Endpoint, options: ReduOptions, request: CaptureRequest | None, context: ListenerContext
    ) -> None:
        self.address = address
        self._wanted = address
        self._options = options
        self._request = request
        self._context = context
        self._readiness: Readiness | None = None
        self._name = 0
        self._sender: RawSender | None = None
        self._sessions: _Captured | None = None
        self._inlet: Inlet[tuple[Flow, Session[Pair]]] | None = None
        self._fresh: list[tuple[Flow, Session[Pair]]] = []

    @property
    def readiness(self) -> Readiness:
        """The socket and who waits for it; only while it is open."""
        assert self._readiness is not None, "accept before open"
        return self._readiness

    @property
    def sender(self) -> RawSender:
        """What sends from addresses of others; only while it is open."""
        assert self._sender is not None
        return self._sender

    async def open(self) -> None:
        """Bind; needs CAP_NET_ADMIN and CAP_NET_RAW. Raise KernelError."""
        listen = ListenOptions(netns=self._context.netns, transparent=True, reuse_port=self._options.reuseport)
        sock = listen_udp(self._wanted, listen)
        try:
            sock.setsockopt(socket.SOL_IP, batches.IP_ORIGDSTADDR, 1)
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, batches.IPV6_ORIGDSTADDR, 1)
            self._sender = RawSender(self._context.netns)
        except OSError as exc:
            sock.close()
            raise KernelError(f"listen {self._wanted}", exc.errno or 0) from exc
        except BaseException:
            sock.close()
            raise
        self._readiness = Readiness(sock)
        self._name = 28 if sock.family == socket.AF_INET6 else 16
        self.address = Endpoint.from_sockaddr(sock.getsockname())
        sessions = self._sessions = _Captured(
            self._options.ttl if self._options.ttl > 0 else 30.0, self.sender, self._context.log
        )
        raw = self.sender.descriptors
        sessions.joints = joints(self.readiness, self._arrived, sessions.say_once, CAPTURED, raw)

    async def accept(self) -> Sequence[tuple[Flow, Session[Pair]]]:
        """Feed the sessions; return new flows, their targets known."""
        if self._inlet is None:
            self._inlet = Inlet(self.readiness, self.accept_now)
        return await self._inlet.take()

    def accept_now(self) -> list[tuple[Flow, Session[Pair]]]:
        """Feed the sessions with what has arrived; return new flows, [] if one shall wait for more."""
        readiness, sessions = self.readiness, self._sessions
        if sessions is None:
            raise ConnError("closed by this side")
        table = sessions.joints
        if not in_turns(self._take_some if table is None else table.up, self._fresh):
            if self._inlet is not None:
                self._inlet.again()
            else:
                readiness.hub.call_ready(partial(readiness.on_events, READABLE))
        fresh, self._fresh = self._fresh, []
        return fresh

    def _take_some(self) -> bool:
        """Deliver what has arrived, without what is no captured datagram; return whether there may be more."""
        readiness = self.readiness
        room = batches.arena(readiness.hub)
        try:
            count = room.receive(readiness.fd)
        except OSError:
            return True  # it was about one datagram, and has taken the place of what may be there
        found = []
        for index in range(count):
            target = batches.original_destination(room.control(index))
            if target is not None:
                found.append((batches.endpoint_of(room.name(index, self._name)), target, room.payload(index), 0))
        room.reset(count)
        self._arrived(found)
        return count == batches.BATCH

    def _arrived(self, arrived: Sequence[tuple[Endpoint, Endpoint, bytes, int]]) -> None:
        """Deliver a batch."""
        if self._sessions is not None:
            with self._sessions.batch():
                for client, target, data, stride in arrived:
                    self._fresh += self.take(data, client, target, stride)

    def take(
        self, data: bytes, client: Endpoint, target: Endpoint, stride: int = 0
    ) -> list[tuple[Flow, Session[Pair]]]:
        """Give a datagram to its session; return that, with its flow, if it is a new one."""
        sessions = self._sessions
        assert sessions is not None
        fresh = []
        key = (client, target)
        session = sessions.find(key)
        if session is None:
            session = self._begin(sessions, client, target)
            flow = Flow("", client, self.address, "udp", target)
            sessions.note(key, flow, stride or len(data))
            if target.port == self.address.port and is_own_address(target.host, self._context.netns):
                flow.target = None
                flow.reason = "not a captured datagram: it was sent to the listener itself"
            fresh.append((flow, session))
        offer(session, client, data, stride)
        return fresh

    def _begin(self, sessions: Sessions[Pair], client: Endpoint, target: Endpoint) -> Session[Pair]:
        sender = self._sender
        assert sender is not None

        here, there = target.ip, client.ip
        way, where = None, str(there)
        if here is not None and there is not None and here.version == there.version:
            way = UdpWay(here, there, (target.port, client.port))

        def answer(batch: Sequence[Datagram]) -> None:
            for datagram in batch:
                for data in pieces(datagram):
                    if way is None or not sender.send_by(way, where, data):
                        sender.send(target, client, bytes(data))

        session = sessions.open((client, target), client, target, answer)
        session.asked = target
        return session

    def resources(self) -> Sequence[Resource]:
        """Return the capture, if one is asked for."""
        if self._request is None:
            return ()
        return (self._request.resource(self._context.service, "udp", "tproxy", self.address),)

    async def aclose(self) -> None:
        """Close the sockets and end the sessions."""
        self.abort()

    def abort(self) -> None:
        """Close the sockets and end the sessions."""
        if self._sessions is not None:
            self._sessions.close()
            self._sessions = None
        if self._readiness is not None:
            self._readiness.release()
            self._readiness = None
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self._inlet is not None:
            self._inlet.close()
            self._inlet = None


class ReduListener:
    """The stack behind the name."""

    Options = ReduOptions

    @staticmethod
    def make(address: Endpoint, options: ReduOptions, context: ListenerContext) -> Listener:
        """Build a listener."""
        request = CaptureRequest.of(options.capture, f"{context.path}.metadata")
        return Listener("redu", ReduSource(address, options, request, context))


register("listener", ReduListener, ("redu",))
