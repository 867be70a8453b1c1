"""Programs of Debian as peers: what people have, through what gostnet captures and against what it speaks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gostnet.core.address import Endpoint
from gostnet.kernel import netns
from gostnet.testing.clients import echo
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process
from gostnet.testing.servers import Servers, serving_in_thread

pytestmark = pytest.mark.netns

Daemon = Callable[..., Process]
Peer = Callable[[str], str]
GATEWAY = "red://:12345?capture=lan0"


@pytest.fixture
def servers(three: Network) -> Iterator[Servers]:
    with serving_in_thread(three["server"], [three.address("server")]) as found:
        yield found


def run(place: str, *words: str) -> str:
    """Run a program in a namespace and return what it prints."""
    with netns.inside(place):
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_microsocks_as_the_upstream_proxy(three: Network, servers: Servers, daemon: Daemon, peer: Peer) -> None:
    words = [peer("microsocks"), "-i", "0.0.0.0", "-p", "1080", "-u", "user", "-P", "pass"]
    target = servers.endpoint("echo/tcp")
    with Process(words, three["gateway"]):
        gateway = three.address("gateway", 4, "lan0")
        url = f"tcp://127.0.0.1:9000/{target}"
        daemon(three["client"], "-L", url, "-F", f"socks5://user:pass@{gateway}:1080")
        data = os.urandom(200_000)
        for _ in range(50):
            # microsocks says nothing when it is ready
            try:
                assert echo(three["client"], Endpoint("127.0.0.1", 9000), data) == data
                break
            except (ConnectionError, OSError):
                continue
        assert servers.witness.all("echo/tcp")[-1].client.host == three.address("gateway", 4, "wan0")


def test_redsocks_as_the_client(three: Network, servers: Servers, daemon: Daemon, peer: Peer, tmp_path: Path) -> None:
    """redsocks captures in the gateway by a rule of the administrator's and asks our SOCKS5 server there."""
    redsocks, nft = peer("redsocks"), peer("nft")
    daemon(three["gateway"], "-L", "socks5://user:pass@127.0.0.1:1080")
    path = tmp_path / "redsocks.conf"
    path.write_text(
        "base { log_info = on; log = stderr; daemon = off; redirector = iptables; }\n"
        "redsocks { local_ip = 0.0.0.0; local_port = 12300; ip = 127.0.0.1; port = 1080; type = socks5;"
        ' login = "user"; password = "pass"; }\n'
    )
    rules = (
        "table ip admin { chain pre { type nat hook prerouting priority dstnat; "
        'iifname "lan0" tcp dport 7 redirect to :12300; }; }'
    )
    run(three["gateway"], nft, rules)
    with Process([redsocks, "-c", str(path)], three["gateway"]) as process:
        process.wait_for("redsocks started")
        data = os.urandom(100_000)
        assert echo(three["client"], servers.endpoint("echo/tcp"), data) == data
    assert servers.witness.all("echo/tcp")[-1].client.host == three.address("gateway", 4, "wan0")


def test_iperf3_through_the_capture(three: Network, daemon: Daemon, peer: Peer) -> None:
    iperf3 = peer("iperf3")
    process = daemon(three["gateway"], "-L", GATEWAY)
    with Process([iperf3, "-s", "-p", "5201", "--forceflush"], three["server"]) as server:
        server.wait_for("Server listening")
        for direction in ((), ("-R",)):
            words = (iperf3, "-c", three.address("server"), "-t", "1", "-P", "4", "-J", *direction)
            result = json.loads(run(three["client"], *words))
            assert result["end"]["sum_received"]["bytes"] > 1_000_000
    process.stop()
    assert process.errors.count(">-<") == 10


def test_a_server_that_speaks_first(three: Network, daemon: Daemon, peer: Peer, tmp_path: Path) -> None:
    keygen, keyscan, sshd = peer("ssh-keygen"), peer("ssh-keyscan"), peer("sshd")
    daemon(three["gateway"], "-L", GATEWAY)
    key = tmp_path / "host"
    subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    options = ["-D", "-e", "-f", "/dev/null", "-h", str(key), "-p", "2222"]
    with Process([sshd, *options], three["server"]) as server:
        server.wait_for("Server listening")
        found = run(three["client"], keyscan, "-t", "ed25519", "-p", "2222", three.address("server"))
    assert key.with_suffix(".pub").read_text().split()[1] in found
