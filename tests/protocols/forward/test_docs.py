"""The page about forward says what the options say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gostnet.core.options import markdown
from gostnet.protocols.forward.connector import DirectConnector
from gostnet.protocols.forward.handler import ForwardHandler

PAGE = Path(__file__).parents[3] / "docs" / "protocols" / "forward.md"


@pytest.mark.parametrize("component", [ForwardHandler, DirectConnector])
def test_the_table_of_options_is_up_to_date(component: Any) -> None:
    assert markdown(component.Options) in PAGE.read_text()
