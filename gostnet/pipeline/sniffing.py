"""Sniffing: a look at what a client says first, for the name it asks for. Rows V01-V09.

What is read goes back to where it was read, so the relay finds the stream as if nobody had looked. No protocol hangs:
a client that waits for its server is not waited for, and bytes that fit nothing are passed on at once.

The rows SN01, SN02, ... of docs/sniffing.md say what differs from GOST.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ..core.address import Endpoint
from ..core.datagrams import Datagram, Datagrams, pieces
from ..core.egress import Egress
from ..core.errors import BypassDenied, ConnError, DialError
from ..core.fiber import Gate
from ..core.flow import Flow, Sniffed
from ..core.hub import READABLE
from ..core.options import Seconds, opt
from ..core.passing import PassingDatagrams
from ..core.sockets import Readiness, SocketStream
from ..core.stream import Stream
from ..core.tasks import deadline, first_done
from ..dataplane.opening import Opening
from ..dataplane.relay import leaf
from ..wire.http1 import head_bytes, reason_of
from ..wire.sniff import UNKNOWN, DatagramRecogniser, StreamRecogniser
from .destination import refuses_address
from .handler import Accepted, forward
from .requests import Requests, relay_requests
from .router import ServiceRouter

SILENCE: Final = 0.3
"""Seconds for the first byte where the connection cannot be opened before it: a client that speaks first does so with
the packet that completes the connection, one that waits for its server must not feel this."""

PATIENCE: Final = 5.0
"""Seconds for the rest of a hello or a head that has begun: two lost packets in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SniffingOptions:
    """Whether and how long to look."""

    sniffing: bool = opt(
        False, "Look at the first bytes for the host that a client asks for, which bypasses and matchers then see."
    )
    timeout: Seconds = opt(
        0.0,
        "Time for the first bytes; 0 waits as long as it delays nobody, and 300 ms where the connection depends on it.",
        key="sniffing.timeout",
    )
    websocket: bool = opt(
        False, "Accepted for compatibility: WebSocket frames are not recorded.", key="sniffing.websocket"
    )
    sample_rate: float = opt(0.0, "Accepted for compatibility.", key="sniffing.websocket.sampleRate")


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalOptions:
    """What a sniffed host means where the original destination is known."""

    fallback: bool = opt(
        False, "Connect to the original destination when the sniffed host cannot be reached.", key="sniffing.fallback"
    )
    original: bool = opt(
        False,
        "Always connect to the original destination; the sniffed host only decides about bypasses and the route.",
        key="sniffing.dialOriginalDst",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InterceptionOptions:
    """GOST's keys for decrypting TLS, which are refused."""

    certificate: str = opt(
        "",
        "Decrypting TLS is not available in this version and is refused.",
        key="mitm.certFile",
        aliases=("mitm.caCertFile",),
    )
    key: str = opt(
        "",
        "Decrypting TLS is not available in this version and is refused.",
        key="mitm.keyFile",
        aliases=("mitm.caKeyFile",),
    )
    alpn: str = opt("", "Without a certificate to decrypt with, this means nothing.", key="mitm.alpn")
    bypass: str = opt("", "Without a certificate to decrypt with, this means nothing.", key="mitm.bypass")

    def validate(self) -> Iterable[tuple[str, str]]:
        """Yield what would have TLS decrypted: relaying it unseen instead would not be what was asked for."""
        for key, value in (("mitm.certFile", self.certificate), ("mitm.keyFile", self.key)):
            if value:
                yield key, "decrypting TLS (mitm) is not available in this version"


class Sniffer:
    """Looks at the first bytes of a handler's clients."""

    __slots__ = ("_timeout",)

    def __init__(self, timeout: float = 0.0) -> None:
        self._timeout = max(0.0, timeout)

    @classmethod
    def of(cls, options: SniffingOptions) -> Sniffer | None:
        """Return the sniffer that `options` ask for, None where sniffing is off."""
        return cls(options.timeout) if options.sniffing else None

    async def look(self, flow: Flow, client: Stream) -> Sniffed | None:
        """Look before anything is connected; return UNKNOWN for what is not recognised, None for a silent client."""
        recogniser, held = StreamRecogniser(), b""
        found: Sniffed | None = None
        try:
            with deadline(self._timeout or SILENCE):
                held = await client.receive()
                found = recogniser.feed(held) if held else UNKNOWN
                if found is None and self._timeout:
                    found, held = await _rest(client, recogniser, held)
            if found is None:
                with deadline(PATIENCE):
                    found, held = await _rest(client, recogniser, held)
        except TimeoutError:
            pass
        finally:
            held += client.take_unread()
            if held:
                client.unread(held)
        return note(flow, found) if held or found is not None else None

    async def watch(self, flow: Flow, client: Stream, upstream: Stream, egress: Egress | None, idle: float) -> Sniffed:
        """Look while both sides may speak, until it is known what the client speaks or the other side has spoken.

        Raise BypassDenied when the host that shows is one that the service refuses.
        """
        recogniser, held = StreamRecogniser(), b""
        found: Sniffed | None = None
        limit = self._timeout or idle  # what waits costs nobody anything; who is idle too long is ended by the relay
        try:
            while found is None:
                with deadline(limit):
                    if not await _client_speaks(client, upstream):
                        break
                    data = await client.receive()
                if not data:
                    break
                held += data
                found = recogniser.feed(data)
                limit = self._timeout or PATIENCE
        except TimeoutError:
            pass
        finally:
            if held:
                client.unread(held)
        found = note(flow, found)
        if found.host and flow.target is not None:
            admit(flow, egress, Endpoint(found.host, flow.target.port))
        return found

    async def look_at_datagrams(self, flow: Flow, client: Datagrams) -> Datagrams:
        """Look at a client's first datagrams; return the datagrams that begin with them."""
        recogniser = DatagramRecogniser()
        held: list[Datagram] = []
        found: Sniffed | None = None
        try:
            # The first one is there: it is why we are called. Another is only waited for within a hello, which no
            # server can answer before it is complete, and of which a lost piece is sent again after a second.
            with deadline(self._timeout or PATIENCE):
                while found is None and (batch := await client.receive()):
                    held += batch
                    for datagram in batch:
                        for piece in map(bytes, pieces(datagram)):
                            found = found or recogniser.feed(piece)
        except TimeoutError:
            pass
        note(flow, found)
        return Replayed(client, held) if held else client


async def _rest(client: Stream, recogniser: StreamRecogniser, held: bytes) -> tuple[Sniffed, bytes]:
    """Read on until there is a verdict or the stream ends; what was read is put back if that is interrupted."""
    begun = len(held)
    try:
        while True:
            data = await client.receive()
            held += data
            found = recogniser.feed(data) if data else UNKNOWN
            if found is not None:
                return found, held
    except BaseException:
        client.unread(held[begun:])
        raise


def note(flow: Flow, found: Sniffed | None) -> Sniffed:
    """Put on the flow what was found."""
    if found is None or found is UNKNOWN:
        return UNKNOWN
    flow.sniffed = found
    flow.host = found.host
    if not flow.reason or flow.host:
        flow.reason = f"{found.protocol} for {found.host}" if found.host else found.protocol
    return found


def admit(flow: Flow, egress: Egress | None, target: Endpoint) -> None:
    """Let the service decide about `target` beside the flow's own one. Raise BypassDenied."""
    if isinstance(egress, ServiceRouter):
        own = flow.target
        try:
            egress.admit(flow, target)
        finally:
            flow.target = own


def named(found: Sniffed) -> Endpoint:
    """Return where a sniffed host is when nothing else tells: the port that was written, or the protocol's own."""
    return Endpoint(found.host, found.port or (80 if found.protocol == "http" else 443))


def refuse_listed(flow: Flow, egress: Egress, address: Endpoint) -> None:
    """Refuse an address that a blacklist holds before any look; a whitelist is asked about what shows. BypassDenied."""
    bypass = egress.bypass if isinstance(egress, ServiceRouter) else None
    if bypass is not None and refuses_address(bypass, flow.network, address):
        flow.reason = f"{address} is bypassed by the service"
        raise BypassDenied(flow.reason)


def watched(
    sniffer: Sniffer | None,
    flow: Flow,
    client: Stream,
    egress: Egress,
    accepted: Accepted | None = None,
    *,
    idle: float = 0.0,
) -> tuple[Stream, Accepted | None]:
    """Return what `forward` and `relay_with` are to be given so that a look is taken once the upstream is open.

    That is the client's stream, which from then on lets no HTTP request pass whose host the service refuses, and what
    to call. Without a sniffer it is `client` and `accepted` themselves.
    """
    if sniffer is None:
        return client, accepted
    known = ""

    def decide(found: Sniffed) -> bool:
        nonlocal known
        if found.host and found.host != known and flow.target is not None:
            admit(flow, egress, Endpoint(found.host, flow.target.port))
            known = found.host
        return True

    requests = Requests(client, decide)

    async def accept_and_watch(upstream: Stream) -> None:
        nonlocal known
        if accepted is not None:
            await accepted(upstream)
        flow.connected = True  # from here on a refusal is an end: the client has been told yes
        found = await sniffer.watch(flow, client, upstream, egress, idle)
        known = found.host
        requests.arm(found)

    return requests, accept_and_watch


async def forward_as_sniffed(
    flow: Flow, client: Stream, egress: Egress, sniffer: Sniffer | None, options: OriginalOptions
) -> None:
    """Relay to the host that `client` asks for, at the port of `flow.target`; HTTP requests each to their own.

    Without a host, and where `options` say so, it is `flow.target` that is connected to; a client that has been silent
    so far is still watched then. Raise BypassDenied if the service refuses either of them, DialError.
    """
    original = flow.target
    assert original is not None
    if sniffer is None:
        await forward(flow, client, egress)
        return
    refuse_listed(flow, egress, original)
    found = await sniffer.look(flow, client)
    if found is None:
        requests, accepted = watched(sniffer, flow, client, egress)
        await forward(flow, requests, egress, accepted)
        return

    async def reach(found: Sniffed) -> Stream:
        note(flow, found)
        return await _reach_named(flow, egress, found, original, options)

    def stays(current: Sniffed, following: Sniffed) -> bool:
        if current.proxied and following.proxied:
            note(flow, following)
            admit(flow, egress, Endpoint(following.host, original.port))
            return True
        return following.host in ("", current.host)

    await forward_requests(flow, client, found, reach, stays)


async def forward_requests(
    flow: Flow,
    client: Stream,
    found: Sniffed,
    reach: Callable[[Sniffed], Awaitable[Stream]],
    stays: Callable[[Sniffed, Sniffed], bool] = lambda current, following: following.host in ("", current.host),
    *,
    idle: float = 0.0,
) -> None:
    """Relay to where `reach` leads for what was found, and for HTTP to where it leads for each request.

    stays    tells whether a request may follow another one to the same server: if it names the same host, by default
    """
    current = found
    fresh = True

    def decide(following: Sniffed) -> bool:
        nonlocal current, fresh
        if fresh:
            fresh = False  # the one that the server has been chosen for
            return True
        staying = stays(current, following)
        if staying:
            current = following
        return staying

    async def follow(following: Sniffed) -> Stream:
        nonlocal current, fresh
        current, fresh = following, True
        return await reach(following)

    requests = Requests(client, decide)
    requests.arm(found)
    await relay_requests(flow, requests, await reach(found), follow, idle)


async def _reach_named(
    flow: Flow, egress: Egress, found: Sniffed, original: Endpoint, options: OriginalOptions
) -> Stream:
    host = Endpoint(found.host, original.port)
    if found.host and (options.original or found.proxied):
        admit(flow, egress, host)
    elif found.host:
        try:
            return await egress.connect(flow, host)
        except DialError as exc:
            if not options.fallback:
                raise
            flow.reason = f"{host} failed ({exc}): connected to {original} instead"
            flow.tried = ()
    return await egress.connect(flow, original)


async def refuse_http(client: Stream, status: int) -> None:
    """Answer a sniffed request that goes nowhere; that the client may be gone does not matter any more."""
    line = f"HTTP/1.1 {status} {reason_of(status)}".encode("ascii")
    try:
        await client.send(head_bytes(line, [(b"Content-Length", b"0"), (b"Connection", b"close")]))
        if isinstance(client, SocketStream):
            # Closing with unread bytes would send a reset, which may overtake the answer.
            client.take_unread()
            client.receive_now()
    except ConnError:
        pass


# ---- waiting for two sides ------------------------------------------------------------------------
async def _client_speaks(client: Stream, upstream: Stream) -> bool:
    """Wait until a side has something to read, its end included; return whether it is the client."""
    near, far = leaf(client), leaf(upstream)
    for stream, is_client in ((client, True), (near, True), (far, False)):
        if stream.has_unread:
            return is_client
    # What a handler still has to say before its first answer does not matter to what it hears.
    below = near.below if isinstance(near, Opening) else near
    if type(below) is SocketStream and type(far) is SocketStream:
        if below.has_unread:
            return True
        return await _first_socket(below.readiness, far.readiness)
    return await _first_stream(client, upstream)


async def _first_socket(client: Readiness, upstream: Readiness) -> bool:
    """The cheap form: two sockets, one gate, no tasks. The client goes first when both are ready."""
    while True:
        if _is_ready(client):
            return True
        if _is_ready(upstream):
            return False
        gate = Gate(client.hub)
        client.claim(_opening(gate, client))
        upstream.claim(_opening(gate, upstream))
        try:
            await gate.wait()
        finally:
            client.unclaim()
            upstream.unclaim()


def _is_ready(readiness: Readiness) -> bool:
    """Ask the kernel: an edge may be that of bytes which have been read since."""
    try:
        readiness.sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        pass  # who reads next gets the error
    return True


def _opening(gate: Gate, readiness: Readiness) -> Callable[[int], None]:
    def on_events(events: int) -> None:
        readiness.events = events
        if events & READABLE:
            readiness.pending = True
            if not gate.is_open:
                gate.open()

    return on_events


async def _first_stream(client: Stream, upstream: Stream) -> bool:
    """The general form: whoever has spoken, or ended, gets its bytes back."""
    heard: list[bool] = []

    async def listen(stream: Stream, is_client: bool) -> None:
        data = await stream.receive()
        if data:
            stream.unread(data)
        heard.append(is_client)

    await first_done([listen(client, True), listen(upstream, False)])
    return True in heard


# ---- datagrams --------------------------------------------------------------------------------------
class Replayed(PassingDatagrams):
    """Datagrams of `below`, which it owns, behind some that have been received already."""

    __slots__ = ("_held",)

    def __init__(self, below: Datagrams, held: Sequence[Datagram]) -> None:
        super().__init__(below)
        self._held = held

    async def receive(self) -> Sequence[Datagram]:
        if self._held:
            held, self._held = self._held, ()
            return held
        return await self._below.receive()

    def transparent_over(self) -> Datagrams | None:
        """Return the datagrams below once the held ones have been taken."""
        return None if self._held else self._below
