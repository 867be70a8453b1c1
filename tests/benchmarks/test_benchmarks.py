"""The benchmarks' own logic: choosing cases, finding contenders, ratios, tables and charts."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import chart, load, measure, report
from benchmarks.__main__ import draw_charts
from benchmarks.cases import CASES, Group, choose
from benchmarks.contenders import CONTENDERS
from benchmarks.load import Load, NoCompiler
from benchmarks.run import Results, Sample

BULK, SHORT = choose(["socks5.bulk-1", "socks5.short"])


def two_rounds() -> Results:
    results = Results()
    for kernel, gost, gostnet in ((40.0, 10.0, 20.0), (40.0, 20.0, 30.0)):
        results.add(BULK, "kernel", Sample(kernel))
        results.add(BULK, "gost", Sample(gost, cpu=0.5))
        results.add(BULK, "gostnet", Sample(gostnet, cpu=0.1))
    results.add(SHORT, "kernel", Sample(9000, p50=100))
    results.add(SHORT, "gostnet", Sample(4000, cpu=200, p50=350, p99=900, failed=2))
    return results


def test_cases_are_chosen_by_id_group_and_pattern() -> None:
    assert choose(["*"]) == list(CASES)
    assert [case.id for case in choose(["red.short", "socks5.bulk-*"])] == [
        "socks5.bulk-1",
        "socks5.bulk-50",
        "red.short",
    ]
    assert {case.group for case in choose(["udp", "tun"])} == {Group.UDP, Group.TUN}
    with pytest.raises(ValueError, match=r"no case fits 'sokcs5'; there are socks5\.bulk-1, "):
        choose(["sokcs5"])
    assert len({case.id for case in CASES}) == len(CASES)


def test_every_group_is_measured_against_the_limit_and_the_reference() -> None:
    by_name = {contender.name: contender for contender in CONTENDERS}
    for group in {case.group for case in CASES}:
        assert group in by_name["kernel"].groups
        assert group in by_name["gost"].groups
        assert group in by_name["gostnet"].groups


def test_ratios_are_of_the_same_round_and_medians_of_all() -> None:
    found = {(f.case.id, f.contender): f for f in report.figures([BULK, SHORT], two_rounds())}
    ours = found["socks5.bulk-1", "gostnet"]
    assert (ours.rate, ours.rounds) == (25, 2)
    assert (ours.ratio, ours.low, ours.high) == (1.75, 1.5, 2.0)
    assert ours.cpu_ratio == pytest.approx(0.2)
    assert math.isnan(found["socks5.bulk-1", "kernel"].cpu_ratio)
    short = found["socks5.short", "gostnet"]
    assert math.isnan(short.ratio)
    assert (short.added, short.failed) == (250, 2)


def test_a_table_and_json_say_what_was_measured() -> None:
    results = two_rounds()
    results.problems.append("haproxy, socks5, round 1: not ready")
    found = report.figures([BULK, SHORT], results)
    table = report.as_markdown(found)
    assert "| SOCKS5, 1 stream | gostnet | 25 Gb/s | 1.75x (1.50-2.00) | 0.1 s/GiB | 0.20x |  |  |" in table
    assert "4,000 connections/s, 2 failed" in table
    assert report.as_summary(found).splitlines() == [
        "| case | gost | kernel | gostnet |",
        "| --- | --- | --- | --- |",
        "| SOCKS5, 1 stream | 15 Gb/s, 0.5 s/GiB | 3.00x | 1.75x, 0.1 s/GiB |",
        "| SOCKS5, short connections, 32 at a time |  | 9,000 connections/s | 4,000 connections/s, 200 us |",
    ]
    content = json.loads(report.as_json(found, results, {"gost": "3.3.0"}, 1.0))
    assert content["versions"] == {"gost": "3.3.0"}
    assert content["machine"]["kernel"]
    assert content["problems"] == results.problems
    assert [sample["rate"] for sample in content["samples"]["socks5.bulk-1"]["gostnet"]] == [20, 30]
    assert {figure["ratio"] for figure in content["figures"] if figure["case"] == "socks5.short"} == {None}


def test_a_chart_puts_bars_on_both_sides_of_the_reference() -> None:
    svg = chart.draw(
        "a < b", "gost", [chart.Row("one & two", [chart.Bar("x", 4.0), chart.Bar("y", 0.5)]), chart.Row("z", [])]
    )
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    bars = [bar for bar in root.iter(f"{space}rect") if bar.find(f"{space}title") is not None]
    assert [bar.findtext(f"{space}title") for bar in bars] == ["x: 4.00x", "y: 0.50x"]
    line = next(line for line in root.iter(f"{space}line") if line.get("stroke") == "#1f2328")
    at = float(line.get("x1", "0"))
    assert float(bars[0].get("x", "0")) == pytest.approx(at, abs=0.1)
    assert float(bars[1].get("x", "0")) + float(bars[1].get("width", "0")) == pytest.approx(at, abs=0.1)
    assert float(bars[0].get("width", "0")) == pytest.approx(2 * float(bars[1].get("width", "0")), abs=0.2)
    with pytest.raises(ValueError, match="nothing to draw"):
        chart.draw("", "gost", [])


def test_charts_show_rates_and_what_they_cost(tmp_path: Path) -> None:
    results = two_rounds()
    (idle,) = choose(["socks5.idle"])
    results.add(idle, "gost", Sample(30))
    results.add(idle, "gostnet", Sample(6))
    draw_charts(report.figures([BULK, SHORT, idle], results), tmp_path)
    rate, cost = tmp_path.joinpath("rate.svg").read_text(), tmp_path.joinpath("cost.svg").read_text()
    assert "<title>gostnet: 1.75x</title>" in rate
    assert "<title>kernel: 3.00x</title>" in rate
    assert idle.title not in rate
    assert "<title>gostnet: 0.20x</title>" in cost
    assert "(6 KiB/connection)" in cost
    assert "kernel" not in cost
    assert SHORT.title not in rate + cost  # gost was not measured there


def test_a_contender_that_is_not_here_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gost = next(contender for contender in CONTENDERS if contender.name == "gost")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GOST_BIN", raising=False)
    assert gost.find() is None
    monkeypatch.setenv("GOST_BIN", "/somewhere/gost")
    assert gost.find() == "/somewhere/gost"
    assert gost.version_of("/somewhere/gost") == ""
    told = tmp_path / "gost"
    told.write_text("#!/bin/sh\necho 'gost v3.3.0 (go1.25 linux/amd64)'\n")
    told.chmod(0o755)
    assert gost.version_of(str(told)) == "v3.3.0"


def test_cpu_and_memory_of_a_tree_count_its_children() -> None:
    child = "sum(range(8000000)); print(1, flush=True); input()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        assert len(measure.tree(process.pid)) == 2
        assert measure.cpu([process.pid]) > 0.05
        assert measure.memory([process.pid]) > 8000
        process.stdin.close()


def test_the_command_line_refuses_what_it_does_not_know() -> None:
    for words, said in (
        (["--cases", "nope"], "no case fits"),
        (["--contenders", "nope"], "no contender is called nope"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 2
        assert said in done.stderr


def test_the_load_generator_measures_a_server_of_its_own() -> None:
    try:
        program = str(load.program())
    except NoCompiler as exc:
        pytest.skip(str(exc))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([program, "serve", str(port)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b'{"event":"serving"}\n'
        try:
            for kind in ("download", "upload", "short", "exchange", "udp"):
                words = Load(kind, streams=2, window=1).arguments(f"127.0.0.1:{port}", "", 0.1, 0.05)
                done = subprocess.run([program, *words], capture_output=True, text=True, check=True, timeout=10)
                start, end = (json.loads(line) for line in done.stdout.splitlines())
                assert start == {"event": "start"}
                assert end["bytes"] > 0
                assert end["failed"] == 0
                assert 0.09 < end["seconds"] < 5
                if kind not in ("download", "upload"):
                    assert end["done"] > 0
                    assert 0 < end["p50"] <= end["p99"]
        finally:
            server.terminate()
