"""Forwarded requests: one exchange after the other between a client and the origins that it names.

Bodies stream both ways at once and are never held: a response may come, and end, while its request is still being
sent. What a request or response says of its framing is parsed and said anew, so that no two readers of the same bytes
disagree about where a message ends.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Final

from ...core.address import Endpoint
from ...core.egress import Egress
from ...core.errors import ConnError, DialTimeout, EndOfStream, GostnetError, PolicyDenied, ProtocolError
from ...core.flow import Flow
from ...core.hub import current_hub
from ...core.log import INFO, Logger
from ...core.sockets import SocketStream
from ...core.stream import CHUNK, Stream
from ...core.tasks import Scope, deadline
from ...dataplane.shaper import granted
from ...pipeline.handler import relay_with
from ...pipeline.router import ServiceRouter
from ...wire.http1 import (
    Body,
    HeadReader,
    Request,
    Response,
    content_length,
    encode_chunk,
    encode_end,
    is_chunked,
    parse_authority,
    parse_response,
    request_body,
    response_body,
)
from .answer import part, status_of
from .codec import (
    DEFAULT_PORT,
    Gunzip,
    Replies,
    client_response,
    empty_answer,
    forward_target,
    interim_response,
    upgrade_of,
    upstream_request,
)
from .pool import Idle, Pool
from .record import http_fields

BULK: Final = 262144
"""Bytes of a read once a smaller one was filled: what the copy engine reads."""

_REPEATABLE: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE"))
"""Methods whose requests are sent again when a kept connection turns out to be closed (RFC 9110 section 9.2.2)."""

_BOUND_SCHEMES: Final = (b"ntlm", b"negotiate")
"""Authentication that holds for a connection, not for a request: such a connection serves one client only."""


class ForwardProxy:
    """What the sessions of one handler share.

    read_timeout    seconds for an origin to begin its answer, 0 for no limit
    pool            None: every request gets a connection of its own
    """

    def __init__(
        self,
        *,
        read_timeout: float,
        idle_timeout: float,
        keepalive: bool,
        compression: bool,
        hash_target: bool,
        replies: Replies,
        log: Logger,
    ) -> None:
        self.read_timeout = read_timeout
        self.idle_timeout = idle_timeout
        self.compression = compression
        self.hash_target = hash_target
        self.replies = replies
        self.log = log
        self.pool = Pool() if keepalive else None


class Session:
    """The forwarded requests of one client connection."""

    __slots__ = ("_bound", "_client", "_egress", "_first", "_flow", "_proxy")

    def __init__(self, proxy: ForwardProxy, flow: Flow, client: Stream, egress: Egress) -> None:
        self._proxy = proxy
        self._flow = flow
        self._client = client
        self._egress = egress
        self._first = True
        self._bound: Idle | None = None

    def close(self) -> None:
        """Close the connection to an origin that is bound to this client, if any."""
        bound, self._bound = self._bound, None
        if bound is not None:
            bound.stream.abort()

    async def exchange(self, request: Request) -> bool:
        """Serve one request; return whether the client's connection may carry another.

        A failure is answered as long as no answer has begun, then raised; so is what a policy refuses.
        """
        replies, client = self._proxy.replies, self._client
        first, self._first = self._first, False
        try:
            place = forward_target(request)
            body = request_body(request)
            target = parse_authority(place[0], DEFAULT_PORT) if place is not None else None
        except ProtocolError:
            await part(client, replies.bad_request)
            raise
        if place is None or target is None:
            await part(client, empty_answer(503, request.version))
            raise ProtocolError("the request does not say where to")
        exchange = _Exchange(self._proxy, self._flow, client, request, body, place)
        try:
            return await self._run(exchange, target)
        except GostnetError as exc:
            if exchange.answered:
                # A body that only the end of the connection delimits must not end as if it were complete.
                if not exchange.delimited and isinstance(client, SocketStream):
                    client.reset()
            elif exchange.malformed:
                await part(client, replies.bad_request)
            elif first and isinstance(exc, PolicyDenied):
                await part(client, replies.refusal(status_of(exc)))
            else:
                await part(client, empty_answer(status_of(exc), request.version))
            raise

    async def _run(self, exchange: _Exchange, target: Endpoint) -> bool:
        proxy, flow, egress = self._proxy, self._flow, self._egress
        flow.network = "tcp"
        flow.tried = ()
        flow.connected = False
        if proxy.hash_target:
            flow.hash = str(target)
        log = proxy.log
        begun = current_hub().loop.time()
        up, down = flow.meter.up, flow.meter.down
        try:
            kept = self._kept(exchange, target)
            while True:
                if kept is not None:
                    stream, flow.route = kept.stream, kept.route
                else:
                    stream = await egress.connect(flow, target)
                flow.connected = True
                bound = kept is not None and kept is self._bound
                if bound:
                    self._bound = None
                try:
                    go_on = await exchange.over(stream)
                except (EndOfStream, ConnError):
                    stream.abort()
                    if kept is None or exchange.heard or not exchange.repeatable:
                        raise
                    kept = None  # it was closed while it was idle: nobody has seen the request
                except BaseException:
                    stream.abort()
                    raise
                else:
                    await self._dispose(exchange, stream, target, bound)
                    return go_on
        finally:
            took = current_hub().loop.time() - begun
            if flow.details is not None:
                error = sys.exception()
                flow.details.add_part(
                    {
                        "proto": "http",
                        "http": http_fields(exchange.request, str(target), exchange.response),
                        "begun": time.time() - took,
                        "inputBytes": flow.meter.up - up,
                        "outputBytes": flow.meter.down - down,
                        "err": str(error) if error is not None else "",
                    }
                )
            if log.level <= INFO:
                log.info(
                    f"{flow.client} >-< {target}",
                    kind="handler",
                    client=str(flow.client),
                    sid=flow.sid,
                    dst=str(target),
                    method=exchange.request.method.decode("ascii"),
                    status=exchange.status,
                    duration=int(took * 1e9),
                    inputBytes=flow.meter.up - up,
                    outputBytes=flow.meter.down - down,
                )

    def _kept(self, exchange: _Exchange, target: Endpoint) -> Idle | None:
        """Return an open connection to `target` that policies allow to use, None without one. Raise BypassDenied."""
        pool = self._proxy.pool
        # Only the service's router can tell what holds for a target without connecting to it, and not even that one
        # where the way depends on who asks for what.
        if pool is None or not isinstance(self._egress, ServiceRouter) or self._egress.selective:
            return None
        if self._bound is None and not len(pool):
            return None
        self._egress.admit(self._flow, target)
        if self._bound is not None:
            if self._bound.origin == target and self._bound.alive():
                return self._bound
            self.close()
        return pool.take(target, certain=not exchange.repeatable)

    async def _dispose(self, exchange: _Exchange, stream: Stream, target: Endpoint, bound: bool) -> None:
        """Keep the origin's connection if it can be used again, close it otherwise."""
        pool = self._proxy.pool
        router = self._egress
        if pool is None or not exchange.reusable or not isinstance(router, ServiceRouter) or router.selective:
            await stream.aclose()
        elif bound or exchange.binds:
            self._bound = Idle(stream, self._flow.route, target)
        else:
            pool.put(stream, self._flow.route, target)


class _Exchange:
    """One request and its answer.

    heard       the origin has said something: the request will not be repeated
    answered    the client has got a part of the final answer
    malformed   the client's body breaks the protocol
    delimited   the answer's framing tells its end
    reusable    the origin's connection can carry another request
    binds       the origin's connection has become this client's own
    """

    __slots__ = (
        "_body",
        "_client",
        "_failure",
        "_flow",
        "_gzip",
        "_limit",
        "_place",
        "_proxy",
        "_uploaded",
        "answered",
        "binds",
        "delimited",
        "heard",
        "malformed",
        "repeatable",
        "request",
        "response",
        "reusable",
        "status",
    )

    def __init__(
        self,
        proxy: ForwardProxy,
        flow: Flow,
        client: Stream,
        request: Request,
        body: Body | None,
        place: tuple[bytes, bytes],
    ) -> None:
        self._proxy = proxy
        self._flow = flow
        self._client = client
        self._body = body
        self._place = place
        self.request = request
        self._uploaded = body is None
        self._failure: GostnetError | None = None
        self._limit: asyncio.Timeout | None = None
        # As Go's transport: not for answers that have no body or a part of one, nor where the client knows better.
        self._gzip = (
            proxy.compression
            and request.method != b"HEAD"
            and b"accept-encoding" not in request.first
            and b"range" not in request.first
        )
        self.repeatable = body is None and request.method in _REPEATABLE
        self.heard = self.answered = self.malformed = False
        self.delimited = True
        self.reusable = False
        self.status = 0
        self.response: Response | None = None
        scheme = request.get(b"authorization").partition(b" ")[0].lower()
        self.binds = scheme in _BOUND_SCHEMES

    async def over(self, upstream: Stream) -> bool:
        """Send the request and relay the answer; return whether the client's connection goes on.

        What raises leaves `upstream` to the caller. A body that is here already goes out with the head, and then no
        second task is needed.
        """
        proxy, client, body = self._proxy, self._client, self._body
        data = upstream_request(self.request, *self._place, body, close=proxy.pool is None, gzip=self._gzip)
        if body is not None:
            here = client.take_unread()
            if here:
                data += self._framed(here)
        await _move(self._flow, upstream, data, True)
        if self._uploaded:
            return await self._answer(upstream)
        scope = Scope("upload")
        try:
            scope.start(self._upload(upstream))
            return await self._answer(upstream)
        except GostnetError:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            await scope.cancel()  # the upload only waits for sockets, so this is a matter of one turn

    # ---- the request's body --------------------------------------------------------------------
    def _framed(self, data: bytes) -> bytes:
        """Return `data` of the client as it goes to the origin; what comes after the body goes back."""
        body = self._body
        assert body is not None
        try:
            payload = body.rechunk(data) if body.chunked else body.feed(data)
        except ProtocolError:
            self.malformed = True
            raise
        if body.chunked and body.done:
            payload += encode_end(body.trailers)
        if body.done:
            self._uploaded = True
            if body.rest:
                self._client.unread(body.rest)
        return payload

    async def _upload(self, upstream: Stream) -> None:
        """Send the rest of the body. Trouble with the client ends the exchange, trouble with the origin does not:

        it may have answered already, and closed on a request that it does not want to hear to the end.
        """
        flow, client, body = self._flow, self._client, self._body
        assert body is not None
        try:
            while not self._uploaded:
                data = await client.receive()
                if not data:
                    self.malformed = True
                    body.end()
                payload = self._framed(data)
                if payload:
                    try:
                        await _move(flow, upstream, payload, True)
                    except ConnError:
                        break
        except GostnetError as exc:
            self._failure = exc
            upstream.abort()
        else:
            if self._limit is not None:
                self._bound_answer(self._limit)

    def _bound_answer(self, limit: asyncio.Timeout) -> None:
        if self._proxy.read_timeout > 0:
            limit.reschedule(asyncio.get_running_loop().time() + self._proxy.read_timeout)

    # ---- the answer ----------------------------------------------------------------------------
    async def _head(self, upstream: Stream) -> tuple[Response, bytes]:
        """Return the final answer's head and what came after it; interim ones are passed on to who knows them."""
        reader = HeadReader(response=True)
        while True:
            data = await upstream.receive()
            if not data:
                raise EndOfStream("the origin closed without an answer")
            self.heard = True
            while data and (head := reader.feed(data)) is not None:
                response = self.response = parse_response(head)
                if response.status >= 200 or response.status == 101:
                    return response, reader.rest
                if self.request.version > 10:
                    await _move(self._flow, self._client, interim_response(response), False)
                data, reader = reader.rest, HeadReader(response=True)

    async def _timely_head(self, upstream: Stream) -> tuple[Response, bytes]:
        """The same, within the time that an origin has from when it has heard all of the request."""
        try:
            if self._uploaded:
                with deadline(self._proxy.read_timeout):
                    return await self._head(upstream)
            async with asyncio.timeout(None) as self._limit:
                return await self._head(upstream)
        except TimeoutError as exc:
            raise DialTimeout(f"no answer from the origin within {self._proxy.read_timeout:g}s") from exc
        finally:
            self._limit = None

    async def _answer(self, upstream: Stream) -> bool:
        request = self.request
        response, rest = await self._timely_head(upstream)
        self.status = response.status
        if response.status == 101:
            return await self._switch(upstream, response, rest)
        body = response_body(response, request.method)
        decoded = self._gzip and body is not None and response.get(b"content-encoding").lower() == b"gzip"
        # 1. how the answer's end is told to the client
        length: int | None = None
        chunked = False
        if body is not None:
            known = body.chunked or body.length is not None
            chunked = known and request.version > 10 and (body.chunked or decoded)
            length = None if decoded or chunked else body.length
            self.delimited = chunked or length is not None
        elif response.status != 204:
            chunked = request.version > 10 and is_chunked(response)  # of a HEAD
            length = content_length(response)
        # 2. whether the two connections go on
        origin_closes = not response.persistent
        close = origin_closes or not self.delimited or not self._uploaded
        go_on = not close and request.persistent
        head = client_response(
            response,
            request.version,
            close=close or (not go_on and request.version > 10),
            chunked=chunked,
            length=length,
            decoded=decoded,
        )
        # 3. the body
        self.answered = True
        await self._pass_on(upstream, head, body, rest, chunked=chunked, gunzip=Gunzip() if decoded else None)
        left = body.rest if body is not None else rest
        # A length beside a transfer coding: somebody on the way may count differently than we do.
        doubtful = b"transfer-encoding" in response.first and b"content-length" in response.first
        self.reusable = self._uploaded and not (origin_closes or left or doubtful) and (body is None or body.done)
        schemes = [value.partition(b" ")[0].lower() for value in response.all(b"www-authenticate")]
        self.binds = self.binds or any(scheme in _BOUND_SCHEMES for scheme in schemes)
        return go_on and self._uploaded

    async def _pass_on(
        self, upstream: Stream, out: bytes, body: Body | None, data: bytes, *, chunked: bool, gunzip: Gunzip | None
    ) -> None:
        """Send `out`, then the body, of which `data` has come already; small answers are one write."""
        flow, client = self._flow, self._client
        size = CHUNK
        while body is not None:
            if data:
                if gunzip is not None:
                    for piece in gunzip.feed(body.feed(data)):
                        await _move(flow, client, out + (encode_chunk(piece) if chunked else piece), False)
                        out = b""
                else:
                    payload = body.rechunk(data) if chunked else body.feed(data)
                    out = out + payload if out else payload
                if body.done:
                    break
            if out:
                await _move(flow, client, out, False)
                out = b""
            data = await upstream.receive(size)
            if len(data) == size:
                size = BULK
            if not data:
                body.end()
                break
        if gunzip is not None:
            gunzip.end()
        if chunked and body is not None:
            out += encode_end(body.trailers)
        if out:
            await _move(flow, client, out, False)

    async def _switch(self, upstream: Stream, response: Response, rest: bytes) -> bool:
        """Join the two connections after 101 (RFC 9110 section 7.8)."""
        asked = [item.strip().lower() for item in upgrade_of(self.request).split(b",")]
        chosen = upgrade_of(response).lower()
        if not chosen or chosen not in asked or not self._uploaded:
            raise ProtocolError(f"the origin switches to {chosen[:32]!r} unasked")
        self.answered = True
        if rest:
            upstream.unread(rest)
        flow, client = self._flow, self._client
        await _move(flow, client, interim_response(response), False)
        await relay_with(flow, client, upstream, idle=self._proxy.idle_timeout)
        return False


async def _move(flow: Flow, sink: Stream, data: bytes, up: bool) -> None:
    """Send `data` through the flow's taps and limits, and count it."""
    for tap in flow.taps or ():
        tap(data, up)
    meter = flow.meter
    shapers = flow.shapers
    limits = () if shapers is None else shapers.up if up else shapers.down
    if limits:
        view = memoryview(data)
        while view:
            allowed = await granted(limits, len(view))
            await sink.send(view[:allowed])
            if up:
                meter.up += allowed
            else:
                meter.down += allowed
            view = view[allowed:]
        return
    await sink.send(data)
    if up:
        meter.up += len(data)
    else:
        meter.down += len(data)
