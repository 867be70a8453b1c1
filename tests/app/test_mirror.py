"""What several workers look like from outside: one state of each service."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from gostnet.app.daemon import assemble
from gostnet.app.mirror import Mirror
from gostnet.app.share import Share
from gostnet.config.argv import parse_args
from gostnet.config.load import Loader
from gostnet.core.tasks import run
from gostnet.pipeline.service import State
from gostnet.policies.ledger import SUPERVISOR, Ledger

RUNNING, READY, FAILED, CLOSED = State.RUNNING, State.READY, State.FAILED, State.CLOSED


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger.create(2, SUPERVISOR)
    yield made
    os.close(made.descriptor)


def mirror(ledger: Ledger, *words: str) -> Mirror:
    loaded = Loader(parse_args(words), environment={}).load()
    share = Share(SUPERVISOR, ledger, totals=ledger.totals())
    return Mirror(assemble(loaded, share=share), lambda: asyncio.sleep(0))


def say(shown: Mirror, worker: int, *states: State) -> None:
    for state in states:
        shown.hear(worker, "service-0", state, f"service service-0 is {state.value}")


def states(shown: Mirror) -> list[str]:
    return [message.rpartition(" ")[2] for _, message in shown.assembly.services["service-0"].events]


CASES = [
    ([(0, RUNNING), (0, READY), (1, RUNNING), (1, READY), (1, CLOSED), (0, CLOSED)], ["running", "ready", "closed"]),
    ([(0, RUNNING), (0, READY), (1, RUNNING), (1, READY), (0, FAILED), (0, READY)], ["running", "ready"]),
    (
        [(0, READY), (1, READY), (0, FAILED), (1, FAILED), (1, READY), (0, READY)],
        ["ready", "failed", "ready"],
    ),
    ([(0, READY), (1, READY), (0, None), (0, RUNNING), (0, READY)], ["ready"]),
    ([(0, READY), (0, None), (0, RUNNING), (0, READY)], ["ready", "failed", "running", "ready"]),
    ([(0, READY), (1, FAILED), (0, None), (0, RUNNING), (0, READY)], ["ready", "failed", "ready"]),
    ([(0, READY), (0, CLOSED), (0, None)], ["ready", "closed"]),
]
"""What workers say (None: it dies), and what is seen."""


@pytest.mark.parametrize(("said", "seen"), CASES)
def test_the_best_state_is_that_of_the_service(
    ledger: Ledger, said: list[tuple[int, State | None]], seen: list[str]
) -> None:
    async def main() -> None:
        shown = mirror(ledger, "-L", "socks5://:0")
        for worker, state in said:
            if state is None:
                shown.lost(worker)
            else:
                say(shown, worker, state)
        assert states(shown) == seen
        assert shown.assembly.services["service-0"].state.value == seen[-1]

    run(main())


def test_a_service_that_stays_goes_on_in_the_next_configuration(ledger: Ledger) -> None:
    async def main() -> None:
        before, after = mirror(ledger, "-L", "socks5://:0"), mirror(ledger, "-L", "http://:0")
        before.hear(0, "service-0", RUNNING, "service service-0 is running")
        before.hear(0, "service-0", RUNNING, "service service-0 is listening on [::]:1080")
        say(before, 0, READY)
        before.assembly.services["service-0"].created = 5
        before.hand_over(after)
        say(after, 1, RUNNING, READY)
        say(after, 0, CLOSED)
        status = (await after.statuses())["service-0"]
        assert (status["createTime"], status["state"]) == (5, "ready")
        assert states(after) == ["running", "[::]:1080", "ready"]
        after.lost(1)
        assert states(after)[-1] == "closed"
        await before.end(after)
        await after.end()

    run(main())
