"""Which engine moves the packets: the kernel by itself where both ends can, this process otherwise."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Literal

from ...core.address import Endpoint, IPAddress
from ...core.datagrams import Datagrams
from ...core.errors import KernelError
from ...core.flow import Flow
from ...core.log import Logger
from ...core.packets import Packets
from ...core.udp_socket import UdpSocket
from ...kernel import netns
from ...kernel.tun_engine import TunEngine

Choice = Literal["auto", "kernel", "pump"]

_SO_NETNS_COOKIE = 71
_SO_MARK = 36

_REFRESHED = 16
"""Peers per second: each takes some 50 us."""


class KernelPath:
    """The kernel engine of one device and socket, and which peers have offered to take what it sends.

    A peer that offers does so behind every registration. One that has registered since without an offer is somebody
    else at the same address.
    """

    __slots__ = ("_always", "_engine", "_takers", "_unrefreshed")

    def __init__(self, engine: TunEngine, always: bool) -> None:
        """With `always` packets go to every peer this way."""
        self._engine = engine
        self._always = always
        self._takers: dict[Endpoint, bool] = {}
        self._unrefreshed: list[Endpoint] = []

    def registered(self, addresses: Sequence[IPAddress], peer: Endpoint) -> bool:
        """Note a registration; return whether to offer that the peer may send this way."""
        if peer in self._takers and not self._takers[peer]:
            del self._takers[peer]
        elif peer in self._takers:
            self._takers[peer] = False
        served = self._engine.learn(addresses, peer, takes=self._always or peer in self._takers)
        if len(self._takers) > 2 * len(self._engine.peers):
            self._takers = {taker: fresh for taker, fresh in self._takers.items() if taker in self._engine.peers}
        return served

    def offered(self, peer: Endpoint) -> None:
        """Note a peer's offer; one that has not registered has none to make."""
        if peer in self._engine.peers:
            self._takers[peer] = True
            self._engine.learn((), peer, takes=True)

    def refresh(self) -> None:
        """Look whether the ways to some of the peers have changed: those without keep-alive do not register again."""
        if not self._unrefreshed:
            self._unrefreshed = list(self._engine.peers)
        for peer in self._unrefreshed[-_REFRESHED:]:
            if peer in self._engine.peers:
                self._engine.learn((), peer, takes=self._always or peer in self._takers)
        del self._unrefreshed[-_REFRESHED:]

    def talk_to(self, server: Endpoint, source: str, *, takes: bool) -> bool:
        """Lead everything to a server, if it takes it; return whether to offer the same."""
        return self._engine.learn((), server, takes=self._always or takes, source=source)

    def forget(self, address: IPAddress) -> None:
        """Forget whose an address is."""
        self._engine.forget(address)

    def count(self, flow: Flow) -> tuple[int, int]:
        """Add to the flow's meter what has been moved since the last call; return it."""
        up, down = self._engine.moved()
        flow.meter.up += up
        flow.meter.down += down
        return up, down

    def close(self, flow: Flow) -> None:
        """Count for the last time, and stop."""
        try:
            self.count(flow)
        finally:
            self._engine.close()


def start(
    choice: Choice,
    flow: Flow,
    device: Packets,
    carrier: Datagrams,
    log: Logger,
    *,
    place: str = "",
    port: int = 0,
    strict: bool = False,
    single: bool = False,
    relays: bool = False,
) -> KernelPath | None:
    """Start the kernel engine if it can be had; say in the log and on the flow which one it is, and why not."""
    problem = _problem(choice, flow, device, carrier, place)
    engine = None
    if not problem and isinstance(carrier, UdpSocket):
        mark = carrier.sock.getsockopt(socket.SOL_SOCKET, _SO_MARK)
        try:
            engine = TunEngine(
                device.name,
                port or carrier.sock.getsockname()[1],
                place=place or None,
                strict=strict,
                single=single,
                relays=relays,
                ways=device.setup.ways,
                mark=mark,
            )
        except KernelError as exc:
            problem = str(exc).removeprefix(": ")
    flow.labels = {**flow.labels, "engine": "kernel" if engine is not None else "pump"}
    if engine is None:
        say = log.warn if choice == "kernel" else log.info
        say(f"{device.name}: engine pump: {problem}")
        return None
    whom = "all peers" if choice == "kernel" else "peers that have it too"
    log.info(f"{device.name}: engine kernel, for {whom}; pump for the rest")
    return KernelPath(engine, choice == "kernel")


def _problem(choice: Choice, flow: Flow, device: Packets, carrier: Datagrams, place: str) -> str:
    if choice == "pump":
        return "chosen"
    if device.setup.router is not None:
        return "a router chooses among peers"
    if not isinstance(carrier, UdpSocket):
        return "packets go through a chain"
    if flow.shapers:
        return "there are traffic limits"
    if flow.taps:
        return "the packets are recorded"
    if carrier.local.host and ":" in carrier.local.host and carrier.local.host != "::":
        return "packets go over IPv6"
    if _cookie(carrier.sock) != _cookie_of(place):
        return "device and socket are in different network namespaces"
    return ""


def _cookie(sock: socket.socket) -> bytes:
    """Return what tells network namespaces apart, as a socket of one sees it (Linux 5.14)."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return b""


def _cookie_of(place: str) -> bytes:
    with netns.inside(place or None), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return _cookie(probe)
