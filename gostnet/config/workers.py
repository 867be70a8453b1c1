"""`workers`: how many processes serve one configuration. Not GOST's ` -- `, which starts several command lines."""

from __future__ import annotations

import os
from typing import Final

MOST: Final = 64
"""More than that would share locks and memory for nothing: a worker is worth a processor."""


def parse_workers(text: str) -> int:
    """Return the number of processes; "" is 1, `auto` one for each processor that we may use. Raise ValueError."""
    word = text.strip()
    if not word:
        return 1
    if word == "auto":
        return min(MOST, len(os.sched_getaffinity(0)))
    if word.isascii() and word.isdigit() and 1 <= int(word) <= MOST:
        return int(word)
    raise ValueError(f"{text[:64]!r} is not auto or a number of processes from 1 to {MOST}")
