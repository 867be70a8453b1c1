"""Globs: against a naive matcher, their index, and names made to be slow."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.policies.glob import MAX_BRANCHES, MAX_DEPTH, GlobTable, compile_glob, parse_glob


def matches(glob: str, name: str) -> bool:
    return any(compile_glob(tokens).fullmatch(name) is not None for tokens in parse_glob(glob))


def naive(glob: str, name: str) -> bool:
    """`*` and `?` only, by trying everything."""
    if not glob:
        return not name
    if glob[0] == "*":
        return any(naive(glob[1:], name[at:]) for at in range(len(name) + 1))
    return bool(name) and glob[0] in ("?", name[0]) and naive(glob[1:], name[1:])


@settings(max_examples=300, deadline=None)
@given(st.text("ab.*?", max_size=8), st.text("ab.", max_size=8))
def test_stars_and_marks_equal_a_naive_matcher(glob: str, name: str) -> None:
    assert matches(glob, name) is naive(glob, name)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abc.*?", min_size=1, max_size=8), max_size=12), st.text("abc.", min_size=1, max_size=12))
def test_the_table_finds_what_a_search_finds(globs: list[str], name: str) -> None:
    table = GlobTable([(tokens, glob) for glob in globs for tokens in parse_glob(glob)])
    assert sorted(table.find(name)) == sorted(glob for glob in globs if matches(glob, name))


@settings(max_examples=300, deadline=None)
@given(st.text("ab*?[]{},!-\\.", max_size=12), st.text("ab.", max_size=6))
def test_any_text_is_a_glob_or_an_error(glob: str, name: str) -> None:
    try:
        branches = parse_glob(glob)
    except ValueError:
        return
    for tokens in branches:
        compile_glob(tokens).fullmatch(name)


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("[abc]x", "bx", "dx"),
        ("[!abc]x", "dx", "ax"),
        ("[a-cx-z]1", "y1", "d1"),
        ("[]-a]x", "]x", "bx"),
        ("{a,bc}d", "bcd", "bd"),
        ("{a,b{c,d}}e", "bde", "be"),
        ("a{,x}b", "ab", "ayb"),
        ("{*.a,b?}c", "x.ac", "bc"),
        ("\\?\\*\\\\", "?*\\", "ab\\"),
        ("a.b", "a.b", "axb"),
    ],
)
def test_classes_braces_and_quotes(glob: str, yes: str, no: str) -> None:
    assert matches(glob, yes)
    assert not matches(glob, no)


@pytest.mark.parametrize(
    "glob", ["[abc", "[]", "[!]", "{a", "{a,{b}", "a\\", "[z-a]", "{a,b}" * 7, "{" * (MAX_DEPTH + 2) + "}" * 50]
)
def test_broken_globs_are_errors(glob: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_glob(glob)


def test_braces_stand_for_a_bounded_number_of_globs() -> None:
    assert len(parse_glob("{a,b}" * 6)) == MAX_BRANCHES
    with pytest.raises(ValueError, match="more than"):
        parse_glob("{" + ",".join("a" * (MAX_BRANCHES + 1)) + "}")


def test_a_name_made_to_be_slow_is_not() -> None:
    pattern = compile_glob(parse_glob("*a" * 12 + "b")[0])
    began = time.perf_counter()
    assert pattern.fullmatch("a" * 250) is None
    assert time.perf_counter() - began < 0.5  # with backtracking: longer than the age of the universe
