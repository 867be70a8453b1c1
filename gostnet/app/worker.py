"""A worker: one of several processes that serve the same configuration, each with listening sockets of its own.

It holds nothing of the kernel's state but its sockets and devices. The supervisor holds the rest and gives the orders;
the worker ends with it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from threading import Lock
from typing import TYPE_CHECKING

from ..config.common_options import ServiceOptions
from ..config.load import Loaded, Loader
from ..core.errors import GostnetError, KernelError
from ..core.resources import Key
from ..core.sockets import ListenOptions, listen_tcp
from ..core.tasks import Scope, run
from ..core.udp_socket import listen_udp
from ..pipeline.service import Service, State
from ..policies.ledger import Ledger
from ..policies.stats import ServiceBooks
from .assemble import Assembly
from .daemon import Daemon, assemble, print_error, with_hint
from .kernel import Kernel, Wanted
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
    Rollback,
    Said,
    Settle,
    Settled,
)
from .share import Share
from .signals import Signals

if TYPE_CHECKING:
    from ..kernel.plan import Step

_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Serve as the worker whose supervisor says so.

    Arguments: the supervisor's process id, then the descriptors of orders, of the kernel's channel and of the ledger.
    """
    supervisor, orders, kernel, memory = map(int, arguments)
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        return 1  # it has died before we could ask to follow it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the supervisor says what it means
    channel = Connection(orders)
    try:
        begin = channel.recv()
    except (EOFError, OSError):
        return 1  # the supervisor has died
    if not isinstance(begin, Begin):
        return 0  # another worker could not begin
    _call_ourselves(f"gostnet-w{begin.worker}")
    ledger = Ledger(memory, begin.workers, begin.worker)
    held: Kernel = SupervisorsKernel(Connection(kernel)) if begin.worker == 0 else NoKernel()

    async def live() -> int:
        return await Worker(begin, Channel(channel), held, ledger).work()

    return run(live())


def _call_ourselves(name: str) -> None:
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(name)
    except OSError:
        pass  # comfort for who looks at processes


class SupervisorsKernel:
    """The kernel's state that the supervisor holds: what the first worker wants, all of them need."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._turn = Lock()
        self._left_out: dict[Key, KernelError] = {}

    @property
    def left_out(self) -> dict[Key, KernelError]:
        """What the kernel has refused at the last `apply`, and could be done without."""
        return self._left_out

    def recover(self) -> list[Step]:
        """Nothing: the supervisor has done it."""
        return []

    def claim(self, namespaces: Collection[str]) -> None:
        """Have the supervisor become the one instance of its name. Raise KernelError."""
        if namespaces:
            self._ask(Claim(frozenset(namespaces)))

    def apply(self, wanted: Wanted) -> list[Step]:
        """Have the kernel hold `wanted`. Raise KernelError or ConfigError."""
        return self._ask(Apply(wanted))

    def rollback(self) -> list[Step]:
        """Say that this worker needs nothing any more; returns when the others do not either."""
        return self._ask(Rollback())

    def _ask(self, request: Claim | Apply | Rollback) -> list[Step]:
        with self._turn:
            self._connection.send(request)
            answer = self._connection.recv()
        if isinstance(answer, Refusal):
            raise answer.error()
        assert isinstance(answer, Applied)
        self._left_out = {key: refusal.kernel_error() for key, refusal in answer.left_out.items()}
        return list(answer.steps)


class NoKernel:
    """The kernel's state of all other workers: what they need is there as long as they are."""

    @property
    def left_out(self) -> dict[Key, KernelError]:
        """Nothing."""
        return {}

    def recover(self) -> list[Step]:
        """Nothing."""
        return []

    def claim(self, namespaces: Collection[str]) -> None:
        """Nothing."""

    def apply(self, wanted: Wanted) -> list[Step]:
        """Nothing."""
        return []

    def rollback(self) -> list[Step]:
        """Nothing."""
        return []


class Worker(Daemon):
    """A daemon that follows orders, and does its part only."""

    def __init__(self, begin: Begin, orders: Channel, kernel: Kernel, ledger: Ledger) -> None:
        super().__init__(begin.invocation, Loader(begin.invocation), kernel)
        self._begin = begin
        self._orders = orders
        self._share = Share(begin.worker, ledger, begin.ports, ledger.board())
        self._latest: Assembly | None = None
        """What was built last, also if it is not what holds."""
        self._left: dict[str, list[ServiceBooks]] = {}
        """Books of services that have gone: the supervisor may still ask for them, or the change be taken back."""

    async def work(self) -> int:
        """Start, tell so, follow orders to the end; return the exit status."""
        loaded = self._begin.loaded
        scope = Scope("worker")
        signals = Signals()  # they go to all processes of a terminal or a unit: what they mean comes as an order
        try:
            assembly = self._assembly = self._assemble(loaded)
        except GostnetError as exc:
            print_error(exc, loaded)
            return 1
        try:
            await self._start(assembly, scope)
        except GostnetError as exc:
            assembly.log.fatal(with_hint(exc))
            assembly.log.sink.close()
            return 1
        self._orders.send(Done(self._ports()))
        await self._follow(scope)
        await self._wind_down(scope, signals)
        self._assembly.log.sink.close()
        return 0

    async def _follow(self, scope: Scope) -> None:
        while True:
            order = await self._orders.receive()
            if isinstance(order, Settle):
                for books in _books(self._assembly).values():
                    books.settle()
                self._orders.send(Settled(order.number))
                continue
            if not isinstance(order, Replace):
                return
            self._share = replace(self._share, ports=order.ports)
            for name in order.gone:
                for books in self._left.pop(name, ()):
                    books.hide()
            before = _books(self._assembly)
            self._latest = None
            try:
                await self._replace(order.loaded, scope)
                for name, books in _without(before, _books(self._assembly)):
                    self._left.setdefault(name, []).append(books)
            except GostnetError as exc:
                for _, books in _without(_books(self._latest), before):
                    books.hide()
                self._orders.send(Failed(with_hint(exc)))
            else:
                self._orders.send(Done(self._ports()))

    def _say(self, service: str, state: State, message: str) -> None:
        self._orders.send(Said(service, state, message))

    def _ports(self) -> dict[str, int]:
        assert self._assembly is not None
        return {name: service.listener.source.address.port for name, service in self._assembly.services.items()}

    # ---- its part ------------------------------------------------------------------------------
    def _assemble(self, loaded: Loaded) -> Assembly:
        """Build the objects, without the services and the commands that are the first worker's."""
        share = self._share
        assembly = assemble(loaded, lenient=self._invocation.lenient, previous=self._assembly, share=share)
        if not share.first:
            assembly.services = {name: made for name, made in assembly.services.items() if made.listener.shared}
            assembly.hooks = dict.fromkeys(assembly.hooks, ServiceOptions())
        elif self._begin.again and self._assembly is None:
            # What they prepare is there since the worker before.
            hooks = assembly.hooks.items()
            assembly.hooks = {name: replace(options, pre_up=[], post_up=[]) for name, options in hooks}
        for name, service in assembly.services.items():
            service.heard = partial(self._say, name)
        self._latest = assembly
        return assembly

    async def _open(self, service: Service) -> None:
        """Bind a listener; that nobody else has its port is seen to by who opens it first: later it is shared."""
        source, netns = service.listener.source, service.listener.netns
        before = self._assembly.services.values() if self._assembly is not None else ()
        sources = [each.listener.source for each in before if each is not service]
        ours = any((each.network, each.address.port) == (source.network, source.address.port) for each in sources)
        if self._share.first and not self._begin.again and service.listener.shared and source.address.port and not ours:
            listen = listen_tcp if source.network == "tcp" else listen_udp
            try:
                listen(source.address, ListenOptions(netns=netns)).close()
            except KernelError as exc:
                if exc.errno == errno.EADDRINUSE:
                    raise
        await service.open()

    def _keep_routes(self, assembly: Assembly) -> None:
        if self._share.first:
            super()._keep_routes(assembly)


def _books(assembly: Assembly | None) -> dict[str, ServiceBooks]:
    """Return the books by service."""
    services = assembly.services.items() if assembly is not None else ()
    return {name: books for name, each in services if isinstance(books := each.policies.books, ServiceBooks)}


def _without(books: dict[str, ServiceBooks], others: dict[str, ServiceBooks]) -> list[tuple[str, ServiceBooks]]:
    """Return the books of services that have none among the others."""
    return [(name, each) for name, each in books.items() if name not in others]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
