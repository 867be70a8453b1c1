"""Works that run side by side: what their errors leave behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest

from gostnet.core.errors import ConnError, DialError, without_frames
from gostnet.core.tasks import run, together


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
