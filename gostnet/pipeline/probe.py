"""Probes: periodic trials of nodes, chains and hops, whose verdict the selectors follow. Rows P01-P07, G09.

A verdict has inertia: one that was found dead is only alive again after several successes in a row, so that one which
works now and then does not move the traffic to and fro. It holds until the next one, however long that takes.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ..core.address import ANY, Endpoint
from ..core.egress import Egress
from ..core.errors import DialError, GostnetError, NoRoute, ProtocolError
from ..core.flow import Flow
from ..core.log import Logger, quiet
from ..core.stream import Stream
from ..wire import http1
from .hop import Hop
from .node import Latency, Marker, Node, NodeEgress

INTERVAL = 30.0
TIMEOUT = 10.0
"""Seconds: GOST's defaults."""

RISE = 3
"""Successes in a row after which what was dead is alive."""

RELAPSE = 20
"""Probes: one that dies again so soon after it came back must then show twice as many successes."""

MAX_RISE = 8
"""Times that what it must show grows at most."""

SHORTEST = 0.1
"""Seconds between two probes at least."""

HASTE = 10
"""While a verdict is in doubt, probes follow each other this many times faster, but not faster than 1 s."""

JITTER = 0.05
"""Part of the interval that it varies by, either way: probes of many nodes must not beat in time."""

SERVICE = "probe"
"""Name of the service on the flows of probes."""


class Check(Protocol):
    """One trial."""

    async def run(self) -> float | None:
        """Return the seconds that the way took, None if that was not measured. Raise GostnetError if it failed."""


class Probe:
    """Runs a check from time to time and keeps a marker, and perhaps a latency, up to date.

    fall, rise    failures, successes in a row that change the verdict
    """

    def __init__(
        self,
        name: str,
        check: Check,
        marker: Marker,
        latency: Latency | None = None,
        *,
        interval: float = 0.0,
        timeout: float = 0.0,
        fall: int = 1,
        rise: int = RISE,
        log: Logger | None = None,
        source: random.Random | None = None,
    ) -> None:
        self.name = name
        self.check = check
        self.marker = marker
        self.latency = latency
        self.interval = max(interval, SHORTEST) if interval > 0 else INTERVAL
        self.timeout = timeout if timeout > 0 else TIMEOUT
        self.fall = max(1, fall)
        self.rise = max(1, rise)
        self._log = log or quiet()
        self._random = source or random.Random()
        self._failures = 0
        self._successes = 0
        self._needed = self.rise
        self._lived = RELAPSE

    async def run(self) -> None:
        """Probe until cancelled, the first time at once."""
        while True:
            await self.once()
            await asyncio.sleep(self.pause())

    async def once(self) -> None:
        """Run the check once and take its outcome in."""
        try:
            async with asyncio.timeout(self.timeout):
                latency = await self.check.run()
        except TimeoutError:
            self.failed(f"no answer within {self.timeout:g}s")
        except GostnetError as exc:
            self.failed(str(exc))
        except Exception as exc:
            # A fault of ours must not freeze the verdict: a probe that cannot be made has failed.
            self.failed(f"{type(exc).__name__}: {exc}")
        else:
            self.passed(latency)

    def passed(self, latency: float | None) -> None:
        """Take in a success."""
        now = asyncio.get_running_loop().time()
        self._failures = 0
        self._successes += 1
        took = "" if latency is None else f" in {latency * 1e3:.1f}ms"
        self._log.debug(f"probe {self.name}: ok{took}")
        if latency is not None and self.latency is not None:
            self.latency.note(latency, now)
        if not self.marker.down:
            self._lived += 1
            self.marker.reset()
        elif self._successes >= self._needed:
            self._lived = 0
            self.marker.down = False
            self.marker.reset()
            self._log.info(f"{self.name} is alive again{took}")

    def failed(self, reason: str) -> None:
        """Take in a failure."""
        now = asyncio.get_running_loop().time()
        self._successes = 0
        self._failures += 1
        self._log.debug(f"probe {self.name}: {reason}")
        self.marker.mark(now)
        if not self.marker.down and self._failures >= self.fall:
            self.marker.down = True
            self._needed = min(self._needed * 2, self.rise * MAX_RISE) if self._lived < RELAPSE else self.rise
            if self.latency is not None:
                self.latency.value = None
            self._log.warn(f"{self.name} is dead: {reason}")

    def pause(self) -> float:
        """Return the seconds to the next probe."""
        doubt = self._successes > 0 if self.marker.down else self._failures > 0
        interval = min(self.interval, max(1.0, self.interval / HASTE)) if doubt else self.interval
        return interval * (1 + self._random.uniform(-JITTER, JITTER))


# ---- checks --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class HTTPExchange:
    """A GET request, and the status that its answer must have."""

    request: bytes
    expected: int = 200

    @classmethod
    def of(cls, host: str, path: str = "", fields: Mapping[str, str] | None = None, expected: int = 0) -> HTTPExchange:
        """Make one; `fields` go beside Host and Connection. They must have been checked."""
        given = {name.lower() for name in fields or ()}
        head = [(name, value) for name, value in (("Host", host), ("Connection", "close")) if name.lower() not in given]
        head += (fields or {}).items()
        lines = [(name.encode("latin-1"), value.encode("utf-8")) for name, value in head]
        return cls(http1.head_bytes(b"GET %b HTTP/1.1" % (path or "/").encode("utf-8"), lines), expected or 200)

    async def run(self, stream: Stream) -> None:
        """Do it over `stream`. Raise ProtocolError for another status, and for what is no answer."""
        await stream.send(self.request)
        reader = http1.HeadReader(response=True, limit=http1.MAX_HEAD)
        while True:
            data = await stream.receive()
            if not data:
                raise ProtocolError("the connection was closed before the answer was complete")
            head = reader.feed(data)
            while head is not None:
                status = http1.parse_response(head).status
                if status >= 200:
                    break
                head = reader.feed(reader.rest)  # 103 and its like come before the answer
            else:
                continue
            if status != self.expected:
                raise ProtocolError(f"status {status} instead of {self.expected}")
            return


class NodeCheck:
    """Reaches a proxy, asks it for `target`, and perhaps does an exchange with that (P01, P02).

    lower    the way to the node

    The time is that to the node, its handshakes included. What real flows have found is left alone.
    """

    def __init__(self, node: Node, lower: Egress, target: Endpoint, exchange: HTTPExchange | None = None) -> None:
        self._node = replace(node, marker=Marker(), latency=None)
        self._lower = lower
        self._target = target
        self._exchange = exchange

    async def run(self) -> float | None:
        """Do it once."""
        flow = Flow(SERVICE, target=self._target)
        clock = asyncio.get_running_loop().time
        egress = NodeEgress(self._node, self._lower)
        began = clock()
        below = await egress.open(flow)
        took = clock() - began
        stream = await egress.connect_over(flow, below, self._target)
        await _finish(stream, self._exchange)
        return took


class EgressCheck:
    """Connects to a target by a way out (a forwarder's target by its service's, any by a chain), perhaps for more."""

    def __init__(self, egress: Egress, target: Callable[[], Endpoint], exchange: HTTPExchange | None = None) -> None:
        self._egress = egress
        self._target = target
        self._exchange = exchange

    async def run(self) -> float | None:
        """Do it once."""
        target = self._target()
        clock = asyncio.get_running_loop().time
        began = clock()
        stream = await self._egress.connect(Flow(SERVICE, target=target), target)
        took = clock() - began
        await _finish(stream, self._exchange)
        return took


def target_of(hop: Hop) -> Callable[[], Endpoint]:
    """Return what chooses a target of `hop` for each probe. It raises NoRoute when there is none."""

    def choose() -> Endpoint:
        node = hop.select(Flow(SERVICE), ANY, asyncio.get_running_loop().time())
        if node is None:
            raise NoRoute(f"hop {hop.name} has no target")
        return node.address

    return choose


async def _finish(stream: Stream, exchange: HTTPExchange | None) -> None:
    try:
        if exchange is not None:
            await exchange.run(stream)
    finally:
        stream.abort()


class CommandCheck:
    """Runs a shell command, which must end with status 0. All that it started is killed at the end (P07)."""

    def __init__(self, command: str) -> None:
        self._command = command

    async def run(self) -> float | None:
        """Do it once. When it is cancelled, the time-out included, nothing of the command goes on."""
        process = _started(self._command)
        try:
            await _ended(process.pid)
        finally:
            # The leader is still ours to wait for, so its number, which is the group's, cannot be another's.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            code = process.wait()
        if code != 0:
            raise DialError(
                f"the command was killed by signal {-code}" if code < 0 else f"the command ended with {code}"
            )
        return None


def _started(command: str) -> subprocess.Popen[bytes]:
    """Start a shell as the leader of a process group of its own."""
    try:
        return subprocess.Popen(
            ("/bin/sh", "-c", command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as exc:
        raise DialError(f"the command cannot be started: {exc.strerror}") from exc


async def _ended(pid: int) -> None:
    """Wait until a child has ended; it is left for its parent to take note of."""
    loop = asyncio.get_running_loop()
    descriptor = os.pidfd_open(pid)
    ended = loop.create_future()

    def readable() -> None:
        if not ended.done():
            ended.set_result(None)

    try:
        loop.add_reader(descriptor, readable)
        await ended
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
