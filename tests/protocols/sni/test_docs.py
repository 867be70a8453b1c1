"""The pages about sni and sniffing say what the options say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gostnet.core.options import markdown
from gostnet.protocols.sni.connector import SniConnector
from gostnet.protocols.sni.handler import SniHandler
from gostnet.protocols.transparent.handler import RedHandler, ReduHandler

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(
    ("page", "component"),
    [
        ("protocols/sni.md", SniHandler),
        ("protocols/sni.md", SniConnector),
        ("sniffing.md", RedHandler),
        ("sniffing.md", ReduHandler),
    ],
)
def test_the_table_of_options_is_up_to_date(page: str, component: Any) -> None:
    assert markdown(component.Options) in (DOCS / page).read_text()
