"""Shared by all tests."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure: neither examples nor their generation have a deadline of their own.
settings.register_profile("gostnet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gostnet")

PATIENCE = 60
"""Seconds after which a hanging test prints every thread's stack and ends the run: better than a silent CI."""


@pytest.fixture(autouse=True)
def _no_hanging_test() -> Iterator[None]:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
