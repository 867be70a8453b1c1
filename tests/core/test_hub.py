"""The hub: what it knows of its own load."""

from __future__ import annotations

import time

import pytest

from gostnet.core.hub import Hub, current_hub
from gostnet.core.tasks import run


@pytest.mark.parametrize(
    ("shares", "bound"),
    [
        ((1.0,), True),
        ((0.95, 0.85), True),
        ((0.1,), False),
        ((0.7,), False),  # as much to do, but others have the processor, too
        ((1.0, 0.2), False),
    ],
)
def test_a_loop_is_bound_that_works_nearly_all_the_time(
    shares: tuple[float, ...], bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, used = 1000.0, 5.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(time, "thread_time", lambda: used)

    async def main() -> Hub:
        return current_hub()

    hub = run(main())
    assert not hub.bound()  # nothing is known yet
    for share in shares:
        for _ in range(20):
            clock += 0.01
            used += 0.01 * share
            hub.bound()
    assert hub.bound() is bound
