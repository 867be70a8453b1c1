"""What the tests of the SOCKS5 handler share."""

from __future__ import annotations

import asyncio
from typing import Any

from gostnet.core.address import Endpoint
from gostnet.core.contracts import Authenticator, Layer
from gostnet.core.datagrams import Datagrams
from gostnet.core.egress import Egress
from gostnet.core.errors import GostnetError
from gostnet.core.flow import Flow
from gostnet.core.stream import Stream
from gostnet.pipeline.handler import HandlerContext
from gostnet.protocols.socks5.handler import Socks5Handler

from ..vectors import PATIENCE, Peer


class Users:
    """Knows user:pass, whose client id is `id-of-user`."""

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        return f"id-of-{username}" if (username, password) == ("user", "pass") else None


class Observed:
    """A handler that tells what became of its connections. Options are the handler's."""

    accepts = (Stream,)

    def __init__(self, users: Authenticator | None = None, tls: Layer | None = None, **options: Any) -> None:
        context = HandlerContext(service="socks", authenticator=users, tls=tls)
        self._handler = Socks5Handler(Socks5Handler.Options(**options), context)
        self._ends: asyncio.Queue[tuple[Flow, BaseException | None]] = asyncio.Queue()

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        try:
            await self._handler.handle(flow, conn, egress)
        except BaseException as exc:
            self._ends.put_nowait((flow, exc))
            raise
        self._ends.put_nowait((flow, None))

    async def end(self) -> tuple[Flow, BaseException | None]:
        """Return the flow that ended next, and how."""
        async with asyncio.timeout(PATIENCE):
            return await self._ends.get()

    async def failure(self) -> BaseException:
        """Return the error with which the next flow ended."""
        _, error = await self.end()
        assert error is not None, "it ended well"
        return error


class Failing:
    """A way out that is none."""

    def __init__(self, error: GostnetError) -> None:
        self.error = error

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        raise self.error

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        raise self.error


def request(command: int, target: Endpoint) -> bytes:
    """Write a request by hand."""
    ip = target.ip
    if ip is None:
        address = bytes((3, len(target.host))) + target.host.encode()
    else:
        address = bytes((1 if ip.version == 4 else 4,)) + ip.packed
    return bytes((5, command, 0)) + address + target.port.to_bytes(2, "big")


async def opened(address: Endpoint, target: Endpoint, command: int = 1) -> Peer:
    """Return a connection on which the handler at `address` has said yes (to an IPv4 address)."""
    peer = await Peer.connect(address)
    await peer.send(b"\x05\x01\x00")
    assert await peer.exactly(2) == b"\x05\x00"
    await peer.send(request(command, target))
    reply = await peer.exactly(10)
    assert reply[:4] == b"\x05\x00\x00\x01", reply
    return peer
