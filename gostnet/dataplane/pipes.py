"""Pipes for splice: taken when bytes arrive, given back when they have left."""

from __future__ import annotations

import fcntl
import os

from ..core.hub import Hub

PIPE_SIZE = 262144
"""Bytes: 64 KiB halves the rate, 1 MiB gains nothing and exhausts pipe-user-pages-soft sooner (measured)."""

_F_SETPIPE_SZ = 1031

Pipe = tuple[int, int]


class PipePool:
    """Empty pipes, kept for the next burst. One per hub, bounded."""

    __slots__ = ("__weakref__", "_free", "out")

    KEEP = 64

    def __init__(self) -> None:
        self._free: list[Pipe] = []
        self.out = 0

    def take(self) -> Pipe | None:
        """Return a pipe, None when the process has no descriptors left for one."""
        if self._free:
            self.out += 1
            return self._free.pop()
        try:
            read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.fcntl(write, _F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            pass  # beyond pipe-user-pages-soft the pipe keeps its default size: slower, not wrong
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


def pipe_pool(hub: Hub) -> PipePool:
    """Return the pool of `hub`'s loop, which is closed with the hub."""
    if hub.pipes is None:
        hub.pipes = PipePool()
        hub.closing.append(hub.pipes.close)
    pool: PipePool = hub.pipes
    return pool
