"""Limits of several workers: what is promised holds for all of them together, and outlives one of them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from gostnet.core.address import Endpoint
from gostnet.policies.bucket import Rate
from gostnet.policies.entries import inline
from gostnet.policies.ledger import ROWS, SETS, WAYS, Ledger, key_of
from gostnet.policies.limits import RateLimits, compile_connections
from gostnet.policies.quota import Terms
from gostnet.policies.shared import SharedBucket, SharedConnectionLimits, SharedQuota, shared_buckets

ALICE, BOB = Endpoint("192.0.2.1", 1000), Endpoint("192.0.2.2", 1000)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ledgers() -> Iterator[tuple[Ledger, Ledger]]:
    """The rows as two workers see them."""
    first = Ledger.create(2)
    yield first, Ledger(first.descriptor, 2, 1)
    os.close(first.descriptor)


Pair = tuple[Ledger, Ledger]


def limits(ledgers: Pair, *lines: str) -> tuple[SharedConnectionLimits, SharedConnectionLimits]:
    rules, problems = compile_connections(inline(lines, "limits"))
    assert not problems
    first, second = (SharedConnectionLimits(rules, ledger, "c") for ledger in ledgers)
    return first, second


# ---- rows ---------------------------------------------------------------------------------------
def in_one_set(count: int) -> list[bytes]:
    """Return keys whose rows are in the same set."""
    found: list[bytes] = []
    number = 0
    while len(found) < count:
        key = key_of(number)
        number += 1
        if int.from_bytes(key[:2]) % SETS == 7:
            found.append(key)
    return found


def test_a_key_has_one_row_for_everybody(ledgers: Pair) -> None:
    rows = set()
    for ledger in ledgers:
        rows.add(ledger.enter(key_of("x")))
        ledger.leave(key_of("x"))
    assert len(rows) == 1
    assert 0 <= rows.pop() < ROWS


def test_a_full_set_gives_up_the_row_that_was_used_longest_ago(ledgers: Pair) -> None:
    first, second = ledgers
    *keys, more = in_one_set(WAYS + 1)
    rows = {}
    for number, key in enumerate(keys):
        rows[key] = first.enter(key)
        first.stamps[rows[key]] = 100.0 - number
        first.leave(key)
    assert second.enter(more) == rows[keys[-1]]
    assert second.stamps[rows[keys[-1]]] == 0.0
    second.leave(more)


def test_rows_that_count_connections_or_are_pinned_are_never_given_up(ledgers: Pair) -> None:
    first, second = ledgers
    *keys, more = in_one_set(WAYS + 1)
    pinned = first.pin(keys[0])
    for key in keys[1:]:
        second.own[second.enter(key)] += 1
        second.leave(key)
    assert first.enter(more) == -1
    first.leave(more)
    first.forget(1)
    assert first.enter(more) not in (-1, pinned)
    first.leave(more)


def test_the_lock_of_a_worker_that_is_killed_is_free_again() -> None:
    ledger = Ledger.create(2)
    key = key_of("x")
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        ledger.enter(key)
        os.write(tell, b"x")
        signal.pause()
    assert os.read(told, 1) == b"x"
    entered = threading.Event()

    def enter() -> None:
        ledger.enter(key)
        ledger.leave(key)
        entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(0.05)
    os.kill(pid, signal.SIGKILL)
    assert entered.wait(5)
    waiting.join()
    os.waitpid(pid, 0)
    for descriptor in (told, tell, ledger.descriptor):
        os.close(descriptor)


# ---- connections --------------------------------------------------------------------------------
def test_connections_of_all_workers_count(ledgers: Pair) -> None:
    first, second = limits(ledgers, "$ 3", "$$ 2")
    slots = [first.acquire(ALICE), second.acquire(ALICE)]
    assert None not in slots
    assert first.acquire(ALICE) is None
    assert second.acquire(ALICE) is None
    assert first.count(ALICE) == second.count(ALICE) == 2
    bob = second.acquire(BOB)
    assert bob is not None
    assert first.acquire(BOB) is None  # three in all
    bob.release()
    bob.release()
    assert first.acquire(BOB) is not None


def test_a_refusal_takes_nothing(ledgers: Pair) -> None:
    first, second = limits(ledgers, "$ 2", "$$ 1")
    assert first.acquire(ALICE) is not None
    for _ in range(5):
        assert second.acquire(ALICE) is None
    assert second.acquire(BOB) is not None


def test_connections_of_a_dead_worker_are_given_back(ledgers: Pair) -> None:
    first, second = limits(ledgers, "$ 2")
    assert first.acquire(ALICE) is not None
    assert second.acquire(ALICE) is not None
    assert first.acquire(ALICE) is None
    ledgers[0].forget(1)
    assert first.acquire(ALICE) is not None
    assert first.acquire(ALICE) is None


# ---- rates --------------------------------------------------------------------------------------
def test_one_bucket_for_all_workers(ledgers: Pair) -> None:
    clock = Clock()
    first, second = (SharedBucket(Rate(100, 50), clock, ledger, key_of("b")) for ledger in ledgers)
    assert first.take(30) == 30
    assert second.take(30) == 20
    assert first.take(1) == 0
    assert first.delay() > 0
    clock.now += 0.125
    assert second.take(100) == 12
    first.give_back(5)
    assert second.take(100) == 5
    clock.now += 10
    assert first.full()
    assert second.full()


def test_requests_of_all_workers_count(ledgers: Pair) -> None:
    clock = Clock()
    limiters = []
    for ledger in ledgers:
        limiter = RateLimits.from_lines(["$$ 3"], clock=clock, make=shared_buckets(ledger, clock, "r"))
        limiters.append(limiter)
    allowed = [limiters[number % 2].allow(ALICE) for number in range(10)]
    assert sum(allowed) == 4
    assert limiters[0].allow(BOB)


# ---- quotas -------------------------------------------------------------------------------------
def test_a_quota_is_met_to_the_byte(ledgers: Pair) -> None:
    first, second = (SharedQuota("q", Terms(limit=100), ledger) for ledger in ledgers)
    assert first.take(60) == 60
    assert second.used == 60
    assert second.take(60) == 40
    assert first.blocked
    assert second.blocked
    assert first.changed
    first.changed = False
    second.count(-10)
    assert first.changed
    assert first.used == 90


def test_a_worker_that_begins_later_finds_what_was_used(ledgers: Pair) -> None:
    SharedQuota("q", Terms(limit=100), ledgers[0]).count(70)
    later = SharedQuota("q", Terms(limit=100), ledgers[1])
    assert later.used == 70
    later.reset()  # the first worker's to do
    assert later.used == 70
