"""Answers that are kept. The rows DN01, DN02, ... that comments name are those of docs/dns.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from ...wire.dns_message import AD, CD, DO, RD, Answer, Query

MAX_ENTRIES: Final = 10_000
MAX_BYTES: Final = 32 << 20
"""Bytes of all messages together; beyond either bound the least recently used answer makes room."""
MAX_TTL: Final = 86_400
"""Seconds that an answer is kept at most, whatever it says (RFC 8767 section 4 advises a bound)."""
MAX_NEGATIVE_TTL: Final = 60
"""Seconds for "there is none" (RFC 2308 section 5 allows hours, which is long after a mistake)."""
MAX_STALE: Final = 86_400
"""Seconds after its end during which an answer may still be given while it is refreshed (RFC 8767 section 5)."""
STALE_TTL: Final = 30
"""TTL of such an answer (RFC 8767 section 4)."""


class Key(NamedTuple):
    """What an answer depends on. Names do not depend on case (DN05); the id and the payload size do not count."""

    question: bytes
    flags: int
    edns: bool
    secure: bool
    subnet: bytes | None

    @classmethod
    def of(cls, query: Query) -> Key:
        """Return the key of a query."""
        edns = query.edns
        question = query.question[:-4].lower() + query.question[-4:]
        flags = query.flags & (RD | AD | CD)
        if edns is None:
            return cls(question, flags, False, False, None)
        return cls(question, flags, True, bool(edns.flags & DO), edns.subnet)


@dataclass(slots=True)
class Entry:
    """An answer since `stored`, good for `seconds`; `fixed` if the configuration says so and not the answer."""

    answer: Answer
    stored: float
    seconds: int
    fixed: bool

    def render(self, query: Query, now: float) -> bytes:
        """Return it as the answer to `query`; its TTLs say how long it still holds."""
        age = max(0.0, now - self.stored)
        if age >= self.seconds:
            return self.answer.for_client(query, fixed=STALE_TTL)
        if self.fixed:
            return self.answer.for_client(query, fixed=max(1, int(self.seconds - age)))
        return self.answer.for_client(query, age)


class Cache:
    """Answers by key, bounded in number and size.

    ttl    seconds for answers that have something: 0 as they say, less than 0 keeps nothing at all
    """

    def __init__(
        self,
        ttl: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        entries: int = MAX_ENTRIES,
        size: int = MAX_BYTES,
    ) -> None:
        self.clock = clock
        self.size = 0
        self._ttl = ttl
        self._max_entries = entries
        self._max_size = size
        self._entries: dict[Key, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def fresh(self, entry: Entry) -> bool:
        """Tell whether an entry still holds."""
        return self.clock() - entry.stored < entry.seconds

    def get(self, key: Key) -> Entry | None:
        """Return an entry, expired or not, and note that it is in use; None for one that is too old for any use."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        if self.clock() - entry.stored >= entry.seconds + MAX_STALE:
            self.size -= len(entry.answer.wire)
            return None
        self._entries[key] = entry
        return entry

    def put(self, key: Key, answer: Answer) -> None:
        """Keep an answer for as long as it holds; one that does not is not kept."""
        seconds, fixed = self._seconds(answer)
        self._drop(key)
        if seconds <= 0 or len(answer.wire) > self._max_size:
            return
        while self._entries and (
            len(self._entries) >= self._max_entries or self.size + len(answer.wire) > self._max_size
        ):
            self._drop(next(iter(self._entries)))
        self._entries[key] = Entry(answer, self.clock(), seconds, fixed)
        self.size += len(answer.wire)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size -= len(entry.answer.wire)

    def _seconds(self, answer: Answer) -> tuple[int, bool]:
        lifetime = answer.lifetime
        if lifetime is None or self._ttl < 0:
            return 0, False
        if lifetime.negative:
            return min(lifetime.seconds, MAX_NEGATIVE_TTL), False
        if self._ttl > 0:
            return max(1, int(self._ttl)), True
        return min(lifetime.seconds, MAX_TTL), False
