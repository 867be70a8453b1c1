"""Durations and sizes as users of GOST write them.

Durations follow Go: `300ms`, `1.5h`, `-1h2m3s`, a plain `0`; units ns us (with either micro sign too) ms s m h.
Sizes are sums of numbers with a unit, every unit a power of 1024: `10GB`, `1.5MiB`, `1MB512KB`.
"""

from __future__ import annotations

import re
from typing import Final

NANOSECONDS: Final = 1_000_000_000
"""Nanoseconds in a second."""

_LONGEST: Final = (1 << 63) - 1
_DURATION_UNITS: Final = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,
    "\u03bcs": 1_000,
    "ms": 1_000_000,
    "s": NANOSECONDS,
    "m": 60 * NANOSECONDS,
    "h": 3600 * NANOSECONDS,
}
_DURATION_PART: Final = re.compile(r"([0-9]*)(?:\.([0-9]*))?(ns|us|\u00b5s|\u03bcs|ms|s|m|h)")
_SIZE_UNITS: Final = {
    unit: 1024**power
    for power, units in enumerate((("B",), ("KB", "KiB"), ("MB", "MiB"), ("GB", "GiB"), ("TB", "TiB"), ("PB", "PiB")))
    for unit in units
} | {"EB": 1024**6, "EiB": 1024**6}
_SIZE_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[ \t]*([KMGTPE]i?B|B)[ \t]*")


def parse_nanoseconds(text: str) -> int:
    """Return the nanoseconds of a Go duration. Raise ValueError for anything else, a number without unit included."""
    rest = text
    negative = rest.startswith("-")
    if rest[:1] in ("-", "+"):
        rest = rest[1:]
    if rest == "0":
        return 0
    total = 0
    position = 0
    while position < len(rest):
        part = _DURATION_PART.match(rest, position)
        if part is None or not (part[1] or part[2]):
            raise ValueError(f"{text[:64]!r} is not a duration")
        whole, fraction, unit = part[1], part[2], _DURATION_UNITS[part[3]]
        if len(whole) > 20:
            raise ValueError(f"{text[:64]!r} is too long a duration")
        total += int(whole or "0") * unit
        if fraction:
            # Beyond 18 digits nothing is left of an hour in nanoseconds.
            digits = fraction[:18]
            total += int(float(int(digits)) * (unit / 10.0 ** len(digits)))
        position = part.end()
        if total > _LONGEST:
            raise ValueError(f"{text[:64]!r} is too long a duration")
    if position == 0:
        raise ValueError(f"{text[:64]!r} is not a duration")
    return -total if negative else total


def parse_seconds(text: str) -> float:
    """Return the seconds of a Go duration. Raise ValueError for anything else."""
    return parse_nanoseconds(text) / NANOSECONDS


def format_nanoseconds(count: int) -> str:
    """Write a duration as Go does: `1h0m0s`, `1m30s`, `1.5s`, `300ms`, `5ns`, `0s`."""
    sign = "-" if count < 0 else ""
    count = abs(count)
    if count < NANOSECONDS:
        if count == 0:
            return "0s"
        for unit, size in (("ms", 1_000_000), ("\u00b5s", 1_000), ("ns", 1)):
            if count >= size:
                return f"{sign}{_decimal(count, size)}{unit}"
    seconds = count % (60 * NANOSECONDS)
    minutes = count // (60 * NANOSECONDS)
    text = f"{_decimal(seconds, NANOSECONDS)}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
    return sign + text


def _decimal(count: int, size: int) -> str:
    whole, rest = divmod(count, size)
    if not rest:
        return str(whole)
    digits = len(str(size)) - 1
    return f"{whole}.{rest:0{digits}d}".rstrip("0")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `10MB`. Raise ValueError for anything else, a number without unit included."""
    total = 0.0
    position = 0
    stripped = text.strip()
    while position < len(stripped):
        part = _SIZE_PART.match(stripped, position)
        if part is None or len(part[1]) > 32:
            raise ValueError(f"{text[:64]!r} is not a size such as 10MB")
        number, unit = part[1], _SIZE_UNITS[part[2]]
        total += int(number) * unit if number.isdigit() else float(number) * unit
        position = part.end()
    if not stripped:
        raise ValueError("'' is not a size such as 10MB")
    if total > _LONGEST:
        raise ValueError(f"{text[:64]!r} is too large a size")
    return int(total)
