"""Joined UDP flows, as datagrams.c passes them: peers of a listening socket with a connected socket each."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, Protocol

from ...core.address import Endpoint, parse_ip
from ...core.hub import READABLE, Hub, OnEvents
from ...core.sockets import Readiness
from .library import OFF, Library, load

BATCH: Final = 64
"""Datagrams of one call of the library."""

ROUNDS: Final = 8
"""Calls in one turn of the loop; then the others have theirs."""

REFRESH: Final = 1.0
"""Seconds after something has moved until the counts of running flows say so."""

CAPTURED: Final = 1
PINNED: Final = 2

_COUNTS: Final = 1
_DECIDE: Final = 2
"""What the library announces: something has moved; somebody has to decide."""

_LACKS: Final = (
    (1, "the kernel lacks recvmmsg or sendmmsg: datagrams are taken and sent one by one"),
    (2, "the kernel lacks UDP_GRO: datagrams arrive one by one"),
    (4, "the kernel does not cut trains of datagrams for a way out of this host: there they are sent one by one"),
)

_KEY = struct.Struct("=16s16sII2s2s")
_ARRIVAL = struct.Struct(f"={_KEY.size}sIIxxxxqq")
_COUNT = 8
"""Numbers of `struct count`: slot, packets and bytes up, packets and bytes down, dropped, error, when in ns."""

Arrival = tuple[Endpoint, Endpoint, bytes, int]
"""Peer, local, data, stride; `local` is the address that was asked, or the original destination, port 0 and host ""
where it is not told."""


class Passenger(Protocol):
    """A joined flow, as the table sees it. The calls come from the loop."""

    def moved(self, up: int, up_bytes: int, down: int, down_bytes: int, dropped: int, error: int, at: int) -> None:
        """Count datagrams, the last of them at `at` ns; `error` is an errno of the connected socket, 0 for none."""

    def left(self, data: bytes, stride: int) -> None:
        """Send an answer for which the library has no way, such as one in fragments."""


class Mover:
    """The thread of one hub, for all its tables; it ends with the last. It starts with the first flow that is joined.

    broken    why it does not start, "" as long as nothing is known against it
    """

    __slots__ = ("__weakref__", "_events", "_hub", "_library", "_stop", "_tables", "_timer", "broken", "handle")

    def __init__(self, hub: Hub, library: Library) -> None:
        """Make it. Raise OSError."""
        self._hub = hub
        self._library = library
        self._tables: weakref.WeakSet[Joints] = weakref.WeakSet()
        self._timer: asyncio.TimerHandle | None = None
        self.broken = ""
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.handle: int = library.udp_make(self._events)
        if not self.handle:
            os.close(self._events)
            raise OSError("no memory or descriptors for joined flows")
        # Also without `Hub.close`, and never in a fork, which has no such thread.
        self._stop = weakref.finalize(self, _stop, library, self.handle, self._events, os.getpid())
        hub.register(self._events, self._news)
        hub.closing.append(self.close)

    def start(self) -> bool:
        """Start the thread unless it runs; False if it cannot be, for the reason in `broken`."""
        if not self.broken and (error := self._library.udp_start(self.handle)):
            self.broken = f"no thread: {os.strerror(error)}"
        return not self.broken

    def add(self, table: Joints) -> None:
        """Tell a table of its news."""
        self._tables.add(table)

    def remove(self, table: Joints) -> None:
        """Forget a table, which is closed."""
        self._tables.discard(table)
        if not self._tables:
            self.close()

    def _news(self, _: int) -> None:
        try:
            os.eventfd_read(self._events)
        except BlockingIOError:
            pass
        told = self._library.udp_told(self.handle, _DECIDE)
        if told & _COUNTS and self._timer is None:
            self._timer = self._hub.loop.call_later(REFRESH, self._refresh)
        if told & _DECIDE:
            self._collect()

    def _refresh(self) -> None:
        """Bring the counts up to date; the next datagram makes it happen again."""
        self._timer = None
        self._library.udp_told(self.handle, _COUNTS)
        self._collect()

    def _collect(self) -> None:
        for table in list(self._tables):
            table.collect()

    def close(self) -> None:
        """End the thread, and take apart what is still joined."""
        if self._stop.alive:
            for table in list(self._tables):
                self._tables.discard(table)
                table.close()
            if self._timer is not None:
                self._timer.cancel()
            self._hub.forget(self._events)
            if self.close in self._hub.closing:
                self._hub.closing.remove(self.close)
            _movers.pop(self._hub, None)
            self._stop()


_movers: weakref.WeakKeyDictionary[Hub, Mover] = weakref.WeakKeyDictionary()


def _stop(library: Library, handle: int, events: int, process: int) -> None:
    if os.getpid() == process:
        library.udp_stop(handle)
        os.close(events)


class Joints:
    """The flows of one listening socket.

    The mover reads the socket as long as there are any. Otherwise its edges belong to whoever the hub tells; they are
    told of READABLE, too, when something has come that is for nobody who is joined.

    deliver   takes what arrives for nobody who is joined
    """

    __slots__ = (
        "__weakref__",
        "_arrivals",
        "_close",
        "_counts",
        "_deliver",
        "_library",
        "_mover",
        "_numbers",
        "_on_events",
        "_passengers",
        "_places",
        "_readiness",
        "_say",
        "_table",
        "dropped",
    )

    def __init__(
        self,
        mover: Mover,
        library: Library,
        readiness: Readiness,
        deliver: Callable[[Sequence[Arrival]], None],
        say: Callable[[str], object],
        flags: int = 0,
        raw: tuple[int, int] = (-1, -1),
    ) -> None:
        """Join flows of a socket. `raw` are the sockets, of IPv4 and IPv6, for answers to captured datagrams.

        `say` is told what works less well than it could, and why, again and again. Raise OSError.
        """
        v6 = readiness.sock.family == socket.AF_INET6
        table = library.udp_open(mover.handle, readiness.fd, v6, flags, *raw)
        if not table:
            raise OSError("no memory for joined flows")
        self._mover = mover
        self._library = library
        self._readiness = readiness
        self._table: int = table
        self._deliver = deliver
        self._say = say
        self._on_events: OnEvents | None = None
        self._passengers: dict[int, Passenger] = {}
        self.dropped = 0
        counts = (ctypes.c_int64 * (_COUNT * BATCH))()
        arrivals = (ctypes.c_char * (_ARRIVAL.size * BATCH))()
        numbers = (ctypes.c_int64 * 4)()
        self._counts = memoryview(counts).cast("B").cast("q")
        self._arrivals = memoryview(arrivals).cast("B")
        self._numbers = memoryview(numbers).cast("B").cast("q")
        self._places = (ctypes.addressof(counts), ctypes.addressof(arrivals), ctypes.addressof(numbers))
        self._close = weakref.finalize(self, _close, library, table, mover)  # the mover goes after its tables
        mover.add(self)

    def __len__(self) -> int:
        return len(self._passengers)

    def join(self, peer: Endpoint, local: Endpoint, descriptor: int, passenger: Passenger) -> int | None:
        """Pass what comes from `peer` to the connected socket `descriptor`, and back; return the flow's slot.

        None if that cannot be. The descriptor must not be watched by any hub, and not closed before `part`.
        """
        if not self._close.alive:
            return None
        if not self._mover.start():
            self._say(f"engine native gives way to copy: datagrams: {self._mover.broken}")
            return None
        slot: int = self._library.udp_join(self._table, _encode(peer, local), descriptor)
        if slot < 0:
            return None
        if not self._passengers:
            readiness = self._readiness
            readiness.register()
            self._on_events = readiness.hub.surrender(readiness.fd)
        self._passengers[slot] = passenger
        return slot

    def part(self, slot: int) -> None:
        """Take a flow apart; it is told what it has moved."""
        passenger = self._passengers.pop(slot, None)
        if passenger is None or not self._close.alive:
            return
        self._library.udp_part(self._table, slot, self._places[0])
        _, *moved = self._counts[:_COUNT].tolist()
        readiness = self._readiness
        if not self._passengers and self._on_events is not None and readiness.fd >= 0:
            readiness.hub.register(readiness.fd, self._on_events)
            self._on_events = None
        passenger.moved(*moved)

    def up(self) -> bool:
        """Deliver a batch of what has come for nobody who is joined; return whether there may be more."""
        if not self._close.alive:
            return False
        more = not self._passengers and bool(self._library.udp_up(self._table))
        self._take()
        return more and self._close.alive

    def collect(self) -> None:
        """Bring the counts of all flows up to date; deliver what has arrived."""
        if self._take() and self._on_events is not None:
            self._on_events(READABLE)

    def _take(self) -> bool:
        """Take the library's news; return whether something has been delivered."""
        answers: list[tuple[int, bytes, int]] = []
        arrived: list[Arrival] = []
        passengers = self._passengers
        while self._close.alive:
            self._library.udp_news(self._table, *self._places)
            counts, arrivals, dropped, lacks = self._numbers
            self.dropped += dropped
            if lacks:
                for bit, what in _LACKS:
                    if lacks & bit:
                        self._say(what)
            for index in range(arrivals):
                key, size, stride, slot, address = _ARRIVAL.unpack_from(self._arrivals, index * _ARRIVAL.size)
                data = ctypes.string_at(address, size)
                if slot < 0:
                    arrived.append((*_decode(key), data, stride))
                else:
                    answers.append((slot, data, stride))
            if counts:
                numbers = iter(self._counts[: counts * _COUNT].tolist())
                for slot, *moved in zip(*(numbers,) * _COUNT, strict=True):
                    if (passenger := passengers.get(slot)) is not None:
                        passenger.moved(*moved)
            if counts < BATCH and arrivals < BATCH:
                break
        for slot, data, stride in answers:
            if (passenger := passengers.get(slot)) is not None:
                passenger.left(data, stride)
        for slot in {slot for slot, _, _ in answers}:
            if slot in passengers and self._close.alive:
                self._library.udp_resume(self._table, slot)
        if arrived:
            self._deliver(arrived)
        return bool(arrived)

    def close(self) -> None:
        """Take all apart; the sockets stay their owners'. Idempotent."""
        if self._close.alive:
            self._passengers.clear()
            self._close()
            self._mover.remove(self)


def _close(library: Library, table: int, _: Mover) -> None:
    library.udp_close(table)


def joints(
    readiness: Readiness,
    deliver: Callable[[Sequence[Arrival]], None],
    say: Callable[[str], object],
    flags: int = 0,
    raw: tuple[int, int] = (-1, -1),
) -> Joints | None:
    """Return a table for a listening socket, None where the library is not there."""
    library, reason = load()
    hub = readiness.hub
    if library is None:
        if reason != OFF:
            hub.give_way("native", "copy", f"datagrams: {reason}")
        return None
    try:
        mover = _movers.get(hub)
        if mover is None:
            mover = _movers[hub] = Mover(hub, library)
        return Joints(mover, library, readiness, deliver, say, flags, raw)
    except OSError as exc:
        say(f"engine native gives way to copy: datagrams: {exc}")
        return None


def _packed(host: str) -> tuple[bytes, int]:
    address, _, zone = host.partition("%")
    ip = parse_ip(address)
    if ip is None:
        return bytes(16), 0
    packed = ip.packed if ip.version == 6 else b"\0" * 10 + b"\xff\xff" + ip.packed
    return packed, int(zone or 0)


def _encode(peer: Endpoint, local: Endpoint) -> bytes:
    """Return `struct key` of datagrams.c: addresses, zones, ports big endian."""
    (here, here_zone), (there, there_zone) = _packed(local.host), _packed(peer.host)
    port, local_port = peer.port.to_bytes(2, "big"), local.port.to_bytes(2, "big")
    return _KEY.pack(there, here, there_zone, here_zone, port, local_port)


@lru_cache(maxsize=16384)
def _decode(key: bytes) -> tuple[Endpoint, Endpoint]:
    there, here, there_zone, here_zone, port, local_port = _KEY.unpack(key)
    return _endpoint(there, there_zone, port), _endpoint(here, here_zone, local_port)


def _endpoint(packed: bytes, zone: int, port: bytes) -> Endpoint:
    number = int.from_bytes(port, "big")
    if not any(packed):
        return Endpoint("", number)
    return Endpoint.from_sockaddr((socket.inet_ntop(socket.AF_INET6, packed), number, 0, zone))
