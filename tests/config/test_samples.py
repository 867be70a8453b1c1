"""Every sample in config/ is free of errors, and can be assembled into services."""

from __future__ import annotations

from pathlib import Path

import pytest

from gostnet.app.checking import check_loaded
from gostnet.app.daemon import assemble
from gostnet.config.argv import parse_args
from gostnet.config.load import load
from gostnet.core.tasks import run

SAMPLES = sorted((Path(__file__).parents[2] / "config").glob("*.yaml"))


def test_there_are_samples() -> None:
    assert len(SAMPLES) >= 6


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_sample_is_clean_and_builds(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = load(parse_args(["check", "-C", str(path)]))
    assert [str(finding) for finding in check_loaded(loaded, strict=True)] == []

    async def build() -> list[str]:
        return list(assemble(loaded).services)

    assert run(build()) == [service.name for service in loaded.config.services]
