"""Text to tree: values, places, and every kind of broken text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.parse import MAX_DEPTH, MAX_NODES, MAX_SIZE, Format, ParseError, parse
from gostnet.config.tree import List, Map, Scalar, Source, Tree

SOURCE = Source("gost.yaml")


def plain(tree: Tree) -> Any:
    if isinstance(tree, Map):
        return {entry.key: plain(entry.value) for entry in tree.entries}
    return [plain(item) for item in tree.items] if isinstance(tree, List) else tree.value


def read(text: str, form: Format = "yaml") -> Any:
    return plain(parse(text, form, SOURCE))


def failure(text: str, form: Format = "yaml") -> str:
    with pytest.raises(ParseError) as caught:
        parse(text, form, SOURCE)
    return f"{caught.value.place}: {caught.value.reason}"


def test_yaml() -> None:
    text = """\
# comment
services:
- name: a
  addr: :8080
  handler: {type: http, metadata: {x: [1, two, "3", yes]}}
  empty:
  text: |
    one
    two
? key
: value
"""
    assert read(text) == {
        "services": [
            {
                "name": "a",
                "addr": ":8080",
                "handler": {"type": "http", "metadata": {"x": [1, "two", "3", "yes"]}},
                "empty": None,
                "text": "one\ntwo\n",
            }
        ],
        "key": "value",
    }


def test_yaml_keys_that_are_not_strings() -> None:
    assert read("80: a\ntrue: b\nnull: c\n") == {"80": "a", "true": "b", "": "c"}


def test_yaml_anchors_aliases_and_merges() -> None:
    text = "base: &b {x: 1, y: 2}\nuse: *b\nmerged: {<<: *b, x: 3}\nlist: {<<: [*b, {z: 4, x: 5}]}\n"
    assert read(text) == {
        "base": {"x": 1, "y": 2},
        "use": {"x": 1, "y": 2},
        "merged": {"x": 3, "y": 2},
        "list": {"x": 1, "y": 2, "z": 4},
    }


def test_quoted_and_tagged_scalars_are_not_resolved() -> None:
    assert read("a: {'<<': 1}") == {"a": {"<<": 1}}
    assert read("a: '1'\nb: \"true\"\nc: !!str 3\n") == {"a": "1", "b": "true", "c": "3"}


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n", "null\n", "~"])
def test_empty_yaml_is_an_empty_map(text: str) -> None:
    assert read(text) == {}


def test_empty_json_is_an_empty_map() -> None:
    assert read("", "json") == {}
    assert read(" \n", "json") == {}


def test_yaml_places() -> None:
    tree = parse('services:\n  - name: "a"\n    addr:   :80\n', "yaml", SOURCE)
    [services] = tree.entries
    assert (str(services.place), str(services.value.place)) == ("gost.yaml:1:1", "gost.yaml:2:3")
    assert isinstance(services.value, List)
    [service] = services.value.items
    assert isinstance(service, Map)
    places = [(entry.key, str(entry.place), str(entry.value.place)) for entry in service.entries]
    assert places == [("name", "gost.yaml:2:5", "gost.yaml:2:11"), ("addr", "gost.yaml:3:5", "gost.yaml:3:13")]


def test_json_places() -> None:
    tree = parse('{\n "services": [\n  {"name": "\u00e4", "n": 1}]}', "json", SOURCE)
    [services] = tree.entries
    assert (str(services.place), str(services.value.place)) == ("gost.yaml:2:2", "gost.yaml:2:14")
    assert isinstance(services.value, List)
    [service] = services.value.items
    assert isinstance(service, Map)
    places = [(entry.key, str(entry.place), str(entry.value.place)) for entry in service.entries]
    assert places == [("name", "gost.yaml:3:4", "gost.yaml:3:12"), ("n", "gost.yaml:3:17", "gost.yaml:3:22")]


def test_columns_count_characters_not_bytes() -> None:
    tree = parse("{\u00e4: 1, b: 2}", "yaml", SOURCE)
    assert str(tree.entries[1].place) == "gost.yaml:1:8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "gost.yaml:2:1: not valid YAML: did not find expected node content"),
        ("a: 1\n b: 2", "gost.yaml:2:3: not valid YAML: mapping values are not allowed in this context"),
        ("\t- a", "gost.yaml:1:1: not valid YAML: found character that cannot start any token"),
        ("a: @x", "gost.yaml:1:4: not valid YAML: found character that cannot start any token"),
        ("a: b\x00c", "gost.yaml:1:5: not valid YAML: control characters are not allowed"),
        ("a: 1\n\nA: 2", "gost.yaml:3:1: key 'A' is already defined in line 1"),
        ("a: {b: 1, b: 2}", "gost.yaml:1:11: key 'b' is already defined in line 1"),
        ("a: *x", "gost.yaml:1:4: alias 'x' has no anchor before it"),
        ("a: &x [*x]", "gost.yaml:1:8: alias 'x' has no anchor before it"),
        ("a: !!foo 1", "gost.yaml:1:4: cannot read '1' with tag tag:yaml.org,2002:foo"),
        ("a: !!python/object/apply:os.system ['id']", None),
        ("? {a: b}\n: c", "gost.yaml:1:3: a key must be a word, not a list or map"),
        ("a: {<<: 1}", "gost.yaml:1:5: << takes a map or a list of maps"),
        ("a: 1\n---\nb: 2", "gost.yaml:2:1: a second document begins; only one is read"),
        ("- a", "gost.yaml:1:1: the configuration is not a map of sections such as services: [...]"),
        ("just text", "gost.yaml:1:1: the configuration is not a map of sections such as services: [...]"),
    ],
)
def test_broken_yaml(text: str, message: str | None) -> None:
    if message is None:
        # A tag on a collection is not looked at: there is nothing that could be run.
        assert read(text) == {"a": ["id"]}
    else:
        assert failure(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "gost.yaml:1:2: not valid JSON: a key in double quotes is missing"),
        ('{"a" 1}', "gost.yaml:1:6: not valid JSON: a colon is missing"),
        ('{"a": }', "gost.yaml:1:7: not valid JSON: a value is missing"),
        ('{"a": tru}', "gost.yaml:1:7: not valid JSON: a value is missing"),
        ('{"a": 01}', "gost.yaml:1:8: not valid JSON: a comma or } is missing"),
        ('{"a": [1 2]}', "gost.yaml:1:10: not valid JSON: a comma or ] is missing"),
        ('{"a": [1,]}', "gost.yaml:1:10: not valid JSON: a value is missing"),
        ('{"a": 1,}', "gost.yaml:1:9: not valid JSON: a key in double quotes is missing"),
        ('{"a": "x\ny"}', "gost.yaml:1:9: not valid JSON: invalid control character"),
        ('{"a": "x', "gost.yaml:1:7: not valid JSON: unterminated string starting"),
        ('{"a": 1} x', "gost.yaml:1:10: not valid JSON: something follows the end of the value"),
        ('{\n"a": 1,\n"A": 2}', "gost.yaml:3:1: key 'A' is already defined in line 2"),
        ('{"a": 1e999}', "gost.yaml:1:7: not valid JSON: 1e999 is too large"),
        ('{"a": 99999999999999999999}', "gost.yaml:1:7: not valid JSON: 99999999999999999999 is too large"),
        ('{"a": ' + "1" * 100 + "}", "gost.yaml:1:7: not valid JSON: a number is too long"),
        ("[]", "gost.yaml:1:1: the configuration is not a map of sections such as services: [...]"),
        ('{"a": NaN}', "gost.yaml:1:7: not valid JSON: a value is missing"),
    ],
)
def test_broken_json(text: str, message: str) -> None:
    assert failure(text, "json") == message


def test_half_a_surrogate_pair_becomes_a_replacement() -> None:
    assert read('{"a": "\\ud800x", "b": "\\ud83d\\ude00"}', "json") == {"a": "\ufffdx", "b": "\U0001f600"}


def test_toml() -> None:
    text = '[[services]]\nname = "a"\naddr = ":80"\n[services.handler]\ntype = "http"\nretries = 2\nd = 2026-01-31\n'
    assert read(text, "toml") == {
        "services": [{"name": "a", "addr": ":80", "handler": {"type": "http", "retries": 2, "d": "2026-01-31"}}]
    }
    assert failure("a = \n", "toml") == "gost.yaml:1:5: not valid TOML: invalid value"
    assert "is already defined" in failure("a = 1\nA = 2", "toml")


@pytest.mark.parametrize("form", ["yaml", "json", "toml"])
def test_depth_is_bounded(form: Format) -> None:
    def nested(levels: int) -> str:
        start, end = "[" * levels, "]" * levels
        return {"yaml": f"a: {start}{end}", "json": f'{{"a": {start}{end}}}', "toml": f"a = {start}{end}"}[form]

    parse(nested(MAX_DEPTH - 2), form, SOURCE)
    assert f"nested more than {MAX_DEPTH} levels deep" in failure(nested(MAX_DEPTH + 1), form)
    assert "gost.yaml" in failure(nested(100_000), form)


def test_aliases_cannot_multiply_without_bound() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert f"more than {MAX_NODES} values" in failure("\n".join(lines))


def test_size_is_bounded() -> None:
    assert "larger than 10 MiB" in failure("a" * (MAX_SIZE + 1))


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    forms: tuple[Format, ...] = ("yaml", "json", "toml")
    for form in forms:
        try:
            assert isinstance(parse(text, form, SOURCE), Map)
        except ParseError:
            continue


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.sampled_from([None, 1, "\t"]))
def test_json_reads_what_the_standard_library_reads(data: dict[str, Any], indent: int | str | None) -> None:
    def folded(value: Any) -> bool:
        """True if two keys of one map differ in case only."""
        if isinstance(value, dict):
            return len({key.lower() for key in value}) < len(value) or any(folded(item) for item in value.values())
        return isinstance(value, list) and any(folded(item) for item in value)

    text = json.dumps(data, indent=indent)
    if folded(data):
        assert "is already defined" in failure(text, "json")
    else:
        assert read(text, "json") == json.loads(text)


def test_places_survive_windows_line_ends_and_a_byte_order_mark_is_no_key() -> None:
    tree = parse("a: 1\r\nb: 2\r\n", "yaml", SOURCE)
    assert str(tree.entries[1].place) == "gost.yaml:2:1"


def test_scalars_remember_how_they_were_written() -> None:
    tree = parse("a: 0123", "yaml", SOURCE)
    scalar = tree.entries[0].value
    assert isinstance(scalar, Scalar)
    assert (scalar.value, scalar.text) == (83, "0123")
