"""Plain scalars of YAML, as gost 3.3.0 reads them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.scalars import INT64, resolve, tagged


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("on", "on"),
        ("n", "n"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("0", 0),
        ("-5", -5),
        ("+5", 5),
        ("1_000", 1000),
        ("1__0", 10),
        ("_1", "_1"),
        ("0777", 511),
        ("0o17", 15),
        ("0z", "0z"),
        ("0_7", 7),
        ("-0x1F", -31),
        ("0x", "0x"),
        ("0b11", 3),
        ("0b", "0b"),
        ("09", 9.0),
        ("0888", 888.0),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_0.5", 10.5),
        ("1e400", "1e400"),
        ("18446744073709551615", 2**64 - 1),
        ("99999999999999999999", 1e20),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("-", "-"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("1.1.1.1", "1.1.1.1"),
        ("0x" + "f" * 70, "0x" + "f" * 70),
    ],
)
def test_plain_scalar(text: str, value: Any) -> None:
    found = resolve(text)
    assert found == value
    assert type(found) is type(value)


def test_not_a_number() -> None:
    found = resolve(".nan")
    assert isinstance(found, float)
    assert math.isnan(found)


@pytest.mark.parametrize(
    ("tag", "text", "value"),
    [
        ("tag:yaml.org,2002:str", "12", "12"),
        ("tag:yaml.org,2002:int", "3", 3),
        ("tag:yaml.org,2002:float", "3", 3.0),
        ("tag:yaml.org,2002:bool", "true", True),
        ("tag:yaml.org,2002:null", "~", None),
    ],
)
def test_tagged_scalar(tag: str, text: str, value: Any) -> None:
    assert tagged(tag, text) == value


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        ("tag:yaml.org,2002:int", "x"),
        ("tag:yaml.org,2002:int", "true"),
        ("tag:yaml.org,2002:bool", "1"),
        ("tag:yaml.org,2002:binary", "AAAA"),
        ("!secret", "x"),
    ],
)
def test_tag_that_does_not_fit_is_refused(tag: str, text: str) -> None:
    with pytest.raises(ValueError):
        tagged(tag, text)


@given(st.text(alphabet="0123456789_xobabcdefEeinf.+-", max_size=80))
def test_integers_stay_within_64_bits(text: str) -> None:
    value = resolve(text)
    if isinstance(value, int):
        assert value in INT64
