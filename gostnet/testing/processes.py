"""Programs in namespaces: started, watched until they are ready, and ended, whatever happens to the test.

A program dies with the thread that started it, so a test run that is killed leaves none behind; start programs from
a thread that outlives them, such as the main thread. What it prints is read at once by threads, so no pipe fills up,
and may be asked for at any time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from gostnet.core.errors import GostnetError
from gostnet.kernel import netns

READY = '"msg":"ready"'
"""What the daemon logs once everything listens and is applied."""

_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(125)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as exc:
    os.write(2, f"{sys.argv[2]}: {exc.strerror}\\n".encode())
    os._exit(127)
"""
"""Asks the kernel for SIGKILL at the end of the parent (PR_SET_PDEATHSIG), then becomes the program: the same pid. A
program of its own rather than code between fork and exec, which is unsafe in a process with threads."""

_KILL_GRACE = 5.0
_GROUP_GRACE = 3.0
_OUTPUT_GRACE = 0.5
"""Seconds for what happens after a program's end: for it to listen to a signal, for its descendants to end, for its
last output to be read when a descendant keeps the pipe open."""


class ProcessFailed(GostnetError):
    """A program ended, or did not do in time what was waited for; the message ends with its last output."""

    code = "process"


class Process:
    """A program, in a namespace if given, from `start` or entering the context to `stop` or leaving it."""

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        place: netns.Place = None,
        *,
        env: Mapping[str, str] | None = None,
        directory: str | Path | None = None,
        name: str = "",
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        """`env` is added to the environment. `on_line` gets each line of standard error, in a thread of its own."""
        self.arguments = [os.fspath(argument) for argument in arguments]
        self.name = name or Path(self.arguments[0]).name
        self._place = place
        self._env = env
        self._directory = directory
        self._on_line = on_line
        self._process: subprocess.Popen[bytes] | None = None
        self._readers: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._out: list[str] = []
        self._err: list[str] = []
        self._open = 0

    def __enter__(self) -> Process:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    # ---- its life ---------------------------------------------------------------------------
    def start(self) -> None:
        """Start it, in a process group of its own, with standard input empty. Raise KernelError or OSError."""
        if self._process is not None:
            raise RuntimeError(f"{self.name} has been started before")
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *self.arguments]
        with netns.inside(self._place):
            self._process = subprocess.Popen(
                launcher,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **(self._env or {})},
                cwd=self._directory,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for stream, lines in ((self._process.stdout, self._out), (self._process.stderr, self._err)):
            self._open += 1
            reader = threading.Thread(target=self._read, args=(stream, lines), name=f"read {self.name}", daemon=True)
            reader.start()
            self._readers.append(reader)

    @property
    def pid(self) -> int:
        """The process id, the program's own. Raise RuntimeError before the start."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal's number for a killed one, None while it runs."""
        return None if self._process is None else self._process.poll()

    def send(self, number: int) -> None:
        """Send a signal; one that has ended already gets none."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, timeout: float = 10.0) -> int:
        """Wait for its end and all of its output; return the exit code. Raise ProcessFailed when it does not end."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"{self.name} still runs after {timeout:g} s{self._tail()}") from None
        # A descendant may hold the pipes open; what the program itself wrote is there to be read already.
        deadline = time.monotonic() + _OUTPUT_GRACE
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        return code

    def stop(self, timeout: float = _KILL_GRACE, *, number: int = signal.SIGTERM) -> int:
        """End it and whatever of its process group is left; return the exit code. Idempotent.

        It gets signal `number`, SIGKILL after `timeout` seconds. Descendants that do not end by themselves soon after
        it (a guard that tidies up does) are killed.
        """
        process = self._process
        if process is None:
            return 0
        self.send(number)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        deadline = time.monotonic() + _GROUP_GRACE
        while _group_lives(process.pid):
            if time.monotonic() > deadline:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                break
            time.sleep(0.005)
        for reader in self._readers:
            reader.join(_KILL_GRACE)
        return process.returncode

    def kill(self) -> int:
        """End it by SIGKILL, as a crash would, and return the exit code; its descendants live on."""
        self.send(signal.SIGKILL)
        return self.wait()

    # ---- its output -------------------------------------------------------------------------
    @property
    def output(self) -> str:
        """Standard output so far."""
        with self._changed:
            return "".join(self._out)

    @property
    def errors(self) -> str:
        """Standard error so far."""
        with self._changed:
            return "".join(self._err)

    @property
    def lines(self) -> list[str]:
        """The whole lines of standard error so far, without their ends."""
        with self._changed:
            return [line.rstrip("\n") for line in self._err]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The JSON objects among the lines of standard error, in order: the daemon's log."""
        found = []
        for line in self.lines:
            if line.startswith("{"):
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
        return found

    def wait_for(self, wanted: str | Callable[[str], bool], timeout: float = 10.0) -> str:
        """Block until a line of either output contains the text or fits the predicate; return the line.

        Lines that came before count too. Raise ProcessFailed when it ends first, or after `timeout` seconds.
        """
        fits = wanted if callable(wanted) else lambda line: wanted in line
        checked = [0, 0]

        def find() -> str | None:
            for number, lines in enumerate((self._err, self._out)):
                for line in lines[checked[number] :]:
                    checked[number] += 1
                    if fits(line):
                        return line.rstrip("\n") or "\n"
            return None

        with self._changed:
            outcome = self._changed.wait_for(lambda: find() or not self._open, timeout)
        if isinstance(outcome, str):
            return outcome
        what = wanted if isinstance(wanted, str) else "the line waited for"
        if not outcome:
            raise ProcessFailed(f"{self.name} did not print {what} within {timeout:g} s{self._tail()}")
        raise ProcessFailed(f"{self.name} ended without {what}, exit code {self.wait()}{self._tail()}")

    def wait_ready(self, timeout: float = 20.0) -> None:
        """Block until the daemon says that it is ready. Raise ProcessFailed."""
        self.wait_for(READY, timeout)

    def _read(self, stream: IO[bytes], lines: list[str]) -> None:
        with stream:
            for raw in stream:
                line = raw.decode(errors="backslashreplace")
                with self._changed:
                    lines.append(line)
                    self._changed.notify_all()
                if self._on_line is not None and lines is self._err:
                    self._on_line(line.rstrip("\n"))
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def _tail(self) -> str:
        with self._changed:
            last = "".join([*self._out[-5:], *self._err[-15:]]).rstrip()
        return f":\n{last}" if last else ""


def gostnet(*arguments: str, place: netns.Place = None, **options: Any) -> Process:
    """Describe (not start) a gostnet process of this very installation; `options` are those of `Process`."""
    options.setdefault("name", "gostnet")
    options["env"] = {"PYTHONUNBUFFERED": "1", **(options.get("env") or {})}
    return Process([sys.executable, "-m", "gostnet", *arguments], place, **options)


def stop_all(processes: Sequence[Process]) -> None:
    """Stop processes that have to do with each other: all are told to end before any of them is waited for.

    Otherwise a server would wait for its clients (drain), which nobody has told.
    """
    for process in reversed(processes):
        process.send(signal.SIGTERM)
    for process in reversed(processes):
        process.stop()


def workers(process: Process) -> list[int]:
    """Return the process ids of the workers of a gostnet process, the first one first."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if name.startswith("gostnet-w"):
            found[name] = int(pid)
    return [found[name] for name in sorted(found)]


def run_program(
    arguments: Sequence[str | os.PathLike[str]],
    place: netns.Place = None,
    *,
    timeout: float = 20.0,
    check: bool = True,
    **options: Any,
) -> Process:
    """Run a program to its end and return it, for its `output`, `errors` and `returncode`.

    Raise ProcessFailed when it takes longer than `timeout` seconds or, with `check`, ends with another code than 0.
    """
    with Process(arguments, place, **options) as process:
        code = process.wait(timeout)
        if check and code:
            raise ProcessFailed(f"{process.name} ended with exit code {code}{process._tail()}")
        return process


def _group_lives(group: int) -> bool:
    """Tell whether a process of the group runs; one that has ended and is still listed does not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                # proc(5): pid (command) state parent group ...
                state, _, of, *_ = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(of) == group and state not in "ZX":
                return True
    return False
