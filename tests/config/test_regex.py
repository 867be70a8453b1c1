"""RE2's syntax in Python's clothes: what matches as in Go, and what is refused."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.regex import compile_regex


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("x$", "/api/x", True),
        ("x$", "x\n", False),
        ("(?m)x$", "x\ny", True),
        (r"^a\z", "a", True),
        ("(?i)ABC", "xabcx", True),
        ("a(?i)b|c", "aB", True),
        ("a(?i)b|c", "C", True),
        ("a(?i)b|c", "Ab", False),
        ("(a(?i)b)c", "aBC", False),
        ("(a(?i)b)c", "aBc", True),
        ("(?i:a)b", "AB", False),
        ("(?s)a.b", "a\nb", True),
        ("a.b", "a\nb", False),
        ("[[:alpha:]]+[[:digit:]]", "x1", True),
        ("[^[:space:]]", " ", False),
        ("[[]", "[", True),
        ("[]a]", "]", True),
        ("[a&&b]", "&", True),
        (r"\Qa.b\E+", "a.bbb", True),
        (r"\Qa.b", "axb", False),
        ("a{2}", "aa", True),
        ("a{,2}", "a{,2}", True),
        ("a{", "a{", True),
        (r"\x{41}\x42", "AB", True),
        (r"\w", "é", False),
        ("(?P<n>a)(?<m>b)", "ab", True),
        (r"a+?b*?", "ab", True),
        ("", "anything", True),
    ],
)
def test_it_finds_what_re2_finds(pattern: str, text: str, found: bool) -> None:
    assert (compile_regex(pattern).search(text) is not None) is found


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "(?=a)",
            "(?!a)",
            "(?<=a)b",
            "(?<!a)b",
            r"(a)\1",
            "(?P<n>a)(?P=n)",
            "(?>a)",
            "a*+",
            "a++",
            "a**",
            "*a",
            "(*a)",
        ),
        *("a|*", "(", ")", "[a", r"\pL", r"\8", r"a{1001}", "(?)", "(?#c)", "[[:nope:]]", "\\", r"\Z", r"\xZZ", r"\q"),
        "(?U)a",
        "a" * 5000,
    ],
)
def test_it_refuses_what_re2_refuses_or_python_cannot_do(pattern: str) -> None:
    with pytest.raises(ValueError):
        compile_regex(pattern)


@given(st.text(alphabet=r"ab*+?|()[]{}^$\.,:-&~P<>=!imszQE019x", max_size=24))
def test_any_pattern_compiles_or_is_refused_and_python_never_warns(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile_regex(pattern)
        except ValueError:
            pass
