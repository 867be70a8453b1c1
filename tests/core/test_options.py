"""Option classes: binding, coercions, and what is derived from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.errors import ConfigError
from gostnet.core.options import (
    Bytes,
    CommaList,
    Problem,
    Seconds,
    Secret,
    bind_options,
    cli_keys,
    group,
    json_schema,
    markdown,
    opt,
    option_keys,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mux:
    version: int = opt(1, "Version.", key="mux.version", choices=("1", "2"))
    timeout: Seconds = opt(30.0, "Timeout.", key="mux.keepaliveTimeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    low: int = opt(0, "First.", key="min")
    high: int = opt(10, "Last.", key="max")

    def validate(self) -> Iterable[tuple[str, str]]:
        if self.low > self.high:
            yield "min", f"{self.low} is more than {self.high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    read_timeout: Seconds = opt(15.0, "Deadline.")
    no_tls: bool = opt(False, "No TLS.", key="notls")
    buffer_size: Bytes = opt(4096, "Buffer.", key="udp.bufferSize", aliases=("udpBufferSize", "bufferSize"))
    rate: float = opt(1.5, "Rate.")
    count: int | None = opt(None, "Count.")
    name: str = opt("", "Name.", choices=("", "host"))
    hooks: list[str] = opt([], "Commands.")
    networks: CommaList = opt([], "Networks.")
    header: dict[str, str] = opt({}, "Headers.")
    key: Secret = opt(Secret(), "Key.")
    entries: Any = opt(None, "Free.")
    mux: Mux = group(Mux, version=2)
    range: Range = group(Range, prefix="port.")


def bind(**raw: Any) -> Options:
    return bind_options(Options, raw)


def problem_of(key: str, value: Any) -> Problem:
    problems: list[Problem] = []
    made = bind_options(Options, {key: value}, "services[0].handler.metadata", set(), problems)
    assert made == Options(), "an unusable value must leave the default"
    assert len(problems) == 1
    return problems[0]


def test_defaults_hold_without_values() -> None:
    made = bind()
    assert made == Options()
    assert made.mux.version == 2
    assert made.mux.timeout == 30.0


def test_lists_and_maps_are_not_shared() -> None:
    assert Options().hooks is not Options().hooks


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(5, 5.0), (1.5, 1.5), (5.0, 5.0), ("5", 5.0), ("15s", 15.0), ("500ms", 0.5), ("-1s", -1.0), ("0", 0.0)],
)
def test_duration_numbers_are_seconds(value: Any, seconds: float) -> None:
    assert bind(readTimeout=value).read_timeout == seconds


@pytest.mark.parametrize("value", ["soon", "1d", "", True, [], {}, float("inf"), float("nan"), "1.5"])
def test_other_durations_are_refused(value: Any) -> None:
    assert "is not a duration such as 10s" in problem_of("readTimeout", value).message


@pytest.mark.parametrize("value", [True, 1, -1, 2.0, "1", "t", "T", "true", "TRUE", "True"])
def test_true_words(value: Any) -> None:
    assert bind(notls=value).no_tls is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "0", "f", "F", "false", "FALSE", "False"])
def test_false_words(value: Any) -> None:
    assert bind(notls=value).no_tls is False


@pytest.mark.parametrize("value", ["yes", "on", "", "tRUE", 0.5, [], {}])
def test_other_booleans_are_refused(value: Any) -> None:
    assert "is not a boolean such as true" in problem_of("notls", value).message


@pytest.mark.parametrize(("value", "count"), [(3, 3), (3.0, 3), ("3", 3), ("-3", -3), ("+3", 3), (True, 1), (False, 0)])
def test_integers(value: Any, count: int) -> None:
    assert bind(count=value).count == count


@pytest.mark.parametrize("value", ["0x10", "3.0", "", 3.5, "1_000", [], "9" * 30])
def test_other_integers_are_refused(value: Any) -> None:
    assert "is not an integer" in problem_of("count", value).message


@pytest.mark.parametrize(
    ("value", "size"), [(64, 64), ("64", 64), ("64KB", 65536), ("1MB512KB", 1_572_864), (1e3, 1000)]
)
def test_sizes(value: Any, size: int) -> None:
    assert bind(bufferSize=value).buffer_size == size


@pytest.mark.parametrize("value", ["64k", "", "x", 1.5, []])
def test_other_sizes_are_refused(value: Any) -> None:
    assert "is not a number of bytes" in problem_of("bufferSize", value).message


@pytest.mark.parametrize(("value", "rate"), [(1, 1.0), (2.5, 2.5), ("2.5", 2.5), ("1e3", 1000.0)])
def test_floats(value: Any, rate: float) -> None:
    assert bind(rate=value).rate == rate


@pytest.mark.parametrize("value", ["x", "", True, "nan", "inf", [], float("nan")])
def test_other_floats_are_refused(value: Any) -> None:
    assert "is not a number" in problem_of("rate", value).message


def test_strings_take_numbers_and_booleans() -> None:
    assert bind(key=384).key.reveal() == "384"
    assert bind(key=2.0).key.reveal() == "2"
    assert bind(key=2.5).key.reveal() == "2.5"
    assert bind(key=True).key.reveal() == "true"


def test_lists_are_lists_and_comma_lists_either() -> None:
    assert bind(hooks=["a", 1]).hooks == ["a", "1"]
    assert "is not a list of strings" in problem_of("hooks", "a,b").message
    assert bind(networks="a, b,,c").networks == ["a", "b", "c"]
    assert bind(networks=["a", " b ", 80]).networks == ["a", "b", "80"]
    assert bind(networks=80).networks == ["80"]
    assert "separated by commas" in problem_of("networks", [["a"]]).message


def test_map_values_become_strings() -> None:
    assert bind(header={"X": 1, "Y": True}).header == {"X": "1", "Y": "true"}
    assert "is not a map of strings" in problem_of("header", "X: 1").message
    assert "is not a map of strings" in problem_of("header", {"X": []}).message


def test_free_values_stay() -> None:
    assert bind(entries=[{"addr": ":80"}]).entries == [{"addr": ":80"}]


def test_none_means_absent() -> None:
    assert bind(readTimeout=None, notls=None, hooks=None) == Options()


def test_keys_ignore_case_and_the_first_name_that_exists_counts() -> None:
    assert bind(READTIMEOUT="1s").read_timeout == 1.0
    assert bind(bufferSize=1, udpBufferSize=2).buffer_size == 2
    assert bind_options(Options, {"BUFFERSIZE": 1, "UDP.BUFFERSIZE": 3}).buffer_size == 3


def test_first_name_counts_even_if_its_value_is_unusable() -> None:
    problems: list[Problem] = []
    made = bind_options(Options, {"udpBufferSize": "x", "bufferSize": 1}, "m", set(), problems)
    assert made.buffer_size == 4096
    assert [problem.path for problem in problems] == ["m.udpBufferSize"]


def test_used_collects_known_keys_in_lower_case() -> None:
    used: set[str] = set()
    bind_options(Options, {"ReadTimeout": 1, "bufferSize": 1, "udpBufferSize": 1, "foo": 1}, "", used, [])
    assert used == {"readtimeout", "buffersize", "udpbuffersize"}


def test_all_problems_are_collected_with_the_documented_spelling() -> None:
    problems: list[Problem] = []
    raw = {"readtimeout": "soon", "mux.version": 3, "name": "hots"}
    bind_options(Options, raw, "services[0].handler.metadata", set(), problems)
    assert [str(problem) for problem in problems] == [
        "services[0].handler.metadata.readTimeout: 'soon' is not a duration such as 10s",
        "services[0].handler.metadata.name: 'hots' is not one of host; did you mean 'host'?",
        "services[0].handler.metadata.mux.version: 3 is not one of 1, 2",
    ]


def test_without_a_list_the_first_problem_is_raised() -> None:
    with pytest.raises(ConfigError) as caught:
        bind_options(Options, {"readTimeout": "soon"}, "a.b")
    assert str(caught.value) == "a.b.readTimeout: 'soon' is not a duration such as 10s"
    assert caught.value.path == "a.b.readTimeout"


def test_validate_is_asked_with_the_prefix_of_the_group() -> None:
    problems: list[Problem] = []
    bind_options(Options, {"port.min": 5, "port.max": 2}, "m", set(), problems)
    assert [str(problem) for problem in problems] == ["m.port.min: 5 is more than 2"]


def test_secrets_are_never_shown() -> None:
    problem = problem_of("key", ["hunter2"])
    assert "hunter2" not in problem.message
    secret = Secret("hunter2")
    assert "hunter2" not in f"{secret} {secret!r} {Options(key=secret)}"
    assert secret.reveal() == "hunter2"
    assert secret == Secret("hunter2") != Secret("x")
    assert not Secret()


def test_long_values_are_cut_in_messages() -> None:
    assert len(problem_of("readTimeout", "x" * 10_000).message) < 150


def test_keys_are_listed_in_order() -> None:
    keys = option_keys(Options)
    assert keys[:5] == ["readTimeout", "notls", "udp.bufferSize", "udpBufferSize", "bufferSize"]
    assert keys[-4:] == ["mux.version", "mux.keepaliveTimeout", "port.min", "port.max"]


def test_url_keys_leave_out_what_needs_a_list_or_map() -> None:
    assert set(option_keys(Options)) - set(cli_keys(Options)) == {"hooks", "header", "entries"}


def test_schema_describes_every_key() -> None:
    schema = json_schema(Options)
    properties = schema["properties"]
    assert set(properties) == set(option_keys(Options))
    assert properties["readTimeout"] == {"description": "Deadline.", "type": ["string", "number"], "default": "15s"}
    assert properties["udpBufferSize"]["description"] == "Same as udp.bufferSize."
    assert properties["mux.version"]["default"] == 2
    assert properties["name"]["enum"] == ["", "host"]
    assert "default" not in properties["key"]


def test_table_has_a_row_for_each_option() -> None:
    lines = markdown(Options).splitlines()
    assert lines[0] == "| key | type | default | meaning |"
    assert "| `readTimeout` | duration | 15s | Deadline. |" in lines
    assert "| `udp.bufferSize` / `udpBufferSize` / `bufferSize` | size | 4096 | Buffer. |" in lines
    assert "| `name` | string | - | Name. One of `host`. |" in lines
    assert len(lines) == 2 + 15


def test_class_without_options_has_no_table() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Empty:
        pass

    assert markdown(Empty) == ""
    assert bind_options(Empty, {"a": 1}) == Empty()


def test_wrong_declarations_are_found_at_once() -> None:
    with pytest.raises(TypeError, match="no field 'nothing'"):
        group(Mux, nothing=1)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Bad:
        value: frozenset[str] = opt(frozenset(), "No such kind.")

    with pytest.raises(TypeError, match="is not a type of options"):
        bind_options(Bad, {})


@given(
    st.dictionaries(
        st.sampled_from([*option_keys(Options), "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_any_map_binds_or_is_complained_about(raw: dict[str, Any]) -> None:
    problems: list[Problem] = []
    made = bind_options(Options, raw, "m", set(), problems)
    assert isinstance(made.read_timeout, float)
    assert isinstance(made.no_tls, bool)
    assert all(isinstance(item, str) for item in made.hooks + made.networks)
    assert all(problem.path.startswith("m.") for problem in problems)
