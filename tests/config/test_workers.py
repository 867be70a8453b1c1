"""`workers` and `--workers`: what is taken, what is refused, and that nobody sees them who does not ask."""

from __future__ import annotations

import os

import pytest

from gostnet.config.argv import UsageError, parse_args
from gostnet.config.dump import dump
from gostnet.config.load import Loaded, Loader
from gostnet.config.workers import MOST, parse_workers


def load(*words: str) -> Loaded:
    return Loader(parse_args(words), environment={}).load()


def test_the_number_of_processes() -> None:
    assert parse_workers("") == 1
    assert parse_workers("3") == 3
    assert parse_workers("auto") == min(MOST, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "65", "2 2"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not auto or a number of processes from 1 to 64"):
        parse_workers(text)
    with pytest.raises(UsageError, match="--workers"):
        parse_args(["--workers", text, "-L", ":0"])


def test_the_flag_beats_the_file() -> None:
    assert load("-C", '{"workers": "3"}').config.workers == "3"
    assert load("-C", '{"workers": "3"}', "--workers", "auto").config.workers == "auto"


def test_nothing_is_printed_of_what_nobody_has_set() -> None:
    assert "workers" not in dump(load("-L", ":0").config, "yaml")
    assert "workers" not in dump(load("-L", ":0").config, "json")
    assert "workers: auto" in dump(load("-L", ":0", "--workers", "auto").config, "yaml")


def test_both_meanings_of_the_word_go_together() -> None:
    found = parse_args(["--workers", "2", "-L", ":0", "--", "-L", ":1"])
    assert [parse_args(part).processes for part in found.workers] == ["2", ""]
