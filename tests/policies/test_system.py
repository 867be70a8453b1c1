"""The system's resolver: order, cache, shared look-ups, failures."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from gostnet.core.errors import ResolveError
from gostnet.core.tasks import Scope, run
from gostnet.policies.system import NEGATIVE_TTL, TTL, SystemResolver


class Hand:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Library:
    """Stands in for the C library."""

    def __init__(self) -> None:
        self.table: dict[str, list[str]] = {"a.test": ["2001:db8::1", "192.0.2.1", "192.0.2.1"]}
        self.calls: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.called = threading.Semaphore(0)

    def getaddrinfo(self, host: str, port: None, family: int, kind: int) -> list[Any]:
        assert kind == socket.SOCK_STREAM
        self.calls.append((host, family))
        self.called.release()
        assert self.gate.wait(20)
        if host == "bad..name":
            raise UnicodeError("label empty")
        found = self.table.get(host)
        if found is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind, 6, "", (ip, 0)) for ip in found]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    library = Library()
    monkeypatch.setattr(socket, "getaddrinfo", library.getaddrinfo)
    yield library
    library.gate.set()


def using(work: Callable[[SystemResolver, Hand], Awaitable[None]], **options: Any) -> None:
    clock = Hand()
    resolver = SystemResolver(clock=clock, **options)
    try:
        run(work(resolver, clock))  # type: ignore[arg-type]  # a coroutine
    finally:
        resolver.close()


def test_the_order_of_the_library_is_kept_and_answers_are_cached(library: Library) -> None:
    async def work(resolver: SystemResolver, clock: Hand) -> None:
        for host in ("a.test", "A.TEST"):
            assert await resolver.resolve(host) == ["2001:db8::1", "192.0.2.1"]
        assert len(library.calls) == 1
        clock.now += TTL + 0.1
        await resolver.resolve("a.test")
        assert library.calls == [("a.test", socket.AF_UNSPEC)] * 2
        await resolver.resolve("a.test", 4)
        assert library.calls[-1] == ("a.test", socket.AF_INET)

    using(work)


def test_an_address_is_its_own(library: Library) -> None:
    async def work(resolver: SystemResolver, clock: Hand) -> None:
        assert await resolver.resolve("::1") == ["::1"]
        assert library.calls == []

    using(work)


@pytest.mark.parametrize(
    ("host", "message"), [("none.test", "none.test: Name or service not known"), ("bad..name", "not a host name")]
)
def test_failures_are_kept_for_a_moment(library: Library, host: str, message: str) -> None:
    async def work(resolver: SystemResolver, clock: Hand) -> None:
        for _ in range(2):
            with pytest.raises(ResolveError, match=message):
                await resolver.resolve(host)
        assert len(library.calls) == 1
        clock.now += NEGATIVE_TTL + 0.1
        library.table[host] = ["192.0.2.5"]
        if host != "bad..name":
            assert await resolver.resolve(host) == ["192.0.2.5"]

    using(work)


def test_equal_look_ups_are_one_and_a_cancelled_one_does_not_end_it(library: Library) -> None:
    async def work(resolver: SystemResolver, clock: Hand) -> None:
        library.gate.clear()
        answers: list[list[str]] = []

        async def one() -> None:
            answers.append(await resolver.resolve("a.test"))

        scope = Scope("clients")
        first = scope.start(one())
        for _ in range(3):
            scope.start(one())
            scope.launch(one())
        assert await asyncio.to_thread(library.called.acquire, timeout=20)
        first.cancel()
        library.gate.set()
        assert await scope.drain(20) == 0
        assert answers == [["2001:db8::1", "192.0.2.1"]] * 6
        assert len(library.calls) == 1

    using(work)


def test_a_dead_library_does_not_gather_work_without_bound(library: Library) -> None:
    async def work(resolver: SystemResolver, clock: Hand) -> None:
        library.gate.clear()
        scope = Scope("clients")
        refused = 0

        async def one(host: str) -> None:
            nonlocal refused
            try:
                await resolver.resolve(host)
            except ResolveError as exc:
                refused += "too many" in str(exc)

        for number in range(300):
            scope.start(one(f"n{number}.test"))
        assert await asyncio.to_thread(library.called.acquire, timeout=20)
        assert refused == 300 - 256 - 2
        library.gate.set()
        assert await scope.drain(20) == 0

    using(work, threads=2)


def test_the_cache_is_bounded(library: Library) -> None:
    async def work(resolver: SystemResolver, clock: Hand) -> None:
        for number in range(20):
            library.table[f"n{number}.test"] = ["192.0.2.1"]
            await resolver.resolve(f"n{number}.test")
        assert len(resolver) == 4
        count = len(library.calls)
        await resolver.resolve("n19.test")
        assert len(library.calls) == count

    using(work, entries=4)


def test_the_real_library_knows_this_host() -> None:
    async def work(resolver: SystemResolver, clock: Hand) -> None:
        assert "127.0.0.1" in await resolver.resolve("localhost", 4)

    using(work)
