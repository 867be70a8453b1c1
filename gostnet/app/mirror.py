"""What several workers look like from outside: each service has one state and one set of counters.

The supervisor builds the same services as its workers, and serves none of them: they are there to be looked at, and to
tell observers what they would be told by one process.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping

from ..core.tasks import Scope
from ..pipeline.service import Service, State
from ..policies.observer import Reporter
from ..policies.quota import Keeper
from .assemble import Assembly

_BEST = (State.READY, State.FAILED, State.RUNNING, State.CLOSED)
"""What a service is doing if one of its workers is; the first that is found."""


class Mirror:
    """The services of one configuration.

    assembly   its objects, of which nothing is opened
    settle     waits until what the workers have counted is up to date
    """

    def __init__(self, assembly: Assembly, settle: Callable[[], Awaitable[None]]) -> None:
        self.assembly = assembly
        self._settle = settle
        self._states: dict[str, dict[int, State]] = {name: {} for name in assembly.services}
        self._told: dict[str, State] = {}
        self._scope = Scope("mirror")
        for reporter in assembly.build.reporters:
            reporter.prepare = settle

    # ---- what the workers say ------------------------------------------------------------------
    def hear(self, worker: int, service: str, state: State, message: str) -> None:
        """Take what a service at one worker says of itself."""
        shown = self.assembly.services.get(service)
        if shown is None:
            return
        states = self._states[service]
        states[worker] = state
        if message == _said(shown, state):
            self._merge(shown, states)
        elif len(states) == 1:
            shown.events.append((int(time.time()), message))  # such as where it listens: all do there

    def lost(self, worker: int) -> None:
        """Take that a worker has died: a service that only it had has failed, until its successor serves it."""
        for name, states in self._states.items():
            if states.pop(worker, State.CLOSED) is not State.CLOSED:
                self._merge(self.assembly.services[name], states)

    def close(self) -> None:
        """Take that all workers have ended, also those that were killed before they had said so."""
        for name, states in self._states.items():
            if states:
                states.update(dict.fromkeys(states, State.CLOSED))
                self._merge(self.assembly.services[name], states)

    def _merge(self, service: Service, states: Mapping[int, State]) -> None:
        state = next((best for best in _BEST if best in states.values()), State.FAILED)
        if self._told.get(service.name) is state:
            return
        self._told[service.name] = service.state = state
        message = _said(service, state)
        service.events.append((int(time.time()), message))
        if service.policies.books is not None:
            service.policies.books.become(state.value, message)

    # ---- what is shown -------------------------------------------------------------------------
    async def statuses(self) -> dict[str, Mapping[str, object]]:
        """Return the status of all services, as GOST's API shows it."""
        await self._settle()
        return {name: service.status() for name, service in self.assembly.services.items()}

    def begin(self) -> None:
        """Tell observers from now on."""
        for reloader in self.assembly.build.reloaders:
            if isinstance(reloader, Reporter | Keeper):
                self._scope.start(reloader.run())

    def hand_over(self, successor: Mirror) -> None:
        """Let the mirror of the next configuration hear what this one has heard, of services of the same names."""
        for name, service in self.assembly.services.items():
            fresh = successor.assembly.services.get(name)
            if fresh is not None:
                fresh.created, fresh.state = service.created, service.state
                fresh.events.extend(service.events)
                successor._states[name] = self._states[name]
                successor._told[name] = self._told.get(name, service.state)

    async def end(self, successor: Mirror | None = None) -> None:
        """Tell the rest, but for what `successor` has taken over."""
        await self._scope.cancel()
        await self.assembly.build.aclose(successor.assembly.build if successor is not None else None)


def _said(service: Service, state: State) -> str:
    return f"service {service.name} is {state.value}"
