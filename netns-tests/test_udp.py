"""UDP through a daemon, over links: several addresses, long datagrams, closed ports, and captured flows."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process, run_program
from gostnet.testing.servers import Servers

pytestmark = pytest.mark.netns

Daemon = Callable[..., Process]
SIZES = [0, 1, 1400, 1400, 1400, 77, 3000, 3000, 3000, 0, 1472, 1473, 1453, 65507, 5, 5, 5]
SEVERAL = {4: ("10.99.1.2", "10.99.1.22"), 6: ("fd99:1::2", "fd99:1::22")}
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
NATIVE = pytest.mark.parametrize("native", ["1", "0"], ids=["native", "plain"])


def client_of(three: Network, version: int) -> socket.socket:
    sock = three.socket_in("client", socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(10)
    return sock


def exchange(sock: socket.socket, where: tuple[str, int], sizes: list[int]) -> None:
    """Send datagrams of these sizes and expect each back, in order, from where it was sent to."""
    for turn in range(3):  # the first turn opens the flow
        sent = [os.urandom(size) for size in sizes]
        for start in range(0, len(sent), 4):
            for data in sent[start : start + 4]:
                sock.sendto(data, where)
            for data in sent[start : start + 4]:
                answer, peer = sock.recvfrom(65535)
                assert (len(answer), answer == data) == (len(data), True), (turn, start)
                assert peer[:2] == where


@NATIVE
@VERSIONS
def test_a_listener_without_an_address_answers_from_the_one_that_was_asked(
    three: Network, servers: Servers, daemon: Daemon, version: int, native: str
) -> None:
    """As hosts with several addresses need it, and routers whose clients drop answers from elsewhere."""
    for address in (SEVERAL[4][1] + "/24", SEVERAL[6][1] + "/64"):
        nodad = ["nodad"] if ":" in address else []
        run_program(["ip", "-n", three["gateway"], "addr", "add", address, "dev", "lan0", *nodad])
    target = servers.endpoint("echo/udp", version)
    daemon(three["gateway"], "-L", f"udp://:5300/{target}?keepalive=true", env={"GOSTNET_NATIVE": native})
    with client_of(three, version) as client:
        for address in (*SEVERAL[version], *SEVERAL[version]):
            exchange(client, (address, 5300), SIZES[:7])


@NATIVE
@VERSIONS
def test_captured_datagrams_come_back_whole_and_from_their_destination(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, version: int, native: str
) -> None:
    with unchanged(three["gateway"]):
        process = daemon(three["gateway"], CAPTURE, env={"GOSTNET_NATIVE": native})
        target = servers.endpoint("echo/udp", version)
        with client_of(three, version) as client:
            exchange(client, (target.host, target.port), SIZES)
        process.stop()


@NATIVE
@VERSIONS
def test_forwarded_datagrams_of_every_size_come_back_whole(
    three: Network, servers: Servers, daemon: Daemon, version: int, native: str
) -> None:
    target = servers.endpoint("echo/udp", version)
    daemon(three["gateway"], "-L", f"udp://:5300/{target}?keepalive=true", env={"GOSTNET_NATIVE": native})
    with client_of(three, version) as client:
        exchange(client, (three.address("gateway", version, "lan0"), 5300), SIZES)


@NATIVE
@VERSIONS
def test_a_captured_client_hears_that_nobody_listens(
    three: Network, servers: Servers, daemon: Daemon, version: int, native: str
) -> None:
    process = daemon(three["gateway"], CAPTURE, env={"GOSTNET_NATIVE": native})
    host = three.address("server", version)
    with client_of(three, version) as client:
        client.connect((host, 4))
        client.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(1)
    process.stop()
    assert "nobody listens" in process.errors or "refused" in process.errors.lower(), process.errors


def test_an_idle_daemon_sleeps(three: Network, servers: Servers, daemon: Daemon) -> None:
    """No timer, no polling: neither before traffic nor while a flow is open and silent."""
    target = servers.endpoint("echo/udp", 4)
    process = daemon(three["gateway"], "-L", f"udp://:5300/{target}?keepalive=true&ttl=60s")

    def switches() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)

    def rest() -> int:
        time.sleep(1.5)  # what the start, or the exchange, has left to do: its counts are told after a second
        before = switches()
        time.sleep(1.5)
        return switches() - before

    assert rest() == 0
    with client_of(three, 4) as client:
        exchange(client, (three.address("gateway", 4, "lan0"), 5300), [100])
        assert rest() == 0


CAPTURE = {
    "services": [
        {
            "name": "udp",
            "addr": ":12346",
            "handler": {"type": "redu"},
            "listener": {"type": "redu", "metadata": {"capture": "lan0", "ttl": "30s"}},
        }
    ]
}
