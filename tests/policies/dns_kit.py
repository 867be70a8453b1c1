"""A scripted DNS server on loopback, UDP and TCP on one port, and an egress that counts what it opens."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import GostnetError
from gostnet.core.flow import Flow
from gostnet.core.sockets import connect_tcp
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope
from gostnet.core.udp_socket import open_udp

Reply = bytes | Sequence[bytes] | None
"""One packet, several of them, or silence."""
Script = Callable[[dns.message.Message, str], Reply]
"""Takes the question and "udp" or "tcp"."""
Zone = Mapping[str, Mapping[str, Sequence[str]]]
"""Name to type to values; a name that is there without the type asked for gives NOERROR without answers."""


def wire_of(
    query: dns.message.Message,
    answers: Sequence[tuple[str, int, str, str]] = (),
    *,
    rcode: dns.rcode.Rcode = dns.rcode.NOERROR,
    soa: tuple[int, int] | None = None,
    flags: int = 0,
    id: int | None = None,
) -> bytes:
    """Return an answer to `query`: (name, TTL, type, value) each; `soa` is its TTL and its minimum."""
    reply = dns.message.make_response(query)
    reply.set_rcode(rcode)
    reply.flags |= flags
    if id is not None:
        reply.id = id
    for name, ttl, kind, value in answers:
        reply.answer.append(dns.rrset.from_text(name + ".", ttl, "IN", kind, value))
    if soa is not None:
        ttl, minimum = soa
        reply.authority.append(dns.rrset.from_text("test.", ttl, "IN", "SOA", f"ns.test. root.test. 1 2 3 4 {minimum}"))
    return reply.to_wire()


class Upstream:
    """The server. `asked` holds what came in, such as `udp a.test A`; `subnets` what EDNS told about clients."""

    def __init__(self, zone: Zone, *, ttl: int = 300, soa: tuple[int, int] | None = (30, 30)) -> None:
        self.zone = zone
        self.ttl = ttl
        self.soa = soa
        self.asked: list[str] = []
        self.ids: list[int] = []
        self.subnets: list[str] = []
        self.script: Script = lambda query, transport: self.answer(query)
        self.hold: asyncio.Event | None = None
        self.address = Endpoint("127.0.0.1", 0)
        self._came = asyncio.Event()

    def answer(self, query: dns.message.Message, **options: Any) -> bytes:
        """Answer from the zone."""
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.rdtype)
        records = self.zone.get(name)
        if records is None:
            return wire_of(query, rcode=dns.rcode.NXDOMAIN, soa=self.soa, **options)
        values = records.get(kind, ())
        found = [(name, self.ttl, kind, value) for value in values]
        return wire_of(query, found, soa=None if found else self.soa, **options)

    def note(self, data: bytes, transport: str) -> dns.message.Message:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        self.asked.append(f"{transport} {name} {dns.rdatatype.to_text(question.rdtype)}")
        self.ids.append(query.id)
        self.subnets += [option.to_text() for option in query.options if isinstance(option, dns.edns.ECSOption)]
        self._came.set()
        return query

    async def until_asked(self, count: int) -> None:
        """Wait until `count` questions have come in."""
        async with asyncio.timeout(20):
            while len(self.asked) < count:
                self._came.clear()
                await self._came.wait()

    async def reply(self, data: bytes, transport: str) -> list[bytes]:
        query = self.note(data, transport)
        if self.hold is not None:
            await self.hold.wait()
        reply = self.script(query, transport)
        if reply is None:
            return []
        return [reply] if isinstance(reply, bytes) else list(reply)

    async def serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            size = int.from_bytes(await reader.readexactly(2), "big")
            for packet in await self.reply(await reader.readexactly(size), "tcp"):
                writer.write(len(packet).to_bytes(2, "big") + packet)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, upstream: Upstream, scope: Scope) -> None:
        self.upstream = upstream
        self.scope = scope
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is of no such class

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.scope.start(self.work(data, addr))

    async def work(self, data: bytes, addr: Any) -> None:
        assert self.transport is not None
        for packet in await self.upstream.reply(data, "udp"):
            self.transport.sendto(packet, addr)


@asynccontextmanager
async def serving(upstream: Upstream) -> AsyncIterator[Upstream]:
    """Run the server on one free port for both transports."""
    loop = asyncio.get_running_loop()
    scope = Scope("dns")
    for _ in range(20):
        tcp = await asyncio.start_server(upstream.serve_tcp, "127.0.0.1", 0)
        port = tcp.sockets[0].getsockname()[1]
        try:
            udp, _ = await loop.create_datagram_endpoint(lambda: _Udp(upstream, scope), ("127.0.0.1", port))
        except OSError as exc:
            tcp.close()
            if exc.errno != errno.EADDRINUSE:
                raise
            continue
        break
    upstream.address = Endpoint("127.0.0.1", port)
    try:
        yield upstream
    finally:
        await scope.cancel()
        udp.close()
        tcp.close()
        await tcp.wait_closed()


class Loopback:
    """An egress of plain sockets. `opened` tells what was asked of it; `error` makes it fail."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.flows: list[Flow] = []
        self.error: GostnetError | None = None
        self.held: list[Stream | Datagrams] = []

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        self.note(flow, f"tcp {target}")
        stream = await connect_tcp(target.host, target.port)
        self.held.append(stream)
        return stream

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        self.note(flow, f"udp {target}")
        datagrams = open_udp(target)
        self.held.append(datagrams)
        return datagrams

    def note(self, flow: Flow, what: str) -> None:
        self.opened.append(what)
        self.flows.append(flow)
        if self.error is not None:
            raise self.error
