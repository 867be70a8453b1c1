"""What a section of the configuration is, and what the decoder, the output and the checks know of its fields."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Spec:
    name: str = ""
    yaml: str = ""
    json: str = ""
    keep_yaml: bool = False
    keep_json: bool = False
    ref: str = ""
    secret: bool = False


def item(
    default: T,
    *,
    name: str = "",
    yaml: str = "",
    json: str = "",
    keep: bool | str = False,
    ref: str = "",
    secret: bool = False,
) -> T:
    """Declare a field of the schema.

    `name` is its key (default: camelCase of the field's name), `yaml` and `json` are the keys of the output where they
    differ. `keep` prints it even if empty (True, or only in "yaml" or "json"). `ref` names the top-level list
    that holds what the field refers to. `secret` values never reach messages.
    """
    spec = _Spec(name, yaml, json, keep in (True, "yaml"), keep in (True, "json"), ref, secret)
    made: Any
    if isinstance(default, dict):
        made = field(default_factory=dict, metadata={"spec": spec})
    else:
        made = field(default=cast(Any, default), metadata={"spec": spec})
    return cast(T, made)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """An object of the configuration."""

    path: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class SchemaField:
    """One field: its attribute, its key, and its shape.

    `shape` is one of string, integer, boolean, duration, strings, string map, map, section, sections;
    `section` is the class of the last two.
    """

    attribute: str
    key: str
    shape: str
    section: type[Section] | None
    yaml: str
    json: str
    keep_yaml: bool
    keep_json: bool
    ref: str
    secret: bool


_SHAPES: Final[dict[Any, str]] = {
    str: "string",
    int: "integer",
    bool: "boolean",
    tuple[str, ...]: "strings",
    dict[str, str]: "string map",
    dict[str, Any]: "map",
}


def _shape(hint: Any) -> tuple[str, type[Section] | None]:
    if get_origin(hint) is Annotated:
        return "duration", None
    if hint in _SHAPES:
        return _SHAPES[hint], None
    if get_origin(hint) in (Union, UnionType):
        return "section", cast(type[Section], get_args(hint)[0])
    return "sections", cast(type[Section], get_args(hint)[0])


def _camel(attribute: str) -> str:
    first, *rest = attribute.rstrip("_").split("_")
    return first + "".join(word.capitalize() for word in rest)


def schema_fields(section: type[Section]) -> tuple[SchemaField, ...]:
    """Return the fields of a section class, in order."""
    return _schema_fields(cast(Hashable, section))


@cache
def _schema_fields(section: Any) -> tuple[SchemaField, ...]:
    hints = get_type_hints(section, include_extras=True)
    found = []
    for each in fields(section):
        spec: _Spec | None = each.metadata.get("spec")
        if spec is None:
            continue
        key = spec.name or _camel(each.name)
        shape, inner = _shape(hints[each.name])
        found.append(
            SchemaField(
                each.name,
                key,
                shape,
                inner,
                spec.yaml or key,
                spec.json or key,
                spec.keep_yaml,
                spec.keep_json,
                spec.ref,
                spec.secret,
            )
        )
    return tuple(found)


def walk(section: Section) -> Iterator[Section]:
    """Yield a section and all sections below it, in order."""
    yield section
    for each in schema_fields(type(section)):
        value = getattr(section, each.attribute)
        if each.shape == "section" and value is not None:
            yield from walk(value)
        elif each.shape == "sections":
            for inner in value:
                yield from walk(inner)
