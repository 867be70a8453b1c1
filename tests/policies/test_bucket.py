"""Token buckets: never more than the rate allows, and tables that stay small."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.policies import bucket as module
from gostnet.policies.bucket import Buckets, Rate, TokenBucket, local_buckets


class Hand:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


STEPS = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5000), st.integers(0, 100)), min_size=1, max_size=40)


@given(st.integers(1, 2000), st.integers(1, 4000), STEPS)
def test_never_more_than_rate_times_time_plus_burst(rate: int, burst: int, steps: list[tuple[float, int, int]]) -> None:
    clock = Hand()
    bucket = TokenBucket(Rate(rate, burst), clock)
    moved = 0
    for pause, wanted, returned_percent in steps:
        clock.now += pause
        granted = bucket.take(wanted)
        assert 0 <= granted <= wanted
        unused = granted * returned_percent // 100
        bucket.give_back(unused)
        moved += granted - unused
        assert moved <= rate * (clock.now - 1000.0) + burst + 1e-6


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 10**9))
def test_delay_is_when_something_may_move_again(rate: int, burst: int, wanted: int) -> None:
    clock = Hand()
    bucket = TokenBucket(Rate(rate, burst), clock)
    while bucket.take(burst):
        pass
    pause = bucket.delay()
    assert pause > 0
    clock.now += pause
    assert bucket.take(wanted) > 0


def test_it_starts_full_and_never_holds_more() -> None:
    clock = Hand()
    bucket = TokenBucket(Rate(100, 250), clock)
    clock.now += 60
    assert bucket.take(1000) == 250
    assert bucket.take(1000) == 0
    bucket.give_back(9999)
    assert bucket.take(1000) == 250
    clock.now += 0.5
    assert bucket.take(20) == 20
    assert bucket.take(1000) == 30
    assert bucket.delay() == pytest.approx(0.01, abs=1e-5)


def test_a_waiter_is_not_woken_for_single_bytes() -> None:
    clock = Hand()
    bucket = TokenBucket(Rate(1_000_000, 1_000_000), clock)
    bucket.take(1_000_000)
    clock.now += 0.001
    assert bucket.take(100_000) == 0
    clock.now += bucket.delay()
    assert bucket.take(100_000) == pytest.approx(10_000, abs=1)


def test_a_small_wish_is_granted_at_once() -> None:
    clock = Hand()
    bucket = TokenBucket(Rate(1_000_000, 1_000_000), clock)
    bucket.take(1_000_000)
    clock.now += 0.001
    assert bucket.take(500) == 500


def test_a_changed_rate_holds_for_running_buckets() -> None:
    clock = Hand()
    rate = Rate(100, 100)
    bucket = TokenBucket(rate, clock)
    bucket.take(100)
    rate.take_from(Rate(1000, 50))
    clock.now += 1
    assert bucket.take(1000) == 50


def test_a_held_bucket_is_never_made_twice() -> None:
    clock = Hand()
    buckets = Buckets(local_buckets(clock))
    rate = Rate(10, 10)
    held = buckets.get("a", rate)
    held.take(10)
    clock.now += 60  # full again, so a sweep may forget it
    for number in range(5000):
        buckets.get(number, rate)
    assert buckets.get("a", rate) is held
    assert buckets.get("a", Rate(5, 5)) is not held


def test_debts_outlive_the_connection_and_full_buckets_do_not() -> None:
    clock = Hand()
    buckets = Buckets(local_buckets(clock))
    rate = Rate(10, 10)
    buckets.get("debtor", rate).take(10)
    for number in range(3000):
        buckets.get(number, rate)
    gc.collect()
    assert len(buckets) <= 1100
    assert buckets.get("debtor", rate).take(10) == 0


def test_the_table_is_bounded_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BUCKETS", 4000)
    clock = Hand()
    buckets = Buckets(local_buckets(clock))
    rate = Rate(0.001, 10)
    for number in range(20_000):
        buckets.get(number, rate).take(10)
        assert len(buckets) <= 4000
    assert buckets.get(19_999, rate).take(10) == 0  # the newest are kept
