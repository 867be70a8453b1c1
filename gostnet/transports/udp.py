"""UDP: the listener's source, with a session for each peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ..core.address import ANY, Endpoint
from ..core.batches import BATCH
from ..core.datagrams import Datagram, Datagrams
from ..core.errors import ConnError
from ..core.flow import Flow
from ..core.log import Logger
from ..core.options import Bytes, Seconds, opt
from ..core.sockets import ListenOptions
from ..core.stream import Buffer
from ..core.udp_socket import UdpSocket, listening_udp
from ..dataplane.native.joints import PINNED, joints
from ..dataplane.sessions import Answer, Inlet, Session, Sessions, in_turns, offer
from ..pipeline.transport import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class UdpOptions:
    """Options of the UDP source (transports 11.1)."""

    backlog: int = opt(128, "New peers that may wait to be served; more are dropped.")
    keepalive: bool = opt(False, "Keep a peer's session until it is idle; otherwise it ends after one reply.")
    ttl: Seconds = opt(5.0, "Idle time after which a peer's session ends.", aliases=("keepalive.ttl",))
    read_buffer_size: Bytes = opt(
        65535, "Accepted for compatibility; datagrams are never cut.", aliases=("udp.bufferSize",)
    )
    read_queue_size: int = opt(128, "Datagrams held per peer; more are dropped.", aliases=("recvQueueSize",))
    stateless: bool = opt(False, "Treat every datagram as a peer of its own.")
    reuseport: bool = opt(False, "Let several processes share the port (SO_REUSEPORT).")


Key = tuple[Endpoint, Endpoint]
"""Of a session: its peer, and the address that the peer has asked, `ANY` where the listener has only one."""


class UdpSource(Source[Session[Key]]):
    """A UDP socket whose peers are handed out one by one. No datagram, however odd, ends it.

    Where it is bound to no address in particular, answers leave from the address that was asked.
    """

    network = "udp"
    yields = Datagrams

    def __init__(self, address: Endpoint, options: UdpOptions, *, netns: str = "", log: Logger | None = None) -> None:
        self.address = address
        self._log = log
        self._wanted = address
        self._options = options
        self._listen = ListenOptions(netns=netns, reuse_port=options.reuseport)
        self._socket: UdpSocket | None = None
        self._sessions: Sessions[Key] | None = None
        self._inlet: Inlet[tuple[Flow, Session[Key]]] | None = None
        self._stateless = options.stateless
        self._single = options.stateless or not options.keepalive
        self._fresh: list[tuple[Flow, Session[Key]]] = []
        self._serial = 0

    async def open(self) -> None:
        """Bind; `address` then tells the port that was given."""
        options = self._options
        socket = self._socket = listening_udp(self._wanted, self._listen)
        self.address = socket.local
        sessions = self._sessions = Sessions(
            options.ttl if options.ttl > 0 else 5.0,
            options.read_queue_size if options.read_queue_size > 0 else 128,
            log=self._log,
        )
        if not self._stateless:
            flags = PINNED if socket.pinned else 0
            sessions.joints = joints(socket.readiness, self._arrived, sessions.say_once, flags)
        self._inlet = Inlet(socket.readiness, self._feed)

    async def accept(self) -> Sequence[tuple[Flow, Session[Key]]]:
        """Feed the sessions; return those of new peers."""
        assert self._inlet is not None, "accept before open"
        return await self._inlet.take()

    def _feed(self) -> list[tuple[Flow, Session[Key]]]:
        """Feed the sessions with what has arrived, in turns with the others."""
        socket, sessions, inlet = self._socket, self._sessions, self._inlet
        if socket is None or sessions is None or inlet is None:
            raise ConnError("closed by this side")
        table = sessions.joints
        if not in_turns(partial(self._receive, socket) if table is None else table.up, self._fresh):
            inlet.again()
        fresh, self._fresh = self._fresh, []
        return fresh

    def _receive(self, socket: UdpSocket) -> bool:
        """Deliver what has arrived; return whether there may be more."""
        received = socket.receive_now()
        self._arrived([(datagram.peer, datagram.local or ANY, datagram.data, 0) for datagram in received])
        return len(received) == BATCH

    def _arrived(self, arrived: Sequence[tuple[Endpoint, Endpoint, Buffer, int]]) -> None:
        """Deliver a batch."""
        if self._sessions is not None:
            with self._sessions.batch():
                for peer, asked, data, stride in arrived:
                    self._deliver(peer, asked, data, stride)

    def _deliver(self, peer: Endpoint, asked: Endpoint, data: Buffer, stride: int) -> None:
        """Give a datagram to its session, which is made if there is none."""
        sessions = self._sessions
        if sessions is None:
            return
        asked = Endpoint(asked.host, 0)
        key = (peer, asked)
        if self._stateless:
            self._serial += 1
            key = (peer, Endpoint(asked.host, self._serial))  # no port, but another number for each
        session = sessions.find(key)
        if session is None:
            local = Endpoint(asked.host, self.address.port) if asked.host else self.address
            session = sessions.open(key, peer, local, self._answer_from(asked), single=self._single)
            if not self._stateless:
                session.asked = asked
            self._fresh.append((Flow("", peer, local, "udp"), session))
        offer(session, peer, data, stride)

    def _answer_from(self, asked: Endpoint) -> Answer:
        if not asked.host:
            return self._answer

        def answer(batch: Sequence[Datagram]) -> None:
            for datagram in batch:
                datagram.local = asked
            self._answer(batch)

        return answer

    def _answer(self, batch: Sequence[Datagram]) -> None:
        if self._socket is not None:
            self._socket.send_now(batch)

    async def aclose(self) -> None:
        """Close the socket; sessions cannot answer any more and end."""
        self.abort()

    def abort(self) -> None:
        """Close the socket and end the sessions."""
        if self._sessions is not None:
            self._sessions.close()
            self._sessions = None
        if self._socket is not None:
            self._socket.abort()
            self._socket = None
        if self._inlet is not None:
            self._inlet.close()
