"""Configuration to text, in the form of `-O yaml` and `-O json`: GOST's keys, order, omissions and spellings.

YAML: two spaces of indentation, durations as Go writes them, `services: []` even if there is none. JSON: durations in
nanoseconds, `null` for a list that is printed though empty, `<`, `>` and `&` escaped. Keys of free maps are sorted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ..core.units import NANOSECONDS, format_nanoseconds
from .scalars import resolve
from .schema import Config, SchemaField, Section, schema_fields


def dump(config: Config, form: str) -> str:
    """Return the whole configuration as text; any `form` but json is YAML."""
    if form == "json":
        return _html_escaped(json.dumps(to_data(config, "json"), indent=2, ensure_ascii=False)) + "\n"
    return "".join(f"{line}\n" for line in _map_lines(to_data(config, "yaml")))


def to_data(section: Section, form: str) -> dict[str, Any]:
    """Return a section as plain data with the keys and omissions of `form` (yaml or json)."""
    result: dict[str, Any] = {}
    for each in schema_fields(type(section)):
        value = getattr(section, each.attribute)
        keep = each.keep_json if form == "json" else each.keep_yaml
        # A section that is there but empty is printed; anything else that is empty is not.
        empty = value is None if each.shape == "section" else not value
        if keep or not empty:
            result[each.json if form == "json" else each.yaml] = _value(each, value, form)
    return result


def _value(each: SchemaField, value: Any, form: str) -> Any:
    match each.shape:
        case "section":
            return to_data(value, form)
        case "sections":
            if not value and form == "json":
                return None
            return [to_data(item, form) for item in value]
        case "strings":
            return list(value)
        case "duration":
            count = round(value * NANOSECONDS)
            return count if form == "json" else format_nanoseconds(count)
        case "map" | "string map":
            return _sorted(value)
        case _:
            return value


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e21:
        # Go prints 5.0 as 5.
        return int(value)
    return value


def _html_escaped(text: str) -> str:
    for letter, escape in (
        ("&", "\\u0026"),
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(letter, escape)
    return text


# ---- YAML ------------------------------------------------------------------------------------------------------------
_OLD_BOOLEANS: Final = re.compile("y|Y|yes|Yes|YES|on|On|ON|n|N|no|No|NO|off|Off|OFF")
_BASE_60: Final = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_TIMESTAMP: Final = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ][0-9:.]+(Z|[-+][0-9:]+)?)?")
_PLAIN_START: Final = re.compile(r"[-?:](?=[^\s,\[\]{}])|[^\s\-?:,\[\]{}#&*!|>'\"%@`]")
_UNPRINTABLE: Final = re.compile("[^\\x0a\\x20-\\x7e\\xa0-\\u2027\\u202a-\\ud7ff\\ue000-\\ufefe\\uff00-\\ufffd]")
"""What Go's library escapes, characters beyond 16 bits included, and the two line separators of Unicode."""
_SPECIAL: Final = re.compile('["\\\\]|' + _UNPRINTABLE.pattern + "|\n")
_ESCAPES: Final = {
    **{"\0": "0", "\x07": "a", "\x08": "b", "\t": "t", "\n": "n", "\x0b": "v", "\x0c": "f", "\r": "r", "\x1b": "e"},
    **{'"': '"', "\\": "\\", "\x85": "N", "\u2028": "L", "\u2029": "P"},
}


def _map_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a block mapping; nested lines are indented by two."""
    for key, value in data.items():
        # A key has one line.
        yield from _entry_lines(_double_quoted(key) if "\n" in key else _string(key, ""), value)


def _entry_lines(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        yield f"{key}:"
        yield from (f"  {line}" if line else line for line in _map_lines(value))
    elif isinstance(value, list) and value:
        yield f"{key}:"
        yield from (f"  {line}" if line else line for line in _list_lines(value))
    else:
        first, *rest = _scalar(value, "  ").split("\n")
        yield f"{key}: {first}"
        yield from rest


def _list_lines(items: list[Any]) -> Iterator[str]:
    for value in items:
        if isinstance(value, Mapping) and value:
            lines: Iterator[str] = _map_lines(value)
        elif isinstance(value, list) and value:
            lines = _list_lines(value)
        else:
            lines = iter(_scalar(value, "").split("\n"))
        mark = "- "
        for line in lines:
            yield f"{mark}{line}" if line or mark == "- " else line
            mark = "  "


def _scalar(value: Any, indent: str) -> str:
    """Return a scalar, or an empty collection, in the style that Go's library chooses."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, list):
        return "[]"
    return _string(value, indent) if isinstance(value, str) else str(value)


def _number(value: float) -> str:
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    text = repr(value)
    mantissa, e, exponent = text.partition("e")
    # Go writes the exponent with two digits at least.
    return f"{mantissa.removesuffix('.0')}e{exponent[0]}{exponent[1:].zfill(2)}" if e else text


def _string(text: str, indent: str) -> str:
    if _UNPRINTABLE.search(text):
        return _double_quoted(text)
    if "\n" in text and not text.startswith((" ", "\n")) and " \n" not in text:
        return _literal(text, indent)
    if "\n" in text:
        return _double_quoted(text)
    if not isinstance(resolve(text), str) or _OLD_BOOLEANS.fullmatch(text) or _BASE_60.fullmatch(text):
        return _double_quoted(text)
    if _TIMESTAMP.fullmatch(text) or text == "<<" or text == "=":
        return _double_quoted(text)
    if _is_plain(text):
        return text
    return "'" + text.replace("'", "''") + "'"


def _is_plain(text: str) -> bool:
    """True if a block scalar without quotes reads back as the same text."""
    if text != text.strip() or ": " in text or " #" in text or text.endswith(":"):
        return False
    if text.startswith(("---", "...")):
        return False
    return bool(_PLAIN_START.match(text))


def _double_quoted(text: str) -> str:
    return '"' + _SPECIAL.sub(_escape, text) + '"'


def _escape(found: re.Match[str]) -> str:
    letter = found[0]
    if letter in _ESCAPES:
        return f"\\{_ESCAPES[letter]}"
    code = ord(letter)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def _literal(text: str, indent: str) -> str:
    body = text.rstrip("\n")
    ends = len(text) - len(body)
    chomp = "-" if ends == 0 else "" if ends == 1 else "+"
    lines = [f"{indent}{line}" if line else "" for line in body.split("\n")] + [""] * (ends - 1)
    return "\n".join([f"|{chomp}", *lines])
