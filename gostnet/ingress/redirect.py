"""Captured TCP: the listeners `red`, `redir` and `redirect`, by REDIRECT or TPROXY."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.address import Endpoint
from ..core.flow import Flow
from ..core.options import group, opt
from ..core.registry import register
from ..core.resources import Resource
from ..core.sockets import SocketStream, is_own_address
from ..pipeline.transport import Listener, ListenerContext
from ..transports.tcp import TcpOptions, TcpSource
from .capture import CaptureOptions, CaptureRequest

SO_ORIGINAL_DST = 80
"""In linux/netfilter_ipv4.h and, with the same number, for IPv6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedOptions:
    """Options of the listeners for captured TCP (transports 8)."""

    tproxy: bool = opt(False, "Capture by TPROXY instead of REDIRECT.")
    tcp: TcpOptions = group(TcpOptions)
    capture: CaptureOptions = group(CaptureOptions)


class RedSource(TcpSource):
    """A TCP socket whose connections were meant for others; the flow's target is their original destination."""

    def __init__(
        self,
        address: Endpoint,
        options: RedOptions,
        request: CaptureRequest | None,
        context: ListenerContext,
        *,
        mark: int = 0,
    ) -> None:
        super().__init__(address, options.tcp, netns=context.netns, transparent=options.tproxy, mark=mark)
        self._tproxy = options.tproxy
        self._request = request
        self._service = context.service

    def flow_of(self, stream: SocketStream, client: Endpoint) -> Flow:
        """Find out where the connection was going. A flow that came straight to our own port has no target."""
        flow = super().flow_of(stream, client)
        target = flow.ingress if self._tproxy else original_destination(stream.sock, client)
        if target is None or (target.port == self.address.port and is_own_address(target.host, self._listen.netns)):
            flow.reason = "not a captured connection: it was made to the listener itself"
        else:
            flow.target = target
        return flow

    def resources(self) -> Sequence[Resource]:
        """Return the capture, if one is asked for."""
        if self._request is None:
            return ()
        method: Literal["tproxy", "redirect"] = "tproxy" if self._tproxy else "redirect"
        return (self._request.resource(self._service, "tcp", method, self.address),)


def original_destination(sock: socket.socket, client: Endpoint) -> Endpoint | None:
    """Return where the redirected connection of `client` was going, None if it was not redirected.

    The kernel writes a sockaddr_in (port at 2..4, address at 4..8) or sockaddr_in6 (port at 2..4, address at 8..24).
    """
    try:
        if ":" not in client.host:
            port, packed = struct.unpack_from("!2xH4s", sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
            return Endpoint(socket.inet_ntop(socket.AF_INET, packed), port)
        port, packed = struct.unpack_from("!2xH4x16s", sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28))
        return Endpoint(socket.inet_ntop(socket.AF_INET6, packed), port)
    except OSError:
        return None


class RedListener:
    """The stack behind the names."""

    Options = RedOptions

    @staticmethod
    def make(address: Endpoint, options: RedOptions, context: ListenerContext) -> Listener:
        """Build a listener."""
        request = CaptureRequest.of(options.capture, f"{context.path}.metadata")
        return Listener("red", RedSource(address, options, request, context))


register("listener", RedListener, ("red", "redir", "redirect"))
