"""Plain YAML scalars as GOST reads them: the YAML 1.2 core schema, and the older octal and underscore forms.

`yes`, `no`, `on`, `off`, `12:30` and timestamps are strings.
"""

from __future__ import annotations

import math
import re
from typing import Final

from .tree import ScalarValue

_NULL: Final = frozenset(("", "~", "null", "Null", "NULL"))
_BOOL: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INFINITY: Final = frozenset((".inf", ".Inf", ".INF"))
_NAN: Final = frozenset((".nan", ".NaN", ".NAN"))
_INTEGER: Final = re.compile(r"[-+]?(0[bB][01_]+|0[oO][0-7_]+|0[xX][0-9a-fA-F_]+|[0-9][0-9_]*)")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LONGEST: Final = 64
"""Characters: longer words cannot be 64-bit numbers."""

INT64: Final = range(-(1 << 63), 1 << 64)
"""What an integer may be: signed or unsigned in 64 bits."""


def resolve(text: str) -> ScalarValue:
    """Return the value of a plain (unquoted) scalar."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if text[0] in "+-.0123456789" and len(text) <= _LONGEST:
        number = _number(text)
        if number is not None:
            return number
    return text


def _number(text: str) -> int | float | None:
    if _INTEGER.fullmatch(text):
        value = _integer(text.replace("_", "").lower())
        if value is not None:
            return value
    plain = text.replace("_", "")
    if _FLOAT.fullmatch(plain) and math.isfinite(float(plain)):
        return float(plain)
    sign = -1.0 if text[0] == "-" else 1.0
    word = text[1:] if text[0] in "+-" else text
    if word in _INFINITY:
        return sign * math.inf
    return math.nan if text in _NAN else None


def _integer(text: str) -> int | None:
    sign = -1 if text[0] == "-" else 1
    digits = text.lstrip("+-")
    try:
        match digits[:2]:
            case "0b":
                value = int(digits[2:], 2)
            case "0o":
                value = int(digits[2:], 8)
            case "0x":
                value = int(digits[2:], 16)
            case _ if len(digits) > 1 and digits[0] == "0":
                value = int(digits, 8)
            case _:
                value = int(digits)
    except ValueError:
        return None
    return sign * value if sign * value in INT64 else None


def tagged(tag: str, text: str) -> ScalarValue:
    """Return the value of a scalar with an explicit tag. Raise ValueError for a tag or a text that does not fit."""
    value = resolve(text)
    match tag.removeprefix("tag:yaml.org,2002:"):
        case "str" | "timestamp":
            return text
        case "null" if value is None:
            return None
        case "bool" if isinstance(value, bool):
            return value
        case "int" if isinstance(value, int) and not isinstance(value, bool):
            return value
        case "float" if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    raise ValueError(f"{text[:64]!r} with tag {tag[:64]}")
