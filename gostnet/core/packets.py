"""Packets: the third of the three data shapes, what a TUN or TAP device gives and takes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import TYPE_CHECKING

from .address import IPAddress
from .datagrams import Datagrams
from .stream import Buffer, Closable

if TYPE_CHECKING:
    from .contracts import Router  # which needs this module

IPInterface = IPv4Interface | IPv6Interface
IPNetwork = IPv4Network | IPv6Network


class Medium(Enum):
    """What a packet begins with: an IP header, or that of Ethernet."""

    IP = "tun"
    ETHERNET = "tap"


@dataclass(frozen=True, slots=True)
class Way:
    """A network that lies behind the device, and the neighbour it is reached by; None for the device itself."""

    network: IPNetwork
    gateway: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """How a device is set up, for whoever speaks for it with peers.

    addresses   the device's own, with their networks, in the configured order
    ways        the networks behind it
    router      chooses among peers by their addresses as gateways, in place of `ways`; the listener's to close
    """

    addresses: tuple[IPInterface, ...] = ()
    ways: tuple[Way, ...] = ()
    router: Router | None = None


NO_SETUP = Setup()


class Packets(Closable):
    """A network device seen from its far side: what the kernel sends into it is received here.

    mtu          of IP packets, bytes, without the header of Ethernet
    vnet_header  every buffer begins with a virtio_net_hdr of 10 bytes
    carrier      the datagram socket at the service's address, by which peers reach it; it belongs to the listener.
                 None where the service has a target of its own
    on_closed    called when we close it, for who waits for something else meanwhile; whoever serves the device sets it
    """

    __slots__ = ("carrier", "medium", "mtu", "name", "on_closed", "setup", "vnet_header")

    def __init__(
        self,
        name: str,
        mtu: int,
        medium: Medium = Medium.IP,
        *,
        setup: Setup = NO_SETUP,
        carrier: Datagrams | None = None,
        vnet_header: bool = False,
    ) -> None:
        self.name = name
        self.mtu = mtu
        self.medium = medium
        self.setup = setup
        self.carrier = carrier
        self.vnet_header = vnet_header
        self.on_closed: Callable[[], object] | None = None

    def _tell_closed(self) -> None:
        if self.on_closed is not None:
            self.on_closed()

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether it has been closed by us."""

    @abstractmethod
    def check(self) -> None:
        """Raise ConnError if the device is gone: deleted by somebody else."""

    @abstractmethod
    async def receive(self) -> Sequence[Buffer]:
        """Return one or more packets, valid until the next call; an empty sequence only once it is closed by us.

        Raise ConnError when the device is gone.
        """

    @abstractmethod
    async def send(self, batch: Sequence[Buffer]) -> None:
        """Give the kernel packets; those that it refuses are dropped. Raise ConnError when the device is gone."""
