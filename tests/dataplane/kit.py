"""Shared by the tests of the data plane: connected TCP sockets, and what is left in a stream."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

from gostnet.core.hub import Hub
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


async def until(condition: Callable[[], bool]) -> None:
    """Look every few turns of the loop: what is waited for happens inside, and tells nobody."""
    for _ in range(2500):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it does not happen")


def be_bound(hub: Hub, bound: bool = True) -> None:
    """Let the hub believe that its thread has no time, or has enough, for the next hour."""
    hub._bound = bound
    hub._looked = time.monotonic() + 3600
