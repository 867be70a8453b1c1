"""The handler `dns` in a real service on loopback, and scripted servers behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from gostnet.core.address import Endpoint
from gostnet.core.contracts import Layer, Policies
from gostnet.core.egress import Egress
from gostnet.core.tasks import Scope
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.handler import HandlerContext
from gostnet.pipeline.hop import Hop
from gostnet.pipeline.node import Node
from gostnet.pipeline.service import Service
from gostnet.pipeline.transport import ListenerContext, StreamDialer, Transport
from gostnet.protocols.dns.handler import DnsHandler
from gostnet.protocols.forward.connector import ForwardConnector
from gostnet.transports.dns import DnsOptions, dns_listener

from ..vectors import UdpPeer, router

PATIENCE = 10.0
Script = Callable[[dns.message.Message], bytes | None]


def answer(query: dns.message.Message, *records: str, ttl: int = 300, soa: int | None = None, **options: Any) -> bytes:
    """Return an answer; `records` are such as `A 192.0.2.1`, all of the name asked for; options rcode, flags."""
    reply = dns.message.make_response(query)
    reply.set_rcode(options.get("rcode", dns.rcode.NOERROR))
    reply.flags |= options.get("flags", dns.flags.RA)
    for record in records:
        kind, _, value = record.partition(" ")
        reply.answer.append(dns.rrset.from_text(query.question[0].name, ttl, "IN", kind, value))
    if soa is not None:
        reply.authority.append(dns.rrset.from_text("test.", 900, "IN", "SOA", f"ns.test. root.test. 1 2 3 4 {soa}"))
    return reply.to_wire(max_size=65535)


class Upstream:
    """A server whose answers a script makes: one UDP socket and one TCP port of the same number.

    asked     every query, as it came, by transport
    hold      while set, nothing is answered
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[tuple[str, bytes]] = []
        self.hold: asyncio.Event | None = None
        self.address = Endpoint("127.0.0.1", 0)
        self._came = asyncio.Event()

    async def until_asked(self, count: int) -> None:
        """Wait until `count` queries have come."""
        async with asyncio.timeout(PATIENCE):
            while len(self.asked) < count:
                self._came.clear()
                await self._came.wait()

    async def reply(self, transport: str, data: bytes) -> bytes | None:
        self.asked.append((transport, data))
        self._came.set()
        if self.hold is not None:
            await self.hold.wait()
        return self.script(dns.message.from_wire(data))

    async def _udp(self, peer: UdpPeer, scope: Scope) -> None:
        async def one(data: bytes, client: Endpoint) -> None:
            found = await self.reply("udp", data)
            if found is not None:
                await peer.send(found, client)

        while True:
            try:
                data, client = await peer.receive()
            except TimeoutError:
                continue
            scope.start(one(data, client))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, transport: str = "tcp") -> None:
        """Answer the queries of one connection until it ends."""
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(2), "big")
                found = await self.reply(transport, await reader.readexactly(size))
                if found is None:
                    break
                writer.write(len(found).to_bytes(2, "big") + found)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Upstream]:
        """Serve, both transports on one free port."""
        scope = Scope("upstream")
        for attempt in range(20):
            peer = UdpPeer()
            self.address = peer.address
            try:
                server = await asyncio.start_server(self._tcp, *self.address)
                break
            except OSError:
                peer.sock.close()  # somebody has the number for TCP
                if attempt == 19:
                    raise
        scope.start(self._udp(peer, scope))
        try:
            yield self
        finally:
            await scope.cancel()
            peer.sock.close()
            server.close()
            await server.wait_closed()

    async def _tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.serve(reader, writer)


def targets(*addresses: str) -> tuple[Hop, dict[Node, tuple[str, str]]]:
    """Return the forwarder of these URLs, as the assembly makes it."""
    connector = ForwardConnector(ForwardConnector.Options(), ConnectorContext())
    nodes = {
        Node(text, Endpoint("", 0), Transport("tcp", StreamDialer()), connector): (text, f"nodes[{index}]")
        for index, text in enumerate(addresses)
    }
    return Hop("dns", list(nodes)), nodes


def handler(
    *addresses: str, clock: Callable[[], float] | None = None, tls: Layer | None = None, **options: Any
) -> DnsHandler:
    """Return a handler that forwards to `addresses`, if any."""
    hop, written = targets(*addresses) if addresses else (None, {})
    context = HandlerContext(service="dns", hop=hop, addresses=written, upstream_tls=tls)
    more = {"clock": clock} if clock is not None else {}
    return DnsHandler(DnsHandler.Options(**options), context, **more)


@asynccontextmanager
async def serving(
    made: DnsHandler, egress: Egress | None = None, mode: str = "udp", tls: Any = None
) -> AsyncIterator[Endpoint]:
    """Run a service with the listener `dns`; yield its address."""
    context = ListenerContext("dns", "listener", "", lambda alpn: tls)
    listener = dns_listener(Endpoint("127.0.0.1", 0), DnsOptions(mode=mode), context)
    service = Service("dns", listener, made, egress or router(), Policies())
    await service.open()
    scope = Scope("service")
    task = scope.start(service.serve(), "serve")
    try:
        yield listener.source.address
    finally:
        task.cancel()
        await service.aclose()
        await service.drain(0)
        await scope.cancel()


async def ask(address: Endpoint, query: dns.message.Message | bytes, peer: UdpPeer | None = None) -> bytes:
    """Send a query over UDP and return what comes back."""
    wire = query if isinstance(query, bytes) else query.to_wire()
    if peer is not None:
        await peer.send(wire, address)
        return (await peer.receive())[0]
    with UdpPeer() as fresh:
        return await ask(address, wire, fresh)


def texts(data: bytes) -> list[str]:
    """Return the addresses (or other data) in an answer."""
    message = dns.message.from_wire(data)
    return [record.to_text() for rrset in message.answer for record in rrset]
