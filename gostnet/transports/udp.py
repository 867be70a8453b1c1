"""UDP: the listener's source, with a session for each peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.address import Endpoint
from ..core.datagrams import Datagram, Datagrams
from ..core.flow import Flow
from ..core.options import Bytes, Seconds, opt
from ..core.sockets import ListenOptions, UdpSocket, listen_udp
from ..dataplane.sessions import Session, Sessions
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


class UdpSource(Source[Session[Endpoint]]):
    """A UDP socket whose peers are handed out one by one. No datagram, however odd, ends it."""

    network = "udp"
    yields = Datagrams

    def __init__(self, address: Endpoint, options: UdpOptions, *, netns: str = "") -> None:
        self.address = address
        self._wanted = address
        self._options = options
        self._listen = ListenOptions(netns=netns)
        self._socket: UdpSocket | None = None
        self._sessions: Sessions[Endpoint] | None = None

    async def open(self) -> None:
        """Bind; `address` then tells the port that was given."""
        options = self._options
        sock = listen_udp(self._wanted, self._listen)
        self.address = Endpoint.from_sockaddr(sock.getsockname())
        self._socket = UdpSocket(sock, self.address)
        self._sessions = Sessions(
            options.ttl if options.ttl > 0 else 5.0, options.read_queue_size if options.read_queue_size > 0 else 128
        )

    async def accept(self) -> Sequence[tuple[Flow, Session[Endpoint]]]:
        """Feed the sessions; return those of new peers."""
        socket, sessions = self._socket, self._sessions
        assert socket is not None
        assert sessions is not None
        stateless = self._options.stateless
        single = stateless or not self._options.keepalive
        while True:
            fresh: list[tuple[Flow, Session[Endpoint]]] = []
            for datagram in await socket.receive():
                session = None if stateless else sessions.find(datagram.peer)
                if session is None:
                    session = sessions.open(datagram.peer, datagram.peer, self.address, self._answer, single=single)
                    fresh.append((Flow("", datagram.peer, self.address, "udp"), session))
                if not session.offer(datagram):
                    sessions.dropped += 1
            if fresh:
                return fresh

    def _answer(self, batch: Sequence[Datagram]) -> None:
        if self._socket is not None:
            self._socket.send_now(batch)

    async def aclose(self) -> None:
        """Close the socket; sessions cannot answer any more and end."""
        self.abort()

    def abort(self) -> None:
        """Close the socket and end the sessions."""
        if self._socket is not None:
            self._socket.abort()
            self._socket = None
        if self._sessions is not None:
            self._sessions.close()
            self._sessions = None
