"""What the tests of devices with peers share: the URLs of both ends, and traffic between them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from gostnet.kernel import netns
from gostnet.testing.clients import echo, echo_datagram
from gostnet.testing.processes import run_program
from gostnet.testing.servers import serving_in_thread

PORT = 8421
PATIENCE = 15
"""Seconds for the first answer."""

OUTSIDE = pytest.mark.parametrize("outside", [4, 6], ids=["over-ipv4", "over-ipv6"])


@dataclass(frozen=True)
class Vpn:
    """The devices of one kind (tun or tap), with the addresses of each role; dots in keys of a query are `_`."""

    kind: str
    nets: Mapping[str, Sequence[str]]

    def net(self, role: str, count: int | None = None) -> str:
        """Return the first `count` addresses of a device, all by default; gost's tap takes one only."""
        return ",".join(f"{address}/{64 if ':' in address else 24}" for address in self.nets[role][:count])

    def server(self, user: str = "", **query: str) -> str:
        """Return what the server gets behind -L."""
        return _url(f"{self.kind}://{user}:{PORT}", {"net": self.net("server"), "name": f"{self.kind}-server", **query})

    def client(self, server: str, role: str = "client", user: str = "", **query: str) -> str:
        """Return what a client of `server` gets behind -L."""
        host = f"[{server}]" if ":" in server else server
        words = {"net": self.net(role), "name": f"{self.kind}-{role}"}
        if self.kind == "tun":
            words |= {"keepalive": "true", "ttl": "1s"}
        return _url(f"{self.kind}://{user}:0/{host}:{PORT}", words | query)


TUN = Vpn(
    "tun",
    {
        "server": ("192.168.123.1", "fd00:123::1"),
        "client": ("192.168.123.2", "fd00:123::2"),
        "other": ("192.168.123.3", "fd00:123::3"),
    },
)
TAP = Vpn(
    "tap",
    {
        "server": ("192.168.124.1", "fd00:124::1"),
        "client": ("192.168.124.2", "fd00:124::2"),
        "other": ("192.168.124.3", "fd00:124::3"),
    },
)


def _url(head: str, query: Mapping[str, str]) -> str:
    return f"{head}?" + "&".join(f"{key.replace('_', '.')}={value}" for key, value in query.items())


def ping(place: str, address: str, patience: int = PATIENCE) -> bool:
    """Ping until one answer comes."""
    words = ["ping", "-n", "-c1", "-i0.2", f"-w{patience}", address]
    return run_program(words, place, timeout=patience + 5, check=False).wait() == 0


def exchange(near: str, far: str, addresses: Sequence[str]) -> None:
    """Assert that TCP and UDP of all sizes pass from one end to servers at the other one's addresses."""
    for address in addresses:
        assert ping(near, address), address
    with serving_in_thread(far, list(addresses)) as servers:
        for version in {6 if ":" in address else 4 for address in addresses}:
            data = os.urandom(400_000)
            assert echo(near, servers.endpoint("echo/tcp", version), data) == data
            for size in (1, 1300, 5000):
                payload = os.urandom(size)
                assert echo_datagram(near, servers.endpoint("echo/udp", version), payload)[0] == payload


def move(place: str, old: str) -> None:
    """Give a host another address of its network in place of `old`."""
    new = old.rpartition(".")[0] + ".77"
    with netns.inside(place):
        for verb, address in (("add", new), ("del", old)):
            subprocess.run(["ip", "address", verb, f"{address}/24", "dev", "wan0"], check=True)
        subprocess.run(["ip", "address", "replace", f"{new}/24", "dev", "wan0"], check=True)
