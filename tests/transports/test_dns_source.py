"""The UDP socket of the listener `dns`."""

from __future__ import annotations

import asyncio
import socket

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.tasks import run
from gostnet.core.udp_socket import UdpSocket
from gostnet.transports.dns import DnsUdpSource


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_answers_leave_from_the_address_that_was_asked(host: str) -> None:
    async def main() -> None:
        source = DnsUdpSource(Endpoint(host, 0))
        await source.open()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        client = UdpSocket(sock)
        async with asyncio.timeout(10):
            for asked in ("127.0.0.1", "127.0.0.2"):
                where = Endpoint(asked, source.address.port)
                await client.send([Datagram(b"question", where)])
                ((flow, question),) = await source.accept()
                assert flow.ingress == question.local == where
                (datagram,) = await question.receive()
                await question.send([Datagram(b"answer", datagram.peer)])
                (answer,) = await client.receive()
                assert (answer.data, answer.peer) == (b"answer", where)
        client.abort()
        source.abort()

    run(main())
