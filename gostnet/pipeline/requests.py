"""The requests of one HTTP/1 connection, told apart as they pass, so that each is decided about by its own host.

Nothing is rewritten and no answer is parsed: bytes pass as they came, up to a request that has to go elsewhere. Such a
request waits until the connection to the server before is done, which it is as soon as its answers are, for a client
does not ask again before it has been answered, and one that does is answered before the server closes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from ..core.errors import ConnError, ProtocolError
from ..core.flow import Flow, Sniffed
from ..core.passing import PassingStream
from ..core.stream import CHUNK, Stream
from ..wire.http1 import Body, HeadReader, Request, parse_request, request_body
from ..wire.sniff import METHODS, StreamRecogniser, describe
from .handler import relay_with

GRACE: Final = 2.0
"""Seconds without a byte after which a server that has been told goodbye is left, whatever it still holds."""

Decide = Callable[[Sniffed], bool]
"""Tells whether a request may follow the ones before it to the same server. Raises PolicyDenied to end it all."""


class Requests(PassingStream):
    """A client's stream that ends, for its reader, before a request which `decide` wants elsewhere.

    pending    that request, None if there is none
    ended      the client has been told that no more answers come
    """

    __slots__ = (
        "_body",
        "_decide",
        "_held",
        "_maybe",
        "_passing",
        "_reader",
        "ended",
        "on_pending",
        "pending",
    )

    def __init__(self, below: Stream, decide: Decide) -> None:
        """Watch `below`, which stays its owner's; a stream that nobody has `armed` adds nothing."""
        super().__init__(below)
        self._decide = decide
        self._passing = True
        self._held = b""
        self._body: Body | None = None
        self._reader = HeadReader()
        self._maybe: StreamRecogniser | None = None
        self.pending: Sniffed | None = None
        self.ended = False
        self.on_pending: Callable[[], object] | None = None

    def arm(self, first: Sniffed) -> None:
        """Begin to tell requests apart, the next byte being the first one of `first`, unless that is the only one."""
        self._passing = not first.method or any(
            name.lower() == "connection" and "close" in value.lower() for name, value in first.headers
        )

    def resume(self) -> None:
        """Let the pending request pass, as the first one to its server."""
        self.pending = None

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        """Return what passes. Raise ProtocolError for what is no HTTP, and what `decide` raises."""
        if self._passing:
            return await self._below.receive(max_bytes)
        while self.pending is None:
            data = await self._below.receive(max_bytes)
            if not data:
                held, self._held = self._held, b""
                return held
            if passing := self._pass(data):
                return passing
        return b""

    def _pass(self, data: bytes) -> bytes:
        """Return as much of `data`, and of what was held, as may go on now; what may not goes back."""
        passing = b""
        while data:
            if self._passing:
                return passing + data
            if self._body is not None:
                self._body.feed(data)
                if not self._body.done:
                    return passing + data
                rest, self._body = self._body.rest, None
                passing += data[: len(data) - len(rest)]
                data = rest
                continue
            self._held += data
            if self._maybe is not None:
                found = self._maybe.feed(data)
                if found is None:
                    return passing
                self._maybe = None
                data, self._held = self._held, b""
                if not found.method and data.startswith(METHODS):
                    raise ProtocolError("a malformed request")
                self._passing = not found.method  # the server has agreed to another protocol
                continue
            head = self._reader.feed(data)
            if head is None:
                return passing
            rest = self._reader.rest
            raw, self._held, self._reader = self._held, b"", HeadReader()
            request = parse_request(head)
            found = describe(request, rest)
            if not self._decide(found):
                self._below.unread(raw)
                self.pending = found
                if self.on_pending is not None:
                    self.on_pending()
                return passing
            passing += raw[: len(raw) - len(rest)]
            self._begin(request)
            data = rest
        return passing

    def _begin(self, request: Request) -> None:
        """Get ready for what follows the head of `request`."""
        self._body = request_body(request)
        if request.method == b"CONNECT" or b"upgrade" in request.first:
            self._maybe = StreamRecogniser()

    async def send_eof(self) -> None:
        """Pass on the end of the server, unless another one is to follow."""
        if self.pending is None:
            self.ended = True
            await self._below.send_eof()

    def reset(self) -> None:
        """Reset the stream below, unless another server is to follow."""
        if self.pending is None:
            self._below.reset()

    def transparent_over(self) -> Stream | None:
        """Return the stream below as long as nothing is told apart, or nothing is any more."""
        return self._below if self._passing and not self._held else None


async def relay_requests(
    flow: Flow,
    requests: Requests,
    upstream: Stream,
    reach: Callable[[Sniffed], Awaitable[Stream]],
    idle: float = 0.0,
) -> None:
    """Relay between the client of `requests`, which is armed, and the server of each request in turn.

    `reach` connects to the server of a request that is wanted elsewhere. Every upstream is closed whatever happens.
    """
    while True:
        await _relay_until_pending(flow, requests, upstream, idle)
        if requests.pending is None or requests.ended:
            return
        flow.tried = ()
        upstream = await reach(requests.pending)
        requests.resume()


async def _relay_until_pending(flow: Flow, requests: Requests, upstream: Stream, idle: float) -> None:
    """Relay to the end; one that a pending request brings about does not depend on the server's good will."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None
    left = False

    def leave_if_silent(moved: int) -> None:
        nonlocal timer, left
        if flow.meter.down == moved:
            left = True
            upstream.abort()
        else:
            timer = loop.call_later(GRACE, leave_if_silent, flow.meter.down)

    requests.on_pending = lambda: leave_if_silent(-1)
    try:
        await relay_with(flow, requests, upstream, idle=idle)
    except ConnError:
        if not left and requests.pending is None:
            raise
    finally:
        requests.on_pending = None
        if timer is not None:
            timer.cancel()
