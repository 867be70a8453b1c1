"""Tun2socks as users meet it: what is routed into a device or captured beside it, direct and through a real gost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from endings import ENDINGS, kill_while_it_starts

from gostnet.core.address import Endpoint
from gostnet.kernel import netns
from gostnet.kernel.bpf import attachment_problem
from gostnet.testing.clients import connect, echo, echo_datagram, fetch, ping, resolve
from gostnet.testing.namespaces import Network, write_sysctl
from gostnet.testing.processes import Process, gostnet, run_program
from gostnet.testing.servers import Servers, serving_in_thread

pytestmark = pytest.mark.netns

Daemon = Callable[..., Process]
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
ENGINES = pytest.mark.parametrize(
    "engine",
    [
        pytest.param("tcx", marks=pytest.mark.skipif(bool(attachment_problem()), reason=attachment_problem() or "-")),
        "clsact",
        "nat",
    ],
)
ROUTES = "10.99.2.0/24,fd99:2::/64"
"""The server's networks."""


def configuration(*, handler: Mapping[str, Any] | None = None, node: str = "", **listener: Any) -> dict[str, Any]:
    """One service; keys of the listener have `__` for a dot. `node` is the address of a relay."""
    metadata = {key.replace("__", "."): value for key, value in listener.items()}
    section: dict[str, Any] = {"type": "tungo", "metadata": dict(handler or {})}
    found: dict[str, Any] = {
        "log": {"level": "debug"},
        "services": [
            {"name": "t", "addr": ":0", "handler": section, "listener": {"type": "tungo", "metadata": metadata}}
        ],
    }
    if node:
        section["chain"] = "out"
        node_section = {"name": "exit", "addr": node, "connector": {"type": "relay"}, "dialer": {"type": "tcp"}}
        found["chains"] = [{"name": "out", "hops": [{"name": "hop", "nodes": [node_section]}]}]
    return found


def flows(process: Process, network: str = "") -> list[dict[str, Any]]:
    """Return what the daemon says of the flows that have ended."""
    found = [record for record in process.records if record.get("kind") == "handler" and "sid" in record]
    return [record for record in found if "inputBytes" in record and network in ("", record["network"])]


def exchange(place: str, servers: Servers, version: int) -> None:
    """TCP, UDP of several sizes, and names; answers come from whom they were asked of."""
    assert len(fetch(place, servers.endpoint("http", version), "/bytes/300000").body) == 300_000
    data = os.urandom(200_000)
    assert echo(place, servers.endpoint("echo/tcp", version), data) == data
    target = servers.endpoint("echo/udp", version)
    for size in (0, 1, 1472, 4000, 9000):
        payload = os.urandom(size)
        assert echo_datagram(place, target, payload) == (payload, target)
    assert resolve(place, servers.endpoint("dns/udp", version), "web.lab").records


# ---- what comes in -------------------------------------------------------------------------------
@ENGINES
@VERSIONS
@pytest.mark.parametrize("capture", ["routed", "routed-default", "local"])
def test_the_hosts_own_traffic_goes_in_and_ours_never_does(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, engine: str, version: int, capture: str
) -> None:
    cases: dict[str, dict[str, Any]] = {
        "routed": {"route": ROUTES, "net": "172.20.0.1/24,fd20::1/64"},
        "routed-default": {"route": "0.0.0.0/0,::/0"},
        "local": {"capture": "local"},
    }
    wanted = cases[capture]
    with unchanged(three["client"], timeout=3.0):
        process = daemon(three["client"], configuration(tungo__engine=engine, **wanted))
        exchange(three["client"], servers, version)
        assert process.stop() == 0
        assert f"engine {engine}" in process.errors
        # The name server, the sizes, and two of TCP: with a loop there would be more.
        assert (len(flows(process, "tcp")), len(flows(process, "udp"))) == (2, 6)
        assert not [record for record in flows(process) if "error" in record]


@VERSIONS
@pytest.mark.parametrize("engine", ["auto", "nat"])
@pytest.mark.parametrize("by", ["captured", "forwarded", "forwarded-default"])
def test_a_gateways_clients_go_in(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, version: int, engine: str, by: str
) -> None:
    """Interfaces are captured beside the device; what is routed into the device is taken whoever sends it."""
    host = f"{three.address('server', version)}/{32 if version == 4 else 128}"
    cases: dict[str, dict[str, Any]] = {
        "captured": {"capture": ["lan0"]},
        "forwarded": {"route": host},
        # More specific than the host's own route to the server, as everything is than a default route.
        "forwarded-default": {"routes": [host, "0.0.0.0/0", "::/0"]},
    }
    wanted = cases[by]
    with unchanged(three["gateway"], timeout=3.0):
        process = daemon(three["gateway"], configuration(tungo__engine=engine, **wanted))
        if engine == "nat" and by != "captured":
            # What is forwarded comes in fragments where it is too large for the device on its way in.
            assert len(fetch(three["client"], servers.endpoint("http", version), "/bytes/300000").body) == 300_000
            assert echo_datagram(three["client"], servers.endpoint("echo/udp", version), b"small")[0] == b"small"
            process.stop()
            assert (len(flows(process, "tcp")), len(flows(process, "udp"))) == (1, 1)
            return
        exchange(three["client"], servers, version)
        assert servers.witness.all("http")[-1].client.host == three.address("gateway", version, "wan0")
        process.stop()
        assert (len(flows(process, "tcp")), len(flows(process, "udp"))) == (2, 6)


def test_more_specific_routes_of_the_host_stay(three: Network, servers: Servers, daemon: Daemon) -> None:
    process = daemon(three["gateway"], configuration(route="10.0.0.0/8,::/0"))
    assert fetch(three["client"], servers.endpoint("http"), "/").status == 200
    assert servers.witness.all("http")[-1].client.host == three.address("client")
    process.stop()
    assert not flows(process)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"net.ipv4.conf.all.rp_filter": 1}, {"route": ROUTES}),
        ({"net.ipv4.conf.all.rp_filter": 2}, {"capture": "local"}),
        ({"net.ipv4.conf.all.rp_filter": 1, "net.ipv4.conf.all.src_valid_mark": 1}, {"route": ROUTES}),
        ({"net.ipv4.tcp_early_demux": 0, "net.ipv4.udp_early_demux": 0}, {"route": ROUTES}),
        ({"net.ipv6.conf.default.disable_ipv6": 1}, {"route": ROUTES}),
    ],
    ids=["strict", "loose-local", "strict-marks", "no-early-demux", "no-ipv6-by-default"],
)
def test_settings_of_the_host_do_not_matter(
    three: Network, servers: Servers, daemon: Daemon, settings: Mapping[str, int], wanted: dict[str, Any]
) -> None:
    for key, value in settings.items():
        write_sysctl(three["client"], key, value)
    process = daemon(three["client"], configuration(**wanted))
    for version in (4, 6):
        exchange(three["client"], servers, version)
    process.stop()
    assert len(flows(process, "tcp")) == 4


def test_strict_checks_on_a_gateway(three: Network, servers: Servers, daemon: Daemon) -> None:
    for key in ("all.rp_filter", "all.src_valid_mark"):
        write_sysctl(three["gateway"], f"net.ipv4.conf.{key}", 1)
    process = daemon(three["gateway"], configuration(route=f"{three.address('server')}/32", capture="local"))
    exchange(three["client"], servers, 4)
    exchange(three["gateway"], servers, 4)
    process.stop()
    assert len(flows(process, "tcp")) == 4


def test_exclusions_and_ports_hold_for_local(three: Network, servers: Servers, daemon: Daemon) -> None:
    wanted: dict[str, Any] = {"capture": "local", "capture__exclude": ROUTES.partition(",")[2], "capture__ports": "80"}
    process = daemon(three["client"], configuration(**wanted))
    for version in (4, 6):
        fetch(three["client"], servers.endpoint("http", version), "/")
        echo_datagram(three["client"], servers.endpoint("echo/udp", version), b"x")
    process.stop()
    assert [record["dst"] for record in flows(process)] == [str(servers.endpoint("http", 4))]


def test_bypasses_see_the_host_that_clients_ask_for(three: Network, servers: Servers, daemon: Daemon) -> None:
    text = configuration(route=ROUTES, handler={"sniffing": True})
    text["services"][0]["bypass"] = "names"
    text["bypasses"] = [{"name": "names", "matchers": ["web.lab"]}]
    process = daemon(three["client"], text)
    for version in (4, 6):
        exchange(three["client"], servers, version)
    with connect(three["client"], servers.endpoint("http")) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: web.lab\r\n\r\n")
        try:
            assert b"200" not in sock.recv(100)
        except ConnectionResetError:
            pass
    process.wait_for("denied.bypass")


# ---- what stays out ------------------------------------------------------------------------------
@pytest.mark.parametrize("wanted", [{"route": "0.0.0.0/0,::/0"}, {"capture": "local"}], ids=["routed", "local"])
def test_replies_to_others_and_older_connections_keep_their_way(
    three: Network, servers: Servers, daemon: Daemon, wanted: dict[str, Any]
) -> None:
    client = three.address("client")
    with (
        serving_in_thread(three["client"], [client]) as own,
        connect(three["client"], servers.endpoint("echo/tcp")) as older,
        connect(three["server"], own.endpoint("echo/tcp")) as incoming,
    ):
        for sock in (older, incoming):
            sock.sendall(b"before")
            assert sock.recv(100) == b"before"
        process = daemon(three["client"], configuration(**wanted))
        for sock in (older, incoming):
            sock.sendall(b"after")
            assert sock.recv(100) == b"after"
        assert fetch(three["server"], own.endpoint("http"), "/bytes/100000").status == 200
        assert echo_datagram(three["server"], own.endpoint("echo/udp"), b"in")[0] == b"in"
        process.stop()
    assert not flows(process)


# ---- failures ------------------------------------------------------------------------------------
@VERSIONS
def test_a_destination_that_refuses_is_seen_as_such(
    three: Network, servers: Servers, daemon: Daemon, version: int
) -> None:
    target = Endpoint(three.address("server", version), 9)
    process = daemon(three["client"], configuration(route=ROUTES))
    with pytest.raises(ConnectionResetError), connect(three["client"], target) as sock:
        sock.recv(1)
    process.wait_for("dial.refused")


@VERSIONS
def test_udp_to_where_there_is_no_way_is_unreachable(three: Network, daemon: Daemon, peer: Any, version: int) -> None:
    host = {4: "198.51.100.7", 6: "2001:db8::7"}[version]
    ip = [peer("ip"), *([] if version == 4 else ["-6"])]
    ours = ["fwmark", "0x01000000/0x03000000"]
    run_program([*ip, "rule", "add", "pref", "100", *ours, "to", host, "unreachable"], three["client"])
    daemon(three["client"], configuration(routes=[f"{host}/{32 if version == 4 else 128}"]))
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with closing(netns.socket_in(three["client"], family, socket.SOCK_DGRAM)) as sock:
        sock.setblocking(True)
        sock.settimeout(10)
        sock.connect((host, 5))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)
    with pytest.raises(ConnectionResetError), connect(three["client"], Endpoint(host, 5)) as stream:
        stream.recv(1)


@VERSIONS
def test_udp_to_where_nobody_listens_is_unreachable(three: Network, daemon: Daemon, version: int) -> None:
    """The association is open by then: it is the remote host that says so."""
    daemon(three["client"], configuration(route=ROUTES))
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with closing(netns.socket_in(three["client"], family, socket.SOCK_DGRAM)) as sock:
        sock.setblocking(True)
        sock.settimeout(10)
        sock.connect((three.address("server", version), 5))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)


def test_policies_of_the_service_hold(three: Network, servers: Servers, daemon: Daemon) -> None:
    text = configuration(route=ROUTES)
    service = text["services"][0]
    service |= {"bypass": "not-v6", "admission": "who"}
    text["bypasses"] = [{"name": "not-v6", "matchers": ["fd99:2::/64"]}]
    text["admissions"] = [{"name": "who", "matchers": ["fd99:1::1"], "whitelist": True}]
    process = daemon(three["client"], text)
    with connect(three["client"], servers.endpoint("http", 6)) as sock:
        assert sock.recv(1) == b""
    process.wait_for("denied.bypass")
    assert fetch_fails(three["client"], servers.endpoint("http", 4))
    process.wait_for("not admitted")
    with pytest.raises(TimeoutError):
        ping(three["client"], three.address("server", 6), timeout=1)


def fetch_fails(place: str, target: Endpoint) -> bool:
    with connect(place, target) as sock:
        try:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return sock.recv(1) == b""
        except (ConnectionResetError, BrokenPipeError):
            return True


# ---- echo requests -------------------------------------------------------------------------------
@VERSIONS
def test_echo_requests_are_sent_on_where_the_way_is_direct(
    three: Network, servers: Servers, daemon: Daemon, version: int
) -> None:
    process = daemon(three["client"], configuration(route="10.99.2.0/24,fd99:2::/64,10.99.3.0/24"))
    payload = os.urandom(1000)
    assert ping(three["client"], three.address("server", version), payload) == payload
    if version == 4:
        with pytest.raises(TimeoutError):
            ping(three["client"], "10.99.3.9", timeout=1)  # nobody is there, and nobody says otherwise
    process.stop()
    assert flows(process, "ip")


@pytest.mark.parametrize(("mode", "answered"), [("answer", True), ("drop", False)])
def test_echo_requests_are_answered_or_dropped(three: Network, daemon: Daemon, mode: str, answered: bool) -> None:
    process = daemon(three["client"], configuration(route="198.51.100.0/24", handler={"tungo.ping": mode}))
    if answered:
        assert ping(three["client"], "198.51.100.9", b"hello") == b"hello"
    else:
        with pytest.raises(TimeoutError):
            ping(three["client"], "198.51.100.9", timeout=1)
    process.stop()
    assert flows(process, "ip")


# ---- through a real gost -------------------------------------------------------------------------
@pytest.mark.interop
@VERSIONS
@pytest.mark.parametrize("wanted", [{"route": "0.0.0.0/0,::/0"}, {"capture": "local"}], ids=["routed", "local"])
def test_through_a_real_gost(
    three: Network,
    servers: Servers,
    daemon: Daemon,
    gost_bin: str,
    peer: Callable[[str], str],
    version: int,
    wanted: dict[str, Any],
) -> None:
    gateway = three.address("gateway", 4, "lan0")
    with Process([gost_bin, "-L", "relay://:1080"], three["gateway"], name="gost") as gost:
        gost.wait_for("listening on")
        process = daemon(three["client"], configuration(node=f"{gateway}:1080", **wanted))
        exchange_through_gost(three["client"], servers, version)
        assert servers.witness.all("http")[-1].client.host == three.address("gateway", version, "wan0")
        assert servers.witness.all("echo/udp")[-1].client.host == three.address("gateway", version, "wan0")
        if "route" in wanted:  # whoever is behind a proxy cannot be asked, so the answer is ours
            assert ping(three["client"], "198.51.100.1") == b""
        process.stop()
        assert not [record for record in flows(process) if "error" in record]


def exchange_through_gost(place: str, servers: Servers, version: int) -> None:
    """As `exchange`, with datagrams that gost does not cut."""
    assert len(fetch(place, servers.endpoint("http", version), "/bytes/300000").body) == 300_000
    data = os.urandom(200_000)
    assert echo(place, servers.endpoint("echo/tcp", version), data) == data
    target = servers.endpoint("echo/udp", version)
    for size in (1, 1200, 3000):
        payload = os.urandom(size)
        assert echo_datagram(place, target, payload) == (payload, target)


@VERSIONS
def test_tools_of_the_system(
    three: Network, servers: Servers, daemon: Daemon, peer: Callable[[str], str], tmp_path: Path, version: int
) -> None:
    """curl, dig, ping, iperf3 by TCP and UDP, and SSH, where the server speaks first."""
    names = ("curl", "dig", "ping", "iperf3", "ssh-keygen", "ssh-keyscan", "sshd")
    curl, dig, ping_, iperf, keygen, keyscan, sshd = (peer(name) for name in names)
    key = tmp_path / "key"
    subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    host = three.address("server", version)

    def run(*words: str) -> str:
        with netns.inside(three["client"]):
            return subprocess.run(words, capture_output=True, encoding="latin-1", timeout=30, check=True).stdout

    process = daemon(three["client"], configuration(route="0.0.0.0/0,::/0"))
    with (
        Process([sshd, "-D", "-e", "-f", "/dev/null", "-h", str(key), "-p", "2222"], three["server"]) as ssh,
        Process([iperf, "-s", "-p", "5201", "--forceflush"], three["server"]) as iperf_server,
    ):
        ssh.wait_for("listening on")
        iperf_server.wait_for("listening on")
        assert len(run(curl, "-sS", f"http://{servers.endpoint('http', version)}/bytes/100000")) == 100_000
        assert three.address("server") in run(dig, "+short", f"@{host}", "web.lab")
        assert three.address("server") in run(dig, "+short", "+tcp", f"@{host}", "web.lab")
        assert " 0% packet loss" in run(ping_, "-c2", "-i0.2", "-W2", host)
        for words in ([], ["-R"], ["-u", "-b", "20M"], ["-u", "-b", "20M", "-R"]):
            report = json.loads(run(iperf, "-c", host, "-J", "-t", "1", *words))
            end = report["end"]
            assert (end.get("sum_received") or end["sum"])["bytes"] > 1_000_000, report
        assert "ssh-ed25519" in run(keyscan, "-p", "2222", "-t", "ed25519", host)
    process.stop()
    assert len(flows(process, "tcp")) >= 8


# ---- a stop --------------------------------------------------------------------------------------
def turn(sock: socket.socket, data: bytes) -> None:
    """Send, and take back from an echo server."""
    sock.sendall(data)
    back = bytearray()
    while len(back) < len(data):
        back += sock.recv(len(data) - len(back)) or pytest.fail("the connection ended")
    assert back == data


@ENGINES
@VERSIONS
def test_a_connection_that_runs_when_the_stop_comes_may_end_and_new_ones_are_reset(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, engine: str, version: int
) -> None:
    echoing = servers.endpoint("echo/tcp", version)
    with unchanged(three["client"], timeout=3.0):
        process = daemon(three["client"], configuration(tungo__engine=engine, route=ROUTES))
        assert echo_datagram(three["client"], servers.endpoint("echo/udp", version), b"1")[0] == b"1"
        with connect(three["client"], echoing) as sock:
            turn(sock, os.urandom(100_000))
            process.send(signal.SIGTERM)
            process.wait_for("stopping")
            for _ in range(3):
                with pytest.raises(ConnectionError):
                    echo(three["client"], echoing, b"1")
                turn(sock, os.urandom(300_000))
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        assert process.wait() == 0
        ((flow),) = flows(process, "tcp")
        assert (flow["inputBytes"], flow["outputBytes"]) == (1_000_000, 1_000_000)
        assert "error" not in flow


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_a_connection_that_runs(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, workers: int
) -> None:
    with unchanged(three["client"], timeout=3.0):
        process = daemon(three["client"], {"workers": workers, **configuration(route=ROUTES)})
        with connect(three["client"], servers.endpoint("echo/tcp")) as sock:
            turn(sock, b"1")
            process.send(signal.SIGTERM)
            process.wait_for("stopping")
            turn(sock, b"1")
            process.send(signal.SIGTERM)
            assert process.wait(timeout=3.0) == 0  # of the five that a drain has


# ---- no trace ------------------------------------------------------------------------------------
EVERYTHING: dict[str, Any] = {
    "route": "0.0.0.0/0,::/0,10.0.0.0/8",
    "capture": ["lan0", "local"],
    "net": "172.20.0.1/24",
}


@pytest.mark.parametrize("ending", ENDINGS)
@ENGINES
def test_nothing_is_left_whatever_the_ending(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, ending: str, engine: str
) -> None:
    with unchanged(three["gateway"], timeout=3.0):
        process = daemon(three["gateway"], configuration(tungo__engine=engine, **EVERYTHING))
        fetch(three["client"], servers.endpoint("http"), "/")
        process.send(ENDINGS[ending])
        assert process.wait() == (-signal.SIGKILL if ending == "kill" else 0)
    assert fetch(three["client"], servers.endpoint("http"), "/").status == 200
    assert servers.witness.all("http")[-1].client.host == three.address("client")


def test_nothing_is_left_by_a_kill_at_any_moment_of_the_start(three: Network) -> None:
    kill_while_it_starts(three["gateway"], configuration(**EVERYTHING), (0.2, 1.2), seed=20260102)


@pytest.mark.parametrize("wanted", [{"route": ROUTES}, EVERYTHING], ids=["routed", "everything"])
def test_plan_says_what_run_does_and_changes_nothing(
    three: Network, daemon: Daemon, unchanged: Any, wanted: dict[str, Any]
) -> None:
    with unchanged(three["gateway"]):
        planned = gostnet("plan", "-C", json.dumps(configuration(**wanted)), place=three["gateway"])
        planned.start()
        assert planned.wait() == 0
    lines = planned.output.splitlines()
    assert "+ sysctl -w net.ipv4.conf.tungo.accept_local=1" in lines
    assert "+ ip link set dev tungo mtu 1500 up" in lines
    assert any(line.startswith("+ ip route add ") and " dev tungo table 18510 " in line for line in lines)
    assert any("suppress_prefixlength 24" in line for line in lines) == (wanted != EVERYTHING)
    assert any('iifname "tungo" goto inlet_0' in line for line in lines)


# ---- the life of a daemon ------------------------------------------------------------------------
def test_reload_changes_the_routes(three: Network, servers: Servers, daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    path.write_text(json.dumps(configuration(route="10.99.2.0/24")))
    process = daemon(three["client"], "-C", str(path))
    exchange(three["client"], servers, 4)
    path.write_text(json.dumps(configuration(route="fd99:2::/64,0.0.0.0/0")))
    process.send(signal.SIGHUP)
    process.wait_for(lambda line: "config reloaded" in line)
    for version in (4, 6):
        exchange(three["client"], servers, version)
    process.stop()
    assert len(flows(process, "tcp")) == 6


def test_a_device_that_somebody_deletes_comes_back_with_its_routes(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, peer: Callable[[str], str]
) -> None:
    with unchanged(three["client"], timeout=3.0):
        process = daemon(three["client"], configuration(route=ROUTES, net="172.20.0.1/24"))
        process.wait_for("name: tungo")
        run_program([peer("ip"), "link", "del", "tungo"], three["client"])
        process.wait_for("device tungo is gone")
        process.wait_for(lambda line: process.errors.count("name: tungo") == 2)
        for version in (4, 6):
            exchange(three["client"], servers, version)
        assert len(process.errors.split("engine tcx")) > 1 or "engine clsact" in process.errors
        process.stop()
        assert len(flows(process, "tcp")) == 4


def test_an_address_in_use_is_no_obstacle(three: Network, servers: Servers, daemon: Daemon) -> None:
    with closing(netns.socket_in(three["client"], socket.AF_INET6, socket.SOCK_STREAM)) as holder:
        holder.bind(("::", 8421))
        holder.listen()
        text = configuration(route=ROUTES)
        text["services"][0]["addr"] = ":8421"
        process = daemon(three["client"], text)
        exchange(three["client"], servers, 4)
        assert "is in use; captured connections come to" in process.errors


def test_a_device_of_the_name_that_exists_is_an_error_and_nothing_is_left(
    three: Network, unchanged: Any, peer: Callable[[str], str]
) -> None:
    run_program([peer("ip"), "link", "add", "tungo", "type", "veth", "peer", "name", "other0"], three["client"])
    with unchanged(three["client"], timeout=3.0):
        process = gostnet("-C", json.dumps(configuration(route=ROUTES)), place=three["client"])
        process.start()
        assert process.wait() == 1
        assert "an interface of this name exists already" in process.errors


@ENGINES
def test_ours_that_is_routed_into_the_device_ends_there(
    three: Network, daemon: Daemon, peer: Callable[[str], str], engine: str
) -> None:
    """Somebody's route in the host's own table: the daemon's packets meet it, and must not come back as a client's."""
    text = configuration(net="172.20.0.1/24")
    text["services"][0]["metadata"] = {"dialTimeout": "1s"}
    text["services"][0]["listener"]["metadata"]["tungo.engine"] = engine
    process = daemon(three["client"], text)
    process.wait_for("name: tungo")
    run_program([peer("ip"), "route", "add", "198.51.100.0/24", "dev", "tungo"], three["client"])
    with pytest.raises(ConnectionResetError), connect(three["client"], Endpoint("198.51.100.9", 80)) as sock:
        sock.recv(1)
    process.stop()
    assert [record["code"].partition(".")[0] for record in flows(process, "tcp")] == ["dial"]
    assert ("somebody else's route leads there" in process.errors) == (engine == "tcx")
