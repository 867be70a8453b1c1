"""What gostnet changes in the kernel, as data: what listeners declare, and what the kernel is made to hold.

Nothing here acts. `gostnet.kernel` compares such data with what it observes and makes the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import ClassVar, Literal, TypeAlias

MARK_MASK = 0x03000000
"""The bits of packet marks that belong to gostnet; all others are the user's."""

MARK_OWN = 0x01000000
"""Sockets of gostnet's own: never captured."""

MARK_DIVERTED = 0x02000000
"""Packets that entered by a captured interface and are on their way to a transparent socket."""

MARK_RETURNING = 0x03000000
"""Packets of the host's own processes on their way through lo to a transparent socket.

A value of its own, so that nothing but such a packet meets the rule for them: the kernel looks up the way back to a
source as if the packet came from the host itself, with the packet's mark if src_valid_mark is set.
"""

CONNECTION_OWN = 0x01000000
"""The bit of conntrack marks of connections that a socket of ours began, so that what comes back is known for it."""

CONNECTION_CAPTURED = 0x02000000
"""The bit of conntrack marks that follows a TCP connection whose first packet was captured."""

CONNECTION_DIRECT = 0x04000000
"""The bit of conntrack marks of connections that a capture has let go their own way."""

ROUTE_PROTOCOL = 250
"""The origin that our routes and rules carry."""

FIRST_TABLE = 18254
"""Routing table and rule priority of slot 0; an instance of slot n has this plus n."""

SLOTS = 256
"""How many instances there may be in a network namespace."""

MAIN_TABLE = 254
"""Where the host's own routes are."""

RULES_A_SLOT = 56
"""How many priorities an instance has, SLOTS apart, before that of the main table (32766)."""


def routed_table(slot: int) -> int:
    """Return the table of the routes into devices that come back in."""
    return FIRST_TABLE + SLOTS + slot


def return_table(slot: int) -> int:
    """Return the table that leads the host's captured traffic into such a device."""
    return FIRST_TABLE + 2 * SLOTS + slot


def tables_of(slot: int) -> set[int]:
    """Return the routing tables of an instance."""
    return {FIRST_TABLE + slot, routed_table(slot), return_table(slot)}


Key: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that the kernel can be made to hold, identified by its key.

    `rank` is the order of creation: what is lower is made first and removed last.
    """

    kind: ClassVar[str] = ""
    rank: ClassVar[int] = 0
    shared: ClassVar[bool] = False
    """Several instances may want the same one: the last that does takes it away."""

    @property
    def key(self) -> Key:
        """What identifies the object in the kernel, whatever its other properties are."""
        raise TypeError(f"{type(self).__name__} is no resource of its own")


@dataclass(frozen=True, slots=True)
class Ranges:
    """Addresses as ranges: first and last one of each in network order, packed, ascending and apart."""

    v4: bytes = field(default=b"", repr=False)
    v6: bytes = field(default=b"", repr=False)

    def __len__(self) -> int:
        return len(self.v4) // 8 + len(self.v6) // 32


NAMED_TIMEOUT = 3600
"""Seconds that an address which a name was answered with stays in the kernel at most, whatever its TTL."""

NAMED_SIZE = 32768
"""Elements of a set of such addresses; twice what is put in, as what is over is counted until it is collected."""


def names_set(version: int, names: str) -> str:
    """Return the name of the set of addresses of an IP version for the `names` of an `Around`."""
    return f"names{version}_{names}"


@dataclass(frozen=True, slots=True)
class Around:
    """Destinations of a capture that its service would send out directly, so that the kernel may as well.

    ranges      at any port
    ports       only at these ports, as inclusive ranges
    forwarded   also of what enters by interfaces: this host forwards it, with its own address as the source
    local       also of what the host's own processes send
    names       stands for what decides about names, "" where they decide nothing; the addresses that names are answered
                with come and go while the table is there, see `names_set`
    """

    ranges: Ranges = Ranges()
    ports: tuple[tuple[tuple[tuple[int, int], ...], Ranges], ...] = ()
    forwarded: bool = False
    local: bool = False
    names: str = ""

    def has(self, version: int) -> bool:
        """Tell whether there are addresses of an IP version, or may be."""
        if self.names:
            return True
        every = (self.ranges, *(ranges for _, ranges in self.ports))
        return any(ranges.v4 if version == 4 else ranges.v6 for ranges in every)


@dataclass(frozen=True, slots=True)
class Capture(Resource):
    """Traffic that a listener wants: declared by it, compiled to the resources below, never put as it is.

    service      whose it is; shown as the comment of the rules
    method       how it reaches the listener: `redirect` (TCP only) or `tproxy`
    port         of the listener
    interfaces   what enters by these is taken unless it is for the host itself; they need not exist yet
    local        what the host's own processes send to other hosts is taken
    exclude      networks as destinations that are left alone
    sources      only from these networks, () for any; does not concern `local`
    ports        only these destination ports, as inclusive ranges; () for any
    address      of the listener, "" for any; then only traffic of its IP version is taken
    device       what `local` takes goes through this device, whose packets come back in, instead of lo
    direct       whether destinations that the service sends out directly may stay in the kernel: as far as nobody can
                 tell the difference (auto), in any case (kernel), or never (user)
    around       those destinations
    names        so may addresses that names are answered with by a name service of ours
    """

    kind: ClassVar[str] = "capture"

    service: str
    protocol: Literal["tcp", "udp"]
    method: Literal["redirect", "tproxy"]
    port: int
    interfaces: tuple[str, ...] = ()
    local: bool = False
    exclude: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    ports: tuple[tuple[int, int], ...] = ()
    address: str = ""
    device: str = ""
    direct: Literal["auto", "kernel", "user"] = "auto"
    around: Around | None = None
    names: bool = False

    @property
    def key(self) -> Key:
        """Service and protocol."""
        return (self.kind, self.service, self.protocol)


@dataclass(frozen=True, slots=True)
class Inlet(Resource):
    """A device whose packets come back in by it: declared by a listener, compiled to the resources below.

    device   what is routed into it is taken, and nothing of it goes on from there
    tcp      port of the transparent socket that gets the TCP, 0 where whoever reads the device sees to that
    udp      the same of UDP
    ways     what is routed into it, with the gateway or "" for each; sockets of ours are not, and neither is what
             `Capture` never takes
    peers    addresses behind it that sockets of ours do speak with
    """

    kind: ClassVar[str] = "inlet"

    service: str
    device: str
    tcp: int
    udp: int
    ways: tuple[tuple[str, str], ...] = ()
    peers: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """Service and device."""
        return (self.kind, self.service, self.device)


@dataclass(frozen=True, slots=True)
class Masquerade(Resource):
    """Forwarding for those behind a device: declared by a listener, compiled to the resources below.

    device     what they come by; the TCP that is forwarded through it gets segments that fit
    networks   whose addresses are hidden behind the host's own where their packets leave by another device
    """

    kind: ClassVar[str] = "masquerade"

    service: str
    device: str
    networks: tuple[str, ...]

    @property
    def key(self) -> Key:
        """Service and device."""
        return (self.kind, self.service, self.device)


@dataclass(frozen=True, slots=True)
class PortForward(Resource):
    """A port whose connections the kernel sends on: declared for a service, compiled to rules and sysctls.

    address    of this host, "" for any but the loopback ones
    target     another host's address, and `to` its port
    """

    kind: ClassVar[str] = "forward"

    service: str
    protocol: Literal["tcp", "udp"]
    address: str
    port: int
    target: str
    to: int

    @property
    def key(self) -> Key:
        """The service."""
        return (self.kind, self.service)


@dataclass(frozen=True, slots=True)
class Sysctl(Resource):
    """A setting under /proc/sys, named with dots; a dot within an interface's name is written `/`, as sysctl(8) does.

    Runs of blanks in `value` are one blank each.
    """

    kind: ClassVar[str] = "sysctl"
    rank: ClassVar[int] = 10
    shared: ClassVar[bool] = True

    name: str
    value: str

    @property
    def key(self) -> Key:
        """Its name."""
        return (self.kind, self.name)


@dataclass(frozen=True, slots=True)
class Bridge(Resource):
    """A bridge; one that is made is up, and keeps its hardware address whatever ports come and go.

    It is not taken away as long as it has ports that others have put in.
    """

    kind: ClassVar[str] = "bridge"
    rank: ClassVar[int] = 15
    shared: ClassVar[bool] = True

    name: str

    @property
    def key(self) -> Key:
        """Its name."""
        return (self.kind, self.name)


@dataclass(frozen=True, slots=True)
class Port(Resource):
    """What a device that exists already is a port of: a bridge, or "" for none."""

    kind: ClassVar[str] = "port"
    rank: ClassVar[int] = 25
    shared: ClassVar[bool] = True

    device: str
    bridge: str

    @property
    def key(self) -> Key:
        """The device."""
        return (self.kind, self.device)


@dataclass(frozen=True, slots=True)
class Link(Resource):
    """The settings of a device that exists already: MTU in bytes, and whether it is up."""

    kind: ClassVar[str] = "link"
    rank: ClassVar[int] = 20

    name: str
    mtu: int
    up: bool = True

    @property
    def key(self) -> Key:
        """The device's name."""
        return (self.kind, self.name)


@dataclass(frozen=True, slots=True)
class Address(Resource):
    """An address with prefix length on a device that exists already; usable at once (no duplicate detection)."""

    kind: ClassVar[str] = "address"
    rank: ClassVar[int] = 30

    device: str
    address: str

    @property
    def key(self) -> Key:
        """Device and address."""
        return (self.kind, self.device, self.address)


@dataclass(frozen=True, slots=True)
class Route(Resource):
    """A route; `destination` is a network, `0.0.0.0/0` or `::/0` for everything.

    metric      0 for the kernel's default
    raw         of an observed route: the message that describes it whole, with what has no field here, so that a
                route which was replaced comes back as it was
    tentative   left out, and tried again later, where the kernel refuses it: its gateway may not be there yet
    """

    kind: ClassVar[str] = "route"
    rank: ClassVar[int] = 40

    destination: str
    table: int = 254
    type: Literal["unicast", "local", "blackhole", "unreachable", "prohibit", "throw", "other"] = "unicast"
    device: str = ""
    gateway: str = ""
    metric: int = 0
    protocol: int = ROUTE_PROTOCOL
    raw: bytes = field(default=b"", repr=False, compare=False)
    tentative: bool = field(default=False, repr=False, compare=False)

    @property
    def version(self) -> int:
        """4 or 6."""
        return ip_network(self.destination).version

    @property
    def key(self) -> Key:
        """Table, destination and metric: two routes that have these in common replace each other."""
        return (self.kind, str(self.table), self.destination, str(self.metric))


@dataclass(frozen=True, slots=True)
class Rule(Resource):
    """A policy rule that looks a table up for packets with a mark that came in by `iif` ("lo": the host's own).

    suppress   a route whose prefix is of at most this length does not count; -1: all do
    """

    kind: ClassVar[str] = "rule"
    rank: ClassVar[int] = 50

    version: Literal[4, 6]
    priority: int
    table: int
    mark: int = 0
    mask: int = 0
    iif: str = ""
    protocol: int = ROUTE_PROTOCOL
    suppress: int = -1

    @property
    def key(self) -> Key:
        """Everything, as rules never replace each other."""
        parts = (self.version, self.priority, self.table, self.mark, self.mask, self.iif, self.protocol, self.suppress)
        return (self.kind, *map(str, parts))


# ---- nftables -----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class NftSet:
    """A named set. `elements` are networks or inclusive ranges of ports (`80`, `8000-8100`) that do not overlap.

    packed    instead of them, ranges of addresses as in `Ranges`; the name then stands for the content
    timeout   seconds that an element stays at most; such a set has single addresses, which are added later
    size      how many elements it takes, 0 for any number
    """

    name: str
    type: Literal["ipv4_addr", "ipv6_addr", "inet_service", "fib_addrtype"]
    elements: tuple[str, ...]
    packed: bytes = field(default=b"", repr=False)
    timeout: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class NftChain:
    """A chain; a base chain if it has a hook, and its policy is then to accept."""

    name: str
    hook: Literal["", "prerouting", "input", "forward", "output", "postrouting"] = ""
    type: Literal["filter", "nat", "route"] = "filter"
    priority: int = 0


@dataclass(frozen=True, slots=True)
class NftRule:
    """A rule: in the words of nft(8), and encoded as the list of expressions that the kernel takes."""

    chain: str
    text: str
    code: bytes = field(repr=False)
    comment: str = ""


NftStatement: TypeAlias = NftSet | NftChain | NftRule


@dataclass(frozen=True, slots=True)
class NftTable(Resource):
    """A table of family inet with all its content, put and replaced as a whole.

    owner     it belongs to the socket that made it and goes with it
    note      a word kept with the table in the kernel
    digest    stands for owner and content when tables are compared; an observed table has no content
    """

    kind: ClassVar[str] = "nft"
    rank: ClassVar[int] = 60

    name: str
    content: tuple[NftStatement, ...] = field(default=(), repr=False, compare=False)
    owner: bool = True
    note: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if self.content and not self.digest:
            object.__setattr__(self, "digest", _digest(self.content))

    @property
    def key(self) -> Key:
        """Its name."""
        return (self.kind, self.name)


def _digest(content: tuple[NftStatement, ...]) -> str:
    """Return 16 hexadecimal digits that differ if anything in `content` does."""
    import hashlib  # 4 MiB that the guard can do without

    digest = hashlib.sha256()
    for statement in content:
        digest.update(repr(statement).encode() + b"\0")
        if isinstance(statement, NftRule):
            digest.update(statement.code + b"\0")
    return digest.hexdigest()[:16]


KINDS: dict[str, type[Resource]] = {
    kind.kind: kind for kind in (Sysctl, Bridge, Link, Port, Address, Route, Rule, NftTable)
}
"""The resources that can be put, by kind."""
