"""Sniffing of captured traffic with real clients: curl, OpenSSL, OpenSSH; QUIC as aioquic begins it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from gostnet.kernel import netns
from gostnet.testing.clients import echo_datagram
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process
from gostnet.testing.servers import Servers

pytestmark = pytest.mark.netns

Daemon = Callable[..., Process]
Peer = Callable[[str], str]
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


def gateway(**metadata: Any) -> dict[str, Any]:
    """Capture TCP and UDP; `*.blocked.test` is refused, the destination stays what it was."""
    sniffing = {"sniffing": True, "sniffing.dialOriginalDst": True, **metadata}
    return {
        "services": [
            {
                "name": "tcp",
                "addr": ":12345",
                "bypass": "blocked",
                "handler": {"type": "red", "metadata": sniffing},
                "listener": {"type": "red", "metadata": {"capture": "lan0"}},
            },
            {
                "name": "udp",
                "addr": ":12346",
                "bypass": "blocked",
                "handler": {"type": "redu", "metadata": {"sniffing": True}},
                "listener": {"type": "redu", "metadata": {"capture": "lan0"}},
            },
        ],
        "bypasses": [{"name": "blocked", "matchers": ["*.blocked.test"]}],
    }


def curl(place: str, program: str, url: str, host: str, address: str) -> subprocess.CompletedProcess[bytes]:
    port = "443" if url.startswith("https") else "80"
    shown = f"[{address}]" if ":" in address else address
    words = [program, "-sS", "-k", "--max-time", "10", "--resolve", f"{host}:{port}:{shown}", url]
    with netns.inside(place):
        return subprocess.run(words, capture_output=True, timeout=30, check=False)


def flows(process: Process) -> list[dict[str, Any]]:
    process.stop()
    lines = [json.loads(line) for line in process.errors.splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("kind") == "handler"]


@VERSIONS
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_curl_is_refused_by_name_and_passes_under_others(
    three: Network, servers: Servers, daemon: Daemon, peer: Peer, scheme: str, version: int
) -> None:
    program = peer("curl")
    process = daemon(three["gateway"], gateway())
    address = three.address("server", version)
    refused = curl(three["client"], program, f"{scheme}://www.blocked.test/bytes/100", "www.blocked.test", address)
    assert refused.returncode in (35, 52, 56), refused.stderr  # the handshake, or the answer, never came
    assert not servers.witness.all(scheme)
    passed = curl(three["client"], program, f"{scheme}://open.test/bytes/100000", "open.test", address)
    assert passed.returncode == 0, passed.stderr
    assert len(passed.stdout) == 100_000
    records = flows(process)
    assert [record["host"] for record in records] == ["www.blocked.test", "open.test"]
    assert records[0]["code"] == "denied.bypass"
    assert records[1].get("code") in (None, "conn")  # curl may leave with answers unread, which is a reset
    protocol = "http" if scheme == "http" else "tls"
    assert records[1]["reason"] == f"{protocol} for open.test"


def test_openssl_without_a_name_goes_to_where_it_was_going(
    three: Network, servers: Servers, daemon: Daemon, peer: Peer
) -> None:
    openssl = peer("openssl")
    daemon(three["gateway"], gateway())
    words = [openssl, "s_client", "-noservername", "-brief", "-connect", str(servers.endpoint("https"))]
    with netns.inside(three["client"]):
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    assert "CONNECTION ESTABLISHED" in done.stderr


def test_ssh_is_not_held_up(three: Network, daemon: Daemon, peer: Peer, tmp_path: Path) -> None:
    keygen, sshd = peer("ssh-keygen"), peer("sshd")
    process = daemon(three["gateway"], gateway(**{"sniffing.timeout": "60s"}))
    key = tmp_path / "host"
    subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    with Process([sshd, "-D", "-e", "-f", "/dev/null", "-h", str(key), "-p", "2222"], three["server"]) as server:
        server.wait_for("Server listening")
        ssh = [
            *(peer("ssh"), "-p", "2222", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"),
            *("-o", f"UserKnownHostsFile={tmp_path / 'known'}", three.address("server"), "true"),
        ]
        began = time.monotonic()
        with netns.inside(three["client"]):
            done = subprocess.run(ssh, capture_output=True, text=True, timeout=60, check=False)
        assert "Permission denied" in done.stderr or done.returncode == 0  # it came as far as to be asked who it is
        assert time.monotonic() - began < 20
    assert [record["reason"] for record in flows(process)] == ["ssh"]


def test_client_that_waits_for_its_server_is_served_after_a_moment(
    three: Network, daemon: Daemon, peer: Peer, tmp_path: Path
) -> None:
    keygen, keyscan, sshd = peer("ssh-keygen"), peer("ssh-keyscan"), peer("sshd")
    daemon(three["gateway"], gateway())
    key = tmp_path / "host"
    subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    with Process([sshd, "-D", "-e", "-f", "/dev/null", "-h", str(key), "-p", "2222"], three["server"]) as server:
        server.wait_for("Server listening")
        with netns.inside(three["client"]):
            words = [keyscan, "-t", "ed25519", "-p", "2222", three.address("server")]
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert key.with_suffix(".pub").read_text().split()[1] in done.stdout


def initial(name: str) -> bytes:
    connection = QuicConnection(configuration=QuicConfiguration(is_client=True, server_name=name))
    connection.connect(("192.0.2.1", 443), now=0.0)
    ((datagram, _),) = connection.datagrams_to_send(now=0.0)
    return datagram


@VERSIONS
def test_quic_is_refused_by_name(three: Network, servers: Servers, daemon: Daemon, version: int) -> None:
    process = daemon(three["gateway"], gateway())
    target = servers.endpoint("echo/udp", version)
    with pytest.raises(TimeoutError):
        echo_datagram(three["client"], target, initial("www.blocked.test"), timeout=1.0)
    hello = initial("open.test")
    assert echo_datagram(three["client"], target, hello)[0] == hello
    assert echo_datagram(three["client"], target, b"anything")[0] == b"anything"
    hosts = [record.get("host", "") for record in flows(process)]
    assert sorted(hosts) == ["", "open.test", "www.blocked.test"]
