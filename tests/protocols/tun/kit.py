"""What the tests of the TUN handler share: a device in memory, and a handler that serves it on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from gostnet.core.address import ANY, Endpoint
from gostnet.core.contracts import Authenticator
from gostnet.core.egress import Egress
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.packets import Setup, Way
from gostnet.core.tasks import Scope
from gostnet.core.udp_socket import UdpSocket, listen_udp
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Marker, Node
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.tun.handler import TunHandler
from gostnet.testing.memory import MemoryDevice

from ..vectors import UdpPeer, router


def setup(*addresses: str, ways: Sequence[tuple[str, str]] = ()) -> Setup:
    """Return a device's addresses, and the networks behind it with their gateways."""
    return Setup(
        tuple(ip_interface(text) for text in addresses),
        tuple(Way(ip_network(network), ip_address(gateway) if gateway else None) for network, gateway in ways),
    )


@asynccontextmanager
async def server(
    device: MemoryDevice,
    users: Authenticator | None = None,
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    egress: Egress | None = None,
    **options: Any,
) -> AsyncIterator[Endpoint]:
    """Serve the device; yield the address at which peers reach it."""
    if "passphrase" in options:
        options["passphrase"] = Secret(options["passphrase"])
    sock = listen_udp(Endpoint(host, port))
    address = Endpoint.from_sockaddr(sock.getsockname())
    device.carrier = UdpSocket(sock, address)
    handler = TunHandler(TunHandler.Options(**options), HandlerContext(service="tun", authenticator=users))
    scope = Scope("server")
    try:
        task = scope.start(handler.handle(Flow("", ANY, address, "udp"), device, egress or router()), "server")
        yield address
        assert not task.done(), "the server has ended"
    finally:
        await scope.cancel()
        device.carrier.abort()


@asynccontextmanager
async def client(
    device: MemoryDevice, address: Endpoint, egress: Egress | None = None, **options: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """Serve the device as a client of the server at `address`; yield the task."""
    if "passphrase" in options:
        options["passphrase"] = Secret(options["passphrase"])
    node = Node("server", address, Transport("tcp", StreamDialer()), None, Marker(1, 1.0), None)  # type: ignore[arg-type]
    context = HandlerContext(service="tun", hop=Hop("tun", [node]))
    handler = TunHandler(TunHandler.Options(**options), context)
    scope = Scope("client")
    try:
        yield scope.start(handler.handle(Flow("", ANY, ANY, "udp"), device, egress or router()), "client")
    finally:
        await scope.cancel()


async def silent(peer: UdpPeer, address: Endpoint, witness: bytes, answer: bytes) -> None:
    """Assert that `peer` gets nothing for what it has sent: whatever comes later is answered, and it still has not."""
    with UdpPeer(address.host) as other:
        await other.send(witness, address)
        assert (await other.receive())[0] == answer
    try:
        data = peer.sock.recv(65536)
    except BlockingIOError:
        return
    raise AssertionError(f"{data.hex()} instead of silence")


def packet4(source: str, destination: str, payload: bytes = b"payload") -> bytes:
    """Return an IPv4 packet of an experimental protocol; nobody looks at its checksum."""
    head = b"\x45\0" + (20 + len(payload)).to_bytes(2, "big") + bytes(4) + b"\x40\xfd\0\0"
    return head + ip_address(source).packed + ip_address(destination).packed + payload


def packet6(source: str, destination: str, payload: bytes = b"payload") -> bytes:
    """Return an IPv6 packet of an experimental protocol."""
    head = b"\x60\0\0\0" + len(payload).to_bytes(2, "big") + b"\xfd\x40"
    return head + ip_address(source).packed + ip_address(destination).packed + payload
