"""Several workers on a gateway: one kernel state for all of them, given back whatever ends, and limits in total."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from endings import ENDINGS, kill_while_it_starts

from gostnet.core.address import Endpoint
from gostnet.kernel import netns
from gostnet.testing.clients import connect, echo, echo_datagram, fetch
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process, workers
from gostnet.testing.servers import Servers

pytestmark = pytest.mark.netns

METHODS = pytest.mark.parametrize("method", ["redirect", "tproxy"])
Daemon = Callable[..., Process]
Peer = Callable[[str], str]


def configuration(method: str = "redirect", capture: str = "lan0", **extra: Any) -> dict[str, Any]:
    """TCP by `method` and UDP by TPROXY, straight to their destinations, by two workers."""
    tcp = {"capture": capture, "tproxy": method == "tproxy", **extra}
    udp = {"capture": capture, "ttl": "5s", **extra}
    return {
        "workers": 2,
        "services": [
            {"name": "tcp", "addr": ":12345", "handler": {"type": "red"}, "listener": {"type": "red", "metadata": tcp}},
            {
                "name": "udp",
                "addr": ":12346",
                "handler": {"type": "redu"},
                "listener": {"type": "redu", "metadata": udp},
            },
        ],
    }


def run(place: netns.Place, *words: str) -> str:
    with netns.inside(place):
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout


@METHODS
@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_all_workers_serve_what_is_captured(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, method: str, version: int
) -> None:
    with unchanged(three["gateway"]):
        process = daemon(three["gateway"], configuration(method))
        data = os.urandom(20_000)
        for _ in range(30):
            assert echo(three["client"], servers.endpoint("echo/tcp", version), data) == data
            payload = os.urandom(3000)
            target = servers.endpoint("echo/udp", version)
            assert echo_datagram(three["client"], target, payload) == (payload, target)
        assert servers.witness.all("echo/tcp")[-1].client.host == three.address("gateway", version, "wan0")
        assert process.stop() == 0
    served = {(record["service"], record["worker"]) for record in process.records if ">-<" in record["msg"]}
    assert served == {("tcp", 0), ("tcp", 1), ("udp", 0), ("udp", 1)}


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_whatever_the_ending(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, ending: str
) -> None:
    with unchanged(three["gateway"], timeout=3.0):
        process = daemon(three["gateway"], configuration("tproxy", "lan0,local"))
        assert fetch(three["client"], servers.endpoint("http"), "/").status == 200
        process.send(ENDINGS[ending])
        assert process.wait() == (-signal.SIGKILL if ending == "kill" else 0)
    assert fetch(three["client"], servers.endpoint("http"), "/").status == 200
    assert servers.witness.all("http")[-1].client.host == three.address("client")


def test_nothing_is_left_by_a_kill_at_any_moment_of_the_start(three: Network) -> None:
    wanted = {**configuration("tproxy"), "workers": "2"}
    kill_while_it_starts(three["gateway"], wanted, (0.3, 1.6), times=5)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_capture_outlives_a_worker(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, victim: int
) -> None:
    with unchanged(three["gateway"]):
        process = daemon(three["gateway"], configuration())
        rules = run(three["gateway"], "nft", "-s", "list", "ruleset")
        os.kill(workers(process)[victim], signal.SIGKILL)
        process.wait_for("it is replaced now")
        for _ in range(20):  # some before its successor serves, some after
            fetch(three["client"], servers.endpoint("http"), "/")
            assert servers.witness.all("http")[-1].client.host == three.address("gateway", 4, "wan0")
        process.wait_for(f"worker {victim} serves again")
        assert run(three["gateway"], "nft", "-s", "list", "ruleset") == rules
        assert process.stop() == 0


def test_a_reload_changes_the_capture_for_all_workers(
    three: Network, servers: Servers, daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "live.yaml"
    path.write_text(yaml.safe_dump(configuration()))
    process = daemon(three["gateway"], "-C", str(path))
    kept = [connect(three["client"], servers.endpoint("echo/tcp")) for _ in range(8)]
    exclude: dict[str, Any] = {"capture.exclude": [three.address("server") + "/32"]}
    path.write_text(yaml.safe_dump(configuration(**exclude)))
    process.send(signal.SIGHUP)
    process.wait_for("config reloaded")
    for _ in range(4):
        fetch(three["client"], servers.endpoint("http"), "/")
        assert servers.witness.all("http")[-1].client.host == three.address("client")
    for sock in kept:
        sock.sendall(b"after")
        assert sock.recv(100) == b"after"
        sock.close()


def test_a_reload_that_fails_leaves_all_workers_serving(
    three: Network, servers: Servers, daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "live.yaml"
    path.write_text(yaml.safe_dump(configuration()))
    process = daemon(three["gateway"], "-C", str(path))
    with netns.socket_in(three["gateway"], socket.AF_INET6, socket.SOCK_STREAM) as holder:
        holder.bind(("::", 1080))
        holder.listen()
        changed = configuration("tproxy")
        changed["services"].append({"name": "taken", "addr": ":1080", "handler": {"type": "socks5"}})
        path.write_text(yaml.safe_dump(changed))
        process.send(signal.SIGHUP)
        process.wait_for("Address already in use; the old configuration stays")
    target = servers.endpoint("echo/udp")
    for _ in range(16):
        assert echo(three["client"], servers.endpoint("echo/tcp"), b"on") == b"on"
        assert echo_datagram(three["client"], target, b"on") == (b"on", target)
    assert servers.witness.all("echo/tcp")[-1].client.host == three.address("gateway", 4, "wan0")
    process.stop()
    assert {record["worker"] for record in process.records if ">-<" in record["msg"]} == {0, 1}


def test_a_device_belongs_to_the_first_worker_and_comes_back_with_its_successor(
    three: Network, daemon: Daemon, unchanged: Any
) -> None:
    device = {
        "name": "vpn",
        "addr": ":8421",
        "handler": {"type": "tun"},
        "listener": {"type": "tun", "metadata": {"name": "gnw0", "net": "172.20.0.1/24", "route": "172.21.0.0/24"}},
    }
    socks = {"name": "socks", "addr": ":1080", "handler": {"type": "socks5"}}
    with unchanged(three["gateway"], timeout=3.0):
        process = daemon(three["gateway"], {"workers": 2, "services": [device, socks]})
        listening = [(r["service"], r["worker"]) for r in process.records if r["msg"].startswith("listening")]
        assert sorted(listening) == [("socks", 0), ("socks", 1), ("vpn", 0)]

        def state() -> tuple[str, str]:
            addresses = json.loads(run(three["gateway"], "ip", "-j", "-4", "addr", "show", "dev", "gnw0"))
            routes = run(three["gateway"], "ip", "route", "show", "dev", "gnw0").strip()
            return addresses[0]["addr_info"][0]["local"], routes

        before = state()
        assert "172.21.0.0/24" in before[1]
        os.kill(workers(process)[0], signal.SIGKILL)
        process.wait_for("worker 0 serves again")
        assert state() == before
        assert process.stop() == 0


def direct(three: Network, path: Path) -> dict[str, Any]:
    """What enters by lan0 goes through a proxy, but what the list contains, which stays in the kernel."""
    keys = {"capture": "lan0", "direct": "kernel"}
    node = {"name": "n", "addr": "127.0.0.1:1080", "connector": {"type": "socks5"}, "dialer": {"type": "tcp"}}
    proxy = {"name": "proxy", "addr": "127.0.0.1:1080", "handler": {"type": "socks5"}, "listener": {"type": "tcp"}}
    captured = {
        "name": "tcp",
        "addr": ":12345",
        "handler": {"type": "red", "chain": "out"},
        "listener": {"type": "red", "metadata": keys},
    }
    return {
        "workers": 2,
        "services": [captured, proxy],
        "chains": [{"name": "out", "hops": [{"name": "hop", "bypass": "direct", "nodes": [node]}]}],
        "bypasses": [{"name": "direct", "file": {"path": str(path)}, "reload": "1s"}],
    }


def test_a_list_of_direct_networks_is_followed_by_whoever_is_first(
    three: Network, servers: Servers, daemon: Daemon, tmp_path: Path, unchanged: Any, peer: Peer
) -> None:
    """Changes of its file, one before and one after the death of the first worker, and a reload."""
    peer("nft")
    path = tmp_path / "list"
    server = three.address("server") + "/32"

    def stays(network: str) -> bool:
        return network in run(three["gateway"], "nft", "list", "ruleset")

    def listed(*networks: str) -> None:
        path.write_text("".join(f"{network}\n" for network in networks))

    def await_rules(network: str, there: bool) -> None:
        deadline = time.monotonic() + 10
        while stays(network) is not there:
            assert time.monotonic() < deadline, (network, there)
            time.sleep(0.05)

    def served() -> int:
        process.wait_for(lambda line: True)
        return sum(">-<" in record["msg"] and record.get("service") == "tcp" for record in process.records)

    listed("203.0.113.0/24")
    with unchanged(three["gateway"], timeout=3.0):
        process = daemon(three["gateway"], direct(three, path))
        assert stays("203.0.113.0/24")
        listed("203.0.113.0/24", server)
        await_rules(server.removesuffix("/32"), True)
        before = served()
        assert fetch(three["client"], servers.endpoint("http"), "/").status == 200
        os.kill(workers(process)[0], signal.SIGKILL)
        process.wait_for("worker 0 serves again")
        assert stays(server.removesuffix("/32"))
        assert fetch(three["client"], servers.endpoint("http"), "/").status == 200
        assert served() == before
        listed("198.51.100.0/24")
        await_rules("198.51.100.0/24", True)
        await_rules(server.removesuffix("/32"), False)
        process.send(signal.SIGHUP)
        process.wait_for("config reloaded")
        assert stays("198.51.100.0/24")
        assert fetch(three["client"], servers.endpoint("http"), "/").status == 200
        process.wait_for(lambda line: '"service":"tcp"' in line and ">-<" in line)
        assert process.stop() == 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_kernel_forwards_whatever_becomes_of_the_workers(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, peer: Peer, ending: str
) -> None:
    peer("nft")
    forward = {
        "name": "web",
        "addr": ":8080",
        "handler": {"type": "tcp", "metadata": {"engine": "kernel"}},
        "listener": {"type": "tcp"},
        "forwarder": {"nodes": [{"name": "target", "addr": str(servers.endpoint("http"))}]},
    }
    here = Endpoint(three.address("gateway", 4, "lan0"), 8080)
    with unchanged(three["gateway"], timeout=3.0):
        process = daemon(three["gateway"], {"workers": 2, "services": [forward]})
        for victim in (0, 1):
            assert fetch(three["client"], here, "/").status == 200
            os.kill(workers(process)[victim], signal.SIGKILL)
            assert fetch(three["client"], here, "/").status == 200
            process.wait_for(f"worker {victim} serves again")
        process.send(signal.SIGHUP)
        process.wait_for("config reloaded")
        assert fetch(three["client"], here, "/").status == 200
        assert not any(">-<" in record["msg"] for record in process.records), "no worker has seen any of it"
        process.send(ENDINGS[ending])
        process.wait()


def test_a_bandwidth_is_kept_in_total(three: Network, daemon: Daemon, peer: Peer) -> None:
    """iperf3 with eight streams, which go to both workers, under one limit of 5 MB a second."""
    iperf3 = peer("iperf3")
    limited = configuration()
    limited["services"][0]["limiter"] = "l"
    limited["limiters"] = [{"name": "l", "limits": ["$ 5MB 5MB 100KB"]}]
    process = daemon(three["gateway"], limited)
    with Process([iperf3, "-s", "-p", "5201", "--forceflush"], three["server"]) as server:
        server.wait_for("Server listening")
        words = (iperf3, "-c", three.address("server"), "-t", "5", "-O", "1", "-P", "8", "-R", "-J")
        result = json.loads(run(three["client"], *words))
    rate = result["end"]["sum_received"]["bits_per_second"] / 8
    assert 0.9 * (5 << 20) < rate < 1.1 * (5 << 20), rate
    process.stop()
    assert {record["worker"] for record in process.records if ">-<" in record["msg"]} == {0, 1}


def test_curl_through_both_workers(three: Network, servers: Servers, daemon: Daemon, peer: Peer) -> None:
    curl = peer("curl")
    process = daemon(three["gateway"], "--workers", "2", "-L", "socks5://:1080")
    proxy = Endpoint(three.address("gateway", 4, "lan0"), 1080)
    web = servers.endpoint("http")
    for _ in range(16):
        text = run(three["client"], curl, "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-x", f"socks5://{proxy}",
                   f"http://{web}/bytes/100000")  # fmt: skip
        assert text == "200"
    process.stop()
    assert {record["worker"] for record in process.records if ">-<" in record["msg"]} == {0, 1}
