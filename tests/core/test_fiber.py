"""Fibers: what a task can do, resumed by the hub."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gostnet.core.fiber import Fiber, Gate, deadline
from gostnet.core.hub import current_hub
from gostnet.core.sockets import SocketStream
from gostnet.core.tasks import Scope, run, together

LOOPS = pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])


async def finish(work: Coroutine[Any, Any, None]) -> Fiber:
    scope = Scope("test")
    fiber = scope.launch(work)
    await scope.drain(5)
    assert fiber.finished
    return fiber


def pair() -> tuple[SocketStream, SocketStream]:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    return SocketStream(left), SocketStream(right)


@LOOPS
def test_fiber_waits_for_sockets_and_futures(uvloop: bool) -> None:
    async def main() -> None:
        left, right = pair()
        seen: list[bytes] = []

        async def echo() -> None:
            while data := await right.receive():
                await asyncio.sleep(0)
                await asyncio.get_running_loop().run_in_executor(None, lambda: None)
                await right.send(data.upper())
            right.abort()

        async def talk() -> None:
            for word in (b"one", b"two"):
                await left.send(word)
                seen.append(await left.receive())
            await left.send_eof()
            seen.append(await left.receive())
            left.abort()

        scope = Scope("test")
        scope.launch(echo())
        scope.launch(talk())
        assert await scope.drain(5) == 0
        assert seen == [b"ONE", b"TWO", b""]

    run(main(), uvloop=uvloop)


@LOOPS
def test_fiber_is_the_current_task_and_times_out(uvloop: bool) -> None:
    async def main() -> None:
        left, right = pair()
        log: list[str] = []

        async def work() -> None:
            assert asyncio.current_task() is current_hub().fiber
            try:
                async with asyncio.timeout(0.01):
                    await left.receive()
            except TimeoutError:
                log.append("timeout")
            try:
                with deadline(0.01):
                    await left.receive()
            except TimeoutError:
                log.append("deadline")
            await right.send(b"x")
            log.append((await left.receive()).decode())

        fiber = await finish(work())
        assert fiber.error is None
        assert log == ["timeout", "deadline", "x"]
        left.abort()
        right.abort()

    run(main(), uvloop=uvloop)


@pytest.mark.parametrize("place", ["socket", "future", "gate", "yield", "start"])
def test_cancelling_a_fiber_ends_it_wherever_it_waits(place: str) -> None:
    async def main() -> None:
        left, right = pair()
        gate = Gate(current_hub())
        closed: list[str] = []
        waits: dict[str, Callable[[], Any]] = {
            "socket": left.receive,
            "future": lambda: asyncio.sleep(60),
            "gate": gate.wait,
            "yield": lambda: asyncio.sleep(0),
            "start": lambda: asyncio.sleep(0),
        }

        async def work() -> None:
            try:
                while True:
                    await waits[place]()
            finally:
                closed.append(place)

        scope = Scope("test")
        fiber = scope.launch(work())
        if place != "start":
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await scope.cancel()
        assert fiber.cancelled
        assert len(scope) == 0
        assert closed == [place]
        left.abort()
        right.abort()

    run(main())


def test_a_fiber_begins_inside_the_task_that_launches_it() -> None:
    async def main() -> None:
        caller = asyncio.current_task()
        seen: list[object] = []

        async def inner() -> None:
            seen.append(asyncio.current_task())
            await asyncio.sleep(0)

        async def outer() -> None:
            fiber = scope.launch(inner())
            assert seen == [fiber]
            assert asyncio.current_task() is current_hub().fiber
            assert asyncio.current_task() is not fiber

        scope = Scope("test")
        scope.launch(outer())
        assert asyncio.current_task() is caller
        assert current_hub().fiber is None
        await scope.drain(5)
        assert len(seen) == 1

    run(main())


def test_who_asks_after_the_end_is_told_too() -> None:
    async def main() -> None:
        async def nothing() -> None:
            return

        scope = Scope("test")
        fiber = scope.launch(nothing())
        assert fiber.finished
        told = asyncio.get_running_loop().create_future()
        fiber.add_done_callback(told.set_result)
        assert await told is fiber

    run(main())


def test_a_cancellation_that_is_handled_leaves_no_stray_wake_up() -> None:
    async def main() -> None:
        left, right = pair()
        log: list[str] = []

        async def work() -> None:
            try:
                await left.receive()
            except asyncio.CancelledError:
                log.append("cancelled")
            gate = Gate(current_hub())
            asyncio.get_running_loop().call_later(0.01, gate.open)
            await gate.wait()
            assert gate.is_open
            log.append("gate")

        scope = Scope("test")
        fiber = scope.launch(work())
        await asyncio.sleep(0.005)
        await right.send(b"wakes at the same moment")
        fiber.cancel()
        await scope.drain(5)
        assert log == ["cancelled", "gate"]
        left.abort()
        right.abort()

    run(main())


def test_closing_a_stream_wakes_its_reader_with_an_error() -> None:
    async def main() -> None:
        from gostnet.core.errors import ConnError

        left, right = pair()
        caught: list[str] = []

        async def work() -> None:
            try:
                await left.receive()
            except ConnError as exc:
                caught.append(str(exc))

        scope = Scope("test")
        scope.launch(work())
        await asyncio.sleep(0.001)
        left.abort()
        await scope.drain(5)
        assert caught
        right.abort()

    run(main())


def test_an_error_of_a_fiber_reaches_the_loop() -> None:
    async def main() -> None:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

        async def work() -> None:
            raise ValueError("broken")

        fiber = await finish(work())
        assert isinstance(fiber.error, ValueError)
        assert reported[0]["exception"] is fiber.error

    run(main())


def test_together_raises_the_first_error_and_cancels_the_rest() -> None:
    async def main() -> None:
        ended: list[str] = []

        async def forever(name: str) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(name)

        async def fails() -> None:
            await asyncio.sleep(0)
            raise ValueError("first")

        for works in (lambda: (fails(), forever("main")), lambda: (forever("child"), fails())):
            with pytest.raises(ValueError, match="first"):
                await together(*works())
        assert ended == ["main", "child"]

    run(main())


def test_deadlines_of_one_duration_expire_in_order_and_share_a_timer() -> None:
    async def main() -> None:
        expired: list[int] = []

        async def work(number: int) -> None:
            try:
                with deadline(0.02):
                    if number % 2:
                        await asyncio.sleep(60)
            except TimeoutError:
                expired.append(number)

        scope = Scope("test")
        for number in range(6):
            scope.launch(work(number))
        await scope.drain(5)
        assert expired == [1, 3, 5]
        assert len(current_hub().deadlines) == 1

    run(main())
