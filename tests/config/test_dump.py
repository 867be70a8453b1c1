"""Schema to text: GOST's form, and a text that reads back as the same."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.decode import Decoder
from gostnet.config.dump import dump, to_data
from gostnet.config.parse import Format, parse
from gostnet.config.schema import Config, Section, schema_fields
from gostnet.config.tree import Source

S = TypeVar("S", bound=Section)
GOST = os.environ.get("GOST_BIN", "")


def config_of(text: str, form: Format = "yaml") -> Config:
    decoder = Decoder()
    config = decoder.config(parse(text, form, Source("f")))
    assert [problem for problem in decoder.problems if problem.severity == "error"] == []
    return config


def test_yaml_form() -> None:
    config = config_of(
        """
bypasses: [{name: b, matchers: ['*.local', 1.1.1.1], reload: 10s}]
services:
- name: a
  addr: :8080
  handler:
    type: http
    auth: {}
    metadata: {z: true, a: [1, x], m: {k: v}, e: {}, l: []}
  listener: {}
  forwarder: {selector: {strategy: fifo}}
  metadata: {}
log: {level: debug}
"""
    )
    assert (
        dump(config, "yaml")
        == """\
services:
  - name: a
    addr: :8080
    handler:
      type: http
      auth: {}
      metadata:
        a:
          - 1
          - x
        e: {}
        l: []
        m:
          k: v
        z: true
    listener:
      type: ""
    forwarder:
      selector:
        strategy: fifo
        maxFails: 0
        failTimeout: 0s
      nodes: []
bypasses:
  - name: b
    matchers:
      - '*.local'
      - 1.1.1.1
    reload: 10s
log:
  level: debug
"""
    )


def test_json_form() -> None:
    text = """
services:
- name: a
  forwarder: {}
  handler: {metadata: {rate: 1.5}}
chains: [{name: c}]
hops:
- name: h
  nodes:
  - name: n
    matcher: {rule: "Host(`a`) && Path(`/<x>`)", bodySize: 5}
    probe: {interval: 1m}
    http: {rewriteURL: [{match: a, replacement: b}], rewriteBody: [{match: c, maxChunkSize: 3}]}
"""
    assert (
        dump(config_of(text), "json")
        == """\
{
  "services": [
    {
      "name": "a",
      "handler": {
        "type": "",
        "metadata": {
          "rate": 1.5
        }
      },
      "forwarder": {
        "nodes": null
      }
    }
  ],
  "chains": [
    {
      "name": "c",
      "hops": null
    }
  ],
  "hops": [
    {
      "name": "h",
      "nodes": [
        {
          "name": "n",
          "matcher": {
            "rule": "Host(`a`) \\u0026\\u0026 Path(`/\\u003cx\\u003e`)",
            "bodySize": 5
          },
          "http": {
            "rewriteURL": [
              {
                "Match": "a",
                "Replacement": "b"
              }
            ],
            "rewriteBody": [
              {
                "Type": "",
                "Match": "c",
                "Replacement": "",
                "maxChunkSize": 3
              }
            ]
          },
          "probe": {
            "type": "",
            "interval": 60000000000,
            "timeout": 0
          }
        }
      ]
    }
  ]
}
"""
    )


def test_oddities_of_the_yaml_form() -> None:
    text = dump(config_of("hops: [{name: h, nodes: [{name: n, matcher: {bodySize: 5}, probe: {}}]}]"), "yaml")
    assert "bodysize: 5\n" in text
    assert 'type: ""\n          addr: ""\n          interval: 0s\n          timeout: 0s\n' in text


def test_nothing_at_all() -> None:
    assert dump(Config(), "yaml") == "services: []\n"
    assert dump(Config(), "anything") == "services: []\n"
    assert dump(Config(), "json") == '{\n  "services": null\n}\n'


STRINGS = [
    *("a", "", " a", "a ", "yes", "No", "y", "null", "~", "true", "1", "1.5", "0x1F", "1e3", "1_000", "12:30", ".5"),
    *("2020-01-01", "a: b", "a:b", ":8080", "a:", "a #b", "a#b", "#a", "- a", "-a", "-", "?", "? a", "?a", "[a]", "{a"),
    *(
        "*.local",
        "&a",
        "!a",
        "|",
        ">",
        "'a'",
        '"a"',
        "a'b",
        "%a",
        "@a",
        "`a`",
        "a,b",
        "[::1]:80",
        "---",
        "...",
        "--- a",
    ),
    *("=", "<<", "a\nb", "a\n", "\na", "a\n\n", " a\nb", "a \nb", "a\tb", "\ta", "a\rb", "\u00e4", "\x07", "\x7f"),
    *(
        "\x85",
        "\u2028",
        "a\u2028b",
        "\u2029",
        "\ufeff",
        "\U0001f600",
        "a\\b",
        "a: ",
        "key: [v",
        "null ",
        "0o17",
        "0b1",
        ".inf",
        "a\n b\n",
    ),
]


NOT_AS_GOST = ("=", "<<", "\u2028", "a\u2028b", "\u2029")
"""Not escaped in GOST's output, where other YAML readers take them for something else."""


@pytest.mark.parametrize("text", STRINGS)
def test_any_string_reads_back(text: str) -> None:
    config = Config(services=(_service(text),))
    for form in ("yaml", "json"):
        again = config_of(dump(config, form), "yaml" if form == "yaml" else "json")
        assert again == config


def _service(text: str) -> Any:
    [made] = config_of("services: [{name: a}]").services
    return replace(made, name=text, metadata={"k": [text, {"x": text}], "m": {"a": text}})


KEYS = [key for key in (*STRINGS, "k" * 900, "\u00e4\n" * 100) if key.lower() == key]
"""Those that stay as they are: keys are folded in files."""


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["x", [1], {"a": "b"}, [], None, "a\nb"])
def test_any_key_reads_back(key: str, value: Any) -> None:
    [made] = config_of("services: [{name: a}]").services
    config = Config(services=(replace(made, metadata={"m": {key: value, "z": 1}, "n": 1}),))
    for form in ("yaml", "json"):
        assert config_of(dump(config, form), "yaml" if form == "yaml" else "json") == config


@pytest.mark.interop
@pytest.mark.skipif(not GOST, reason="GOST_BIN is not set")
@pytest.mark.parametrize("text", [text for text in STRINGS if "\n" not in text and text not in NOT_AS_GOST])
def test_strings_are_quoted_as_gost_quotes_them(text: str, tmp_path: Path) -> None:
    source = tmp_path / "gost.json"
    source.write_text(json.dumps({"services": [{"name": text, "metadata": {"k": [text]}}]}))
    theirs = subprocess.run([GOST, "-C", str(source), "-O", "yaml"], capture_output=True, text=True, check=True).stdout
    assert dump(config_of(source.read_text(), "json"), "yaml") == theirs


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
FREE = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | TEXT
    | st.none()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT.map(str.lower), inner, max_size=3),
    max_leaves=6,
)


def _unfolded(value: Any) -> bool:
    """True if folding the case of keys changes nothing."""
    if isinstance(value, dict):
        return all(key == key.lower() for key in value) and all(_unfolded(item) for item in value.values())
    return not isinstance(value, list) or all(_unfolded(item) for item in value)


def sections(cls: type[Section], depth: int) -> st.SearchStrategy[Any]:
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for each in schema_fields(cls):
        match each.shape:
            case "string":
                value: st.SearchStrategy[Any] = TEXT
            case "integer":
                value = st.integers(0, 2**31)
            case "boolean":
                value = st.booleans()
            case "duration":
                value = st.integers(0, 10**15).map(lambda count: count / 1e9)
            case "strings":
                value = st.lists(TEXT, max_size=2).map(tuple)
            case "string map":
                value = st.dictionaries(TEXT.map(str.lower), TEXT, max_size=2).filter(_unfolded)
            case "map":
                value = st.dictionaries(TEXT.map(str.lower), FREE, max_size=2).filter(_unfolded)
            case "section":
                assert each.section is not None
                value = st.none() if depth == 0 else st.none() | sections(each.section, depth - 1)
            case _:
                assert each.section is not None
                inner = sections(each.section, depth - 1) if depth else st.nothing()
                value = st.lists(inner, max_size=2 if depth else 0).map(tuple)
        fields[each.attribute] = value
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: cls(**values))


def without_empty_sections(section: S) -> S:
    """Drop sections that would be printed without content: outside of lists they do not exist in a file."""
    for each in schema_fields(type(section)):
        value = getattr(section, each.attribute)
        if each.shape == "section" and value is not None:
            inner = without_empty_sections(value)
            section = replace(section, **{each.attribute: inner if to_data(inner, "yaml") else None})
    return section


@given(sections(Config, 4))
def test_any_configuration_reads_back(config: Config) -> None:
    config = without_empty_sections(config)
    assert config_of(dump(config, "yaml")) == config
    assert config_of(dump(config, "json"), "json") == config


@given(st.dictionaries(TEXT, FREE, max_size=3))
def test_other_readers_understand_our_yaml(data: dict[str, Any]) -> None:
    [service] = config_of("services: [{name: a}]").services
    text = dump(Config(services=(replace(service, metadata=data),)), "yaml")
    assert yaml.safe_load(text) is not None
