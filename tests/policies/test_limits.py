"""Limits of connections and requests: every row of the table, exact release, reloads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.contracts import Slot
from gostnet.core.errors import ConfigError
from gostnet.policies.entries import inline
from gostnet.policies.limits import AllOf, ConnectionLimits, RateLimits, compile_connections, compile_rates

RULES = ["$ 5", "$$ 3", "10.0.0.1 1", "10.0.0.0/8 2", "10.1.0.0/16 4"]


def fill(limits: ConnectionLimits, host: str) -> list[Slot]:
    """Take slots until one is refused."""
    slots: list[Slot] = []
    while (slot := limits.acquire(Endpoint(host, len(slots)))) is not None:
        slots.append(slot)
        assert len(slots) < 100
    return slots


@pytest.mark.parametrize(
    ("row", "extra", "hosts", "allowed"),
    [
        ("K01", [], ["10.0.0.1"], [1]),
        ("K02", [], ["10.0.0.2", "10.0.0.3"], [2, 2]),
        # GOST takes the widest network, and the narrower rule is dead.
        ("K03", [], ["10.1.2.3"], [4]),
        ("K04", [], ["192.168.1.1", "192.168.1.2"], [3, 2]),
        ("K04", [], ["192.168.1.2"], [3]),
        ("K05", [], [""], [3]),
        ("K05", [], ["client.example"], [3]),
        ("K06", ["10.9.9.9 0"], ["10.9.9.9"], [2]),
        ("K06", ["10.9.9.9 -1"], ["10.9.9.9"], [2]),
        ("zone", ["fe80::/10 1"], ["fe80::1%eth0"], [1]),
    ],
)
def test_row(row: str, extra: list[str], hosts: list[str], allowed: list[int]) -> None:
    limits = ConnectionLimits.from_lines([*RULES, *extra])
    assert [len(fill(limits, host)) for host in hosts] == allowed


def test_row_k08_over_the_limit_is_a_refusal_and_the_next_one_is_served() -> None:
    limits = ConnectionLimits.from_lines(["$ 2"])
    first, second = fill(limits, "192.0.2.1")
    assert limits.acquire(Endpoint("192.0.2.2", 1)) is None
    first.release()
    third = limits.acquire(Endpoint("192.0.2.2", 1))
    assert third is not None
    assert limits.acquire(Endpoint("192.0.2.3", 1)) is None
    second.release()
    third.release()
    assert limits.total == 0


def test_row_k09_a_slot_is_released_once() -> None:
    limits = ConnectionLimits.from_lines(["$$ 1"])
    (slot,) = fill(limits, "192.0.2.1")
    slot.release()
    slot.release()
    (again,) = fill(limits, "192.0.2.1")
    slot.release()
    assert limits.acquire(Endpoint("192.0.2.1", 1)) is None
    again.release()
    assert limits.total == 0


def test_a_refusal_counts_nothing() -> None:
    limits = ConnectionLimits.from_lines(["$ 5", "192.0.2.1 1"])
    slots = fill(limits, "192.0.2.1")
    for _ in range(10):
        assert limits.acquire(Endpoint("192.0.2.1", 1)) is None
    assert limits.total == 1
    assert limits.count(Endpoint("192.0.2.1", 9)) == 1
    slots[0].release()
    assert limits.count(Endpoint("192.0.2.1", 9)) == 0


def test_connections_from_before_a_reload_count_on() -> None:
    limits = ConnectionLimits.from_lines(["$$ 3"])
    slots = fill(limits, "192.0.2.1")
    rules, _ = compile_connections(inline(["$$ 4", "$ 5"], "limits"))
    limits.replace(rules)
    slots += fill(limits, "192.0.2.1")
    assert len(slots) == 4
    assert len(fill(limits, "192.0.2.2")) == 1
    for slot in slots:
        slot.release()
    assert limits.total == 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=60))
def test_counts_equal_a_model(steps: list[tuple[bool, int]]) -> None:
    limits = ConnectionLimits.from_lines(["$ 6", "$$ 3", "10.0.0.0 1", "10.0.0.0/30 2"])
    own = [1, 2, 2, 2]
    held: list[list[Slot]] = [[], [], [], []]
    for acquire, who in steps:
        if acquire:
            slot = limits.acquire(Endpoint(f"10.0.0.{who}", 1))
            expected = len(held[who]) < own[who] and sum(map(len, held)) < 6
            assert (slot is not None) is expected
            if slot is not None:
                held[who].append(slot)
        elif held[who]:
            held[who].pop().release()
        assert limits.total == sum(map(len, held))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("$ many", "'many' is not a number of connections"),
        ("$ 1.5", "'1.5' is not a number of connections"),
        ("$ 1 2", "'1 2' is not a number of connections"),
        ("$", "'$' has no value"),
        ("example.com 5", "'example.com' is not $, $$, an address"),
        ("10.0.0.0/33 5", "is not $, $$, an address"),
    ],
)
def test_bad_line_is_refused_with_its_place(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ConnectionLimits.from_lines(["$ 1", line], "climiters[0].limits")
    assert caught.value.path == "climiters[0].limits[1]"
    assert message in str(caught.value)


class Hand:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def burst(limits: RateLimits, host: str, tries: int = 50) -> int:
    return sum(limits.allow(Endpoint(host, port)) for port in range(tries))


def test_row_k07_one_more_than_the_rate_may_come_at_once() -> None:
    clock = Hand()
    limits = RateLimits.from_lines(["$$ 3"], clock=clock)
    assert burst(limits, "192.0.2.1", 8) == 4
    assert burst(limits, "192.0.2.2", 8) == 4
    clock.now += 1
    assert burst(limits, "192.0.2.1", 8) == 3


def test_rates_by_address_network_and_total() -> None:
    clock = Hand()
    limits = RateLimits.from_lines(["$ 20", "10.0.0.1 1", "10.0.0.0/8 2.5", "$$ 4"], clock=clock)
    assert burst(limits, "10.0.0.1") == 2
    assert burst(limits, "10.0.0.2") == 3
    assert burst(limits, "192.0.2.1") == 5
    clock.now += 60
    assert sum(burst(limits, f"192.0.2.{n}") for n in range(10)) == 21


def test_a_refusal_by_the_total_uses_up_nothing_of_the_client() -> None:
    clock = Hand()
    limits = RateLimits.from_lines(["$ 1", "$$ 9"], clock=clock)
    assert burst(limits, "192.0.2.1") == 2
    rules, _ = compile_rates(inline(["$$ 9"], "limits"))
    limits.replace(rules)
    assert burst(limits, "192.0.2.1") == 8


def test_rates_survive_a_reload() -> None:
    clock = Hand()
    limits = RateLimits.from_lines(["$$ 3"], clock=clock)
    assert burst(limits, "192.0.2.1") == 4
    rules, _ = compile_rates(inline(["$$ 5"], "limits"))
    limits.replace(rules)
    assert burst(limits, "192.0.2.1") == 0
    clock.now += 1
    assert burst(limits, "192.0.2.1") == 5


def test_no_rate_is_no_limit() -> None:
    limits = RateLimits.from_lines(["$ 0", "10.0.0.1 -1"])
    assert burst(limits, "10.0.0.1", 1000) == 1000


@pytest.mark.parametrize("line", ["$ x", "$ nan", "$ inf", "$ 1 2", "$"])
def test_bad_rate_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^rlimiters\[0\]\.limits\[0\]: "):
        RateLimits.from_lines([line], "rlimiters[0].limits")


def test_several_limiters_as_one_give_back_what_they_took() -> None:
    first, second = ConnectionLimits.from_lines(["$ 9"]), ConnectionLimits.from_lines(["$ 2"])
    rates = RateLimits.from_lines(["$ 100"])
    both = AllOf([first, second, rates])
    slots = [both.acquire(Endpoint("192.0.2.1", port)) for port in range(4)]
    assert [slot is not None for slot in slots] == [True, True, False, False]
    assert (first.total, second.total) == (2, 2)
    for slot in slots:
        if slot is not None:
            slot.release()
            slot.release()
    assert (first.total, second.total) == (0, 0)
