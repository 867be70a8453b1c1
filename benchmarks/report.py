"""Results as figures: medians, ratios to the reference with their spread, JSON and a Markdown table."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from .cases import Case, Unit
from .contenders import LIMIT, REFERENCE
from .run import Results, Sample
from .topology import kernel


@dataclass(frozen=True, slots=True)
class Figure:
    """A case and a contender in one line; ratios are to the reference, nan without one.

    ratio, low, high   of the rate: the median, least and greatest of the rounds
    added              p50 in us beyond the kernel's own
    """

    case: Case
    contender: str
    rounds: int
    rate: float
    ratio: float
    low: float
    high: float
    cpu: float
    cpu_ratio: float
    machine: float
    p50: float
    p99: float
    added: float
    failed: int
    lost: int


def figures(cases: Sequence[Case], results: Results) -> list[Figure]:
    """Return one figure for every case and contender that was measured."""
    found = []
    for case in cases:
        samples = results.samples.get(case.id, {})
        reference, limit = samples.get(REFERENCE, []), samples.get(LIMIT, [])
        for contender, own in samples.items():
            found.append(_figure(case, contender, own, reference, limit))
    return found


def _figure(
    case: Case, contender: str, own: Sequence[Sample], reference: Sequence[Sample], limit: Sequence[Sample]
) -> Figure:
    ratios = [a.rate / b.rate for a, b in zip(own, reference, strict=False) if b.rate > 0] or [math.nan]
    cpu, reference_cpu = _median(own, "cpu"), _median(reference, "cpu")
    p50 = _median(own, "p50")
    return Figure(
        case=case,
        contender=contender,
        rounds=len(own),
        rate=_median(own, "rate"),
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        cpu=cpu,
        cpu_ratio=cpu / reference_cpu if cpu and reference_cpu > 0 else math.nan,
        machine=_median(own, "machine"),
        p50=p50,
        p99=_median(own, "p99"),
        added=p50 - _median(limit, "p50") if p50 and limit else math.nan,
        failed=sum(sample.failed for sample in own),
        lost=sum(sample.lost for sample in own),
    )


def _median(samples: Sequence[Sample], name: str) -> float:
    return float(median(getattr(sample, name) for sample in samples)) if samples else math.nan


def machine() -> dict[str, Any]:
    """Return what the figures depend on beside the programs."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "kernel": kernel(),
        "processor": model or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }


def as_json(found: Sequence[Figure], results: Results, versions: dict[str, str], seconds: float) -> str:
    """Return everything that was measured: samples, medians, versions, the machine."""

    def finite(figure: Figure) -> dict[str, Any]:
        values = {name: value for name, value in asdict(figure).items() if name != "case"}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions,
        "seconds": seconds,
        "figures": [{"case": figure.case.id, "unit": figure.case.unit.value, **finite(figure)} for figure in found],
        "samples": {
            case: {contender: [asdict(sample) for sample in samples] for contender, samples in by.items()}
            for case, by in results.samples.items()
        },
        "problems": results.problems,
    }
    return json.dumps(content, indent=1) + "\n"


def as_summary(found: Sequence[Figure]) -> str:
    """Return a table with a line per case: the reference's figures, and the others' as multiples of its rate."""
    by_case: dict[str, dict[str, Figure]] = {}
    for figure in found:
        by_case.setdefault(figure.case.title, {})[figure.contender] = figure
    names = [REFERENCE, *(name for name in dict.fromkeys(f.contender for f in found) if name != REFERENCE)]
    lines = [f"| case | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for title, figures_of in by_case.items():
        cells = [_short(figures_of[name]) if name in figures_of else "" for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _short(figure: Figure) -> str:
    own = rate(figure) if figure.contender == REFERENCE or math.isnan(figure.ratio) else f"{figure.ratio:.2f}x"
    return f"{own}, {cost(figure)}" if figure.cpu > 0 else own


def cost(figure: Figure) -> str:
    """Return the CPU figure with its unit."""
    return (
        f"{figure.cpu:,.0f} {figure.case.cpu_unit}" if figure.cpu >= 10 else f"{figure.cpu:.2g} {figure.case.cpu_unit}"
    )


def rate(figure: Figure) -> str:
    """Return the rate with its unit."""
    number = f"{figure.rate:,.0f}" if figure.rate >= 1000 else f"{figure.rate:.3g}"
    return f"{number} {figure.case.unit.value}"


def as_markdown(found: Sequence[Figure]) -> str:
    """Return a table of the figures."""
    lines = [
        "| case | contender | rate | to gost | CPU | to gost | p50, added | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {' | '.join(_cells(figure))} |" for figure in found]
    return "\n".join(lines) + "\n"


def _cells(figure: Figure) -> list[str]:
    unit = figure.case.unit
    marks = [f"{figure.failed} failed"] * bool(figure.failed) + [f"{figure.lost} lost"] * bool(figure.lost)
    ratio = "" if math.isnan(figure.ratio) else f"{figure.ratio:.2f}x ({figure.low:.2f}-{figure.high:.2f})"
    return [
        figure.case.title,
        figure.contender,
        ", ".join([rate(figure), *marks]),
        ratio,
        f"{figure.cpu:.3g} {figure.case.cpu_unit}" if figure.cpu > 0 else "",
        "" if math.isnan(figure.cpu_ratio) else f"{figure.cpu_ratio:.2f}x",
        "" if math.isnan(figure.added) else f"{figure.added:,.0f} us",
        f"{figure.p99:,.0f} us" if figure.p99 and unit is not Unit.MEMORY else "",
    ]
