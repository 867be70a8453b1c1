"""Streams: the first of the three data shapes.

A Stream is read by one task and written by one task. `receive` returns b"" only at end of stream; returning from
`send` is the back-pressure. Streams own what lies below them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

from .address import ANY, Endpoint

Buffer: TypeAlias = bytes | bytearray | memoryview

CHUNK = 65536
"""Default size of one read, bytes: what one system call moves without a second allocation class."""


class Closable(ABC):
    """Something that holds a resource."""

    __slots__ = ()

    @abstractmethod
    async def aclose(self) -> None:
        """Close in order. Idempotent; may await, bounded by the caller."""

    @abstractmethod
    def abort(self) -> None:
        """Close now, without awaiting: the only close allowed under cancellation. Idempotent."""


class Stream(Closable):
    """An ordered byte stream with half-close.

    Bytes given to `unread` are returned by the next `receive`, before anything else: what a handshake read too much,
    or a sniffer looked at, goes back this way, so no wrapper stays around the socket.
    """

    __slots__ = ("_head", "local", "remote")

    def __init__(self, local: Endpoint = ANY, remote: Endpoint = ANY) -> None:
        self.local = local
        self.remote = remote
        self._head: bytes = b""

    @abstractmethod
    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        """Return 1..max_bytes bytes, or b"" at end of stream. Raise ConnError when the connection broke."""

    @abstractmethod
    async def send(self, data: Buffer) -> None:
        """Write all of `data`. Raise ConnError when the connection broke."""

    @abstractmethod
    async def send_eof(self) -> None:
        """End our direction; the other goes on. Idempotent. Closes fully where the protocol has no half-close."""

    def reset(self) -> None:
        """Close so that the peer does not take what it got for the whole: `abort` where the protocol cannot say so."""
        self.abort()

    def unread(self, data: bytes) -> None:
        """Put `data` in front of what comes next."""
        self._head = data + self._head

    @property
    def has_unread(self) -> bool:
        """Whether something was put back that nobody has taken since."""
        return bool(self._head)

    def take_unread(self) -> bytes:
        """Take what `unread` put back, b"" if nothing: engines call this before they move to the socket."""
        head, self._head = self._head, b""
        return head

    def _take_head(self, max_bytes: int) -> bytes:
        head = self._head
        self._head = head[max_bytes:]
        return head[:max_bytes]

    def transparent_over(self) -> Stream | None:
        """Return the stream below if this one adds, holds and changes nothing from now on, else None."""
        return None
