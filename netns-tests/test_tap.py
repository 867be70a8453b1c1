"""Ethernet over datagrams as users meet it: hosts, bridged networks, real gost peers, and no trace."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from vpn import OUTSIDE, PORT, TAP, exchange, ping

from gostnet.kernel import netns
from gostnet.testing.namespaces import End, Host, Link, Network, Topology, row
from gostnet.testing.processes import Process, run_program
from gostnet.testing.servers import serving_in_thread

pytestmark = pytest.mark.netns

Daemon = Callable[..., Process]
Launch = Callable[..., Process]

CIPHER = "AEAD_CHACHA20_POLY1305:secret"


def command(place: str, *words: str) -> str:
    with netns.inside(place):
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout


# ---- frames -----------------------------------------------------------------------------------------
@OUTSIDE
@pytest.mark.parametrize("cipher", ["", CIPHER + "@"], ids=["plain", "aead"])
def test_server_and_client(two: Network, daemon: Daemon, unchanged: Any, outside: int, cipher: str) -> None:
    with unchanged(two["server"]), unchanged(two["client"]):
        server = daemon(two["server"], "-L", TAP.server(cipher))
        client = daemon(two["client"], "-L", TAP.client(two.address("server", outside), user=cipher))
        exchange(two["client"], two["server"], TAP.nets["server"])
        exchange(two["server"], two["client"], TAP.nets["client"])
        assert client.stop() == 0
        assert server.stop() == 0


def test_iperf3_and_curl(two: Network, daemon: Daemon, peer: Callable[[str], str]) -> None:
    iperf3, curl = peer("iperf3"), peer("curl")
    daemon(two["server"], "-L", TAP.server(CIPHER + "@"))
    daemon(two["client"], "-L", TAP.client(two.address("server"), user=CIPHER + "@"))
    near, far = two["client"], TAP.nets["server"]
    assert ping(near, far[0])
    with Process([iperf3, "-s", "-p", "5201", "--forceflush"], two["server"]) as server:
        server.wait_for("listening")
        for words in ((far[0],), (far[1],), (far[0], "-R"), (far[0], "-u", "-b", "20M")):
            done = run_program([iperf3, "-c", words[0], "-t", "1", "-J", *words[1:]], near, timeout=30)
            end = json.loads(done.output)["end"]
            moved = end["sum_received"] if "sum_received" in end else end["sum"]
            assert moved["bits_per_second"] > 2_000_000, words
    with serving_in_thread(two["server"], list(far)) as servers:
        for version in (4, 6):
            target = servers.endpoint("http", version)
            host = f"[{target.host}]" if version == 6 else target.host
            words = [
                curl,
                "-sS",
                "-o",
                "/dev/null",
                "-w",
                "%{size_download}",
                f"http://{host}:{target.port}/bytes/300000",
            ]
            assert run_program(words, near, timeout=30).output.strip() == "300000"


def test_two_clients_are_on_one_network_with_the_server(star: Network, daemon: Daemon) -> None:
    daemon(star["server"], "-L", TAP.server())
    daemon(star["client"], "-L", TAP.client(star.address("server", 4, "lan0"), keepalive="true", ttl="1s"))
    daemon(star["other"], "-L", TAP.client(star.address("server", 4, "wan0"), "other", keepalive="true", ttl="1s"))
    exchange(star["client"], star["other"], TAP.nets["other"])
    exchange(star["server"], star["other"], TAP.nets["other"])


def test_through_a_chain_of_relay_over_tls(three: Network, daemon: Daemon) -> None:
    daemon(three["server"], "-L", TAP.server())
    relay = daemon(three["gateway"], "-L", "relay+tls://:8443")
    client = daemon(
        three["client"],
        *("-L", TAP.client(three.address("server"))),
        *("-F", f"relay+tls://{three.address('gateway', 4, 'lan0')}:8443"),
    )
    exchange(three["client"], three["server"], TAP.nets["server"])
    relay.kill()
    client.wait_for("dialling again")
    daemon(three["gateway"], "-L", "relay+tls://:8443")
    assert ping(three["client"], TAP.nets["server"][0])


# ---- bridges ------------------------------------------------------------------------------------------
@pytest.fixture
def lans(build: Callable[[Topology], Network]) -> Network:
    """Two hosts, each with a router that has no address on their network; the routers reach each other."""
    hosts = tuple(Host(role) for role in ("left", "west", "east", "right"))
    links = (
        Link(End("left", "eth0", ("10.44.0.1/24", "fd44::1/64")), End("west", "lan0")),
        Link(End("west", "wan0", ("10.99.9.1/24",)), End("east", "wan0", ("10.99.9.2/24",))),
        Link(End("east", "lan0"), End("right", "eth0", ("10.44.0.2/24", "fd44::2/64"))),
    )
    return build(Topology(hosts, links))


BRIDGED = {"net": "", "mtu": "1500", "bridge": "br-vpn", "bridge.ports": "lan0"}


@pytest.mark.parametrize("ending", ["TERM", "KILL"])
def test_two_networks_become_one(lans: Network, daemon: Daemon, unchanged: Any, ending: str) -> None:
    with unchanged(lans["west"], timeout=5.0), unchanged(lans["east"], timeout=5.0):
        server = daemon(lans["west"], "-L", TAP.server(**BRIDGED))
        client = daemon(lans["east"], "-L", TAP.client("10.99.9.1", **BRIDGED))
        exchange(lans["left"], lans["right"], ("10.44.0.2", "fd44::2"))
        exchange(lans["right"], lans["left"], ("10.44.0.1", "fd44::1"))
        assert ping(lans["left"], "10.44.0.2")
        for process in (client, server):
            process.send(getattr(signal, f"SIG{ending}"))
            process.wait()


def test_a_bridge_with_addresses_of_its_own(lans: Network, daemon: Daemon) -> None:
    daemon(lans["west"], "-L", TAP.server(**{**BRIDGED, "net": "10.44.0.250/24,fd44::250/64"}))
    daemon(lans["east"], "-L", TAP.client("10.99.9.1", **{**BRIDGED, "net": "10.44.0.251/24"}))
    for address in ("10.44.0.250", "fd44::250", "10.44.0.251"):
        assert ping(lans["left"], address), address
        assert ping(lans["right"], address), address


def test_a_bridge_that_is_there_is_joined_and_left_as_it_was(lans: Network, daemon: Daemon, unchanged: Any) -> None:
    command(lans["west"], "ip", "link", "add", "br-vpn", "type", "bridge")
    with lans.inside("west"):  # what IPv6 does by itself would come meanwhile
        Path("/proc/sys/net/ipv6/conf/br-vpn/disable_ipv6").write_text("1")
    command(lans["west"], "ip", "link", "set", "lan0", "master", "br-vpn")
    command(lans["west"], "ip", "link", "set", "br-vpn", "up")
    with unchanged(lans["west"], timeout=5.0):
        server = daemon(lans["west"], "-L", TAP.server(net="", mtu="1500", bridge="br-vpn"))
        daemon(lans["east"], "-L", TAP.client("10.99.9.1", **BRIDGED))
        assert ping(lans["left"], "10.44.0.2")
        assert server.stop() == 0


def test_a_device_that_somebody_deletes_comes_back_into_its_bridge(lans: Network, daemon: Daemon) -> None:
    server = daemon(lans["west"], "-L", TAP.server(**BRIDGED))
    daemon(lans["east"], "-L", TAP.client("10.99.9.1", **BRIDGED))
    assert ping(lans["left"], "10.44.0.2")
    command(lans["west"], "ip", "link", "del", "tap-server")
    server.wait_for("has been closed")
    assert ping(lans["left"], "10.44.0.2")
    assert "tap-server" in command(lans["west"], "ip", "link", "show", "master", "br-vpn")


# ---- the real gost ------------------------------------------------------------------------------------
@pytest.mark.interop
@pytest.mark.parametrize("role", ["gost-server", "gost-client"])
@pytest.mark.parametrize("carrier", ["udp", "aead", "relay+tls", "socks5"])
def test_interop(three: Network, launch: Launch, role: str, carrier: str) -> None:
    """IPv4 only: the server of gost passes no multicast from its device, so nobody finds an IPv6 neighbour by it."""
    server, client = ("gost", "gostnet") if role == "gost-server" else ("gostnet", "gost")
    cipher = CIPHER + "@" if carrier == "aead" else ""
    alive = {"keepalive": "true", "ttl": "1s"} if client == "gostnet" else {}
    words = ["-L", TAP.client(three.address("server"), user=cipher, net=TAP.net("client", count=1), **alive)]
    if carrier not in ("udp", "aead"):
        # What gost's relay client asks for, an association without a target, is a BIND there.
        launch(server, three["gateway"], "-L", f"{carrier}://:8443?{'bind' if carrier == 'relay+tls' else 'udp'}=true")
        words += ["-F", f"{carrier}://{three.address('gateway', 4, 'lan0')}:8443"]
    launch(server, three["server"], "-L", TAP.server(cipher, net=TAP.net("server", count=1)))
    process = launch(client, three["client"], *words)
    exchange(three["client"], three["server"], TAP.nets["server"][:1])
    exchange(three["server"], three["client"], TAP.nets["client"][:1])
    assert "dialling again" not in process.errors


# ---- coming and going ---------------------------------------------------------------------------------
def test_restarts_of_either_side(two: Network, daemon: Daemon) -> None:
    words = ("-L", TAP.client(two.address("server"), keepalive="true", ttl="1s", mac="02:00:00:00:00:02"))
    server_words = ("-L", TAP.server(mac="02:00:00:00:00:01"))  # else neighbours wait until they look for them again
    server = daemon(two["server"], *server_words)
    client = daemon(two["client"], *words)
    assert ping(two["client"], TAP.nets["server"][0])
    server.kill()
    client.wait_for("nothing from the server for 3s")
    daemon(two["server"], *server_words)
    assert ping(two["client"], TAP.nets["server"][0])
    client.kill()
    daemon(two["client"], *words)
    assert ping(two["server"], TAP.nets["client"][0])


@pytest.mark.parametrize("ending", ["TERM", "INT", "KILL"])
def test_nothing_is_left_whatever_the_ending(two: Network, daemon: Daemon, unchanged: Any, ending: str) -> None:
    route = two.address("server").rpartition(".")[0] + ".0/24"  # one that is there already, and comes back
    with unchanged(two["client"], timeout=5.0):
        client = daemon(two["client"], "-L", TAP.client("192.0.2.1", route=f"10.55.0.0/16,{route}", bridge="br-new"))
        assert f"{route} dev br-new" in command(two["client"], "ip", "route")
        assert "tap-client" in command(two["client"], "ip", "link", "show", "master", "br-new")
        client.send(getattr(signal, f"SIG{ending}"))
        assert client.wait() == (-signal.SIGKILL if ending == "KILL" else 0)


def test_two_instances_share_a_bridge(two: Network, daemon: Daemon, unchanged: Any) -> None:
    with unchanged(two["server"], timeout=5.0):
        first = daemon(two["server"], "--instance", "first", "-L", TAP.server(bridge="br-both"))
        query = {"name": "tap-second", "net": "", "bridge": "br-both"}
        url = TAP.server(**query).replace(f":{PORT}", f":{PORT + 1}")
        second = daemon(two["server"], "--instance", "second", "-L", url)
        first.kill()
        daemon(two["client"], "-L", TAP.client(two.address("server")).replace(f":{PORT}?", f":{PORT + 1}?"))
        assert "tap-second" in command(two["server"], "ip", "link", "show", "master", "br-both")
        assert second.stop() == 0


def test_the_last_of_two_masquerading_instances_ends_the_forwarding(
    build: Callable[[Topology], Network], daemon: Daemon, unchanged: Any
) -> None:
    topology = row("client", "gateway", "server")
    hosts = tuple(replace(host, forwarding=False) if host.role == "gateway" else host for host in topology.hosts)
    place = build(replace(topology, hosts=hosts))["gateway"]

    def forwards() -> str:
        return "".join(command(place, "sysctl", "-n", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding").split())

    def masquerading(instance: str, port: int, net: str) -> Process:
        url = f"tun://:{port}?net=192.168.{net}.1/24,fd00:{net}::1/64&masquerade=true"
        return daemon(place, "--instance", instance, "-L", url)

    with unchanged(place, timeout=5.0):
        assert forwards() == "00"
        first, second, third = (masquerading(f"n{n}", PORT + n, str(200 + n)) for n in (1, 2, 3))
        assert first.stop() == 0
        assert forwards() == "11"
        second.kill()
        assert forwards() == "11"
        assert third.stop() == 0
        assert forwards() == "00"


def test_reload_that_changes_nothing_keeps_the_device(two: Network, daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "live.yaml"

    def write(password: str) -> None:
        service = {
            "name": "lan",
            "addr": f":{PORT}",
            "handler": {"type": "tap", "auth": {"username": "aes-256-gcm", "password": password}},
            "listener": {"type": "tap", "metadata": {"net": TAP.net("server"), "name": "tap-server"}},
        }
        path.write_text(yaml.safe_dump({"services": [service]}))

    def index() -> int:
        with netns.inside(two["server"]):
            return socket.if_nametoindex("tap-server")

    write("one")
    server = daemon(two["server"], "-C", str(path))
    before = index()
    daemon(two["client"], "-L", TAP.client(two.address("server"), user="aes-256-gcm:one@"))
    assert ping(two["client"], TAP.nets["server"][0])
    server.send(signal.SIGHUP)
    server.wait_for("config reloaded")
    assert index() == before
    write("two")
    server.send(signal.SIGHUP)
    seen: list[str] = []
    server.wait_for(lambda line: "config reloaded" in line and (seen.append(line) or len(seen) == 2))
    assert index() != before
    assert not ping(two["client"], TAP.nets["server"][0], 1)


# ---- refusals -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("tap://:8421?net=nonsense", "nonsense"),
        ("tap://rc4:pw@:8421", "is not a cipher"),
        ("tap://aes-128-gcm@:8421", "needs a password"),
        ("tap://:8421?bridge.ports=eth1", "ports of what"),
        ("tap://:8421?mac=ff:ff:ff:ff:ff:ff", "is the address of many"),
        ("tap://:8421?mac=12:34", "is not a hardware address"),
        ("tap://:8421?bridge=lo", "is no bridge"),
        ("tap://:8421?bridge=br-x&bridge.ports=eth9", "eth9"),
    ],
)
def test_what_makes_no_sense_is_refused(two: Network, unchanged: Any, url: str, said: str) -> None:
    with unchanged(two["server"]):
        process = Process([sys.executable, "-m", "gostnet", "-L", url], two["server"])
        with process:
            assert process.wait(20) == 1
            assert said in process.errors
