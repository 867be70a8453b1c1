"""The handlers `socks5` and `socks`.

The rows SK01, SK02, ... that comments name are those of docs/protocols/socks.md.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...core.address import Endpoint
from ...core.datagrams import Datagrams
from ...core.drive import run_handshake
from ...core.egress import Egress
from ...core.errors import ConnError, GostnetError, KernelError, PolicyDenied, ProtocolError
from ...core.flow import Flow
from ...core.options import Bytes, Seconds, group, opt
from ...core.registry import component
from ...core.sockets import ListenOptions, SocketStream
from ...core.stream import Stream
from ...core.udp_socket import UdpSocket, listen_udp
from ...dataplane.framed import TunDatagrams
from ...dataplane.pump import Filter, pump
from ...pipeline.direct import Direct
from ...pipeline.handler import HandlerContext, relay_with, request_deadline
from ...pipeline.names import resolved
from ...pipeline.router import ServiceRouter
from ...pipeline.sniffing import InterceptionOptions, Sniffer, SniffingOptions, watched
from .associate import ClientDatagrams, Lookup, until_end
from .codec import Command, Credentials, Method, Reply, Request, encode_reply, serve, serve_request

PORT_ATTEMPTS = 64
"""Ports of a range that are tried for one association: GOST's number."""

_UNSPECIFIED = ("", "::", "0.0.0.0")


@component("handler", "socks5", "socks")
class Socks5Handler:
    """Takes CONNECT, UDP ASSOCIATE and GOST's UDP-TUN, in the clear or inside TLS (methods 80 and 82)."""

    accepts = (Stream,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `socks5`."""

        read_timeout: Seconds = opt(15.0, "Time for negotiation, credentials and request together.")
        no_tls: bool = opt(False, "Never switch to TLS inside the dialogue (methods 0x80 and 0x82).", key="notls")
        udp: bool = opt(False, "Allow UDP: UDP ASSOCIATE and GOST's UDP over TCP.")
        udp_buffer_size: Bytes = opt(
            4096,
            "Accepted for compatibility: datagrams of every size are passed on whole.",
            key="udp.bufferSize",
            aliases=("udpBufferSize",),
        )
        udp_port_min: int = opt(
            0,
            "First port of the range for UDP ASSOCIATE; 0 takes any.",
            key="udp.bindRange.min",
            aliases=("udp.minPort",),
        )
        udp_port_max: int = opt(
            0, "Last port of the range for UDP ASSOCIATE.", key="udp.bindRange.max", aliases=("udp.maxPort",)
        )
        udp_resolve_domain: bool = opt(
            False,
            "Tell UDP clients addresses, never names, as the source of answers.",
            key="udp.resolveDomain",
            aliases=("udpResolveDomain",),
        )
        public_addr: str = opt(
            "",
            "IP address told to UDP clients instead of the local one.",
            key="socks.publicAddr",
            aliases=("publicAddr",),
        )
        hash: str = opt("", "What the hash strategy hashes instead of the client: the target.", choices=("", "host"))
        bind: bool = opt(False, "BIND, MBIND and UDP binding are not available in this version and are refused.")
        tor: bool = opt(
            False,
            "Tor's RESOLVE is not available in this version and is refused.",
            aliases=("enableTor", "socks5.tor"),
        )
        sniffing: SniffingOptions = group(SniffingOptions)
        mitm: InterceptionOptions = group(InterceptionOptions)

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._context = context
        # GOST: a value that makes no sense means the default.
        self._read_timeout = options.read_timeout if options.read_timeout > 0 else 15.0
        self._tls = None if options.no_tls else context.tls
        self._hash_target = options.hash == "host"
        self._sniffer = Sniffer.of(options.sniffing)
        self._options = options
        self._listening = ListenOptions(netns=context.netns)
        public = Endpoint(options.public_addr, 0)
        self._public = str(public.ip) if public.ip is not None else ""
        for name, wanted in (("bind", options.bind), ("tor", options.tor)):
            if wanted:
                context.log.warn(f"{name} is not available in this version: such requests are refused")

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        """Negotiate, then do what the request asks. Every refusal is replied to, then raised for the record."""
        authenticates = self._context.authenticator is not None
        answer = partial(self._authenticate, flow) if authenticates else None
        client = conn
        try:
            with request_deadline(self._read_timeout):
                request = await run_handshake(
                    conn, serve(authenticates=authenticates, tls=self._tls is not None), answer
                )
                if isinstance(request, Method):
                    assert self._tls is not None
                    client = await self._tls.server(flow, conn)
                    request = await run_handshake(client, serve_request(authenticates=authenticates), answer)
            if request.command == Command.CONNECT:
                upstream = await self._connect(flow, client, request.target, egress)
                await self._relay(flow, client, upstream, egress)
            else:
                await self._others(flow, client, request, egress)
            if client is not conn:
                await client.aclose()  # the service knows the stream below only
        except BaseException:
            if client is not conn:
                client.abort()
            raise

    async def _authenticate(self, flow: Flow, shown: Credentials) -> bool:
        return self._context.authenticate(flow, shown.username, shown.password)

    async def _connect(self, flow: Flow, client: Stream, target: Endpoint, egress: Egress) -> Stream:
        """Open the upstream, or tell the client why not."""
        if not target.host:
            target = Endpoint("127.0.0.1", target.port)
        flow.target = target
        if self._hash_target:
            flow.hash = str(target)
        try:
            return await egress.connect(flow, target)
        except GostnetError as exc:
            await _refuse(client, _reply_to(exc, Reply.NETWORK_UNREACHABLE))
            raise

    def _relay(self, flow: Flow, client: Stream, upstream: Stream, egress: Egress) -> Coroutine[Any, Any, None]:
        """Return what says yes and relays; what is needed for the yes only lives no longer than that."""
        inside, accepted = watched(self._sniffer, flow, client, egress, partial(_accept, client))
        return relay_with(flow, inside, upstream, accepted)

    async def _others(self, flow: Flow, client: Stream, request: Request, egress: Egress) -> None:
        match request.command:
            case Command.ASSOCIATE:
                await self._associate(flow, client, egress)
            case Command.UDP_TUN if request.target.port == 0:
                await self._tunnel(flow, client, request, egress)
            case Command.BIND | Command.MUX_BIND | Command.UDP_TUN:
                await _refuse(client, Reply.NOT_ALLOWED)
                raise PolicyDenied("binding is not available in this version")
            case _:
                await _refuse(client, Reply.COMMAND_UNSUPPORTED)
                raise ProtocolError(f"command {request.command:#04x} is not supported")

    # ---- UDP -----------------------------------------------------------------------------------
    async def _open(self, flow: Flow, client: Stream, egress: Egress) -> Datagrams:
        """Open an association to the outside, or tell the client why not."""
        try:
            return await egress.associate(flow, None)
        except GostnetError as exc:
            await _refuse(client, _reply_to(exc, Reply.FAILURE))
            raise

    async def _allow(self, client: Stream) -> None:
        if not self._options.udp:
            await _refuse(client, Reply.NOT_ALLOWED)
            raise PolicyDenied("UDP is off: udp=true allows it")

    async def _associate(self, flow: Flow, client: Stream, egress: Egress) -> None:
        """UDP ASSOCIATE (RFC 1928 section 7): lives as long as the control connection, however idle."""
        await self._allow(client)
        flow.network = "udp"
        try:
            socket = self._bind(flow, client.local.host or flow.ingress.host)
        except GostnetError:
            await _refuse(client, Reply.FAILURE)
            raise
        try:
            upstream = await self._open(flow, client, egress)
            try:
                told = Endpoint(self._public or socket.local.host, socket.local.port)
                await client.send(encode_reply(Reply.SUCCEEDED, told))
                flow.connected = True
                inside = ClientDatagrams(socket, flow.client.host, self._lookup(egress))
                await pump(flow, inside, upstream, allowed=_filter(egress), beside=(until_end(client),))
            finally:
                upstream.abort()
        finally:
            socket.abort()

    def _bind(self, flow: Flow, host: str) -> UdpSocket:
        """Bind the socket for the client at the address that it already talks to. Raise KernelError."""
        if flow.client.ip is None:
            raise ProtocolError("UDP ASSOCIATE needs a client with an IP address")
        low, high = self._options.udp_port_min, self._options.udp_port_max
        ports = [0]
        if 0 < low <= high <= 65535:
            count = high - low + 1
            start = random.randrange(count)
            ports = [low + (start + step) % count for step in range(min(count, PORT_ATTEMPTS))]
        for port in ports[:-1]:
            try:
                return self._listen(Endpoint(host, port))
            except KernelError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
        return self._listen(Endpoint(host, ports[-1]))

    def _listen(self, address: Endpoint) -> UdpSocket:
        sock = listen_udp(address, self._listening)
        return UdpSocket(sock, Endpoint.from_sockaddr(sock.getsockname()))

    def _lookup(self, egress: Egress) -> Lookup | None:
        """Return what makes addresses of the names in answers: the service's hosts, its resolver, the system's."""
        if not self._options.udp_resolve_domain or not isinstance(egress, ServiceRouter):
            return None
        direct = egress.direct
        resolver = egress.resolver or (direct.resolver if isinstance(direct, Direct) else None)
        return partial(resolved, hosts=egress.hosts, resolver=resolver)

    async def _tunnel(self, flow: Flow, client: Stream, request: Request, egress: Egress) -> None:
        """UDP over this very connection. An association that cannot be opened is replied to (SK09)."""
        await self._allow(client)
        flow.network = "udp"
        upstream = await self._open(flow, client, egress)
        try:
            local = upstream.local
            if local.host in _UNSPECIFIED:
                # The socket serves both families; the client gets the zero address of the one it asked in.
                local = Endpoint("::" if ":" in request.target.host else "0.0.0.0", local.port)
            await client.send(encode_reply(Reply.SUCCEEDED, local))
            flow.connected = True
            await pump(flow, TunDatagrams(client, local=local), upstream, allowed=_filter(egress))
        finally:
            upstream.abort()


async def _accept(client: Stream, upstream: Stream) -> None:
    await client.send(encode_reply(Reply.SUCCEEDED, upstream.local))


def _filter(egress: Egress) -> Filter | None:
    """Return the service's word on single datagrams, None where it has no bypass."""
    return egress.permits if isinstance(egress, ServiceRouter) and egress.bypass is not None else None


def _reply_to(error: GostnetError, failure: Reply) -> Reply:
    """Return the code for an error of the way out: what a policy refuses is not allowed, all else is `failure`.

    # GOST: 3 for every CONNECT that fails, whatever the reason (SK05).
    """
    return Reply.NOT_ALLOWED if isinstance(error, PolicyDenied) else failure


async def _refuse(client: Stream, reply: Reply) -> None:
    """Send a refusal; that the client may be gone does not matter any more."""
    try:
        await client.send(encode_reply(reply))
        if isinstance(client, SocketStream):
            # Closing with unread bytes would send a reset, which may overtake the reply.
            client.take_unread()
            client.receive_now()
    except ConnError:
        pass
