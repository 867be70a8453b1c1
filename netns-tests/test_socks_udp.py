"""SOCKS5 UDP ASSOCIATE of a service that lives in a network namespace other than the daemon's."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from gostnet.core.address import Endpoint
from gostnet.kernel import netns
from gostnet.testing.clients import connect
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process
from gostnet.testing.servers import serving_in_thread
from gostnet.wire.udp_frames import decode_datagram, encode_datagram

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("version", [4, 6])
def test_the_socket_of_an_association_is_where_the_service_listens(
    three: Network, daemon: Callable[..., Process], version: int
) -> None:
    listen = Endpoint(three.address("gateway", version, "lan0"), 1080)
    inside = three["gateway"]
    # The daemon itself runs beside them all, where none of these addresses exists.
    daemon(three["server"], "-L", f"socks5://{listen}?udp=true&netns={inside}&netns.out={inside}")
    with serving_in_thread(three["server"], [three.address("server", version)]) as servers:
        target = servers.endpoint("echo/udp", version)
        with connect(three["client"], listen) as control:
            control.sendall(b"\5\1\0" + b"\5\3\0\1\0\0\0\0\0\0")
            reply = control.recv(64)
            while len(reply) < (12 if version == 4 else 24):
                reply += control.recv(64)
            assert reply[:5] == b"\5\0\5\0\0"
            relay = Endpoint(listen.host, int.from_bytes(reply[-2:], "big"))
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            with netns.socket_in(three["client"], family, socket.SOCK_DGRAM) as client:
                client.settimeout(10)
                client.sendto(encode_datagram(b"hello", target), tuple(relay))
                data, sender = client.recvfrom(2048)
                assert decode_datagram(data) == (b"hello", target)
                assert Endpoint.from_sockaddr(sender) == relay
        assert servers.witness.all("echo/udp")[-1].client.host == three.address("gateway", version, "wan0")
