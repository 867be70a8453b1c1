"""The direct way out: sockets of this host, with the system's or the user's names behind them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..core.address import Endpoint, parse_ip
from ..core.contracts import Resolver
from ..core.datagrams import Datagrams
from ..core.errors import DialError
from ..core.flow import Flow
from ..core.sockets import PLAIN, DialOptions, SocketStream, connect_tcp
from ..core.stream import Stream
from ..core.udp_socket import UdpSocket, open_udp
from .names import AnyPeer, Renamed, addresses_of, lacks_family, other_addresses
from .race import connect_any


class Direct:
    """Connects from this host.

    options    alternatives in order: GOST's `interface` list; the next is tried when one fails, unless it is strict
    """

    def __init__(self, resolver: Resolver, options: Sequence[DialOptions] = (PLAIN,)) -> None:
        self._resolver = resolver
        self._options = tuple(options)

    @property
    def resolver(self) -> Resolver:
        """What names are looked up with."""
        return self._resolver

    @property
    def options(self) -> DialOptions:
        """How its sockets are made, the first alternative."""
        return self._options[0]

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        """Connect to `target`, a name by all its addresses. Raise DialError."""
        host = target.host or "127.0.0.1"
        if parse_ip(host) is not None:
            return await self._connect_ip(host, target.port)
        addresses = await addresses_of(host, None, self._resolver)
        more = lacks_family(host, None, self._resolver, addresses)
        return await connect_any(
            lambda where: self._connect_ip(where.host, where.port),
            addresses,
            target.port,
            partial(other_addresses, host, None, self._resolver, addresses) if more else None,
        )

    async def _connect_ip(self, host: str, port: int) -> SocketStream:
        error: DialError | None = None
        for options in self._options:
            try:
                return await connect_tcp(host, port, options)
            except DialError as exc:
                error = exc
                if options.strict:
                    break
        assert error is not None
        raise error

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        """Open a UDP socket, connected to `target`; without one, for any peer, names resolved per datagram."""
        options = self._options[0]
        if target is None:
            return AnyPeer(open_udp(None, options), self._resolver.resolve)
        if target.ip is None:
            addresses = await addresses_of(target.host, None, self._resolver)
            return Renamed(_open_any(addresses, target.port, options), target)
        return open_udp(target, options)


def _open_any(hosts: Sequence[str], port: int, options: DialOptions) -> UdpSocket:
    """Return a socket connected to the first of the addresses that there is a way to."""
    error: DialError | None = None
    for host in hosts:
        try:
            return open_udp(Endpoint(host, port), options)
        except DialError as exc:
            error = error or exc
    assert error is not None
    raise error
