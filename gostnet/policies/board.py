"""Statistics of several workers: each writes its own counters into common memory, the supervisor adds them up.

Nobody waits for anybody: a plane has one writer. What a worker that dies has counted is kept by the supervisor.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Final

RECORD: Final = 512
PLANE: Final = RECORD << 16
"""Bytes of a worker's plane, a head and then the records; pages that nobody has touched take no memory."""
ROOM: Final = PLANE // RECORD - 1
"""Records of a worker: one for each service and for each client of it."""

_COUNTS: Final = struct.Struct("5q")
_HEAD: Final = struct.Struct("2q")
_LENGTH: Final = struct.Struct("H")
_NAME: Final = _COUNTS.size + _LENGTH.size
_LONGEST: Final = RECORD - _NAME
_DIGEST: Final = 32

Counts = tuple[int, int, int, int, int]
"""Connections in all and now, bytes received and sent, errors."""
Name = tuple[str, str | None]
"""A service, and one of its clients: "" for those without an id, None for the service itself."""

NOTHING: Final[Counts] = (0, 0, 0, 0, 0)


class Board:
    """A worker's plane, to write to.

    used, changes | record | record | ...    each counts (5 of 8 bytes), the length of the name, the name

    used      records that have been used so far, those that are free again among them
    changes   grows when a record gets another name
    """

    def __init__(self, descriptor: int, start: int) -> None:
        """Map the plane that begins at `start` in the memory behind `descriptor`, which stays the caller's."""
        self._memory = mmap.mmap(descriptor, PLANE, offset=start)
        self._used, self._changes = _HEAD.unpack_from(self._memory)
        self._free: list[int] = []

    def place(self, service: str, client: str | None = None) -> Place | None:
        """Return a place for new counters; None if there is no room."""
        if self._free:
            at = self._free.pop()
        elif self._used < ROOM:
            self._used += 1
            at = self._used * RECORD
        else:
            return None
        memory, name = self._memory, _packed(service, client)
        memory[at + _NAME : at + _NAME + len(name)] = name
        _COUNTS.pack_into(memory, at, *NOTHING)
        _LENGTH.pack_into(memory, at + _COUNTS.size, len(name))
        self._renamed()
        return Place(self, at)

    def write(self, at: int, counts: Counts) -> None:
        """Write the counts of the record at `at`."""
        _COUNTS.pack_into(self._memory, at, *counts)

    def free(self, at: int) -> None:
        """Forget the record at `at`."""
        _LENGTH.pack_into(self._memory, at + _COUNTS.size, 0)
        self._free.append(at)
        self._renamed()

    def _renamed(self) -> None:
        self._changes += 1
        _HEAD.pack_into(self._memory, 0, self._used, self._changes)


class Place:
    """Where one set of counters is written to."""

    __slots__ = ("_at", "_board")

    def __init__(self, board: Board, at: int) -> None:
        self._board = board
        self._at = at

    def write(self, counts: Counts) -> None:
        """Write all counters."""
        self._board.write(self._at, counts)

    def free(self) -> None:
        """Forget them. Nothing may be written any more."""
        self._board.free(self._at)


class Totals:
    """What all workers have counted, the dead among them."""

    def __init__(self, descriptor: int, starts: Iterable[int]) -> None:
        """Map the planes that begin at `starts`."""
        self._planes = [_Plane(mmap.mmap(descriptor, PLANE, offset=start)) for start in starts]
        self._kept: dict[Name, Counts] = {}
        self._gone: frozenset[str] = frozenset()

    def of(self, service: str, client: str | None = None) -> Counts:
        """Return the counts of a service or of a client."""
        name = _unpacked(_packed(service, client))
        return self._sum(name, [counts for plane in self._planes for counts in plane.find(name)])

    def clients(self, service: str) -> dict[str, Counts]:
        """Return the counts of all clients of a service."""
        found: dict[Name, list[Counts]] = {}
        for plane in self._planes:
            for name, counts in plane.all():
                if name[0] == service and name[1] is not None:
                    found.setdefault(name, []).append(counts)
        for name in self._kept:
            if name[0] == service and name[1] is not None:
                found.setdefault(name, [])
        return {name[1] or "": self._sum(name, counts) for name, counts in found.items()}

    def busy(self, worker: int) -> bool:
        """Tell whether a worker has connections that may have moved more than they have been charged with."""
        return any(counts[1] for counts in self._planes[worker].services())

    def bury(self, worker: int) -> None:
        """Keep what a worker that is dead has counted, but for the connections that it had; empty its plane.

        Of clients that only the dead have counted, ROOM are remembered.
        """
        plane = self._planes[worker]
        for name, (total, _, received, sent, errors) in plane.all():
            if name[0] in self._gone:
                continue
            self._kept[name] = self._sum(name, [(total, 0, received, sent, errors)])
        plane.clear()
        clients = [name for name in self._kept if name[1] is not None]
        for name in clients[: max(0, len(clients) - ROOM)]:
            del self._kept[name]

    def forget(self, services: Iterable[str]) -> None:
        """Forget what the dead have counted of services that have gone, and will have counted until the next call."""
        self._gone = frozenset(services)
        for name in [name for name in self._kept if name[0] in self._gone]:
            del self._kept[name]

    def _sum(self, name: Name, found: Iterable[Counts]) -> Counts:
        total, current, received, sent, errors = self._kept.get(name, NOTHING)
        for more in found:
            total += more[0]
            current += more[1]
            received += more[2]
            sent += more[3]
            errors += more[4]
        return total, current, received, sent, errors


class _Plane:
    """A worker's plane, to read from."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._seen = (0, 0)
        self._at: dict[Name, list[int]] = {}
        self._services: list[int] = []

    def find(self, name: Name) -> Iterator[Counts]:
        return map(self._read, self._places().get(name, ()))

    def all(self) -> Iterator[tuple[Name, Counts]]:
        for name, places in self._places().items():
            for at in places:
                yield name, self._read(at)

    def services(self) -> Iterator[Counts]:
        self._places()
        return map(self._read, self._services)

    def clear(self) -> None:
        self._at, self._services = {}, []
        self._seen = (0, 0)
        _HEAD.pack_into(self._memory, 0, 0, 0)

    def _read(self, at: int) -> Counts:
        counts: Counts = _COUNTS.unpack_from(self._memory, at)
        return counts

    def _places(self) -> dict[Name, list[int]]:
        """Return where everything is, read again if names have changed.

        A service that has gone and come back has several places, as it has connections of both times.
        """
        seen: tuple[int, int] = _HEAD.unpack_from(self._memory)
        if seen != self._seen:
            self._at = {}
            for at in range(RECORD, (seen[0] + 1) * RECORD, RECORD):
                (length,) = _LENGTH.unpack_from(self._memory, at + _COUNTS.size)
                if length:
                    name = _unpacked(self._memory[at + _NAME : at + _NAME + length])
                    self._at.setdefault(name, []).append(at)
            self._services = [at for name, places in self._at.items() if name[1] is None for at in places]
            self._seen = seen
        return self._at


def _packed(service: str, client: str | None) -> bytes:
    """Return the name of a record: a service, and behind a zero byte a client. What is too long ends in a digest."""
    name = service if client is None else f"{service}\0{client}"
    data = name.encode("utf-8", "surrogatepass")
    if len(data) <= _LONGEST:
        return data
    digest = blake2b(data, digest_size=_DIGEST // 2).hexdigest().encode()
    return data[: _LONGEST - _DIGEST] + digest


def _unpacked(data: bytes) -> Name:
    service, found, client = data.decode("utf-8", "replace").partition("\0")
    return service, client if found else None
