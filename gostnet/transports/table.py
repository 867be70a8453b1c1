"""The table of stacks: which parts stand behind the name of a listener or a dialer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.address import ANY, Endpoint
from ..core.contracts import Layer
from ..core.egress import Egress
from ..core.flow import Flow
from ..core.options import Seconds, group, opt
from ..core.registry import COMPONENTS, register
from ..core.stream import CHUNK, Buffer, Stream
from ..pipeline.transport import Listener, ListenerContext, StreamDialer, Transport
from .dns import DnsOptions, dns_listener
from .tcp import KeepaliveOptions, TcpOptions, TcpSource
from .udp import UdpOptions, UdpSource


@dataclass(frozen=True, slots=True)
class ListenerStack:
    """The parts of a listener: what it opens, and the options of all of them."""

    name: str
    Options: type[Any]
    build: Callable[[Endpoint, Any, ListenerContext], Listener]

    def make(self, address: Endpoint, options: Any, context: ListenerContext) -> Listener:
        """Build a listener. Raise ConfigError."""
        return self.build(address, options, context)


def _tcp(address: Endpoint, options: TcpOptions, context: ListenerContext) -> Listener:
    return Listener("tcp", TcpSource(address, options, netns=context.netns))


def _tls(address: Endpoint, options: TcpOptions, context: ListenerContext) -> Listener:
    return Listener("tls", TcpSource(address, options, netns=context.netns), (context.tls_layer(),))


def _udp(address: Endpoint, options: UdpOptions, context: ListenerContext) -> Listener:
    return Listener("udp", UdpSource(address, options, netns=context.netns, log=context.log))


LISTENERS = (
    ListenerStack("tcp", TcpOptions, _tcp),
    ListenerStack("tls", TcpOptions, _tls),
    ListenerStack("udp", UdpOptions, _udp),
    ListenerStack("dns", DnsOptions, dns_listener),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpDialOptions:
    """Options of dialers that stand on TCP."""

    keepalive: KeepaliveOptions = group(KeepaliveOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsDialOptions:
    """Options of the dialer `tls`."""

    handshake_timeout: Seconds = opt(0.0, "Deadline of the TLS handshake; 0 leaves it to the route's deadline.")
    keepalive: KeepaliveOptions = group(KeepaliveOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoDialOptions:
    """Options of dialers that have none."""


@dataclass(frozen=True, slots=True)
class DialerStack:
    """The parts of a dialer.

    tls    the node's TLS options are used; its Options have `handshake_timeout`
    """

    name: str
    Options: type[Any]
    tls: bool = False
    connects: bool = True

    def make(self, options: Any, tls: Callable[[float], Layer]) -> Transport:
        """Build the transport of a node; `tls` makes the layer, its handshake bounded in seconds. Raise ConfigError."""
        dialer = StreamDialer() if self.connects else NoDialer()
        return Transport(self.name, dialer, (tls(options.handshake_timeout),) if self.tls else ())


DIALERS = (
    DialerStack("tcp", TcpDialOptions),
    DialerStack("tls", TlsDialOptions, tls=True),
    DialerStack("direct", NoDialOptions, connects=False),
    DialerStack("virtual", NoDialOptions, connects=False),
)


class NoDialer:
    """The dialers `direct` and `virtual`: nothing is dialled, the connector does it all."""

    async def dial(self, flow: Flow, address: Endpoint, lower: Egress) -> Stream:
        """Return a stream that is at its end."""
        return _Nothing()


class _Nothing(Stream):
    """The empty stream below connectors that dial for themselves."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(ANY, ANY)

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        return self._take_head(max_bytes)

    async def send(self, data: Buffer) -> None:
        return None

    async def send_eof(self) -> None:
        return None

    async def aclose(self) -> None:
        return None

    def abort(self) -> None:
        return None


INGRESS = {
    "red": "gostnet.ingress.redirect",
    "redir": "gostnet.ingress.redirect",
    "redirect": "gostnet.ingress.redirect",
    "redu": "gostnet.ingress.tproxy",
    "tap": "gostnet.ingress.tap",
    "tun": "gostnet.ingress.tun",
    "tungo": "gostnet.ingress.tungo",
}
"""Listeners that live where the kernel feeds the pipeline."""


def declare() -> None:
    """Put the stacks into the registry."""
    for listener in LISTENERS:
        register("listener", listener, (listener.name,))
    for dialer in DIALERS:
        register("dialer", dialer, (dialer.name,))
    COMPONENTS.listeners.declare(INGRESS)
