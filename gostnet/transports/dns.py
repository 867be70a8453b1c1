"""The listener `dns`: queries over UDP, TCP, TLS, or HTTPS (RFC 1035 section 4.2, RFC 7858, RFC 8484)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.address import Endpoint
from ..core.datagrams import Datagram, Datagrams
from ..core.flow import Flow
from ..core.options import Bytes, Seconds, opt
from ..core.sockets import ListenOptions
from ..core.udp_socket import UdpSocket, listening_udp
from ..pipeline.transport import Listener, ListenerContext, Source
from .tcp import TcpOptions, TcpSource


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsOptions:
    """Options of the listener `dns`."""

    mode: str = opt("udp", "How queries come.", choices=("udp", "tcp", "tls", "https"))
    read_buffer_size: Bytes = opt(512, "Accepted for compatibility: messages of every size are read whole.")
    read_timeout: Seconds = opt(0.0, "Accepted for compatibility: the handler's `readTimeout` holds.")
    write_timeout: Seconds = opt(0.0, "Accepted for compatibility: clients have 10s to take an answer.")
    backlog: int = opt(128, "Accepted for compatibility: the kernel's limit holds.")
    mptcp: bool = opt(False, "Accept Multipath TCP where the kernel has it.")
    reuseport: bool = opt(False, "Let several processes share the port (SO_REUSEPORT).")


class DnsUdpSource(Source[Datagrams]):
    """A UDP socket whose every datagram is a conversation of its own: a client's next query waits for nothing.

    No datagram, however odd, ends it.
    """

    network = "udp"
    yields = Datagrams

    def __init__(self, address: Endpoint, *, netns: str = "", reuse_port: bool = False) -> None:
        self.address = address
        self._wanted = address
        self._listen = ListenOptions(netns=netns, reuse_port=reuse_port)
        self._socket: UdpSocket | None = None

    async def open(self) -> None:
        """Bind; `address` then tells the port that was given."""
        self._socket = listening_udp(self._wanted, self._listen)
        self.address = self._socket.local

    async def accept(self) -> Sequence[tuple[Flow, Datagrams]]:
        """Return what has arrived."""
        assert self._socket is not None, "accept before open"
        batch = await self._socket.receive()
        return [(Flow("", item.peer, item.local or self.address, "udp"), Question(item, self)) for item in batch]

    def answer(self, batch: Sequence[Datagram]) -> None:
        """Send without waiting; nothing once the socket is closed."""
        if self._socket is not None:
            self._socket.send_now(batch)

    async def aclose(self) -> None:
        """Close the socket; questions in work are not answered any more."""
        self.abort()

    def abort(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.abort()
            self._socket = None


class Question(Datagrams):
    """What one datagram brought, and the way back to its sender, from the address that was asked."""

    __slots__ = ("_asked", "_datagram", "_source")

    def __init__(self, datagram: Datagram, source: DnsUdpSource) -> None:
        super().__init__(datagram.local or source.address)
        self._asked = datagram.local
        self._datagram: Datagram | None = datagram
        self._source = source

    async def receive(self) -> Sequence[Datagram]:
        datagram, self._datagram = self._datagram, None
        return () if datagram is None else (datagram,)

    async def send(self, batch: Sequence[Datagram]) -> None:
        for datagram in batch:
            datagram.local = self._asked
        self._source.answer(batch)

    async def aclose(self) -> None:
        self._datagram = None

    def abort(self) -> None:
        self._datagram = None


class DnsHttpsSource(TcpSource):
    """A listening socket whose connections become conversations of datagrams: what the handler gets."""

    yields: ClassVar[type[Any]] = Datagrams


def dns_listener(address: Endpoint, options: DnsOptions, context: ListenerContext) -> Listener:
    """Build the listener of a mode. Raise ConfigError."""
    if options.mode == "udp":
        return Listener("dns", DnsUdpSource(address, netns=context.netns, reuse_port=options.reuseport))
    tcp = TcpOptions(mptcp=options.mptcp, reuseport=options.reuseport)
    if options.mode == "https":
        from .dns_https import ALPN, DnsOverHttps  # brings an HTTP parser along

        layers = (context.tls_layer(ALPN), DnsOverHttps())
        return Listener("dns", DnsHttpsSource(address, tcp, netns=context.netns), layers)
    source = TcpSource(address, tcp, netns=context.netns)
    return Listener("dns", source, (context.tls_layer(),) if options.mode == "tls" else ())
