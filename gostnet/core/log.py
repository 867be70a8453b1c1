"""Structured log records with GOST's field names, as JSON or text, written without blocking the loop.

A record costs nothing below the level. What is emitted is formatted at once (values may change later), gathered, and
written by a thread of its own, so a slow terminal or pipe never stalls the data path.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any

TRACE, DEBUG, INFO, WARN, ERROR, FATAL = 0, 10, 20, 30, 40, 50
LEVELS = {"trace": TRACE, "debug": DEBUG, "info": INFO, "warn": WARN, "error": ERROR, "fatal": FATAL}
_NAMES = {number: name for name, number in LEVELS.items()}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


class Sink:
    """Where lines go: a file descriptor, written in gathered batches by one thread."""

    def __init__(self, fd: int, *, close: bool = False, turn: AbstractContextManager[object] | None = None) -> None:
        """`turn` is held while a batch is written: who else writes there waits, so that no lines mix."""
        self._fd = fd
        self._turn = turn or nullcontext()
        self._close = close
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def write(self, line: bytes) -> None:
        """Queue one line, newline included."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
        self._queue.put(line)

    def close(self) -> None:
        """Write what is queued and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(2.0)
            self._thread = None
        if self._close:
            os.close(self._fd)
            self._close = False

    def _run(self) -> None:
        queue = self._queue
        while True:
            batch = [queue.get()]
            while not queue.empty() and len(batch) < 256:
                batch.append(queue.get())
            data = b"".join(line for line in batch if line is not None)
            try:
                with self._turn:
                    while data:
                        data = data[os.write(self._fd, data) :]
            except OSError:
                pass  # a closed terminal must not end the daemon
            if None in batch:
                return


class NullSink(Sink):
    """`output: none`."""

    def __init__(self) -> None:
        super().__init__(-1)

    def write(self, line: bytes) -> None:
        """Drop the line."""


def open_sink(output: str, turn: AbstractContextManager[object] | None = None) -> Sink:
    """Open `stderr` (also ""), `stdout`, `none`/`null`, or a file that is appended to; `turn` is that of `Sink`.

    A file that cannot be opened falls back to stderr, as GOST's does.
    """
    if output in ("none", "null"):
        return NullSink()
    if output == "stdout":
        return Sink(sys.stdout.fileno(), turn=turn)
    if output not in ("", "stderr"):
        try:
            os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
            fd = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            return Sink(fd, close=True, turn=turn)
        except OSError:
            pass
    return Sink(sys.stderr.fileno(), turn=turn)


class Logger:
    """A level, a format, a sink and the fields that every record of it carries."""

    __slots__ = ("_prefix", "_text", "fields", "level", "sink")

    def __init__(
        self, sink: Sink, level: int = INFO, *, text: bool = False, fields: Mapping[str, Any] | None = None
    ) -> None:
        self.sink = sink
        self.level = level
        self.fields = dict(fields or {})
        self._text = text
        encoded = _encode(self.fields)
        self._prefix = encoded[1:-1]

    def bind(self, **fields: Any) -> Logger:
        """Return a logger that adds `fields` to each record."""
        return Logger(self.sink, self.level, text=self._text, fields={**self.fields, **fields})

    def trace(self, message: str, **fields: Any) -> None:
        """Log at level trace."""
        if self.level <= TRACE:
            self._emit("trace", message, fields)

    def debug(self, message: str, **fields: Any) -> None:
        """Log at level debug."""
        if self.level <= DEBUG:
            self._emit("debug", message, fields)

    def info(self, message: str, **fields: Any) -> None:
        """Log at level info."""
        if self.level <= INFO:
            self._emit("info", message, fields)

    def warn(self, message: str, **fields: Any) -> None:
        """Log at level warn."""
        if self.level <= WARN:
            self._emit("warn", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        """Log at level error."""
        if self.level <= ERROR:
            self._emit("error", message, fields)

    def fatal(self, message: str, **fields: Any) -> None:
        """Log at level fatal; ending the process is the caller's business."""
        self._emit("fatal", message, fields)

    def _emit(self, level: str, message: str, fields: dict[str, Any]) -> None:
        stamp = _now()
        if self._text:
            pairs = "".join(f" {key}={_word(value)}" for key, value in {**self.fields, **fields}.items())
            line = f"time={stamp} level={level} msg={_word(message)}{pairs}\n"
        else:
            line = f'{{"time":"{stamp}","level":"{level}","msg":{_encode(message)}'
            if self._prefix:
                line += "," + self._prefix
            if fields:
                line += "," + _encode(fields)[1:-1]
            line += "}\n"
        self.sink.write(line.encode("utf-8", "backslashreplace"))


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else _encode(value)
    return _encode(text) if not text or any(c in text for c in ' "=\n\t') else text


_stamp: tuple[int, str, str] = (0, "", "")


def _now() -> str:
    """RFC 3339 with milliseconds; the part up to the second is formatted once a second."""
    global _stamp
    now = time.time()
    second = int(now)
    if _stamp[0] != second:
        local = time.localtime(second)
        zone = time.strftime("%z", local)
        _stamp = (
            second,
            time.strftime("%Y-%m-%dT%H:%M:%S", local),
            "Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}",
        )
    return f"{_stamp[1]}.{int((now - second) * 1000):03d}{_stamp[2]}"


def quiet() -> Logger:
    """Return a logger that drops everything: the default of tests and of parts used on their own."""
    return Logger(NullSink(), FATAL + 1)
