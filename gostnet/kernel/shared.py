"""Resources that several instances want: the first that does makes them, the last that goes takes them away.

Each instance's journal says which it holds. One that finds such a resource made by another instance holds it as well,
and knows from the other's journal what was there before; one that goes leaves to the others what they hold. Whoever
reads other journals to decide, and writes its own or acts upon it, has the lock of the directory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from gostnet.core.resources import Key, Resource

from .journal import Header, directory_lock, read
from .plan import Change, Held, fold


def guarded(directory: Path, items: Iterable[Resource]) -> AbstractContextManager[None]:
    """Return the directory's lock if any of `items` is of a kind that is shared, else nothing to wait for."""
    return directory_lock(directory) if any(item.shared for item in items) else nullcontext()


def inherited(path: Path, header: Header, wanted: Iterable[Resource], held: Mapping[Key, Held]) -> list[Change]:
    """Return what to record of resources that another instance has made just as they are wanted here.

    `path` and `header` are those of the instance's own journal, and `held` is what that says. What a dead instance
    left counts too: its guard will find that it is wanted.
    """
    missing = {item.key: item for item in wanted if item.shared and not _holds(held, item)}
    found: dict[Key, Change] = {}
    if missing:
        for _, others in _others(path, header):
            for key, item in missing.items():
                if key not in found and _holds(others, item):
                    found[key] = Change(others[key].original, item)
    return list(found.values())


def spared(path: Path, header: Header | None, held: Mapping[Key, Held]) -> frozenset[Key]:
    """Return the keys of what is held here and by a live other instance, which will take it away in its time."""
    mine = {key: known.current for key, known in held.items() if known.item.shared}
    if header is None or not mine:
        return frozenset()
    live = [others for other, others in _others(path, header) if other.owner.alive]
    return frozenset(key for key, item in mine.items() if item and any(_holds(others, item) for others in live))


def _holds(held: Mapping[Key, Held], item: Resource) -> bool:
    known = held.get(item.key)
    return known is not None and known.current == item and known.current != known.original


def _others(path: Path, header: Header) -> Iterator[tuple[Header, dict[Key, Held]]]:
    """Yield the other journals that speak of the same network namespace in its present life."""
    inode = path.name.partition("-")[0]
    for candidate in sorted(path.parent.glob(f"{inode}-*.journal")):
        other, changes = read(candidate)
        if candidate == path or other is None or other.instance == header.instance:
            continue
        if (other.cookie, other.boot) == (header.cookie, header.boot):
            yield other, fold(changes)
