"""What an idle connection takes: thousands of them are what proxies hold most of the time."""

from __future__ import annotations

import gc
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import gostnet
from gostnet.core.address import Endpoint
from gostnet.core.tasks import run
from gostnet.pipeline.handler import HandlerContext
from gostnet.protocols.socks5.handler import Socks5Handler

from ..vectors import echo_server, served
from .kit import opened

CONNECTIONS = 200

LIMIT = 3900
"""Bytes a connection, as allocated in our modules and not counting addresses; a coroutine's frame has 200 to 350."""


def test_idle_connections_hold_little() -> None:
    async def main() -> None:
        handler = Socks5Handler(Socks5Handler.Options(), HandlerContext())
        async with echo_server() as port, served(handler) as address:
            target = Endpoint("127.0.0.1", port)
            with ExitStack() as stack:

                async def hold(count: int) -> None:
                    for _ in range(count):
                        peer = stack.enter_context(await opened(address, target))
                        await peer.send(b"hello")
                        assert await peer.exactly(5) == b"hello"

                await hold(20)
                tracemalloc.start()
                try:
                    await hold(CONNECTIONS)
                    gc.collect()
                    ours = tracemalloc.Filter(True, f"{Path(gostnet.__file__).parent}/*")
                    statistics = tracemalloc.take_snapshot().filter_traces([ours]).statistics("filename")
                finally:
                    tracemalloc.stop()
                assert sum(found.size for found in statistics) / CONNECTIONS < LIMIT

    run(main())
