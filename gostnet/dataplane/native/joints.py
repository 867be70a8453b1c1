"""Joined UDP flows, as datagrams.c passes them: peers of a listening socket with a connected socket each."""

from __future__ import annotations

import ctypes
import socket
import struct
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Final, Protocol

from ...core.address import Endpoint, parse_ip
from ...core.hub import Hub
from .library import Library, load

BATCH: Final = 64
"""Datagrams of one call of the library."""

ROUNDS: Final = 8
"""Calls in one turn of the loop; then the others have theirs."""

CAPTURED: Final = 1
PINNED: Final = 2

_KEY = struct.Struct("=16s16sII2s2s")
_ARRIVAL = struct.Struct(f"={_KEY.size}sIIxxxxqq")
_RUN = 5
"""Numbers of `struct run`: slot, packets, bytes, dropped, error."""


class Passenger(Protocol):
    """A joined flow, as the table sees it. The calls come from the loop."""

    def went_up(self, packets: int, size: int, dropped: int, error: int) -> None:
        """Count what has gone to the target; `error` is an errno that the connected socket has told, 0 for none."""

    def came_down(self, packets: int, size: int, dropped: int, error: int) -> None:
        """Count answers."""

    def left(self, data: bytes, stride: int) -> None:
        """Send an answer for which the library has no way, such as one in fragments."""


class Joints:
    """The flows of one listening socket.

    deliver   takes (peer, local, data, stride) of what arrives for nobody who is joined; `local` is the address that
              was asked, or the original destination, port 0 and host "" where it is not told
    """

    __slots__ = (
        "__weakref__",
        "_arrivals",
        "_close",
        "_counts",
        "_deliver",
        "_descriptor",
        "_hub",
        "_library",
        "_passengers",
        "_places",
        "_runs",
        "_table",
    )

    def __init__(
        self,
        hub: Hub,
        library: Library,
        sock: socket.socket,
        deliver: Callable[[Endpoint, Endpoint, bytes, int], None],
        flags: int = 0,
        raw: tuple[int, int] = (-1, -1),
    ) -> None:
        """Join flows of `sock`. `raw` are the sockets, of IPv4 and IPv6, for answers to captured datagrams.

        Raise OSError.
        """
        table = library.udp_open(sock.fileno(), sock.family == socket.AF_INET6, flags, *raw)
        if not table:
            raise OSError("no memory for joined flows")
        self._hub = hub
        self._library = library
        self._table: int = table
        self._deliver = deliver
        self._passengers: dict[int, Passenger] = {}
        runs = (ctypes.c_int64 * (_RUN * BATCH))()
        arrivals = (ctypes.c_char * (_ARRIVAL.size * BATCH))()
        counts = (ctypes.c_int32 * 2)()
        self._runs = memoryview(runs).cast("B").cast("q")
        self._arrivals = memoryview(arrivals).cast("B")
        self._counts = memoryview(counts).cast("B").cast("i")
        self._places = (ctypes.addressof(runs), ctypes.addressof(arrivals), ctypes.addressof(counts))
        self._close = weakref.finalize(self, library.udp_close, table)
        self._descriptor: int = library.udp_descriptor(table)
        hub.register(self._descriptor, self._on_events)

    def __len__(self) -> int:
        return len(self._passengers)

    def join(self, peer: Endpoint, local: Endpoint, descriptor: int, passenger: Passenger) -> int | None:
        """Pass what comes from `peer` to the connected socket `descriptor`, and back; return the flow's slot.

        None if that cannot be. The descriptor must not be watched by any hub, and not closed before `part`.
        """
        if not self._close.alive:
            return None
        slot: int = self._library.udp_join(self._table, _encode(peer, local), descriptor)
        if slot < 0:
            return None
        self._passengers[slot] = passenger
        return slot

    def part(self, slot: int) -> None:
        """Take a flow apart."""
        if self._passengers.pop(slot, None) is not None and self._close.alive:
            self._library.udp_part(self._table, slot)

    def up(self) -> bool:
        """Pass one batch of the listening socket; return whether there may be more."""
        if not self._close.alive:
            return False
        count: int = self._library.udp_up(self._table, *self._places)
        runs, arrivals = self._counts
        taken = self._taken(arrivals) if arrivals else ()
        if runs:
            numbers = iter(self._runs[: runs * _RUN].tolist())
            passengers = self._passengers
            for slot, packets, size, dropped, error in zip(*(numbers,) * _RUN, strict=True):
                if (passenger := passengers.get(slot)) is not None:  # the one before may have ended it
                    passenger.went_up(packets, size, dropped, error)
        for key, payload, stride, _ in taken:
            self._deliver(*_decode(key), payload, stride)
        return count == BATCH

    def _taken(self, count: int) -> list[tuple[bytes, bytes, int, int]]:
        found = []
        for index in range(count):
            key, size, stride, slot, address = _ARRIVAL.unpack_from(self._arrivals, index * _ARRIVAL.size)
            found.append((key, ctypes.string_at(address, size), stride, slot))
        return found

    def _on_events(self, _: int) -> None:
        """Pass answers, in turns."""
        down, table, places, passengers = self._library.udp_down, self._table, self._places, self._passengers
        for _ in range(ROUNDS):
            if not self._close.alive:
                return
            more = down(table, *places)
            runs, arrivals = self._counts
            left = self._taken(arrivals) if arrivals else ()
            numbers = iter(self._runs[: runs * _RUN].tolist())
            for slot, packets, size, dropped, error in zip(*(numbers,) * _RUN, strict=True):
                if (passenger := passengers.get(slot)) is not None:
                    passenger.came_down(packets, size, dropped, error)
            for _key, payload, stride, slot in left:
                if (passenger := passengers.get(slot)) is not None:
                    passenger.left(payload, stride)
            if not more:
                return
        self._hub.call_ready(self._again)

    def _again(self) -> None:
        if self._close.alive:
            self._on_events(0)

    def close(self) -> None:
        """Take all apart; the sockets stay their owners'. Idempotent."""
        if self._close.alive:
            self._hub.forget(self._descriptor)
            self._passengers.clear()
            self._close()


def joints(
    hub: Hub,
    sock: socket.socket,
    deliver: Callable[[Endpoint, Endpoint, bytes, int], None],
    flags: int = 0,
    raw: tuple[int, int] = (-1, -1),
) -> Joints | None:
    """Return a table for `sock`, None where the library is not there."""
    library, _ = load()
    if library is None:
        return None
    try:
        return Joints(hub, library, sock, deliver, flags, raw)
    except OSError:
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
