"""The program's arguments."""

from __future__ import annotations

import platform
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.argv import HELP, LATER_VERBS, VERBS, Invocation, UsageError, parse_args, version_line


def test_flags_may_be_written_in_four_ways() -> None:
    for line in (["-L", ":1"], ["-L=:1"], ["--L", ":1"], ["--L=:1"]):
        assert parse_args(line) == Invocation(services=(":1",))


def test_all_flags_of_gost() -> None:
    line = "-L a -L b -F c -C d -C - -O yaml -D -DD -V -api e -metrics f -R 1m30s"
    assert parse_args(shlex.split(line)) == Invocation(
        services=("a", "b"),
        nodes=("c",),
        configs=("d", "-"),
        output="yaml",
        debug=True,
        trace=True,
        version=True,
        api="e",
        metrics="f",
        reload=90.0,
    )


def test_own_flags() -> None:
    line = ["check", "--instance", "lan-1", "--json", "--strict", "--lenient=false", "-L", ":1"]
    assert parse_args(line) == Invocation(verb="check", services=(":1",), instance="lan-1", json=True, strict=True)
    assert parse_args(["--instance=x"]).instance == "x"


def test_values_may_look_like_flags_or_hold_equal_signs() -> None:
    assert parse_args(["-L", "-F", "-C=a=b"]) == Invocation(services=("-F",), configs=("a=b",))


def test_verbs_come_first() -> None:
    for verb in VERBS:
        assert parse_args([verb]).verb == verb
    assert parse_args([]).verb == "run"
    assert parse_args(["lab", "up", "-x"]).words == ("up", "-x")


def test_help() -> None:
    for word in ("-h", "-help", "--help"):
        assert parse_args([word]).help
    for verb in VERBS:
        assert f"  {verb} " in HELP
    for flag in (
        "-L",
        "-F",
        "-C",
        "-O",
        "-D",
        "-DD",
        "-api",
        "-metrics",
        "-R",
        "-V",
        "--instance",
        "--json",
        "--strict",
    ):
        assert f"  {flag}" in HELP or f", {flag} " in HELP


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-X", "flag provided but not defined: -X"),
        ("-logtostderr", "flag provided but not defined: -logtostderr"),
        ("-strict", "flag provided but not defined: -strict; did you mean '--strict'?"),
        ("--metric :1", "flag provided but not defined: --metric; did you mean '-metrics'?"),
        ("-L", "flag needs an argument: -L"),
        ("-D=maybe", "-D: 'maybe' is not a boolean such as true"),
        ("-R 30", "-R: '30' is not a duration such as 30s"),
        ("---L :1", "bad flag syntax: ---L"),
        ("--=x", "bad flag syntax: --=x"),
        ("-L :1 stray -F http://h:1", "'stray' is not a flag; everything after it would be ignored"),
        ("-L :1 - -F http://h:1", "'-' is not a flag; everything after it would be ignored"),
        ("chekc -L :1", "'chekc' is not a verb or a flag; did you mean 'check'?"),
        ("explain", "'explain' is not available in this version"),
        ("--instance a/b", "--instance: 'a/b' is not a name of letters, digits, - and _ (at most 32)"),
        ("--instance " + "a" * 33, None),
        ("--instance=", "--instance: '' is not a name of letters, digits, - and _ (at most 32)"),
    ],
)
def test_wrong_usage(line: str, message: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        parse_args(line.split(" "))
    assert message is None or str(caught.value) == message


def test_later_verbs_are_known_but_not_built() -> None:
    assert not LATER_VERBS & set(VERBS)
    for verb in LATER_VERBS:
        with pytest.raises(UsageError, match="not available"):
            parse_args([verb])


def test_workers_are_cut_at_double_dashes_between_arguments() -> None:
    found = parse_args(["-L", ":1", "-D", "--", "-L", ":2", "--", "-L", ":3"])
    assert found.workers == (("-L", ":1", "-D"), ("-L", ":2"), ("-L", ":3"))
    assert parse_args(["check", "-L", ":1", "--", "-L", ":2"]).workers == (
        ("check", "-L", ":1"),
        ("check", "-L", ":2"),
    )
    assert parse_args(["-L", ":1", "--", "--", "-L", ":2"]).workers == (("-L", ":1"), ("-L", ":2"))


def test_arguments_with_blanks_are_not_torn() -> None:
    # GOST joins and splits at blanks.
    assert parse_args(["-C", "a  b.yaml", "--", "-L", ":2"]).workers[0] == ("-C", "a  b.yaml")


def test_double_dash_at_an_end_makes_no_worker() -> None:
    assert parse_args(["-L", ":1", "--"]) == Invocation(services=(":1",))
    with pytest.raises(UsageError, match="'-L' is not a flag"):
        parse_args(["--", "-L"])


def test_wrong_usage_of_a_worker_is_found_before_any_starts() -> None:
    with pytest.raises(UsageError, match="not defined: -X"):
        parse_args(["-L", ":1", "--", "-X"])


def test_version_line() -> None:
    line = version_line("1.2.3")
    assert line.startswith(f"gostnet 1.2.3 (Python {platform.python_version()} linux/")
    assert line.endswith(")")


@given(st.lists(st.sampled_from(["-L", "-F", "--", "-", "check", "-D", "x", "", "-R", "--json", "-V=0", "--instance"])))
def test_any_arguments_are_parsed_or_refused(line: list[str]) -> None:
    message = ""
    try:
        assert parse_args(line).verb in VERBS
    except UsageError as exc:
        message = str(exc)
    assert "\n" not in message
