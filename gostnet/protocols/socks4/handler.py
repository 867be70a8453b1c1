"""The handlers `socks4` and `socks4a`: one and the same, both request forms are taken."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.drive import run_handshake
from ...core.egress import Egress
from ...core.errors import AuthDenied, ConnError, GostnetError, PolicyDenied, ProtocolError
from ...core.flow import Flow
from ...core.options import Seconds, group, opt
from ...core.registry import component
from ...core.sockets import SocketStream
from ...core.stream import Stream
from ...pipeline.handler import HandlerContext, relay_with, request_deadline
from ...pipeline.sniffing import InterceptionOptions, Sniffer, SniffingOptions, watched
from .codec import CONNECT, Code, encode_reply, read_request

GRANTED = encode_reply(Code.GRANTED)


@component("handler", "socks4", "socks4a")
class Socks4Handler:
    """Takes CONNECT requests; BIND is closed without a reply, as GOST does."""

    accepts = (Stream,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `socks4`."""

        read_timeout: Seconds = opt(15.0, "Time for the client's request.")
        hash: str = opt("", "What the hash strategy hashes instead of the client: the target.", choices=("", "host"))
        sniffing: SniffingOptions = group(SniffingOptions)
        mitm: InterceptionOptions = group(InterceptionOptions)

    def __init__(self, options: Options, context: HandlerContext) -> None:
        self._context = context
        # GOST: a value that makes no sense means the default.
        self._read_timeout = options.read_timeout if options.read_timeout > 0 else 15.0
        self._hash_target = options.hash == "host"
        self._sniffer = Sniffer.of(options.sniffing)

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        """Read the request, connect, reply, relay. Every refusal is replied to, then raised for the record."""
        with request_deadline(self._read_timeout):
            request = await run_handshake(conn, read_request())
        if self._context.authenticator is not None and not self._context.authenticate(flow, request.userid, ""):
            await _refuse(conn, Code.BAD_USERID)
            raise AuthDenied(f"user id {request.userid[:64]!r} is not accepted")
        if request.command != CONNECT:
            raise ProtocolError(f"command {request.command} is not supported")
        flow.target = request.target
        if self._hash_target:
            flow.hash = str(request.target)
        try:
            upstream = await egress.connect(flow, request.target)
        except GostnetError as exc:
            await _refuse(conn, Code.BYPASSED if isinstance(exc, PolicyDenied) else Code.FAILED)
            raise
        client, accepted = watched(self._sniffer, flow, conn, egress, lambda _: conn.send(GRANTED))
        await relay_with(flow, client, upstream, accepted)


async def _refuse(client: Stream, code: Code) -> None:
    """Send a refusal; that the client may be gone does not matter any more."""
    try:
        await client.send(encode_reply(code))
        if isinstance(client, SocketStream):
            # Closing with unread bytes would send a reset, which may overtake the reply.
            client.take_unread()
            client.receive_now()
    except ConnError:
        pass
