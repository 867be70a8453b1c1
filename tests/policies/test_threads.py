"""Threads for blocking calls: results, errors, bounds, cancellation."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gostnet.core.tasks import Scope, run
from gostnet.policies.threads import Busy, Threads


def test_results_and_errors_come_back() -> None:
    threads = Threads("test", 2)

    def fail(word: str) -> None:
        raise ValueError(word)

    async def main() -> None:
        assert await threads.run(lambda a, b: a + b, 1, 2) == 3
        with pytest.raises(ValueError, match="reason"):
            await threads.run(fail, "reason")
        assert await threads.run(threading.get_ident) != threading.get_ident()

    run(main())
    threads.close()


def test_calls_beyond_the_bound_are_refused() -> None:
    threads = Threads("test", 2, waiting=3)
    gate = threading.Event()
    started = threading.Semaphore(0)

    def call(number: int) -> int:
        started.release()
        assert gate.wait(20)
        return number

    async def main() -> None:
        calls = [threads.submit(call, number) for number in range(5)]
        for _ in range(2):
            assert await asyncio.to_thread(started.acquire, timeout=20)
        assert not started.acquire(blocking=False)  # two run, three wait
        with pytest.raises(Busy):
            threads.submit(call, 5)
        gate.set()
        assert [await each for each in calls] == [0, 1, 2, 3, 4]
        assert await threads.run(call, 6) == 6

    run(main())
    threads.close()


def test_a_cancelled_call_is_dropped_and_its_thread_goes_on() -> None:
    threads = Threads("test", 1)
    gate = threading.Event()
    called: list[str] = []

    async def main() -> None:
        scope = Scope("test")
        running = scope.start(threads.run(gate.wait, 20))
        waiting = scope.start(threads.run(called.append, "never"))
        await asyncio.sleep(0)
        running.cancel()
        waiting.cancel()
        assert await scope.drain(20) == 0
        gate.set()
        assert await threads.run(lambda: "next") == "next"
        assert called == []

    run(main())
    threads.close()


def test_closing_ends_the_threads_and_refuses_calls() -> None:
    before = set(threading.enumerate())
    threads = Threads("test", 3)

    async def main() -> None:
        for call in [threads.submit(lambda: None) for _ in range(3)]:
            await call
        made = set(threading.enumerate()) - before
        assert 1 <= len(made) <= 3
        assert all(thread.daemon for thread in made)
        threads.close()
        threads.close()
        for thread in made:
            thread.join(20)
            assert not thread.is_alive()
        with pytest.raises(Busy, match="closed"):
            await threads.run(lambda: None)

    run(main())


def test_a_call_that_outlives_its_loop_ends_its_thread_quietly() -> None:
    threads = Threads("test", 1)
    gate = threading.Event()
    before = set(threading.enumerate())

    async def main() -> None:
        threads.submit(gate.wait, 20)

    run(main(), uvloop=False)
    (thread,) = set(threading.enumerate()) - before
    gate.set()
    thread.join(20)
    assert not thread.is_alive()
