"""TCP: the listener's source."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.address import ANY, Endpoint
from ..core.flow import Flow
from ..core.options import Seconds, group, opt
from ..core.sockets import DEFAULT_KEEPALIVE, Keepalive, ListenOptions, Readiness, SocketStream, listen_tcp
from ..core.stream import Stream
from ..pipeline.transport import AcceptError, Source

BATCH = 64
"""Connections accepted per turn: the queue is emptied quickly and running flows still get their share."""

_STREAM = int(socket.SOCK_STREAM)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepaliveOptions:
    """TCP keepalive of accepted or dialled connections (transports 1.8)."""

    keepalive: bool = opt(False, "Set TCP keepalive from the three keys below instead of the defaults.")
    keepalive_idle: Seconds = opt(15.0, "Seconds before the first keepalive probe.", key="keepalive.idle")
    keepalive_interval: Seconds = opt(15.0, "Seconds between keepalive probes.", key="keepalive.interval")
    keepalive_count: int = opt(9, "Unanswered probes after which the peer counts as dead.", key="keepalive.count")

    def value(self) -> Keepalive:
        """Return what is to be set; values below 1 mean the default."""
        if not self.keepalive:
            return DEFAULT_KEEPALIVE
        return Keepalive(
            int(self.keepalive_idle) or DEFAULT_KEEPALIVE.idle,
            int(self.keepalive_interval) or DEFAULT_KEEPALIVE.interval,
            self.keepalive_count if self.keepalive_count > 0 else DEFAULT_KEEPALIVE.count,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpOptions:
    """Options of the TCP source, shared by every listener that stands on it."""

    mptcp: bool = opt(False, "Accept Multipath TCP where the kernel has it.")
    reuseport: bool = opt(False, "Let several processes share the port (SO_REUSEPORT).")
    keepalive: KeepaliveOptions = group(KeepaliveOptions)


class TcpSource(Source[SocketStream]):
    """A listening TCP socket."""

    network = "tcp"
    yields: ClassVar[type[Any]] = Stream

    def __init__(
        self, address: Endpoint, options: TcpOptions, *, netns: str = "", transparent: bool = False, mark: int = 0
    ) -> None:
        self.address = address
        self._wanted = address
        self._listen = ListenOptions(
            reuse_port=options.reuseport,
            mptcp=options.mptcp,
            keepalive=options.keepalive.value(),
            netns=netns,
            transparent=transparent,
            mark=mark,
        )
        self._readiness: Readiness | None = None
        self._latest = ANY
        """Where the latest connection was accepted."""

    async def open(self) -> None:
        """Bind and listen; `address` then tells the port that was given."""
        sock = listen_tcp(self._wanted, self._listen)
        self._readiness = Readiness(sock)
        self.address = Endpoint.from_sockaddr(sock.getsockname())

    @property
    def readiness(self) -> Readiness:
        """The listening socket and who waits for it; only while it is open."""
        assert self._readiness is not None, "accept before open"
        return self._readiness

    async def accept(self) -> Sequence[tuple[Flow, SocketStream]]:
        """Return all waiting connections, at most BATCH."""
        readiness = self.readiness
        while True:
            batch = self.accept_now()
            if batch:
                return batch
            await readiness.readable()

    def accept_now(self) -> list[tuple[Flow, SocketStream]]:
        """Return the waiting connections, at most BATCH; [] once there are none. Raise AcceptError."""
        readiness = self.readiness
        listening, hub = readiness.sock, readiness.hub
        family = int(listening.family)
        batch: list[tuple[Flow, SocketStream]] = []
        while len(batch) < BATCH:
            try:
                # _accept gives the descriptor with O_NONBLOCK unset; accept() would also build the address twice.
                fd, address = listening._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                if exc.errno in (errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH):
                    continue  # that client is gone already; accept(2) asks to treat these like EAGAIN
                if batch:
                    break
                raise AcceptError(exc.strerror) from exc
            sock = socket.socket(family, _STREAM, 0, fileno=fd)
            sock.setblocking(False)
            client = Endpoint.from_sockaddr(address)
            stream = SocketStream(sock, ANY, client, hub)
            try:
                flow = self.flow_of(stream, client)
            except OSError:  # reset before it was accepted: the next one has nothing to do with it
                stream.abort()
                continue
            batch.append((flow, stream))
        return batch

    def flow_of(self, stream: SocketStream, client: Endpoint) -> Flow:
        """Describe an accepted connection."""
        local = Endpoint.from_sockaddr(stream.sock.getsockname())
        if local == self._latest:
            local = self._latest  # nearly always the same one, of which connections need no copies
        else:
            self._latest = local
        stream.local = local
        return Flow("", client, local)

    async def aclose(self) -> None:
        """Stop listening; what was accepted lives on."""
        self.abort()

    def abort(self) -> None:
        """Stop listening."""
        if self._readiness is not None:
            self._readiness.release()
            self._readiness = None
