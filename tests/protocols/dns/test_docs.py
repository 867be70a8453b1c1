"""The page about the name service says what the options say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gostnet.core.options import markdown
from gostnet.protocols.dns.handler import DnsHandler
from gostnet.transports.dns import DnsOptions

PAGE = Path(__file__).parents[3] / "docs" / "dns.md"


@pytest.mark.parametrize("options", [DnsHandler.Options, DnsOptions])
def test_the_tables_of_options_are_up_to_date(options: Any) -> None:
    assert markdown(options) in PAGE.read_text()
