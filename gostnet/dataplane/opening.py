"""Streams that begin with a message of their own, and are the stream below from then on.

Protocols without a round trip of their own send a header with the first payload, or before the first answer, and take
one off what comes back (GOST: relay). `Opening` does that for whoever uses it as a stream; `relay` takes the pending
parts out of it, so that the splice engine can join the sockets from the first byte on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from ..core.errors import ConnError, EndOfStream
from ..core.passing import PassingStream
from ..core.stream import CHUNK, Buffer, Stream


class Strip(Protocol):
    """Takes a header off the front of what is received."""

    def feed(self, data: bytes) -> bytes | None:
        """Take what has come; return what follows the header (b"" too) once it is complete, None before.

        Raise what the header says if that is a refusal.
        """


class Opening(PassingStream):
    """A stream over `below`, which it owns, with something to say or to hear first.

    prefix   goes out in front of the first bytes that are sent, or before the end if none are
    prompt   `prefix` does not wait for bytes to send: whoever reads sends it, so that nobody waits for an answer to a
             question that was never put
    strip    takes the header off what is received first

    One reader and one writer, as everywhere. A reader that is cancelled while it sends `prefix` leaves what any
    cancelled `send` leaves; one that is cancelled while it waits for the header loses nothing.
    """

    __slots__ = ("_gate", "_prefix", "_prompt", "_strip")

    def __init__(self, below: Stream, *, prefix: bytes = b"", prompt: bool = False, strip: Strip | None = None) -> None:
        super().__init__(below)
        self._prefix = prefix
        self._prompt = prompt
        self._strip = strip
        self._gate: asyncio.Future[None] | None = None

    @property
    def below(self) -> Stream:
        """The stream that this one begins."""
        return self._below

    @property
    def prompts(self) -> bool:
        """Whether something is to be said that will not wait for bytes to send."""
        return self._prompt and bool(self._prefix)

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        """Return what follows the header. Raise EndOfStream when the stream ends before or inside it."""
        if self._head:
            return self._take_head(max_bytes)
        if self._prefix and self._prompt:
            await asyncio.sleep(0)  # whoever has something to send in this very turn sends it along
            if self._prefix:
                try:
                    await self._flush()
                except ConnError:
                    pass  # the peer does not listen: its last words, or why there are none, are still to be read
        below = self._below
        while self._strip is not None:
            data = await below.receive()
            if not data:
                raise EndOfStream("the peer closed before it answered")
            rest = self._strip.feed(data)
            if rest is not None:
                self._strip = None
                if rest:
                    below.unread(rest)
        return await below.receive(max_bytes)

    async def send(self, data: Buffer) -> None:
        if self._gate is not None:
            await self._gate
        if self._prefix and data:
            prefix, self._prefix = self._prefix, b""
            data = b"".join((prefix, data))
        await self._below.send(data)

    async def send_eof(self) -> None:
        if self._gate is not None:
            await self._gate
        if self._prefix:
            await self._flush()
        await self._below.send_eof()

    async def _flush(self) -> None:
        """Send the prefix alone; a `send` that comes meanwhile waits, and finds the stream as this leaves it."""
        prefix, self._prefix = self._prefix, b""
        gate = self._gate = asyncio.get_running_loop().create_future()
        try:
            await self._below.send(prefix)
        finally:
            self._gate = None
            if not gate.done():
                gate.set_result(None)

    def transparent_over(self) -> Stream | None:
        """Return the stream below once everything has been said and heard."""
        if self._prefix or self._strip is not None or self._gate is not None:
            return None
        return self._below


def leaf(stream: Stream) -> Stream:
    """Follow `transparent_over` to the lowest stream that still does something; what was unread moves down with it.

    For whoever reads; who only writes takes `floor`.
    """
    while (below := stream.transparent_over()) is not None:
        head = stream.take_unread()
        if head:
            below.unread(head)
        stream = below
    return stream


def floor(stream: Stream) -> Stream:
    """Follow `transparent_over` as `leaf` does, and leave to the reader what was unread."""
    while (below := stream.transparent_over()) is not None:
        stream = below
    return stream


class FirstBytes:
    """What an engine does to the first bytes of one direction, in place of the `Opening`s they would pass through.

    strips   headers to take off what the source says, the outermost last
    prefix   what the sink gets in front of the first bytes, or before the end if there are none
    prompt   `prefix` is not to wait for the source
    """

    __slots__ = ("_strips", "prefix", "prompt")

    def __init__(self, strips: Sequence[Strip], prefix: bytes, prompt: bool) -> None:
        self._strips = list(strips)
        self.prefix = prefix
        self.prompt = prompt

    @property
    def done(self) -> bool:
        """Whether bytes pass unchanged from now on."""
        return not self._strips and not self.prefix

    def take(self, data: bytes) -> bytes:
        """Return what is to be sent now that `data` has come (b"" at the end of the stream); b"" for nothing yet.

        Raise EndOfStream when the end comes before the headers, and what a header says.
        """
        if self._strips:
            if not data:
                raise EndOfStream("the peer closed before it answered")
            while self._strips:
                rest = self._strips[0].feed(data)
                if rest is None:
                    return b""
                del self._strips[0]
                data = rest
                if not data:
                    return b""
        return self.take_prefix() + data

    def take_prefix(self) -> bytes:
        """Return the prefix, which counts as sent then."""
        prefix, self.prefix = self.prefix, b""
        return prefix


def bottom(stream: Stream) -> Stream:
    """Return the lowest stream under `Opening`s and transparent ones; nothing is taken out of them."""
    while True:
        below = stream.below if isinstance(stream, Opening) and not stream._gate else stream.transparent_over()
        if below is None:
            return stream
        stream = below


def between(client: Stream, upstream: Stream) -> tuple[FirstBytes | None, FirstBytes | None]:
    """Take what is pending out of the `Opening`s above two `bottom`s; return what is left to do (up, down).

    What was unread above moves down: it was read there, so no header is left to come at that place.
    """
    client_strips, client_prefix, client_prompt = _take(client)
    upstream_strips, upstream_prefix, upstream_prompt = _take(upstream)
    up = FirstBytes(client_strips, upstream_prefix, upstream_prompt)
    down = FirstBytes(upstream_strips, client_prefix, client_prompt)
    return (None if up.done else up), (None if down.done else down)


def _take(stream: Stream) -> tuple[list[Strip], bytes, bool]:
    strips: list[Strip] = []
    prefix, prompt = b"", False
    while True:
        if isinstance(stream, Opening):
            below: Stream | None = stream.below
            if stream._strip is not None:
                assert not stream._head, "bytes were put back before any were read"
                strips.insert(0, stream._strip)
                stream._strip = None
            prefix = stream._prefix + prefix
            prompt = prompt or (stream._prompt and bool(stream._prefix))
            stream._prefix = b""
        else:
            below = stream.transparent_over()
        if below is None:
            return strips, prefix, prompt
        head = stream.take_unread()
        if head:
            below.unread(head)
        stream = below
