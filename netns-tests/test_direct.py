"""Direct traffic that stays in the kernel, and port forwards by the kernel: with counters, reloads and endings."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet.core.address import Endpoint
from gostnet.kernel import netns
from gostnet.testing.clients import connect, echo_datagram, fetch
from gostnet.testing.namespaces import Network, read_sysctl, write_sysctl
from gostnet.testing.processes import Process, ProcessFailed, gostnet
from gostnet.testing.servers import Servers
from gostnet.testing.state import await_same, snapshot

pytestmark = pytest.mark.netns

METHODS = pytest.mark.parametrize("method", ["redirect", "tproxy"])
ELSEWHERE = "203.0.113.0/24"
Daemon = Callable[..., Process]


def configuration(method: str, capture: str, direct: str, bypass: Mapping[str, Any], **service: Any) -> dict[str, Any]:
    """TCP and UDP through a proxy of the same daemon, but what the bypass of its hop contains."""
    keys = {"capture": capture, "direct": direct}
    node = {"name": "proxy", "addr": "127.0.0.1:1080", "connector": {"type": "socks5"}, "dialer": {"type": "tcp"}}
    return {
        "log": {"level": "debug"},
        "services": [
            {
                "name": "tcp",
                "addr": ":12345",
                "handler": {"type": "red", "chain": "out"},
                "listener": {"type": "red", "metadata": {**keys, "tproxy": method == "tproxy"}},
                **service,
            },
            {
                "name": "udp",
                "addr": ":12346",
                "handler": {"type": "redu", "chain": "out"},
                "listener": {"type": "redu", "metadata": keys},
                **service,
            },
            {
                "name": "proxy",
                "addr": "127.0.0.1:1080",
                "handler": {"type": "socks5", "metadata": {"udp": True}},
                "listener": {"type": "tcp"},
            },
        ],
        "chains": [{"name": "out", "hops": [{"name": "hop", "bypass": "direct", "nodes": [node]}]}],
        "bypasses": [{"name": "direct", **bypass}],
    }


def listed(network: Network, place: str = "gateway") -> str:
    """Return the rules of a host in the words of nft(8)."""
    command = ["ip", "netns", "exec", network[place], "nft", "list", "ruleset"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def counted(network: Network, comment: str) -> int:
    """Return how many packets the rules with a comment have counted."""
    rules = [line for line in listed(network).splitlines() if line.endswith(f'comment "{comment}"')]
    assert rules, f"no rule {comment!r}"
    return sum(int(line.partition("counter packets ")[2].partition(" ")[0] or 0) for line in rules)


def served(process: Process, service: str) -> int:
    """Return how many connections a service has served."""
    return sum(1 for record in process.records if record.get("service") == service and ">-<" in str(record["msg"]))


def await_true(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def exchange(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    assert sock.recv(100) == data


@METHODS
@pytest.mark.parametrize("capture", ["lan0", "local"])
def test_direct_traffic_does_not_touch_the_daemon_and_the_rest_does(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, peer: Any, method: str, capture: str
) -> None:
    peer("nft")
    source = three["client" if capture == "lan0" else "gateway"]
    matchers = [f"{three.address('server', 4)}/32", "2001:db8::/32"]
    with unchanged(three["gateway"]):
        process = daemon(three["gateway"], configuration(method, capture, "kernel", {"matchers": matchers}))
        fetch(source, servers.endpoint("http", 4), "/bytes/300000")
        assert servers.witness.all("http")[-1].client.host == three.address("gateway", 4, "wan0")
        payload = os.urandom(3000)
        target = servers.endpoint("echo/udp", 4)
        assert echo_datagram(source, target, payload) == (payload, target)
        assert counted(three, "tcp: direct") == 1
        assert counted(three, "udp: direct") > 0
        assert served(process, "tcp") == served(process, "udp") == 0
        fetch(source, servers.endpoint("http", 6), "/")
        target = servers.endpoint("echo/udp", 6)
        assert echo_datagram(source, target, payload) == (payload, target)
        await_true(lambda: served(process, "tcp") == 1, "the captured connection is not in the log")
        assert counted(three, "tcp: direct") == 1
        assert counted(three, "tcp") > 0
        assert process.stop() == 0


@METHODS
def test_a_reload_of_the_list_moves_networks_and_keeps_connections(
    three: Network, servers: Servers, daemon: Daemon, tmp_path: Path, unchanged: Any, peer: Any, method: str
) -> None:
    peer("nft")
    path = tmp_path / "list"
    path.write_text(f"{ELSEWHERE}\n")
    bypass = {"file": {"path": str(path)}, "reload": "1s"}
    http, stream, datagrams = (servers.endpoint(name) for name in ("http", "echo/tcp", "echo/udp"))
    with unchanged(three["gateway"]), ExitStack() as stack:
        process = daemon(three["gateway"], configuration(method, "lan0", "kernel", bypass))
        captured = stack.enter_context(connect(three["client"], stream))
        exchange(captured, b"before")
        flow = stack.enter_context(associated(three["client"], datagrams))
        exchange(flow, b"captured")
        assert counted(three, "tcp: direct") == 0

        path.write_text(f"{ELSEWHERE}\n{three.address('server')}/32\n")
        await_true(lambda: fetch_counts(three, http, "tcp: direct"), "the network does not go direct")
        direct = stack.enter_context(connect(three["client"], stream))
        exchange(direct, b"direct")
        exchange(captured, b"still captured")
        before = counted(three, "udp")
        exchange(flow, b"still captured")
        assert counted(three, "udp") == before + 1
        fresh = stack.enter_context(associated(three["client"], datagrams))
        exchange(fresh, b"direct")

        path.write_text(f"{ELSEWHERE}\n")
        await_true(lambda: fetch_counts(three, http, "tcp"), "the network is not captured again")
        exchange(direct, b"still direct")
        exchange(captured, b"still captured")
        before = counted(three, "udp: direct")
        exchange(fresh, b"still direct")
        assert counted(three, "udp: direct") == before + 1
        stack.close()
        assert process.stop(timeout=20) == 0  # what is open has its time to end


def associated(place: str, target: Endpoint) -> socket.socket:
    """Return a datagram socket connected to a target."""
    sock = netns.socket_in(place, socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.connect(tuple(target))
    return sock


def fetch_counts(network: Network, target: Endpoint, comment: str) -> bool:
    """Fetch, and tell whether the rule with a comment has seen it; no fetch may fail."""
    before = counted(network, comment)
    fetch(network["client"], target, "/")
    return counted(network, comment) > before


def test_automatically_only_the_hosts_own_traffic_stays_in_the_kernel(
    three: Network, servers: Servers, daemon: Daemon, peer: Any
) -> None:
    peer("nft")
    settings = configuration("tproxy", "lan0,local", "auto", {"matchers": [f"{three.address('server')}/32"]})
    process = daemon(three["gateway"], settings)
    fetch(three["gateway"], servers.endpoint("http"), "/")
    assert counted(three, "tcp: direct") == 1
    fetch(three["client"], servers.endpoint("http"), "/")
    await_true(lambda: served(process, "tcp") == 1, "what came by lan0 was not captured")
    assert counted(three, "tcp: direct") == 1
    process.wait_for(lambda line: "what enters by lan0 would have to be forwarded" in line)


@pytest.mark.parametrize("direct", ["auto", "kernel"])
def test_a_service_whose_policies_want_every_connection_gets_them(
    three: Network, servers: Servers, daemon: Daemon, direct: str, tmp_path: Path
) -> None:
    settings = configuration(
        "redirect", "local", direct, {"matchers": [f"{three.address('server')}/32"]}, climiter="few"
    )
    settings["climiters"] = [{"name": "few", "limits": ["$ 100"]}]
    if direct == "kernel":
        with pytest.raises(ProcessFailed, match="climiter counts connections"):
            daemon(three["gateway"], settings)
        return
    process = daemon(three["gateway"], settings)
    fetch(three["gateway"], servers.endpoint("http"), "/")
    await_true(lambda: served(process, "tcp") == 1, "the connection is not in the log")
    process.wait_for(lambda line: "climiter counts connections" in line)


def test_the_plan_shows_what_stays_in_the_kernel_and_why_not(three: Network, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    settings = configuration("redirect", "lan0,local", "auto", {"matchers": ["192.0.2.0/24", "2001:db8::/32"]})
    path.write_text(yaml.safe_dump(settings))
    with gostnet("plan", "-C", str(path), place=three["gateway"]) as process:
        assert process.wait() == 0
        assert "192.0.2.0-192.0.2.255" in process.output
        assert "# service tcp: direct tcp traffic: 2 ranges of addresses stay in the kernel" in process.output


def test_100000_networks_load_while_connections_go_on(
    three: Network, servers: Servers, daemon: Daemon, tmp_path: Path, unchanged: Any, peer: Any
) -> None:
    peer("nft")
    path = tmp_path / "list"
    networks = [f"{20 + (i >> 16)}.{i >> 8 & 255}.{i & 255}.0/25" for i in range(100_000)]
    path.write_text(f"{ELSEWHERE}\n")
    bypass = {"file": {"path": str(path)}, "reload": "1s"}
    with unchanged(three["gateway"]), ExitStack() as stack:
        process = daemon(three["gateway"], configuration("tproxy", "lan0", "kernel", bypass))
        sock = stack.enter_context(connect(three["client"], servers.endpoint("echo/tcp")))
        path.write_text("\n".join([*networks, f"{three.address('server')}/32", "2001:db8::/32"]))
        begun = time.monotonic()
        slowest = 0.0
        while listed(three).count(".0/25") < 100_000:
            assert time.monotonic() - begun < 20, "the list is not in the kernel"
            asked = time.monotonic()
            exchange(sock, b"meanwhile")
            slowest = max(slowest, time.monotonic() - asked)
        assert slowest < 0.5
        assert fetch_counts(three, servers.endpoint("http"), "tcp: direct")
        assert process.stop(timeout=20) == 0


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_forwarding_is_set_for_direct_traffic_and_restored_whatever_the_end(
    three: Network, servers: Servers, daemon: Daemon, ending: int
) -> None:
    gateway = three["gateway"]
    write_sysctl(gateway, "net.ipv4.ip_forward", 0)
    before = snapshot(gateway)
    settings = configuration("tproxy", "lan0", "kernel", {"matchers": [f"{three.address('server')}/32"]})
    process = daemon(gateway, settings)
    assert read_sysctl(gateway, "net.ipv4.ip_forward") == "1"
    fetch(three["client"], servers.endpoint("http"), "/")
    assert servers.witness.all("http")[-1].client.host == three.address("gateway", 4, "wan0")
    if ending == signal.SIGKILL:
        process.kill()
    else:
        process.stop()
    assert not await_same(before, gateway, timeout=5.0)


# ---- port forwards ------------------------------------------------------------------------------
def forwarding(target: str, port: int, listener: str = "tcp", **handler: Any) -> dict[str, Any]:
    """A port forward by the kernel; `handler` adds to its metadata."""
    node = {"name": "target", "addr": f"[{target}]:{port}" if ":" in target else f"{target}:{port}"}
    return {
        "log": {"level": "debug"},
        "services": [
            {
                "name": "web",
                "addr": ":8080",
                "handler": {"type": listener, "metadata": {"engine": "kernel", **handler}},
                "listener": {"type": listener},
                "forwarder": {"nodes": [node]},
            }
        ],
    }


@pytest.mark.parametrize("version", [4, 6])
def test_the_kernel_forwards_tcp_for_others_and_for_the_host_itself(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, peer: Any, version: int
) -> None:
    peer("nft")
    target = servers.endpoint("http", version)
    here = Endpoint(three.address("gateway", version, "lan0"), 8080)
    with unchanged(three["gateway"]):
        process = daemon(three["gateway"], forwarding(*target))
        for place in ("client", "gateway"):
            assert fetch(three[place], here, "/bytes/300000").status == 200
            assert servers.witness.all("http")[-1].client.host == three.address("gateway", version, "wan0")
        assert counted(three, "web") == counted(three, "web: answers") == 2
        assert served(process, "web") == 0
        process.wait_for(lambda line: "the kernel forwards tcp to" in line)
        loopback = Endpoint("127.0.0.1" if version == 4 else "::1", 8080)
        assert fetch(three["gateway"], loopback, "/").status == 200
        await_true(lambda: served(process, "web") == 1, "the listener has not served a loopback address")
        assert process.stop() == 0


@pytest.mark.parametrize("version", [4, 6])
def test_the_kernel_forwards_udp(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, peer: Any, version: int
) -> None:
    peer("nft")
    here = Endpoint(three.address("gateway", version, "lan0"), 8080)
    with unchanged(three["gateway"]):
        process = daemon(three["gateway"], forwarding(*servers.endpoint("echo/udp", version), "udp"))
        payload = os.urandom(1200)
        for place in ("client", "gateway"):
            assert echo_datagram(three[place], here, payload) == (payload, here)
        assert counted(three, "web") == 2
        assert served(process, "web") == 0
        assert process.stop() == 0


def test_iperf3_and_curl_through_a_forward(three: Network, servers: Servers, daemon: Daemon, peer: Any) -> None:
    iperf, curl = peer("iperf3"), peer("curl")
    inside = ["ip", "netns", "exec"]
    here = three.address("gateway", 4, "lan0")
    daemon(three["gateway"], forwarding(three.address("server"), 5201))
    listening = subprocess.Popen([*inside, three["server"], iperf, "-s", "-1", "--forceflush"], stdout=subprocess.PIPE)
    try:
        assert listening.stdout is not None
        while b"listening" not in listening.stdout.readline():
            pass
        command = [*inside, three["client"], iperf, "-c", here, "-p", "8080", "-n", "50M"]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
        assert counted(three, "web") >= 2
    finally:
        listening.kill()
        listening.communicate()
    other = forwarding(*servers.endpoint("http"))
    other["services"][0]["addr"] = ":8081"
    daemon(three["gateway"], "--instance", "second", other)
    command = [*inside, three["client"], curl, "-sf", f"http://{here}:8081/bytes/100000"]
    assert len(subprocess.run(command, check=True, capture_output=True).stdout) == 100_000


def test_a_forward_ends_without_a_trace_after_a_kill(three: Network, servers: Servers, daemon: Daemon) -> None:
    gateway = three["gateway"]
    write_sysctl(gateway, "net.ipv4.ip_forward", 0)
    before = snapshot(gateway)
    process = daemon(gateway, forwarding(*servers.endpoint("http")))
    assert read_sysctl(gateway, "net.ipv4.ip_forward") == "1"
    assert fetch(three["client"], Endpoint(three.address("gateway", 4, "lan0"), 8080), "/").status == 200
    process.kill()
    assert not await_same(before, gateway, timeout=5.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["services"][0].update(climiter="few"), "climiter counts connections"),
        (lambda c: c["services"][0].update(bypass="none"), "a bypass decides"),
        (lambda c: c["services"][0]["handler"]["metadata"].update(sniffing=True), "sniffing looks into"),
        (lambda c: c["services"][0]["handler"]["metadata"].update(proxyProtocol=1), "proxyProtocol"),
        (lambda c: c["services"][0]["handler"]["metadata"].update(idleTimeout="5s"), "idleTimeout"),
        (lambda c: c["services"][0]["listener"].update(type="tls"), "tls listener"),
        (lambda c: c["services"][0]["forwarder"]["nodes"].append({"name": "b", "addr": "10.0.0.1:1"}), "exactly one"),
        (lambda c: c["services"][0]["forwarder"].update(nodes=[{"name": "a", "addr": "web.lab:1"}]), "not an address"),
        (lambda c: c["services"][0]["forwarder"].update(nodes=[{"name": "a", "addr": "127.0.0.1:1"}]), "host itself"),
    ],
)
def test_a_forward_that_would_not_be_the_same_is_refused(
    three: Network, tmp_path: Path, unchanged: Any, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    settings = forwarding("192.0.2.1", 80)
    settings["climiters"] = [{"name": "few", "limits": ["$ 100"]}]
    settings["bypasses"] = [{"name": "none", "matchers": ["192.0.2.9"]}]
    change(settings)
    path = tmp_path / "refused.yaml"
    path.write_text(yaml.safe_dump(settings))
    with unchanged(three["gateway"]):
        for verb in ((), ("plan",)):
            with gostnet(*verb, "-C", str(path), place=three["gateway"]) as process:
                assert process.wait() == 1
                assert reason in process.errors


def test_the_plan_shows_a_forward(three: Network, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(forwarding("192.0.2.1", 80)))
    with gostnet("plan", "-C", str(path), place=three["gateway"]) as process:
        assert process.wait() == 0
        assert "dnat ip to 192.0.2.1:80" in process.output
        assert "# service web: the kernel forwards tcp to 192.0.2.1:80" in process.output
