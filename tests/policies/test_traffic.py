"""Bandwidth limits: every row of the table, on a clock that the tests move."""

from __future__ import annotations

import gc

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.contracts import TrafficLimiter
from gostnet.core.errors import ConfigError
from gostnet.core.flow import Flow, Shapers
from gostnet.policies.entries import inline, lines
from gostnet.policies.traffic import TrafficLimits, compile_traffic, parse_rate

KIB = 1024
AMOUNT = 600 * KIB


class Hand:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Hand, *rules: str) -> TrafficLimits:
    return TrafficLimits.from_lines(rules, clock=clock)


class Download:
    """One connection through one or two limiters, as a relay moves it: asks all shapers, waits for the slowest."""

    def __init__(self, *limiters: TrafficLimiter, host: str = "127.0.0.1", port: int = 1, user: str = "") -> None:
        self.flow = Flow(client=Endpoint(host, port))
        self.flow.user = user
        shapers = self.flow.shapers = Shapers()
        for limiter in limiters:
            limiter.shape(self.flow, shapers)
        self.shapers = shapers
        self.left = AMOUNT

    def step(self) -> float:
        """Move what may move; return seconds to wait, 0 if something moved."""
        wanted = min(self.left, 65536)
        allowed = wanted
        for index, shaper in enumerate(self.shapers.down):
            got = shaper.take(allowed)
            for earlier in self.shapers.down[:index]:
                earlier.give_back(allowed - got)
            allowed = got
        self.left -= allowed
        return 0.0 if allowed else max(shaper.delay() for shaper in self.shapers.down)


def seconds(clock: Hand, *downloads: Download) -> list[float]:
    """Run downloads side by side; return how long each took."""
    began = clock.now
    ends: dict[int, float] = {}
    while len(ends) < len(downloads):
        pauses = []
        for index, download in enumerate(downloads):
            if index not in ends:
                pause = download.step()
                if not download.left:
                    ends[index] = clock.now - began
                pauses.append(pause)
        if all(pauses):
            clock.now += min(pauses) + 1e-6
    return [ends[index] for index in range(len(downloads))]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("100B", 100),
        ("1KB", 1024),
        ("1KiB", 1024),
        ("1MB", 1048576),
        ("1.5MB", 1572864),
        ("1GB", 1 << 30),
        ("1TB", 1 << 40),
        ("1MB512KB", 1572864),
        ("-1MB", 0),
        ("0B", 0),
        ("0", 0),
        ("-1", 0),
    ],
)
def test_rows_t01_and_t03_units(word: str, expected: int) -> None:
    assert parse_rate(word) == expected


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("100", "has no unit; write 100B, 100KB or 100MB"),
        ("1mb", "write 1MB"),
        ("512K", "write 512KB"),
        ("1M", "write 1MB"),
        ("1kB", "write 1KB"),
        ("1.5gib", "write 1.5GB"),
        ("10b", "write 10B"),
        ("10Mbps", "in bytes a second"),
        ("fast", "in bytes a second"),
    ],
)
def test_row_t02_what_gost_ignores_is_an_error(word: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrafficLimits.from_lines(["$ 1MB", f"$$ {word}"], "limiters[0].limits")
    assert caught.value.path == "limiters[0].limits[1]"
    assert suggestion in str(caught.value)


@pytest.mark.parametrize("line", ["$ 10 MB", "$", "$ 1MB 1MB 1MB 1MB", "example.com 1MB", "10.0.0.1-10.0.0.2 1MB"])
def test_other_bad_lines(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^limiters\[0\]\.limits\[0\]: "):
        TrafficLimits.from_lines([line], "limiters[0].limits")


@pytest.mark.parametrize(
    ("row", "rules", "expected"),
    [
        ("T04", ["$ 200KB 200KB"], 2.0),
        ("T05", ["$$ 200KB 200KB"], 2.0),
        ("T06", ["127.0.0.1 200KB 200KB"], 2.0),
        ("T08", ["127.0.0.0/8 200KB 200KB"], 2.0),
        ("T09", ["$$ 400KB 400KB", "127.0.0.1 200KB 200KB"], 2.0),
        ("T10", ["$ 200KB"], 0.0),
        ("T11", ["$ 0B 200KB"], 2.0),
        ("T13", ["127.0.0.1 200KB 200KB 600KB"], 0.0),
        ("exact before network", ["127.0.0.1 200KB 200KB", "127.0.0.0/8 100KB 100KB"], 2.0),
        ("narrow before wide", ["127.0.0.0/8 100KB 100KB", "127.0.0.0/24 200KB 200KB"], 2.0),
        ("another client", ["127.0.0.2 1KB 1KB"], 0.0),
    ],
)
def test_row(row: str, rules: list[str], expected: float) -> None:
    clock = Hand()
    assert seconds(clock, Download(make(clock, *rules))) == pytest.approx([expected], abs=0.02)


@pytest.mark.parametrize("key", ["127.0.0.1", "127.0.0.0/8"])
def test_row_t07_the_limit_outlives_a_pause(key: str) -> None:
    clock = Hand()
    limits = make(clock, f"{key} 200KB 200KB")
    for _ in range(3):
        assert seconds(clock, Download(limits)) == pytest.approx([2.0], abs=0.02)
        gc.collect()
        clock.now += 17


def test_row_t12_a_number_without_unit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="has no unit"):
        TrafficLimits.from_lines(["$ 200 200"])


@pytest.mark.parametrize(
    ("row", "rule", "scope", "expected"),
    [
        ("T14", "$ 200KB 200KB", "conn", 0.0),
        ("T15", "$$ 200KB 200KB", "service", 0.0),
        ("service", "$ 200KB 200KB", "service", 2.0),
        ("conn", "$$ 200KB 200KB", "conn", 2.0),
        ("conn", "127.0.0.1 200KB 200KB", "conn", 2.0),
        ("service", "127.0.0.1 200KB 200KB", "service", 0.0),
        ("client", "$ 200KB 200KB", "client", 0.0),
        ("client", "$$ 200KB 200KB", "client", 2.0),
        ("client", "127.0.0.1 200KB 200KB", "client", 2.0),
        ("both", "$ 200KB 200KB", "", 2.0),
    ],
)
def test_scope_row(row: str, rule: str, scope: str, expected: float) -> None:
    clock = Hand()
    limiter = make(clock, rule).scoped(scope)
    assert seconds(clock, Download(limiter)) == pytest.approx([expected], abs=0.02)


def test_another_scope_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"services\[0\]\.metadata\.limiter\.scope: 'connection' is not a scope"):
        make(Hand(), "$ 1MB").scoped("connection", "services[0].metadata.limiter.scope")


def test_row_t16_two_services_share_the_total() -> None:
    clock = Hand()
    limits = make(clock, "$ 200KB 200KB")
    assert max(seconds(clock, Download(limits), Download(limits, port=2))) == pytest.approx(5.0, abs=0.05)


def test_row_t17_each_connection_has_its_own() -> None:
    clock = Hand()
    limits = make(clock, "$$ 200KB 200KB")
    assert seconds(clock, Download(limits), Download(limits, port=2)) == pytest.approx([2.0, 2.0], abs=0.02)


@pytest.mark.parametrize("key", ["127.0.0.0/8", "127.0.0.1"])
def test_row_t18_connections_of_a_client_share_its_bucket(key: str) -> None:
    clock = Hand()
    limits = make(clock, f"{key} 200KB 200KB")
    assert max(seconds(clock, Download(limits), Download(limits, port=2))) == pytest.approx(5.0, abs=0.05)
    clock.now += 60
    other = "127.0.0.2" if "/" in key else "127.0.0.1"
    alone = seconds(clock, Download(limits), Download(limits, host=other, port=2))
    assert max(alone) == pytest.approx(2.0 if "/" in key else 5.0, abs=0.05)


def test_client_scope_is_one_bucket_for_each_client_id() -> None:
    clock = Hand()
    limits = make(clock, "$$ 200KB 200KB").scoped("client")
    same = seconds(clock, Download(limits, user="a"), Download(limits, user="a", host="127.0.0.2"))
    assert max(same) == pytest.approx(5.0, abs=0.05)
    clock.now += 60
    apart = seconds(clock, Download(limits, user="a"), Download(limits, user="b"))
    assert apart == pytest.approx([2.0, 2.0], abs=0.05)


def test_the_same_limiter_at_service_and_handler_counts_bytes_once() -> None:
    clock = Hand()
    limits = make(clock, "127.0.0.1 200KB 200KB")
    assert seconds(clock, Download(limits, limits.scoped("client"))) == pytest.approx([2.0], abs=0.02)


def test_directions_are_apart() -> None:
    clock = Hand()
    flow, shapers = Flow(client=Endpoint("192.0.2.1", 1)), Shapers()
    make(clock, "$ 100B", "$$ 0B 50B", "192.0.2.1 0 70B 80B").shape(flow, shapers)
    assert [shaper.take(1000) for shaper in shapers.up] == [100]
    assert [shaper.take(1000) for shaper in shapers.down] == [50, 80]


def test_running_flows_follow_a_reload_where_the_key_stays() -> None:
    clock = Hand()
    limits = make(clock, "$ 200KB 200KB", "$$ 100KB 100KB", "127.0.0.1 100KB 100KB")
    download = Download(limits)
    assert len(download.shapers.down) == 3
    rules, problems = compile_traffic(inline(["$ 100KB 100KB"], "limits"))
    assert problems == []
    limits.replace(rules)
    assert seconds(clock, download) == pytest.approx([5.0], abs=0.05)
    assert len(Download(limits).shapers.down) == 1
    clock.now += 60
    rules, _ = compile_traffic([])
    limits.replace(rules)
    assert seconds(clock, Download(limits)) == [0.0]


def test_lines_of_a_file_have_comments_and_later_ones_count() -> None:
    text = b"# limits\n$ 1KB 1KB # slow\n\n$ 200KB\t200KB\nnonsense\n"
    rules, problems = compile_traffic(lines(text, "file x"))
    assert [str(problem) for problem in problems] == [
        "file x: line 5: 'nonsense' is not $, $$, an address or a network such as 10.0.0.0/8"
    ]
    clock = Hand()
    assert seconds(clock, Download(TrafficLimits(rules, clock))) == pytest.approx([2.0], abs=0.02)
