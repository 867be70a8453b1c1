"""The VPN's pump in C: beside the one in Python, the real gost and narrow carriers, with every byte compared."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from vpn import OUTSIDE, PORT, TUN, exchange, move, ping

from gostnet.dataplane.native import library
from gostnet.kernel import netns
from gostnet.testing.clients import echo
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process, run_program
from gostnet.testing.servers import serving_in_thread

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(library.load()[0] is None, reason=library.load()[1] or "the library is there"),
]

Daemon = Callable[..., Process]
PUMP = {"tun_engine": "pump", "mtu": "1400"}
PYTHON = {"GOSTNET_NATIVE": "0"}
BOTH = ("server", "client")


def start(two: Network, daemon: Daemon, python: str = "", outside: int = 4, **query: str) -> dict[str, Process]:
    """Start both ends; that of the role `python` has no library. Assert that each has the pump that it should have."""
    urls = {"server": TUN.server(**PUMP, **query), "client": TUN.client(two.address("server", outside), **PUMP)}
    started = {role: daemon(two[role], "-L", urls[role], env=PYTHON if role == python else None) for role in BOTH}
    for role, process in started.items():
        said = process.wait_for(": pump in ")
        assert ("pump in Python: switched off by GOSTNET_NATIVE" if role == python else "pump in C") in said
    return started


def transfer(near: str, far: str, addresses: Sequence[str], size: int = 6_000_000) -> None:
    """Assert that a stream of each IP version comes back byte by byte."""
    for address in addresses:
        assert ping(near, address), address
    with serving_in_thread(far, list(addresses)) as servers:
        for version in {6 if ":" in address else 4 for address in addresses}:
            data = os.urandom(size)
            assert echo(near, servers.endpoint("echo/tcp", version), data, timeout=60) == data


def totals(process: Process) -> tuple[int, int]:
    """Return the bytes of the record that a daemon leaves at its end."""
    found = re.findall(r'"inputBytes":(\d+),"outputBytes":(\d+)', process.errors + process.output)
    return int(found[-1][0]), int(found[-1][1])


@OUTSIDE
@pytest.mark.parametrize("python", ["", *BOTH], ids=["both-in-c", "server-in-python", "client-in-python"])
def test_every_byte_passes_both_ways(two: Network, daemon: Daemon, unchanged: Any, python: str, outside: int) -> None:
    with unchanged(two["server"]), unchanged(two["client"]):
        ends = start(two, daemon, python, outside)
        transfer(two["client"], two["server"], TUN.nets["server"])
        transfer(two["server"], two["client"], TUN.nets["client"])
        exchange(two["client"], two["server"], TUN.nets["server"])
        for role in reversed(BOTH):
            assert ends[role].stop() == 0
        # Four streams of each direction and what is exchanged besides, with headers around every segment.
        least = 24_800_000 * 1.035
        assert all(least < moved < 1.06 * least for moved in totals(ends["client"]))


def test_point_to_point(two: Network, daemon: Daemon) -> None:
    start(two, daemon, p2p="true")
    transfer(two["client"], two["server"], TUN.nets["server"])


@pytest.mark.interop
@pytest.mark.parametrize("role", ["gost-server", "gost-client"])
def test_the_real_gost(two: Network, launch: Callable[..., Process], role: str) -> None:
    server, client = ("gost", "gostnet") if role == "gost-server" else ("gostnet", "gost")
    ends = [
        launch(server, two["server"], "-L", TUN.server(mtu="1400")),
        launch(client, two["client"], "-L", TUN.client(two.address("server"), mtu="1400")),
    ]
    ends[server == "gost"].wait_for("pump in C")
    transfer(two["client"], two["server"], TUN.nets["server"], 3_000_000)
    transfer(two["server"], two["client"], TUN.nets["client"], 3_000_000)
    exchange(two["client"], two["server"], TUN.nets["server"])


def test_two_peers_reach_each_other_and_none_speaks_for_another(star: Network, daemon: Daemon) -> None:
    daemon(star["server"], "-L", TUN.server(strictSource="true", **PUMP)).wait_for("pump in C")
    for role, side in (("client", "lan0"), ("other", "wan0")):
        url = TUN.client(star.address("server", 4, side), role, **PUMP)
        daemon(star[role], "-L", url).wait_for("pump in C")
    transfer(star["client"], star["other"], TUN.nets["other"])
    exchange(star["other"], star["client"], TUN.nets["client"])
    with netns.inside(star["client"]):
        subprocess.run(["ip", "address", "add", "192.168.123.99/24", "dev", "tun-client"], check=True)
    for target in ("server", "other"):
        forged = ["ping", "-n", "-c2", "-i0.2", "-w1", "-I", "192.168.123.99", TUN.nets[target][0]]
        assert run_program(forged, star["client"], check=False).wait() != 0
        assert ping(star["client"], TUN.nets[target][0])


def test_a_client_that_moves_is_followed(two: Network, daemon: Daemon) -> None:
    start(two, daemon)
    transfer(two["server"], two["client"], TUN.nets["client"], 500_000)
    move(two["client"], two.address("client"))
    transfer(two["server"], two["client"], TUN.nets["client"], 500_000)


def shaped(place: str, *words: str) -> None:
    with netns.inside(place):
        subprocess.run(["tc", "qdisc", "add", "dev", "wan0", "root", *words], check=True)


def test_a_slow_way_stops_the_reading_of_the_device_and_nothing_is_lost_here(two: Network, daemon: Daemon) -> None:
    shaped(two["client"], "tbf", "rate", "200mbit", "burst", "64kb", "limit", "30mb")
    start(two, daemon)
    transfer(two["client"], two["server"], TUN.nets["server"])


def test_a_way_that_takes_less_than_the_packets_carries_fragments(two: Network, daemon: Daemon) -> None:
    for role, device in (("client", "wan0"), ("server", "lan0")):
        with netns.inside(two[role]):
            subprocess.run(["ip", "link", "set", "dev", device, "mtu", "1300"], check=True)
    start(two, daemon)
    transfer(two["client"], two["server"], TUN.nets["server"], 1_000_000)
    exchange(two["server"], two["client"], TUN.nets["client"])


def test_loss_on_the_way_changes_no_byte(two: Network, daemon: Daemon) -> None:
    """Some of what leaves is dropped: single datagrams, and whole trains that are still to be cut."""
    rules = f"""table inet lossy {{
        chain out {{ type filter hook output priority 0; udp dport {PORT} numgen random mod 100 < 2 drop; }}
    }}"""
    with netns.inside(two["client"]):
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
    start(two, daemon)
    transfer(two["client"], two["server"], TUN.nets["server"], 2_000_000)


def test_traffic_limits_and_chains_keep_the_pump_in_python(two: Network, daemon: Daemon) -> None:
    service = {
        "name": "vpn",
        "addr": f":{PORT}",
        "handler": {"type": "tun"},
        "listener": {"type": "tun", "metadata": {"net": TUN.net("server"), "name": "tun-server"}},
        "limiter": "some",
    }
    limits = [{"name": "some", "limits": ["$ 100MB 100MB"]}]
    server = daemon(two["server"], {"services": [service], "limiters": limits})
    assert "pump in Python: there are traffic limits" in server.wait_for(": pump in ")
    daemon(two["server"], "--instance", "relay", "-L", "relay://:8443")
    words = ("-L", TUN.client(two.address("server")), "-F", f"relay://{two.address('server')}:8443")
    client = daemon(two["client"], *words)
    assert "pump in Python: packets go through a chain" in client.wait_for(": pump in ")
    exchange(two["client"], two["server"], TUN.nets["server"])


def test_a_service_may_ask_for_the_pump_in_python(two: Network, daemon: Daemon) -> None:
    service = {
        "name": "vpn",
        "addr": f":{PORT}",
        "metadata": {"engine": "copy"},
        "handler": {"type": "tun"},
        "listener": {"type": "tun", "metadata": {"net": TUN.net("server"), "name": "tun-server"}},
    }
    server = daemon(two["server"], {"services": [service]})
    assert "pump in Python: the service has the engine copy" in server.wait_for(": pump in ")
