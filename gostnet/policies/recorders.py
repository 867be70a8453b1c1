"""Recorders: where records go, and what they look like. Rows W01-W05.

Writing is a thread's business: a connection only puts its record into a queue. A queue that is full drops what comes.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import gzip
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Protocol

from ..core.address import Endpoint
from ..core.errors import GostnetError
from ..core.flow import Details, Flow
from ..core.sockets import PLAIN, DialOptions
from .post import TIMEOUT, Poster, PostError, dial_any

QUEUE: Final = 8192
"""Records that may wait: some megabytes, and some seconds of a slow receiver on a busy host."""
_BATCH: Final = 256
_MEGABYTE: Final = 1 << 20
_STAMP: Final = "%Y-%m-%dT%H-%M-%S"

CLIENT: Final = "recorder.service.client.address"
DIAL: Final = "recorder.service.router.dial.address"
DIAL_ERROR: Final = "recorder.service.router.dial.address.error"
HANDLER: Final = "recorder.service.handler"
BUILT: Final = (CLIENT, DIAL, DIAL_ERROR, HANDLER)
"""What can be recorded."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of a record, and the metadata of who wants it, for plugins."""

    data: bytes
    metadata: Mapping[str, Any]


class Sink(Protocol):
    """Takes records, in a thread of its own. What cannot be written raises OSError or PostError, and is lost."""

    def write(self, records: Sequence[Record]) -> None: ...

    def close(self) -> None: ...


class Recorder:
    """A recorder of a name. All services that name it share its queue and its thread.

    dropped    records that found the queue full
    """

    def __init__(self, name: str, sink: Sink, report: Report | None = None, limit: int = QUEUE) -> None:
        self.name = name
        self.dropped = 0
        self.written = 0
        self._sink = sink
        self._limit = limit
        self._report = report or (lambda _: None)
        self._queue: SimpleQueue[Record | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._told_dropped = 0

    def put(self, record: Record) -> None:
        """Queue a record. Never blocks."""
        if self._closed or self._queue.qsize() >= self._limit:
            self.dropped += 1
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"recorder {self.name}", daemon=True)
            self._thread.start()
        self._queue.put(record)

    def close(self, timeout: float = 2.0) -> None:
        """Write what is queued, wait for it at most `timeout` seconds, and take nothing any more. Blocks."""
        self._closed = True
        if self._thread is None:
            self._sink.close()
            return
        self._queue.put(None)
        self._thread.join(timeout)
        left = self._queue.qsize()
        if self._thread.is_alive() and left:
            self._report(f"recorder {self.name}: {left} records are lost at the end")

    def _run(self) -> None:
        queue = self._queue
        ended = False
        failing = False
        while not ended:
            batch: list[Record] = []
            item = queue.get()
            while item is not None:
                batch.append(item)
                if len(batch) >= _BATCH or queue.empty():
                    break
                item = queue.get()
            ended = item is None
            if not batch:
                continue
            try:
                self._sink.write(batch)
            except (OSError, GostnetError) as exc:
                if not failing:
                    self._report(f"recorder {self.name}: {exc}; records are lost until it works again")
                failing = True
            else:
                failing = False
                self.written += len(batch)
            if self.dropped != self._told_dropped and queue.qsize() < self._limit // 2:
                self._report(
                    f"recorder {self.name}: {self.dropped - self._told_dropped} records dropped, it is too slow"
                )
                self._told_dropped = self.dropped
        with contextlib.suppress(OSError):
            self._sink.close()


# ---- sinks ---------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Rotation:
    """When a file is put aside: beyond `size` bytes; and when that is deleted: after `age` days, or beyond `backups`.

    0 is no bound for `age` and `backups`; `local` names files by local time, `compress` packs them.
    """

    size: int = 100 * _MEGABYTE
    age: int = 0
    backups: int = 0
    local: bool = False
    compress: bool = False


class FileSink:
    """Appends to a file, each record followed by `sep`.

    With a rotation, files put aside are named as GOST's: `NAME-2006-01-02T15-04-05.000.EXT`, and `.gz` behind it.
    Several processes may then write to the same file: each looks at it, turns it over and writes under its lock.
    """

    def __init__(
        self, path: str, sep: str = "", rotation: Rotation | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = Path(path)
        self._sep = sep.encode()
        self._rotation = rotation
        self._clock = clock
        self._fd = -1

    def write(self, records: Sequence[Record]) -> None:
        """Append `records` in one write, to the file that has the name now: another program may rename it."""
        if self._rotation is None:
            self._open()
            self._append(b"".join(record.data + self._sep for record in records))
            return
        rotation, aside = self._rotation, False
        size = self._lock()
        try:
            gathered = bytearray()
            for record in records:
                more = len(record.data) + len(self._sep)
                if size and size + more > rotation.size:
                    self._append(gathered)
                    gathered.clear()
                    size = self._turn_over(rotation)
                    aside = True
                gathered += record.data
                gathered += self._sep
                size += more
            self._append(gathered)
        finally:
            if self._fd >= 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        if aside:
            self._tidy(rotation)

    def _open(self) -> None:
        if self._fd >= 0:
            if self._is_current():
                return
            self.close()
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # No O_CREAT on what is there: in sticky directories the kernel refuses it for files of others.
        mode = 0o666 if self._rotation is None else 0o600
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)

    def _is_current(self) -> bool:
        """Tell whether the file that is open is the one that has the name."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _lock(self) -> int:
        """Open and lock the file that has the name, and return its size. The lock of who dies is free again."""
        while True:
            self._open()
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if self._is_current():  # nobody has put it aside while we waited
                return os.fstat(self._fd).st_size

    def _append(self, data: bytes | bytearray) -> None:
        with memoryview(data) as left:
            written = 0
            while written < len(left):
                written += os.write(self._fd, left[written:])

    def _turn_over(self, rotation: Rotation) -> int:
        """Put the file aside, which we have locked, and lock the next one; return its size."""
        moment = datetime.fromtimestamp(self._clock(), None if rotation.local else UTC)
        aside = self._aside(moment)
        while aside.exists() or _packed(aside).exists():
            moment += timedelta(milliseconds=1)
            aside = self._aside(moment)
        with contextlib.suppress(FileNotFoundError):  # another program was quicker
            os.rename(self._path, aside)
        self.close()
        return self._lock()

    def _aside(self, moment: datetime) -> Path:
        stamp = f"{moment.strftime(_STAMP)}.{moment.microsecond // 1000:03d}"
        return self._path.with_name(f"{self._path.stem}-{stamp}{self._path.suffix}")

    def _tidy(self, rotation: Rotation) -> None:
        """Pack what has been put aside, and delete what is too old or too much. Several processes may do so at once."""
        now = datetime.fromtimestamp(self._clock(), None if rotation.local else UTC)
        kept: dict[datetime, set[Path]] = {}
        for path in self._path.parent.iterdir():
            name = path.name.removesuffix(".gz")
            prefix, suffix = f"{self._path.stem}-", self._path.suffix
            if not (name.startswith(prefix) and name.endswith(suffix)):
                continue
            try:
                stamp = name[len(prefix) : len(name) - len(suffix)]
                when = datetime.strptime(stamp, f"{_STAMP}.%f").replace(tzinfo=now.tzinfo)
            except ValueError:
                continue
            kept.setdefault(when, set()).add(path)
        for index, when in enumerate(sorted(kept, reverse=True)):
            too_many = 0 < rotation.backups <= index
            too_old = rotation.age > 0 and now - when > timedelta(days=rotation.age)
            for path in kept[when]:
                if too_many or too_old:
                    path.unlink(missing_ok=True)
                elif rotation.compress and path.suffix != ".gz":
                    _pack(path)

    def close(self) -> None:
        """Close the file; the next record opens it again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _packed(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def _pack(path: Path) -> None:
    """Pack a file that was put aside, unless somebody else does; who dies meanwhile leaves it to the next one."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as source:
        try:
            fcntl.lockf(source, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not the lock that those who write take
        except BlockingIOError:
            return
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as target, gzip.GzipFile("", "wb", fileobj=target) as packing:
            shutil.copyfileobj(source, packing)
        os.replace(part, _packed(path))
        path.unlink()


class TCPSink:
    """Makes a connection for each record, as GOST does: what it is told, and the end."""

    def __init__(self, address: Endpoint, timeout: float = 0.0, options: DialOptions = PLAIN) -> None:
        self._address = address
        self._timeout = timeout if timeout > 0 else TIMEOUT
        self._options = options

    def write(self, records: Sequence[Record]) -> None:
        """Send `records`. Raise OSError for the first that cannot be sent; those behind it are lost with it."""
        for record in records:
            with dial_any(self._options, (self._address.host, self._address.port), self._timeout) as sock:
                sock.sendall(record.data)

    def close(self) -> None:
        """Nothing is open."""


class HTTPSink:
    """Posts each record; a status of 400 or more is a failure."""

    def __init__(self, poster: Poster) -> None:
        self._poster = poster

    def write(self, records: Sequence[Record]) -> None:
        """Post `records`. Raise PostError for the first that is refused."""
        for record in records:
            status, _ = self._poster.post(record.data)
            if status >= 400:
                raise PostError(f"{self._poster.name}: status {status}")

    def close(self) -> None:
        """Close the connection."""
        self._poster.close()


class PluginSink(HTTPSink):
    """Posts each record to a plugin: `{"data": BASE64, "metadata": BASE64 of JSON}`."""

    def write(self, records: Sequence[Record]) -> None:
        """Post `records`. Raise PostError for the first that is not taken."""
        for record in records:
            metadata = _encode(dict(record.metadata) or None).encode()
            message = {"data": _base64(record.data), "metadata": _base64(metadata)}
            self._poster.call(message)


class NullSink:
    """Takes everything: a recorder without a backend."""

    def write(self, records: Sequence[Record]) -> None:
        """Drop `records`."""

    def close(self) -> None:
        """Nothing is open."""


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# ---- what services record ------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Use:
    """A recorder as one service uses it."""

    recorder: Recorder
    metadata: Mapping[str, Any]

    def put(self, data: bytes) -> None:
        """Record bytes."""
        self.recorder.put(Record(data, self.metadata))


class Records:
    """What of a service is recorded; of several recorders for the same thing the first counts, as in GOST.

    It is also what the router tells of its dials.
    """

    def __init__(self, service: str, uses: Mapping[str, Use], labels: Mapping[str, str] | None = None) -> None:
        self._service = service
        self._labels = dict(labels or {})
        self._client = uses.get(CLIENT)
        self._dial = uses.get(DIAL)
        self._dial_error = uses.get(DIAL_ERROR)
        self._handler = uses.get(HANDLER)

    @property
    def dials(self) -> bool:
        """Whether the router has to tell."""
        return bool(self._dial or self._dial_error or self._handler)

    def accepted(self, flow: Flow, ends: tuple[Endpoint, Endpoint]) -> None:
        """Prepare the record of what becomes of a connection, whose ends are (remote, local)."""
        if self._handler is not None:
            begun = time.time()
            flow.details = Details(partial(self._emit, self._handler, flow, ends, begun))

    def came(self, flow: Flow) -> None:
        """Record who comes."""
        if self._client is not None:
            self._client.put(flow.client.host.encode())

    def dialling(self, flow: Flow, target: Endpoint) -> None:
        """Record a target."""
        if self._dial is not None:
            self._dial.put(target.host.encode())

    def failed(self, flow: Flow, target: Endpoint) -> None:
        """Record a target that could not be reached."""
        if self._dial_error is not None:
            self._dial_error.put(target.host.encode())
        self._note_route(flow, target)

    def reached(self, flow: Flow, target: Endpoint, local: Endpoint, remote: Endpoint) -> None:
        """Note the ends of the upstream."""
        if flow.details is not None:
            flow.details.fields["src"] = str(local)
            flow.details.fields["dst"] = str(remote)
            self._note_route(flow, target)

    def _note_route(self, flow: Flow, target: Endpoint) -> None:
        if flow.details is not None:
            flow.details.fields["route"] = " > ".join((*flow.route, str(target)))

    def ended(self, flow: Flow, moved: tuple[int, int]) -> None:
        """Record a connection, unless its parts have been recorded."""
        details, flow.details = flow.details, None
        if details is None or details.emitted:
            return
        fields: dict[str, Any] = {"inputBytes": moved[0], "outputBytes": moved[1], **details.fields}
        if flow.error is not None:
            fields["err"] = str(flow.error) or type(flow.error).__name__
        details.emit(fields)

    def _emit(
        self, use: Use, flow: Flow, ends: tuple[Endpoint, Endpoint], begun: float, fields: Mapping[str, Any]
    ) -> None:
        use.put(handler_record(flow, self._service, self._labels, ends, begun, fields))


_ORDER: Final = (
    *("node", "service", "labels", "network", "remote", "local", "client", "src", "dst", "host", "proto"),
    *("clientIP", "clientID", "http", "websocket", "tls", "dns", "redis", "route", "inputBytes", "outputBytes"),
    *("redirect", "err", "sid", "duration", "time"),
)
_OPTIONAL: Final = frozenset(
    ("node", "labels", "proto", "clientID", "http", "websocket", "tls", "dns", "redis", "route", "redirect", "err")
)

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


def handler_record(
    flow: Flow,
    service: str,
    labels: Mapping[str, str],
    ends: tuple[Endpoint, Endpoint],
    begun: float,
    fields: Mapping[str, Any],
) -> bytes:
    """Return the record of a flow, or of a part of it: a JSON object with GOST's fields in GOST's order.

    ends     remote and local address of the client's connection
    begun    when, in seconds since 1970
    fields   what is known besides; `duration` in nanoseconds and `begun` are those of the flow unless they are there
    """
    begun = fields.get("begun", begun)
    sniffed = flow.sniffed
    known: dict[str, Any] = {
        "service": service,
        "labels": labels,
        "network": flow.network,
        "remote": str(ends[0]),
        "local": str(ends[1]),
        "client": str(flow.client),
        "src": "",
        "dst": "",
        "host": _host(flow),
        "proto": sniffed.protocol if sniffed is not None else "",
        "clientIP": "",
        "clientID": flow.user,
        "inputBytes": 0,
        "outputBytes": 0,
        "sid": flow.sid,
        "duration": int((time.time() - begun) * 1e9),
        "time": stamp(begun),
        **fields,
    }
    return _encode({key: known[key] for key in _ORDER if key in known and (known[key] or key not in _OPTIONAL)}).encode(
        "utf-8", "backslashreplace"
    )


def _host(flow: Flow) -> str:
    """Return whom a flow is for: the name that was sniffed, with the target's port, or the target."""
    target = flow.target
    if target is None or not flow.host:
        return flow.host if target is None else str(target)
    return str(Endpoint(flow.host, target.port))


def stamp(seconds: float) -> str:
    """Return a time as Go writes it (RFC 3339 with up to nine digits), in the local zone."""
    second, rest = divmod(int(seconds * 1_000_000), 1_000_000)
    fraction = f".{rest:06d}".rstrip("0") if rest else ""
    moment, zone = _second(second)
    return f"{moment}{fraction}{zone}"


@lru_cache(maxsize=4)
def _second(seconds: int) -> tuple[str, str]:
    """Return date and time of a whole second, and the zone: many records fall into the same one."""
    local = time.localtime(seconds)
    zone = time.strftime("%z", local)
    return time.strftime("%Y-%m-%dT%H:%M:%S", local), "Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}"
