"""The connector `relay`."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.address import Endpoint
from ...core.datagrams import Datagrams
from ...core.drive import run_handshake
from ...core.errors import DialTimeout
from ...core.flow import Flow
from ...core.options import Seconds, opt
from ...core.registry import component
from ...core.stream import Stream
from ...core.tasks import deadline
from ...dataplane.framed import LengthDatagrams, TunDatagrams
from ...dataplane.opening import Opening
from ...pipeline.connector import ConnectorContext
from .codec import Command, Network, Request, Response, ResponseHead, ask, encode_request

_ANY = Endpoint("0.0.0.0", 0)


@component("connector", "relay")
class RelayConnector:
    """Asks a GOST relay.

    The request travels with the first payload, and the answer is taken off what comes back, so that a connection costs
    no round trip. Whoever reads first, or ends without payload, sends the request too: protocols in which the server
    speaks first work, where GOST 3.3.0 waits for ever (RL11).
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `relay`."""

        connect_timeout: Seconds = opt(
            0.0, "Time for the relay's answer where it is waited for; 0 leaves it to the route."
        )
        nodelay: bool = opt(
            False,
            "Wait for the relay's answer before anything is sent: refusals are seen at once, for one round trip."
            " The relay must have nodelay=true as well.",
        )

    def __init__(self, options: Options, context: ConnectorContext) -> None:
        self._timeout = options.connect_timeout
        self._nodelay = options.nodelay
        self._credentials = (context.username, context.password.reveal()) if context.authenticates else None
        # Made once, which also raises now what could never be sent.
        self._association = encode_request(Request(Command.BIND, Network.UDP, _ANY, self._credentials))

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        """Nothing is said before the target is known."""
        return below

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        """Return a stream to `target`; an empty one asks a relay in forward mode for its own.

        A refusal is raised here with `nodelay`, else by the stream's first read: UpstreamRejected with the status.
        """
        return await self._begin(below, Network.TCP, target)

    async def associate(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams:
        """Open an association that owns `below`: to one target in length frames, else in UDP-tun frames.

        The second kind waits for the relay's answer; the relay needs bind=true for it.
        """
        if target is not None:
            return LengthDatagrams(await self._begin(below, Network.UDP, target), target, below.local)
        response = await self._ask(below, self._association)
        return TunDatagrams(below, None, response.address or below.local)

    async def _begin(self, below: Stream, network: Network, target: Endpoint) -> Stream:
        # GOST: no address at all stands for "your own target".
        asked = target if target.host or target.port else None
        request = encode_request(Request(Command.CONNECT, network, asked, self._credentials))
        if not self._nodelay:
            return Opening(below, prefix=request, prompt=True, strip=ResponseHead())
        await self._ask(below, request)
        return below

    async def _ask(self, below: Stream, request: bytes) -> Response:
        try:
            with deadline(self._timeout):
                return await run_handshake(below, ask(request))
        except TimeoutError as exc:
            raise DialTimeout(f"no answer from the relay within {self._timeout:g}s") from exc
