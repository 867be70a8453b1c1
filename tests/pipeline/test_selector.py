"""Markers, filters and strategies. Names of tests carry the ids of docs/compatibility.md."""

from __future__ import annotations

import random
from collections import Counter
from zlib import crc32

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import ConfigError
from gostnet.core.flow import Flow
from gostnet.pipeline.node import Marker
from gostnet.pipeline.selector import Fifo, Hash, Random, RoundRobin, Selector, strategy_of

from .kit import node


def nodes(count: int) -> list:
    return [node(f"n{index}", 1000 + index) for index in range(count)]


@pytest.mark.parametrize(
    ("row", "failures", "age", "max_fails", "timeout", "failed"),
    [
        ("M01", 0, 0.0, 1, 10.0, False),
        ("M02", 1, 0.0, 1, 10.0, True),
        ("M03", 1, 0.0, 2, 10.0, False),
        ("M05", 1, 0.0, 5, 10.0, False),
        ("M06", 1, 0.5, 1, 0.25, False),
        ("M08", 1, 2.1, 1, 3.0, True),
    ],
)
def test_marker(row: str, failures: int, age: float, max_fails: int, timeout: float, failed: bool) -> None:
    marker = Marker(max_fails, timeout)
    for _ in range(failures):
        marker.mark(100.0)
    assert marker.failed(100.0 + age) is failed


def test_m07_the_count_is_not_reset_by_time() -> None:
    marker = Marker(2, 3.0)
    marker.mark(0.0)
    marker.mark(0.0)
    assert marker.failed(1.0)
    assert not marker.failed(3.5)
    marker.mark(3.5)
    assert marker.failed(3.6)
    marker.reset()
    assert not marker.failed(3.6)


def test_l01_round_robin() -> None:
    strategy, items = RoundRobin(), nodes(3)
    assert [strategy.pick(Flow(), items).name for _ in range(4)] == ["n0", "n1", "n2", "n0"]


def test_l02_fifo() -> None:
    items = nodes(3)
    assert {Fifo().pick(Flow(), items).name for _ in range(5)} == {"n0"}


def test_l03_random_follows_weights() -> None:
    items = [node("heavy", 1, weight=100), node("light", 2, weight=1), node("odd", 3, weight=-5)]
    strategy = Random(random.Random(7))
    picked = Counter(strategy.pick(Flow(), items).name for _ in range(2000))
    assert picked["heavy"] > 1800
    assert picked["odd"] > 0


@pytest.mark.parametrize(
    ("source", "count", "index"),
    [("127.0.0.1", 2, 0), ("127.0.0.1", 3, 2), ("192.168.1.1", 2, 1), ("10.0.0.1", 3, 2), ("u1", 2, 0), ("u1", 3, 2)],
)
def test_l05_to_l09_hash_of_the_source(source: str, count: int, index: int) -> None:
    flow = Flow()
    flow.hash = source
    assert Hash().pick(flow, nodes(count)).name == f"n{index}"


def test_l04_l10_the_client_id_decides() -> None:
    flow = Flow(client=Endpoint("127.0.0.1", 1))
    flow.user = "test-client"
    assert Hash().pick(flow, nodes(5)).name == f"n{crc32(b'test-client') % 5}"


def test_l19_backups_wait_for_the_last_primary() -> None:
    selector = Selector(Fifo())
    primary, backup = node("p", 1), node("b", 2, backup=True)
    assert selector.select(Flow(), [backup, primary], 0.0) is primary
    assert selector.select(Flow(), [backup], 0.0) is backup
    primary.marker.mark(0.0)
    assert selector.select(Flow(), [backup, primary], 1.0) is backup


def test_h11_when_all_are_dead_the_first_is_tried() -> None:
    selector, items = Selector(Fifo()), nodes(2)
    for item in items:
        item.marker.mark(0.0)
    assert selector.select(Flow(), items, 1.0) is items[0]


def test_a_node_that_failed_in_this_attempt_is_not_tried_again_while_others_are_left() -> None:
    selector, items = Selector(Fifo()), nodes(2)
    flow = Flow()
    flow.tried = (items[0],)
    assert selector.select(flow, items, 0.0) is items[1]


def test_an_unknown_strategy_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"chains\[0\].*'rounds' is not a strategy"):
        strategy_of("rounds", "chains[0].hops[0].selector.strategy")
