"""What handlers are given, and how every stream handler ends: forward()."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ..core.contracts import Authenticator, Layer, RateLimiter
from ..core.egress import Egress
from ..core.errors import ProtocolError, QuotaDenied
from ..core.flow import Flow
from ..core.log import Logger, quiet
from ..core.options import Secret
from ..core.stream import Stream
from ..core.tasks import deadline
from ..dataplane.relay import relay
from .hop import Targets
from .node import Node

Accepted = Callable[[Stream], Awaitable[None]]
"""Called with the upstream as soon as it is open: the place where a handler says yes to its client."""


@dataclass(slots=True)
class HandlerContext:
    """What a handler is built with.

    path            the handler's place in the configuration, for messages
    authenticator   None when no credentials are asked for
    username        of the handler's own `auth`, for protocols where that is a cipher and its password (tap)
    hop             the forwarder's targets; with one, a handler is in forward mode
    addresses       how a target's address was written, and where, for handlers whose targets are URLs
    upstream_tls    the client side of TLS, which verifies, for handlers that ask servers of their own
    upstream_https  the same for servers that speak HTTP: it offers h2 too
    metadata        the handler's options as configured, for `auto`, which hands them to other handlers
    tls             the TLS layer of handlers that speak TLS inside their dialogue (SOCKS5 methods 0x80 and 0x82)
    requests        the rate limit, for handlers whose connections carry many requests; the first has been counted
    netns           the network namespace of the service's sockets, for handlers that listen (SOCKS5 UDP ASSOCIATE)
    """

    service: str = ""
    path: str = ""
    authenticator: Authenticator | None = None
    username: str = ""
    password: Secret = Secret()
    hop: Targets | None = None
    addresses: Mapping[Node, tuple[str, str]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tls: Layer | None = None
    upstream_tls: Layer | None = None
    upstream_https: Layer | None = None
    requests: RateLimiter | None = None
    netns: str = ""
    log: Logger = field(default_factory=quiet)

    def authenticate(self, flow: Flow, username: str, password: str) -> bool:
        """Check credentials and note the client id on the flow; True where nobody has to prove anything."""
        if self.authenticator is None:
            return True
        client_id = self.authenticator.authenticate(username, password, flow.client)
        if client_id is None:
            return False
        flow.user = client_id
        return True

    def allows_request(self, flow: Flow) -> bool:
        """Count one more request of a connection, if it may pass."""
        return self.requests is None or self.requests.allow(flow.client)


class request_deadline(deadline):
    """`with request_deadline(seconds):` around a dialogue: raise ProtocolError when the client takes longer."""

    __slots__ = ()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
            if isinstance(error, TimeoutError):
                raise error
        except TimeoutError as exc:
            raise ProtocolError(f"no request within {self.seconds:g}s") from exc


async def forward(
    flow: Flow, client: Stream, egress: Egress, accepted: Accepted | None = None, *, idle: float = 0.0
) -> None:
    """Open `flow.target`, tell the client, relay until both ends are done.

    Raise DialError or PolicyDenied before anything was said to the client: the handler answers in its protocol.
    The upstream is closed whatever happens; the client is the service's to close.
    """
    assert flow.target is not None
    upstream = await egress.connect(flow, flow.target)
    await relay_with(flow, client, upstream, accepted, idle=idle)


async def relay_with(
    flow: Flow, client: Stream, upstream: Stream, accepted: Accepted | None = None, *, idle: float = 0.0
) -> None:
    """Relay between `client` and an open `upstream`, which is closed whatever happens."""
    try:
        if accepted is not None:
            await accepted(upstream)
            accepted = None  # nothing that an idle connection is to hold on to
        flow.connected = True
        await relay(flow, client, upstream, idle)
    except QuotaDenied:
        upstream.reset()
        raise
    except BaseException:
        upstream.abort()
        raise
    await upstream.aclose()
