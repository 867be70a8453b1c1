"""What the supervisor and its workers say to each other, each over a socket that nobody else has.

The supervisor gives orders over one socket, one at a time, and gets answers, and between them what services say of
themselves. The first worker asks for the kernel's state over another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ..config.argv import Invocation
from ..config.load import Loaded
from ..core.errors import ConfigError, GostnetError, KernelError
from ..core.resources import Key
from ..pipeline.service import State
from .kernel import Wanted


# ---- orders -------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Begin:
    """Serve a configuration.

    workers    how many there are
    ports      what the kernel has chosen, by service
    again      in place of a worker that has died
    """

    invocation: Invocation
    loaded: Loaded
    worker: int
    workers: int
    ports: Mapping[str, int]
    again: bool


@dataclass(frozen=True, slots=True)
class Replace:
    """Change over to another configuration.

    gone    services that went at the last change: nobody asks for their counts any more
    """

    loaded: Loaded
    ports: Mapping[str, int]
    gone: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Stop:
    """Wind down and end; there is no answer."""


@dataclass(frozen=True, slots=True)
class Settle:
    """Write down what connections have moved until now; Settled with the same number is the answer."""

    number: int


@dataclass(frozen=True, slots=True)
class Settled:
    """It is written."""

    number: int


@dataclass(frozen=True, slots=True)
class Said:
    """What a service of a worker says of itself, whenever that is."""

    service: str
    state: State
    message: str


@dataclass(frozen=True, slots=True)
class Done:
    """It is so, and these are the ports of all services."""

    ports: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing has changed, and why."""

    message: str


# ---- the kernel ---------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Claim:
    """Become the one instance of its name in these network namespaces."""

    namespaces: frozenset[str]


@dataclass(frozen=True, slots=True)
class Apply:
    """Make the kernel hold this."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Rollback:
    """Give the kernel back."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The steps that were made (of `gostnet.kernel.plan.Step`), and what was left out."""

    steps: tuple[Any, ...]
    left_out: Mapping[Key, Refusal]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error on its way between processes."""

    message: str
    hint: str
    code: str
    operation: str = ""
    errno: int = 0
    path: str = ""

    @classmethod
    def of(cls, exc: GostnetError) -> Refusal:
        """Take an error apart."""
        if isinstance(exc, KernelError):
            detail = str(exc).removeprefix(f"{exc.operation}: ")
            return cls(detail, exc.hint, exc.code, exc.operation, exc.errno)
        if isinstance(exc, ConfigError):
            return cls(exc.reason, exc.hint, exc.code, path=exc.path)
        return cls(str(exc), exc.hint, exc.code)

    def error(self) -> GostnetError:
        """Put it together again."""
        if self.operation:
            return self.kernel_error()
        return ConfigError(self.path, self.message, hint=self.hint, code=self.code)

    def kernel_error(self) -> KernelError:
        """Put an error of the kernel together again."""
        return KernelError(self.operation, self.errno, self.message, hint=self.hint)


# ---- the socket ---------------------------------------------------------------------------------
class Channel:
    """One end, for use on the loop. Not what the other end says is awaited, but that it begins to say it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: object) -> None:
        """Say something; nothing if the other end has gone."""
        try:
            self._connection.send(message)
        except OSError:
            pass  # whoever waits for its answer gets the end of the channel

    async def receive(self) -> Any:
        """Return what the other end says. Raise EOFError when it has gone."""
        await readable(self._connection.fileno())
        try:
            return self._connection.recv()
        except OSError as exc:
            raise EOFError from exc

    def close(self) -> None:
        """Let go."""
        self._connection.close()


async def readable(descriptor: int) -> None:
    """Wait until there is something to read, or until a process has ended (pidfd_open(2))."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def come() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, come)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
