"""Asking by HTTPS (RFC 8484): a POST over HTTP/1.1, or many of them at once in one connection of HTTP/2."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from ..core.errors import ConnError, EndOfStream, GostnetError, ProtocolError
from ..core.stream import Stream
from ..core.tasks import Scope
from ..wire import http1

if TYPE_CHECKING:
    from ..wire.http2_messages import Message

# The library of HTTP/2 is imported where it is used: most daemons never need it, and start 10 ms sooner.

HTTP_ALPN: Final = ("h2", "http/1.1")
MEDIA: Final = b"application/dns-message"
MAX_MESSAGE: Final = 65535
IN_FLIGHT: Final = 100
"""Questions at a time in one connection, if the server takes as many (RFC 9113 section 6.5.2 advises it to)."""


@runtime_checkable
class Negotiated(Protocol):
    """A stream whose TLS has agreed on a protocol."""

    @property
    def alpn(self) -> str:
        """Its name, "" for none."""


def speaks_http2(stream: Stream) -> bool:
    """Tell whether TLS has agreed on HTTP/2."""
    return isinstance(stream, Negotiated) and stream.alpn == "h2"


def _judge(status: bytes, kind: bytes) -> None:
    """Raise ProtocolError for a response that holds no message."""
    if status != b"200":
        raise ProtocolError(f"HTTP status {status.decode('ascii', 'replace')[:8]}")
    if kind.partition(b";")[0].strip().lower() != MEDIA:
        raise ProtocolError(f"the answer is not {MEDIA.decode('ascii')}")


# ---- HTTP/1.1 -----------------------------------------------------------------------------------
async def post(stream: Stream, authority: bytes, path: bytes, query: bytes) -> tuple[bytes, bool]:
    """Return the body of the answer, and whether the connection can be used again. Raise ProtocolError, ConnError."""
    fields = (
        (b"Host", authority),
        (b"Accept", MEDIA),
        (b"Content-Type", MEDIA),
        (b"Content-Length", b"%d" % len(query)),
    )
    await stream.send(http1.head_bytes(b"POST %b HTTP/1.1" % path, fields) + query)
    rest = b""
    while True:
        reader = http1.HeadReader(response=True, limit=http1.MAX_HEAD)
        head = reader.feed(rest) if rest else None
        while head is None:
            head = reader.feed(await _some(stream))
        rest = reader.rest
        response = http1.parse_response(head)
        if response.status >= 200:
            break
    _judge(b"%d" % response.status, response.get(b"content-type"))
    body = http1.response_body(response, b"POST")
    if body is None:
        raise ProtocolError("an answer without a message")
    data = body.feed(rest) if rest else b""
    while not body.done and len(data) <= MAX_MESSAGE:
        piece = await stream.receive()
        if not piece:
            body.end()
        else:
            data += body.feed(piece)
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"an answer of more than {MAX_MESSAGE} bytes")
    framed = not isinstance(body, http1.OpenBody)
    return data, framed and response.persistent and not body.rest


async def _some(stream: Stream) -> bytes:
    data = await stream.receive()
    if not data:
        raise EndOfStream("the connection ended before the answer was complete")
    return data


# ---- HTTP/2 -------------------------------------------------------------------------------------
class Http2:
    """A connection with any number of questions under way. It owns the stream.

    ended    why no further question can be asked, "" as long as one can
    """

    def __init__(self, stream: Stream) -> None:
        from ..wire.http2_messages import Fate, ShortMessages

        self.ended = ""
        self._fates = Fate
        self._stream = stream
        self._messages = ShortMessages(client=True, limit=MAX_MESSAGE)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._writing = asyncio.Lock()
        self._scope = Scope("name server")
        self._scope.launch(self._read())

    @property
    def usable(self) -> bool:
        """Whether another question may be asked now."""
        return not self.ended and len(self._waiting) < IN_FLIGHT and self._messages.room > 0

    @property
    def idle(self) -> bool:
        """Whether no question is under way."""
        return not self._waiting

    async def post(self, authority: bytes, path: bytes, query: bytes) -> bytes:
        """Return the body of the answer. Raise ProtocolError for an odd one, ConnError when the connection broke."""
        fields = (
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":authority", authority),
            (b":path", path),
            (b"accept", MEDIA),
            (b"content-type", MEDIA),
            (b"content-length", b"%d" % len(query)),
        )
        if self.ended:
            raise ConnError(self.ended)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        number = self._messages.request(fields, query)
        self._waiting[number] = answer
        try:
            await self._flush()
            message = await answer
        except BaseException:
            # Whoever gave up does not want it any more; the frame that says so goes out with the next question.
            self._messages.cancel(number)
            raise
        finally:
            del self._waiting[number]
        if message.fate is self._fates.RESET:
            raise ConnError("the server has given the question up")
        _judge(message.fields.get(b":status", b""), message.fields.get(b"content-type", b""))
        if message.fate is self._fates.LARGE:
            raise ProtocolError(f"an answer of more than {MAX_MESSAGE} bytes")
        return message.body

    async def _flush(self) -> None:
        async with self._writing:
            data = self._messages.outgoing()
            if data:
                await self._stream.send(data)

    async def _read(self) -> None:
        """Hand answers to who waits for them, until the connection ends."""
        reason = "the server has closed the connection"
        try:
            while data := await self._stream.receive():
                try:
                    for message in self._messages.receive(data):
                        answer = self._waiting.get(message.stream)
                        if answer is not None and not answer.done():
                            answer.set_result(message)
                finally:
                    await self._flush()
                if self._messages.ending:  # h2 takes nothing after it; who still waits asks again elsewhere
                    break
        except GostnetError as exc:
            reason = str(exc)
        finally:
            self._end(reason)

    def _end(self, reason: str) -> None:
        self.ended = self.ended or reason
        self._stream.abort()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnError(self.ended))

    def close(self) -> None:
        """Close; questions under way fail with ConnError."""
        self._end("closed by this side")
