"""Loaders: tables that come from files and URLs, and are read again from time to time.

What cannot be read keeps its last lines, what cannot be understood is left out, and both are told once.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from hashlib import blake2b
from typing import Final, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from ..core.errors import ConfigError, GostnetError
from ..core.options import Problem
from ..core.sockets import PLAIN, DialOptions
from .entries import Clean, Entry, lines, strip_comment
from .post import Dial, connection, dial_any
from .threads import Busy, Threads

T = TypeVar("T")

MAX_SIZE: Final = 64 << 20
"""Bytes of one source: a hundred times the largest list in use."""
HTTP_TIMEOUT: Final = 30.0
"""Seconds for one URL where the configuration says 0, which is for ever in GOST."""
FILE_TIMEOUT: Final = 30.0
"""Seconds for one file: a dead network file system must not hold up the start for ever."""
MIN_PERIOD: Final = 1.0
"""Seconds, as in GOST."""
RETRY: Final = 30.0
"""Seconds before the next attempt after a failed one."""
_GRACE: Final = 5.0
_SHOWN: Final = 3
"""Bad lines that are told one by one."""

Report = Callable[[str], None]
"""Takes one sentence for the log."""


class LoadError(GostnetError):
    """A source cannot be read."""

    code = "load"


class Source(Protocol):
    """Where lines come from."""

    name: str
    """For messages: `file /etc/list`."""
    timeout: float
    """Seconds after which nobody waits for `read` any more."""

    def read(self) -> bytes:
        """Return everything. Runs in a thread, takes a bounded time; raise LoadError."""


class FileSource:
    """A file, read whole each time."""

    __slots__ = ("_path", "name", "timeout")

    def __init__(self, path: str) -> None:
        self._path = path
        self.timeout = FILE_TIMEOUT
        self.name = f"file {path}"

    def read(self) -> bytes:
        """Return the file's bytes. Raise LoadError for what is no file, or too large."""
        try:
            # Without O_NONBLOCK a named pipe would hold the thread until somebody writes.
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            with open(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise LoadError("not a regular file")
                data = file.read(MAX_SIZE + 1)
        except OSError as exc:
            raise LoadError(exc.strerror or str(exc)) from exc
        if len(data) > MAX_SIZE:
            raise LoadError(f"larger than {MAX_SIZE >> 20} MiB")
        return data


class HTTPSource:
    """A URL, fetched with GET; anything but status 200 is a failure.

    options    mark, interface and namespace of its sockets
    """

    __slots__ = ("_opener", "_url", "name", "timeout")

    def __init__(self, url: str, timeout: float = 0.0, options: DialOptions = PLAIN, path: str = "") -> None:
        """Raise ConfigError that names `path` for a URL that is not one of HTTP."""
        try:
            parts = urlsplit(url)
            usable = parts.scheme.lower() in ("http", "https") and bool(parts.hostname)
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(path, f"{url!r} is not a URL such as https://example.com/list", code="config.url")
        self._url = url
        self.timeout = timeout if timeout > 0 else HTTP_TIMEOUT
        self.name = f"url {parts._replace(netloc=parts.netloc.rpartition('@')[2], query='', fragment='').geturl()}"
        dial = partial(dial_any, options)
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _PlainHandler(dial),
            _TLSHandler(dial),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)

    def read(self) -> bytes:
        """Return the body. Raise LoadError; the time-out bounds the whole transfer."""
        end = time.monotonic() + self.timeout
        try:
            with self._opener.open(self._url, timeout=self.timeout) as response:
                if response.status != 200:
                    raise LoadError(f"status {response.status}")
                pieces = []
                size = 0
                while piece := response.read1(1 << 16):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_SIZE:
                        raise LoadError(f"larger than {MAX_SIZE >> 20} MiB")
                    if time.monotonic() > end:
                        raise LoadError(f"not complete within {self.timeout:g}s")
                if response.length:
                    raise LoadError(f"{response.length} bytes are missing")
        except urllib.error.HTTPError as exc:
            with exc:
                raise LoadError(f"status {exc.code}") from exc
        except urllib.error.URLError as exc:
            raise LoadError(str(exc.reason)) from exc
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise LoadError(str(exc) or type(exc).__name__) from exc
        return b"".join(pieces)


class _PlainHandler(urllib.request.HTTPHandler):
    def __init__(self, dial: Dial) -> None:
        super().__init__()
        self._dial = dial

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(connection, http.client.HTTPConnection, self._dial), request)


class _TLSHandler(urllib.request.HTTPSHandler):
    def __init__(self, dial: Dial) -> None:
        super().__init__()
        self._dial = dial

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(connection, http.client.HTTPSConnection, self._dial), request)


class _Kept:
    """What is known of one source."""

    __slots__ = ("digest", "entries", "reading")

    def __init__(self) -> None:
        self.digest = b""
        self.entries: list[Entry] = []
        self.reading = False


class Reloader(Generic[T]):
    """Keeps the table of one policy in step with its sources.

    Await `load` before the policy is used, then start `run` as a task.

    compile    makes the table of all lines, in a thread; what it leaves out it says
    install    puts a table in place, on the loop
    settle     further work after each load, such as looking names up; returns what to complain about
    period     seconds between loads, 0 for one load; one that failed is tried again in any case
    required   without lines from a source the policy would let everything pass: the first load must not fail
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        compile: Callable[[Sequence[Entry]], tuple[T, list[Problem]]],
        install: Callable[[T], None],
        threads: Threads,
        *,
        period: float = 0.0,
        required: bool = False,
        clean: Clean = strip_comment,
        settle: Callable[[], Awaitable[Sequence[str]]] | None = None,
        report: Report | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self.period = max(MIN_PERIOD, period) if period > 0 else 0.0
        self._sources = [(source, _Kept()) for source in sources]
        self._required = required
        self._compile = compile
        self._install = install
        self._threads = threads
        self._clean = clean
        self._settle = settle
        self._report = report or (lambda _: None)
        self._sleep = sleep
        self._line_complaints: list[str] = []
        self._told: set[str] = set()
        self._stale = True
        self.complete = False
        """Whether the last load left nothing to complain about but single lines."""

    async def load(self) -> bool:
        """Read every source once and put the table in place; return `complete`.

        Raise LoadError the first time, where the sources are `required` and none could be read.
        """
        complaints: list[str] = []
        for source, kept in self._sources:
            try:
                self._stale |= await self._read(source, kept)
            except (LoadError, Busy) as exc:
                complaints.append(f"{source.name}: {exc}")
        if self._required:
            if len(complaints) == len(self._sources):
                raise LoadError(f"{self.name} would hold nobody back: {'; '.join(complaints)}")
            self._required = False
        if self._stale and self._sources:
            entries = [entry for _, kept in self._sources for entry in kept.entries]
            try:
                table, problems = await self._threads.run(self._compile, entries)
            except Busy as exc:
                complaints.append(str(exc))
            else:
                self._stale = False
                self._install(table)
                self._line_complaints = _summary(problems)
        if self._settle is not None:
            complaints += await self._settle()
        self.complete = not complaints
        self._tell([*complaints, *self._line_complaints])
        return self.complete

    async def run(self) -> None:
        """Load again and again until cancelled; return at once when there is nothing to wait for."""
        while True:
            pause = self.period
            if not self.complete:
                pause = min(pause or RETRY, RETRY)
            if not pause:
                return
            await self._sleep(pause)
            await self.load()

    async def _read(self, source: Source, kept: _Kept) -> bool:
        """Read one source; return whether it changed. Raise LoadError; what is known stays then."""
        if kept.reading:
            raise LoadError("still being read since the last time")
        kept.reading = True
        try:
            async with asyncio.timeout(source.timeout + _GRACE):
                digest, entries = await self._threads.run(self._fetch, source, kept)
        except TimeoutError as exc:
            raise LoadError(f"not complete within {source.timeout:g}s") from exc
        except Busy:
            kept.reading = False
            raise
        if entries is None:
            return False
        kept.digest, kept.entries = digest, entries
        return True

    def _fetch(self, source: Source, kept: _Kept) -> tuple[bytes, list[Entry] | None]:
        """Read in a thread; no entries if nothing changed."""
        try:
            data = source.read()
        finally:
            kept.reading = False
        digest = blake2b(data, digest_size=16).digest()
        return digest, None if digest == kept.digest else lines(data, source.name, self._clean)

    def _tell(self, complaints: list[str]) -> None:
        for complaint in complaints:
            if complaint not in self._told:
                self._report(f"{self.name}: {complaint}")
        self._told = set(complaints)


def _summary(problems: Sequence[Problem]) -> list[str]:
    """Return what to tell of lines: the first few, then their number. Those of the configuration are told elsewhere."""
    texts = [str(problem) for problem in problems if ": line " in problem.path]
    more = len(texts) - _SHOWN
    return texts[:_SHOWN] + ([f"{more} more lines are wrong"] if more > 0 else [])
