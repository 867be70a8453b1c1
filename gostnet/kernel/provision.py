"""Provisioning: the kernel holds what an instance wants, for as long as the instance lives and not a second longer.

Three nets below each other give the host back as it was: what the kernel owns for the process goes with it (the
nftables table); a guard undoes the rest from the journal when the daemon dies; and `recovery` does at the next start
what even a dead guard could not.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from gostnet.core.errors import KernelError
from gostnet.core.resources import (
    FIRST_TABLE,
    SLOTS,
    Capture,
    Inlet,
    Key,
    Masquerade,
    NftTable,
    PortForward,
    Resource,
    Route,
    tables_of,
)

from . import dnat, masquerade, watch
from . import netns as namespaces
from .capture import compile_captures, table_name
from .journal import (
    Header,
    Journal,
    Owner,
    await_release,
    boot_id,
    directory_lock,
    journal_path,
    journals,
    namespace_cookie,
    read,
    state_directory,
)
from .live import LiveKernel
from .plan import Change, Held, Step, change_of, fold, inverse, perform, plan, undo
from .recovery import InspectableKernel, is_of
from .shared import guarded, inherited, spared

if TYPE_CHECKING:
    from .nft import Additions


class Watcher(Protocol):
    """What rolls a journal back when its owner dies."""

    @property
    def alive(self) -> bool: ...

    def await_ready(self) -> None: ...

    def dismiss(self) -> None: ...


class Provisioner:
    """Makes the kernel of one network namespace hold what one instance wants.

    Synchronous: call it in a thread, one call at a time. Nothing exists on disk and no guard runs before the first
    step is to be made. A context manager; leaving it rolls back and closes.
    """

    def __init__(
        self,
        instance: str,
        *,
        state_dir: Path | None = None,
        netns: namespaces.Place = None,
        kernel: InspectableKernel | None = None,
        start_guard: Callable[[Path, Owner], Watcher] = watch.start,
    ) -> None:
        """Open the sockets in a namespace (a name or a path), by default the thread's.

        `kernel` and `start_guard` stand in for the real ones in tests. Raise ConfigError for a name that no instance
        can have, KernelError if the namespace cannot be entered.
        """
        table_name(instance)
        self.instance = instance
        self.left_out: dict[Key, KernelError] = {}
        """Of the last `apply`, the tentative routes that the kernel has refused."""
        self._state_dir = state_dir
        self._start_guard = start_guard
        self._journal: Journal | None = None
        self._guard: Watcher | None = None
        self._slot = 0
        self._compiled: tuple[object, tuple[Resource, ...]] | None = None
        self._closed = False
        self._namespace = namespaces.open_namespace(netns)
        try:
            self._kernel: InspectableKernel = kernel or LiveKernel(self._namespace)
        except BaseException:
            self._namespace.close()
            raise

    def __enter__(self) -> Provisioner:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def holds(self) -> bool:
        """Whether the kernel holds something of ours."""
        return self._journal is not None

    # -- the operations --
    def claim(self) -> None:
        """Become the one instance of this name in the namespace, before anything is held. Idempotent.

        `apply` and `rollback` let go when nothing is held after them. Raise KernelError (EBUSY: it runs already).
        """
        if self._journal is None:
            self._begin()

    def plan(self, desired: Sequence[Resource]) -> list[Step]:
        """Return the steps that `apply` would make now; nothing is changed, also not on disk.

        Where another process runs this instance, they lead from what that one holds. Raise ConfigError for a capture
        that makes no sense, KernelError if the kernel cannot be observed.
        """
        if self._journal is not None:
            return self._plan(desired, self._journal.held)
        try:
            directory = state_directory(self._state_dir, create=False)
        except KernelError:
            self._slot = self._free_slot(())
            return self._plan(desired, {})
        header, changes = read(journal_path(directory, self._namespace.inode, self.instance))
        self._slot = self._free_slot(self._others(directory)) if header is None else header.slot
        return self._plan(desired, fold(changes))

    def apply(self, desired: Sequence[Resource]) -> list[Step]:
        """Make the kernel hold exactly what is desired, and return the steps that were made.

        Each step is on disk before it is made. If one fails, those before it are taken back and the error is raised:
        everything or nothing. The nftables table changes in one transaction, so there is no moment without it.
        Raise ConfigError for a capture that makes no sense, KernelError otherwise (EBUSY: the instance runs already).
        """
        if self._closed:
            raise KernelError("apply", errno.EBADF, "the provisioner is closed")
        if self._journal is None:
            if not self.plan(desired) and not any(item.shared for item in self._compile(desired)):
                return []
            self._begin()
        else:
            self._renew_guard()
        journal = self._journal
        assert journal is not None
        wanted = self._compile(desired)
        with guarded(journal.path.parent, [*wanted, *(known.item for known in journal.held.values())]):
            return self._apply(journal, wanted)

    def _apply(self, journal: Journal, wanted: Sequence[Resource]) -> list[Step]:
        """Do what `apply` says, with the other instances standing still as far as they share something with us."""
        assert journal.header is not None
        self.left_out = {}
        claims = inherited(journal.path, journal.header, wanted, journal.held)
        claims = [change for change in claims if self._kernel.observe(_item(change)) == change.after]
        done: list[Step] = []
        try:
            for change in claims:
                journal.append(change)
            held = journal.held
            left_to_others = spared(journal.path, journal.header, held)
            for step in plan(wanted, held, self._kernel, left_to_others):
                self._step(journal, step, done)
        except KernelError:
            self._take_back(journal, done)
            for change in claims:
                journal.append(Change(change.after, change.before))
            self._end_if_empty(journal)
            raise
        keys = {item.key for item in wanted}
        for key, known in held.items():
            if key in left_to_others and key not in keys:
                journal.append(Change(known.current, known.original))  # no longer ours
        self._end_if_empty(journal)
        return done

    def admit(self, additions: Additions) -> None:
        """Have addresses be in sets of the table (see `names_set`) for a while, all or none. Raise KernelError.

        They are in no journal: they go with the table, and by themselves.
        """
        self._kernel.admit(table_name(self.instance), additions)

    def rollback(self) -> list[Step]:
        """Restore what was there before the first `apply`, and return the steps; [] if nothing is held.

        What somebody else has changed meanwhile is left alone: its step is `keep`. So is that of what the kernel
        refuses to restore; the journal then stays for `recover`.
        """
        journal = self._journal
        if journal is None:
            return []
        held = journal.held
        with guarded(journal.path.parent, (known.item for known in held.values())):
            steps, left = undo(held, self._kernel, spared(journal.path, journal.header, held))
            self._end(keep=bool(left))
        return steps

    def close(self) -> None:
        """Roll back and let go of everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self.rollback()
        finally:
            self._end(keep=True)
            self._kernel.close()
            self._namespace.close()

    # -- steps --
    def _plan(self, desired: Sequence[Resource], held: Mapping[Key, Held]) -> list[Step]:
        return plan(self._compile(desired), held, self._kernel)

    def _compile(self, desired: Sequence[Resource]) -> list[Resource]:
        """Return what is desired in terms of what the kernel can hold."""
        captures = tuple(item for item in desired if isinstance(item, Capture))
        masquerades = tuple(item for item in desired if isinstance(item, Masquerade))
        forwards = tuple(item for item in desired if isinstance(item, PortForward))
        inlets = tuple(item for item in desired if isinstance(item, Inlet))
        ipv6 = bool(captures or inlets) and self._kernel.has_ipv6()
        arguments = (captures, inlets, masquerades, forwards, self._slot, ipv6)
        if self._compiled is None or self._compiled[0] != arguments:  # apply begins with a plan
            resources = compile_captures(captures, inlets, instance=self.instance, slot=self._slot, ipv6=ipv6)
            self._compiled = (arguments, self._with_translations(resources, masquerades, forwards))
        rest = [item for item in desired if not isinstance(item, Capture | Inlet | Masquerade | PortForward)]
        return [*rest, *self._compiled[1]]

    def _with_translations(
        self, resources: tuple[Resource, ...], masquerades: tuple[Masquerade, ...], forwards: tuple[PortForward, ...]
    ) -> tuple[Resource, ...]:
        """Add the sysctls of masquerades and port forwards, and their rules to the one table that the instance has."""
        if not masquerades and not forwards:
            return resources
        content = (*masquerade.statements_of(masquerades), *dnat.statements_of(forwards))
        others = [item for item in resources if not isinstance(item, NftTable)]
        for item in resources:
            if isinstance(item, NftTable):
                content = (*item.content, *content)
        table = NftTable(table_name(self.instance), content, note=f"slot {self._slot}")
        sysctls = dict.fromkeys((*masquerade.sysctls_of(masquerades), *dnat.sysctls_of(forwards)))
        return (*sysctls, *others, table)

    def _step(self, journal: Journal, step: Step, done: list[Step]) -> None:
        """Make a step and add it to those done, unless it is one that may be left out and has been."""
        if step.verb == "keep":
            done.append(step)
            return
        journal.append(change_of(step))
        try:
            perform(step, self._kernel)
        except KernelError as exc:
            self._forget(journal, step)  # a step that fails has changed nothing
            if not (isinstance(step.item, Route) and step.item.tentative and step.verb != "drop"):
                raise
            self.left_out[step.item.key] = exc
        else:
            done.append(step)

    def _forget(self, journal: Journal, step: Step) -> None:
        """Record that a step is taken back; on disk if other instances have to know."""
        (journal.append if step.item.shared else journal.note)(_back(step))

    def _take_back(self, journal: Journal, done: Sequence[Step]) -> None:
        """Take the steps of a failed apply back, the last first; what fails then stays in the journal."""
        for step in reversed(done):
            try:
                perform(inverse(step), self._kernel)
            except KernelError:
                continue
            self._forget(journal, step)

    def _end_if_empty(self, journal: Journal) -> None:
        if all(known.current == known.original for known in journal.held.values()):
            self._end()

    # -- begin and end --
    def _begin(self) -> None:
        """Lock the journal, undo what a dead predecessor left, choose a slot, start the guard, write the header."""
        directory = state_directory(self._state_dir)
        path = journal_path(directory, self._namespace.inode, self.instance)
        # Before the directory's lock, which the guard that has a journal locked may wait for.
        journal = self._lock(path)
        with directory_lock(directory):
            try:
                self._undo_predecessor(journal)
                self._slot = self._free_slot(self._others(directory))
                me = Owner.current()
                with namespaces.inside(self._namespace):
                    self._guard = self._start_guard(path, me)
                    cookie = namespace_cookie()
                journal.begin(Header(self.instance, me, self._slot, cookie, boot_id()))
                self._guard.await_ready()
            except BaseException:
                self._dismiss_guard()
                journal.close() if journal.changes else journal.remove()
                raise
        self._journal = journal

    def _lock(self, path: Path) -> Journal:
        """Open the journal. Raise KernelError (EBUSY) that names the process that has it."""
        journal = Journal.open(path)
        header = read(path)[0]
        if journal is None and (header is None or not header.owner.alive) and await_release(path):
            journal = Journal.open(path)  # the guard of a dead one was at work
        if journal is not None:
            return journal
        who = "" if header is None else f", by process {header.owner.pid}"
        raise KernelError(
            "start",
            errno.EBUSY,
            f"instance {self.instance!r} runs already in this network namespace{who}",
            hint="give this one another name with --instance",
        )

    def _undo_predecessor(self, journal: Journal) -> None:
        if not journal.changes or not is_of(journal.header, self._namespace):
            journal.changes.clear()
            return
        steps, left = undo(journal.held, self._kernel, spared(journal.path, journal.header, journal.held))
        if left:
            reasons = "; ".join(step.note for step in steps if step.verb == "keep")
            raise KernelError("undo what a dead instance left", errno.EBUSY, reasons, hint="see gostnet rollback")
        journal.changes.clear()

    def _others(self, directory: Path) -> set[int]:
        """Return the slots of the other instances in this namespace."""
        headers = [read(path)[0] for path in journals(directory, self._namespace.inode)]
        return {header.slot for header in headers if header is not None and header.instance != self.instance}

    def _free_slot(self, taken: Sequence[int] | set[int]) -> int:
        """Return the lowest slot that no other instance has and no rule or route uses. Raise KernelError."""
        rules = self._kernel.rules()
        numbers = {number for rule in rules for number in (rule.priority, rule.table)}
        numbers |= {route.table for route in self._kernel.routes()}
        for slot in range(SLOTS):
            if slot not in taken and not tables_of(slot) & numbers:
                return slot
        raise KernelError("start", errno.ENOSPC, f"all {SLOTS} routing tables from {FIRST_TABLE} on are in use")

    def _renew_guard(self) -> None:
        """Start another guard if somebody has killed ours."""
        assert self._journal is not None
        if self._guard is not None and not self._guard.alive:
            self._dismiss_guard()
            with namespaces.inside(self._namespace):
                self._guard = self._start_guard(self._journal.path, Owner.current())
            self._guard.await_ready()

    def _dismiss_guard(self) -> None:
        watcher, self._guard = self._guard, None
        if watcher is not None:
            watcher.dismiss()

    def _end(self, *, keep: bool = False) -> None:
        """Let go of the journal, which is removed unless it is to be kept, and of the guard. Idempotent."""
        journal, self._journal = self._journal, None
        if journal is not None and keep:
            journal.close()
        elif journal is not None:
            journal.remove()
        self._dismiss_guard()


def _item(change: Change) -> Resource:
    assert change.after is not None
    return change.after


def _back(step: Step) -> Change:
    change = change_of(step)
    return Change(change.after, change.before)
