"""Pipes for splice: taken when bytes arrive, given back when they have left."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from functools import partial

from ..core.hub import Hub

PIPE_SIZE = 262144
"""Bytes: 64 KiB halves the rate, 1 MiB gains nothing and exhausts pipe-user-pages-soft sooner (measured)."""

LEAST = 16384
"""Bytes: a pipe of less moves less than recv and send would."""

SMALL_PIPES = "pipes are too small: fs.pipe-user-pages-soft is used up"

_F_SETPIPE_SZ, _F_GETPIPE_SZ = 1031, 1032

Pipe = tuple[int, int]


class PipePool:
    """Empty pipes, kept for the next burst. One per hub, bounded."""

    __slots__ = ("__weakref__", "_free", "_refused", "out")

    KEEP = 64

    def __init__(self, refused: Callable[[str], object] | None = None) -> None:
        """`refused` takes the reason when there is no pipe, or the kernel does not splice."""
        self._free: list[Pipe] = []
        self._refused = refused
        self.out = 0

    def refuse(self, reason: str) -> None:
        """Tell why bytes are copied."""
        if self._refused is not None:
            self._refused(reason)

    def take(self) -> Pipe | None:
        """Return a pipe, None when the process has no descriptors or no memory left for one."""
        if self._free:
            self.out += 1
            return self._free.pop()
        try:
            read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            self.refuse(f"no pipe: {exc.strerror}")
            return None
        try:
            fcntl.fcntl(write, _F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            # Up to pipe-user-pages-soft a pipe keeps its 64 KiB, beyond it gets 8: slower, and slower than without.
            if fcntl.fcntl(write, _F_GETPIPE_SZ) < LEAST:
                os.close(read)
                os.close(write)
                self.refuse(SMALL_PIPES)
                return None
        self.out += 1
        return read, write

    def put(self, pipe: Pipe, *, empty: bool) -> None:
        """Give a pipe back; one that still holds bytes of a dead flow is closed."""
        self.out -= 1
        if empty and len(self._free) < self.KEEP:
            self._free.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self) -> None:
        """Close the kept pipes."""
        while self._free:
            for fd in self._free.pop():
                os.close(fd)

    def __del__(self) -> None:
        self.close()


def not_spliced(number: int) -> str:
    """Return why bytes of a socket are copied."""
    return f"a socket is not spliced: {os.strerror(number)}"


def pipe_pool(hub: Hub) -> PipePool:
    """Return the pool of `hub`'s loop, which is closed with the hub."""
    if hub.pipes is None:
        hub.pipes = PipePool(partial(hub.give_way, "splice", "copy"))
        hub.closing.append(hub.pipes.close)
    pool: PipePool = hub.pipes
    return pool
