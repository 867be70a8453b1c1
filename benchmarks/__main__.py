"""`python -m benchmarks`: measure gostnet against its peers, in namespaces of its own. Needs root and a C compiler."""

from __future__ import annotations

import argparse
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from gostnet import __version__
from gostnet.core.errors import GostnetError

from . import chart, report
from .cases import CASES, Unit, choose
from .contenders import CONTENDERS, REFERENCE, Contender
from .load import NoCompiler
from .run import Plan, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 if a contender could not be measured, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cases", default="*", help="ids, groups or patterns, separated by commas: socks5,red.bulk-*")
    parser.add_argument("--contenders", default="", help="names, separated by commas; all that are here otherwise")
    parser.add_argument("--rounds", type=int, default=5, help="times that every contender is measured (5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (1)")
    parser.add_argument("--out", type=Path, help="directory for results.json, results.md, rate.svg and cost.svg")
    parser.add_argument("--list", action="store_true", help="show cases and contenders, measure nothing")
    options = parser.parse_args(arguments)
    wanted = [name for name in options.contenders.split(",") if name]
    unknown = set(wanted) - {contender.name for contender in CONTENDERS}
    if unknown:
        parser.error(f"no contender is called {', '.join(sorted(unknown))}")
    try:
        cases = choose(options.cases.split(","))
    except ValueError as exc:
        parser.error(str(exc))
    present = _present(wanted)
    versions = {contender.name: contender.version_of(path) for contender, path in present}
    versions["gostnet"] = __version__
    if options.list:
        print("\n".join(f"{case.id:16} {case.title}" for case in CASES))
        print("contenders:", ", ".join(f"{c.name} {versions[c.name]}".strip() for c, _ in present))
        return 0
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the programs inherit it: idle connections are many
    try:
        results = run(Plan(cases, present, options.rounds, options.seconds), lambda line: print(line, file=sys.stderr))
    except (GostnetError, NoCompiler) as exc:
        print(f"benchmarks: {exc}", file=sys.stderr)
        return 1
    found = report.figures(cases, results)
    table = f"{report.as_summary(found)}\n{report.as_markdown(found)}"
    print(table)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        options.out.joinpath("results.json").write_text(report.as_json(found, results, versions, options.seconds))
        options.out.joinpath("results.md").write_text(table)
        draw_charts(found, options.out)
    return 1 if results.problems else 0


def _present(wanted: Sequence[str]) -> list[tuple[Contender, str]]:
    present = []
    for contender in CONTENDERS:
        if wanted and contender.name not in wanted:
            continue
        path = contender.find()
        if path is None:
            print(f"{contender.name} is not here: set {contender.variable} or PATH", file=sys.stderr)
        else:
            present.append((contender, path))
    return present


def draw_charts(found: Sequence[report.Figure], out: Path) -> None:
    """Draw rates, and what they cost, as multiples of the reference's where that was measured."""
    for name, title in (
        ("rate", "Rate, times that of gost: longer to the right is better"),
        ("cost", "CPU per byte or operation, and memory, times that of gost: longer to the left is better"),
    ):
        rows: dict[str, list[chart.Bar]] = {}
        for figure in found:
            memory = figure.case.unit is Unit.MEMORY
            ratio = figure.ratio if memory or name == "rate" else figure.cpu_ratio
            if (memory and name == "rate") or figure.contender == REFERENCE or math.isnan(ratio) or ratio <= 0:
                continue
            note = f"({report.rate(figure)})" if memory or name == "rate" else f"({report.cost(figure)})"
            rows.setdefault(figure.case.title, []).append(chart.Bar(figure.contender, ratio, note))
        if rows:
            order = ["gostnet", *(contender.name for contender in CONTENDERS)]
            bars = [chart.Row(case, sorted(of, key=lambda bar: order.index(bar.name))) for case, of in rows.items()]
            out.joinpath(f"{name}.svg").write_text(chart.draw(title, REFERENCE, bars, order))


if __name__ == "__main__":
    sys.exit(main())
