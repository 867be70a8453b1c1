"""The arguments of the program, in the style of Go's flag package: `-x v`, `-x=v`, `--x v` are equal.

The first argument may be a verb; GOST has none, so everything that begins with `-` means `run`. A ` -- ` between other
arguments cuts the command line into workers.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..core.options import Unusable, to_bool
from ..core.suggest import did_you_mean
from ..core.units import parse_seconds
from .workers import parse_workers

VERBS: Final = ("run", "check", "plan", "rollback", "doctor", "lab")
"""Verbs that are built."""
LATER_VERBS: Final = frozenset(
    ("explain", "exec", "top", "capture", "schema", "convert", "selftest", "lock", "unlock", "apply")
)
"""Verbs whose names are taken."""

_LISTS: Final = {"L": "services", "F": "nodes", "C": "configs"}
_TEXTS: Final = {"O": "output", "api": "api", "metrics": "metrics"}
_SWITCHES: Final = {"D": "debug", "DD": "trace", "V": "version"}
_OWN_TEXTS: Final = {"instance": "instance", "workers": "processes"}
_OWN_SWITCHES: Final = {"json": "json", "strict": "strict", "lenient": "lenient"}

HELP: Final = """\
usage: gostnet [VERB] [flags] [-- flags of another command line ...]

verbs:
  run        start the services (without a verb, too)
  check      read and check the configuration; open nothing, change nothing
  plan       show what run would change in the kernel
  rollback   undo what instances that are gone left in the kernel
  doctor     try what this host can do, and what the configuration needs of it
  lab        build a network of namespaces to try things in

flags as in GOST:
  -L URL         a service, may be repeated
  -F URL         a node of the chain, may be repeated
  -C SOURCE      a configuration: file, - (standard input), http(s) URL or {JSON}; may be repeated
  -O yaml|json   print the configuration and exit
  -D, -DD        log at level debug, trace
  -api ADDRESS   serve the web API
  -metrics ADDRESS
                 serve metrics
  -R PERIOD      reload the configuration periodically, such as 30s
  -V             print the version

flags of gostnet:
  --instance NAME   name of this instance and of what it makes in the kernel (default: default)
  --workers N|auto  serve with N processes, or one for each processor (default: 1)
  --json            print findings and plans as JSON
  --strict          unknown keys are errors
  --lenient         names that nothing bears are warnings, and mean what they mean in GOST
"""


class UsageError(Exception):
    """The arguments are wrong: print `str()` of it and exit with status 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """What the arguments say. With `workers` only they count: one list of arguments (verb included) for each.

    processes   of `--workers`, which is not GOST's ` -- `: how many serve the one configuration, "" if it is not said
    """

    verb: str = "run"
    services: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    output: str = ""
    api: str = ""
    metrics: str = ""
    debug: bool = False
    trace: bool = False
    version: bool = False
    help: bool = False
    reload: float = 0.0
    instance: str = "default"
    json: bool = False
    strict: bool = False
    lenient: bool = False
    processes: str = ""
    words: tuple[str, ...] = ()
    workers: tuple[tuple[str, ...], ...] = ()


def parse_args(argv: Sequence[str]) -> Invocation:
    """Parse the arguments after the program's name. Raise UsageError."""
    verb, rest = _verb(list(argv))
    if verb == "lab":
        return Invocation(verb=verb, words=tuple(rest))  # it has flags of its own and none of GOST's
    parts = _workers(rest)
    if len(parts) > 1:
        prefix = () if verb == "run" else (verb,)
        for part in parts:
            _parse(verb, part)
        return Invocation(verb=verb, workers=tuple((*prefix, *part) for part in parts))
    return _parse(verb, rest)


def _verb(argv: list[str]) -> tuple[str, list[str]]:
    if not argv or argv[0].startswith("-"):
        return "run", argv
    word = argv[0]
    if word in VERBS:
        return word, argv[1:]
    if word in LATER_VERBS:
        raise UsageError(f"{word!r} is not available in this version")
    raise UsageError(f"{word!r} is not a verb or a flag{did_you_mean(word, VERBS)}")


def _workers(argv: list[str]) -> list[list[str]]:
    """Cut at every `--` that stands between other arguments."""
    if "--" not in argv[1:-1]:
        return [argv]
    parts: list[list[str]] = [[]]
    for word in argv:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def _parse(verb: str, argv: list[str]) -> Invocation:
    lists: dict[str, list[str]] = {name: [] for name in _LISTS.values()}
    values: dict[str, str | bool | float] = {}
    words: list[str] = []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if word == "--":
            words += queue
            break
        if not word.startswith("-") or word == "-":
            words = [word, *queue]
            break
        flag, equals, text = word.lstrip("-").partition("=")
        if not flag or word.startswith("---"):
            raise UsageError(f"bad flag syntax: {word}")
        own = word.startswith("--")
        if flag in ("h", "help"):
            values["help"] = True
        elif flag in _SWITCHES or (own and flag in _OWN_SWITCHES):
            name = _SWITCHES.get(flag) or _OWN_SWITCHES[flag]
            values[name] = _switch(flag, text) if equals else True
        elif flag in _LISTS or flag in _TEXTS or flag == "R" or (own and flag in _OWN_TEXTS):
            if not equals:
                if not queue:
                    raise UsageError(f"flag needs an argument: -{flag}")
                text = queue.pop(0)
            if flag in _LISTS:
                lists[_LISTS[flag]].append(text)
            elif flag == "R":
                values["reload"] = _period(text)
            else:
                values[_TEXTS.get(flag) or _OWN_TEXTS[flag]] = text
        else:
            raise UsageError(f"flag provided but not defined: {word.partition('=')[0]}{_suggest(flag)}")
    if words:
        # GOST passes over the rest of the line, a forgotten -F included, and sends traffic another way than meant.
        raise UsageError(f"{words[0]!r} is not a flag; everything after it would be ignored")
    return _invocation(verb, lists, values)


def _invocation(verb: str, lists: dict[str, list[str]], values: dict[str, str | bool | float]) -> Invocation:
    def text(name: str, default: str = "") -> str:
        return str(values.get(name, default))

    def switch(name: str) -> bool:
        return bool(values.get(name, False))

    instance = text("instance", "default")
    if not instance.isascii() or not instance.replace("-", "").replace("_", "").isalnum() or len(instance) > 32:
        raise UsageError(f"--instance: {instance[:64]!r} is not a name of letters, digits, - and _ (at most 32)")
    return Invocation(
        verb=verb,
        services=tuple(lists["services"]),
        nodes=tuple(lists["nodes"]),
        configs=tuple(lists["configs"]),
        output=text("output"),
        api=text("api"),
        metrics=text("metrics"),
        debug=switch("debug"),
        trace=switch("trace"),
        version=switch("version"),
        help=switch("help"),
        reload=float(values.get("reload", 0.0)),
        instance=instance,
        processes=_processes(text("processes")),
        json=switch("json"),
        strict=switch("strict"),
        lenient=switch("lenient"),
    )


def _switch(flag: str, text: str) -> bool:
    try:
        return to_bool(text)
    except Unusable as exc:
        raise UsageError(f"-{flag}: {text[:64]!r} is not {exc}") from exc


def _processes(text: str) -> str:
    try:
        parse_workers(text)
    except ValueError as exc:
        raise UsageError(f"--workers: {exc}") from exc
    return text


def _period(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as exc:
        raise UsageError(f"-R: {text[:64]!r} is not a duration such as 30s") from exc


def _suggest(flag: str) -> str:
    known = [f"-{name}" for name in (*_LISTS, *_TEXTS, *_SWITCHES, "R")]
    known += [f"--{name}" for name in (*_OWN_TEXTS, *_OWN_SWITCHES)]
    return did_you_mean(f"--{flag}", known)


_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm"}


def version_line(version: str) -> str:
    """Return the line of `-V`."""
    machine = platform.machine()
    return f"gostnet {version} (Python {platform.python_version()} linux/{_MACHINES.get(machine, machine)})"
