"""Works that run side by side: what their errors leave behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest

from gostnet.core.errors import ConnError, DialError, without_frames
from gostnet.core.fiber import Fiber, Gate
from gostnet.core.hub import current_hub
from gostnet.core.tasks import Scope, first_of_fibers, run, together


class Held:
    """Something that works keep in their frames, as relays keep sockets and TLS."""


async def fails(held: Held, *, after: int) -> None:
    for _ in range(after):
        await asyncio.sleep(0)
    raise ConnError("reset")


async def lasts(held: Held) -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("side", ["child", "main"])
def test_first_error_ends_the_other_work_and_nothing_keeps_their_frames(side: str) -> None:
    held = Held()
    gone = weakref.ref(held)
    works: list[Coroutine[Any, Any, None]] = [fails(held, after=2), lasts(held)]
    if side == "main":
        works.reverse()
    del held

    async def scenario() -> None:
        try:
            await together(*works)
        except ConnError as exc:
            without_frames(exc)
        else:
            pytest.fail("the error is lost")
        works.clear()
        await asyncio.sleep(0)
        assert gone() is None

    gc.disable()
    try:
        run(scenario())
    finally:
        gc.enable()


def test_frames_are_let_go_of_with_those_of_the_causes() -> None:
    def dial(held: Held) -> None:
        try:
            raise TimeoutError
        except TimeoutError as exc:
            raise DialError("no answer") from exc

    held = Held()
    gone = weakref.ref(held)
    with pytest.raises(DialError) as caught:
        dial(held)
    del held
    error = caught.value
    del caught
    without_frames(error)
    assert gone() is None
    assert isinstance(error.__cause__, TimeoutError)


@pytest.mark.parametrize("fails_at_once", [True, False])
@pytest.mark.parametrize("in_fiber", [True, False])
def test_the_first_fiber_to_end_ends_the_others_and_its_error_is_raised(fails_at_once: bool, in_fiber: bool) -> None:
    async def scenario() -> None:
        ended: list[str] = []
        seen: list[BaseException] = []

        async def waits(name: str) -> None:
            try:
                await Gate(current_hub()).wait()
            finally:
                ended.append(name)

        async def breaks() -> None:
            if not fails_at_once:
                await asyncio.sleep(0)
            ended.append("breaks")
            raise ConnError("reset")

        async def body() -> None:
            try:
                await first_of_fibers("test", [waits("a"), breaks(), waits("b")])
            except ConnError as exc:
                seen.append(exc)

        if in_fiber:
            scope = Scope("test")
            scope.launch(body())
            assert await scope.drain(5) == 0
        else:
            await body()
        assert ended[0] == "breaks"
        assert sorted(ended) == ["a", "b", "breaks"]
        assert [str(exc) for exc in seen] == ["reset"]

    run(scenario())


def test_cancelling_who_waits_for_fibers_ends_all_of_them_first() -> None:
    async def scenario() -> None:
        ended: list[str] = []

        async def waits(name: str) -> None:
            try:
                await Gate(current_hub()).wait()
            finally:
                ended.append(name)

        async def body() -> None:
            try:
                await first_of_fibers("test", [waits("a"), waits("b")])
            finally:
                ended.append("body")

        fiber = Fiber(body(), "test")
        fiber.start()
        fiber.cancel()
        gone = asyncio.get_running_loop().create_future()
        fiber.add_done_callback(lambda _: gone.set_result(None))
        async with asyncio.timeout(5):
            await gone
        assert ended[-1] == "body"
        assert sorted(ended) == ["a", "b", "body"]
        assert fiber.cancelled

    run(scenario())


def test_a_single_work_runs_and_its_error_comes_out() -> None:
    done: list[int] = []

    async def works() -> None:
        done.append(1)

    async def main() -> None:
        await together(works())
        with pytest.raises(ConnError):
            await together(fails(Held(), after=1))

    run(main())
    assert done == [1]
