"""The VPN as users meet it: devices, packets of both IP versions inside and outside, real gost peers, and no trace."""

from __future__ import annotations

import os
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
from vpn import OUTSIDE, PORT, TUN, exchange, move, ping

from gostnet.core.address import Endpoint
from gostnet.kernel import netns
from gostnet.testing.clients import connect, echo
from gostnet.testing.namespaces import Network, Topology, row
from gostnet.testing.processes import Process, run_program
from gostnet.testing.servers import serving_in_thread

pytestmark = pytest.mark.netns

Daemon = Callable[..., Process]
Launch = Callable[..., Process]


def links(place: str) -> set[str]:
    with netns.inside(place):
        return {name for _, name in socket.if_nameindex()}


# ---- packets ----------------------------------------------------------------------------------------
@OUTSIDE
def test_server_and_client(two: Network, daemon: Daemon, unchanged: Any, outside: int) -> None:
    with unchanged(two["server"]), unchanged(two["client"]):
        server = daemon(two["server"], "-L", TUN.server())
        client = daemon(two["client"], "-L", TUN.client(two.address("server", outside)))
        exchange(two["client"], two["server"], TUN.nets["server"])
        exchange(two["server"], two["client"], TUN.nets["client"])
        assert client.stop() == 0
        assert server.stop() == 0


def test_two_clients_reach_each_other_through_the_server(star: Network, daemon: Daemon) -> None:
    daemon(star["server"], "-L", TUN.server())
    daemon(star["client"], "-L", TUN.client(star.address("server", 4, "lan0")))
    daemon(star["other"], "-L", TUN.client(star.address("server", 4, "wan0"), "other"))
    exchange(star["client"], star["other"], TUN.nets["other"])


def test_through_a_chain_of_relay_over_tls(three: Network, daemon: Daemon) -> None:
    daemon(three["server"], "-L", TUN.server())
    relay = daemon(three["gateway"], "-L", "relay+tls://:8443")
    client = daemon(
        three["client"],
        *("-L", TUN.client(three.address("server"))),
        *("-F", f"relay+tls://{three.address('gateway', 4, 'lan0')}:8443"),
    )
    exchange(three["client"], three["server"], TUN.nets["server"])
    relay.kill()
    client.wait_for("dialling again")
    daemon(three["gateway"], "-L", "relay+tls://:8443")
    assert ping(three["client"], TUN.nets["server"][0])


def test_point_to_point_takes_every_destination(two: Network, daemon: Daemon) -> None:
    daemon(two["server"], "-L", TUN.server(p2p="true", route="10.55.0.0/16"))
    daemon(two["client"], "-L", TUN.client(two.address("server")))
    with netns.inside(two["client"]):
        subprocess.run(["ip", "address", "add", "10.55.1.1/32", "dev", "tun-client"], check=True)
    assert ping(two["client"], TUN.nets["server"][0])
    assert ping(two["server"], "10.55.1.1")


def test_a_network_behind_a_client(three: Network, daemon: Daemon) -> None:
    """The gateway is the client and leads to the network of the host behind it."""
    behind = three.address("client")
    network = behind.rpartition(".")[0] + ".0/24"
    with netns.inside(three["server"]):
        subprocess.run(["ip", "route", "del", "default"], check=True)
    daemon(three["server"], "-L", TUN.server(routes=f"{network}%20{TUN.nets['client'][0]}"))
    daemon(three["gateway"], "-L", TUN.client(three.address("server")))
    assert ping(three["server"], behind)


# ---- masquerade ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ["TERM", "KILL"])
def test_masquerade(build: Callable[[Topology], Network], daemon: Daemon, unchanged: Any, ending: str) -> None:
    """The gateway is the server, and the host behind it knows no way to the tunnel: only the gateway's address."""
    topology = row("client", "gateway", "server")
    hosts = tuple(replace(host, forwarding=False) if host.role == "gateway" else host for host in topology.hosts)
    network = build(replace(topology, hosts=hosts))
    with netns.inside(network["server"]):
        for family in ("-4", "-6"):
            subprocess.run(["ip", family, "route", "del", "default"], check=True)
    far = [network.address("server", version) for version in (4, 6)]
    with unchanged(network["gateway"], timeout=5.0):
        gateway = daemon(network["gateway"], "-L", TUN.server(masquerade="true"))
        routes = ",".join(f"{address}/{128 if ':' in address else 32}" for address in far)
        near = network.address("gateway", 4, "lan0")
        client = daemon(network["client"], "-L", TUN.client(near, route=routes))
        with serving_in_thread(network["server"], far) as servers:
            for version in (4, 6):
                assert ping(network["client"], far[version == 6])
                data = os.urandom(300_000)
                assert echo(network["client"], servers.endpoint("echo/tcp", version), data) == data
                seen = servers.witness.all("echo/tcp")[-1].client.host
                assert seen == network.address("gateway", version, "wan0")
            # The far host has an MTU of 1500 towards the gateway, and is told that the tunnel's is smaller.
            with connect(network["client"], servers.endpoint("echo/tcp")) as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= 1420 - 40
            assert _segment_size(network, servers.endpoint("echo/tcp")) <= 1420 - 40
        client.stop()
        gateway.send(getattr(signal, f"SIG{ending}"))
        gateway.wait()


def _segment_size(network: Network, target: Endpoint) -> int:
    """Return the segment size that the far host is offered in a SYN that says more than the tunnel takes."""
    with netns.inside(network["client"]):
        # A route of its own makes the client claim a size that only the gateway can know to be too large.
        words = ["ip", "route", "replace", f"{target.host}/32", "dev", "tun-client", "advmss", "1460"]
        subprocess.run(words, check=True)
    with connect(network["client"], target), netns.inside(network["server"]):
        shown = subprocess.run(["ss", "-tinH", "sport", f"{target.port}"], capture_output=True, text=True, check=True)
    return max(int(word[4:]) for word in shown.stdout.split() if word.startswith("mss:"))


def test_masquerade_beside_a_capture(three: Network, daemon: Daemon, unchanged: Any) -> None:
    """Both are in the one table of the instance, which a reload of either changes."""
    capture = {"type": "red", "metadata": {"capture": "lan0", "tproxy": True}}
    listener = {"type": "tun", "metadata": {"net": TUN.net("server"), "name": "tun-server", "masquerade": True}}
    services = [
        {"name": "capture", "addr": ":12345", "handler": {"type": "red"}, "listener": capture},
        {"name": "vpn", "addr": f":{PORT}", "handler": {"type": "tun"}, "listener": listener},
    ]
    with unchanged(three["gateway"]):
        process = daemon(three["gateway"], {"services": services})
        with netns.inside(three["gateway"]):
            words = ["nft", "list", "table", "inet", "gostnet-default"]
            table = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert "tproxy to :12345" in table
        assert 'ip saddr 192.168.123.0/24 oifname != "tun-server"' in table
        assert "ip6 saddr fd00:123::/64" in table
        assert table.count("tcp option maxseg size set rt mtu") == 2
        assert process.stop() == 0


# ---- the real gost ------------------------------------------------------------------------------------
@pytest.mark.interop
@pytest.mark.parametrize("role", ["gost-server", "gost-client"])
@pytest.mark.parametrize("carrier", ["udp", "relay+tls"])
def test_interop(three: Network, launch: Launch, role: str, carrier: str) -> None:
    server, client = ("gost", "gostnet") if role == "gost-server" else ("gostnet", "gost")
    words = ["-L", TUN.client(three.address("server"))]
    if carrier != "udp":
        launch(server, three["gateway"], "-L", f"{carrier}://:8443")
        words += ["-F", f"{carrier}://{three.address('gateway', 4, 'lan0')}:8443"]
    launch(server, three["server"], "-L", TUN.server())
    launch(client, three["client"], *words)
    exchange(three["client"], three["server"], TUN.nets["server"])
    exchange(three["server"], three["client"], TUN.nets["client"])


# ---- coming and going ---------------------------------------------------------------------------------
@pytest.mark.parametrize("keepalive", ["true", "false"])
def test_restarts_of_either_side(two: Network, daemon: Daemon, keepalive: str) -> None:
    client_words = ("-L", TUN.client(two.address("server"), keepalive=keepalive))
    server = daemon(two["server"], "-L", TUN.server())
    client = daemon(two["client"], *client_words)
    assert ping(two["client"], TUN.nets["server"][0])
    server.kill()
    assert not ping(two["client"], TUN.nets["server"][0], 1)
    daemon(two["server"], "-L", TUN.server())
    assert ping(two["client"], TUN.nets["server"][0])
    client.kill()
    daemon(two["client"], *client_words)
    assert ping(two["server"], TUN.nets["client"][0])
    assert ping(two["client"], TUN.nets["server"][0])


def test_a_client_whose_address_changes_is_followed(two: Network, daemon: Daemon) -> None:
    daemon(two["server"], "-L", TUN.server())
    daemon(two["client"], "-L", TUN.client(two.address("server", 4)))
    assert ping(two["server"], TUN.nets["client"][0])
    move(two["client"], two.address("client"))
    assert ping(two["server"], TUN.nets["client"][0])


def test_a_device_that_somebody_deletes_comes_back(two: Network, daemon: Daemon, unchanged: Any) -> None:
    with unchanged(two["server"]):
        server = daemon(two["server"], "-L", TUN.server(route="10.55.0.0/16"))
        daemon(two["client"], "-L", TUN.client(two.address("server")))
        assert ping(two["client"], TUN.nets["server"][1])
        with netns.inside(two["server"]):
            subprocess.run(["ip", "link", "del", "tun-server"], check=True)
        server.wait_for("has been closed")
        assert ping(two["client"], TUN.nets["server"][1])
        with netns.inside(two["server"]):
            routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
        assert "10.55.0.0/16 dev tun-server" in routes
        assert server.stop() == 0


@pytest.mark.parametrize("changed", [False, True])
def test_reload(two: Network, daemon: Daemon, tmp_path: Path, changed: bool) -> None:
    """A service that is described as before keeps its device and its peers; a new passphrase holds at once."""
    path = tmp_path / "live.yaml"

    def write(passphrase: str) -> None:
        metadata = {"net": TUN.net("server"), "name": "tun-server"}
        service = {
            "name": "vpn",
            "addr": f":{PORT}",
            "handler": {"type": "tun", "metadata": {"passphrase": passphrase}},
            "listener": {"type": "tun", "metadata": metadata},
        }
        path.write_text(yaml.safe_dump({"services": [service]}))

    write("one")
    server = daemon(two["server"], "-C", str(path))
    client = daemon(two["client"], "-L", TUN.client(two.address("server"), passphrase="one"))
    assert ping(two["client"], TUN.nets["server"][0])
    with netns.inside(two["server"]):
        index = socket.if_nametoindex("tun-server")
    write("two" if changed else "one")
    server.send(signal.SIGHUP)
    server.wait_for("config reloaded")
    with netns.inside(two["server"]):
        assert (socket.if_nametoindex("tun-server") != index) == changed
    if changed:
        server.wait_for("is refused")
        client.wait_for("no answer to a registration")
        assert not ping(two["client"], TUN.nets["server"][0], 1)
    else:
        assert ping(two["client"], TUN.nets["server"][0], 2)


# ---- refusals -----------------------------------------------------------------------------------------
def test_a_wrong_passphrase_is_refused(two: Network, daemon: Daemon) -> None:
    server = daemon(two["server"], "-L", TUN.server(passphrase="right"))
    wrong = daemon(two["client"], "-L", TUN.client(two.address("server"), passphrase="wrong"))
    server.wait_for("is refused")
    assert not ping(two["client"], TUN.nets["server"][0], 1)
    wrong.stop()
    daemon(two["client"], "-L", TUN.client(two.address("server"), passphrase="right"))
    assert ping(two["client"], TUN.nets["server"][0])


def test_an_auther_knows_each_address(two: Network, daemon: Daemon) -> None:
    auths = [{"username": address, "password": f"of-{address}"[:16]} for address in TUN.nets["client"][:1]]
    service = {
        "name": "vpn",
        "addr": f":{PORT}",
        "handler": {"type": "tun", "auther": "peers"},
        "listener": {"type": "tun", "metadata": {"net": TUN.net("server"), "name": "tun-server"}},
    }
    server = daemon(two["server"], {"services": [service], "authers": [{"name": "peers", "auths": auths}]})
    query = {"net": f"{TUN.nets['client'][0]}/24", "passphrase": auths[0]["password"]}
    impostor = {"net": f"{TUN.nets['other'][0]}/24", "passphrase": auths[0]["password"]}
    forged = daemon(two["client"], "-L", TUN.client(two.address("server"), **impostor))
    server.wait_for("is refused")
    forged.stop()
    daemon(two["client"], "-L", TUN.client(two.address("server"), **query))
    assert ping(two["client"], TUN.nets["server"][0])


def failed(place: str, *words: str, before: tuple[str, ...] = ()) -> str:
    """Run gostnet, which must refuse; return what it said."""
    process = Process([*before, sys.executable, "-m", "gostnet", *words], place)
    with process:
        assert process.wait(20) == 1
        return process.errors


def test_a_name_in_use_a_port_in_use_and_a_missing_address(two: Network, daemon: Daemon, unchanged: Any) -> None:
    daemon(two["server"], "-L", TUN.server()).wait_for("engine ")
    with unchanged(two["server"]):
        other = ("--instance", "second")
        again = TUN.server().replace(f":{PORT}", ":8422")
        said = failed(two["server"], *other, "-L", again)
        assert "tun-server" in said
        assert "in use" in said
        taken = failed(two["server"], *other, "-L", TUN.server(name="tun-second"))
        assert str(PORT) in taken
        assert "in use" in taken.lower()
        assert "at least one address" in failed(two["server"], *other, "-L", f"tun://:0/192.0.2.1:{PORT}")
        bad = failed(two["server"], *other, "-L", "tun://:8423?net=192.168.1.1/24,nonsense")
        assert "nonsense" in bad
    assert "tun-second" not in links(two["server"])


def test_no_device_file_and_no_capability(two: Network, unchanged: Any, peer: Callable[[str], str]) -> None:
    with unchanged(two["server"]):
        hide = ('mount -t tmpfs none /dev/net && exec "$@"', "sh")
        said = failed(two["server"], "-L", TUN.server(), before=(peer("unshare"), "-m", "sh", "-c", *hide))
        assert "/dev/net/tun is missing" in said
        assert "modprobe tun" in said
        said = failed(two["server"], "-L", TUN.server(), before=(peer("setpriv"), "--bounding-set=-net_admin"))
        assert "CAP_NET_ADMIN" in said


# ---- no trace -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ["TERM", "INT", "KILL"])
def test_nothing_is_left_whatever_the_ending(two: Network, daemon: Daemon, unchanged: Any, ending: str) -> None:
    route = two.address("server").rpartition(".")[0] + ".0/24"  # one that is there already, and comes back
    with unchanged(two["client"], timeout=5.0):
        client = daemon(two["client"], "-L", TUN.client("192.0.2.1", route=f"10.55.0.0/16,{route}"))
        with netns.inside(two["client"]):
            routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
        assert f"{route} dev tun-client" in routes
        assert "tun-client" in links(two["client"])
        client.send(getattr(signal, f"SIG{ending}"))
        assert client.wait() == (-signal.SIGKILL if ending == "KILL" else 0)


def test_the_name_and_the_namespace_may_be_chosen_by_others(two: Network, daemon: Daemon) -> None:
    """Without `name` the kernel chooses; with `netns` device and socket are in another namespace than the daemon."""
    daemon(two["client"], "-L", f"tun://:{PORT}?net=192.168.123.1/24&netns={two['server']}")
    assert "tun0" in links(two["server"])
    assert "tun0" not in links(two["client"])
    url = TUN.client(two.address("server")).replace("name=tun-client", "tun.name=tunnel7")
    daemon(two["client"], "--instance", "second", "-L", url)
    assert "tunnel7" in links(two["client"])
    assert ping(two["client"], TUN.nets["server"][0])


def test_plan_shows_the_device(two: Network, unchanged: Any) -> None:
    with unchanged(two["server"]):
        planned = run_program(
            [sys.executable, "-m", "gostnet", "plan", "-L", TUN.server(route="10.55.0.0/16")], two["server"]
        )
        lines = planned.output.splitlines()
        assert "+ ip link set dev tun-server mtu 1420 up" in lines
        assert f"+ ip address add {TUN.nets['server'][0]}/24 dev tun-server" in lines
        assert any(line.startswith("+ ip route add 10.55.0.0/16 dev tun-server") for line in lines)
