"""The driver that performs a dialogue's effects on a stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from .errors import EndOfStream, ProtocolError
from .sansio import Handshake, Read, ReadUntil, Send
from .stream import Stream

T = TypeVar("T")

_CHUNK = 4096
"""Bytes asked for at a time during a handshake: more than any dialogue needs in one go."""


async def run_handshake(
    stream: Stream, dialogue: Handshake[T], answer: Callable[[Any], Awaitable[Any]] | None = None
) -> T:
    """Run `dialogue` on `stream` and return its result.

    What was read beyond the dialogue goes back by `unread`, so early payload is kept. `answer` answers `Ask` effects.
    Raise EndOfStream when the peer closes inside the dialogue, and what the dialogue raises. The caller owns the
    deadline.
    """
    buffer = b""
    value: Any = None
    try:
        while True:
            effect = dialogue.send(value)
            if isinstance(effect, Read):
                count = effect.count
                while len(buffer) < count:
                    data = await stream.receive(_CHUNK)
                    if not data:
                        raise EndOfStream("the peer closed during the handshake")
                    buffer = buffer + data if buffer else data
                value = buffer[:count]
                buffer = buffer[count:]
            elif isinstance(effect, Send):
                await stream.send(effect.data)
                value = None
            elif isinstance(effect, ReadUntil):
                delimiter, limit = effect.delimiter, effect.limit
                while (found := buffer.find(delimiter, 0, limit)) < 0:
                    if len(buffer) >= limit:
                        raise ProtocolError(f"no {delimiter!r} within {limit} bytes")
                    data = await stream.receive(_CHUNK)
                    if not data:
                        raise EndOfStream("the peer closed during the handshake")
                    buffer += data
                end = found + len(delimiter)
                value = buffer[:end]
                buffer = buffer[end:]
            else:
                assert answer is not None, "the dialogue asks, and nobody answers"
                value = await answer(effect.question)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        dialogue.close()
        if buffer:
            stream.unread(buffer)
