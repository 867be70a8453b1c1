"""The real gost in both roles: every protocol that is built, over tcp and tls, TCP and UDP.

A client runs in one namespace and a server in another; one of the two is gost, the other gostnet. The client forwards
local ports to the servers of a third namespace, through the server.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from gostnet.core.address import Endpoint
from gostnet.testing.clients import echo, echo_datagram
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process
from gostnet.testing.servers import Servers

pytestmark = [pytest.mark.netns, pytest.mark.interop]

PORT = 8000
LOCAL = 9000

# protocol, what a server needs to let UDP through (None: the protocol carries none), what a client needs
PROTOCOLS = {
    "http": ("udp=true", ""),
    "socks4": (None, ""),
    "socks4a": (None, ""),
    "socks5": ("udp=true", ""),
    "socks5-notls": ("udp=true&notls=true", "notls=true"),
    "relay": ("bind=true", ""),
    "relay-nodelay": ("bind=true&nodelay=true", "nodelay=true"),
    "auto-http": ("udp=true", ""),
    "auto-socks5": ("udp=true", ""),
}
CASES = [
    pytest.param(role, protocol, transport, id=f"{role}-{protocol}-{transport}")
    for role in ("gost-server", "gost-client")
    for protocol in PROTOCOLS
    for transport in ("tcp", "tls")
]


def urls(protocol: str, transport: str, gateway: str) -> tuple[str, str]:
    """Return the -L of the server and the -F of the client; authentication wherever the protocol has it."""
    server_query, client_query = PROTOCOLS[protocol]
    name, _, variant = protocol.partition("-")
    listen = name
    node = variant if name == "auto" else name
    user = "" if name.startswith("socks4") else "user:pass@"
    server = f"{listen}+{transport}://{user}:{PORT}?{server_query or ''}"
    client = f"{node}+{transport}://{user}{gateway}:{PORT}?{client_query}"
    return server, client


@pytest.mark.parametrize(("role", "protocol", "transport"), CASES)
def test_interop(
    three: Network, servers: Servers, launch: Callable[..., Process], role: str, protocol: str, transport: str
) -> None:
    server_url, client_url = urls(protocol, transport, three.address("gateway", 4, "lan0"))
    ours = "gostnet"
    server_kind, client_kind = ("gost", ours) if role == "gost-server" else (ours, "gost")
    tcp, udp = servers.endpoint("echo/tcp"), servers.endpoint("echo/udp")
    launch(server_kind, three["gateway"], "-L", server_url)
    carries_udp = PROTOCOLS[protocol][0] is not None
    words = ["-L", f"tcp://127.0.0.1:{LOCAL}/{tcp}"]
    if carries_udp:
        words += ["-L", f"udp://127.0.0.1:{LOCAL}/{udp}?keepalive=true&ttl=30s"]
    launch(client_kind, three["client"], *words, "-F", client_url)
    data = os.urandom(300_000)
    assert echo(three["client"], Endpoint("127.0.0.1", LOCAL), data) == data
    assert servers.witness.all("echo/tcp")[-1].client.host == three.address("gateway", 4, "wan0")
    if carries_udp:
        for size in (1, 1200, 3000):
            payload = os.urandom(size)
            assert echo_datagram(three["client"], Endpoint("127.0.0.1", LOCAL), payload)[0] == payload
        assert servers.witness.all("echo/udp")[-1].client.host == three.address("gateway", 4, "wan0")


def test_chain_of_three_nodes_with_gost_in_the_middle(
    three: Network, servers: Servers, launch: Callable[..., Process]
) -> None:
    """gostnet client -> relay+tls (gostnet) -> socks5 (gost) -> http+tls (gostnet) -> target."""
    gateway = three.address("gateway", 4, "lan0")
    launch("gostnet", three["gateway"], "-L", "relay+tls://:8001", "-L", "http+tls://:8003")
    launch("gost", three["gateway"], "-L", "socks5://:8002")
    chain = [
        *("-F", f"relay+tls://{gateway}:8001"),
        *("-F", f"socks5://{gateway}:8002"),
        *("-F", f"http+tls://{gateway}:8003"),
    ]
    tcp = servers.endpoint("echo/tcp")
    launch("gostnet", three["client"], "-L", f"tcp://127.0.0.1:{LOCAL}/{tcp}", *chain)
    data = os.urandom(300_000)
    assert echo(three["client"], Endpoint("127.0.0.1", LOCAL), data) == data
