"""The listening TCP socket."""

from __future__ import annotations

import asyncio
import socket
import struct

from gostnet.core.address import Endpoint
from gostnet.core.flow import Flow
from gostnet.core.sockets import SocketStream
from gostnet.core.tasks import run
from gostnet.transports.tcp import TcpOptions, TcpSource

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: close at once, by a reset."""


class Asking(TcpSource):
    """Asks for the peer's address, as sources do that find out where a connection was going."""

    def flow_of(self, stream: SocketStream, client: Endpoint) -> Flow:
        stream.sock.getpeername()
        return super().flow_of(stream, client)


def test_client_that_resets_before_it_is_accepted_costs_the_next_one_nothing() -> None:
    async def scenario() -> None:
        source = Asking(Endpoint("127.0.0.1", 0), TcpOptions())
        await source.open()
        with socket.create_connection(tuple(source.address)) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        with socket.create_connection(tuple(source.address)) as client:
            async with asyncio.timeout(5):
                batch = await source.accept()
            assert [flow.client.port for flow, _ in batch] == [client.getsockname()[1]]
            for _, stream in batch:
                stream.abort()
        await source.aclose()

    run(scenario())
