"""What stands in a stream's or an association's way and passes everything on: a subclass says what it changes."""

from __future__ import annotations

from collections.abc import Sequence

from .datagrams import Datagram, Datagrams
from .stream import CHUNK, Buffer, Stream


class PassingStream(Stream):
    """A stream over `below`, which it owns.

    It holds on to nothing but what was put back (`unread`), but does not say that it adds nothing: a subclass does, in
    `transparent_over`, once that is so.
    """

    __slots__ = ("_below",)

    def __init__(self, below: Stream) -> None:
        super().__init__(below.local, below.remote)
        self._below = below

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._head:
            return self._take_head(max_bytes)
        return await self._below.receive(max_bytes)

    async def send(self, data: Buffer) -> None:
        await self._below.send(data)

    async def send_eof(self) -> None:
        await self._below.send_eof()

    async def aclose(self) -> None:
        await self._below.aclose()

    def abort(self) -> None:
        self._below.abort()

    def reset(self) -> None:
        """Reset the stream below."""
        self._below.reset()


class PassingDatagrams(Datagrams):
    """Datagrams over `below`, which it owns."""

    __slots__ = ("_below",)

    def __init__(self, below: Datagrams) -> None:
        super().__init__(below.local, below.max_payload)
        self._below = below

    async def receive(self) -> Sequence[Datagram]:
        return await self._below.receive()

    async def send(self, batch: Sequence[Datagram]) -> None:
        await self._below.send(batch)

    async def aclose(self) -> None:
        await self._below.aclose()

    def abort(self) -> None:
        self._below.abort()
