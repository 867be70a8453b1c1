"""A service: one listener, one handler, the policies between them. Accepts, admits, runs, records. Rows S01-S15."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any

from ..core.address import Endpoint
from ..core.contracts import Closing, Handler, HandsOver, Policies, Slot, admitted
from ..core.egress import Egress
from ..core.errors import GostnetError, LimitDenied, PolicyDenied, QuotaDenied, RateDenied, without_frames
from ..core.flow import Flow
from ..core.log import DEBUG, INFO, Logger, quiet
from ..core.stream import Stream
from ..core.tasks import Scope, deadline
from ..dataplane.relay import CHOICES
from .transport import AcceptError, Listener


class State(Enum):
    """What a service is doing."""

    RUNNING = "running"
    READY = "ready"
    FAILED = "failed"
    CLOSED = "closed"


class Service:
    """Runs connections from a listener through a handler.

    flows      what is alive now, by id(): read by status and metrics
    created    when it was made, in seconds since 1970
    events     the last twenty state changes with their times, as GOST's API shows them
    heard      is told of each of them, and of the state that it leaves behind
    """

    HANDSHAKE = 15.0
    """Seconds for the listener's layers."""

    BACKOFF = (1.0, 2.0, 4.0, 5.0)
    """Seconds after the first, second, ... failure to accept in a row (S11)."""

    def __init__(
        self,
        name: str,
        listener: Listener,
        handler: Handler[Any],
        egress: Egress,
        policies: Policies | None = None,
        log: Logger | None = None,
        engine: str = "auto",
    ) -> None:
        """`engine` is what the service's flows ask the relay for."""
        self.name = name
        self.engine = engine
        self.listener = listener
        self.handler = handler
        self.egress = egress
        self._set_policies(policies or Policies())
        self._set_log(log or quiet())
        self.state = State.RUNNING
        self.flows: dict[int, Flow] = {}
        self.created = int(time.time())
        self.events: deque[tuple[int, str]] = deque(maxlen=20)
        self.heard: Callable[[State, str], None] | None = None
        self.last_error: BaseException | None = None
        self.total = 0
        self._scope: Scope | None = None

    def _set_log(self, log: Logger) -> None:
        self.log = log
        self._flow_log = log.bind(kind="handler")

    def _set_policies(self, policies: Policies) -> None:
        self.policies = policies
        self._plain = not policies.guarding and policies.books is None

    def _become(self, state: State, error: BaseException | None = None) -> None:
        self.state = state
        self.last_error = error
        message = f"service {self.name} is {state.value}"
        self._note(message)
        if self.policies.books is not None:
            self.policies.books.become(state.value, message)

    def _note(self, message: str) -> None:
        self.events.append((int(time.time()), message))
        if self.heard is not None:
            self.heard(self.state, message)

    def status(self) -> dict[str, object]:
        """Return what it is doing, as GOST's API shows it."""
        shown: dict[str, object] = {
            "createTime": self.created,
            "state": self.state.value,
            "events": [{"time": when, "msg": message} for when, message in self.events],
        }
        books = self.policies.books
        return shown if books is None else {**shown, **books.status()}

    def adopt(self, fresh: Service) -> None:
        """Take over how connections are handled from `fresh`.

        Those that are running keep what they began with, unless their handler hands them over.
        """
        if isinstance(self.handler, HandsOver) and type(self.handler) is type(fresh.handler):
            self.handler.hand_over(fresh.handler, fresh.egress)
        self._close_handler()
        self.handler = fresh.handler
        self.egress = fresh.egress
        self._set_policies(fresh.policies)
        self.listener.layers = fresh.listener.layers
        self.listener.preface = fresh.listener.preface
        self.engine = fresh.engine
        self._set_log(fresh.log)

    async def open(self) -> None:
        """Bind the listener. Raise KernelError or ConfigError."""
        source = self.listener.source
        self._become(State.RUNNING)
        try:
            await source.open()
        except GostnetError as exc:
            if not getattr(exc, "path", ""):
                exc.args = (f"service {self.name}: {exc}",)  # of many services: which one it is
            raise
        self._note(f"service {self.name} is listening on {source.address}")
        self.log.info(f"listening on {source.address}/{source.network}")

    async def serve(self) -> None:
        """Accept until cancelled. A failure to accept is waited out; connections never end the service."""
        self._scope = Scope(self.name)
        self._become(State.READY)
        failures = 0
        source = self.listener.source
        try:
            while True:
                try:
                    batch = await source.accept()
                except (AcceptError, OSError) as exc:
                    pause = self.BACKOFF[min(failures, len(self.BACKOFF) - 1)]
                    failures += 1
                    self._become(State.FAILED, exc)
                    self.log.warn(f"accept: {exc}, retrying in {pause:g}s")
                    await asyncio.sleep(pause)
                    self._become(State.READY)
                    continue
                failures = 0
                for flow, conn in batch:
                    self._take(flow, conn)
        finally:
            self._become(State.CLOSED)

    def _take(self, flow: Flow, conn: Any) -> None:
        """Admit one accepted connection, or close it."""
        flow.service = self.name
        flow.engine = self.engine
        self.total += 1
        assert self._scope is not None
        if self._plain:
            self._scope.launch(self._run(flow, conn))
            return
        books = self.policies.books
        entry = books.enter(flow, conn) if books is not None else None
        try:
            slot = self._admit(flow)
        except PolicyDenied as exc:
            self.log.debug(f"{flow.client}: {exc}", client=str(flow.client))
            flow.error = exc
            conn.abort()
            if entry is not None:
                entry.leave(refused=True)
            return
        fiber = self._scope.launch(self._run(flow, conn))
        if slot is not None:
            release = slot.release
            fiber.add_done_callback(lambda _: release())
        if entry is not None:
            leave = entry.leave
            entry.running(fiber.cancel)
            fiber.add_done_callback(lambda _: leave())

    def _admit(self, flow: Flow) -> Slot | None:
        """Ask who decides about new connections, those that cost something last. Raise PolicyDenied.

        Behind a preface the client is not known yet: who decides by it is asked again, by `_ask`, when it is.
        """
        policies = self.policies
        for quota in policies.quotas:
            if quota.blocked:
                raise QuotaDenied(f"quota {quota.name!r} is used up")
        known = self.listener.preface is None
        if known and not admitted(policies.admissions, flow.client):
            raise PolicyDenied("not admitted")
        slot = None
        if policies.connections is not None:
            slot = policies.connections.acquire(flow.client)
            if slot is None:
                self.log.info(f"{flow.client}: connection limit reached", client=str(flow.client))
                raise LimitDenied("connection limit reached")
        if known and policies.requests is not None and not policies.requests.allow(flow.client):
            if slot is not None:
                slot.release()
            raise RateDenied
        return slot

    def _ask(self, flow: Flow) -> None:
        """Ask who decides by the client's address, once a preface has told it. Raise PolicyDenied."""
        policies = self.policies
        if policies.books is not None:
            policies.books.announced(flow)
        if not admitted(policies.admissions, flow.client):
            raise PolicyDenied(f"{flow.client} is not admitted")
        if policies.requests is not None and not policies.requests.allow(flow.client):
            raise RateDenied

    async def _run(self, flow: Flow, conn: Any) -> None:
        """Serve one connection from its layers to its record. Swallows every error but a cancellation."""
        flow.started = time.monotonic()
        self.flows[id(flow)] = flow
        peer = flow.client
        try:
            if self.listener.preface is not None:
                conn = await self.listener.preface.server(flow, conn)
                self._ask(flow)
            if self.listener.layers:
                with deadline(self.HANDSHAKE):
                    conn = await self.listener.establish(flow, conn)
            await self.handler.handle(flow, conn, self.egress)
            await conn.aclose()
        except asyncio.CancelledError:
            self._drop(flow, conn)
            raise
        except GostnetError as exc:
            flow.error = exc
            self._drop(flow, conn)
        except TimeoutError as exc:
            flow.error = exc
            conn.abort()
        except Exception as exc:
            # A fault of ours must not take the service along: it is reported, the others live on.
            flow.error = exc
            conn.abort()
            self.log.error(f"{type(exc).__name__} while serving {flow.client}: {exc}", sid=flow.sid)
        finally:
            del self.flows[id(flow)]
            if flow.error is not None:
                without_frames(flow.error)
            if self.log.level <= INFO:
                self._record(flow, peer)

    def _drop(self, flow: Flow, conn: Any) -> None:
        """Close a connection that failed; reset one that a quota cut: a part must not be taken for the whole."""
        if flow.connected and isinstance(flow.error, QuotaDenied) and isinstance(conn, Stream):
            conn.reset()
        else:
            conn.abort()

    def _record(self, flow: Flow, peer: Endpoint) -> None:
        """Write the one line that says what became of a connection of `peer`, which may have named its client."""
        # An association has no one target; who has neither asked for anything, such as a health check, is no news.
        if flow.target is None and flow.error is None and not flow.connected and self.log.level > DEBUG:
            return
        client = str(flow.client)
        local = str(flow.ingress)
        fields: dict[str, Any] = {
            "remote": client if peer == flow.client else str(peer),
            "client": client,
            "local": local,
            "sid": flow.sid,
            "network": flow.network,
        }
        if flow.user:
            fields["clientID"] = flow.user
        target = local
        if flow.target is not None:
            target = fields["dst"] = str(flow.target)
        if flow.host:
            fields["host"] = flow.host
        if flow.route:
            fields["route"] = " > ".join(flow.route)
        fields["duration"] = int((time.monotonic() - flow.started) * 1e9)
        fields["inputBytes"] = flow.meter.up
        fields["outputBytes"] = flow.meter.down
        if self.log.level <= DEBUG and flow.engine not in CHOICES:
            fields["engine"] = flow.engine
        if flow.labels:
            fields["labels"] = dict(flow.labels)
        if flow.error is not None:
            fields["error"] = str(flow.error) or type(flow.error).__name__
            fields["code"] = getattr(flow.error, "code", "error")
        if flow.reason:
            fields["reason"] = flow.reason
        if flow.error is None or flow.connected:
            sign = ">-<"
        else:
            sign = ">!" if isinstance(flow.error, PolicyDenied) else "><"
        self._flow_log.emit("info", f"{client} {sign} {target}", fields)

    async def retire(self) -> None:
        """Take no more connections; those that run go on until `drain`."""
        await self.listener.source.retire()

    async def drain(self, seconds: float) -> None:
        """Let the connections end by themselves for `seconds`, then cancel the rest and close the listener."""
        if self._scope is not None:
            await self._scope.drain(seconds)
        await self.hasten()
        await self.aclose()
        self._close_handler()

    async def hasten(self) -> None:
        """Cancel the connections that run, which ends a `drain`."""
        if self._scope is not None:
            await self._scope.cancel()

    def _close_handler(self) -> None:
        if isinstance(self.handler, Closing):
            self.handler.close()

    async def aclose(self) -> None:
        """Close the listening socket; connections go on until `drain`."""
        await self.listener.source.aclose()
