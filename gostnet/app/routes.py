"""Routers and the kernel: the routes of `routers:` are the kernel's too, for as long as they are configured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from ..core.errors import GostnetError
from ..core.log import Logger
from ..core.resources import Resource
from ..core.tasks import in_thread
from ..policies.routers import StaticRouter
from .kernel import Holds, Wanted

SETTLE = 0.2
"""Seconds that changes have to settle: links and addresses come in groups."""


@dataclass(slots=True)
class Routes:
    """The routers of one configuration, and the network namespaces of the devices that use them.

    Where no device uses a router its routes are those of the daemon's own namespace.
    """

    routers: Mapping[str, StaticRouter] = field(default_factory=dict)
    users: dict[str, set[str]] = field(default_factory=dict)

    def use(self, name: str, netns: str) -> StaticRouter | None:
        """Return a router for a device in a namespace, None if there is none of this name."""
        router = self.routers.get(name)
        if router is not None:
            self.users.setdefault(name, set()).add(netns)
        return router

    def take_over(self, before: Routes) -> None:
        """Let devices that outlast a reload see the tables of the new configuration."""
        for name, router in self.routers.items():
            if name in before.routers:
                router.take_over(before.routers[name])

    def places(self) -> dict[str, list[StaticRouter]]:
        """Return the routers by namespace."""
        found: dict[str, list[StaticRouter]] = {}
        for name, router in self.routers.items():
            for netns in sorted(self.users.get(name, {""})):
                found.setdefault(netns, []).append(router)
        return found

    def added_to(self, wanted: Wanted) -> dict[str, list[Resource]]:
        """Return `wanted` and the routes; of two routes to one network that of a service counts, then the first."""
        merged = {netns: list(resources) for netns, resources in wanted.items()}
        for netns, routers in self.places().items():
            there = merged.get(netns, [])
            keys = {item.key for item in there}
            for router in routers:
                for item in router.resources():
                    if item.key not in keys:
                        keys.add(item.key)
                        there.append(item)
            if there:
                merged[netns] = there
        return merged


class RouteKeeper:
    """Brings the kernel up to date when a router's table has been read again, and when links come and go.

    A route that was refused, as its gateway could not be reached yet, is tried again then; one that somebody has
    removed comes back.
    """

    def __init__(self, kernel: Holds, log: Logger) -> None:
        self._kernel = kernel
        self._log = log
        self._told: dict[str, str] = {}

    async def run(self, routes: Routes, wanted: Callable[[], Wanted]) -> None:
        """Keep `wanted()` in the kernel until cancelled; return at once where there is no router."""
        places = routes.places()
        if not places:
            return
        from ..kernel.changes import Changes, Topic

        changed = asyncio.Event()
        changed.set()  # something may have happened since they were applied
        topics = Topic.LINKS | Topic.ADDRESSES | Topic.OWN_ROUTES
        with ExitStack() as stack:
            for router in routes.routers.values():
                router.changed.append(changed.set)
                stack.callback(router.changed.remove, changed.set)
            for netns in places:
                stack.enter_context(Changes(topics, changed.set, netns or None))
            self._tell()
            while True:
                await changed.wait()
                await asyncio.sleep(SETTLE)
                changed.clear()
                try:
                    steps = await in_thread(self._kernel.apply, wanted())
                except GostnetError as exc:
                    self._log.warn(f"routes: {exc}")
                    continue
                for step in steps:
                    self._log.info(f"routes: {step}")
                self._tell()

    def _tell(self) -> None:
        """Say once which routes the kernel does not take."""
        refused = {" ".join(key): str(exc) for key, exc in self._kernel.left_out.items()}
        for name, reason in refused.items():
            if self._told.get(name) != reason:
                self._log.warn(f"routes: {reason}; tried again when links or addresses change")
        self._told = refused
