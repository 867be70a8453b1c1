"""Trains of datagrams that a device refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

from gostnet.core.address import Endpoint
from gostnet.core.batches import SOL_UDP, UDP_SEGMENT
from gostnet.core.datagrams import Datagram
from gostnet.core.hub import current_hub
from gostnet.core.tasks import run
from gostnet.core.udp_socket import UdpSocket, listen_udp, open_udp


class Refusing:
    """A socket whose device cannot cut trains, as one without checksums."""

    def __init__(self, sock: socket.socket, error: int) -> None:
        self._sock = sock
        self.error = error
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendmsg(self, buffers: Any, ancillary: Any = (), *rest: Any) -> int:
        if any(level == SOL_UDP and kind == UDP_SEGMENT for level, kind, _ in ancillary):
            self.refused += 1
            raise OSError(self.error, os.strerror(self.error))
        return self._sock.sendmsg(buffers, ancillary, *rest)


def test_a_device_that_refuses_trains_gets_single_datagrams_and_the_log_one_line() -> None:
    async def main() -> None:
        lines: list[object] = []
        current_hub().tell = lines.append
        sock = listen_udp(Endpoint("127.0.0.1", 0))
        server = UdpSocket(sock, Endpoint.from_sockaddr(sock.getsockname()))
        sent = [bytes([number]) * 100 for number in range(20)]
        for _ in range(2):  # two flows, one line
            client = open_udp(server.local)
            device = Refusing(client.sock, errno.EIO)
            client._sock = device  # type: ignore[assignment]
            for _ in range(3):
                await client.send([Datagram(data, server.local) for data in sent])
                got: list[bytes] = []
                async with asyncio.timeout(5):
                    while len(got) < len(sent):
                        got += [bytes(datagram.data) for datagram in await server.receive()]
                assert got == sent
            assert device.refused == 1
            assert (client.dropped, client.sent) == (0, 3 * 20 * 100)
            client.abort()
        assert lines == ["engine trains of datagrams gives way to single ones: Input/output error"]
        server.abort()

    run(main())


def test_a_train_that_is_too_long_for_its_way_is_no_reason_to_send_none() -> None:
    async def main() -> None:
        lines: list[object] = []
        current_hub().tell = lines.append
        sock = listen_udp(Endpoint("127.0.0.1", 0))
        server = UdpSocket(sock, Endpoint.from_sockaddr(sock.getsockname()))
        client = open_udp(server.local)
        client._sock = Refusing(client.sock, errno.EMSGSIZE)  # type: ignore[assignment]
        await client.send([Datagram(bytes(9000), server.local)] * 3)
        assert client.cuts == 8999
        assert lines == []
        client.abort()
        server.abort()

    run(main())
