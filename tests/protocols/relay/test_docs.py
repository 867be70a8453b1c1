"""The page about relay says what the options say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gostnet.core.options import markdown
from gostnet.protocols.relay.connector import RelayConnector
from gostnet.protocols.relay.handler import RelayHandler

PAGE = Path(__file__).parents[3] / "docs" / "protocols" / "relay.md"


@pytest.mark.parametrize("component", [RelayHandler, RelayConnector])
def test_the_table_of_options_is_up_to_date(component: Any) -> None:
    assert markdown(component.Options) in PAGE.read_text()
