"""The daemon's side of the guard."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
from pathlib import Path

from gostnet.core.errors import KernelError

from . import guard
from .journal import Owner

_START_TIMEOUT = 10.0
_STOP_TIMEOUT = 5.0
"""Seconds; both take some 20 ms on an idle machine."""


class Guard:
    """A running guard."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs. One that has ended is reaped by asking."""
        return self._process.poll() is None

    def await_ready(self) -> None:
        """Wait until it watches. Raise KernelError if it does not come to that; it is gone then."""
        output = self._process.stdout
        assert output is not None
        ready, _, _ = select.select([output], [], [], _START_TIMEOUT)
        if ready and output.read(1) == b"w":
            output.close()
            return
        self.dismiss()
        raise KernelError("start the guard", errno.ECHILD, "it did not start")

    def dismiss(self) -> None:
        """End it: there is nothing to roll back. It is reaped when this returns. Idempotent."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if not process.stdin.closed:
            try:
                os.write(process.stdin.fileno(), b"q")
            except OSError:
                pass  # it is dead
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start(path: Path, owner: Owner) -> Guard:
    """Start a guard for a journal of this process, in the calling thread's network namespace.

    It need not watch yet: see `Guard.await_ready`. Raise KernelError.
    """
    program = guard.__file__
    directories = [directory for directory in sys.path if os.path.isabs(directory)]
    # Nothing of the environment but what an interpreter outside the usual places may need to start at all.
    environment = {key: value for key, value in os.environ.items() if key == "LD_LIBRARY_PATH"}
    try:
        descriptor = os.pidfd_open(owner.pid)
        try:
            arguments = [str(descriptor), os.path.abspath(path), str(owner.pid), str(owner.start), *directories]
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", program, *arguments],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                close_fds=True,
                pass_fds=(descriptor,),
                start_new_session=True,
                cwd="/",
                env=environment,
            )
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise KernelError("start the guard", exc.errno or 0) from exc
    return Guard(process)
