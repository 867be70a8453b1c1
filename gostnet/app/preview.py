"""What `plan` and `doctor` look at: a configuration as it would run, with the lists that it reads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from ..config.argv import Invocation
from ..config.load import Loaded
from ..core.tasks import Scope, run
from ..policies.loader import Reloader
from .assemble import Assembly
from .daemon import assemble

PATIENCE: Final = 10.0
"""Seconds for all lists together: who asks what would happen waits for the answer."""


def preview(loaded: Loaded, invocation: Invocation, patience: float = PATIENCE) -> tuple[Assembly, list[str]]:
    """Build the objects of a configuration and load its lists as a start would; nothing listens, nothing is applied.

    Return a sentence for each list that was not complete within `patience` seconds. Not for use on a loop. Raise
    GostnetError where a start would be refused, lists that must be there and are not included.
    """
    assembly = assemble(loaded, lenient=invocation.lenient)
    lists = [each for each in assembly.build.reloaders if isinstance(each, Reloader)]
    try:
        return assembly, run(_load(lists, patience)) if lists else []
    finally:
        assembly.build.close()


async def _load(lists: Sequence[Reloader[object]], patience: float) -> list[str]:
    """Load all at the same time. Raise the first LoadError."""
    scope = Scope("lists")
    tasks = [scope.start(each.load(), each.name) for each in lists]
    late: list[str] = []
    try:
        limit = asyncio.get_running_loop().time() + patience
        for each, task in zip(lists, tasks, strict=True):
            try:
                async with asyncio.timeout_at(limit):
                    await asyncio.shield(task)
            except TimeoutError:
                late.append(f"{each.name}: not loaded within {patience:g}s; what it would add is not in this")
    finally:
        await scope.cancel()
    return late
