"""The language of rules: what is a rule, where it is wrong, and that parsing undoes printing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.matcher import AllOf, AnyOf, Call, Not, Rule, RuleError, names, parse_rule, print_rule

HOST = Call("Host", ("a",), 1)


def bare(rule: Rule) -> Rule:
    """The same tree without positions."""
    match rule:
        case Call():
            return Call(rule.name, rule.arguments)
        case Not():
            return Not(bare(rule.item))
        case AllOf():
            return AllOf(tuple(map(bare, rule.items)))
        case AnyOf():
            return AnyOf(tuple(map(bare, rule.items)))


def a(name: str) -> Call:
    return Call("Host", (name,))


def test_operators_bind_as_in_go() -> None:
    assert bare(parse_rule("Host(`a`) || Host(`b`) && !Host(`c`)")) == AnyOf((a("a"), AllOf((a("b"), Not(a("c"))))))
    assert bare(parse_rule("(Host(`a`) || Host(`b`)) && Host(`c`)")) == AllOf((AnyOf((a("a"), a("b"))), a("c")))
    assert bare(parse_rule("!!Host(`a`)")) == a("a")


def test_strings_raw_and_quoted_and_comments() -> None:
    assert bare(parse_rule('Path("/a\\"\\u00e9\\x41\\101\\t") // the end')) == Call("Path", ('/a"éAA\t',))
    assert bare(parse_rule("PathRegexp(`^/a\\d`)")) == Call("PathRegexp", ("^/a\\d",))
    assert bare(parse_rule("Header(\n`x`,\n`y`,\n)")) == Call("Header", ("x", "y"))


def test_positions_count_from_one() -> None:
    rule = parse_rule("Host(`a`) &&\n Host(`b`)")
    assert isinstance(rule, AllOf)
    assert [item.position for item in rule.items if isinstance(item, Call)] == [1, 15]


@pytest.mark.parametrize(
    ("rule", "position", "words"),
    [
        ("", 1, "a condition such as"),
        ("Host('a')", 6, "strings are written"),
        ("Host(`a`) & Host(`b`)", 11, "no meaning"),
        ("Host(`a`) == true", 11, "no meaning"),
        ("Host(`a`) and Host(`b`)", 11, "join conditions"),
        ("Host(`a`) && Hots(`b`)", 14, "did you mean 'Host'"),
        ("Host(`a`", 9, "parenthesis of Host is not closed"),
        ("(Host(`a`)", 11, "parenthesis of character 1 is not closed"),
        ("Host(`a`))", 10, "cannot follow"),
        ("Host(`a`) Host(`b`)", 11, "cannot follow"),
        ("Host(`a", 6, "no end"),
        ('Host("a\n")', 6, "no end"),
        ('Host("\\q")', 7, "no escape"),
        ('Host("\\ud800")', 7, "no escape"),
        ("Host(``)", 6, "empty argument"),
        ("Host()", 1, "takes 1 arguments, not 0"),
        ("Host(a)", 6, "where a string of Host belongs"),
        ("Host", 5, "Host is a function"),
        ("Header(`x`,`ge`,1)", 17, "no meaning"),
        ("Header(`x`, `==`, `100`)", 1, "not one of gt"),
        ("Header(`x`, `gt`, `abc`)", 1, "not a number"),
        ("PathPrefix(`api`)", 1, "does not begin with /"),
        ("HostRegexp(`(`)", 1, "leaves a group open"),
        ("BodyJSON(`a.#(x==1)`, `1`)", 1, "not a path"),
        ("DstPort(`80`)", 1, "no function"),
        ("Host(`exämple.com`)", 1, "beyond ASCII"),
        ("(" * 200, 101, "parentheses are open"),
    ],
)
def test_an_error_says_what_and_where(rule: str, position: int, words: str) -> None:
    with pytest.raises(RuleError, match=f"at character {position} of the rule") as caught:
        parse_rule(rule)
    assert words in str(caught.value)
    assert caught.value.position == position


def test_objects_that_a_rule_names() -> None:
    rule = parse_rule("Bypass(`one`) || !(Host(`x`) && bypass(`two`)) && Admission(`three`)")
    assert list(names(rule, "Bypass")) == ["one", "two"]
    assert list(names(rule, "Admission")) == ["three"]


@given(st.text(alphabet="Host(`a\"&|!)\\, \n/'xPath0", max_size=60) | st.text(max_size=40))
def test_any_text_is_a_rule_or_a_rule_error(text: str) -> None:
    try:
        rule: Rule | RuleError = parse_rule(text)
    except RuleError as exc:
        rule = exc
    if isinstance(rule, RuleError):
        assert 1 <= rule.position <= len(text) + 1
    else:
        assert bare(parse_rule(print_rule(rule))) == bare(rule)


words = st.text(min_size=1, max_size=12)
calls = st.builds(Call, st.just("Method"), st.tuples(words)) | st.builds(
    Call, st.just("Header"), st.tuples(words) | st.tuples(words, words)
)


def _combined(children: st.SearchStrategy[Rule]) -> st.SearchStrategy[Rule]:
    several = st.lists(children, min_size=2, max_size=3).map(tuple)
    negated = children.filter(lambda item: not isinstance(item, Not)).map(Not)
    return several.map(AllOf) | several.map(AnyOf) | negated


@given(st.recursive(calls, _combined, max_leaves=12))
def test_parsing_undoes_printing(rule: Rule) -> None:
    assert bare(parse_rule(print_rule(rule))) == rule
