"""Sockets of our own: ends, resets, zones."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import ConnError, DialError, KernelError
from gostnet.core.sockets import (
    ListenOptions,
    SocketStream,
    connect_tcp,
    is_own_address,
    listen_tcp,
    sockaddr_of,
)
from gostnet.core.tasks import Scope, run


async def joined() -> tuple[SocketStream, socket.socket]:
    with listen_tcp(Endpoint("127.0.0.1", 0)) as listening:
        stream = await connect_tcp(*listening.getsockname())
        listening.settimeout(5)
        peer, _ = listening.accept()
    return stream, peer


def test_an_end_after_the_peers_reset_is_no_error() -> None:
    async def main() -> None:
        stream, peer = await joined()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        async with asyncio.timeout(5):
            with pytest.raises(ConnError):
                await stream.receive()
        await stream.send_eof()
        await stream.send_eof()
        await stream.aclose()
        await stream.send_eof()

    run(main())


def test_an_end_is_sent_once_by_whoever_sends_it() -> None:
    async def main() -> None:
        stream, peer = await joined()
        with peer:
            peer.settimeout(5)
            stream.shut()
            assert peer.recv(1) == b""
            await stream.send_eof()
            peer.sendall(b"late")
            assert await stream.receive() == b"late"
            stream.abort()

    run(main())


@pytest.mark.parametrize("uvloop", [True, False])
def test_a_read_that_empties_the_socket_is_followed_by_a_wait_and_loses_nothing(uvloop: bool) -> None:
    async def main() -> None:
        stream, peer = await joined()
        with peer:
            async with asyncio.timeout(10):
                for size in (5, 4096, 4095, 1):
                    peer.sendall(b"x" * size)
                    found = b""
                    while len(found) < size:
                        found += await stream.receive(4096)
                scope = Scope("test")
                waiting = scope.start(stream.receive())
                await asyncio.sleep(0)
                peer.sendall(b"after a wait")
                assert await waiting == b"after a wait"
                assert stream.readiness.drained
                peer.sendall(b"with its end")
                peer.shutdown(socket.SHUT_WR)
                found = b""
                while data := await stream.receive():
                    found += data
                assert found == b"with its end"
                assert await stream.receive() == b""
                stream.abort()

    run(main(), uvloop=uvloop)


def test_an_end_that_came_with_the_data_is_seen() -> None:
    async def main() -> None:
        for _ in range(50):
            stream, peer = await joined()
            peer.sendall(b"data")
            peer.close()
            async with asyncio.timeout(10):
                assert await stream.receive() == b"data"
                assert await stream.receive() == b""
            stream.abort()

    run(main())


def test_zones_are_scopes() -> None:
    index = socket.if_nametoindex("lo")
    assert sockaddr_of("192.0.2.1", 5) == ("192.0.2.1", 5)
    assert sockaddr_of("fe80::1%lo", 5) == ("fe80::1", 5, 0, index)
    assert sockaddr_of("fe80::1%7", 5) == ("fe80::1", 5, 0, 7)
    with pytest.raises(OSError, match="No such device") as error:
        sockaddr_of("fe80::1%nowhere", 5)
    assert error.value.errno == errno.ENODEV


def test_a_zone_that_is_no_interface_is_told() -> None:
    with pytest.raises(KernelError, match=r"listen \[fe80::1%nowhere\]:0: No such device"):
        listen_tcp(Endpoint("fe80::1%nowhere", 0), ListenOptions())

    async def main() -> None:
        with pytest.raises(DialError, match="No such device"):
            await connect_tcp("fe80::1%nowhere", 1)

    run(main())


def test_own_addresses() -> None:
    assert is_own_address("127.0.0.1")
    assert is_own_address("::1")
    assert not is_own_address("192.0.2.1")
    assert not is_own_address("fe80::1%nowhere")
