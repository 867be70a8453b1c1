"""Quotas: a volume that may pass in a span of time. Rows Q01-Q08.

What moves is taken from the quota before it moves, so the limit is met to the byte: who wants more is cut. What engines
do not ask leave for (the dialogue of a protocol, DNS messages) is charged once a second, and when a connection ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from ..core.errors import QuotaDenied
from ..core.flow import Flow, Shapers
from .threads import Threads

Direction: TypeAlias = Literal["total", "in", "out"]

FLUSH: Final = 10.0
"""Seconds between writes of a counter that has changed, unless the configuration says otherwise."""
FILE: Final = "gost-quota.json"
"""Where counters are kept unless the configuration says otherwise: in the working directory, as GOST has it."""
_PERIOD: Final = 1.0

Wall = Callable[[], int]
"""Nanoseconds since 1970."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the configuration says.

    limit      bytes, 0 for no limit (they are counted all the same)
    starts, expires   nanoseconds since 1970, 0 for no bound; outside nothing is counted and nothing is refused
    direction  what counts: what comes from clients (in), what goes to them (out), or both
    flush      seconds between writes
    """

    limit: int = 0
    starts: int = 0
    expires: int = 0
    direction: Direction = "total"
    flush: float = FLUSH


class Quota:
    """The quota of a name; all services that name it share it."""

    __slots__ = (
        "_counts_in",
        "_counts_out",
        "_over",
        "_report",
        "_retired",
        "_told",
        "_wall",
        "changed",
        "name",
        "terms",
        "used",
    )

    def __init__(
        self, name: str, terms: Terms, wall: Wall = time.time_ns, report: Callable[[str], None] | None = None
    ) -> None:
        self.name = name
        self.used = 0
        self.changed = False
        """Whether there is something to write."""
        self._wall = wall
        self._report = report or (lambda _: None)
        self._retired = False
        self._told = False
        self._over = False
        self.apply(terms)

    def apply(self, terms: Terms) -> None:
        """Put other terms in place. In another window the count begins again (Q07)."""
        known: Terms | None = getattr(self, "terms", None)
        if known is not None and (known.starts, known.expires) != (terms.starts, terms.expires):
            self.reset()
        self.terms = terms
        self._counts_in = terms.direction != "out"
        self._counts_out = terms.direction != "in"
        self._over = False
        self.active  # noqa: B018  # a time that is over already is told now, not to the first who comes

    # ---- state -----------------------------------------------------------------------------------
    @property
    def active(self) -> bool:
        """Whether it counts now."""
        terms = self.terms
        if self._retired:
            return False
        if not (terms.starts or terms.expires):
            return True
        now = self._wall()
        if terms.expires and now >= terms.expires:
            if not self._over:
                self._over = True
                until = datetime.fromtimestamp(terms.expires // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                self._report(f"quota {self.name}: its time is over since {until}; it limits and counts nothing now")
            return False
        return now >= terms.starts

    @property
    def blocked(self) -> bool:
        """Whether it is used up."""
        limit = self.terms.limit
        return 0 < limit <= self.used and self.active

    def reset(self, used: int = 0) -> None:
        """Set the counter, as the API's reset does: who comes from now on is served (Q04)."""
        self.used = used
        self.changed = True
        self._told = False

    def retire(self) -> None:
        """Hold nobody back any more: it has gone from the configuration, flows that run do not know (Q08)."""
        self._retired = True

    def snapshot(self) -> dict[str, object]:
        """Return its state as GOST's API shows it; times in seconds since 1970."""
        terms = self.terms
        shown: dict[str, object] = {"used": self.used, "limit": terms.limit}
        if terms.starts:
            shown["startsAt"] = terms.starts // 10**9
        if terms.expires:
            shown["expiresAt"] = terms.expires // 10**9
        shown["active"] = self.active
        if terms.expires and self._wall() >= terms.expires:
            shown["expired"] = True
        return {**shown, "blocked": self.blocked, "direction": terms.direction}

    # ---- counting --------------------------------------------------------------------------------
    def take(self, wanted: int) -> int:
        """Return how many of `wanted` bytes may move, and count them; 0 when it is used up."""
        if not self.active:
            return wanted
        limit = self.terms.limit
        granted = min(wanted, max(0, limit - self.used)) if limit else wanted
        if granted:
            self.count(granted)
        return granted

    def count(self, size: int) -> None:
        """Count bytes that have moved; less than 0 gives some back."""
        if not self.active:
            return
        self.used = max(0, self.used + size)
        self.changed = True
        if not self._told and self.blocked:
            self._told = True
            self._report(f"quota {self.name}: the limit of {self.terms.limit} bytes is reached")

    def shape(self, into: Shapers, *, cuts: bool) -> None:
        """Put it on a flow. Without `cuts` nothing moves once it is used up, but the flow goes on."""
        if self._counts_in:
            into.up.append(Side(self, cuts))
        if self._counts_out:
            into.down.append(Side(self, cuts))

    def settle(self, flow: Flow, moved: tuple[int, int], charged: tuple[int, int]) -> tuple[int, int]:
        """Charge what has `moved` on a flow (in, out) and was neither asked leave for nor `charged` before.

        Return what is charged in all.
        """
        shapers = flow.shapers
        asked_in, asked_out = (0, 0) if shapers is None else (self._asked(shapers.up), self._asked(shapers.down))
        more_in = max(0, moved[0] - asked_in - charged[0]) if self._counts_in else 0
        more_out = max(0, moved[1] - asked_out - charged[1]) if self._counts_out else 0
        if more_in or more_out:
            self.count(more_in + more_out)
        return charged[0] + more_in, charged[1] + more_out

    def _asked(self, sides: Iterable[object]) -> int:
        return sum(side.taken for side in sides if isinstance(side, Side) and side.quota is self)


class Side:
    """A quota on one direction of one flow.

    taken    bytes that were let through
    """

    __slots__ = ("_cuts", "quota", "taken")

    def __init__(self, quota: Quota, cuts: bool) -> None:
        self.quota = quota
        self.taken = 0
        self._cuts = cuts

    def take(self, wanted: int) -> int:
        """Return how many bytes may move. Raise QuotaDenied when the quota is used up, which ends the flow."""
        granted = self.quota.take(wanted)
        if not granted and self._cuts and wanted:
            raise QuotaDenied(f"quota {self.quota.name!r} is used up")
        self.taken += granted
        return granted

    def give_back(self, unused: int) -> None:
        """Return bytes that did not move."""
        if unused:
            self.taken -= unused
            self.quota.count(-unused)

    def delay(self) -> float:
        """Seconds until there may be something again: nobody can know, so look once a second."""
        return _PERIOD if self.quota.blocked else 0.0


# ---- counters that outlive the process -------------------------------------------------------------
class Store:
    """A file of counters by name, in GOST's form: JSON, times in nanoseconds since 1970.

    {"NAME": {"used": N, "limit": N, "startsAt": N, "expiresAt": N, "updatedAt": N}}

    What it says of names that are not ours stays in it.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the records, {} if there is no such file. Raise ValueError or OSError."""
        try:
            text = self.path.read_text("utf-8")
        except FileNotFoundError:
            return {}
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return {name: record for name, record in found.items() if isinstance(record, dict)}

    def write(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Put `records` among those that are there, by a new file under the old name; make its directory.

        Raise OSError.
        """
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            known = self.read()
        except ValueError:
            known = {}
        data = json.dumps({**known, **records}, indent=2)
        fresh = self.path.with_name(self.path.name + ".tmp")
        fresh.write_text(data, "utf-8")
        os.replace(fresh, self.path)


class Keeper:
    """Reads the counters of quotas when they begin, and writes them as they change.

    fresh     quotas to be read; the others come from the configuration before and know their counts
    pending   terms that hold once the configuration does, for quotas that were there before
    gone      quotas of the configuration before that nobody has any more
    writes    whether it is this process that keeps the files: of several workers one does
    """

    def __init__(
        self, threads: Threads, report: Callable[[str], None] | None = None, wall: Wall = time.time_ns
    ) -> None:
        self.quotas: dict[str, tuple[Quota, Store]] = {}
        self.fresh: list[str] = []
        self.pending: dict[str, Terms] = {}
        self.gone: list[Quota] = []
        self.writes = True
        self._threads = threads
        self._report = report or (lambda _: None)
        self._wall = wall
        self._told: set[str] = set()

    def _tell(self, problem: str) -> None:
        if problem not in self._told:
            self._told.add(problem)
            self._report(problem)

    async def load(self) -> bool:
        """Take over the counts of the same window; return whether all files could be read."""
        complete = True
        for name in self.fresh if self.writes else ():
            quota, store = self.quotas[name]
            try:
                record = (await self._threads.run(store.read)).get(name, {})
            except (OSError, ValueError) as exc:
                self._tell(f"quota {name}: {store.path}: {exc}; the count begins at 0")
                complete = False
                continue
            terms, used = quota.terms, record.get("used", 0)
            window = record.get("startsAt"), record.get("expiresAt")
            same = window == (terms.starts, terms.expires) and isinstance(used, int)
            if same and used > quota.used:
                quota.reset(used)
                quota.changed = False
            elif quota.used != (used if same else 0):
                quota.changed = True  # counted by a worker that died before it had written it
        return complete

    async def run(self) -> None:
        """Write what has changed, each quota in its own rhythm, until cancelled; then once more."""
        for name, terms in self.pending.items():
            self.quotas[name][0].apply(terms)
        for quota in self.gone:
            quota.retire()
        if not self.writes:
            return
        loop = asyncio.get_running_loop().time
        due = {name: loop() + quota.terms.flush for name, (quota, _) in self.quotas.items()}
        try:
            while self.quotas:
                await asyncio.sleep(max(0.0, min(due.values()) - loop()))
                now = loop()
                names = [name for name, when in due.items() if when <= now]
                for path, records in self._changed(names).items():
                    try:
                        await self._threads.run(Store(path).write, records)
                    except OSError as exc:
                        self._failed(path, records, exc)
                for name in names:
                    due[name] = now + max(_PERIOD, self.quotas[name][0].terms.flush)
        finally:
            self.save()

    def save(self) -> None:
        """Write what has changed, now."""
        for path, records in self._changed(self.quotas).items():
            try:
                Store(path).write(records)
            except OSError as exc:
                self._failed(path, records, exc)

    def _failed(self, path: str, names: Iterable[str], exc: OSError) -> None:
        """Tell that nothing was written; the counts wait for the next time."""
        self._tell(f"quotas: {path}: {exc.strerror or exc}")
        for name in names:
            self.quotas[name][0].changed = True

    def _changed(self, names: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the records to be written, by file; they count as written."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name in names if self.writes else ():
            quota, store = self.quotas[name]
            if quota.changed:
                quota.changed = False
                terms = quota.terms
                found.setdefault(str(store.path), {})[name] = {
                    "used": quota.used,
                    "limit": terms.limit,
                    "startsAt": terms.starts,
                    "expiresAt": terms.expires,
                    "updatedAt": self._wall(),
                }
        return found


def parse_time(text: str) -> int:
    """Return nanoseconds since 1970 of an RFC 3339 time, 0 for "". Raise ValueError."""
    if not text.strip():
        return 0
    moment = datetime.fromisoformat(text.strip())
    if moment.tzinfo is None:
        raise ValueError("a time needs its zone, such as Z or +02:00")
    return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000


def parse_direction(text: str) -> Direction:
    """Return what counts; "" is total. Raise ValueError."""
    word = text.strip().lower() or "total"
    for known in get_args(Direction):
        if word == known:
            return known  # type: ignore[no-any-return]  # one of the literals
    raise ValueError(f"{text!r} is not in, out or total")
