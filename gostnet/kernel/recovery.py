"""Rolling back what dead instances left: by their journals, and by the marks that our objects bear."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gostnet.core.errors import KernelError
from gostnet.core.resources import ROUTE_PROTOCOL, NftTable, Resource, Route, Rule, tables_of

from . import netns
from .journal import (
    Header,
    Journal,
    Owner,
    await_release,
    boot_id,
    journals,
    namespace_cookie,
    read,
    state_directory,
)
from .live import LiveKernel
from .plan import Kernel, Step, fold, perform, undo
from .shared import guarded, spared

if TYPE_CHECKING:
    from .nft import Additions, ObservedTable

TABLE_PREFIX = "gostnet-"
LOCK_SUFFIX = "-lock"
"""Tables of the kill switch, which are meant to outlive the daemon."""

_TAKE_OVER_TIMEOUT = 10.0


class InspectableKernel(Kernel, Protocol):
    """A kernel that can also list what bears our marks."""

    def tables(self) -> list[ObservedTable]: ...

    def rules(self) -> list[Rule]: ...

    def routes(self) -> list[Route]: ...

    def has_ipv6(self) -> bool: ...

    def admit(self, table: str, additions: Additions) -> None: ...

    def close(self) -> None: ...


class Recovery(NamedTuple):
    """What was rolled back, and which instances are alive and were left alone."""

    steps: list[Step]
    live: list[str]


def recover(
    state_dir: Path | None = None, *, netns: netns.Place = None, kernel: InspectableKernel | None = None
) -> Recovery:
    """Undo what dead instances left in a network namespace, by default the thread's.

    First by their journals, which then go; then routes and rules of our protocol number and tables of our name that
    belong to no live instance. What cannot be undone is reported as a step that keeps, with its reason; a journal
    with such a step stays. `kernel` stands in for the real one in tests. Raise KernelError if the kernel cannot be
    observed.
    """
    with _namespace(netns) as place:
        ours = kernel or LiveKernel(place)
        try:
            return _recover(state_dir, place, ours)
        finally:
            if kernel is None:
                ours.close()


def leftovers(state_dir: Path | None = None) -> list[str]:
    """Name what `recover` would look at in the thread's namespace: journals of dead instances, objects of nobody's.

    Nothing is changed. Raise KernelError if the kernel cannot be observed.
    """
    found: list[str] = []
    in_use: list[Resource] = []
    live: list[Header] = []
    with _namespace(None) as place:
        try:
            paths = journals(state_directory(state_dir, create=False), place.inode)
        except KernelError:
            paths = []
        for path in paths:
            header, changes = read(path)
            if header is None or not header.owner.alive:
                found.append(f"journal {path} of a dead instance")
            else:
                live.append(header)
                in_use += [held.current for held in fold(changes).values() if held.current is not None]
        kernel = LiveKernel(place)
        try:
            slots = {header.slot for header in live} | set(_slots_of_owners(kernel.tables()))
            numbers = {number for slot in slots for number in tables_of(slot)}
            strays = _strays(kernel, in_use, numbers, {header.instance for header in live})
            found += [str(Step("drop", stray)).removeprefix("- ") for stray in strays]
        finally:
            kernel.close()
    return found


def _namespace(place: netns.Place) -> netns.Namespace:
    return netns.open_namespace(place)


def _recover(state_dir: Path | None, place: netns.Namespace, kernel: InspectableKernel) -> Recovery:
    steps: list[Step] = []
    live: list[Header] = []
    in_use: list[Resource] = []
    try:
        paths = journals(state_directory(state_dir, create=False), place.inode)
    except KernelError:
        paths = []  # no directory, no journals
    for path in paths:
        journal = _take(path)
        if journal is None:
            header, changes = read(path)
            if header is not None:
                live.append(header)
                in_use += [held.current for held in fold(changes).values() if held.current is not None]
            continue
        steps += roll_back(journal, place, kernel)
    slots = {header.slot for header in live} | set(_slots_of_owners(kernel.tables()))
    numbers = {number for slot in slots for number in tables_of(slot)}
    for stray in _strays(kernel, in_use, numbers, {header.instance for header in live}):
        step = Step("drop", stray)
        try:
            perform(step, kernel)
        except KernelError as exc:
            step = Step("keep", stray, note=str(exc))
        steps.append(step)
    return Recovery(steps, sorted(header.instance for header in live))


def _take(path: Path) -> Journal | None:
    """Lock the journal of a dead instance; None for that of a live one, or if it is gone."""
    journal = Journal.open(path, create=False)
    if journal is not None:
        return journal
    header = read(path)[0]
    if header is not None and header.owner.alive:
        return None
    await_release(path)  # its guard is at work
    return Journal.open(path, create=False)


def roll_back(journal: Journal, place: netns.Place, kernel: Kernel) -> list[Step]:
    """Undo a locked journal of a dead instance, and remove it unless something could not be restored.

    One of another boot or of a namespace that had the same inode once is only removed.
    """
    try:
        if not is_of(journal.header, place):
            journal.remove()
            return []
        # A table with the owner flag went with its process.
        held = {key: known for key, known in journal.held.items() if not _is_owned(known.item)}
        with guarded(journal.path.parent, (known.item for known in held.values())):
            steps, left = undo(held, kernel, spared(journal.path, journal.header, held))
            if not left:
                journal.remove()
        return steps
    finally:
        journal.close()


def _is_owned(item: Resource) -> bool:
    return isinstance(item, NftTable) and item.owner


def is_of(header: Header | None, place: netns.Place) -> bool:
    """Tell whether a journal speaks of this namespace in its present life."""
    with netns.inside(place):
        cookie = namespace_cookie()
    return header is not None and header.boot == boot_id() and header.cookie == cookie


def roll_back_of(path: Path, owner: Owner) -> list[Step]:
    """Undo, in the thread's namespace, the journal of a process that has died; [] if somebody else has taken it over.

    Waits some seconds for whoever has it locked. Raise KernelError.
    """
    deadline = time.monotonic() + _TAKE_OVER_TIMEOUT
    while True:
        header = read(path)[0]
        if header is not None and header.owner != owner:
            return []
        journal = Journal.open(path, create=False)
        if journal is None:
            if not path.exists() or time.monotonic() > deadline:
                return []
            time.sleep(0.01)
            continue
        if journal.header is not None and journal.header.owner != owner:
            journal.close()
            return []
        try:
            kernel = LiveKernel()
        except BaseException:
            journal.close()
            raise
        try:
            return roll_back(journal, kernel.namespace, kernel)
        finally:
            kernel.close()


def _slots_of_owners(tables: Iterable[ObservedTable]) -> Iterable[int]:
    """Yield the slots of instances that live because they own a table, wherever their journal is."""
    for table in tables:
        words = table.comment.split()
        if table.owner and words[:2] == ["gostnet", "slot"] and len(words) > 2 and words[2].isdigit():
            yield int(words[2])


def _strays(
    kernel: InspectableKernel, in_use: list[Resource], numbers: set[int], instances: set[str]
) -> Iterable[Resource]:
    for table in kernel.tables():
        instance = table.name.removeprefix(TABLE_PREFIX)
        ours = table.name != instance and table.comment.split()[:1] == ["gostnet"]
        if ours and not table.owner and instance not in instances and not instance.endswith(LOCK_SUFFIX):
            yield NftTable(table.name, owner=False)
    for rule in kernel.rules():
        if rule.protocol == ROUTE_PROTOCOL and rule.table not in numbers and rule not in in_use:
            yield rule
    for route in kernel.routes():
        if route.protocol == ROUTE_PROTOCOL and route.table not in numbers and route not in in_use:
            yield route
