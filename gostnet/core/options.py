"""Options of components: one plain dataclass declares the keys, and binding, schema and documentation follow from it.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        read_timeout: Seconds = opt(15.0, "Deadline of the client's handshake.")
        no_tls: bool = opt(False, "Do not accept the TLS methods.", key="notls")
        mux: Mux = group(Mux, version=2)

Keys are compared without case; of several names of one option the first that exists counts. Groups are embedded:
their keys are keys of the class that embeds them. A class with a method `validate` checks more than types.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from .errors import ConfigError
from .suggest import did_you_mean
from .units import format_nanoseconds, parse_seconds, parse_size

T = TypeVar("T")

Severity: TypeAlias = Literal["error", "warning"]


class Secret:
    """A text that no message, `repr` or log shows; `reveal()` is the only way to it."""

    __slots__ = ("_text",)

    def __init__(self, text: str = "") -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(***)" if self._text else "Secret()"

    def __str__(self) -> str:
        return "***" if self._text else ""

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at `path`, in words for the user; `code` is stable and dotted."""

    path: str
    message: str
    code: str = "config.value"
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class Advice(str):
    """A message of `validate` about a value that is used, though hardly as it was meant: a warning."""

    __slots__ = ()


@runtime_checkable
class Validated(Protocol):
    """An options class or group that checks more than types."""

    def validate(self) -> Iterable[tuple[str, str]]:
        """Yield (key, message) for every value that cannot be used; called by `bind_options` for each instance.

        `key` is the one to document; what is reported is the one that was written. A message that is an Advice warns.
        """


class Unusable(ValueError):
    """A value is not what is wanted; the text completes `VALUE is not ...`, such as `a duration such as 10s`."""


# ---- coercions: what GOST's getters accept; what they would turn into zero is an error --------------
def _integer(value: object) -> int | None:
    """Return the integer in `value`: an int, a bool, or a float without fraction (how JSON may give one)."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return None


_DECIMAL: Final = re.compile(r"[+-]?[0-9]{1,19}")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_TRUE: Final = frozenset(("1", "t", "T", "true", "TRUE", "True"))
_FALSE: Final = frozenset(("0", "f", "F", "false", "FALSE", "False"))


def to_bool(value: object) -> bool:
    """Coerce as GOST does: integers, and the words 1 t T true True TRUE 0 f F false False FALSE.

    This and all coercions below raise Unusable.
    """
    number = _integer(value)
    if number is not None:
        return number != 0
    if isinstance(value, str):
        if value in _TRUE:
            return True
        if value in _FALSE:
            return False
    raise Unusable("a boolean such as true")


def to_int(value: object) -> int:
    """Coerce an integer, an integral float, a bool or a decimal string."""
    number = _integer(value)
    if number is None and isinstance(value, str) and _DECIMAL.fullmatch(value):
        number = int(value)
    if number is None:
        raise Unusable("an integer")
    return number


def to_float(value: object) -> float:
    """Coerce a number or a string that spells one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    raise Unusable("a number")


def to_seconds(value: object) -> float:
    """Coerce a duration: a number is seconds, a string a Go duration or else a whole number of seconds."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if isinstance(value, str):
        if _DECIMAL.fullmatch(value):
            return float(int(value))
        try:
            return parse_seconds(value)
        except ValueError:
            pass
    raise Unusable("a duration such as 10s")


def to_bytes(value: object) -> int:
    """Coerce a number of bytes: an integer as in `to_int`, or a size with a unit such as 64KB."""
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        try:
            return parse_size(value)
        except ValueError:
            raise Unusable("a number of bytes such as 4096 or 64KB") from None
    try:
        return to_int(value)
    except Unusable:
        raise Unusable("a number of bytes such as 4096 or 64KB") from None


def to_str(value: object) -> str:
    """Coerce a string; numbers are written in plain decimals, booleans as true and false."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else f"{value:.17g}" if "e" in repr(value) else repr(value)
    raise Unusable("a string")


def _strings(value: object) -> list[str]:
    if not isinstance(value, (list, tuple)):
        raise Unusable("a list of strings")
    try:
        return [to_str(item) for item in value]
    except Unusable:
        raise Unusable("a list of strings") from None


def to_list(value: object) -> list[str]:
    """Coerce a list; a single string is refused, as GOST does not read it either."""
    return _strings(value)


def to_comma_list(value: object) -> list[str]:
    """Coerce a list, or a string of items separated by commas; blanks around items and empty items vanish."""
    if isinstance(value, (str, int, float)):
        value = to_str(value).split(",")
    try:
        return [item.strip() for item in _strings(value) if item.strip()]
    except Unusable:
        raise Unusable("a list, or a string of items separated by commas") from None


def to_map(value: object) -> dict[str, str]:
    """Coerce a map; its values become strings."""
    if not isinstance(value, Mapping):
        raise Unusable("a map of strings")
    try:
        return {to_str(name): to_str(item) for name, item in value.items()}
    except Unusable:
        raise Unusable("a map of strings") from None


def _secret(value: object) -> Secret:
    return Secret(to_str(value))


@dataclass(frozen=True, slots=True)
class _Kind:
    word: str
    parse: Callable[[Any], Any]
    json: tuple[str, ...]
    from_url: bool = True


_KINDS: Final = {
    "bool": _Kind("bool", to_bool, ("boolean", "integer", "string")),
    "int": _Kind("int", to_int, ("integer", "string")),
    "float": _Kind("float", to_float, ("number", "string")),
    "duration": _Kind("duration", to_seconds, ("string", "number")),
    "size": _Kind("size", to_bytes, ("integer", "string")),
    "string": _Kind("string", to_str, ("string", "number", "boolean")),
    "secret": _Kind("string", _secret, ("string", "number")),
    "list": _Kind("list", to_list, ("array",), from_url=False),
    "comma list": _Kind("list or comma-separated string", to_comma_list, ("array", "string", "number")),
    "map": _Kind("map", to_map, ("object",), from_url=False),
    "any": _Kind("any", lambda value: value, (), from_url=False),
}

Seconds: TypeAlias = Annotated[float, "duration"]
"""A duration in seconds, on the loop's clock."""
Bytes: TypeAlias = Annotated[int, "size"]
"""A size in bytes."""
CommaList: TypeAlias = Annotated[list[str], "comma list"]
"""A list that may also be written as one comma-separated string."""

_BY_TYPE: Final[dict[Any, str]] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "string",
    Secret: "secret",
    list[str]: "list",
    dict[str, str]: "map",
    Any: "any",
    object: "any",
}


@dataclass(frozen=True, slots=True)
class _Spec:
    """What `opt` or `group` said of a field."""

    help: str = ""
    key: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: type[Any] | None = None
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """One option as users see it: `names` are its keys, the first is the one to document."""

    names: tuple[str, ...]
    kind: str
    default: Any
    help: str
    choices: tuple[str, ...]

    @property
    def key(self) -> str:
        """The documented key."""
        return self.names[0]


def opt(
    default: T, help: str, *, key: str = "", aliases: Iterable[str] = (), choices: Iterable[str] = ()
) -> T:  # the result is a dataclass field; typed as its value so that annotations check
    """Declare an option whose documentation is the sentence `help`.

    `key` defaults to the field's name in camelCase; `aliases` are further names. A value outside `choices` is an
    error. A list or dict as `default` is copied for each instance.
    """
    spec = _Spec(help=help, key=key, aliases=tuple(aliases), choices=tuple(choices))
    made: Any
    if isinstance(default, (list, dict)):
        made = field(default_factory=default.copy, metadata={"spec": spec})
    else:
        made = field(default=cast(Any, default), metadata={"spec": spec})
    return cast(T, made)


def group(options: type[T], *, prefix: str = "", **defaults: Any) -> T:
    """Embed the options of another class; `prefix` goes before its keys, `defaults` replace defaults by field name."""
    unknown = defaults.keys() - {item.name for item in fields(cast(Any, options))}
    if unknown:
        raise TypeError(f"{options.__name__} has no field {min(unknown)!r}")
    spec = _Spec(group=options, prefix=prefix)
    made: T = field(default_factory=lambda: options(**defaults), metadata={"spec": spec})
    return made


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word[:1].upper() + word[1:] for word in rest)


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    spec: _Spec
    kind: str
    optional: bool

    def names(self, prefix: str) -> tuple[str, ...]:
        return tuple(prefix + name for name in (self.spec.key or _camel(self.name), *self.spec.aliases))


def _kind_of(owner: type[Any], name: str, hint: Any) -> tuple[str, bool]:
    optional = False
    if get_origin(hint) in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not NoneType]
        if len(members) != 1:
            raise TypeError(f"{owner.__qualname__}.{name}: a union may only be TYPE | None")
        optional, hint = True, members[0]
    if get_origin(hint) is Annotated:
        for note in get_args(hint)[1:]:
            if isinstance(note, str) and note in _KINDS:
                return note, optional
        hint = get_args(hint)[0]
    if hint not in _BY_TYPE:
        raise TypeError(f"{owner.__qualname__}.{name}: {hint!r} is not a type of options")
    return _BY_TYPE[hint], optional


@cache
def _fields(options: Any) -> tuple[_Field, ...]:
    specs: dict[str, _Spec] = {}
    for item in fields(options):
        spec = item.metadata.get("spec")
        if spec is None:
            raise TypeError(f"{options.__qualname__}.{item.name} is declared without opt() or group()")
        specs[item.name] = spec
    # Groups need no look-up of their annotation, so a class may embed one that is not visible in its module.
    visible = {spec.group.__name__: spec.group for spec in specs.values() if spec.group is not None}
    hints = get_type_hints(options, localns=visible, include_extras=True)
    result = []
    for name, spec in specs.items():
        kind, optional = ("any", False) if spec.group is not None else _kind_of(options, name, hints[name])
        result.append(_Field(name, spec, kind, optional))
    return tuple(result)


def _default(options: type[Any], name: str) -> Any:
    for item in fields(options):
        if item.name == name:
            return item.default_factory() if item.default_factory is not MISSING else item.default
    raise KeyError(name)


def options_of(options: type[Any]) -> list[Option]:
    """List the options of a class in order of declaration, those of its groups in place."""
    return list(_walk(options, "", None))


def _walk(options: type[Any], prefix: str, instance: Any) -> Iterator[Option]:
    for item in _fields(cast(Hashable, options)):
        default = _default(options, item.name) if instance is None else getattr(instance, item.name)
        if item.spec.group is not None:
            yield from _walk(item.spec.group, prefix + item.spec.prefix, default)
        else:
            yield Option(item.names(prefix), item.kind, default, item.spec.help, item.spec.choices)


def option_keys(options: type[Any]) -> list[str]:
    """Return every key of a class, aliases included."""
    return [name for option in options_of(options) for name in option.names]


def cli_keys(options: type[Any]) -> list[str]:
    """Return the keys that the query of a `-L` or `-F` URL can set: all but those that need a list or a map."""
    return [name for option in options_of(options) if _KINDS[option.kind].from_url for name in option.names]


# ---- binding ---------------------------------------------------------------------------------------
def bind_options(
    options: type[T],
    raw: Mapping[str, Any],
    path: str = "",
    used: set[str] | None = None,
    problems: list[Problem] | None = None,
) -> T:
    """Make an instance from a metadata map.

    Add to `used` the keys of `raw` that the class knows, in lower case, and to `problems` every value that cannot be
    used (its option keeps the default). Without `problems` the first one is raised as ConfigError. None is the same
    as no value.
    """
    found: list[Problem] = [] if problems is None else problems
    by_key = {key.lower(): value for key, value in raw.items()}
    made = _bind(options, "", None, by_key, path, set() if used is None else used, found)
    if problems is None:
        for problem in found:
            if problem.severity == "error":
                raise ConfigError(problem.path, problem.message, code=problem.code)
    return cast(T, made)


def _bind(
    options: type[Any],
    prefix: str,
    defaults: Any,
    raw: Mapping[str, Any],
    path: str,
    used: set[str],
    problems: list[Problem],
) -> Any:
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    for item in _fields(cast(Hashable, options)):
        default = _default(options, item.name) if defaults is None else getattr(defaults, item.name)
        if item.spec.group is not None:
            below = prefix + item.spec.prefix
            values[item.name] = _bind(item.spec.group, below, default, raw, path, used, problems)
            continue
        values[item.name] = default
        present = [name for name in item.names(prefix) if name.lower() in raw]
        used.update(name.lower() for name in present)
        if not present:
            continue
        # The documented spelling, since the one in the file is lost where GOST folds the case of keys.
        key = present[0]
        written[item.names(prefix)[0]] = key
        value = raw[key.lower()]
        if value is None:
            continue
        problem = ""
        try:
            values[item.name] = _parse(item, value)
        except Unusable as exc:
            problem = f"{_shown(item, value)} is not {exc}"
        except _NotAChoice as exc:
            problem = f"{_shown(item, value)} is not one of {exc}"
        if problem:
            problems.append(Problem(f"{path}.{key}" if path else key, problem))
    made = options(**values)
    if isinstance(made, Validated):
        for key, message in made.validate():
            key = written.get(prefix + key, prefix + key)
            severity: Severity = "warning" if isinstance(message, Advice) else "error"
            problems.append(Problem(f"{path}.{key}" if path else key, message, severity=severity))
    return made


class _NotAChoice(Exception):
    pass


def _parse(item: _Field, value: Any) -> Any:
    parsed = _KINDS[item.kind].parse(value)
    choices = item.spec.choices
    if choices:
        for word in parsed if isinstance(parsed, list) else [str(parsed)]:
            if word not in choices:
                listed = ", ".join(choice for choice in choices if choice)
                raise _NotAChoice(listed + did_you_mean(word, choices))
    return parsed


def _shown(item: _Field, value: Any) -> str:
    if item.kind == "secret":
        return "the value"
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."


# ---- derived ---------------------------------------------------------------------------------------
def json_schema(options: type[Any]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the metadata map that the class binds."""
    properties: dict[str, Any] = {}
    for option in options_of(options):
        kind = _KINDS[option.kind]
        schema: dict[str, Any] = {"description": option.help}
        if kind.json:
            schema["type"] = kind.json[0] if len(kind.json) == 1 else list(kind.json)
        if "array" in kind.json:
            schema["items"] = {"type": ["string", "number", "boolean"]}
        if "object" in kind.json:
            schema["additionalProperties"] = {"type": ["string", "number", "boolean"]}
        if option.choices:
            # A comma-separated string of choices is not itself a choice, so only the items are bound to them.
            target = schema["items"] if "array" in kind.json else schema
            target["enum"] = list(option.choices)
        shown = _as_written(option)
        if shown is not None and option.kind != "secret":
            schema["default"] = shown
        properties[option.key] = schema
        for alias in option.names[1:]:
            properties[alias] = schema | {"description": f"Same as {option.key}."}
    return {"type": "object", "properties": properties}


def _as_written(option: Option) -> Any:
    if option.kind == "duration" and isinstance(option.default, (int, float)):
        return format_nanoseconds(round(option.default * 1_000_000_000))
    return option.default


def markdown(options: type[Any]) -> str:
    """Return the reference table of the class's options, "" for a class without any."""
    rows = []
    for option in options_of(options):
        names = " / ".join(f"`{name}`" for name in option.names)
        shown = option.help
        if option.choices:
            shown += " One of " + ", ".join(f"`{choice}`" for choice in option.choices if choice) + "."
        default = _as_written(option)
        empty = default is None or default == "" or default == [] or default == {} or isinstance(default, Secret)
        if empty:
            written = "-"
        elif isinstance(default, bool):
            written = "true" if default else "false"
        elif isinstance(default, list):
            written = ",".join(default)
        else:
            written = str(default)
        cells = (names, _KINDS[option.kind].word, written, shown)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if not rows:
        return ""
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"
