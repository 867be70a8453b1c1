"""Stand-ins for the pipeline's tests: nodes that succeed or fail on command, egresses that remember."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TypeVar

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import DialRefused, GostnetError
from gostnet.core.flow import Flow
from gostnet.core.hub import current_hub
from gostnet.core.stream import CHUNK, Buffer, Stream
from gostnet.pipeline.node import Marker, Node
from gostnet.pipeline.transport import StreamDialer, Transport

T = TypeVar("T")


class Label(Stream):
    """A stream that only tells the way it took."""

    def __init__(self, way: tuple[str, ...]) -> None:
        super().__init__()
        self.way = way
        self.aborted = False

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        return b""

    async def send(self, data: Buffer) -> None:
        return None

    async def send_eof(self) -> None:
        return None

    async def aclose(self) -> None:
        self.aborted = True

    def abort(self) -> None:
        self.aborted = True


class Direct:
    """A direct way that refuses the endpoints in `dead`."""

    def __init__(self, dead: tuple[str, ...] = ()) -> None:
        self.dead = dead
        self.asked: list[str] = []
        self.streams: list[Label] = []

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        self.asked.append(str(target))
        if str(target) in self.dead:
            raise DialRefused(f"dial {target}: refused")
        self.streams.append(Label((f"tcp {target}",)))
        return self.streams[-1]

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        raise DialRefused("no datagrams here")


class Connector:
    """A connector that appends what it was asked for; `fail` may raise instead."""

    def __init__(self, name: str, fail: Callable[[str, Endpoint | None], GostnetError | None] | None = None) -> None:
        self.name = name
        self.fail = fail or (lambda step, target: None)

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        if (error := self.fail("handshake", None)) is not None:
            raise error
        return below

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        if (error := self.fail("connect", target)) is not None:
            raise error
        assert isinstance(below, Label)
        return Label((*below.way, f"{self.name} {target}"))

    async def associate(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams:
        raise DialRefused("no datagrams here")


def node(
    name: str,
    port: int,
    *,
    fail: Callable[[str, Endpoint | None], GostnetError | None] | None = None,
    max_fails: int = 1,
    fail_timeout: float = 10.0,
    **extra: object,
) -> Node:
    """Return a node at 192.0.2.1:port."""
    made = Node(
        name,
        Endpoint("192.0.2.1", port),
        Transport("tcp", StreamDialer()),
        Connector(name, fail),
        Marker(max_fails, fail_timeout),
    )
    for key, value in extra.items():
        setattr(made, key, value)
    return made


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer as soon as there is nothing else to do: no test waits for time."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0
        select = self._selector.select

        def jump(timeout: float | None = None) -> object:
            ready = select(0)
            if not ready and timeout:
                self._now += timeout
            return ready

        self._selector.select = jump

    def time(self) -> float:
        return self._now


def run_virtual(main: Coroutine[object, object, T]) -> T:
    """Run `main` on a VirtualLoop."""

    async def body() -> T:
        try:
            return await main
        finally:
            current_hub().close()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(body())
