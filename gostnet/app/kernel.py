"""The daemon's kernel state, and the verbs `plan` and `rollback`: where components' wishes meet the kernel package."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from ..config.argv import Invocation
from ..config.load import Loader
from ..core.errors import GostnetError, KernelError
from ..core.resources import Key, Resource
from ..pipeline.service import Service

if TYPE_CHECKING:
    # The kernel package brings pyroute2 along, which a plain proxy service never needs: 15 MiB and 0.2 s.
    from ..kernel.nft import Additions
    from ..kernel.plan import Step
    from ..kernel.provision import Provisioner

Wanted = Mapping[str, Sequence[Resource]]
"""Resources by network namespace, "" for the daemon's own."""


def wanted_by(services: Iterable[Service]) -> dict[str, list[Resource]]:
    """Collect what the listeners of `services` need; valid once they are open."""
    wanted: dict[str, list[Resource]] = {}
    for service in services:
        resources = service.listener.source.resources()
        if resources:
            wanted.setdefault(service.listener.netns, []).extend(resources)
    return wanted


class Holds(Protocol):
    """What makes the kernel hold resources, in this process or in another; called in threads."""

    @property
    def left_out(self) -> dict[Key, KernelError]:
        """What the kernel has refused at the last `apply`, and could be done without."""

    def apply(self, wanted: Wanted) -> list[Step]:
        """Make the kernel hold `wanted`. Raise GostnetError, with nothing half done."""


class Kernel(Holds, Protocol):
    """The same from the first to the last."""

    def recover(self) -> list[Step]:
        """Undo what dead instances left."""

    def claim(self, namespaces: Collection[str]) -> None:
        """Become the one instance of its name in these network namespaces, until nothing is held there any more.

        Where this is not done, `apply` does it. Raise KernelError (EBUSY) if another process is that instance.
        """

    def rollback(self) -> list[Step]:
        """Undo everything and close."""


class KernelState:
    """What one instance makes the kernel hold, in every namespace where it has listeners or routes.

    Synchronous; calls from several threads take their turns.
    """

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._provisioners: dict[str, Provisioner] = {}
        self._turn = Lock()

    @property
    def left_out(self) -> dict[Key, KernelError]:
        """What the kernel has refused at the last `apply`, and could be done without."""
        found: dict[Key, KernelError] = {}
        for netns, provisioner in tuple(self._provisioners.items()):
            found |= {(*key, netns): exc for key, exc in provisioner.left_out.items()}
        return found

    def recover(self) -> list[Step]:
        """Undo what dead instances left in the daemon's namespace, if there is a trace of any."""
        homes = (Path("/run/gostnet"), Path(os.environ.get("XDG_RUNTIME_DIR", "/nonexistent")) / "gostnet")
        if not any(path for home in homes for path in home.glob("*.journal")):
            return []
        from ..kernel.recovery import recover

        return recover().steps

    def claim(self, namespaces: Collection[str]) -> None:
        """Do what `Kernel.claim` says; a namespace that is not there yet, which a command may make, is left out."""
        if not namespaces:
            return
        with self._turn:
            for netns in namespaces:
                try:
                    self._provisioner(netns).claim()
                except KernelError as exc:
                    if exc.errno != errno.ENOENT or netns in self._provisioners:
                        raise

    def _provisioner(self, netns: str) -> Provisioner:
        from ..kernel.provision import Provisioner

        if netns not in self._provisioners:
            self._provisioners[netns] = Provisioner(self._instance, netns=netns or None)
        return self._provisioners[netns]

    def apply(self, wanted: Wanted) -> list[Step]:
        """Make the kernel hold `wanted`, no more and no less of ours. Raise KernelError, with nothing half done."""
        with self._turn:
            return self._apply(wanted)

    def _apply(self, wanted: Wanted) -> list[Step]:
        if not wanted and not self._provisioners:
            return []
        steps: list[Step] = []
        for netns in {*wanted, *self._provisioners}:
            steps += self._provisioner(netns).apply(wanted.get(netns, ()))
        return steps

    def admit(self, netns: str, additions: Additions) -> None:
        """Have addresses be in sets of a namespace's table for a while, all or none. Raise KernelError."""
        with self._turn:
            provisioner = self._provisioners.get(netns)
            if provisioner is None:
                raise KernelError("nft add element", errno.ENOENT, "there is no table")
            provisioner.admit(additions)

    def rollback(self) -> list[Step]:
        """Undo everything and close."""
        steps: list[Step] = []
        with self._turn:
            while self._provisioners:
                _, provisioner = self._provisioners.popitem()
                try:
                    steps += provisioner.rollback()
                finally:
                    provisioner.close()
        return steps


def plan(invocation: Invocation) -> int:
    """Print what `run` would change in the kernel; change nothing."""
    from ..kernel.provision import Provisioner
    from .check_workers import as_lines
    from .checking import passes
    from .direct import DirectWays, notes
    from .preview import preview

    loaded = Loader(invocation).load()
    if not passes(loaded, invocation):
        return 1
    try:
        assembly, late = preview(loaded, invocation)
        steps: list[Step] = []
        ways = DirectWays(assembly.services)
        wanted = ways.added_to(assembly.routes.added_to(wanted_by(assembly.services.values())))
        for netns, resources in wanted.items():
            with Provisioner(invocation.instance, netns=netns or None) as provisioner:
                steps += provisioner.plan(resources)
    except GostnetError as exc:
        print(f"gostnet: error: {exc} [{exc.code}]", file=sys.stderr)
        return 1
    _print_steps(steps, "no changes", invocation.json, [*as_lines(loaded.config), *notes(ways), *late])
    return 0


def rollback(invocation: Invocation) -> int:
    """Undo what dead instances left in this network namespace; name those that live."""
    from ..kernel.recovery import recover

    try:
        steps, live = recover()
    except GostnetError as exc:
        print(f"gostnet: error: {exc} [{exc.code}]", file=sys.stderr)
        return 1
    for name in live:
        print(f"instance {name} is running and was left alone", file=sys.stderr)
    _print_steps(steps, "nothing to roll back", invocation.json)
    return 1 if any(step.verb == "keep" for step in steps) else 0


def _print_steps(steps: Sequence[Step], none: str, as_json: bool, remarks: Sequence[str] = ()) -> None:
    lines = [line for step in steps for line in str(step).splitlines()]
    if as_json:
        print(json.dumps({"steps": lines, **({"notes": remarks} if remarks else {})}, indent=2))
    elif lines:
        print("\n".join(lines))
    else:
        print(none)
    if not as_json:
        for remark in remarks:
            print(f"# {remark}")
    sys.stdout.flush()
