"""From an invocation to a configuration: files, standard input, URLs, inline JSON, -L and -F, environment, flags.

Sources are merged left to right: lists are joined, other sections are replaced as a whole. The command line comes last;
`-api`, `-metrics`, `-D` beat the environment, which beats files.
"""

from __future__ import annotations

import base64
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, cast
from urllib.parse import SplitResult, unquote, urlsplit

from .argv import Invocation
from .command_line import CommandLine, service_address
from .decode import Decoder, is_empty
from .finding import Finding, locate
from .parse import MAX_SIZE, Format, ParseError, parse
from .schema import Config, schema_fields
from .tree import Entry, List, Map, Place, Scalar, Source, Tree
from .url import UrlError

FETCH_TIMEOUT: Final = 30.0
"""Seconds for one configuration from a URL, as in GOST."""
_FORMATS: Final[Mapping[str, Format]] = {"json": "json", "toml": "toml", "yaml": "yaml", "yml": "yaml"}
_MEDIA_TYPES: Final[Mapping[str, Format]] = {
    "application/json": "json",
    "application/yaml": "yaml",
    "application/x-yaml": "yaml",
    "text/yaml": "yaml",
    "text/x-yaml": "yaml",
}
_ENVIRONMENT: Final = (
    ("GOST_LOGGER_LEVEL", "log", "level"),
    ("GOST_API", "api", "addr"),
    ("GOST_METRICS", "metrics", "addr"),
    ("GOST_PROFILING", "profiling", "addr"),
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and what is wrong with it; with a fatal finding it is not complete, not even for printing."""

    config: Config
    findings: list[Finding]

    @property
    def broken(self) -> bool:
        """True if something could not be read at all."""
        return any(finding.fatal for finding in self.findings)


class _SourceError(Exception):
    """A source cannot be read; the text says why."""


def load(invocation: Invocation) -> Loaded:
    """Load once, with the process's environment and standard input. Blocks while it reads files and URLs."""
    return Loader(invocation).load()


@dataclass(slots=True)
class Loader:
    """Loads the same sources again and again; standard input is read once and remembered."""

    invocation: Invocation
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    stdin: BinaryIO | None = None
    directory: Path = field(default_factory=Path)
    _remembered: bytes | None = None

    def load(self) -> Loaded:
        """Read, merge and decode everything. Never raises for what is wrong with the configuration."""
        findings: list[Finding] = []
        merged = Map([], Place(Source("command line", "url")))
        for text in self.invocation.configs:
            if text.strip():
                self._merge_source(merged, text.strip(), findings)
        worker = self.environment.get("_GOST_ID", "")
        command_line = CommandLine(f"go-{worker}@" if worker else "")
        merge(merged, command_line.build(self.invocation.services, self.invocation.nodes))
        findings += command_line.findings
        if self._needs_default(merged) and not any(finding.fatal for finding in findings):
            self._merge_default(merged, findings)
        self._apply_environment(merged)
        self._apply_flags(merged, findings)
        decoder = Decoder()
        config = decoder.config(merged)
        findings += locate(decoder.problems, config.positions, fatal=True)
        return Loaded(config, findings)

    # ---- sources ----
    def _merge_source(self, merged: Map, text: str, findings: list[Finding]) -> None:
        source = Source(_name(text))
        try:
            if text == "-":
                data = self._read_stdin()
                source = Source("standard input")
                self._merge_text(merged, data, "json" if data.lstrip()[:1] == b"{" else "yaml", source)
            elif text.startswith("{") and text.endswith("}"):
                number = 1 + sum(1 for known in self.invocation.configs[: self.invocation.configs.index(text)])
                source = Source(f"-C#{number}", "inline")
                merge(merged, parse(text, "json", source))
            elif text.startswith(("http://", "https://")):
                data, form = fetch(text)
                self._merge_text(merged, data, form, source)
            else:
                path = self.directory / text
                self._merge_text(merged, _read_file(path), _format(path), source)
        except ParseError as exc:
            findings.append(Finding(exc.place, "", exc.reason, exc.code, fatal=True))
        except _SourceError as exc:
            findings.append(Finding(Place(source), "", str(exc), "config.source", fatal=True))

    @staticmethod
    def _merge_text(merged: Map, data: bytes, form: Format, source: Source) -> None:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as exc:
            line = data.count(b"\n", 0, exc.start) + 1
            raise ParseError(Place(source, line, 1), "not valid UTF-8") from exc
        merge(merged, parse(text, form, source))

    def _read_stdin(self) -> bytes:
        if self._remembered is None:
            stream = self.stdin if self.stdin is not None else sys.stdin.buffer
            self._remembered = stream.read(MAX_SIZE + 1)
        return self._remembered

    def _needs_default(self, merged: Map) -> bool:
        """True if nothing says what to run; GOST also demands a file when only metrics or GOST_API are given."""
        invocation = self.invocation
        if invocation.configs or invocation.api or invocation.metrics:
            return False
        if self.environment.get("GOST_API") or self.environment.get("GOST_METRICS"):
            return False
        return merged.find("services") is None

    def _merge_default(self, merged: Map, findings: list[Finding]) -> None:
        home = self.environment.get("HOME", "")
        folders = [Path("/etc/gost"), *([Path(home) / ".gost"] if home else []), self.directory.absolute()]
        for folder in folders:
            for extension in _FORMATS:
                path = folder / f"gost.{extension}"
                if path.is_file():
                    self._merge_source(merged, str(path), findings)
                    return
        listed = ", ".join(str(folder) for folder in folders)
        message = f"nothing to run: no -L, no -C, and no gost.yaml, gost.yml, gost.json or gost.toml in {listed}"
        findings.append(Finding(Place(Source("gostnet")), "", message, "config.none", fatal=True))

    # ---- environment and flags ----
    def _apply_environment(self, merged: Map) -> None:
        for variable, section, key in _ENVIRONMENT:
            value = self.environment.get(variable, "")
            if value:
                _set(merged, section, key, Scalar(value, Place(Source(variable, "environment"))))

    def _apply_flags(self, merged: Map, findings: list[Finding]) -> None:
        invocation = self.invocation
        if invocation.debug or invocation.trace:
            flag, level = ("-DD", "trace") if invocation.trace else ("-D", "debug")
            _set(merged, "log", "level", Scalar(level, Place(Source(flag, "environment"))))
        if invocation.processes:
            place = Place(Source("--workers", "environment"))
            merge(merged, Map([Entry("workers", place, Scalar(invocation.processes, place))], place))
        for flag, section, text, keys in (
            ("-api", "api", invocation.api, ("pathPrefix", "accesslog")),
            ("-metrics", "metrics", invocation.metrics, ("path",)),
        ):
            if not text:
                continue
            source = Source(flag, "url")
            try:
                tree = service_address(text, source, keys)
            except UrlError as exc:
                findings.append(Finding(Place(source, 0, exc.column), exc.part, exc.reason, exc.code, fatal=True))
                continue
            merge(merged, Map([Entry(section, Place(source), tree)], Place(source)))


def merge(into: Map, other: Map) -> None:
    """Add another source: lists of objects are joined, other sections replaced unless the new one is empty."""
    lists = {each.key.lower() for each in schema_fields(Config) if each.shape == "sections"}
    for entry in other.entries:
        known = into.find(entry.key)
        if known is None:
            into.entries.append(Entry(entry.key, entry.place, entry.value))
        elif is_empty(entry.value):
            continue
        elif entry.key.lower() in lists:
            known.value = List([*_items(known.value), *_items(entry.value)], known.value.place)
        else:
            known.value, known.place = entry.value, entry.place


def _items(tree: Tree) -> list[Tree]:
    if isinstance(tree, List):
        return tree.items
    return [] if is_empty(tree) else [tree]


def _set(merged: Map, section: str, key: str, value: Scalar) -> None:
    """Put one key into a section, which is made if it is not there."""
    entry = merged.find(section)
    if entry is None or not isinstance(entry.value, Map):
        merged.entries = [each for each in merged.entries if each is not entry]
        entry = Entry(section, value.place, Map([], value.place))
        merged.entries.append(entry)
    assert isinstance(entry.value, Map)
    kept = [each for each in entry.value.entries if each.key.lower() != key.lower()]
    entry.value = Map([*kept, Entry(key, value.place, value)], entry.value.place)


def _format(path: Path) -> Format:
    extension = path.suffix.lower().removeprefix(".")
    if extension not in _FORMATS:
        raise _SourceError(f"files of type {extension!r} are not read; use .yaml, .yml, .json or .toml")
    return _FORMATS[extension]


def _read_file(path: Path) -> bytes:
    _format(path)
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_SIZE + 1)
    except OSError as exc:
        raise _SourceError(f"cannot be read: {(exc.strerror or str(exc)).lower()}") from exc


# ---- URLs ------------------------------------------------------------------------------------------------------------
def _name(text: str) -> str:
    """Return the name of a source without the credentials that a URL may hold."""
    if not text.startswith(("http://", "https://")):
        return text
    try:
        return _without_userinfo(urlsplit(text)).geturl()
    except ValueError:
        return text.partition("://")[0] + "://..."


def _without_userinfo(url: SplitResult) -> SplitResult:
    return url._replace(netloc=url.netloc.rpartition("@")[2])


def fetch(text: str) -> tuple[bytes, Format]:
    """GET a configuration; credentials in the URL are sent as Basic authentication. Raise _SourceError."""
    try:
        url = urlsplit(text)
        request = urllib.request.Request(_without_userinfo(url).geturl())
        if "@" in url.netloc:
            user, _, password = url.netloc.rpartition("@")[0].partition(":")
            token = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=FETCH_TIMEOUT) as response:
            if response.status != 200:
                raise _SourceError(f"the server answered {response.status}")
            data = cast(bytes, response.read(MAX_SIZE + 1))
            headers = cast(Message, response.headers)
    except urllib.error.HTTPError as exc:
        exc.close()
        raise _SourceError(f"the server answered {exc.code}") from exc
    except (urllib.error.URLError, OSError, ValueError) as exc:
        reason = getattr(exc, "reason", exc)
        shown = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise _SourceError(f"cannot be fetched: {shown.lower()}") from exc
    if len(data) > MAX_SIZE:
        raise _SourceError(f"is larger than {MAX_SIZE >> 20} MiB")
    media = headers.get_content_type() if headers.get("Content-Type") else ""
    extension = PurePosixPath(url.path).suffix.lower().removeprefix(".")
    return data, _MEDIA_TYPES.get(media) or _FORMATS.get(extension) or "yaml"
