"""The main job: a gateway whose daemon captures a client's TCP and UDP, and gives the host back as it was."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endings import ENDINGS, kill_while_it_starts

from gostnet.core.address import Endpoint
from gostnet.kernel import netns
from gostnet.testing.clients import connect, echo, echo_datagram, fetch, resolve
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process, gostnet
from gostnet.testing.servers import Servers, serving_in_thread

pytestmark = pytest.mark.netns

METHODS = pytest.mark.parametrize("method", ["redirect", "tproxy"])
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
Daemon = Callable[..., Process]


def configuration(method: str = "redirect", capture: str = "lan0", **extra: Any) -> dict[str, Any]:
    """TCP by `method` and UDP by TPROXY, straight to their destinations."""
    return {
        "services": [
            {
                "name": "tcp",
                "addr": ":12345",
                "handler": {"type": "red"},
                "listener": {"type": "red", "metadata": {"capture": capture, "tproxy": method == "tproxy", **extra}},
            },
            {
                "name": "udp",
                "addr": ":12346",
                "handler": {"type": "redu"},
                "listener": {"type": "redu", "metadata": {"capture": capture, "ttl": "5s", **extra}},
            },
        ]
    }


@METHODS
@VERSIONS
def test_tcp_and_udp_of_the_client_go_through_the_gateway(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, method: str, version: int
) -> None:
    gateway = three.address("gateway", version, "wan0")
    with unchanged(three["gateway"]):
        process = daemon(three["gateway"], configuration(method))
        fetch(three["client"], servers.endpoint("http", version), "/bytes/300000")
        assert servers.witness.all("http")[-1].client.host == gateway
        data = os.urandom(200_000)
        assert echo(three["client"], servers.endpoint("echo/tcp", version), data) == data
        target = servers.endpoint("echo/udp", version)
        for size in (0, 1, 1200, 1472, 4000, 9000):
            payload = os.urandom(size)
            answer, sender = echo_datagram(three["client"], target, payload)
            assert answer == payload
            assert sender == target
        assert servers.witness.all("echo/udp")[-1].client.host == gateway
        answer = resolve(three["client"], servers.endpoint("dns/udp", version), "web.lab")
        assert answer.records
        assert process.stop() == 0


@METHODS
def test_the_hosts_own_traffic_is_captured_and_never_loops(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, method: str
) -> None:
    with unchanged(three["gateway"]):
        process = daemon(three["gateway"], configuration(method, "local"))
        for version in (4, 6):
            fetch(three["gateway"], servers.endpoint("http", version), "/")
            payload = os.urandom(3000)
            answer, sender = echo_datagram(three["gateway"], servers.endpoint("echo/udp", version), payload)
            assert (answer, sender) == (payload, servers.endpoint("echo/udp", version))
        process.stop()
        flows = [line for line in process.errors.splitlines() if ">-<" in line]
        assert len(flows) == 4, flows


@VERSIONS
def test_udp_answers_arrive_whoever_holds_the_port(
    three: Network, servers: Servers, daemon: Daemon, version: int
) -> None:
    """Rows J of the pains: a name server of the gateway's own, started before or after us, is not in the way."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6

    def hold() -> socket.socket:
        sock = netns.socket_in(three["gateway"], family, socket.SOCK_DGRAM)
        sock.bind(("::" if version == 6 else "0.0.0.0", 53))
        return sock

    target = servers.endpoint("dns/udp", version)
    with hold():
        daemon(three["gateway"], configuration())
        assert resolve(three["client"], target, "web.lab").records
    assert resolve(three["client"], target, "web.lab").records
    with hold():
        assert resolve(three["client"], target, "web.lab").records


def test_traffic_to_the_gateway_itself_is_not_captured(three: Network, servers: Servers, daemon: Daemon) -> None:
    with serving_in_thread(three["gateway"], [three.address("gateway", 4, "lan0")]) as own:
        process = daemon(three["gateway"], configuration(capture="lan0,local"))
        assert fetch(three["client"], own.endpoint("http"), "/").status == 200
        assert own.witness.all("http")[-1].client.host == three.address("client")
        assert echo_datagram(three["client"], own.endpoint("echo/udp"), b"in")[0] == b"in"
        # Who comes from outside gets the answers of the gateway's own services, although `local` is captured.
        assert fetch(three["server"], Endpoint(three.address("gateway", 4, "lan0"), 80), "/").status == 200
        process.stop()
        assert ">-<" not in process.errors


def test_a_connection_to_the_listener_itself_is_refused_and_logged(
    three: Network, servers: Servers, daemon: Daemon
) -> None:
    for method in ("redirect", "tproxy"):
        process = daemon(three["gateway"], configuration(method))
        with connect(three["client"], Endpoint(three.address("gateway", 4, "lan0"), 12345)) as sock:
            assert sock.recv(1) == b""
        process.stop()
        assert "made to the listener itself" in process.errors


def test_tools_of_the_system_work_through_the_gateway(
    three: Network, servers: Servers, daemon: Daemon, peer: Callable[[str], str]
) -> None:
    curl, dig, ping = peer("curl"), peer("dig"), peer("ping")
    daemon(three["gateway"], configuration())
    web, names = servers.endpoint("http"), servers.endpoint("dns/udp")

    def run(*words: str) -> str:
        with netns.inside(three["client"]):
            return subprocess.run(words, capture_output=True, encoding="latin-1", timeout=20, check=True).stdout

    assert len(run(curl, "-sS", f"http://{web}/bytes/100000")) > 0
    assert three.address("server") in run(dig, "+short", f"@{names.host}", "web.lab")
    assert three.address("server") in run(dig, "+short", "+tcp", f"@{names.host}", "web.lab")
    assert " 0% packet loss" in run(ping, "-c1", "-W2", web.host)


# ---- no trace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@METHODS
def test_nothing_is_left_whatever_the_ending(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, ending: str, method: str
) -> None:
    with unchanged(three["gateway"], timeout=3.0):
        process = daemon(three["gateway"], configuration(method, "lan0,local"))
        assert fetch(three["client"], servers.endpoint("http"), "/").status == 200
        process.send(ENDINGS[ending])
        code = process.wait()
        assert code == (-signal.SIGKILL if ending == "kill" else 0)
    assert fetch(three["client"], servers.endpoint("http"), "/").status == 200
    assert servers.witness.all("http")[-1].client.host == three.address("client")


def test_nothing_is_left_by_a_kill_at_any_moment_of_the_start(three: Network) -> None:
    kill_while_it_starts(three["gateway"], configuration("tproxy", "lan0,local"), (0.1, 0.9))


def _guards(of: int) -> list[int]:
    """Return the pids of guards that watch the process `of`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"guard.py") or word == b"gostnet.kernel.guard" for word in words) and (
            str(of).encode() in words
        ):
            found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("cure", ["rollback", "start"])
def test_daemon_and_guard_killed_together_are_cleaned_up_by_the_next(
    three: Network, servers: Servers, daemon: Daemon, unchanged: Any, cure: str
) -> None:
    with unchanged(three["gateway"], timeout=3.0):
        process = daemon(three["gateway"], configuration("tproxy"))
        guards = _guards(process.pid)
        assert guards
        for pid in (*guards, process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        if cure == "rollback":
            done = gostnet("rollback", place=three["gateway"])
            done.start()
            assert done.wait() == 0
            assert "- ip rule" in done.output
            again = gostnet("rollback", place=three["gateway"])
            again.start()
            assert again.wait() == 0
            assert again.output.strip() == "nothing to roll back"
        else:
            daemon(three["gateway"], configuration("tproxy")).stop()


def test_rollback_leaves_the_living_alone(three: Network, servers: Servers, daemon: Daemon) -> None:
    daemon(three["gateway"], configuration("tproxy"))
    done = gostnet("rollback", place=three["gateway"])
    done.start()
    assert done.wait() == 0
    assert "default" in done.errors
    assert "nothing to roll back" in done.output
    fetch(three["client"], servers.endpoint("http"), "/")
    assert servers.witness.all("http")[-1].client.host == three.address("gateway", 4, "wan0")


def test_plan_says_what_run_does_and_changes_nothing(
    three: Network, daemon: Daemon, unchanged: Any, tmp_path: Path
) -> None:
    import json

    with unchanged(three["gateway"]):
        text = json.dumps(configuration("tproxy"))
        planned = gostnet("plan", "-C", text, place=three["gateway"])
        planned.start()
        assert planned.wait() == 0
        lines = planned.output.splitlines()
        assert any(line.startswith("+ ip rule add") for line in lines)
        assert any("tproxy to :12345" in line for line in lines)
        plain = gostnet("plan", "-L", "red://:8080", place=three["gateway"])
        plain.start()
        assert plain.wait() == 0
        assert plain.output.strip() == "no changes"


# ---- everything or nothing --------------------------------------------------------------------------
def test_a_port_in_use_is_an_error_and_nothing_is_applied(three: Network, unchanged: Any) -> None:
    with netns.socket_in(three["gateway"], socket.AF_INET6, socket.SOCK_DGRAM) as holder:
        holder.bind(("::", 12346))
        with unchanged(three["gateway"]):
            process = gostnet("-C", json.dumps(configuration()), place=three["gateway"])
            process.start()
            assert process.wait() == 1
            assert "12346" in process.errors
            assert "in use" in process.errors.lower()


def test_a_missing_capability_is_named_and_nothing_is_applied(
    three: Network, unchanged: Any, peer: Callable[[str], str]
) -> None:
    with unchanged(three["gateway"]):
        process = Process(
            [
                peer("setpriv"),
                "--bounding-set=-net_admin,-net_raw",
                *(sys.executable, "-m", "gostnet"),
                *("-C", json.dumps(configuration("tproxy"))),
            ],
            three["gateway"],
        )
        process.start()
        assert process.wait() == 1
        assert "CAP_NET_ADMIN" in process.errors


def test_reload_changes_the_capture_at_once_and_keeps_connections(
    three: Network, servers: Servers, daemon: Daemon, tmp_path: Path
) -> None:
    import yaml

    path = tmp_path / "live.yaml"
    path.write_text(yaml.safe_dump(configuration()))
    process = daemon(three["gateway"], "-C", str(path))
    kept = connect(three["client"], servers.endpoint("echo/tcp"))
    kept.sendall(b"before")
    assert kept.recv(100) == b"before"
    narrowed = configuration(**{"capture.exclude": [three.address("server") + "/32"]})
    path.write_text(yaml.safe_dump(narrowed))
    process.send(signal.SIGHUP)
    process.wait_for(lambda line: "config reloaded" in line)
    fetch(three["client"], servers.endpoint("http"), "/")
    assert servers.witness.all("http")[-1].client.host == three.address("client")
    fetch(three["client"], servers.endpoint("http", 6), "/")
    assert servers.witness.all("http")[-1].client.host == three.address("gateway", 6, "wan0")
    kept.sendall(b"after")
    assert kept.recv(100) == b"after"
    path.write_text("services: [{name: broken, addr: ':1', handler: {type: nonsense}}]\n")
    process.send(signal.SIGHUP)
    process.wait_for(lambda line: "the old one stays" in line)
    kept.sendall(b"still")
    assert kept.recv(100) == b"still"
    kept.close()
