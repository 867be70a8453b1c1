"""Tree to schema: GOST's coercions in files and in inline JSON, problems and their places."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.decode import Decoder, plain_decimal
from gostnet.config.finding import locate
from gostnet.config.parse import parse
from gostnet.config.schema import Config
from gostnet.config.tree import Source, SourceKind


def decode(text: str, kind: SourceKind = "file") -> tuple[Config, list[str]]:
    """Return the configuration in a text (JSON if inline) and the findings."""
    tree = parse(text, "json" if kind == "inline" else "yaml", Source("f", kind))
    decoder = Decoder()
    config = decoder.config(tree)
    return config, [str(finding) for finding in locate(decoder.problems, config.positions)]


def config_of(text: str, kind: SourceKind = "file") -> Config:
    config, findings = decode(text, kind)
    assert findings == []
    return config


def test_objects_know_their_path() -> None:
    config = config_of("services: [{name: a, handler: {type: http, auth: {username: u}}}]")
    handler = config.services[0].handler
    assert handler is not None
    assert handler.auth is not None
    assert (config.path, config.services[0].path, handler.path, handler.auth.path) == (
        "",
        "services[0]",
        "services[0].handler",
        "services[0].handler.auth",
    )


def test_equal_objects_are_equal_wherever_they_stand() -> None:
    config = config_of("hops: [{name: a}, {name: b}]")
    moved = config_of("hops: [{name: b}, {name: a}]")
    assert config.hops[0] == moved.hops[1]
    assert config.hops[0].path != moved.hops[1].path


def test_case_of_keys_does_not_matter() -> None:
    config = config_of("SERVICES: [{NAME: a, Listener: {TLS: {certfile: c, KEYFILE: k}}}]")
    listener = config.services[0].listener
    assert listener is not None
    assert listener.tls is not None
    assert (listener.tls.cert_file, listener.tls.key_file) == ("c", "k")


def test_keys_of_free_maps_are_folded_in_files_only() -> None:
    text = '{"services": [{"name": "a", "metadata": {"labels": {"Team": "X"}, "A.B": 1}}]}'
    assert config_of(text).services[0].metadata == {"labels": {"team": "X"}, "a.b": 1}
    assert config_of(text, "inline").services[0].metadata == {"labels": {"Team": "X"}, "A.B": 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [("8080", "8080"), ("1.5", "1.5"), ("'x'", "x"), ("-0", "0"), ("1e21", "1000000000000000000000"), ("''", "")],
)
def test_numbers_become_strings_in_files(value: str, text: str) -> None:
    config, _ = decode(f"services: [{{name: a, addr: {value}}}]")
    assert config.services[0].addr == text


@pytest.mark.parametrize(
    ("value", "text", "written"),
    [("0123", "83", "0123"), ("true", "1", "true"), ("1e3", "1000", "1e3"), ("1_000", "1000", "1_000")],
)
def test_text_that_changes_is_warned_about(value: str, text: str, written: str) -> None:
    config, findings = decode(f"services: [{{name: a, addr: {value}}}]")
    assert config.services[0].addr == text
    assert findings == [
        f"f:1:28: warning: services[0].addr: {written} is not text and becomes '{text}'; put it in quotes "
        "[config.unquoted]"
    ]


def test_a_password_that_changes_is_not_shown() -> None:
    config, findings = decode("authers: [{name: a, auths: [{username: u, password: 0123}]}]")
    assert config.authers[0].auths[0].password == "83"
    assert "83" not in findings[0]
    assert "0123" not in findings[0]
    _, findings = decode("authers: [{name: a, auths: [{username: u, password: [hunter2]}]}]")
    assert findings == ["f:1:53: error: authers[0].auths[0].password: the value is not a string [config.type]"]


@pytest.mark.parametrize(
    ("value", "number"), [("3", 3), ("'3'", 3), ("'0x10'", 16), ("true", 1), ("3.0", 3), ("''", 0), ("-3", -3)]
)
def test_integers_in_files(value: str, number: int) -> None:
    config = config_of(f"services: [{{name: a, handler: {{retries: {value}}}}}]")
    assert config.services[0].handler is not None
    assert config.services[0].handler.retries == number


@pytest.mark.parametrize(
    ("value", "flag"), [("true", True), ("1", True), ("'t'", True), ("0", False), ("'False'", False), ("''", False)]
)
def test_booleans_in_files(value: str, flag: bool) -> None:
    assert config_of(f"bypasses: [{{name: a, whitelist: {value}}}]").bypasses[0].whitelist is flag


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("10s", 10.0), ("1h2m3s", 3723.0), ("'0'", 0.0), ("5000000000", 5.0), ("0", 0.0), ("-1s", -1.0), ("300ms", 0.3)],
)
def test_durations_in_files(value: str, seconds: float) -> None:
    assert config_of(f"bypasses: [{{name: a, reload: {value}}}]").bypasses[0].reload == seconds


def test_bare_numbers_of_nanoseconds_are_warned_about() -> None:
    config, findings = decode("bypasses: [{name: a, reload: 10}]")
    assert config.bypasses[0].reload == 10e-9
    assert findings == ["f:1:30: warning: bypasses[0].reload: 10 means 10 nanoseconds; write 10s [config.nanoseconds]"]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (
            "bypasses: [{name: a, reload: '10'}]",
            "f:1:30: error: bypasses[0].reload: '10' is not a duration such as 10s",
        ),
        ("bypasses: [{name: a, reload: 1.5}]", "f:1:30: error: bypasses[0].reload: 1.5 is not a duration such as 10s"),
        ("bypasses: [{name: a, reload: .inf}]", "f:1:30: error: bypasses[0].reload: inf is not a duration such as 10s"),
        (
            "bypasses: [{name: a, reload: true}]",
            "f:1:30: error: bypasses[0].reload: True is not a duration such as 10s",
        ),
        (
            "bypasses: [{name: a, whitelist: yes}]",
            "f:1:33: error: bypasses[0].whitelist: 'yes' is not a boolean such as true",
        ),
        ("bypasses: [{name: a, whitelist: []}]", "f:1:33: error: bypasses[0].whitelist: a list is not true or false"),
        (
            "services: [{name: a, handler: {retries: x}}]",
            "f:1:41: error: services[0].handler.retries: 'x' is not an integer",
        ),
        (
            "services: [{name: a, handler: {retries: 1.5}}]",
            "f:1:41: error: services[0].handler.retries: 1.5 is not an integer",
        ),
        (
            "services: [{name: a, handler: http}]",
            "f:1:31: error: services[0].handler: 'http' is not a map of keys and values",
        ),
        ("services: [{name: a, addr: {x: 1}}]", "f:1:28: error: services[0].addr: a map is not a string"),
        ("services: [a]", "f:1:12: error: services[0]: 'a' is not a map of keys and values"),
        (
            "services: [{name: a, metadata: x}]",
            "f:1:32: error: services[0].metadata: 'x' is not a map of keys and values",
        ),
        ("services: [{name: a, bypasses: [{}]}]", "f:1:33: error: services[0].bypasses[0]: a map is not a string"),
    ],
)
def test_wrong_types_are_errors_with_their_place(text: str, finding: str) -> None:
    assert decode(text)[1] == [f"{finding} [config.type]"]


def test_all_errors_are_found_at_once() -> None:
    _, findings = decode("services:\n- {name: a, handler: {retries: x}}\n- {name: [], addr: {}}\n")
    assert len(findings) == 3


def test_one_item_stands_for_a_list_in_files() -> None:
    config = config_of("services: {name: a, admissions: 'a,b', handler: {authers: x}}")
    assert config.services[0].name == "a"
    assert config.services[0].admissions == ("a,b",)
    assert decode("services: {}")[0].services == ()
    _, findings = decode('{"services": [{"name": "a", "admissions": "b"}]}', "inline")
    assert findings == ["f:1:43: error: services[0].admissions: 'b' is not a list [config.type]"]


def test_a_list_of_maps_is_one_map_in_files() -> None:
    assert config_of("services: [{name: a, metadata: [{a: 1}, {b: 2}]}]").services[0].metadata == {"a": 1, "b": 2}


def test_inline_json_is_not_weakly_typed_but_takes_duration_strings() -> None:
    text = '{"limiters": [{"name": "a", "reload": "10s"}], "bypasses": [{"name": "b", "reload": 5000000000}]}'
    config = config_of(text, "inline")
    assert (config.limiters[0].reload, config.bypasses[0].reload) == (10.0, 5.0)
    _, findings = decode(
        '{"services": [{"name": 1, "handler": {"retries": "1"}}], "bypasses": [{"whitelist": 1}]}', "inline"
    )
    assert findings == [
        "f:1:24: error: services[0].name: 1 is not a string; put it in double quotes [config.type]",
        "f:1:50: error: services[0].handler.retries: '1' is not an integer [config.type]",
        "f:1:85: error: bypasses[0].whitelist: 1 is not true or false [config.type]",
    ]


def test_unknown_keys_are_warnings_with_the_nearest_known_one() -> None:
    _, findings = decode("services:\n- name: a\n  Adress: x\n  zzz: 1\n")
    assert findings == [
        "f:3:3: warning: services[0].Adress: unknown key; did you mean 'addr'? [config.unknown-key]",
        "f:4:3: warning: services[0].zzz: unknown key [config.unknown-key]",
    ]


def test_v2_configurations_are_refused_with_a_hint() -> None:
    _, findings = decode('{"ServeNodes": [":8080"], "ChainNodes": ["http://h:1"]}')
    assert len(findings) == 2
    assert findings[0].startswith("f:1:16: error: ServeNodes: this is the syntax of GOST v2")
    assert findings[0].endswith("[config.v2]")


def test_empty_items_are_passed_over_with_a_warning() -> None:
    config, findings = decode("services:\n- name: a\n-\n- name: b\n")
    assert [(each.name, each.path) for each in config.services] == [("a", "services[0]"), ("b", "services[1]")]
    assert "is empty and therefore ignored" in findings[0]


def test_empty_sections_do_not_exist_in_files() -> None:
    config, findings = decode("api: {}\nprofiling:\nlog: {level: info}\n")
    assert (config.api, config.profiling) == (None, None)
    assert config.log is not None
    assert findings == ["f:1:6: warning: api: is empty and therefore ignored [config.empty]"]
    assert config_of('{"api": {}}', "inline").api is not None
    plugin = config_of("authers: [{name: a, plugin: {tls: {}}}]").authers[0].plugin
    assert plugin is not None
    assert plugin.tls is not None


def test_empty_sections_within_sections_do_not_exist_either() -> None:
    config, _ = decode("tls: {certFile: a, keyFile: b, options: {}}\napi: {auth: {}}\nlog: {rotation: {maxSize: null}}")
    assert config.tls is not None
    assert config.tls.options is None
    assert (config.api, config.log) == (None, None)


def test_status_is_ignored() -> None:
    config_of("services: [{name: a, status: {state: ready}}]")


def test_chain_group_members_may_be_names() -> None:
    config = config_of("services: [{name: a, handler: {chainGroup: {chains: [x, {chain: y}]}}}]")
    handler = config.services[0].handler
    assert handler is not None
    assert handler.chain_group is not None
    assert [entry.chain for entry in handler.chain_group.chains] == ["x", "y"]


def test_string_maps() -> None:
    config, findings = decode("hops: [{name: a, nodes: [{name: b, http: {header: {X-A: 1, B: , c: []}}}]}]")
    http = config.hops[0].nodes[0].http
    assert http is not None
    assert http.header == {"x-a": "1", "b": ""}
    assert findings == ["f:1:68: error: hops[0].nodes[0].http.header.c: a list is not a string [config.type]"]


def test_null_is_the_same_as_absent() -> None:
    assert config_of("services: [{name: a, addr: null, handler: , bypasses: null, metadata: ~}]") == config_of(
        "services: [{name: a}]"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.5, "2.5"),
        (10.0, "10"),
        (1e21, "1000000000000000000000"),
        (1.5e-7, "0.00000015"),
        (-1.25e22, "-12500000000000000000000"),
        (1e-5, "0.00001"),
        (123456789.125, "123456789.125"),
    ],
)
def test_floats_are_written_without_exponent(value: float, text: str) -> None:
    assert plain_decimal(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back(value: float) -> None:
    text = plain_decimal(value)
    assert "e" not in text
    assert float(text) == value


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "handler", "nodes", "metadata", "auth", "reload", "hops", "type", "plugin", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(["services", "chains", "hops", "api", "log", "tls", "limiters", "x"]), VALUES),
    st.sampled_from(["file", "inline"]),
)
def test_any_tree_is_decoded_or_complained_about(data: dict[str, Any], kind: SourceKind) -> None:
    tree = parse(json.dumps(data), "json", Source("f", kind))
    decoder = Decoder()
    config = decoder.config(tree)
    assert isinstance(config, Config)
    for finding in locate(decoder.problems, config.positions):
        assert finding.place.line == 1
