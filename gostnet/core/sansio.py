"""Dialogues without I/O: short ones are generators, long-lived ones are machines.

A generator yields effects and is resumed with their results; `core.drive` performs them on a stream, tests perform
them on byte strings. A codec therefore cannot do I/O even by accident.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from .errors import EndOfStream

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(slots=True)
class Read:
    """Ask for exactly `count` bytes; resumed with `bytes`."""

    count: int


@dataclass(slots=True)
class ReadUntil:
    """Ask for the bytes up to and including `delimiter`; ProtocolError once `limit` bytes came without it."""

    delimiter: bytes
    limit: int


@dataclass(slots=True)
class Send:
    """Write all of `data`; resumed with None."""

    data: bytes


@dataclass(slots=True)
class Ask:
    """Put a question to the program (credentials, a look-up); resumed with its answer."""

    question: object


Effect: TypeAlias = Read | ReadUntil | Send | Ask
Handshake: TypeAlias = Generator[Effect, Any, T]


class Machine(Protocol[T_co]):
    """A long-lived multiplexed protocol: bytes in, events and bytes out, timers by value."""

    def receive(self, data: bytes, now: float) -> None: ...
    def next_event(self) -> T_co | None: ...
    def outgoing(self, now: float) -> bytes: ...
    def next_timer(self) -> float | None: ...
    def on_timer(self, now: float) -> None: ...


def run_on_bytes(
    dialogue: Handshake[T], incoming: bytes, answers: dict[object, object] | None = None
) -> tuple[T, bytes, bytes]:
    """Run `dialogue` against fixed bytes; return (its result, what it sent, what it left unread).

    Raise EndOfStream when it wants more than `incoming`. This is the oracle of the codec tests.
    """
    sent = bytearray()
    position = 0
    value: object = None
    try:
        while True:
            effect = dialogue.send(value)
            value = None
            if isinstance(effect, Send):
                sent += effect.data
            elif isinstance(effect, Read):
                if position + effect.count > len(incoming):
                    raise EndOfStream(f"wanted {effect.count} bytes, {len(incoming) - position} left")
                value = incoming[position : position + effect.count]
                position += effect.count
            elif isinstance(effect, ReadUntil):
                found = incoming.find(effect.delimiter, position, position + effect.limit)
                if found < 0:
                    raise EndOfStream(f"no {effect.delimiter!r} within {effect.limit} bytes")
                value = incoming[position : found + len(effect.delimiter)]
                position = found + len(effect.delimiter)
            else:
                value = (answers or {})[effect.question]
    except StopIteration as stop:
        return stop.value, bytes(sent), incoming[position:]
