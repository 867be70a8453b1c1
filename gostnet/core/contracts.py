"""What policies, handlers, layers and connectors promise each other. Behaviour only; no implementation lives here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from .address import Endpoint
from .datagrams import Datagrams
from .egress import Egress
from .flow import Flow, Network, Shapers
from .packets import IPNetwork
from .stream import Stream

T_contra = TypeVar("T_contra", contravariant=True)


# ---- policies -----------------------------------------------------------------------------------
class Admission(Protocol):
    """Decides about clients by address."""

    def admits(self, client: Endpoint) -> bool: ...


class Bypass(Protocol):
    """Decides about destinations. At a service True means refuse; at a hop or node it means skip."""

    def contains(self, network: Network, target: Endpoint) -> bool: ...


class Authenticator(Protocol):
    """Checks credentials."""

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        """Return the client id, None if refused."""


class Hosts(Protocol):
    """A static table of names."""

    def lookup(self, host: str, family: int = 0) -> list[str]:
        """Return the addresses of `host` in order, [] if it is not listed. `family` 4 or 6 filters, 0 takes both."""


class Resolver(Protocol):
    """Resolves names by configured name servers."""

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        """Return one or more addresses. Raise ResolveError."""


@dataclass(frozen=True, slots=True)
class NetworkRoute:
    """A way to a network.

    network       that has the destination; None where routes have other names
    destination   what the route leads to, as it is written
    gateway       the neighbour by which it is reached, "" if it is a neighbour itself
    protocol      who has made the route: "static" of a table, of the kernel what ip(8) shows, such as "bgp"
    """

    network: IPNetwork | None
    destination: str
    gateway: str
    protocol: str = ""


class Router(Protocol):
    """Knows the ways to networks, as the kernel's routing does: the most specific one counts.

    generation   another number whenever an answer may have changed, for those who remember answers
    """

    @property
    def generation(self) -> int: ...

    def get_route(self, destination: str, *, network: str = "", protocol: str = "") -> NetworkRoute | None:
        """Return the route to an address (or to what routes are named by), None if there is none.

        `network` and `protocol` leave only routes to that network, or of that origin. Takes microseconds.
        """


class Slot(Protocol):
    """A place under a connection limit."""

    def release(self) -> None: ...


class ConnectionLimiter(Protocol):
    """Bounds concurrent connections."""

    def acquire(self, client: Endpoint) -> Slot | None:
        """Return a slot to be released at the end, None if the limit is reached."""


class RateLimiter(Protocol):
    """Bounds requests per second."""

    def allow(self, client: Endpoint) -> bool:
        """Count one request of `client` if it may pass."""


class Volume(Protocol):
    """A volume of traffic that may be used up; what counts and cuts is on the flows, as a `TrafficLimiter` puts it."""

    name: str

    @property
    def blocked(self) -> bool:
        """Whether it is used up now."""


class Entry(Protocol):
    """One connection in the books."""

    def running(self, cancel: Callable[[], object]) -> None:
        """Take what ends the connection."""

    def leave(self, *, refused: bool = False) -> None:
        """Note its end, with what `flow` tells of it; `refused` if no handler has seen it."""


class Books(Protocol):
    """Counts and records the connections of a service."""

    def enter(self, flow: Flow, conn: Any) -> Entry:
        """Note a connection that was accepted, before anybody has decided about it."""

    def announced(self, flow: Flow) -> None:
        """Note for whom a connection speaks, where only a preface tells it."""

    def become(self, state: str, message: str) -> None:
        """Note a change of the service's state."""

    def status(self) -> Mapping[str, object]:
        """Return what the service's status shows of them, with GOST's names."""


class Dials(Protocol):
    """Records where connections go."""

    def dialling(self, flow: Flow, target: Endpoint) -> None: ...

    def failed(self, flow: Flow, target: Endpoint) -> None: ...

    def reached(self, flow: Flow, target: Endpoint, local: Endpoint, remote: Endpoint) -> None:
        """`local` and `remote` are the ends of what was opened: with a chain, of the connection to its first node."""


class TrafficLimiter(Protocol):
    """Bounds bandwidth; the verdict is data on the flow."""

    def shape(self, flow: Flow, into: Shapers) -> None:
        """Add the shapers that hold for this flow."""


# ---- handlers -----------------------------------------------------------------------------------
class Handler(Protocol[T_contra]):
    """Speaks one protocol with the client, finds the target, and ends in a relay."""

    accepts: ClassVar[tuple[type[Any], ...]]
    """Shapes of connection it takes: Stream, Datagrams, Packets. Compared with the listener at load."""

    async def handle(self, flow: Flow, conn: T_contra, egress: Egress) -> None:
        """Serve one connection to its end; the service closes `conn` afterwards."""


@runtime_checkable
class HandsOver(Protocol):
    """A handler whose connections outlast a reload and must follow it: a TUN device, a tunnel that is kept open.

    Others need no such thing: what they began with holds until their connection ends.
    """

    def hand_over(self, successor: Handler[Any], egress: Egress) -> None:
        """Let what runs here see the authenticator, the options and the way out of the new configuration.

        `successor` is of the same class. It is the service's handler from now on, and at the next reload it is asked to
        hand over: give it what runs. Called on the loop, between two steps of any connection; must not raise.
        """


@runtime_checkable
class Closing(Protocol):
    """A handler that keeps something between connections, such as connections to servers of its own."""

    def close(self) -> None:
        """Let go of it: the service has ended or got another handler. Connections that still run go on."""


class Connector(Protocol):
    """The client side of a proxy protocol, over a stream to the proxy."""

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        """Do what can be done before the target is known (once per dialled stream)."""

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream: ...

    async def associate(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams: ...


class Layer(Protocol):
    """Something between the socket and the protocol that turns a stream into a stream: tls, ws, obfuscation."""

    async def server(self, flow: Flow, below: Stream) -> Stream: ...

    async def client(self, flow: Flow, below: Stream, name: str) -> Stream:
        """`name` is the host of the node, the default for what is shown to the peer (SNI, Host)."""


@dataclass(frozen=True, slots=True)
class Policies:
    """The policies that a service decides when it accepts; the router decides the rest. No handler looks at them.

    requests   asked once for each connection, each new peer of a UDP listener, each DNS query
    quotas     refuse who comes while one of them is used up
    books      None where nobody wants statistics, records or quotas
    """

    admissions: Sequence[Admission] = ()
    connections: ConnectionLimiter | None = None
    requests: RateLimiter | None = None
    quotas: Sequence[Volume] = ()
    books: Books | None = None

    @property
    def guarding(self) -> bool:
        """Whether there is anything to ask before a connection is served."""
        return bool(self.admissions or self.connections is not None or self.requests is not None or self.quotas)


def admitted(admissions: Iterable[Admission], client: Endpoint) -> bool:
    """All must admit."""
    return all(admission.admits(client) for admission in admissions)
