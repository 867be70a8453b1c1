"""One datagram socket that serves many peers: a table of sessions, each of which looks like a socket of its own."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ..core.address import Endpoint
from ..core.datagrams import Datagram, Datagrams
from ..core.fiber import Gate
from ..core.hub import Hub, current_hub

K = TypeVar("K")

Answer = Callable[[Sequence[Datagram]], None]
"""Sends datagrams to a session's peer. Never blocks: what the socket does not take is dropped."""


class Session(Datagrams, Generic[K]):
    """The datagrams of one peer. `receive` gives what came from it, `send` goes to it.

    single    end after the first answer: GOST's default for udp listeners without `keepalive`
    """

    __slots__ = ("_answer", "_gate", "_queue", "_table", "ended", "key", "last", "peer", "single")

    def __init__(
        self, table: Sessions[K], key: K, peer: Endpoint, local: Endpoint, answer: Answer, single: bool
    ) -> None:
        super().__init__(local)
        self.key = key
        self.peer = peer
        self.single = single
        self.ended = False
        self.last = 0.0
        self._table = table
        self._answer = answer
        self._queue: deque[Datagram] = deque()
        self._gate: Gate | None = None

    def offer(self, datagram: Datagram) -> bool:
        """Queue a datagram that came from the peer; False if the queue is full and it is dropped."""
        if self.ended or len(self._queue) >= self._table.queue_size:
            return False
        self._queue.append(datagram)
        gate = self._gate
        if gate is not None:
            self._gate = None
            gate.open()
        return True

    async def receive(self) -> Sequence[Datagram]:
        while not self._queue:
            if self.ended:
                return ()
            gate = self._gate = Gate(self._table.hub)
            await gate.wait()
        batch = tuple(self._queue)
        self._queue.clear()
        return batch

    async def send(self, batch: Sequence[Datagram]) -> None:
        if self.ended:
            return
        self.last = self._table.now()
        self._answer([Datagram(datagram.data, self.peer, datagram.stride) for datagram in batch])
        if self.single:
            self.end()

    def end(self) -> None:
        """End the session: `receive` returns what is queued, then the end. Idempotent."""
        if self.ended:
            return
        self.ended = True
        self._table.forget(self)
        gate, self._gate = self._gate, None
        if gate is not None:
            # Maybe inside the very task that waits elsewhere: the waiter goes on in the next turn.
            self._table.hub.call_ready(gate.open)

    async def aclose(self) -> None:
        self.end()

    def abort(self) -> None:
        self.end()


class Sessions(Generic[K]):
    """The table: bounded, oldest-idle first, swept by one timer.

    ttl          seconds after which a session without traffic ends
    queue_size   datagrams held for a session that does not read
    limit        sessions at once; the one idle longest ends for a new one
    """

    def __init__(self, ttl: float, queue_size: int = 128, limit: int = 65536) -> None:
        self.ttl = ttl
        self.queue_size = queue_size
        self.limit = limit
        self.dropped = 0
        self.hub: Hub = current_hub()
        self.now = self.hub.loop.time
        self._table: OrderedDict[K, Session[K]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._table)

    def find(self, key: K) -> Session[K] | None:
        """Return the live session of `key` and note that it is in use."""
        session = self._table.get(key)
        if session is not None:
            session.last = self.now()
            self._table.move_to_end(key)
        return session

    def open(self, key: K, peer: Endpoint, local: Endpoint, answer: Answer, *, single: bool = False) -> Session[K]:
        """Make the session of `key`."""
        if len(self._table) >= self.limit:
            next(iter(self._table.values())).end()
        session = Session(self, key, peer, local, answer, single)
        session.last = self.now()
        self._table[key] = session
        if self._timer is None:
            self._timer = self.hub.loop.call_later(self.ttl, self._sweep)
        return session

    def forget(self, session: Session[K]) -> None:
        """Take a session out of the table."""
        if self._table.get(session.key) is session:
            del self._table[session.key]

    def _sweep(self) -> None:
        """End what has been idle for `ttl`; the table is in the order of last use by the peer, nearly."""
        self._timer = None
        limit = self.now() - self.ttl
        for session in list(self._table.values()):
            if session.last <= limit:
                session.end()
        if self._table:
            oldest = min(session.last for session in self._table.values())
            self._timer = self.hub.loop.call_at(max(oldest + self.ttl, self.now() + self.ttl / 4), self._sweep)

    def close(self) -> None:
        """End all sessions."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for session in list(self._table.values()):
            session.end()
