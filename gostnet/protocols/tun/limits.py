"""Traffic limits on packets."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.flow import Shaper
from ...core.stream import Buffer
from ...dataplane.shaper import grant


def within(batch: Sequence[Buffer], shapers: Sequence[Shaper]) -> list[Buffer]:
    """Return the packets that the limits let pass; the others are dropped, as on any link that is too narrow."""
    passing: list[Buffer] = []
    for packet in batch:
        size = len(packet)
        got = grant(shapers, size)
        if got == size:
            passing.append(packet)
        else:
            for shaper in shapers:
                shaper.give_back(got)
    return passing
