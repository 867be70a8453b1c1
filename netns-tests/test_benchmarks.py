"""The benchmarks run: two contenders, measured for a moment, and nothing is left of their network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import load
from gostnet.kernel import netns

pytestmark = pytest.mark.netns


def test_gostnet_is_measured_against_the_kernel(tmp_path: Path) -> None:
    try:
        load.program()
    except load.NoCompiler as exc:
        pytest.skip(str(exc))
    before = netns.names()
    words = ["--cases", "socks5.bulk-1,socks5.exchange", "--contenders", "kernel,gostnet", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words, "--seconds", "0.2", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(tmp_path.joinpath("results.json").read_text())
    measured = {(figure["case"], figure["contender"]): figure for figure in content["figures"]}
    assert len(measured) == 4
    for figure in measured.values():
        assert figure["rate"] > 0
    assert measured["socks5.bulk-1", "gostnet"]["cpu"] > 0
    assert measured["socks5.exchange", "gostnet"]["p50"] > 0
    assert "| SOCKS5, 1 stream | gostnet |" in tmp_path.joinpath("results.md").read_text()
    assert netns.names() == before
