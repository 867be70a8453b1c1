"""The soak, for a few seconds: that it works, and that nothing is wrong so soon."""

from __future__ import annotations

import pytest
import soak

pytestmark = pytest.mark.netns


def test_mixed_traffic_with_kills_and_reconnects() -> None:
    run = soak.Soak(seconds=10.0, workers=6, seed=3, every=2.0)
    run.run()
    assert run.problems == []
