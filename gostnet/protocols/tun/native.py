"""The pump in C: when it is taken, which peers it knows, and what of it is counted."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ...core.address import IPAddress
from ...core.datagrams import Datagrams
from ...core.flow import Flow
from ...core.log import Logger
from ...core.packets import Packets
from ...core.udp_socket import UdpSocket
from ...dataplane.native.library import Library, load
from ...dataplane.native.tun_pump import SERVER, SINGLE, STRICT, TunPump
from ...dataplane.tun_device import TunDevice

_NATIVE = ("auto", "native")
"""What `Flow.engine` may ask for so that the native library is taken, where it is there."""

Sockaddr = tuple[Any, ...]

Take = Callable[[list[tuple[bytes, Sockaddr]]], Awaitable[None]]
"""Takes datagrams, each with whom it is from."""


class NativePath:
    """The pump of one device and socket; what it does not know is received here."""

    __slots__ = ("_counted", "_flow", "_pump", "_single")

    def __init__(self, pump: TunPump, flow: Flow, single: bool) -> None:
        self._pump = pump
        self._flow = flow
        self._single = single
        self._counted = (0, 0, 0)

    def learn(self, addresses: Sequence[IPAddress], peer: Sockaddr) -> None:
        """Let addresses lead to a peer; those for which there is no memory are not reached."""
        for address in (b"",) if self._single else [address.packed for address in addresses]:
            self._pump.learn(address, peer)

    def forget(self, address: IPAddress) -> None:
        """Forget whose an address is; where there is a single peer, that one."""
        self._pump.forget(b"" if self._single else address.packed)

    def set_strict(self, strict: bool) -> None:
        """Say whether sources are looked at."""
        self._pump.set_strict(strict)

    async def serve(self, take: Take, device: Packets, log: Logger) -> bool:
        """Give `take` what the pump leaves, until its end; return whether somebody else is to go on with the device.

        Raise ConnError when the device is gone.
        """
        while left := await self._pump.receive():
            await take(left)
        problem = self._problem()
        self.close()
        if device.closed:
            return False
        device.check()
        self._flow.labels = {**self._flow.labels, "pump": "python"}
        log.warn(f"{device.name}: pump in Python from now on, that in C has ended: {problem}")
        return True

    def count(self) -> tuple[int, int, int]:
        """Add to the flow's meter what has been moved since the last call; return it, and how often a peer refused."""
        counts = self._pump.counts()
        now = counts.up, counts.down, counts.refused
        up, down, refused = (new - old for new, old in zip(now, self._counted, strict=True))
        self._counted = now
        self._flow.meter.up += up
        self._flow.meter.down += down
        return up, down, refused

    def _problem(self) -> str:
        error = self._pump.ended
        return f"{errno.errorcode.get(error, error)}: {os.strerror(error)}" if error else ""

    def close(self) -> None:
        """Stop it, and count for the last time."""
        self._pump.close()
        self.count()


def start(
    flow: Flow,
    device: Packets,
    carrier: Datagrams,
    log: Logger,
    *,
    server: bool = False,
    single: bool = False,
    strict: bool = False,
) -> NativePath | None:
    """Start the pump in C if it can be had; say in the log and on the flow whether, and why not."""
    library, problem = load()
    problem = _problem(flow, device, carrier) or problem
    path = None
    if not problem and library is not None and isinstance(device, TunDevice) and isinstance(carrier, UdpSocket):
        flags = (SERVER if server else 0) | (SINGLE if single else 0) | (STRICT if strict else 0)
        try:
            path = _start(library, flow, device, carrier, flags)
        except OSError as exc:
            problem = str(exc)
    flow.labels = {**flow.labels, "pump": "c" if path is not None else "python"}
    log.info(f"{device.name}: pump in C" if path is not None else f"{device.name}: pump in Python: {problem}")
    return path


def _start(library: Library, flow: Flow, device: TunDevice, carrier: UdpSocket, flags: int) -> NativePath:
    ways = device.setup.ways if flags & SERVER else ()
    return NativePath(TunPump(library, device, carrier, flags, ways), flow, bool(flags & SINGLE))


def _problem(flow: Flow, device: Packets, carrier: Datagrams) -> str:
    if not isinstance(carrier, UdpSocket):
        return "packets go through a chain"
    if flow.shapers:
        return "there are traffic limits"
    if flow.taps:
        return "the packets are recorded"
    if device.setup.router is not None:
        return "a router chooses among peers"
    if flow.engine not in _NATIVE:
        return f"the service has the engine {flow.engine}"
    if not isinstance(device, TunDevice) or not device.joins:
        return "the device takes no runs"
    return ""
