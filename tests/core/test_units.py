"""Durations and sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.units import format_nanoseconds, parse_nanoseconds, parse_seconds, parse_size

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("-0", 0),
        ("5ns", 5),
        ("300ms", 300_000_000),
        ("1us", 1_000),
        ("1\u00b5s", 1_000),
        ("1\u03bcs", 1_000),
        ("1.5h", 5400 * SECOND),
        ("1h2m3s", 3723 * SECOND),
        ("-1m", -60 * SECOND),
        ("+1m", 60 * SECOND),
        (".5s", SECOND // 2),
        ("5.s", 5 * SECOND),
        ("1m1m", 120 * SECOND),
        ("0.000000001s", 1),
        ("2562047h47m16.854775807s", (1 << 63) - 1),
    ],
)
def test_duration_is_read_as_go_does(text: str, nanoseconds: int) -> None:
    assert parse_nanoseconds(text) == nanoseconds


@pytest.mark.parametrize(
    "text", ["", "10", "s", ".s", "1x", "1 s", " 1s", "1s ", "1.2.3s", "--1s", "1d", "3000000000000h", "1" * 40 + "s"]
)
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        parse_nanoseconds(text)


def test_seconds_are_floats() -> None:
    assert parse_seconds("1500ms") == 1.5


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (5, "5ns"),
        (1_500, "1.5\u00b5s"),
        (300_000_000, "300ms"),
        (SECOND, "1s"),
        (90 * SECOND, "1m30s"),
        (3600 * SECOND, "1h0m0s"),
        (86400 * SECOND, "24h0m0s"),
        (1_500_000_000, "1.5s"),
        (-60 * SECOND, "-1m0s"),
    ],
)
def test_duration_is_written_as_go_does(nanoseconds: int, text: str) -> None:
    assert format_nanoseconds(nanoseconds) == text


@given(st.integers(min_value=-(2**53), max_value=2**53))
def test_what_is_written_reads_back(nanoseconds: int) -> None:
    assert parse_nanoseconds(format_nanoseconds(nanoseconds)) == nanoseconds


@given(st.text(alphabet="0123456789.-+hmsnu\u00b5 x", max_size=30))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    try:
        assert abs(parse_nanoseconds(text)) < 1 << 63
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100B", 100),
        ("1KB", 1024),
        ("1KiB", 1024),
        ("1.5MB", 1_572_864),
        ("10GB", 10 << 30),
        ("1TB", 1 << 40),
        ("1PB", 1 << 50),
        ("1EB", 1 << 60),
        ("1MB512KB", (1 << 20) + (512 << 10)),
        ("0B", 0),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "100", "1mb", "1Mb", "10kB", "512K", "1M", "MB", "-1MB", "1 MBB", "9999999EB"])
def test_size_without_a_proper_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)
