"""What is said of several workers before they start."""

from __future__ import annotations

import os

import pytest

from gostnet.app.check_workers import alone, as_lines
from gostnet.app.checking import check_loaded
from gostnet.config.argv import parse_args
from gostnet.config.load import Loaded, Loader

TUN = "tun://:8421?net=192.0.2.1/24"


def loaded(*words: str) -> Loaded:
    return Loader(parse_args(words), environment={}).load()


def warnings(*words: str) -> list[str]:
    return [each.message for each in check_loaded(loaded(*words)) if each.code == "config.workers"]


@pytest.fixture(autouse=True)
def _four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


def test_more_workers_than_processors_are_told() -> None:
    assert warnings("--workers", "5", "-L", "socks5://:1080") == ["5 processes share 4 processors"]
    assert warnings("--workers", "4", "-L", "socks5://:1080") == []
    assert warnings("--workers", "auto", "-L", "socks5://:1080") == []


def test_workers_that_have_nothing_to_share_are_told() -> None:
    assert warnings("--workers", "2", "-L", TUN) == [
        "no listener here can be shared: the first worker does all the work"
    ]
    assert warnings("--workers", "2", "-L", TUN, "-L", "socks5://:1080") == []
    assert warnings("-L", TUN) == []


def test_probes_of_each_worker_are_told_at_their_place() -> None:
    config = """{"workers": "2",
        "services": [{"name": "s", "addr": ":1080", "handler": {"type": "socks5", "chain": "c"}}],
        "chains": [{"name": "c", "hops": [{"name": "h", "nodes": [{"name": "n", "addr": "192.0.2.1:1080",
            "probe": {"type": "tcp", "interval": "5s"}}]}]}]}"""
    found = [each for each in check_loaded(loaded("-C", config)) if each.code == "config.workers"]
    assert [(each.severity, each.path) for each in found] == [("warning", "chains[0].hops[0].nodes[0].probe")]


def test_who_serves_what_is_said() -> None:
    words = ("-L", TUN, "-L", "socks5://:1080", "-L", "udp://:53/192.0.2.1:53")
    config = loaded("--workers", "2", *words).config
    assert alone(config) == ["service-0"]
    assert list(as_lines(config)) == [
        "2 workers serve service-1, service-2",
        "the first of 2 workers alone serves service-0: their listeners cannot be shared",
    ]
    assert list(as_lines(loaded(*words).config)) == []
