"""Matchers: does a flow satisfy a rule? Rules are compiled once, to closures over what is asked. Rows J01-J43, F01-F13.

The language is in config/matcher.py. A condition about something that is not known of the flow (a path where no HTTP
was seen) does not hold.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qs

from ..config.matcher import AllOf, AnyOf, Call, Not, Rule, RuleError, parse_rule
from ..config.regex import compile_regex
from ..core.address import Endpoint
from ..core.contracts import Admission, Bypass
from ..core.errors import ConfigError
from ..core.flow import Flow, Sniffed
from .networks import number, parse_network

DEFAULT_BODY: Final = 1 << 20
MAX_BODY: Final = 10 << 20
"""Bytes of a body that a matcher looks at: GOST's default, and its limit for `bodySize`."""

_NOTHING: Final = Sniffed()


class Request:
    """What conditions ask about: a flow, and the host that it wants as far as that is known by name or address."""

    __slots__ = ("_fields", "_query", "body_size", "flow", "host", "sniffed")

    def __init__(self, flow: Flow, host: str, body_size: int = DEFAULT_BODY) -> None:
        self.flow = flow
        self.sniffed = flow.sniffed or _NOTHING
        self.host = bare_host(self.sniffed.host or host)
        self.body_size = body_size
        self._fields: Mapping[str, Sequence[str]] | None = None
        self._query: Mapping[str, Sequence[str]] | None = None

    @property
    def fields(self) -> Mapping[str, Sequence[str]]:
        """The values of each header field, by name in lower case."""
        if self._fields is None:
            fields: dict[str, list[str]] = {}
            for name, value in self.sniffed.headers:
                fields.setdefault(name.lower(), []).append(value.strip())
            self._fields = fields
        return self._fields

    @property
    def query(self) -> Mapping[str, Sequence[str]]:
        """The values of each parameter of the query."""
        if self._query is None:
            self._query = parse_qs(self.sniffed.query, keep_blank_values=True)
        return self._query

    @property
    def body(self) -> bytes:
        """The beginning of the body."""
        return self.sniffed.body[: self.body_size]


Condition: TypeAlias = Callable[[Request], bool]


def bare_host(text: str) -> str:
    """Return a host without its port and brackets, in lower case."""
    host = text.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


class RuleMatcher:
    """A compiled rule."""

    __slots__ = ("_body_size", "_condition", "text")

    def __init__(
        self,
        rule: str,
        *,
        bypasses: Mapping[str, Bypass] | None = None,
        admissions: Mapping[str, Admission] | None = None,
        body_size: int = 0,
    ) -> None:
        """Compile `rule`; `body_size` bounds how much of a body is looked at. Raise RuleError.

        A bypass that is in no table contains nothing, an admission in no table admits nobody: what GOST makes of
        dangling names, which only `--lenient` lets through (J38).
        """
        self.text = rule
        self._body_size = min(body_size if body_size > 0 else DEFAULT_BODY, MAX_BODY)
        self._condition = _compile(parse_rule(rule), bypasses or {}, admissions or {})

    def matches(self, flow: Flow, host: str) -> bool:
        """Tell whether a flow that wants `host` ("" where that is not known) satisfies the rule."""
        return self._condition(Request(flow, host, self._body_size))


class FilterMatcher:
    """A node's `filter`: host, sniffed protocol and path, all of which must hold. Rows F01-F13."""

    __slots__ = ("_host", "_path", "_protocol", "_suffix")

    def __init__(self, host: str = "", protocol: str = "", path: str = "") -> None:
        self._protocol = protocol
        self._path = path
        host = host.lower()
        # `.example.com` is that name and what is below it; `*text` any name that ends so.
        self._suffix = host[2:] if host.startswith("*.") else host[1:] if host.startswith(".") else ""
        self._host = "" if self._suffix else host

    def matches(self, flow: Flow, host: str) -> bool:
        """Tell whether a flow that wants `host` ("" where that is not known) passes."""
        sniffed = flow.sniffed or _NOTHING
        if self._protocol and sniffed.protocol != self._protocol:
            return False
        if self._path and not sniffed.path.startswith(self._path):
            return False
        if not (self._host or self._suffix) or self._host == "*":
            return True
        asked = bare_host(sniffed.host or host)
        if self._suffix:
            return asked == self._suffix or asked.endswith("." + self._suffix)
        if self._host.startswith("*"):
            return bool(asked) and asked.endswith(self._host[1:])
        return asked == self._host


def compile_matcher(
    rule: str,
    path: str,
    *,
    bypasses: Mapping[str, Bypass] | None = None,
    admissions: Mapping[str, Admission] | None = None,
    body_size: int = 0,
) -> RuleMatcher:
    """Return the matcher of a rule in the configuration. Raise ConfigError that names `path`."""
    try:
        return RuleMatcher(rule, bypasses=bypasses, admissions=admissions, body_size=body_size)
    except RuleError as exc:
        raise ConfigError(path, str(exc), code="matcher.rule") from exc


# ---- compilation -----------------------------------------------------------------------------------------------------
def _compile(rule: Rule, bypasses: Mapping[str, Bypass], admissions: Mapping[str, Admission]) -> Condition:
    match rule:
        case Not():
            item = _compile(rule.item, bypasses, admissions)
            return lambda request: not item(request)
        case AllOf():
            all_of = [_compile(each, bypasses, admissions) for each in rule.items]
            return lambda request: all(condition(request) for condition in all_of)
        case AnyOf():
            any_of = [_compile(each, bypasses, admissions) for each in rule.items]
            return lambda request: any(condition(request) for condition in any_of)
        case Call(name="Bypass"):
            return _bypass(bypasses.get(rule.arguments[0]))
        case Call(name="Admission"):
            return _admission(admissions.get(rule.arguments[0]))
        case Call():
            return _CONDITIONS[rule.name](rule.arguments)


def _bypass(bypass: Bypass | None) -> Condition:
    if bypass is None:
        return lambda request: True

    def condition(request: Request) -> bool:
        target = request.flow.target
        return not bypass.contains(request.flow.network, Endpoint(request.host, target.port if target else 0))

    return condition


def _admission(admission: Admission | None) -> Condition:
    if admission is None:
        return lambda request: False
    return lambda request: bool(request.flow.client.host) and admission.admits(request.flow.client)


def _host(arguments: Sequence[str]) -> Condition:
    wanted = arguments[0].strip().lower()
    if wanted.startswith("*"):
        end = wanted[1:]
        # Row J04: a bare * is no name at all.
        return lambda request: bool(end) and request.host.endswith(end)
    if wanted.startswith("."):
        return lambda request: request.host.endswith(wanted)
    return lambda request: request.host == wanted


def _host_regex(arguments: Sequence[str]) -> Condition:
    search = compile_regex(arguments[0]).search
    return lambda request: search(request.host) is not None


def _method(arguments: Sequence[str]) -> Condition:
    wanted = arguments[0].upper()
    return lambda request: request.sniffed.method == wanted


def _path(arguments: Sequence[str]) -> Condition:
    wanted = arguments[0]
    return lambda request: request.sniffed.path == wanted


def _path_prefix(arguments: Sequence[str]) -> Condition:
    wanted = arguments[0]
    return lambda request: request.sniffed.path.startswith(wanted)


def _path_regex(arguments: Sequence[str]) -> Condition:
    search = compile_regex(arguments[0]).search
    return lambda request: search(request.sniffed.path) is not None


_Get: TypeAlias = Callable[[Request], Sequence[str]]


def _field(arguments: Sequence[str]) -> Condition:
    name = arguments[0].lower()
    return _values(lambda request: request.fields.get(name, ()), arguments)


def _query(arguments: Sequence[str]) -> Condition:
    name = arguments[0]
    return _values(lambda request: request.query.get(name, ()), arguments)


def _field_regex(arguments: Sequence[str]) -> Condition:
    name = arguments[0].lower()
    return _searched(lambda request: request.fields.get(name, ()), arguments)


def _query_regex(arguments: Sequence[str]) -> Condition:
    name = arguments[0]
    return _searched(lambda request: request.query.get(name, ()), arguments)


def _values(get: _Get, arguments: Sequence[str]) -> Condition:
    """Presence, equality, or a numeric comparison, by the number of arguments; any value may satisfy it."""
    if len(arguments) == 1:
        return lambda request: bool(get(request))
    if len(arguments) == 2:
        wanted = arguments[1]
        return lambda request: wanted in get(request)
    compare = _comparison(arguments[1], arguments[2])
    return lambda request: any(compare(value) for value in get(request))


def _searched(get: _Get, arguments: Sequence[str]) -> Condition:
    if len(arguments) == 1:
        return lambda request: bool(get(request))
    search = compile_regex(arguments[1]).search
    return lambda request: any(search(value) is not None for value in get(request))


_OPERATORS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
}


def _comparison(name: str, text: str) -> Callable[[str], bool]:
    compare, wanted = _OPERATORS[name], float(text)

    def holds(value: str) -> bool:
        try:
            return compare(float(value), wanted)
        except ValueError:
            return False

    return holds


def _body_regex(arguments: Sequence[str]) -> Condition:
    search = compile_regex(arguments[0]).search
    return lambda request: bool(request.body) and search(request.body.decode("utf-8", "replace")) is not None


def _body_json(arguments: Sequence[str]) -> Condition:
    steps = [step.replace("\0", ".") for step in re.sub(r"\\(.)", lambda m: _escaped(m[1]), arguments[0]).split(".")]
    holds: Callable[[str], bool]
    if len(arguments) == 3:
        holds = _comparison(arguments[1], arguments[2])
    else:
        search = compile_regex(arguments[1]).search

        def holds(value: str) -> bool:
            return search(value) is not None

    def condition(request: Request) -> bool:
        body = request.body
        if not body:
            return False
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return False
        return holds(_json_text(_at(value, steps)))

    return condition


def _escaped(char: str) -> str:
    """Return a placeholder for an escaped dot, so that it does not separate."""
    return "\0" if char == "." else char


_MISSING: Final = object()


def _at(value: Any, steps: Sequence[str]) -> Any:
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step, _MISSING)
        elif isinstance(value, list) and step == "#":
            value = len(value)
        elif (
            isinstance(value, list) and step.isascii() and step.isdigit() and len(step) < 10 and int(step) < len(value)
        ):
            value = value[int(step)]
        else:
            return _MISSING
    return value


def _json_text(value: Any) -> str:
    """Return a value as text: a missing one as "" (J32), a string without its quotes."""
    if value is _MISSING or value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _client_ip(arguments: Sequence[str]) -> Condition:
    text = arguments[0]
    found = parse_network(text)
    if found is None:
        single = number(text)
        assert single is not None, "the parser has checked it"
        found = (single, single)
    first, last = found

    def condition(request: Request) -> bool:
        client = number(request.flow.client.host)
        return client is not None and first <= client <= last

    return condition


def _network(arguments: Sequence[str]) -> Condition:
    wanted = arguments[0].lower()
    return lambda request: request.flow.network.startswith(wanted)


def _proto(arguments: Sequence[str]) -> Condition:
    wanted = arguments[0].lower()
    return lambda request: request.sniffed.protocol == wanted


_CONDITIONS: Final[Mapping[str, Callable[[Sequence[str]], Condition]]] = {
    "Host": _host,
    "HostRegexp": _host_regex,
    "Method": _method,
    "Path": _path,
    "PathPrefix": _path_prefix,
    "PathRegexp": _path_regex,
    "Header": _field,
    "HeaderRegexp": _field_regex,
    "Query": _query,
    "QueryRegexp": _query_regex,
    "BodyRegexp": _body_regex,
    "BodyJSON": _body_json,
    "ClientIP": _client_ip,
    "Network": _network,
    "Proto": _proto,
}
