"""Steps from what the kernel holds to what it shall hold, and back; pure apart from asking a `Kernel` to observe.

Putting goes in the order of ranks, dropping in the reverse one. What was there before is restored, never just
removed; what somebody else has changed meanwhile is left alone and reported.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from gostnet.core.errors import KernelError
from gostnet.core.resources import Address, Bridge, Key, Link, NftTable, Port, Resource, Route, Rule, Sysctl

from . import netlink

_SIGNS = {"put": "+", "drop": "-", "change": "~", "keep": "!"}
Verb = Literal["put", "drop", "change", "keep"]


class Kernel(Protocol):
    """What holds resources: the kernel of a network namespace, or a dict that plays it."""

    def observe(self, item: Resource) -> Resource | None:
        """Return what is there under the item's key, None for nothing. Raise KernelError."""

    def put(self, item: Resource, before: Resource | None) -> None:
        """Make the item be there, in place of `before`. Raise KernelError, and have changed nothing then."""

    def drop(self, item: Resource) -> None:
        """Remove it; no error if it is gone. Raise KernelError."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change: `item` is put, dropped, or put in place of `before`; or it is kept although it was to go.

    `str()` is the line (for an nftables table the lines) of `gostnet plan`: `+` put, `-` drop, `~` change, in the
    words of nft(8), ip(8) and sysctl(8), such that the commands have the same effect; `!` keep, with the reason.
    """

    verb: Verb
    item: Resource
    before: Resource | None = None
    note: str = ""

    def __str__(self) -> str:
        sign = _SIGNS[self.verb]
        return "\n".join(f"{sign} {line}" for line in _lines(self))


def _lines(step: Step) -> Iterator[str]:
    if step.verb == "keep":
        yield f"{_name(step.item)}: {step.note}"
        return
    item, put = step.item, step.verb != "drop"
    match item:
        case Sysctl():
            yield f"sysctl -w {item.name}={item.value}"
        case Bridge():
            yield f"ip link {'add' if put else 'del'} {netlink.bridge_words(item)}"
        case Port():
            yield f"ip link set {netlink.port_words(item)}"
        case Link():
            yield f"ip link set {netlink.link_words(item)}"
        case Address():
            yield f"ip address {'add' if put else 'del'} {item.address} dev {item.device}"
        case Route():
            verb = {"put": "add", "drop": "del", "change": "replace"}[step.verb]
            yield f"{netlink.ip(item.version)} route {verb} {netlink.route_words(item)}"
        case Rule():
            yield f"{netlink.ip(item.version)} rule {'add' if put else 'del'} {netlink.rule_words(item)}"
        case NftTable() if put:
            from . import nft_table  # brings pyroute2 along, which the guard never needs

            yield from nft_table.words(item, step.before if isinstance(step.before, NftTable) else None)
        case NftTable():
            yield f"nft delete table inet {item.name}"
        case _:
            yield " ".join(item.key)


def _name(item: Resource) -> str:
    match item:
        case Sysctl():
            return f"sysctl {item.name}"
        case Bridge():
            return f"bridge {item.name}"
        case Link():
            return f"ip link {item.name}"
        case Route():
            return f"{netlink.ip(item.version)} route {netlink.route_words(item)}"
        case Rule():
            return f"{netlink.ip(item.version)} rule {netlink.rule_words(item)}"
        case NftTable():
            return f"nft table inet {item.name}"
        case _:
            return " ".join(item.key)


# ---- what is held -------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Change:
    """A change that is recorded before it is made: what was under a key, and what shall be, None for nothing."""

    before: Resource | None
    after: Resource | None

    @property
    def key(self) -> Key:
        """The key of both."""
        item = self.after or self.before
        assert item is not None
        return item.key


@dataclass(frozen=True, slots=True)
class Held:
    """What became of one key: what was there first, what we have put since, and what should be there now."""

    original: Resource | None
    made: tuple[Resource, ...]
    current: Resource | None

    @property
    def item(self) -> Resource:
        """Any of them, for its key and rank."""
        item = self.current or (self.made[-1] if self.made else self.original)
        assert item is not None
        return item


def fold(changes: Iterable[Change]) -> dict[Key, Held]:
    """Sum a journal up, key by key in the order of their first change."""
    held: dict[Key, Held] = {}
    for change in changes:
        known = held.get(change.key) or Held(change.before, (), change.before)
        made = (*known.made, change.after) if change.after is not None else known.made
        held[change.key] = replace(known, made=made, current=change.after)
    return held


def change_of(step: Step) -> Change:
    """Return what a step does to its key."""
    if step.verb == "drop":
        return Change(step.item, None)
    return Change(step.before if _can_come_back(step.before) else None, step.item)


def _can_come_back(item: Resource | None) -> bool:
    """Tell whether enough is known to put it; of a foreign table with our name only the name is."""
    return not (isinstance(item, NftTable) and not item.content)


# ---- forward ------------------------------------------------------------------------------------
def plan(
    desired: Sequence[Resource], held: Mapping[Key, Held], kernel: Kernel, spared: Collection[Key] = ()
) -> list[Step]:
    """Return the steps to `desired`, given what we hold already; nothing is changed.

    What is `spared` is left to others who hold it too. Something that is there already as desired is nobody's step, and
    stays when we go. Raise KernelError if the kernel cannot be observed.
    """
    wanted = {item.key: item for item in desired}
    forward, backward = [], []
    for key, item in wanted.items():
        there = kernel.observe(item)
        if there == item:
            continue
        known = held.get(key)
        if known is not None and known.current == there:
            there = known.current  # the same, but with its content where observing cannot tell it
        forward.append(Step("put", item) if there is None else Step("change", item, there))
    for key, known in held.items():
        if key not in wanted and key not in spared and known.current != known.original:
            backward += undo_step(known, kernel)
    forward.sort(key=lambda step: step.item.rank)
    backward.sort(key=lambda step: step.item.rank, reverse=True)
    return forward + backward


def perform(step: Step, kernel: Kernel) -> None:
    """Do one step. Raise KernelError."""
    match step.verb:
        case "put" | "change":
            kernel.put(step.item, step.before)
        case "drop":
            kernel.drop(step.item)
        case "keep":
            pass


def inverse(step: Step) -> Step:
    """Return the step that takes another one back."""
    if step.verb == "put":
        return Step("drop", step.item)
    if step.verb == "drop":
        return Step("put", step.item)
    if step.verb == "change" and step.before is not None:
        return Step("change", step.before, step.item) if _can_come_back(step.before) else Step("drop", step.item)
    return step


# ---- backward -----------------------------------------------------------------------------------
def undo_step(held: Held, kernel: Kernel) -> list[Step]:
    """Return the step that restores what was there first, [] if it is there.

    Valid before, during and after any of the changes: what counts is what is observed now.
    """
    there = kernel.observe(held.item)
    if there == held.original:
        return []
    if there is None:
        if held.original is None or isinstance(held.original, Sysctl | Link | Port):
            return []  # the device, and with it the setting, is gone
        return [Step("put", held.original)]  # a route of ours that went with its device had replaced it
    ours = next((made for made in reversed(held.made) if made == there), None)
    if ours is None:
        return [Step("keep", there, note="changed by somebody else, so it is left as it is")]
    if held.original is None:
        return [Step("drop", ours)]  # not `there`: observed tables have no content, and the step may be taken back
    return [Step("change", held.original, ours)]


def undo(held: Mapping[Key, Held], kernel: Kernel, spared: Collection[Key] = ()) -> tuple[list[Step], dict[Key, Held]]:
    """Restore everything but what is `spared`; return the steps, and what could not be restored.

    A step that the kernel refuses is reported as kept and does not stop the others. A bridge in which others have put
    ports is theirs from then on.
    """
    done: list[Step] = []
    left: dict[Key, Held] = {}
    for key, known in sorted(held.items(), key=lambda pair: pair[1].item.rank, reverse=True):
        if key in spared:
            continue
        try:
            for step in undo_step(known, kernel):
                perform(step, kernel)
                done.append(step)
        except KernelError as exc:
            if not (isinstance(known.item, Bridge) and exc.errno == errno.EBUSY):
                left[key] = known
            done.append(Step("keep", known.item, note=str(exc)))
    return done, left
