"""The way to the server, looked at before packets go there: whether it leads into the tunnel, and what fits."""

from __future__ import annotations

import socket

from ...core.address import Endpoint, parse_ip
from ...core.errors import ConnError, GostnetError
from ...core.flow import Flow
from ...core.log import Logger
from ...core.packets import Packets
from ...core.udp_socket import UdpSocket
from ...kernel import netns
from ...kernel.netlink import RouteNetlink
from ...kernel.routeget import RouteLookup

_SO_MARK = 36


class Path:
    """What the kernel says of the way to a server, over a socket of ours or through a chain's first node."""

    def __init__(self, flow: Flow, device: Packets, upstream: object, log: Logger, place: str) -> None:
        self._device = device
        self._log = log
        self._place = place or None
        self._mark = 0
        self._direct = isinstance(upstream, UdpSocket)
        host = flow.target.host if flow.target is not None else ""
        if isinstance(upstream, UdpSocket):
            self._mark = upstream.sock.getsockopt(socket.SOL_SOCKET, _SO_MARK)
            try:
                host = Endpoint.from_sockaddr(upstream.sock.getpeername()).host
            except OSError:
                host = ""  # not connected: it goes nowhere yet
        elif flow.route:
            # "name@address" of the first node: where the chain's own packets go.
            host = flow.route[0].rpartition("@")[2].rpartition(":")[0].strip("[]")
        self._host = host if parse_ip(host.partition("%")[0]) is not None else ""
        self._told = 0

    def check(self) -> None:
        """Raise ConnError if the way leads into the device: each packet would go round for ever. Takes 50 us."""
        if not self._host:
            return
        try:
            with netns.inside(self._place), RouteLookup() as lookup:
                found = lookup.get(self._host, mark=self._mark)
                into = socket.if_indextoname(found.device) if found.device else ""
        except (GostnetError, OSError):
            return  # no way at all is seen by whoever sends
        if into == self._device.name:
            raise ConnError(
                f"the way to {self._host} leads into the tunnel itself: give the host a route to it that is more"
                f" specific than those of the tunnel"
            )
        if self._direct:
            self._tell_size(found.mtu, into)

    def _tell_size(self, mtu: int, into: str) -> None:
        """Say when packets do not fit into the way's, once for each size."""
        try:
            with RouteNetlink(self._place) as kernel:
                link = kernel.link(into) if not mtu else None
        except GostnetError:
            return
        mtu = mtu or (link.mtu if link is not None else 0)
        fitting = mtu - (48 if ":" in self._host else 28)
        if mtu and fitting < self._device.mtu and fitting != self._told:
            self._told = fitting
            self._log.warn(
                f"{self._device.name}: packets of more than {fitting} bytes travel in fragments, as the way to"
                f" {self._host} takes {mtu}; mtu={fitting} on both sides avoids it"
            )
