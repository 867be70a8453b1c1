"""What the workers of one configuration count together: rows in memory that all of them have, by key.

Each set of rows has a lock of its own, which the kernel takes back when its holder dies. A worker's counts are in a
plane of their own, so that those of a dead one can be taken off.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import threading
from hashlib import blake2b
from types import TracebackType
from typing import Final

from .board import PLANE, Board, Totals

SETS: Final = 4096
WAYS: Final = 16
ROWS: Final = SETS * WAYS
"""As many clients as a single process remembers; pages that nobody has touched take no memory."""

SUPERVISOR: Final = -1
"""Who counts nothing, in place of a worker's number."""

KEY: Final = 16
_FREE: Final = bytes(KEY)
_PINNED: Final = math.inf
_TURN: Final = SETS
"""The lock beside those of the sets."""


def key_of(*parts: object) -> bytes:
    """Return the key of what `parts` name: 16 bytes, the same in every worker."""
    return blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=KEY).digest()


class Ledger:
    """The rows as one worker sees them.

    keys | stamps | values | counts of worker 0 | counts of worker 1 | ... | board of worker 0 | board of worker 1 | ...

    each of the first a plane of ROWS entries of 8 bytes, keys of 16; a board is a worker's statistics (board.py)

    stamps     seconds of the monotonic clock, which is one for all processes; 0 for rows that have counts
    values     one number for all
    integers   the same memory as integers
    counts     by worker; each writes its own alone
    """

    def __init__(self, descriptor: int, workers: int, worker: int = 0) -> None:
        """Map the memory behind `descriptor`, which stays the caller's to close, after this."""
        self.descriptor = descriptor
        self.worker = worker
        self._map = mmap.mmap(descriptor, _size(workers))
        whole = memoryview(self._map)
        self._keys = whole[: KEY * ROWS]
        planes = [whole[start : start + 8 * ROWS] for start in range(KEY * ROWS, _size(workers), 8 * ROWS)]
        self.stamps = planes[0].cast("d")
        self.values = planes[1].cast("d")
        self.integers = planes[1].cast("q")
        self.counts = [plane.cast("q") for plane in planes[2:]]
        self.own = memoryview(b"").cast("q") if worker == SUPERVISOR else self.counts[worker]
        self._boards = range(_size(workers), _size(workers) + PLANE * workers, PLANE)
        self._writing = threading.Lock()

    @classmethod
    def create(cls, workers: int, worker: int = 0) -> Ledger:
        """Make the memory. Raise OSError."""
        descriptor = os.memfd_create("gostnet-ledger")
        try:
            os.ftruncate(descriptor, _size(workers) + PLANE * workers)
            return cls(descriptor, workers, worker)
        except BaseException:
            os.close(descriptor)
            raise

    def board(self) -> Board:
        """Return where this worker's statistics go."""
        return Board(self.descriptor, self._boards[self.worker])

    def totals(self) -> Totals:
        """Return the statistics of all workers."""
        return Totals(self.descriptor, self._boards)

    def forget(self, worker: int) -> None:
        """Take the counts of a dead worker off."""
        plane = self.counts[worker]
        for row in range(ROWS):
            if plane[row]:
                plane[row] = 0

    # ---- rows ----------------------------------------------------------------------------------
    def enter(self, key: bytes) -> int:
        """Lock the set of a key and return its row, a fresh one if it has none yet; -1 if there is no room.

        Each `enter` is followed by `leave`, and no other in between.
        """
        place = int.from_bytes(key[:2]) % SETS
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, place)
        base = place * WAYS
        keys = bytes(self._keys[base * KEY : (base + WAYS) * KEY])
        at = keys.find(key)
        while at % KEY and at >= 0:
            at = keys.find(key, at + 1)
        if at >= 0:
            return base + at // KEY
        row = self._room(base, keys)
        if row >= 0:
            self._keys[row * KEY : (row + 1) * KEY] = key
            self.stamps[row] = 0.0
            self.integers[row] = 0
        return row

    def leave(self, key: bytes) -> None:
        """Unlock."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, int.from_bytes(key[:2]) % SETS)

    def pin(self, key: bytes) -> int:
        """Return the row of a key that stays where it is. Raise MemoryError if there is no room."""
        row = self.enter(key)
        try:
            if row < 0:
                raise MemoryError("the workers' ledger is full")
            self.stamps[row] = _PINNED
            return row
        finally:
            self.leave(key)

    def _room(self, base: int, keys: bytes) -> int:
        """Return a row for a new key: a free one, one that counts nothing any more, or the oldest; -1 for none."""
        oldest, when = -1, _PINNED
        for row in range(base, base + WAYS):
            at = (row - base) * KEY
            if keys[at : at + KEY] == _FREE:
                return row
            stamp = self.stamps[row]
            if stamp < when and (stamp or not self.total(row)):
                oldest, when = row, stamp
        return oldest

    def total(self, row: int) -> int:
        """Return the counts of all workers together."""
        return sum(plane[row] for plane in self.counts)

    # ---- a turn --------------------------------------------------------------------------------
    def __enter__(self) -> None:
        """Wait for a turn of something that one worker at a time does, such as writing lines."""
        self._writing.acquire()  # the kernel's lock is one of processes, not of threads
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, _TURN)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, _TURN)
        self._writing.release()


def _size(workers: int) -> int:
    return (KEY + 8 * (2 + workers)) * ROWS
