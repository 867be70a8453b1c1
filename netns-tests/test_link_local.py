"""IPv6 link-local addresses, which mean something only together with an interface."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.sockets import DialOptions, ListenOptions, connect_tcp, listen_tcp
from gostnet.core.tasks import run
from gostnet.core.udp_socket import UdpSocket, listen_udp, open_udp
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process, run_program

pytestmark = pytest.mark.netns

SERVER, CLIENT = "fe80::77", "fe80::78"


@pytest.fixture
def linked(three: Network) -> Network:
    """Give both ends of the client's link an address that needs no check for duplicates."""
    for role, interface, address in (("gateway", "lan0", SERVER), ("client", "wan0", CLIENT)):
        run_program(["ip", "-n", three[role], "addr", "add", f"{address}/64", "dev", interface, "nodad"])
    return three


def test_sockets_take_the_zone_and_tell_it(linked: Network) -> None:
    there, here = linked["gateway"], linked["client"]

    async def main() -> None:
        listening = listen_tcp(Endpoint(f"{SERVER}%lan0", 0), ListenOptions(netns=there))
        port = listening.getsockname()[1]
        stream = await connect_tcp(f"{SERVER}%wan0", port, DialOptions(netns=here, interface=f"{CLIENT}%wan0"))
        listening.settimeout(5)
        accepted, address = listening.accept()
        assert Endpoint.from_sockaddr(address) == Endpoint(f"{CLIENT}%{address[3]}", stream.local.port)
        assert address[3] > 0
        accepted.close()
        stream.abort()
        listening.close()

        server = UdpSocket(listen_udp(Endpoint("", 0), ListenOptions(netns=there)))
        target = Endpoint(f"{SERVER}%wan0", server.sock.getsockname()[1])
        connected, free = open_udp(target, DialOptions(netns=here)), open_udp(None, DialOptions(netns=here))
        # Names of zones are looked up where the socket is made; later only their numbers are sure to fit.
        peer = Endpoint.from_sockaddr(connected.sock.getpeername())
        for client in (connected, free):
            await client.send((Datagram(b"hello", peer),))
            (question,) = await server.receive()
            assert question.peer.host.startswith(f"{CLIENT}%")
            await server.send((Datagram(b"answer", question.peer),))
            (answer,) = await client.receive()
            assert answer.data == b"answer"
            client.abort()
        server.abort()

    run(main(), uvloop=False)


def test_a_service_listens_and_dials_with_a_zone(linked: Network, daemon: Callable[..., Process]) -> None:
    daemon(linked["gateway"], "-L", f"tcp://[{SERVER}%25lan0]:7000/[{SERVER}%25lan0]:7001")
    with linked.socket_in("gateway", 10, 1) as target:
        target.bind((SERVER, 7001, 0, _index(linked["gateway"], "lan0")))
        target.listen()
        target.settimeout(10)
        with linked.socket_in("client", 10, 1) as client:
            client.settimeout(10)
            client.connect((SERVER, 7000, 0, _index(linked["client"], "wan0")))
            client.sendall(b"hello")
            accepted, _ = target.accept()
            with accepted:
                assert accepted.recv(5) == b"hello"


def _index(place: str, interface: str) -> int:
    found = run_program(["ip", "-n", place, "-o", "link", "show", "dev", interface])
    return int(found.output.partition(":")[0])
