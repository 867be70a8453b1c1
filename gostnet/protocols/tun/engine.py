"""Which engine moves the packets: the kernel by itself where both ends can, this process otherwise."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, TypeVar

from ...core.address import Endpoint, IPAddress
from ...core.datagrams import Datagrams
from ...core.errors import KernelError
from ...core.flow import Flow
from ...core.log import Logger
from ...core.packets import Packets
from ...core.udp_socket import UdpSocket
from ...kernel import netns
from ...kernel.tun_engine import TunEngine
from . import codec

T = TypeVar("T")

Choice = Literal["auto", "kernel", "pump"]

_SO_NETNS_COOKIE = 71
_SO_MARK = 36
_UDP_NO_CHECK6_RX = 102

_REFRESHED = 16
"""Peers per second: each takes some 50 us."""

_MOST_TOLD = 64
"""Peers of which the log tells that the pump serves them; one line each is enough to see why."""


class KernelPath:
    """The kernel engine of one device and socket, and which peers have offered to take what it sends.

    A peer that offers does so behind every registration, or answer to one. One from which another one has come since
    without an offer is somebody else at the same address, or behind something that lets no such packets pass.

    When the engine fails it is closed, which the log tells once; from then on this is told by nobody, and tells nobody,
    that packets go this way, so that they do not.
    """

    def __init__(self, engine: TunEngine, always: bool, flow: Flow, name: str, carrier: UdpSocket, log: Logger) -> None:
        """With `always` packets go to every peer this way that is reached by a network card. `name` is the device's."""
        self._engine: TunEngine | None = engine
        self._always = always
        self._flow = flow
        self._name = name
        self._log = log
        self._takers: dict[Endpoint, bool] = {}
        self._left_out: dict[Endpoint, str] = {}
        self._unrefreshed: list[Endpoint] = []
        self._returned: set[Endpoint] = set()
        self._server: Endpoint | None = None
        self._confirmed = False
        # A socket that is bound to an address sends from that one, whatever the routes say.
        host = Endpoint.from_sockaddr(carrier.sock.getsockname()).host
        self._source = "" if host in ("", "0.0.0.0", "::") else host
        with suppress(OSError):  # a socket of IPv4, which takes them
            carrier.sock.setsockopt(socket.IPPROTO_UDP, _UDP_NO_CHECK6_RX, 1)  # or offers would not arrive

    # ---- peers of a server ---------------------------------------------------------------------
    def registered(self, addresses: Sequence[IPAddress], peer: Endpoint) -> None:
        """Note a registration."""
        self._grow_stale(peer)
        self._returned.discard(peer)
        self._learn(addresses, peer)
        if self._engine is not None and len(self._takers) > 2 * len(self._engine.peers):
            self._takers = {taker: fresh for taker, fresh in self._takers.items() if taker in self._engine.peers}
        if self._engine is not None and len(self._returned) > 2 * len(self._engine.peers):
            self._returned.intersection_update(self._engine.peers)

    def offered(self, peer: Endpoint) -> None:
        """Note a peer's offer; one that has not registered has none to make.

        The first one after a registration is returned. The second one tells that this has arrived.
        """
        if self._engine is None or peer not in self._engine.peers:
            return
        if peer in self._returned:
            self._takers[peer] = True
            self._learn((), peer)
        else:
            self._returned.add(peer)
            self._offer_to(peer)

    def refresh(self) -> None:
        """Look whether the ways to some of the peers have changed: those without keep-alive do not register again."""
        if self._engine is None:
            return
        if not self._unrefreshed:
            self._unrefreshed = list(self._engine.peers)
        for peer in self._unrefreshed[-_REFRESHED:]:
            if self._engine is not None and peer in self._engine.peers:
                self._learn((), peer)
        del self._unrefreshed[-_REFRESHED:]

    def forget(self, address: IPAddress) -> None:
        """Forget whose an address is."""
        if self._engine is not None:
            self._attempt(lambda engine: engine.forget(address))

    # ---- the server of a client ----------------------------------------------------------------
    def talk_to(self, server: Endpoint, source: str) -> bool:
        """Lead everything to a server, if it takes it; return whether to offer the same."""
        self._server, self._source = server, source
        return self._learn((), server)

    def answered(self, answer: bytes) -> bool:
        """Note an answer to a registration, and confirm an offer; return whether `talk_to` has to lead to a change."""
        if self._server is None:
            return False
        before = self._server in self._takers
        if answer == codec.OFFER:
            self._takers[self._server] = True
            if not self._confirmed:
                self._confirmed = True
                self._offer_to(self._server)
        else:
            self._grow_stale(self._server)
        return before != (self._server in self._takers)

    # ---- offers --------------------------------------------------------------------------------
    def _grow_stale(self, peer: Endpoint) -> None:
        """Note that a peer was heard from: an offer lasts until the second time."""
        fresh = self._takers.pop(peer, False)
        if fresh:
            self._takers[peer] = False

    def offer(self) -> None:
        """Tell the server that packets may come this way."""
        self._confirmed = False
        if self._server is not None:
            self._offer_to(self._server)

    def _offer_to(self, peer: Endpoint) -> None:
        if self._engine is not None and peer in self._engine.peers:
            self._attempt(lambda engine: engine.say(peer, codec.OFFER))

    # ---- the engine ----------------------------------------------------------------------------
    def _learn(self, addresses: Sequence[IPAddress], peer: Endpoint) -> bool:
        if self._engine is None:
            return False
        takes, source = peer in self._takers, self._source
        served = self._attempt(
            lambda engine: engine.learn(addresses, peer, takes=takes, anyway=self._always, source=source)
        )
        self._tell(peer, "" if served or self._engine is None else self._engine.reason)
        return bool(served)

    def _tell(self, peer: Endpoint, reason: str) -> None:
        """Say once that a peer is served by the pump, and when it is not any more."""
        if reason == self._left_out.get(peer, ""):
            return
        if reason:
            if len(self._left_out) >= _MOST_TOLD:
                return
            self._log.info(f"{self._name}: engine pump for {peer}: {reason}", client=str(peer))
            self._left_out[peer] = reason
        else:
            del self._left_out[peer]
            self._log.info(f"{self._name}: engine kernel for {peer} again", client=str(peer))

    def _attempt(self, do: Callable[[TunEngine], T]) -> T | None:
        """Do something with the engine; give it up if it fails."""
        assert self._engine is not None
        try:
            return do(self._engine)
        except KernelError as exc:
            self._give_up(str(exc))
            return None

    def _give_up(self, why: str) -> None:
        engine, self._engine = self._engine, None
        assert engine is not None
        self._flow.labels = {**self._flow.labels, "engine": "pump"}
        self._log.warn(f"{self._name}: engine pump from now on: {why}")
        try:
            self._add(engine.moved())
        except KernelError:
            pass  # what was moved since the last look is not known
        finally:
            engine.close()

    def count(self, flow: Flow) -> tuple[int, int]:
        """Add to the flow's meter what has been moved since the last call, and return it; see that the engine works."""
        if self._engine is None:
            return 0, 0
        moved = self._attempt(lambda engine: engine.moved())
        if self._engine is not None and (problem := self._engine.problem()):
            self._give_up(problem)
        return self._add(moved or (0, 0))

    def _add(self, moved: tuple[int, int]) -> tuple[int, int]:
        self._flow.meter.up += moved[0]
        self._flow.meter.down += moved[1]
        return moved

    def close(self, flow: Flow) -> None:
        """Count for the last time, and stop."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        try:
            self._add(engine.moved())
        finally:
            engine.close()


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
    if engine is None or not isinstance(carrier, UdpSocket):
        say = log.warn if choice == "kernel" else log.info
        say(f"{device.name}: engine pump: {problem}")
        return None
    whom = "all peers that a network card reaches" if choice == "kernel" else "peers that have it too"
    log.info(f"{device.name}: engine kernel, for {whom}; pump for the rest")
    return KernelPath(engine, choice == "kernel", flow, device.name, carrier, log)


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
