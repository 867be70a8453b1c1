"""Echo requests of others, sent on from this host: an ICMP socket that stands for one identifier at one host.

A raw socket, because the unprivileged kind is closed to everybody, root included, where net.ipv4.ping_group_range is
as the kernel sets it.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Sequence

from ..core.address import Endpoint, IPAddress
from ..core.datagrams import Datagram, Datagrams
from ..core.errors import ConnError, KernelError, dial_error
from ..core.sockets import PLAIN, DialOptions, Readiness, make_socket
from ..wire import icmp

_IDENTIFIERS = itertools.count(int.from_bytes(os.urandom(2), "big"))

_SOL_RAW = 255
_ICMP_FILTER, _ICMP6_FILTER = 1, 1
_BATCH = 16


class EchoSocket(Datagrams):
    """Requests to one host and its replies. A datagram is an ICMP echo message; its identifier is the socket's own."""

    __slots__ = ("_host", "_identifier", "_sock", "_source", "peer", "readiness")

    def __init__(self, host: IPAddress, options: DialOptions = PLAIN) -> None:
        """Open a socket that speaks with `host` only. Raise DialError, KernelError that names the capability."""
        super().__init__()
        self.peer = Endpoint(str(host), 0)
        self._host = host
        self._identifier = next(_IDENTIFIERS) & 0xFFFF
        family = socket.AF_INET if host.version == 4 else socket.AF_INET6
        try:
            sock = make_socket(family, socket.SOCK_RAW, options.netns, icmp.PROTOCOL[host.version])
        except PermissionError as exc:
            raise KernelError("raw socket", exc.errno or 0, hint="echo requests need CAP_NET_RAW") from exc
        except OSError as exc:
            raise dial_error(exc, self.peer) from exc
        try:
            if host.version == 4:
                sock.setsockopt(_SOL_RAW, _ICMP_FILTER, _all_but(icmp.REPLY[4], 32))
            else:
                sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, _all_but(icmp.REPLY[6], 256))
            if options is not PLAIN:
                options.apply(sock, str(host))
            sock.connect((str(host), 0))
            self._source = Endpoint.from_sockaddr(sock.getsockname()).ip or host
        except OSError as exc:
            sock.close()
            raise dial_error(exc, self.peer) from exc
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        self.readiness = Readiness(sock)

    async def receive(self) -> Sequence[Datagram]:
        while True:
            batch = self._receive_now()
            if batch:
                return batch
            await self.readiness.readable()

    def _receive_now(self) -> list[Datagram]:
        batch: list[Datagram] = []
        for _ in range(_BATCH):
            try:
                data = self._sock.recv(65535)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                if self.readiness.fd < 0:
                    raise ConnError("closed by this side") from exc
                continue
            # IPv4 comes with its header, IPv6 without.
            message = data[(data[0] & 15) * 4 :] if self._host.version == 4 else data
            if len(message) >= icmp.ECHO_HEADER and int.from_bytes(message[4:6], "big") == self._identifier:
                batch.append(Datagram(message, self.peer))
        return batch

    async def send(self, batch: Sequence[Datagram]) -> None:
        kind = icmp.REQUEST[self._host.version]
        for datagram in batch:
            message = icmp.echo(kind, self._identifier, bytes(datagram.data), self._source, self._host)
            try:
                self._sock.send(message)
            except OSError as exc:
                # No buffer, no way at the moment, too long: of a ping that means no answer.
                if self.readiness.fd < 0:
                    raise ConnError("closed by this side") from exc

    async def aclose(self) -> None:
        self.readiness.release()

    def abort(self) -> None:
        self.readiness.release()


def _all_but(kind: int, kinds: int) -> bytes:
    """Return a bitmap of the ICMP types that are kept out: words of 32 bits in the host's order."""
    bits = (1 << kinds) - 1 & ~(1 << kind)
    return b"".join(struct.pack("=I", bits >> shift & 0xFFFFFFFF) for shift in range(0, kinds, 32))
