"""One datagram socket that serves many peers: a table of sessions, each of which looks like a socket of its own."""

from __future__ import annotations

import asyncio
import errno
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from ..core.address import Endpoint
from ..core.datagrams import Datagram, Datagrams
from ..core.errors import DialRefused
from ..core.fiber import Gate
from ..core.flow import Flow
from ..core.hub import READABLE, Hub, current_hub
from ..core.log import Logger, quiet
from ..core.sockets import Readiness
from ..core.stream import Buffer
from ..core.udp_socket import UdpSocket
from .native.joints import ROUNDS, Joints

K = TypeVar("K")
T = TypeVar("T")

Answer = Callable[[Sequence[Datagram]], None]
"""Sends datagrams to a session's peer. Never blocks: what the socket does not take is dropped."""

LIMIT: Final = 65536
"""Sessions of one listener at once, at most: each has a descriptor, and a quarter of ours is left for others."""

_SWEEP: Final = 64
"""Sessions ended in one turn of the loop: the end of a flow takes some 10 us."""

_LOOK: Final = 64
"""Sessions that are looked at to find one that ends for a new one."""

_GRAIN: Final = 64
"""Parts of the idle time: the timer runs no more often than that."""


class Session(Datagrams, Generic[K]):
    """The datagrams of one peer. `receive` gives what came from it, `send` goes to it.

    asked     what the table's joints know the session by, beside its peer
    single    end after the first answer: GOST's default for udp listeners without `keepalive`
    """

    __slots__ = (
        "_answer",
        "_flow",
        "_gate",
        "_queue",
        "_slot",
        "_table",
        "_upstream",
        "asked",
        "ended",
        "key",
        "last",
        "peer",
        "refused",
        "single",
    )

    def __init__(
        self, table: Sessions[K], key: K, peer: Endpoint, local: Endpoint, answer: Answer, single: bool
    ) -> None:
        super().__init__(local)
        self.key = key
        self.peer = peer
        self.asked: Endpoint | None = None
        self.single = single
        self.ended = False
        self.refused = False
        self.last = 0.0
        self._table = table
        self._answer = answer
        self._queue: list[Datagram] | None = None
        self._gate: Gate | None = None
        self._flow: Flow | None = None
        self._upstream: UdpSocket | None = None
        self._slot = -1

    def offer(self, datagram: Datagram) -> bool:
        """Queue a datagram that came from the peer; False if the queue is full and it is dropped."""
        if self.ended:
            return False
        queue = self._queue
        if queue is not None and len(queue) >= self._table.queue_size:
            self.wake()  # whoever waits until the batch is over takes it now
            queue = self._queue
            if queue is not None:
                return False
        if queue is None:
            self._queue = [datagram]
            self._table.has_some(self)
        else:
            queue.append(datagram)
        return True

    def wake(self) -> None:
        """Pass on what is queued, or let who waits for it go on."""
        if self._upstream is None:
            self._open()
        elif self._queue is not None:
            batch, self._queue = self._queue, None
            self._send_up(batch)

    def _open(self) -> None:
        gate = self._gate
        if gate is not None:
            self._gate = None
            self._table.hub.call_outside(gate.open)

    async def receive(self) -> Sequence[Datagram]:
        while True:
            batch = self._queue
            if batch is not None:
                self._queue = None
                return batch
            if self.ended:
                return ()
            gate = self._gate = Gate(self._table.hub)
            await gate.wait()

    async def send(self, batch: Sequence[Datagram]) -> None:
        if self.ended:
            return
        self._table.touch(self)
        self._answer([Datagram(datagram.data, self.peer, datagram.stride) for datagram in batch])
        if self.single:
            self.end()

    # ---- joined ----------------------------------------------------------------------------------
    async def joined(self, flow: Flow, upstream: UdpSocket, idle: float, native: bool) -> None:
        """Pass the datagrams to and from a connected socket until the session ends.

        If `native`, the library does it where it can; otherwise the sockets' edges do. Return after `idle` seconds (0:
        never) without a datagram, too. `flow` takes the counts. Raise DialRefused if nobody listens at the target.
        """
        joints = self._table.joints if native and self.asked is not None and not self.single else None
        while self._queue and not self.ended:  # what came first goes first
            batch = await self.receive()
            await upstream.send(batch)
            flow.meter.up += sum(len(datagram.data) for datagram in batch)
            flow.packets += len(batch)
        if self.ended:
            return
        readiness = upstream.readiness
        slot = None
        if joints is not None and self.asked is not None:
            if readiness.registered:
                readiness.hub.surrender(readiness.fd)
                readiness.registered = False
            slot = joints.join(self.peer, self.asked, readiness.fd, self)
        self._flow, self._upstream = flow, upstream
        if slot is not None:
            self._slot = slot
            flow.engine = "native: datagrams by the batch"
        gate = self._gate = Gate(self._table.hub)
        timer = self._idle_timer(idle, gate) if idle else None
        try:
            if slot is None:
                if readiness.registered:
                    readiness.hub.call_ready(self._take_answers)  # nobody says again that there are any
                readiness.claim(self._on_answers)
            await gate.wait()
        finally:
            self._gate = None
            if slot is None:
                readiness.unclaim()
            self._part()  # which tells the last counts
            self._flow = self._upstream = None
            if timer is not None:
                timer[0].cancel()
        if self.refused:
            raise DialRefused(f"nobody listens at {upstream.peer}")

    def _on_answers(self, events: int) -> None:
        if events & READABLE:
            self._take_answers()

    def _take_answers(self) -> None:
        """Pass on what has come from the target, in turns with the others."""
        for _ in range(ROUNDS):
            upstream, flow = self._upstream, self._flow
            if self.ended or upstream is None or flow is None or upstream.readiness.fd < 0:
                return
            batch = upstream.receive_now()
            if upstream.refused:
                upstream.refused = False
                self._note(errno.ECONNREFUSED, flow)
            if not batch:
                return
            size = 0
            for datagram in batch:
                size += len(datagram.data)
                datagram.peer = self.peer
            self._answer(batch)
            self.moved(0, 0, len(batch), size, 0, 0, 0)
            if self.single:
                self.end()
                return
            if upstream.readiness.drained:
                return
        self._table.hub.call_ready(self._take_answers)

    def _part(self) -> None:
        joints, slot = self._table.joints, self._slot
        self._slot = -1
        if slot >= 0 and joints is not None:
            joints.part(slot)

    def _idle_timer(self, idle: float, gate: Gate) -> list[asyncio.TimerHandle]:
        loop = self._table.hub.loop

        def look() -> None:
            self._table.collect()
            left = self.last + idle - self._table.now()
            if left <= 0:
                gate.open()
            else:
                timers[0] = loop.call_later(left, look)

        timers = [loop.call_later(idle, look)]
        return timers

    def _send_up(self, batch: Sequence[Datagram]) -> None:
        """Send what the library has not."""
        upstream, flow = self._upstream, self._flow
        if upstream is None or flow is None or upstream.readiness.fd < 0:
            return
        before = upstream.dropped
        upstream.send_now(batch)
        size = sum(len(datagram.data) for datagram in batch)
        self.moved(len(batch), size, 0, 0, upstream.dropped - before, 0, 0)
        if upstream.refused:
            upstream.refused = False
            self._note(errno.ECONNREFUSED, flow)

    def moved(self, up: int, up_bytes: int, down: int, down_bytes: int, dropped: int, error: int, at: int) -> None:
        """Count what the joint has passed."""
        flow = self._flow
        if flow is None:
            return
        flow.meter.up += up_bytes
        flow.meter.down += down_bytes
        flow.packets += up + down
        self._table.dropped += dropped
        if up or down or dropped:
            self._table.touch(self, at * 1e-9 if at else 0.0)
        if error:
            self._note(error, flow)

    def left(self, data: bytes, stride: int) -> None:
        """Answer what the joint could not."""
        flow = self._flow
        if flow is not None:
            flow.meter.down += len(data)
            flow.packets += -(-len(data) // stride) if stride else 1
            self._answer((Datagram(data, self.peer, stride),))
            self._table.touch(self)

    def _note(self, error: int, flow: Flow) -> None:
        """End a flow whose target's host says that nobody is there, if it never was: a server may be restarting."""
        if error == errno.ECONNREFUSED and not flow.meter.down:
            self.refused = True
            self._open()

    # ---- the end ---------------------------------------------------------------------------------
    def end(self) -> None:
        """End the session: `receive` returns what is queued, then the end. Idempotent."""
        if self.ended:
            return
        self.ended = True
        self._table.forget(self)
        self._part()
        gate, self._gate = self._gate, None
        if gate is not None:
            # Maybe inside the very task that waits elsewhere: the waiter goes on in the next turn.
            self._table.hub.call_ready(gate.open)

    async def aclose(self) -> None:
        self.end()

    def abort(self) -> None:
        self.end()


class Sessions(Generic[K]):
    """The table: bounded, in the order of last use, swept by one timer, which runs while there are sessions only.

    Where it is full, a session ends for each new one: one of a client that has more than its share of the table, the
    new one's own before others; without such a client the one that is idle longest.

    ttl          seconds after which a session without traffic either way ends
    queue_size   datagrams held for a session that does not read
    limit        sessions at once, 0 for as many as descriptors allow
    dropped      datagrams that sessions have not taken, or sockets not sent
    joints       what passes datagrams of joined sessions, None where the native library is not there
    """

    def __init__(self, ttl: float, queue_size: int = 128, limit: int = 0, log: Logger | None = None) -> None:
        self.ttl = ttl
        self._log = log or quiet()
        self._said: set[str] = set()
        self._full = False
        self._clients: dict[str, dict[K, Session[K]]] = {}
        self._greatest = ""
        self.queue_size = queue_size
        self.limit = limit or min(LIMIT, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4))
        self.dropped = 0
        self.joints: Joints | None = None
        self.hub: Hub = current_hub()
        self.now = self.hub.loop.time
        self._grain = ttl / _GRAIN
        self._table: OrderedDict[K, Session[K]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._waking: list[Session[K]] | None = None

    def __len__(self) -> int:
        return len(self._table)

    def find(self, key: K) -> Session[K] | None:
        """Return the live session of `key` and note that it is in use."""
        session = self._table.get(key)
        if session is not None:
            self.touch(session)
        return session

    def touch(self, session: Session[K], at: float = 0.0) -> None:
        """Note that a session is in use, or was at a moment of the loop's time."""
        session.last = at or self.now()
        if not session.ended:
            self._table.move_to_end(session.key)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Inside, sessions are given what has arrived; who waits for it goes on at the end, with all of it."""
        waking = self._waking = []
        try:
            yield
        finally:
            self._waking = None
            for session in waking:
                session.wake()

    def has_some(self, session: Session[K]) -> None:
        """Let who waits for a session's datagrams go on, now or at the end of the batch."""
        if self._waking is None:
            session.wake()
        else:
            self._waking.append(session)

    def open(self, key: K, peer: Endpoint, local: Endpoint, answer: Answer, *, single: bool = False) -> Session[K]:
        """Make the session of `key`."""
        if len(self._table) >= self.limit:
            self._make_room(peer.host)
        session = Session(self, key, peer, local, answer, single)
        session.last = self.now()
        self._table[key] = session
        own = self._clients.setdefault(peer.host, {})
        own[key] = session
        if len(own) > len(self._clients.get(self._greatest, ())):
            self._greatest = peer.host
        if self._timer is None:
            self._timer = self.hub.loop.call_later(self.ttl, self._sweep)
        return session

    def forget(self, session: Session[K]) -> None:
        """Take a session out of the table."""
        if self._table.get(session.key) is session:
            del self._table[session.key]
            own = self._clients[session.peer.host]
            del own[session.key]
            if not own:
                del self._clients[session.peer.host]
            if self._full and len(self._table) < self.limit // 2:
                self._full = False
            if not self._table and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _make_room(self, host: str) -> None:
        """End one session for another of the client `host`."""
        if not self._full:
            self._full = True
            self._log.warn(f"{self.limit} sessions are open, which is the limit: for each new one another one ends")
        victims = self._above_share(host) or self._above_share(self._greatest)
        oldest = list(islice(self._table.values(), _LOOK))
        if victims is None:
            oldest[0].end()
            return
        # The one of them that is idle longest is in front, unless all of them are busy: then the first that was opened.
        own = next((session for session in oldest if session.key in victims), None)
        (own or next(iter(victims.values()))).end()

    def _above_share(self, host: str) -> dict[K, Session[K]] | None:
        """Return the sessions of a client that has more than the mean of all."""
        own = self._clients.get(host)
        return own if own is not None and len(own) * len(self._clients) > self.limit else None

    def say_once(self, text: str) -> None:
        """Log what works less well than it could, once."""
        if text not in self._said:
            self._said.add(text)
            self._log.warn(text)

    def collect(self) -> None:
        """Ask the joints which sessions have been in use."""
        if self.joints is not None:
            self.joints.collect()

    def _sweep(self) -> None:
        """End what has been idle for `ttl`: it is at the front."""
        self._timer = None
        self.collect()
        if self._timer is not None or not self._table:
            return  # what has been told of has ended sessions, and begun others
        now = self.now()
        table = self._table
        for _ in range(_SWEEP):
            if not table:
                return
            oldest = next(iter(table.values()))
            left = oldest.last + self.ttl - now
            if left > 0:
                self._timer = self.hub.loop.call_later(max(left, self._grain), self._sweep)
                return
            oldest.end()
        if table:
            self._timer = self.hub.loop.call_later(0, self._sweep)

    def close(self) -> None:
        """End all sessions."""
        for session in list(self._table.values()):
            session.end()
        if self.joints is not None:
            self.joints.close()
            self.joints = None


class Inlet(Generic[T]):
    """What a socket's edges bring: `feed` is called in the very callback that tells of an edge.

    So sessions that are there already cost no turn of the loop and no task; who waits here hears of new ones only.
    `feed` takes all that is there, or calls `again`.
    """

    def __init__(self, readiness: Readiness, feed: Callable[[], list[T]]) -> None:
        self._readiness = readiness
        self._feed = feed
        self._found: list[T] = []
        self._gate: Gate | None = None

    async def take(self) -> list[T]:
        """Wait for something new; what a cancelled call would have returned the next one returns."""
        self._readiness.claim(self._on_events)
        while not self._found:
            self._found += self._feed()
            if not self._found:
                gate = self._gate = Gate(self._readiness.hub)
                await gate.wait()
        found, self._found = self._found, []
        return found

    def _on_events(self, events: int) -> None:
        if events & READABLE and self._readiness.fd >= 0:
            self._found += self._feed()
            if self._found:
                self._open()

    def again(self) -> None:
        """Have `feed` called in the loop's next turn: the others have theirs, and nobody says that there is more."""
        self._readiness.hub.call_ready(self._repeat)

    def _repeat(self) -> None:
        self._on_events(READABLE)

    def close(self) -> None:
        """Let who waits go on: it finds the socket closed. Before the socket closes, or after."""
        self._open()

    def _open(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.open()


def in_turns(step: Callable[[], bool], fresh: Sequence[object]) -> bool:
    """Call `step` until it says that nothing is left, or something is in `fresh`; return False if it is still not over.

    Then the other sockets get their turn, and nobody will say that there is more (`Inlet.again`).
    """
    return any(not step() or fresh for _ in range(ROUNDS))


def offer(session: Session[Any], peer: Endpoint, data: Buffer, stride: int) -> None:
    """Give a session what has arrived for it, single datagrams even where it came as a train."""
    if not stride:
        if not session.offer(Datagram(data, peer)):
            session._table.dropped += 1
        return
    for start in range(0, len(data), stride):
        if not session.offer(Datagram(data[start : start + stride], peer)):
            session._table.dropped += 1
