"""How engines ask the limits of a flow for leave to move bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ..core.errors import PolicyDenied
from ..core.flow import Shaper


def grant(shapers: Sequence[Shaper], wanted: int) -> int:
    """Return how many of `wanted` bytes all of `shapers` let through now; they are counted as moved.

    Raise what one of them raises to end the flow (PolicyDenied); nothing is counted then.
    """
    allowed = wanted
    for index, shaper in enumerate(shapers):
        try:
            got = shaper.take(allowed)
        except PolicyDenied:
            give_back(shapers[:index], allowed)
            raise
        if got < allowed:
            for earlier in shapers[:index]:
                earlier.give_back(allowed - got)
            allowed = got
            if not allowed:
                return 0
    return allowed


def give_back(shapers: Sequence[Shaper], unused: int) -> None:
    """Return bytes that were granted and did not move."""
    for shaper in shapers:
        shaper.give_back(unused)


def delay(shapers: Sequence[Shaper]) -> float:
    """Seconds until `grant` may return more than 0: at least a millisecond, so that a wait is never a busy loop."""
    return max(0.001, max(shaper.delay() for shaper in shapers))


async def granted(shapers: Sequence[Shaper], wanted: int) -> int:
    """Wait until at least one byte may move; return how many of `wanted` do."""
    allowed = grant(shapers, wanted)
    while not allowed:
        await asyncio.sleep(delay(shapers))
        allowed = grant(shapers, wanted)
    return allowed
