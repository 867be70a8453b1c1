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
from gostnet.core.errors import ConnError
from gostnet.core.flow import Flow
from gostnet.core.options import Secret
from gostnet.core.packets import Packets, Setup, Way
from gostnet.core.stream import Buffer
from gostnet.core.tasks import Scope
from gostnet.core.udp_socket import UdpSocket, listen_udp
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Marker, Node
from gostnet.pipeline.transport import StreamDialer, Transport
from gostnet.protocols.tun.handler import TunHandler

from ..vectors import PATIENCE, UdpPeer, router


def setup(*addresses: str, ways: Sequence[tuple[str, str]] = ()) -> Setup:
    """Return a device's addresses, and the networks behind it with their gateways."""
    return Setup(
        tuple(ip_interface(text) for text in addresses),
        tuple(Way(ip_network(network), ip_address(gateway) if gateway else None) for network, gateway in ways),
    )


class MemoryDevice(Packets):
    """A device whose kernel is the test: `put` routes a packet into it, `taken` is what came out towards the kernel."""

    def __init__(self, of: Setup) -> None:
        super().__init__("memory", 1420, setup=of)
        self._in: asyncio.Queue[bytes] = asyncio.Queue()
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._closed = self._given = False
        self.gone = False

    @property
    def closed(self) -> bool:
        return self._closed

    def check(self) -> None:
        if self.gone:
            raise ConnError("device memory is gone")

    async def receive(self) -> Sequence[Buffer]:
        if self._given:
            self._in.task_done()
        self._given = False
        packet = await self._in.get()
        self._given = True
        self.check()
        return [packet] if packet else []

    async def send(self, batch: Sequence[Buffer]) -> None:
        self.check()
        for packet in batch:
            self._out.put_nowait(bytes(packet))

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._closed = True
        self._in.put_nowait(b"")

    def delete(self) -> None:
        """Let somebody else delete the device."""
        self.gone = True
        self._in.put_nowait(b"")

    def put(self, packet: bytes) -> None:
        self._in.put_nowait(packet)

    async def handled(self) -> None:
        """Wait until everything that was put has been sent on, or dropped."""
        async with asyncio.timeout(PATIENCE):
            await self._in.join()

    async def taken(self, patience: float = PATIENCE) -> bytes:
        """Return the next packet that came out. Raise TimeoutError."""
        async with asyncio.timeout(patience):
            return await self._out.get()

    @property
    def untouched(self) -> bool:
        """Whether the kernel has got nothing that was not taken."""
        return self._out.empty()


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
