"""Shared by the tests of the data plane: connected TCP sockets, and what is left in a stream."""

from __future__ import annotations

import socket

from gostnet.core.sockets import SocketStream
from gostnet.core.stream import Stream


def tcp_pair() -> tuple[SocketStream, SocketStream]:
    """Return the two ends of a connection over loopback."""
    listening = socket.create_server(("127.0.0.1", 0))
    left = socket.create_connection(listening.getsockname())
    right, _ = listening.accept()
    listening.close()
    for sock in (left, right):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return SocketStream(left), SocketStream(right)


async def read_all(stream: Stream) -> bytes:
    """Return everything up to the end of the stream."""
    parts = []
    while data := await stream.receive():
        parts.append(data)
    return b"".join(parts)
