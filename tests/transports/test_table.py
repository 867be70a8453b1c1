"""The table of stacks: what stands behind the names of dialers."""

from __future__ import annotations

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import DialTimeout
from gostnet.core.flow import Flow
from gostnet.core.stream import Stream
from gostnet.core.tasks import run
from gostnet.testing.memory import stream_pair
from gostnet.transports.table import DIALERS
from gostnet.transports.tls import TlsLayer


def test_the_time_limit_of_a_dialers_handshake_holds() -> None:
    stack = next(dialer for dialer in DIALERS if dialer.name == "tls")
    near, _ = stream_pair()

    class Silence:
        async def connect(self, flow: Flow, target: Endpoint) -> Stream:
            return near

        async def associate(self, flow: Flow, target: Endpoint | None) -> None:
            raise AssertionError("nobody associates")

    async def main() -> None:
        options = stack.Options(handshake_timeout=0.02)
        transport = stack.make(options, lambda timeout: TlsLayer.for_client(None, handshake_timeout=timeout))
        with pytest.raises(DialTimeout):
            await transport.dial(Flow(), Endpoint("a.example", 1), Silence())  # type: ignore[arg-type]
        assert near.closed

    run(main())
