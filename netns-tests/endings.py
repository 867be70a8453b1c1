"""How daemons end, and what must be left of them: nothing."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Mapping
from typing import Any

from gostnet.testing.processes import gostnet
from gostnet.testing.state import await_same, snapshot

ENDINGS: Mapping[str, int] = {"term": signal.SIGTERM, "int": signal.SIGINT, "kill": signal.SIGKILL}


def kill_while_it_starts(
    place: str, configuration: Mapping[str, Any], moments: tuple[float, float], *, times: int = 6, seed: int = 20260101
) -> None:
    """Start a daemon, kill it at a moment between two (seconds), and assert that nothing is left; so many times.

    The moment is what is tested: anywhere from the interpreter's start to the applied rules.
    """
    before = snapshot(place)
    chance = random.Random(seed)
    for _ in range(times):
        process = gostnet("-C", json.dumps(dict(configuration)), place=place)
        process.start()
        time.sleep(chance.uniform(*moments))
        process.send(signal.SIGKILL)
        process.wait()
        difference = await_same(before, place, timeout=5.0)
        assert not difference, "\n".join(difference)
        process.stop()
