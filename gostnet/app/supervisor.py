"""The supervisor: starts workers, holds the kernel's state for them, passes on what it is told, replaces the dead.

It serves nothing itself, so that nothing a peer sends can end it. Its workers end with it (PR_SET_PDEATHSIG), and the
guard, which watches it as it watches any daemon, gives the host back as it was.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import Pipe
from pathlib import Path

from ..config.argv import Invocation
from ..config.load import Loaded, Loader
from ..config.workers import parse_workers
from ..core.errors import GostnetError, KernelError
from ..core.log import Logger
from ..core.tasks import Scope, first_done, in_thread
from ..policies.ledger import SUPERVISOR, Ledger
from .daemon import DRAIN_TIMEOUT, assemble, print_error, reread, with_hint
from .kernel import KernelState
from .mirror import Mirror
from .orders import (
    Applied,
    Apply,
    Begin,
    Channel,
    Claim,
    Done,
    Failed,
    Refusal,
    Replace,
    Said,
    Settle,
    Settled,
    Stop,
    readable,
)
from .share import Share
from .signals import Signals, notify

RESTART = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before a worker that died is replaced, by the number of deaths in a row."""

SETTLED = 30.0
"""Seconds after which a worker's death does not count as one in a row with those before."""

PATIENCE = 60.0
"""Seconds for a worker to begin, or to change over: what it reads first, such as lists from the web, takes a while."""

RETURN = 5.0
"""Seconds that a reload waits for the first worker, if that has died just before."""

SETTLE = 0.5
"""Seconds for a worker to say what its connections have moved: what it says later is told in the next report."""

SOON = 0.05
"""Seconds for which counts are up to date: several services report at the same time."""

_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from gostnet.app.worker import main; sys.exit(main(sys.argv[2:]))"


class Member:
    """A worker as the supervisor knows it: its process, and the channels to it."""

    def __init__(self, ledger: Ledger) -> None:
        """Start the process, in the main thread: it dies with the thread that started it. Raise OSError."""
        orders, theirs = Pipe()
        kernel, asking = Pipe()
        self.pidfd = -1
        try:
            descriptors = (theirs.fileno(), asking.fileno(), ledger.descriptor)
            words = [str(number) for number in (os.getpid(), *descriptors)]
            # No -m: it would find modules in the working directory first.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(Path(__file__).parents[2]), *words],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env={key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
            )
            self.pidfd = os.pidfd_open(self.process.pid)
        except BaseException:
            orders.close()
            kernel.close()
            raise
        finally:
            theirs.close()
            asking.close()
        self.orders = Channel(orders)
        self.kernel = Channel(kernel)
        self.began = 0.0
        self.lock = asyncio.Lock()
        self._answers: asyncio.Queue[Done | Failed] = asyncio.Queue()
        self.gone = False
        """Whether it has ended."""
        self._settled = asyncio.Event()
        self._asked = 0

    async def listen(self, told: Callable[[Said], None]) -> None:
        """Take what it says, until it has ended."""
        while True:
            try:
                message = await self.orders.receive()
            except EOFError:
                self.gone = True
                self._settled.set()
                self._answers.put_nowait(Failed("the worker has ended"))
                return
            match message:
                case Said():
                    told(message)
                case Settled(number) if number == self._asked:
                    self._settled.set()
                case Done() | Failed():
                    self._answers.put_nowait(message)

    async def ask(self, order: Begin | Replace) -> Done | Failed:
        """Give an order and return the answer."""
        async with self.lock:
            if self.gone:
                return Failed("the worker has ended")
            self.orders.send(order)
            try:
                async with asyncio.timeout(PATIENCE):
                    return await self._answers.get()
            except TimeoutError:
                self.kill()  # nobody knows what it does
                return Failed(f"the worker does not answer for {PATIENCE:g}s")

    async def settle(self) -> None:
        """Have it write down what its connections have moved; who is busy with a reload has not done so at the end."""
        self._asked += 1
        self._settled.clear()
        if self.gone:
            return
        self.orders.send(Settle(self._asked))
        try:
            async with asyncio.timeout(SETTLE):
                await self._settled.wait()
        except TimeoutError:
            pass

    async def ended(self) -> int:
        """Wait for the process's end and return its status."""
        if self.process.returncode is None:
            await readable(self.pidfd)
        return self.process.wait()

    def kill(self) -> None:
        """End it at once."""
        if self.process.poll() is None:
            self.process.kill()

    def close(self) -> None:
        """Let go of a process that has ended."""
        self.orders.close()
        self.kernel.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Supervisor:
    """One instance whose configuration several workers serve."""

    def __init__(self, invocation: Invocation, loader: Loader, workers: int) -> None:
        self._invocation = invocation
        self._loader = loader
        self._workers = workers
        self._kernel = KernelState(invocation.instance)
        self._members: dict[int, Member] = {}
        self._listening: dict[int, asyncio.Task[None]] = {}
        self._ports: Mapping[str, int] = {}
        self._ready = False
        self._stopping = False
        self._first_serves = asyncio.Event()
        self._alone = asyncio.Event()
        """Set when the first worker is the only one left."""
        self._turn = asyncio.Lock()
        """Of those who give the workers a configuration: a worker that begins gets the one that holds."""
        self._gone: set[str] = set()
        """Services that went with the configuration before."""
        self._settling = asyncio.Lock()
        self._settled = 0.0
        self._next: Mirror | None = None
        """Of a configuration that the workers are changing over to."""

    async def run(self, loaded: Loaded) -> int:
        """Start the workers, keep them until a signal says stop, end them; return the exit status."""
        self._loaded = loaded
        self._ledger = Ledger.create(self._workers, SUPERVISOR)
        self._totals = self._ledger.totals()
        try:
            self._mirror = self._mirror_of(loaded)
        except GostnetError as exc:
            print_error(exc, loaded)
            os.close(self._ledger.descriptor)
            return 1
        signals = Signals(self._invocation.reload)
        scope = Scope("supervisor")
        try:
            interrupted, started = await first_done([self._start(scope), signals.stopped()])
            status = 0 if interrupted else 1
            if started:
                self._ready = True
                services = len(loaded.config.services)
                self._log.info("ready", services=services, pid=os.getpid(), workers=self._workers)
                notify("READY=1")
                self._mirror.begin()
                await signals.serve(scope, self._reload)
                self._log.info("stopping")
                notify("STOPPING=1")
                status = 0
            scope.start(self._kill_when_told(signals), "kill")
            await self._stop()
            if status == 0:
                self._log.info("stopped")
        finally:
            for member in self._members.values():
                member.kill()
            await scope.cancel()
            await in_thread(self._kernel.rollback)
            if self._ready:
                await self._mirror.end()
            self._log.sink.close()
            os.close(self._ledger.descriptor)
        return status

    async def _kill_when_told(self, signals: Signals) -> None:
        """Let no worker drain after a second signal; what the kernel holds for them is given back here."""
        await signals.insisted.wait()
        for member in self._members.values():
            member.kill()

    @property
    def _log(self) -> Logger:
        return self._mirror.assembly.log

    def _mirror_of(self, loaded: Loaded, before: Mirror | None = None) -> Mirror:
        """Build what shows the services of a configuration to others. Raise GostnetError."""
        share = Share(SUPERVISOR, self._ledger, totals=self._totals)
        previous = before.assembly if before is not None else None
        made = assemble(loaded, lenient=self._invocation.lenient, previous=previous, share=share)
        return Mirror(made, self._settle)

    # ---- what is shown -------------------------------------------------------------------------
    async def statuses(self) -> dict[str, Mapping[str, object]]:
        """Return the status of all services, each as if one process served it."""
        return await self._mirror.statuses()

    async def _settle(self) -> None:
        """Have the counts brought up to date by those whose connections may have moved something."""
        async with self._settling:
            if self._stopping or time.monotonic() - self._settled < SOON:
                return
            for worker, member in self._members.items():
                if self._totals.busy(worker):
                    await member.settle()
            self._settled = time.monotonic()

    def _told(self, worker: int, said: Said) -> None:
        mirrors = [self._mirror, self._next] if self._next is not None else [self._mirror]
        for mirror in mirrors:
            if said.service in mirror.assembly.services:
                mirror.hear(worker, said.service, said.state, said.message)
                return

    # ---- start ---------------------------------------------------------------------------------
    async def _start(self, scope: Scope) -> bool:
        """Start all workers, the first one first: it finds out what cannot be opened, and which ports are given."""
        try:
            for step in await in_thread(self._kernel.recover):
                self._log.warn(f"left by a dead instance, undone: {step}")
        except KernelError as exc:
            self._log.fatal(str(exc))
            return False
        try:
            for worker in range(self._workers):
                self._members[worker] = Member(self._ledger)
        except OSError as exc:
            self._log.fatal(f"a worker cannot be started: {exc.strerror}")
            return False
        if not await self._begin(0, scope):
            return False
        begun = [scope.start(self._begin(worker, scope), f"begin {worker}") for worker in self._members if worker]
        for task in begun:
            if not await task:
                return False
        self._first_serves.set()
        for worker in self._members:
            scope.start(self._keep(worker, scope), f"worker {worker}")
        return True

    async def _begin(self, worker: int, scope: Scope, again: bool = False) -> bool:
        """Let a worker whose process runs begin; False if it cannot, and its process has ended then."""
        member = self._members[worker]
        if worker == 0:
            scope.start(self._hold(member), "kernel")
        listening = scope.start(member.listen(partial(self._told, worker)), f"listen {worker}")
        self._listening[worker] = listening
        answer = await member.ask(
            Begin(self._invocation, self._loaded, worker, self._workers, self._ports, again),
        )
        if isinstance(answer, Done):
            if worker == 0:
                self._ports = answer.ports
            member.began = time.monotonic()
            return True
        await member.ended()
        return False

    # ---- the kernel's state --------------------------------------------------------------------
    async def _hold(self, member: Member) -> None:
        """Do what the first worker asks of the kernel, until it has gone."""
        while True:
            try:
                request = await member.kernel.receive()
            except EOFError:
                return
            answer: Applied | Refusal
            try:
                steps = await self._do(request)
                left_out = {key: Refusal.of(exc) for key, exc in self._kernel.left_out.items()}
                answer = Applied(tuple(steps), left_out)
            except GostnetError as exc:
                answer = Refusal.of(exc)
            member.kernel.send(answer)

    async def _do(self, request: object) -> list[object]:
        """Do what is asked, and return the steps that were made."""
        if isinstance(request, Claim):
            await in_thread(self._kernel.claim, request.namespaces)
            return []
        return await self._apply(request) if isinstance(request, Apply) else await self._roll_back()

    async def _apply(self, request: Apply) -> list[object]:
        return [*await in_thread(self._kernel.apply, request.wanted)]

    async def _roll_back(self) -> list[object]:
        """Give the kernel back once nobody needs it; a worker that cannot begin again leaves it to the others."""
        if self._ready and not self._stopping:
            return []
        if self._stopping:
            await self._alone.wait()
        return [*await in_thread(self._kernel.rollback)]

    # ---- workers that die ----------------------------------------------------------------------
    async def _keep(self, worker: int, scope: Scope) -> None:
        """Replace a worker whenever it ends, until we stop."""
        deaths = 0
        while True:
            member = self._members[worker]
            status = await member.ended()
            if self._stopping:
                return
            lived = time.monotonic() - member.began if member.began else 0.0
            deaths = 0 if lived > SETTLED else deaths
            pause = RESTART[min(deaths, len(RESTART) - 1)]
            deaths += 1
            if worker == 0:
                self._first_serves.clear()
            # Nobody else writes to its part of the ledger, and its sockets are closed.
            await asyncio.wait((self._listening[worker],))
            self._totals.bury(worker)
            self._mirror.lost(worker)
            await in_thread(self._ledger.forget, worker)
            when = f"in {pause:g}s" if pause else "now"
            self._log.error(f"worker {worker} {_shown(status)}; it is replaced {when}", pid=member.process.pid)
            await asyncio.sleep(pause)
            async with self._turn:
                if self._is_ending():
                    return
                member.close()
                try:
                    self._members[worker] = Member(self._ledger)
                except OSError as exc:
                    self._log.error(f"worker {worker} cannot be started: {exc.strerror}")
                    self._members[worker] = member
                    continue
                if await self._begin(worker, scope, again=True):
                    if worker == 0:
                        self._first_serves.set()
                    self._log.info(f"worker {worker} serves again", pid=self._members[worker].process.pid)

    def _is_ending(self) -> bool:
        return self._stopping

    # ---- reload --------------------------------------------------------------------------------
    async def _reload(self, quiet: bool) -> None:
        """Give all workers another configuration, or none of them."""
        try:
            loaded = await reread(self._loader, self._invocation, self._log)
            if loaded is None:
                return
            if parse_workers(loaded.config.workers) != self._workers:
                self._log.warn(f"workers: {self._workers} of them go on; another number takes a restart")
            if not await self._change(loaded):
                return
        except GostnetError as exc:
            self._log.error(f"reload: {with_hint(exc)}; the old configuration stays")
            return
        finally:
            notify("READY=1")
        (self._log.debug if quiet else self._log.info)("config auto reloaded" if quiet else "config reloaded")

    async def _change(self, loaded: Loaded) -> bool:
        """Change over to another configuration; once more if the first worker dies meanwhile. Raise GostnetError."""
        for _ in range(2):
            try:
                async with asyncio.timeout(RETURN):
                    await self._first_serves.wait()
            except TimeoutError:
                break
            async with self._turn:
                first = self._members[0]
                try:
                    fresh = self._next = self._mirror_of(loaded, self._mirror)
                    changed = await self._replace(loaded)
                finally:
                    self._next = None
                if changed:
                    await self._show(fresh)
                    return True
                fresh.assembly.build.close()
                if not first.gone:
                    return False
                self._first_serves.clear()  # whoever waits for its end does the same, if not so soon
        self._log.error("reload: the first worker has ended and does not serve yet; the old configuration stays")
        return False

    async def _replace(self, loaded: Loaded) -> bool:
        """Change the workers over, one after the other: the first finds out whether it can be done."""
        changed: list[int] = []
        before, ports = self._loaded, self._ports
        for worker, member in self._members.items():
            if member.gone and worker:
                continue  # it begins with the configuration that holds then
            answer = await member.ask(Replace(loaded, self._ports, self._gone))
            if isinstance(answer, Failed):
                if member.gone and worker:
                    continue
                if not member.gone:
                    self._log.error(f"reload: {answer.message}; the old configuration stays")
                self._ports = ports
                for other in changed:
                    back = await self._members[other].ask(Replace(before, ports, self._gone))
                    if isinstance(back, Failed) and not self._members[other].gone:
                        self._log.error(f"reload: worker {other} cannot go back: {back.message}")
                        self._members[other].kill()  # its successor begins with the old one
                return False
            if worker == 0:
                self._ports = answer.ports
            changed.append(worker)
        self._loaded = loaded
        return True

    async def _show(self, fresh: Mirror) -> None:
        """Show the services of the configuration that holds now."""
        before = self._mirror
        before.hand_over(fresh)
        self._mirror = fresh
        await before.end(fresh)
        self._gone = before.assembly.services.keys() - fresh.assembly.services.keys()
        self._totals.forget(self._gone)
        fresh.begin()
        if before.assembly.log.sink is not fresh.assembly.log.sink:
            before.assembly.log.sink.close()

    # ---- end -----------------------------------------------------------------------------------
    async def _stop(self) -> None:
        """Let all workers wind down at once; the first ends last, and the kernel's state just before it."""
        self._stopping = True
        async with self._turn:  # who begins or changes over has done so, and nobody else begins
            for member in self._members.values():
                member.orders.send(Stop())
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT + 8):
                for worker, member in self._members.items():
                    if worker:
                        await member.ended()
        except TimeoutError:
            self._log.warn("a worker does not end by itself; it is killed")
            for worker, member in self._members.items():
                if worker:
                    member.kill()
        self._alone.set()
        first = self._members.get(0)
        if first is not None:
            try:
                async with asyncio.timeout(DRAIN_TIMEOUT + 8):
                    await first.ended()
            except TimeoutError:
                first.kill()
        for worker, member in self._members.items():
            await member.ended()
            if worker in self._listening:
                await asyncio.wait((self._listening[worker],))  # its last words
            member.close()
            self._totals.bury(worker)
        self._mirror.close()
        self._members.clear()


def _shown(status: int) -> str:
    """Return how a process has ended, in words."""
    if status >= 0:
        return f"has ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
