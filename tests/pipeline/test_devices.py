"""The client of a device: it ends with the device, whatever it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import ConnError, DialError
from gostnet.core.fiber import Fiber
from gostnet.core.flow import Flow
from gostnet.core.tasks import Scope, run
from gostnet.pipeline.devices import as_client
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Marker, Node
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.testing.memory import MemoryDevice, datagrams_pair

NODE = Node("server", Endpoint("192.0.2.1", 1), Transport("tcp", StreamDialer()), None, Marker(1, 1.0), None)  # type: ignore[arg-type]

Dial = Callable[[Flow, Endpoint], Awaitable[Datagrams]]


async def end_while(dial: Dial, reached: asyncio.Event, *, fiber: bool) -> None:
    """Close the device once `reached` is set, and wait for the end."""

    async def session(upstream: Datagrams) -> None:
        raise AssertionError("there is no server")

    device = MemoryDevice()
    context = HandlerContext(service="tun", hop=Hop("tun", [NODE]))
    scope = Scope("client")
    serving = as_client(Flow("", ANY, ANY, "udp"), device, context, dial, session, (3600.0,))
    ended = asyncio.Event()
    started: Fiber | asyncio.Task[None] = scope.launch(serving) if fiber else scope.start(serving)
    started.add_done_callback(lambda _: ended.set())
    async with asyncio.timeout(10):
        await reached.wait()
        await asyncio.sleep(0)
        device.abort()
        await ended.wait()
    if isinstance(started, Fiber):
        assert (started.error, started.cancelled) == (None, False)
    else:
        started.result()
    await scope.cancel()


@pytest.mark.parametrize("fiber", [False, True])
def test_a_server_that_never_answers_holds_nobody_up(fiber: bool) -> None:
    async def main() -> None:
        reached = asyncio.Event()
        left = asyncio.Event()

        async def dial(flow: Flow, target: Endpoint) -> Datagrams:
            reached.set()
            try:
                await asyncio.Event().wait()
            finally:
                left.set()
            raise AssertionError

        await end_while(dial, reached, fiber=fiber)
        assert left.is_set()

    run(main())


@pytest.mark.parametrize("fiber", [False, True])
def test_the_pause_before_another_attempt_holds_nobody_up(fiber: bool) -> None:
    async def main() -> None:
        reached = asyncio.Event()

        async def dial(flow: Flow, target: Endpoint) -> Datagrams:
            reached.set()
            raise DialError("not now")

        await end_while(dial, reached, fiber=fiber)

    run(main())


def test_a_session_is_served_and_its_association_closed() -> None:
    async def main() -> None:
        device = MemoryDevice()
        near, _far = datagrams_pair()

        async def dial(flow: Flow, target: Endpoint) -> Datagrams:
            return near

        async def session(upstream: Datagrams) -> None:
            assert upstream is near
            assert device.on_closed is None
            device.abort()

        context = HandlerContext(service="tun", hop=Hop("tun", [NODE]))
        await as_client(Flow("", ANY, ANY, "udp"), device, context, dial, session)
        with pytest.raises(ConnError, match="closed by this side"):
            await near.receive()

    run(main())
