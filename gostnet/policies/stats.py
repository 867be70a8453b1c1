"""Statistics of services and of their clients, and the books that keep them. Rows E01-E08.

What a service counts are the bytes on its clients' sockets, dialogue and TLS included; what a client counts are those
that were relayed for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..core.address import Endpoint
from ..core.errors import EndOfStream, IdleTimeout, PolicyDenied, QuotaDenied, RateDenied
from ..core.flow import Flow, Shapers
from ..core.packets import Packets
from ..core.sockets import SocketStream
from .board import Board, Counts, Place
from .observer import Events, Reporter
from .quota import Quota
from .recorders import Records

TICK: Final = 1.0
"""Seconds between two looks at what runs: so long a quota may be overdrawn by what engines do not ask leave for."""
MAX_CLIENTS: Final = 65536
"""Client ids that are counted; beyond it the one that came first and has nothing open is forgotten."""


@dataclass(slots=True)
class Stats:
    """Counters with GOST's meanings.

    total, current    connections
    received, sent    bytes from and to clients
    errors            connections that ended with an error of the service: no refusal, no end that a peer chose
    place             where one of several workers writes them for all to see
    """

    total: int = 0
    current: int = 0
    received: int = 0
    sent: int = 0
    errors: int = 0
    place: Place | None = field(default=None, compare=False, repr=False)

    def publish(self) -> None:
        """Write them where they are to be seen."""
        if self.place is not None:
            self.place.write((self.total, self.current, self.received, self.sent, self.errors))

    def take_over(self, counts: Counts) -> None:
        """Set all of them."""
        self.total, self.current, self.received, self.sent, self.errors = counts

    def place_on(self, board: Board, service: str, client: str | None = None) -> bool:
        """Have them written to a board, if there is room."""
        if self.place is None:
            self.place = board.place(service, client)
            self.publish()
        return self.place is not None

    def hide(self) -> None:
        """Have them written nowhere any more."""
        place, self.place = self.place, None
        if place is not None:
            place.free()

    def snapshot(self) -> dict[str, int]:
        """Return them with GOST's names."""
        return {
            "totalConns": self.total,
            "currentConns": self.current,
            "inputBytes": self.received,
            "outputBytes": self.sent,
            "totalErrs": self.errors,
        }


class Reading:
    """What one reader of counters has seen of them.

    With `reset` the bytes are those since its last reading; other readers are not disturbed by it.
    """

    __slots__ = ("_before", "_reset")

    def __init__(self, reset: bool = False) -> None:
        self._reset = reset
        self._before: dict[str, dict[str, int]] = {}

    def changed(self, key: str, stats: Stats) -> dict[str, int] | None:
        """Return the counters of `key`, None if nothing has happened since the last time."""
        now = stats.snapshot()
        before = self._before.get(key)
        if before == now or (before is None and not any(now.values())):
            return None
        self._before[key] = now
        if not self._reset or before is None or now["totalConns"] < before["totalConns"]:
            return now  # who was forgotten in between begins again
        return {**now, **{name: now[name] - before[name] for name in ("inputBytes", "outputBytes")}}

    def keep(self, keys: Mapping[str, object]) -> None:
        """Forget who is not in `keys`."""
        for key in self._before.keys() - keys.keys():
            del self._before[key]

    def resetting(self, reset: bool) -> Reading:
        """Let it reset, or not, from now on."""
        self._reset = reset
        return self


class ServiceBooks:
    """The books of one service: what its connections move, for status, observers, records and quotas.

    layered    the sockets carry TLS or the like, so their bytes are not those that a handler sees
    prefaced   who a client is will be announced
    shown      the service's status has the counters
    stats      of the service
    clients    by client id, "" for those without; None where nobody wants them
    readings   what its readers have seen, by their names
    """

    def __init__(
        self,
        service: str,
        *,
        records: Records | None = None,
        quotas: Sequence[Quota] = (),
        by_client: bool = False,
        reporters: Sequence[Reporter] = (),
        layered: bool = False,
        prefaced: bool = False,
        shown: bool = False,
        before: ServiceBooks | None = None,
        board: Board | None = None,
    ) -> None:
        """Go on with the counts of `before`, the books of the service in the configuration before.

        `board` is where one of several workers shows its counts.
        """
        self.service = service
        self.stats: Stats = Stats() if before is None else before.stats
        self.clients: dict[str, Stats] | None = None
        if by_client:
            self.clients = before.clients if before is not None and before.clients is not None else {}
        self.quotas = tuple(quotas)
        self._records = records
        self._layered = layered
        self._prefaced = prefaced
        self._shown = shown
        self._reporters = tuple(reporters)
        self._open: dict[int, _Entry] = {} if before is None else before._open
        self.readings: dict[str, Reading] = {} if before is None else before.readings
        self._board = board
        if board is not None:
            self.stats.place_on(board, service)
            for name, stats in (self.clients or {}).items():
                stats.place_on(board, service, name)

    # ---- connections ---------------------------------------------------------------------------
    def enter(self, flow: Flow, conn: Any) -> _Entry:
        """Note a connection that was accepted."""
        stats = self.stats
        stats.total += 1
        stats.current += 1
        if stats.place is not None:
            stats.publish()
        entry = _Entry(self, flow, conn)
        self._open[id(entry)] = entry
        if self._records is not None:
            self._records.accepted(flow, (entry.remote, entry.local))
            if not self._prefaced:
                self._records.came(flow)
        if self.quotas:
            # A device has one flow for everything, which must outlive a reset: its packets are dropped instead.
            cuts = not isinstance(conn, Packets)
            shapers = flow.shapers = Shapers()
            for quota in self.quotas:
                quota.shape(shapers, cuts=cuts)
        return entry

    def announced(self, flow: Flow) -> None:
        """Record who a client is."""
        if self._records is not None:
            self._records.came(flow)

    def become(self, state: str, message: str) -> None:
        """Tell the observer of the service's state."""
        for reporter in self._reporters:
            reporter.status(self.service, state, message)

    def client(self, name: str) -> Stats:
        """Return the counters of a client id."""
        assert self.clients is not None
        stats = self.clients.get(name)
        if stats is None:
            if len(self.clients) >= MAX_CLIENTS:
                self._forget_one(self.clients)
            stats = self.clients[name] = Stats()
            if self._board is not None and not stats.place_on(self._board, self.service, name):
                self._forget_one(self.clients)
                stats.place_on(self._board, self.service, name)
        return stats

    def _forget_one(self, clients: dict[str, Stats]) -> None:
        """Forget the client that came first and has nothing open; the newest has not begun."""
        idle = next((key for key, value in clients.items() if not value.current and value.total), None)
        if idle is not None:
            clients.pop(idle).hide()

    def hide(self) -> None:
        """Show the counts to nobody any more: the service has gone, or nobody asks for them."""
        self._board = None
        for stats in (self.stats, *(self.clients or {}).values()):
            stats.hide()

    def reading(self, name: str, reset: bool) -> Reading:
        """Return what the reader `name` has seen, in the configurations before this one, too."""
        return self.readings.setdefault(name, Reading()).resetting(reset)

    def status(self) -> Mapping[str, object]:
        """Return the counters, if they are wanted, and the quotas."""
        shown: dict[str, object] = {}
        if self._shown:
            self.settle()
            shown["stats"] = self.stats.snapshot()
        if self.quotas:
            if any(quota.blocked for quota in self.quotas):
                shown["stoppedByLimit"] = True
            shown["quotas"] = [{"name": quota.name, **quota.snapshot()} for quota in self.quotas]
        return shown

    # ---- reading -------------------------------------------------------------------------------
    def settle(self) -> None:
        """Bring all counters up to date with what runs, and cut what a quota that is used up does not allow."""
        for entry in tuple(self._open.values()):
            entry.settle()
        self.stats.publish()
        used_up = [quota for quota in self.quotas if quota.blocked]
        if used_up:
            error = QuotaDenied(f"quota {used_up[0].name!r} is used up")
            for entry in tuple(self._open.values()):
                entry.cut(error)

    def service_events(self, reading: Reading) -> Events:
        """Return what has changed of the service, as events for observers."""
        self.settle()
        stats = reading.changed("", self.stats)
        return [] if stats is None else [{"kind": "service", "service": self.service, "type": "stats", "stats": stats}]

    def client_events(self, reading: Reading) -> Events:
        """Return what has changed of clients."""
        self.settle()
        events: Events = []
        for name, stats in (self.clients or {}).items():
            shown = reading.changed(name, stats)
            if shown is not None:
                event: dict[str, Any] = {"kind": "handler", "service": self.service}
                if name:
                    event["client"] = name
                events.append({**event, "type": "stats", "stats": shown})
        reading.keep(self.clients or {})
        return events

    async def load(self) -> bool:
        """There is nothing to wait for."""
        return True

    async def run(self) -> None:
        """Look after the quotas until cancelled; return at once without one."""
        while self.quotas:
            await asyncio.sleep(TICK)
            self.settle()


class _Entry:
    """One connection in the books."""

    __slots__ = (
        "_books",
        "_cancel",
        "_charged",
        "_client",
        "_conn",
        "_flow",
        "_meter",
        "_moved",
        "local",
        "remote",
    )

    def __init__(self, books: ServiceBooks, flow: Flow, conn: Any) -> None:
        self._books = books
        self._flow = flow
        self._conn = conn
        self._cancel: Callable[[], object] | None = None
        self._client: Stats | None = None
        self._moved = (0, 0)
        self._meter = (0, 0)
        self._charged = [(0, 0)] * len(books.quotas)
        self.local: Endpoint = getattr(conn, "local", flow.ingress)
        remote = getattr(conn, "remote", None) or getattr(conn, "peer", None)
        self.remote: Endpoint = remote or flow.client

    def running(self, cancel: Callable[[], object]) -> None:
        """Take what ends the connection."""
        self._cancel = cancel

    def moved(self) -> tuple[int, int]:
        """Return the bytes that came from the client, and those that went to it."""
        conn, meter = self._conn, self._flow.meter
        if isinstance(conn, SocketStream):
            # UDP of a SOCKS client passes by its connection.
            return max(conn.received, meter.up), max(conn.sent, meter.down)
        return meter.up, meter.down

    def settle(self) -> None:
        """Add what has moved since the last time to the counters."""
        books, flow = self._books, self._flow
        moved = self.moved()
        if moved != self._moved:
            books.stats.received += moved[0] - self._moved[0]
            books.stats.sent += moved[1] - self._moved[1]
            self._moved = moved
        if books.clients is not None and (flow.connected or flow.user):
            client = self._client
            if client is None:
                client = self._client = books.client(flow.user)
                client.total += 1
                client.current += 1
                client.publish()
            relayed = (flow.meter.up, flow.meter.down)
            if relayed != self._meter:
                client.received += relayed[0] - self._meter[0]
                client.sent += relayed[1] - self._meter[1]
                client.publish()
                self._meter = relayed
        for index, quota in enumerate(books.quotas):
            self._charged[index] = quota.settle(flow, moved, self._charged[index])

    def cut(self, error: QuotaDenied) -> None:
        """End the connection, unless it is a device's."""
        cancel, self._cancel = self._cancel, None
        if cancel is not None and not isinstance(self._conn, Packets):
            self._flow.error = error
            cancel()

    def leave(self, *, refused: bool = False) -> None:
        """Note the end."""
        books, flow = self._books, self._flow
        self.settle()
        del books._open[id(self)]
        books.stats.current -= 1
        client = self._client
        if client is not None:
            client.current -= 1
            client.publish()
        if not refused and is_fault(flow.error):
            books.stats.errors += 1
        books.stats.publish()
        records = books._records
        if records is not None:
            if not refused or isinstance(flow.error, RateDenied):
                records.ended(flow, (flow.meter.up, flow.meter.down) if books._layered else self._moved)
            else:
                flow.details = None


def is_fault(error: BaseException | None) -> bool:
    """Tell whether an error counts as one of the service: no refusal, no end of a client, no time that has passed."""
    ends = PolicyDenied | EndOfStream | IdleTimeout | TimeoutError | asyncio.CancelledError
    return error is not None and not isinstance(error, ends)
