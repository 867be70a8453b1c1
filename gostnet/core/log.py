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
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

TRACE, DEBUG, INFO, WARN, ERROR, FATAL = 0, 10, 20, 30, 40, 50
LEVELS = {"trace": TRACE, "debug": DEBUG, "info": INFO, "warn": WARN, "error": ERROR, "fatal": FATAL}
_NAMES = {number: name for name, number in LEVELS.items()}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode
_quote = json.encoder.encode_basestring


def _fast_encoder() -> Callable[[Mapping[str, Any]], str]:
    """Return what makes JSON of a record's fields: the encoder in C, kept, where `encode` makes a new one per call."""
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return _encode
    encoder = make(None, str, _quote, None, ":", ",", False, False, True)
    return lambda fields: "".join(encoder(fields, 0))


_encode_fields = _fast_encoder()
_MILLISECONDS = [f".{number:03d}" for number in range(1000)]


class Sink:
    """Where lines go: a file descriptor, written in gathered batches by one thread.

    A line that comes alone is written at once. While lines keep coming the thread gathers for LINGER in between, since
    being woken for each of them would cost more than the line itself. Who reads too slowly loses lines beyond MOST, and
    is told how many.
    """

    LINGER = 0.01
    """Seconds."""
    MOST = 65536
    """Lines that wait."""

    def __init__(self, fd: int, *, close: bool = False, turn: AbstractContextManager[object] | None = None) -> None:
        """`turn` is held while a batch is written: who else writes there waits, so that no lines mix."""
        self._fd = fd
        self._turn = turn or nullcontext()
        self._close = close
        self._lines: deque[bytes] = deque()
        self._dropped = 0
        self._asleep = False
        self._closing = False
        self._bell = threading.Lock()
        self._bell.acquire()
        self._thread: threading.Thread | None = None

    def write(self, line: bytes) -> None:
        """Queue one line, newline included."""
        if len(self._lines) >= self.MOST:
            self._dropped += 1
            return
        self._lines.append(line)
        if self._asleep:
            self._wake()
        elif self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what is queued and end the thread."""
        if self._thread is not None:
            self._closing = True
            self._wake()
            self._thread.join(2.0)
            self._thread = None
            self._closing = False
        if self._close:
            os.close(self._fd)
            self._close = False

    def _wake(self) -> None:
        self._asleep = False
        try:
            self._bell.release()
        except RuntimeError:
            pass  # it rings already

    def _run(self) -> None:
        lines, bell = self._lines, self._bell
        while True:
            if not lines:
                if self._closing:
                    return
                self._asleep = True
                if not (lines or self._closing):  # what came before this moment found nobody asleep
                    bell.acquire()
                self._asleep = False
                continue
            batch = [lines.popleft() for _ in range(len(lines))]
            if self._dropped:
                batch.append(_told_of_loss(self._dropped))
                self._dropped = 0
            self._write(b"".join(batch))
            if not self._closing:
                bell.acquire(timeout=self.LINGER)

    def _write(self, data: bytes) -> None:
        try:
            with self._turn:
                while data:
                    data = data[os.write(self._fd, data) :]
        except OSError:
            pass  # a closed terminal must not end the daemon


def _told_of_loss(count: int) -> bytes:
    message = f"{count} lines of the log are lost: nobody has read it fast enough"
    return f'{{"time":"{_now()}","level":"warn","msg":"{message}"}}\n'.encode()


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
        self._prefix = f",{_encode_fields(self.fields)[1:-1]}" if self.fields else ""

    def bind(self, **fields: Any) -> Logger:
        """Return a logger that adds `fields` to each record."""
        return Logger(self.sink, self.level, text=self._text, fields={**self.fields, **fields})

    def trace(self, message: str, **fields: Any) -> None:
        """Log at level trace."""
        if self.level <= TRACE:
            self.emit("trace", message, fields)

    def debug(self, message: str, **fields: Any) -> None:
        """Log at level debug."""
        if self.level <= DEBUG:
            self.emit("debug", message, fields)

    def info(self, message: str, **fields: Any) -> None:
        """Log at level info."""
        if self.level <= INFO:
            self.emit("info", message, fields)

    def warn(self, message: str, **fields: Any) -> None:
        """Log at level warn."""
        if self.level <= WARN:
            self.emit("warn", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        """Log at level error."""
        if self.level <= ERROR:
            self.emit("error", message, fields)

    def fatal(self, message: str, **fields: Any) -> None:
        """Log at level fatal; ending the process is the caller's business."""
        self.emit("fatal", message, fields)

    def emit(self, level: str, message: str, fields: dict[str, Any]) -> None:
        """Log at a level by name, which the caller has compared with ours."""
        stamp = _now()
        if self._text:
            pairs = "".join(f" {key}={_word(value)}" for key, value in {**self.fields, **fields}.items())
            line = f"time={stamp} level={level} msg={_word(message)}{pairs}\n"
        else:
            more = f",{_encode_fields(fields)[1:]}" if fields else "}"
            line = f'{{"time":"{stamp}","level":"{level}","msg":{_quote(message)}{self._prefix}{more}\n'
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
    return _stamp[1] + _MILLISECONDS[int((now - second) * 1000)] + _stamp[2]


def quiet() -> Logger:
    """Return a logger that drops everything: the default of tests and of parts used on their own."""
    return Logger(NullSink(), FATAL + 1)
