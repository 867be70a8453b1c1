"""Races: order, delays, bounds, and that nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import DialError, DialRefused
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope
from gostnet.pipeline.race import FALLBACK_DELAY, connect_any, interleaved, race

from .kit import Label, run_virtual


class Course:
    """Attempts that take a given time and then succeed or fail, and what became of them."""

    def __init__(self) -> None:
        self.started: list[tuple[str, float]] = []
        self.discarded: list[str] = []
        self.running = 0
        self.most = 0
        self._begin: float | None = None

    def attempt(self, name: str, seconds: float, *, fails: bool = False) -> Callable[[], Awaitable[str]]:
        async def run() -> str:
            clock = asyncio.get_running_loop().time
            self._begin = clock() if self._begin is None else self._begin
            self.started.append((name, round(clock() - self._begin, 3)))
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await asyncio.sleep(seconds)
            finally:
                self.running -= 1
            if fails:
                raise DialRefused(name)
            return name

        return run


def test_the_next_starts_after_the_delay_and_the_first_success_wins() -> None:
    course = Course()

    async def main() -> None:
        ways = [course.attempt("a", 5), course.attempt("b", 1), course.attempt("c", 1)]
        assert await race(ways, course.discarded.append, delay=0.3) == "b"

    run_virtual(main())
    assert course.started == [("a", 0.0), ("b", 0.3), ("c", 0.6)]
    assert course.running == 0


def test_more_is_found_when_the_first_is_slow_and_takes_turns_with_what_waits() -> None:
    course = Course()
    asked: list[float] = []

    async def more() -> list[Callable[[], Awaitable[str]]]:
        asked.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.1)
        return [course.attempt("x", 9), course.attempt("y", 0.1)]

    async def main() -> None:
        ways = [course.attempt(name, 9) for name in "abcd"]
        assert await race(ways, course.discarded.append, delay=0.3, more=more) == "y"

    run_virtual(main())
    assert len(asked) == 1
    assert course.started == [("a", 0.0), ("b", 0.3), ("x", 0.4), ("c", 0.7), ("y", 1.0)]
    assert course.running == 0


def test_more_is_found_when_all_have_failed_and_the_first_failure_is_told_when_that_fails_too() -> None:
    course = Course()

    async def more() -> list[Callable[[], Awaitable[str]]]:
        return [course.attempt("x", 0.1, fails=True)]

    async def nothing() -> list[Callable[[], Awaitable[str]]]:
        raise DialError("nowhere")

    async def main() -> None:
        for find in (more, nothing):
            ways = [course.attempt("a", 0.1, fails=True), course.attempt("b", 0.1, fails=True)]
            with pytest.raises(DialRefused, match="a"):
                await race(ways, course.discarded.append, delay=0.3, more=find)

    run_virtual(main())
    assert [name for name, _ in course.started] == ["a", "b", "x", "a", "b"]


def test_a_failure_starts_the_next_at_once() -> None:
    course = Course()

    async def main() -> None:
        ways = [course.attempt("a", 0.1, fails=True), course.attempt("b", 0.1)]
        assert await race(ways, course.discarded.append, delay=60) == "b"

    run_virtual(main())
    assert course.started == [("a", 0.0), ("b", 0.1)]


def test_without_a_delay_all_start_but_never_more_than_the_limit_at_a_time() -> None:
    course = Course()

    async def main() -> None:
        ways = [course.attempt(str(number), 1 + number, fails=number < 4) for number in range(5)]
        assert await race(ways, course.discarded.append, limit=2) == "4"

    run_virtual(main())
    assert course.most == 2
    assert [name for name, _ in course.started] == ["0", "1", "2", "3", "4"]


def test_the_first_error_is_raised_when_all_have_failed() -> None:
    course = Course()

    async def main() -> None:
        ways = [course.attempt("slow", 2, fails=True), course.attempt("fast", 1, fails=True)]
        with pytest.raises(DialRefused, match="fast"):
            await race(ways, course.discarded.append)

    run_virtual(main())


def test_two_that_succeed_in_the_same_turn_leave_one() -> None:
    course = Course()

    async def main() -> None:
        ways = [course.attempt("a", 1), course.attempt("b", 1)]
        assert await race(ways, course.discarded.append) == "a"

    run_virtual(main())
    assert course.discarded == ["b"]
    assert course.running == 0


def test_cancelling_leaves_nothing() -> None:
    course = Course()

    async def main() -> None:
        scope = Scope("test")
        task = scope.start(race([course.attempt("a", 5), course.attempt("b", 5)], course.discarded.append))
        await asyncio.sleep(1)
        assert course.running == 2
        await scope.cancel()
        assert task.cancelled()

    run_virtual(main())
    assert course.running == 0


def test_who_succeeds_while_it_is_being_cancelled_is_discarded() -> None:
    discarded: list[str] = []

    async def stubborn() -> str:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass  # it was open already
        return "late"

    async def main() -> None:
        scope = Scope("test")
        scope.start(race([stubborn], discarded.append))
        await asyncio.sleep(1)
        await scope.cancel()

    run_virtual(main())
    assert discarded == ["late"]


def test_families_take_turns_from_the_preferred_one_on() -> None:
    assert interleaved(["::1", "::2", "10.0.0.1", "::3"]) == ["::1", "10.0.0.1", "::2", "::3"]
    assert interleaved(["10.0.0.1", "10.0.0.2"]) == ["10.0.0.1", "10.0.0.2"]
    assert interleaved(["10.0.0.1", "::1", "::2"]) == ["10.0.0.1", "::1", "::2"]


def test_y15_all_addresses_are_tried_one_after_the_other() -> None:
    asked: list[tuple[str, float]] = []

    async def connect(where: Endpoint) -> Stream:
        asked.append((str(where), asyncio.get_running_loop().time()))
        if where.host == "192.0.2.1":
            raise DialError("unreachable")
        if where.host == "192.0.2.2":
            await asyncio.sleep(3600)
        return Label((str(where),))

    async def main() -> None:
        stream = await connect_any(connect, ["192.0.2.1", "192.0.2.2", "192.0.2.3"], 80)
        assert isinstance(stream, Label)
        assert stream.way == ("192.0.2.3:80",)

    run_virtual(main())
    (first, begun), (second, at_once), (third, later) = asked
    assert [first, second, third] == ["192.0.2.1:80", "192.0.2.2:80", "192.0.2.3:80"]
    assert at_once == begun
    assert later - at_once == pytest.approx(FALLBACK_DELAY)
