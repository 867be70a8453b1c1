"""Packets on their way to a device: looked at once for each run of segments, which have their ends in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ...core.flow import Shaper
from ...core.packets import Packets
from ...core.stream import Buffer
from ...dataplane.tcp_runs import PLAIN, Run, join_runs, packets_of
from ...dataplane.tun_device import TunDevice
from ...pipeline.devices import within


class Delivery:
    """What goes to one device, in the form that it takes: runs, or single packets."""

    __slots__ = ("_device", "_tun", "_waiting")

    def __init__(self, device: Packets) -> None:
        self._device = device
        self._tun = device if isinstance(device, TunDevice) and device.joins else None
        self._waiting: list[Run] = []

    def runs(self, packets: Sequence[Buffer]) -> Iterator[tuple[Run, Sequence[Buffer]]]:
        """Yield runs and the packets that each is made of, in order; the first one stands for all of them."""
        start = 0
        for run in join_runs(packets) if self._tun is not None else ([packet] for packet in packets):
            end = start + packets_of(run)
            yield run, packets[start:end]
            start = end

    def add(self, run: Run, packets: Sequence[Buffer], limits: Sequence[Shaper]) -> int:
        """Let a run be sent with the next `send`, or what the limits leave of it; return its bytes."""
        if limits:
            passing = within(packets, limits)
            if len(passing) < len(packets):
                self._waiting += [[PLAIN, packet] for packet in passing]
                return sum(map(len, passing))
        self._waiting.append(run)
        # All segments of a run but the last are of one size.
        return len(packets[0]) * (len(packets) - 1) + len(packets[-1])

    async def send(self) -> None:
        """Give the device what has been added. Raise ConnError when it is gone."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        if self._tun is not None:
            self._tun.send_runs(waiting)
        else:
            await self._device.send(list(_single(waiting)))


def _single(runs: Iterable[Run]) -> Iterator[Buffer]:
    for run in runs:
        yield run[-1]
