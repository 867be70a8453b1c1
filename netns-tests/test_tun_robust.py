"""The VPN where things go wrong: loops, narrow ways, namespaces that vanish, liars, and peers that come and go."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from vpn import PATIENCE, PORT, TUN, ping

from gostnet.kernel import netns
from gostnet.protocols.tun import codec
from gostnet.testing.clients import echo, echo_datagram
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process, run_program
from gostnet.testing.servers import serving_in_thread

pytestmark = pytest.mark.netns

Daemon = Callable[..., Process]

ENGINES = pytest.mark.parametrize("engine", ["auto", "pump"])


def ip(place: str, *words: str) -> None:
    with netns.inside(place):
        subprocess.run(["ip", *words], check=True)


# ---- ways ---------------------------------------------------------------------------------------------
@ENGINES
def test_a_way_to_the_server_that_leads_into_the_tunnel_is_refused(three: Network, daemon: Daemon, engine: str) -> None:
    """No packet goes round, the reason is said, and a better route is taken at once."""
    server = three.address("server")
    daemon(three["server"], "-L", TUN.server(tun_engine=engine))
    route = server.rpartition(".")[0] + ".0/24"
    client = daemon(three["client"], "-L", TUN.client(server, route=route, tun_engine=engine))
    client.wait_for(f"the way to {server} leads into the tunnel itself")
    assert not ping(three["client"], TUN.nets["server"][0], 1)
    with netns.inside(three["client"]):
        shown = subprocess.run(["ip", "-s", "link", "show", "tun-client"], capture_output=True, text=True, check=True)
    sent = int(shown.stdout.split("TX:")[1].splitlines()[1].split()[1])
    assert sent < 20, "packets go round"
    ip(three["client"], "route", "add", f"{server}/32", "via", three.address("gateway", 4, "lan0"))
    assert ping(three["client"], TUN.nets["server"][0])
    # It is noticed later too: the better route goes away, and with it the way.
    ip(three["client"], "route", "del", f"{server}/32")
    deadline = time.monotonic() + PATIENCE
    while ping(three["client"], TUN.nets["server"][0], 1):
        assert time.monotonic() < deadline


@ENGINES
def test_a_way_that_is_too_narrow_is_told_and_packets_travel_in_fragments(
    two: Network, daemon: Daemon, engine: str
) -> None:
    for side, device in (("client", "wan0"), ("server", "lan0")):
        ip(two[side], "link", "set", device, "mtu", "1300")
    daemon(two["server"], "-L", TUN.server(tun_engine=engine))
    client = daemon(two["client"], "-L", TUN.client(two.address("server"), tun_engine=engine))
    said = client.wait_for("travel in fragments")
    assert "packets of more than 1272 bytes" in said
    assert "mtu=1272" in said
    full = ["ping", "-n", "-c3", "-i0.2", "-w10", "-M", "do", "-s", str(1420 - 28), TUN.nets["server"][0]]
    assert run_program(full, two["client"], timeout=20, check=False).wait() == 0
    with serving_in_thread(two["server"], list(TUN.nets["server"])) as servers:
        for version in (4, 6):
            data = os.urandom(300_000)
            assert echo(two["client"], servers.endpoint("echo/tcp", version), data) == data
            assert echo_datagram(two["client"], servers.endpoint("echo/udp", version), data[:3000])[0] == data[:3000]


@pytest.mark.parametrize("version", [4, 6])
def test_who_sends_too_large_packets_through_a_gateway_is_told(three: Network, daemon: Daemon, version: int) -> None:
    """The host behind the gateway, which is the client, learns the MTU of the tunnel."""
    daemon(three["server"], "-L", TUN.server(masquerade="true"))
    target = TUN.nets["server"][version == 6]
    daemon(three["gateway"], "-L", TUN.client(three.address("server"), masquerade="true"))
    assert ping(three["gateway"], target)
    size = 1500 - (28 if version == 4 else 48)
    words = ["ping", "-n", "-c2", "-i0.2", "-w3", "-M", "do", "-s", str(size), target]
    said = run_program(words, three["client"], timeout=20, check=False)
    assert said.wait() != 0
    assert "mtu = 1420" in said.output + said.errors or "mtu=1420" in said.output + said.errors
    assert ping(three["client"], target)


# ---- namespaces and networks ----------------------------------------------------------------------------
def test_a_namespace_that_is_deleted_under_it_ends_with_it(two: Network, daemon: Daemon, unchanged: Any) -> None:
    name = f"gn-{os.getpid()}-gone"
    netns.create(name)
    try:
        process = daemon(two["client"], "-L", TUN.server(netns=name))
        process.wait_for("engine ")
    finally:
        netns.delete(name)
    assert process.stop() == 0
    assert "Traceback" not in process.errors


def test_networks_that_overlap(two: Network, daemon: Daemon, unchanged: Any) -> None:
    """Two devices in one network with a route in common: the later one has it, and nothing is left of either."""

    def service(number: int) -> dict[str, Any]:
        metadata = {"net": f"192.168.123.{number}/24", "name": f"tun{number}", "route": "10.55.0.0/16"}
        listener = {"type": "tun", "metadata": metadata}
        return {"name": f"vpn{number}", "addr": f":{PORT + number}", "handler": {"type": "tun"}, "listener": listener}

    with unchanged(two["server"]):
        process = daemon(two["server"], {"services": [service(1), service(2)]})
        with netns.inside(two["server"]):
            shown = subprocess.run(["ip", "route", "show"], capture_output=True, text=True, check=True).stdout
        assert shown.count("10.55.0.0/16") == 1
        assert shown.count("192.168.123.0/24") == 2
        assert process.stop() == 0


# ---- liars ----------------------------------------------------------------------------------------------
def test_forged_registrations_change_nothing(three: Network, daemon: Daemon) -> None:
    """Another host knows the address and the port, but not the passphrase."""
    daemon(three["server"], "-L", TUN.server(passphrase="right"))
    daemon(three["client"], "-L", TUN.client(three.address("server"), passphrase="right"))
    assert ping(three["client"], TUN.nets["server"][0])
    addresses = [ip_address(text) for text in TUN.nets["client"]]
    whole = codec.encode_registration("wrong", addresses)
    lies = [whole, codec.encode_registration("", addresses), whole[:-1], codec.OFFER, b"GOST" + bytes(60000)]
    lies += [codec.encode_registration("right", [ip_address(TUN.nets["server"][0])]), codec.encode_answer("1.2.3.4")]
    target = (three.address("server"), PORT)
    with netns.inside(three["gateway"]):
        liar = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with liar:
        liar.settimeout(0.3)
        for lie in lies:
            liar.sendto(lie, target)
            with pytest.raises(TimeoutError):
                liar.recv(100)
    assert ping(three["server"], TUN.nets["client"][0], 2)


@pytest.mark.parametrize("reload", ["HUP", "itself"])
def test_a_user_who_is_taken_out_of_the_file_is_no_peer_any_more(
    two: Network, daemon: Daemon, tmp_path: Path, reload: str
) -> None:
    """The service is described as before, so it keeps its device; its peers do not outlive their authorisation."""
    users = tmp_path / "users"
    users.write_text("".join(f"{address} secret\n" for address in TUN.nets["client"]))
    service = {
        "name": "vpn",
        "addr": f":{PORT}",
        "handler": {"type": "tun", "auther": "peers"},
        "listener": {"type": "tun", "metadata": {"net": TUN.net("server"), "name": "tun-server"}},
    }
    auther = {"name": "peers", "file": {"path": str(users)}, "reload": "1s" if reload == "itself" else "0s"}
    server = daemon(two["server"], {"services": [service], "authers": [auther]})
    daemon(two["client"], "-L", TUN.client(two.address("server"), passphrase="secret"))
    for address in TUN.nets["client"]:
        assert ping(two["server"], address)
    with netns.inside(two["server"]):
        index = socket.if_nametoindex("tun-server")
    users.write_text(f"{TUN.nets['client'][1]} secret\n")
    if reload == "HUP":
        server.send(signal.SIGHUP)
    server.wait_for(f"{TUN.nets['client'][0]} at ", 20)
    server.wait_for("is no peer any more", 20)
    assert not ping(two["server"], TUN.nets["client"][0], 1)
    with netns.inside(two["server"]):
        assert socket.if_nametoindex("tun-server") == index
    users.write_text("".join(f"{address} secret\n" for address in TUN.nets["client"]))
    if reload == "HUP":
        server.send(signal.SIGHUP)
    assert ping(two["server"], TUN.nets["client"][0])


# ---- coming and going -----------------------------------------------------------------------------------
def resident(process: Process) -> int:
    """Return KiB of memory that is the process's own."""
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1])
    raise AssertionError("no Private_Dirty")


def descriptors(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


@ENGINES
def test_peers_that_come_and_go_leave_nothing_behind(two: Network, daemon: Daemon, unchanged: Any, engine: str) -> None:
    """For ten seconds: a client whose server vanishes, peers at ever new ports, devices that are deleted."""
    target = (two.address("server"), PORT)
    with unchanged(two["server"], timeout=5.0), unchanged(two["client"], timeout=5.0):
        server = daemon(two["server"], "-L", TUN.server(tun_engine=engine))
        client = daemon(two["client"], "-L", TUN.client(two.address("server"), tun_engine=engine))
        assert ping(two["client"], TUN.nets["server"][0])

        def turn(number: int) -> None:
            for low in range(50):
                with netns.inside(two["client"]):
                    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                with sock:
                    own = [ip_address(f"192.168.123.{100 + low}"), ip_address(f"fd00:123::{100 + low}")]
                    for datagram in (codec.encode_registration("", own), codec.OFFER):
                        sock.sendto(datagram, target)
            if number % 5 == 4:
                with netns.inside(two["server"]):
                    subprocess.run(["ip", "link", "del", "tun-server"], check=False, stderr=subprocess.DEVNULL)

        for number in range(10):
            turn(number)
            time.sleep(0.1)
        assert ping(two["client"], TUN.nets["server"][0])
        before = [(resident(p), descriptors(p)) for p in (server, client)]
        end = time.monotonic() + 10
        number = 0
        while time.monotonic() < end:
            turn(number)
            number += 1
            time.sleep(0.1)
        assert ping(two["client"], TUN.nets["server"][0])
        after = [(resident(p), descriptors(p)) for p in (server, client)]
        for (memory_before, open_before), (memory_after, open_after) in zip(before, after, strict=True):
            assert memory_after < memory_before + 4096
            # Some are open for a moment only; a device or a peer that left one behind would have left dozens.
            assert open_after <= open_before + 4
        assert client.stop() == 0
        assert server.stop() == 0
