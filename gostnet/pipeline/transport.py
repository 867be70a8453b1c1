"""Transports: how a listener hands out connections and how a node is dialled. Stacks of parts, not a class per name.

A listener is a source (a socket that accepts) under layers (TLS and the like); a dialer is the same stack seen from the
other end. Layers run in the connection's own task, so a slow handshake never holds the accept loop.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from ..core.address import ANY, Endpoint
from ..core.contracts import Layer, Router
from ..core.egress import Egress
from ..core.flow import Flow
from ..core.log import Logger, quiet
from ..core.resources import Resource
from ..core.stream import Closable, Stream

T = TypeVar("T")


class Source(Closable, Generic[T]):
    """The bottom half of a listener: opens a socket or a device and hands out raw connections."""

    network: ClassVar[str] = "tcp"
    yields: ClassVar[type[Any]] = Stream
    """The shape of what `accept` hands out: compared with what the handler accepts when the config is built."""

    address: Endpoint = ANY

    @abstractmethod
    async def open(self) -> None:
        """Bind. Raise KernelError or ConfigError; nothing is left open then."""

    @abstractmethod
    async def accept(self) -> Sequence[tuple[Flow, T]]:
        """Wait for connections and return all that are there, at least one. Cancelling loses none.

        Raise AcceptError for a passing trouble (no descriptors left); anything else ends the service.
        """

    def resources(self) -> Sequence[Resource]:
        """Return the kernel state it needs; valid once open (the port is known then)."""
        return ()

    async def retire(self) -> None:
        """Take no more connections, and keep until `aclose` what those that run still need; nobody accepts any more.

        Most need nothing, and close here.
        """
        await self.aclose()


class Session(Closable):
    """One underlying connection that carries many streams."""

    alive: bool

    @abstractmethod
    async def open(self, flow: Flow) -> Stream:
        """Open a stream in it."""


class Multiplexer(Protocol):
    """The top of a stack whose one connection carries many streams."""

    def server(self, flow: Flow, below: Stream) -> AsyncIterator[tuple[Flow, Stream]]: ...

    async def client(self, flow: Flow, below: Stream) -> Session: ...


class Listener:
    """A source, the layers above it, and perhaps a multiplexer.

    netns      where its socket is, "" for here
    shared     every worker has a socket of its own at the same port; otherwise one worker has the listener alone
    preface    reads for whom a client speaks, before the layers; who that is decides whether it is admitted. It has a
               deadline of its own, and returns the stream that it was given
    """

    def __init__(
        self, name: str, source: Source[Any], layers: Sequence[Layer] = (), multiplexer: Multiplexer | None = None
    ) -> None:
        self.name = name
        self.source = source
        self.layers = tuple(layers)
        self.multiplexer = multiplexer
        self.netns = ""
        self.shared = False
        self.preface: Layer | None = None

    async def establish(self, flow: Flow, raw: Any) -> Any:
        """Run the layers over an accepted connection and return what the handler gets.

        The caller owns the deadline. On an error or a cancellation the connection is aborted.
        """
        conn = raw
        try:
            for layer in self.layers:
                conn = await layer.server(flow, conn)
        except BaseException:
            conn.abort()
            raise
        return conn


@dataclass(frozen=True, slots=True)
class ListenerContext:
    """What a listener is built with besides its address and options.

    path      its place in the configuration, for messages
    tls       makes the server side of TLS from the listener's certificates, with the protocols that it agrees to (ALPN)
              unless the configuration says others; called by stacks that have such a layer
    forwards  the service has targets of its own (a forwarder)
    router    finds a router of the configuration by its name, None for none; asking makes the device its user
    log       the service's
    """

    service: str
    path: str = ""
    netns: str = ""
    tls: Callable[[Sequence[str]], Layer] | None = None
    forwards: bool = False
    router: Callable[[str], Router | None] = lambda name: None
    log: Logger = field(default_factory=quiet)

    def tls_layer(self, alpn: Sequence[str] = ()) -> Layer:
        """Return the TLS layer. Raise ConfigError for bad certificates."""
        assert self.tls is not None
        return self.tls(alpn)


class Dialer(Protocol):
    """Opens the lowest connection of a node."""

    async def dial(self, flow: Flow, address: Endpoint, lower: Egress) -> Stream:
        """Connect to a node through `lower`. Raise DialError."""


class StreamDialer:
    """The dialer `tcp`: the lower egress's own stream."""

    async def dial(self, flow: Flow, address: Endpoint, lower: Egress) -> Stream:
        """Connect through `lower`."""
        return await lower.connect(flow, address)


@dataclass(frozen=True, slots=True)
class Transport:
    """How a node is reached: its dialer, then the layers towards it."""

    name: str
    dialer: Dialer
    layers: tuple[Layer, ...] = ()

    async def dial(self, flow: Flow, address: Endpoint, lower: Egress) -> Stream:
        """Connect to `address` through `lower` and run the client side of every layer.

        Raise DialError, or what a layer raises; nothing is left open then.
        """
        stream = await self.dialer.dial(flow, address, lower)
        try:
            for layer in self.layers:
                stream = await layer.client(flow, stream, address.host)
        except BaseException:
            stream.abort()
            raise
        return stream


class AcceptError(Exception):
    """Accepting failed for a passing reason; the service waits a little and goes on."""
