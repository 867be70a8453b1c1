"""A daemon to start, and servers on loopback for it to reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gostnet.testing.processes import Process, gostnet, stop_all
from gostnet.testing.servers import Ports, Servers, serving_in_thread

from .kit import Start


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the daemon and wait until it is ready."""
    running: list[Process] = []

    def begin(*words: str, env: dict[str, str] | None = None) -> Process:
        process = gostnet(*words, env={"HOME": str(tmp_path), **(env or {})})
        running.append(process)
        process.start()
        process.wait_ready()
        return process

    yield begin
    stop_all(running)


@pytest.fixture
def servers() -> Iterator[Servers]:
    with serving_in_thread(None, ["127.0.0.1"], ports=Ports(http=0, https=0, echo=0, dns=0)) as found:
        yield found
