"""The handler `dns`: a forwarder of queries with hosts, bypass and a cache.

The rows DN01, DN02, ... that comments name are those of docs/dns.md.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from ...core.address import Endpoint, parse_ip
from ...core.datagrams import Datagram, Datagrams, pieces
from ...core.egress import Egress
from ...core.errors import GostnetError, NoRoute, ProtocolError, ResolveError
from ...core.flow import Flow
from ...core.hub import current_hub
from ...core.options import Bytes, CommaList, Seconds, opt
from ...core.registry import component
from ...core.stream import Stream
from ...core.tasks import Scope
from ...pipeline.handler import HandlerContext
from ...pipeline.node import Node
from ...pipeline.router import ServiceRouter
from ...policies.nameserver import PORT, NameServer, exchange, parse_path, parse_server, parse_subnet
from ...policies.resolver import DNSResolver
from ...wire import dns_message as wire
from .cache import Cache, Key
from .record import dns_fields

HOSTS_TTL: Final = 3600
"""TTL of answers from hosts, as in GOST."""
MAX_PENDING: Final = 4096
"""Questions to upstreams at a time; what comes beyond is answered SERVFAIL: a flood must not eat the descriptors."""
PIPELINED: Final = 64
"""Queries of one connection at a time; the rest waits in its socket."""
STREAM_IDLE: Final = 10.0
"""Seconds after which a connection without a query in work is closed (RFC 7766 section 6.2.3)."""
WRITE_TIMEOUT: Final = 10.0
"""Seconds for a client to take an answer."""
LAST_ANSWERS: Final = 30.0
"""Seconds for answers to a client that has ended its direction."""
MAX_REFRESHES: Final = 32
"""Answers refreshed at a time, as in GOST; beyond it an expired one is asked for again by who wants it."""
SYSTEM_PERIOD: Final = 5.0
"""Seconds for which what was read of resolv.conf holds."""


Answered = Callable[[str, Sequence[bytes], int], Awaitable[None]]
"""Takes a name, addresses in network order, and the seconds that the client may keep them."""


@dataclass(frozen=True, slots=True)
class _Upstream:
    """A server, and the target of the forwarder that it is, if it is one."""

    server: NameServer
    node: Node | None = None


@component("handler", "dns")
class DnsHandler:
    """Answers DNS queries, whichever way the listener brings them."""

    accepts: ClassVar[tuple[type[Any], ...]] = (Datagrams, Stream)

    RESOLV_CONF: ClassVar[str] = "/etc/resolv.conf"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `dns`."""

        ttl: Seconds = opt(0.0, "How long answers are kept: 0 as long as they say, less than 0 not at all.")
        timeout: Seconds = opt(5.0, "Time for one upstream to answer.")
        client_ip: str = opt("", "Address told to upstreams as the client's (EDNS client subnet).", key="clientIP")
        dns: CommaList = opt([], "Upstreams where there is no forwarder, such as `udp://9.9.9.9,tcp://1.1.1.1`.")
        stale: bool = opt(False, "Give an expired answer at once and refresh it behind the scenes.", key="async")
        read_timeout: Seconds = opt(0.0, "Idle time after which a connection is closed; 0 is 10s.")
        buffer_size: Bytes = opt(4096, "Accepted for compatibility: messages of every size are read whole.")

    def __init__(
        self, options: Options, context: HandlerContext, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._context = context
        self._timeout = options.timeout if options.timeout > 0 else 5.0
        self._subnet = _subnet(parse_subnet(options.client_ip, f"{context.service}: clientIP"))
        self._written = [(text, f"{context.service}: dns") for text in options.dns if text.strip()]
        for text, path in (*self._written, *context.addresses.values()):
            parse_server(text, path, secure=context.upstream_tls is not None)
            parse_path(text, path)
        self._stale = options.stale and options.ttl >= 0
        self._idle = options.read_timeout if options.read_timeout > 0 else STREAM_IDLE
        self.cache = Cache(options.ttl, clock=clock)
        self._running: dict[Key, asyncio.Future[_Outcome]] = {}
        self._refreshing: set[Key] = set()
        self._ways: tuple[Egress, Egress] | None = None
        self._by_node: dict[Node, NameServer] = {}
        self._listed: list[_Upstream] | None = None
        self._system: tuple[float, list[_Upstream]] = (0.0, [])
        self.answered: Answered | None = None
        """Called with the addresses that a name is about to be answered with; the client waits for it."""

    async def handle(self, flow: Flow, conn: Stream | Datagrams, egress: Egress) -> None:
        """Answer the queries of one client, in the order in which the answers come."""
        if isinstance(conn, Datagrams):
            if conn.max_payload < wire.MAX_SIZE:
                flow.network = "udp"
            await self._datagrams(flow, conn, egress)
        else:
            await self._stream(flow, conn, egress)

    def close(self) -> None:
        """Close the connections to upstreams that wait for their next question; others are opened when needed."""
        listed = [upstream.server for upstream in self._listed or ()]
        for server in (*self._by_node.values(), *listed):
            server.kept.close()

    # ---- clients -------------------------------------------------------------------------------
    async def _datagrams(self, flow: Flow, conn: Datagrams, egress: Egress) -> None:
        # HTTP carries messages of every size, UDP what the client says.
        whole = conn.max_payload >= wire.MAX_SIZE

        async def work(data: bytes, peer: Endpoint) -> None:
            async def send(answer: bytes) -> None:
                flow.meter.down += len(answer)
                await conn.send((Datagram(answer, peer),))

            await self._serve(data, flow, egress, send, stream=whole)

        first = True
        async with _all_of("dns") as scope:
            while batch := await conn.receive():
                for datagram in batch:
                    for data in map(bytes, pieces(datagram)):
                        flow.meter.up += len(data)
                        if not first and not self._context.allows_request(flow):
                            self._context.log.debug(f"{flow.client}: rate limit", sid=flow.sid)
                            if whole:
                                return
                            continue
                        first = False
                        scope.launch(work(data, datagram.peer))

    async def _stream(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        writing = asyncio.Lock()
        free = asyncio.Semaphore(PIPELINED)

        async def send(answer: bytes) -> None:
            flow.meter.down += len(answer)
            async with asyncio.timeout(WRITE_TIMEOUT), writing:
                await conn.send(len(answer).to_bytes(2, "big") + answer)

        async def work(data: bytes) -> None:
            try:
                await self._serve(data, flow, egress, send, stream=True)
            finally:
                free.release()

        held = bytearray()
        first = True
        async with _all_of("dns") as scope:
            while True:
                try:
                    async with asyncio.timeout(self._idle):
                        data = await conn.receive()
                except TimeoutError:
                    if len(scope):
                        continue
                    break
                if not data:
                    break
                flow.meter.up += len(data)
                held += data
                for message in _frames(held):
                    if not first and not self._context.allows_request(flow):
                        self._context.log.debug(f"{flow.client}: rate limit", sid=flow.sid)
                        return
                    first = False
                    await free.acquire()
                    scope.launch(work(message))

    async def _serve(
        self, data: bytes, flow: Flow, egress: Egress, send: Callable[[bytes], Any], *, stream: bool
    ) -> None:
        """Answer one message. Whatever is wrong with it, or with its client, ends here."""
        begun = time.time() if flow.details is not None else 0.0
        try:
            try:
                query = wire.parse_query(data)
            except ProtocolError as exc:
                self._context.log.debug(f"{flow.client}: {exc}", sid=flow.sid)
                answer = wire.refusal(data, wire.FORMERR if not _opcode(data) else wire.NOTIMP)
                if answer is not None:
                    await send(answer)
                return
            limit = wire.MAX_SIZE if stream else query.limit
            key = Key.of(query)
            answer = self._at_once(query, key, flow, egress)
            refresh = False
            cached = False
            if answer is None:
                entry = self.cache.get(key)
                if entry is not None:
                    fresh = self.cache.fresh(entry)
                    refresh = not fresh and self._stale and len(self._refreshing) < MAX_REFRESHES
                    if fresh or refresh or (self._stale and key in self._refreshing):
                        answer = entry.render(query, self.cache.clock())
                        cached = True
            if answer is None:
                found = await self._look_up(query, key, flow, egress)
                answer = found.for_client(query) if found is not None else wire.reply(query, wire.SERVFAIL)
            sent = answer if len(answer) <= limit else wire.truncate(answer, query)
            if self.answered is not None and query.kind in (wire.A, wire.AAAA) and query.cls == wire.IN:
                addresses, ttl = wire.addresses_of(sent, query.kind)
                if addresses:
                    await self.answered(query.name, addresses, ttl)
            await send(sent)
            if flow.details is not None:
                shown = dns_fields(data, sent, cached=cached)
                sizes = {"inputBytes": len(data), "outputBytes": len(sent)}
                flow.details.add_part({"proto": "dns", "dns": shown, "begun": begun, **sizes})
            if refresh and key not in self._refreshing:
                # In the fiber of the client that met it: nothing of it outlives the service.
                self._refreshing.add(key)
                try:
                    await self._look_up(query, key, flow, egress)
                finally:
                    self._refreshing.discard(key)
        except (GostnetError, TimeoutError) as exc:
            self._context.log.debug(f"{flow.client}: {exc}", sid=flow.sid)

    def _at_once(self, query: wire.Query, key: Key, flow: Flow, egress: Egress) -> bytes | None:
        """Return the answer that needs no upstream, None if there is none."""
        if _opcode_of(query) or query.kind in (wire.AXFR, wire.IXFR):
            return wire.reply(query, wire.NOTIMP)
        if query.edns is not None and query.edns.version:
            return wire.reply(query, wire.BADVERS)
        if not isinstance(egress, ServiceRouter) or query.cls != wire.IN:
            return None
        if egress.bypass is not None and egress.bypass.contains(flow.network, Endpoint(query.name, 0)):
            self._context.log.debug(f"{query.name} is bypassed by the service", sid=flow.sid)
            return wire.reply(query)
        if egress.hosts is not None and query.kind in (wire.A, wire.AAAA):
            family = 4 if query.kind == wire.A else 6
            addresses = egress.hosts.lookup(query.name, family)
            if addresses or egress.hosts.lookup(query.name):
                # DN03: a name that is listed is not asked for elsewhere, not even in the other family.
                return wire.reply(query, wire.NOERROR, [_packed(text) for text in addresses], ttl=HOSTS_TTL)
        return None

    # ---- upstreams -----------------------------------------------------------------------------
    async def _look_up(self, query: wire.Query, key: Key, flow: Flow, egress: Egress) -> wire.Answer | None:
        """Ask upstream and keep the answer, None if there is none; equal questions at the same time are one.

        That they are one also ends the loop of a service that is its own upstream: it waits for itself once.
        """
        while (running := self._running.get(key)) is not None:
            outcome = await asyncio.shield(running)
            if not outcome.given_up:
                return outcome.answer
        if len(self._running) >= MAX_PENDING:
            return None
        mine: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
        self._running[key] = mine
        outcome = _Outcome(None, given_up=True)
        try:
            answer = await self._ask(query, flow, egress)
            if answer is not None:
                self.cache.put(key, answer)
            outcome = _Outcome(answer)
            return answer
        finally:
            del self._running[key]
            mine.set_result(outcome)

    async def _ask(self, query: wire.Query, flow: Flow, egress: Egress) -> wire.Answer | None:
        """Ask one upstream after the other until one has an answer that is no error of its own (DN06)."""
        worst: wire.Answer | None = None
        for upstream in self._upstreams(query, flow, egress):
            server, node = upstream.server, upstream.node
            subnet = self._subnet if self._subnet is not None else _subnet(server.subnet)
            question = wire.onward(query, secrets.randbits(16), subnet)
            try:
                answer = await exchange(
                    server, question, _accept(question), query.name, client=flow.client, partial=True
                )
            except ResolveError as exc:
                self._context.log.warn(str(exc), sid=flow.sid)
                if node is not None:
                    node.marker.mark(current_hub().loop.time())
                continue
            if node is not None:
                node.marker.reset()
            if answer.rcode in (wire.NOERROR, wire.NXDOMAIN):
                return answer
            worst = answer
        return worst

    def _upstreams(self, query: wire.Query, flow: Flow, egress: Egress) -> Iterator[_Upstream]:
        """Return the servers in the order in which they are to be asked, each once."""
        way = self._way(egress)
        context = self._context
        if context.hop is not None:
            choice = Flow(context.service, flow.client, flow.ingress, "udp")
            while True:
                try:
                    node = context.hop.select(choice, Endpoint(query.name, 0), current_hub().loop.time(), query.name)
                except NoRoute as exc:  # every target is for other names
                    context.log.debug(str(exc), sid=flow.sid)
                    return
                if node is None or node in choice.tried:
                    return
                yield _Upstream(self._server_of(node, way), node)
                choice.tried = (*choice.tried, node)
        if self._written:
            if self._listed is None:
                self._listed = [_Upstream(self._server(text, path, way)) for text, path in self._written]
            yield from self._listed
            return
        if isinstance(egress, ServiceRouter) and isinstance(egress.resolver, DNSResolver):
            yield from (_Upstream(server) for server in egress.resolver.servers)
            return
        yield from self._of_system(way, flow)

    def _way(self, egress: Egress) -> Egress:
        """Return how upstreams are reached: as the service's targets are, but its bypass is about names (DN02)."""
        if self._ways is None or self._ways[0] is not egress:
            way = egress
            if isinstance(egress, ServiceRouter):
                way = ServiceRouter(
                    egress.direct,
                    egress.chains,
                    resolver=egress.resolver,
                    retries=egress.retries,
                    timeout=egress.timeout,
                    log=self._context.log,
                )
            self._ways = (egress, way)
            self._by_node = {}
            self._listed = None
            self._system = (0.0, [])
        return self._ways[1]

    def _server_of(self, node: Node, way: Egress) -> NameServer:
        server = self._by_node.get(node)
        if server is None:
            text, path = self._context.addresses.get(node, ("", ""))
            if text:
                server = self._server(text, path, way)
            else:
                address = node.address if node.address.port else Endpoint(node.address.host, PORT)
                server = NameServer(address=address, egress=way, timeout=self._timeout)
            self._by_node[node] = server
        return server

    def _server(self, text: str, path: str, way: Egress) -> NameServer:
        context = self._context
        transport, address = parse_server(text, path, secure=context.upstream_tls is not None)
        return NameServer(
            address=address,
            egress=way,
            transport=transport,
            timeout=self._timeout,
            tls=context.upstream_https or context.upstream_tls if transport == "https" else context.upstream_tls,
            path=parse_path(text, path),
        )

    def _of_system(self, way: Egress, flow: Flow) -> Sequence[_Upstream]:
        """Return the servers of resolv.conf, without this very service."""
        read, servers = self._system
        now = current_hub().loop.time()
        if not servers or now - read >= SYSTEM_PERIOD:
            servers = [
                _Upstream(NameServer(address=address, egress=way, timeout=self._timeout))
                for address in system_servers(Path(self.RESOLV_CONF))
                if not _is_own(address, flow.ingress)
            ]
            self._system = (now, servers)
            if not servers:
                self._context.log.warn(f"there is no name server to ask: none configured, none in {self.RESOLV_CONF}")
        return servers


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a question; given up if who asked was cancelled, so that another one of those who wait asks."""

    answer: wire.Answer | None
    given_up: bool = False


@asynccontextmanager
async def _all_of(name: str) -> AsyncIterator[Scope]:
    """Wait for what was launched inside, for a while; cancel the rest."""
    scope = Scope(name)
    try:
        yield scope
        if len(scope):
            await scope.drain(LAST_ANSWERS)
    finally:
        if len(scope):
            await scope.cancel()


def _frames(held: bytearray) -> Iterator[bytes]:
    """Take the complete messages out of `held`: two bytes of length each, then the message."""
    while len(held) >= 2:
        end = 2 + int.from_bytes(held[:2], "big")
        if len(held) < end:
            return
        message = bytes(held[2:end])
        del held[:end]
        yield message


def _accept(question: bytes) -> Callable[[bytes], wire.Answer | None]:
    def accept(data: bytes) -> wire.Answer | None:
        if not wire.answers(data, question):
            return None
        try:
            return wire.parse_answer(data)
        except ProtocolError:
            return None

    return accept


def _opcode(data: bytes) -> int:
    return data[2] & 0x78 if len(data) > 2 else 0


def _opcode_of(query: wire.Query) -> int:
    return query.flags & wire.OPCODE


def _packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def _subnet(address: str) -> bytes | None:
    """Return the option that tells the network of `address`: /24 of IPv4, /56 of IPv6 (RFC 7871 section 11.1)."""
    ip = parse_ip(address) if address else None
    return wire.subnet_option(ip.packed, 24 if ip.version == 4 else 56) if ip is not None else None


def _is_own(server: Endpoint, ingress: Endpoint) -> bool:
    if server.port != ingress.port:
        return False
    ip = server.ip
    return server.host == ingress.host or (ip is not None and ip.is_loopback and ingress.host in ("", "::", "0.0.0.0"))


def system_servers(path: Path) -> list[Endpoint]:
    """Return the name servers of a resolv.conf, [] if it cannot be read."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    words = (line.split() for line in lines)
    found = [row[1] for row in words if len(row) > 1 and row[0] == "nameserver"]
    return [Endpoint(host, PORT) for host in found if parse_ip(host) is not None]
