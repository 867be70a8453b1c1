"""Markers, filters and strategies. Names of tests carry the ids of docs/compatibility.md."""

from __future__ import annotations

import random
from collections import Counter
from zlib import crc32

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import ConfigError
from gostnet.core.flow import Flow
from gostnet.pipeline.node import Latency, Marker, Node
from gostnet.pipeline.selector import (
    Fifo,
    Hash,
    LowestLatency,
    Parallel,
    Random,
    RoundRobin,
    Selector,
    strategy_of,
)

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
    [
        *(("127.0.0.1", 2, 0), ("127.0.0.1", 3, 2), ("192.168.1.1", 2, 1), ("192.168.1.1", 3, 0)),
        *(("10.0.0.1", 2, 1), ("10.0.0.1", 3, 2), ("example.com:443", 2, 0), ("example.com:443", 3, 0)),
        *(("u1", 2, 0), ("u1", 3, 2)),
    ],
)
def test_l05_to_l09_hash_of_the_source(source: str, count: int, index: int) -> None:
    flow = Flow()
    flow.hash = source
    assert Hash().pick(flow, nodes(count)).name == f"n{index}"


def test_l04_l10_the_client_id_decides() -> None:
    flow = Flow(client=Endpoint("127.0.0.1", 1))
    flow.user = "test-client"
    assert Hash().pick(flow, nodes(5)).name == f"n{crc32(b'test-client') % 5}"


def test_l14_weights_of_nothing_are_equal() -> None:
    items = [node("a", 1, weight=0), node("b", 2, weight=0)]
    strategy = Random(random.Random(1))
    picked = Counter(strategy.pick(Flow(), items).name for _ in range(1000))
    assert 400 < picked["a"] < 600


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


def picked(selector: Selector, items: list, flow: Flow | None = None, now: float = 0.0) -> list[str]:
    return [item.name for item in selector.pick(flow or Flow(), items, now)]


def test_m04_no_settings_are_one_failure_and_ten_seconds() -> None:
    marker = Marker()
    marker.mark(0.0)
    assert marker.failed(9.9)
    assert not marker.failed(10.0)


def test_round_robin_gives_each_its_weight_in_turns() -> None:
    items = [node("a", 1, weight=3), node("b", 2, weight=1), node("c", 3, weight=0)]
    strategy = RoundRobin()
    turns = [strategy.pick(Flow(), items).name for _ in range(10)]
    assert Counter(turns) == {"a": 6, "b": 2, "c": 2}
    assert "aaa" not in "".join(turns)
    # One that has gone keeps no credit, one that comes gets none.
    assert strategy.pick(Flow(), items[1:]).name in ("b", "c")


def test_l11_a_race_of_one_is_that_one() -> None:
    assert picked(Selector(Parallel()), nodes(1)) == ["n0"]


def test_l12_all_that_live_race_and_their_number_is_bounded() -> None:
    items = nodes(20)
    items[1].marker.mark(0.0)
    selector = Selector(Parallel())
    assert picked(selector, items[:4]) == ["n0", "n2", "n3"]
    assert picked(selector, items) == ["n0", *(f"n{index}" for index in range(2, 9))]
    for item in items:
        item.marker.down = True
    assert picked(selector, items[:3]) == ["n0", "n1", "n2"]  # when all are dead, whoever answers is welcome
    assert selector.select(Flow(), items[:3], 0.0) is items[0]


def measured(name: str, port: int, value: float | None, *, probed: bool = True, seen: float = 0.0) -> Node:
    made = node(name, port)
    made.latency = Latency(value, seen, probed)
    return made


def test_l15_the_lowest_latency_wins() -> None:
    items = [measured("a", 1, 0.05), measured("b", 2, 0.01), measured("c", 3, None)]
    assert LowestLatency().pick(Flow(), items, 1.0).name == "b"


def test_l16_without_any_latency_it_is_the_first() -> None:
    assert LowestLatency().pick(Flow(), [measured("a", 1, None), measured("b", 2, None)], 1.0).name == "a"
    assert LowestLatency().pick(Flow(), nodes(2), 1.0).name == "n0"


def test_without_probes_one_flow_at_a_time_measures_who_is_unknown_or_stale() -> None:
    items = [measured("a", 1, 0.01, probed=False), measured("b", 2, None, probed=False)]
    strategy = LowestLatency()
    assert [strategy.pick(Flow(), items, 1.0).name for _ in range(3)] == ["b", "a", "a"]
    assert strategy.pick(Flow(), items, 12.0).name == "b"  # the one that was sent has never come back
    items[1].latency.note(0.002, 13.0)
    assert [strategy.pick(Flow(), items, 20.0).name for _ in range(2)] == ["b", "b"]
    assert [strategy.pick(Flow(), items, 61.0).name for _ in range(2)] == ["a", "b"]


def test_latency_is_smoothed() -> None:
    latency = Latency()
    latency.note(0.03, 1.0)
    latency.note(0.06, 2.0)
    assert latency.value == pytest.approx(0.04)
    assert latency.seen == 2.0


def test_l17_l18_slow_ones_are_left_out_while_fast_ones_are_there() -> None:
    selector = Selector(Fifo(), max_latency=0.05)
    fast, slow, unknown = measured("fast", 1, 0.01), measured("slow", 2, 0.1), measured("unknown", 3, None)
    assert selector.measures
    assert picked(selector, [slow, fast]) == ["fast"]
    assert picked(selector, [slow, unknown]) == ["unknown"]
    assert picked(selector, [slow]) == ["slow"]
    assert picked(selector, [slow, measured("slower", 4, 0.2)]) == ["slow"]  # GOST goes around the proxy here


def test_only_selectors_that_look_at_latencies_have_them_measured() -> None:
    assert Selector(LowestLatency()).measures
    assert not Selector(Parallel()).measures
    assert not Selector().measures


def test_what_a_probe_found_dead_stays_dead_whatever_time_passes() -> None:
    marker = Marker(1, 3.0)
    marker.down = True
    marker.mark(0.0)
    assert marker.failed(1000.0)
    marker.reset()
    assert marker.failed(1000.0)
    fresh = Marker(1, 3.0)
    fresh.take_over(marker)
    assert (fresh.down, fresh.failures, fresh.last) == (True, 0, 0.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("", RoundRobin), ("round", RoundRobin), ("rr", RoundRobin), ("random", Random), ("rand", Random)),
        *(("fifo", Fifo), ("ha", Fifo), ("hash", Hash), ("Parallel", Parallel)),
        *(("lowestlatency", LowestLatency), ("lowest", LowestLatency), ("ll", LowestLatency)),
    ],
)
def test_every_name_of_a_strategy_is_known(name: str, kind: type) -> None:
    assert type(strategy_of(name)) is kind
