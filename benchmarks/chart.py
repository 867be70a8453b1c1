"""A bar chart as SVG: how many times the reference, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH = 860
LABEL = 270
RIGHT = 130
BAR = 13
GAP = 10
TOP = 70
_COLOURS = ("#1f6feb", "#8b949e", "#d29922", "#2da44e", "#a371f7", "#bf4b8a", "#57a0a8")


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a row: who, how many times the reference, and the figure beside it."""

    name: str
    ratio: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A case and its bars."""

    title: str
    bars: Sequence[Bar]


SMALLEST = 1 / 32
"""Bars do not become longer than that to the left: their number tells."""


def draw(title: str, reference: str, rows: Sequence[Row], order: Sequence[str] = ()) -> str:
    """Return the SVG. The axis shows powers of two; the reference is the line at 1.

    Names get their colours in the order of `order`, then as they come. Raise ValueError without a bar.
    """
    ratios = [max(SMALLEST, bar.ratio) for row in rows for bar in row.bars if bar.ratio > 0]
    if not ratios:
        raise ValueError("there is nothing to draw")
    first = min(-1, math.floor(math.log2(min(ratios))))
    last = max(1, math.ceil(math.log2(max(ratios))))
    present = {bar.name: None for row in rows for bar in row.bars}
    names = list(dict.fromkeys([*(name for name in order if name in present), *present]))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    height = TOP + sum(len(row.bars) * BAR + GAP for row in rows) + 24

    def across(ratio: float) -> float:
        return LABEL + (math.log2(max(SMALLEST, ratio)) - first) / (last - first) * (WIDTH - LABEL - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="14" font-weight="600" fill="#1f2328">{escape(title)}</text>',
    ]
    at = 12.0
    for name in names:
        parts.append(f'<rect x="{at:.0f}" y="32" width="10" height="10" fill="{colours[name]}"/>')
        parts.append(f'<text x="{at + 14:.0f}" y="41" fill="#1f2328">{escape(name)}</text>')
        at += 14 + 7 * len(name) + 16
    for power in range(first, last + 1):
        x = across(2.0**power)
        stroke = "#1f2328" if power == 0 else "#d0d7de"
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{height - 20}" stroke="{stroke}"/>')
        label = reference if power == 0 else f"{2**power}x" if power > 0 else f"1/{2**-power}"
        parts.append(f'<text x="{x:.1f}" y="{TOP - 12}" text-anchor="middle" fill="#656d76">{escape(label)}</text>')
    y = float(TOP)
    for row in rows:
        middle = y + len(row.bars) * BAR / 2 + 4
        parts.append(
            f'<text x="{LABEL - 10}" y="{middle:.1f}" text-anchor="end" fill="#1f2328">{escape(row.title)}</text>'
        )
        for bar in row.bars:
            if bar.ratio > 0:
                left, right = sorted((across(1.0), across(bar.ratio)))
                parts.append(
                    f'<rect x="{left:.1f}" y="{y + 1:.1f}" width="{max(1.0, right - left):.1f}" height="{BAR - 2}"'
                    f' fill="{colours[bar.name]}"><title>{escape(f"{bar.name}: {bar.ratio:.2f}x")}</title></rect>'
                )
                note = f"{bar.ratio:.2f}x {bar.note}".strip()
                end = right + 4
                parts.append(
                    f'<text x="{end:.1f}" y="{y + BAR - 3:.1f}" font-size="9" fill="#656d76">{escape(note)}</text>'
                )
            y += BAR
        y += GAP
    parts.append("</svg>")
    return "\n".join(parts) + "\n"
