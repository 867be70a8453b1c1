"""What the tests of the TAP handler share: a device in memory, and a handler that serves it on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from gostnet.core.address import ANY, Endpoint
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.tasks import Scope
from gostnet.core.udp_socket import UdpSocket, listen_udp
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Marker, Node
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.tap.handler import TapHandler
from gostnet.testing.memory import MemoryDevice

from ..vectors import UdpPeer, router

BROADCAST = b"\xff" * 6
MULTICAST = bytes.fromhex("333300000001")


def mac(number: int) -> bytes:
    """Return a hardware address of one device."""
    return b"\x02\0\0\0\0" + bytes([number])


def frame(source: bytes, destination: bytes, payload: bytes = b"payload") -> bytes:
    """Return a frame of an experimental type (IEEE 802)."""
    return destination + source + b"\x88\xb5" + payload


def handler(username: str = "", password: str = "", hop: Hop | None = None, **options: Any) -> TapHandler:
    """Return a handler with a cipher and options."""
    if "key" in options:
        options["key"] = Secret(options["key"])
    context = HandlerContext(service="tap", path="handler", username=username, password=Secret(password), hop=hop)
    return TapHandler(TapHandler.Options(**options), context)


@asynccontextmanager
async def server(device: MemoryDevice, served: TapHandler | None = None) -> AsyncIterator[Endpoint]:
    """Serve the device; yield the address at which peers reach it."""
    sock = listen_udp(Endpoint("127.0.0.1", 0))
    address = Endpoint.from_sockaddr(sock.getsockname())
    device.carrier = UdpSocket(sock, address)
    scope = Scope("server")
    try:
        one = served or handler()
        task = scope.start(one.handle(Flow("", ANY, address, "udp"), device, router()), "server")
        yield address
        assert not task.done(), "the server has ended"
    finally:
        await scope.cancel()
        device.carrier.abort()


@asynccontextmanager
async def client(
    device: MemoryDevice, address: Endpoint, username: str = "", password: str = "", **options: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """Serve the device as a client of the server at `address`; yield the task."""
    node = Node("server", address, Transport("tcp", StreamDialer()), None, Marker(1, 1.0), None)  # type: ignore[arg-type]
    one = handler(username, password, Hop("tap", [node]), **options)
    scope = Scope("client")
    try:
        yield scope.start(one.handle(Flow("", ANY, ANY, "udp"), device, router()), "client")
    finally:
        await scope.cancel()


async def introduced(peer: UdpPeer, address: Endpoint, device: MemoryDevice, own: bytes) -> None:
    """Let the server know where an address is, by a frame to nobody."""
    hello = frame(own, mac(0xEE), b"hello from " + own)
    await peer.send(hello, address)
    while await device.taken() != hello:
        pass


def drain(peer: UdpPeer) -> None:
    """Forget what a peer has got."""
    while not nothing(peer):
        pass


def nothing(peer: UdpPeer) -> bool:
    """Tell whether a peer has got nothing that it has not read."""
    try:
        peer.sock.recv(65536)
    except BlockingIOError:
        return True
    return False
