"""Blocking clients inside a namespace, made of the standard library and dnspython: the near end of a test.

Each call makes its sockets in the namespace, takes `timeout` seconds for every wait, and raises OSError (TimeoutError
among them) for what the network does to it.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype

from gostnet.core.address import Endpoint
from gostnet.kernel import netns
from gostnet.wire.ip import checksum

TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON. Raise ValueError."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Answer:
    """A DNS answer: the code's name (NOERROR, NXDOMAIN, ...) and the records' texts; `sender` is who answered."""

    code: str
    records: tuple[str, ...]
    sender: Endpoint


def connect(place: netns.Place, target: Endpoint, *, timeout: float = TIMEOUT) -> socket.socket:
    """Connect by TCP to an IP address; the caller closes the socket."""
    sock = netns.socket_in(place, _family(target), socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(tuple(target))
    except BaseException:
        sock.close()
        raise
    return sock


def fetch(
    place: netns.Place,
    target: Endpoint,
    path: str = "/",
    *,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    host: str = "",
    tls: ssl.SSLContext | None = None,
    timeout: float = TIMEOUT,
) -> Reply:
    """Make one HTTP request; `host` is the name in the Host header and in TLS, by default the address."""
    name = host or target.host
    with connect(place, target, timeout=timeout) as plain:
        sock = tls.wrap_socket(plain, server_hostname=name) if tls is not None else plain
        with sock:
            connection = http.client.HTTPConnection(name, target.port, timeout=timeout)
            connection.sock = sock
            connection.request(method, path, body, {"Connection": "close", **(headers or {})})
            response = connection.getresponse()
            content = response.read()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, content)


def resolve(
    place: netns.Place,
    server: Endpoint,
    name: str,
    kind: str = "A",
    *,
    tcp: bool = False,
    timeout: float = TIMEOUT,
) -> Answer:
    """Ask a DNS server, by UDP unless said otherwise. An answer of another query is passed over."""
    query = dns.message.make_query(name, kind)
    wire = query.to_wire()
    if tcp:
        with connect(place, server, timeout=timeout) as sock:
            sock.sendall(struct.pack("!H", len(wire)) + wire)
            (size,) = struct.unpack("!H", _exactly(sock, 2))
            reply, sender = dns.message.from_wire(_exactly(sock, size)), server
    else:
        with _datagram_socket(place, server, timeout) as sock:
            sock.sendto(wire, tuple(server))
            while True:
                data, address = sock.recvfrom(65535)
                reply, sender = dns.message.from_wire(data), Endpoint.from_sockaddr(address)
                if query.is_response(reply):
                    break
    texts = [
        record.to_text().strip('"')
        for rrset in reply.answer
        if rrset.rdtype == dns.rdatatype.from_text(kind)
        for record in rrset
    ]
    return Answer(dns.rcode.to_text(reply.rcode()), tuple(texts), sender)


def echo(place: netns.Place, server: Endpoint, data: bytes, *, timeout: float = TIMEOUT) -> bytes:
    """Send all of `data` and the end of the stream, and return what comes back until the other end of it.

    Larger data than fits on the way needs a server that reads while it writes, as the one of `servers` does.
    """
    with connect(place, server, timeout=timeout) as sock:
        received, view = bytearray(), memoryview(data)
        sock.settimeout(timeout)
        while view:
            sent = sock.send(view[: 1 << 15])
            view = view[sent:]
            received += _exactly(sock, sent)
        sock.shutdown(socket.SHUT_WR)
        while more := sock.recv(1 << 16):
            received += more
        return bytes(received)


def echo_datagram(
    place: netns.Place, server: Endpoint, data: bytes, *, timeout: float = TIMEOUT
) -> tuple[bytes, Endpoint]:
    """Send a datagram from an unconnected socket; return the first that comes back, and whom it claims to be from."""
    with _datagram_socket(place, server, timeout) as sock:
        sock.sendto(data, tuple(server))
        answer, address = sock.recvfrom(65535)
        return answer, Endpoint.from_sockaddr(address)


def ping(place: netns.Place, host: str, payload: bytes = b"", *, timeout: float = TIMEOUT) -> bytes:
    """Send one ICMP echo request to an IP address; return the payload of its reply. Needs CAP_NET_RAW."""
    six = ":" in host
    protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    request, reply = (128, 129) if six else (8, 0)
    message = struct.pack("!BBHI", request, 0, 0, random.getrandbits(32)) + payload
    if not six:  # of ICMPv6 the kernel makes the checksum
        message = message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
    with netns.socket_in(place, socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(timeout)
        sock.sendto(message, (host, 0))
        while True:
            packet = sock.recv(65535)
            answer = packet if six else packet[(packet[0] & 15) * 4 :]
            if answer[0] == reply and answer[4:8] == message[4:8]:
                return answer[8:]


def _family(target: Endpoint) -> int:
    return socket.AF_INET6 if ":" in target.host else socket.AF_INET


def _datagram_socket(place: netns.Place, server: Endpoint, timeout: float) -> socket.socket:
    sock = netns.socket_in(place, _family(server), socket.SOCK_DGRAM)
    sock.settimeout(timeout)
    return sock


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionError(f"closed after {len(data)} of {size} bytes")
        data += more
    return data
