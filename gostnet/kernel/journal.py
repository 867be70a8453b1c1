"""The journal of an instance: what it is about to change in the kernel, on disk before it does.

A file of lines of JSON. The first is the header (whose it is), every other one a change. A line counts once it is
whole, so a crash while writing leaves at most a line that does not count, of a change that was not made. The file is
locked (flock) as long as its instance lives, and by whoever rolls it back.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from gostnet.core.errors import KernelError
from gostnet.core.resources import KINDS, Key, NftTable, Resource

from .plan import Change, Held, fold

_VERSION = 1
_SO_NETNS_COOKIE = 71
_RUN = Path("/run/gostnet")


class Owner(NamedTuple):
    """A process: its id and, as ids are used again, when it started (in clock ticks since boot)."""

    pid: int
    start: int

    @classmethod
    def current(cls) -> Owner:
        """Return the running process."""
        pid = os.getpid()
        return cls(pid, started(pid))

    @property
    def alive(self) -> bool:
        """Whether the process exists; False for another one with its id, and for one that waits to be reaped."""
        return self.start != 0 and started(self.pid) == self.start


def started(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if there is none or it is dead."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name is in parentheses and may hold anything; the state is field 3, the start field 22.
            words = file.read().rpartition(b")")[2].split()
        return 0 if words[0] in (b"Z", b"X") else int(words[19])
    except (OSError, IndexError, ValueError):
        return 0


@dataclass(frozen=True, slots=True)
class Header:
    """Whose journal it is.

    slot     of the instance, see `core.resources.FIRST_TABLE`
    cookie   of the network namespace: unlike its inode it is never used again while the machine is up; 0 if unknown
    boot     the kernel's name for this boot
    """

    instance: str
    owner: Owner
    slot: int
    cookie: int
    boot: str


# ---- places -------------------------------------------------------------------------------------
def state_directory(given: Path | None = None, *, create: bool = True) -> Path:
    """Return the directory of journals: /run/gostnet, without root $XDG_RUNTIME_DIR/gostnet.

    It is made if need be, for its owner only. Raise KernelError if there is none and none can be made.
    """
    if given is not None:
        candidates = [given]
    else:
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        candidates = [_RUN] if os.geteuid() == 0 else []
        candidates += [Path(runtime, "gostnet")] if runtime else []
    failure = OSError(errno.ENOENT, "XDG_RUNTIME_DIR is not set")
    for candidate in candidates:
        try:
            if create:
                candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(candidate, os.W_OK | os.X_OK):
                return candidate
            os.stat(candidate)
            failure = PermissionError(errno.EACCES, f"{candidate} is not writable")
        except OSError as exc:
            failure = exc
    hint = "run as root, or set XDG_RUNTIME_DIR to a directory of yours"
    raise KernelError("open the state directory", failure.errno or 0, failure.strerror or "", hint=hint) from failure


def journal_path(directory: Path, inode: int, instance: str) -> Path:
    """Return where the journal of an instance in a network namespace is."""
    return directory / f"{inode}-{instance}.journal"


def journals(directory: Path, inode: int) -> list[Path]:
    """Return the journals of a network namespace, sorted; [] if there is no directory."""
    try:
        return sorted(directory.glob(f"{inode}-*.journal"))
    except FileNotFoundError:
        return []


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Keep other instances from choosing a slot meanwhile."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def boot_id() -> str:
    """Return the kernel's name for this boot, "" if it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def namespace_cookie() -> int:
    """Return the number of the calling thread's network namespace (Linux 5.14), 0 if the kernel has none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")
        except OSError:
            return 0


# ---- the file -----------------------------------------------------------------------------------
class Journal:
    """An open and locked journal. `header` and `changes` are what it held when it was opened, and since."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Take over a locked descriptor and read the file."""
        self.path = path
        self._descriptor = descriptor
        self.header, self.changes, self._end = _parse(_read(descriptor))
        self._latest: dict[Key, bytes] = {}

    @classmethod
    def open(cls, path: Path, *, create: bool = True) -> Journal | None:
        """Open and lock; None if somebody else has it locked, or if it is missing and not to be created.

        Raise KernelError.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        while True:
            try:
                descriptor = os.open(path, flags, 0o600)
            except FileNotFoundError:
                return None
            except OSError as exc:
                raise KernelError(f"open {path}", exc.errno or 0) from exc
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, path):
                    return cls(path, descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # removed by its last holder between open and lock

    @property
    def held(self) -> dict[Key, Held]:
        """What the changes come to."""
        return fold(self.changes)

    def begin(self, header: Header) -> None:
        """Start anew with a header; what was in the file is forgotten. Raise KernelError."""
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as exc:
            raise KernelError(f"write {self.path}", exc.errno or 0) from exc
        self._end = 0
        self._write(_line(asdict(header) | {"version": _VERSION, "owner": list(header.owner)}))
        self.header, self.changes, self._latest = header, [], {}

    def append(self, change: Change) -> None:
        """Record a change; it is on disk when this returns. Raise KernelError.

        One that is just as the last of its key there is not written again: what is tried over and over would fill
        the disk.
        """
        line = _line({"before": _dump(change.before), "after": _dump(change.after)})
        if self._latest.get(change.key) != line:
            self._write(line)
            self._latest[change.key] = line
        self.changes.append(change)

    def note(self, change: Change) -> None:
        """Count a change that takes back recorded ones; nothing of it has to be on disk to be undone."""
        self.changes.append(change)

    def remove(self) -> None:
        """Remove the file and let go of it."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the file and leave it where it is. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _write(self, line: bytes) -> None:
        # At the end of the last whole line, over what a crash may have left behind it.
        try:
            written = os.pwrite(self._descriptor, line, self._end)
            os.ftruncate(self._descriptor, self._end + written)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as exc:
            raise KernelError(f"write {self.path}", exc.errno or 0) from exc
        self._end += len(line)


def await_release(path: Path, timeout: float = 5.0) -> bool:
    """Wait until nobody has a journal locked, at most `timeout` seconds; False if somebody still has. Blocks."""
    deadline = time.monotonic() + timeout
    while True:
        journal = Journal.open(path, create=False)
        if journal is not None:
            journal.close()
            return True
        if not path.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)


def read(path: Path) -> tuple[Header | None, list[Change]]:
    """Read a journal that somebody else may be writing, without its lock; nothing if it is missing."""
    try:
        data = path.read_bytes()
    except OSError:
        return None, []
    header, changes, _ = _parse(data)
    return header, changes


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> bytes:
    chunks, position = [], 0
    while chunk := os.pread(descriptor, 1 << 20, position):
        chunks.append(chunk)
        position += len(chunk)
    return b"".join(chunks)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _parse(data: bytes) -> tuple[Header | None, list[Change], int]:
    """Return header, changes, and where the last whole line ends."""
    header, changes, end = None, [], 0
    for line in data.splitlines(keepends=True):
        try:
            record = json.loads(line)
            if not line.endswith(b"\n"):
                break
            if header is None:
                if record["version"] != _VERSION:
                    break  # of another release: nothing that this one could undo
                owner = Owner(*map(int, record["owner"]))
                header = Header(record["instance"], owner, record["slot"], record["cookie"], record["boot"])
            else:
                changes.append(Change(_load(record["before"]), _load(record["after"])))
        except (ValueError, KeyError, TypeError):
            break
        end += len(line)
    return header, changes, end


def _dump(item: Resource | None) -> dict[str, Any] | None:
    if item is None:
        return None
    record: dict[str, Any] = {"kind": item.kind}
    for field in fields(item):
        value = getattr(item, field.name)
        if isinstance(item, NftTable) and field.name == "content":
            continue  # never put back by another process; the digest tells it from others
        record[field.name] = base64.b64encode(value).decode() if isinstance(value, bytes) else value
    return record


def _load(record: dict[str, Any] | None) -> Resource | None:
    if record is None:
        return None
    values = dict(record)
    form = KINDS[values.pop("kind")]
    if "raw" in values:
        values["raw"] = base64.b64decode(values["raw"])
    return form(**values)
