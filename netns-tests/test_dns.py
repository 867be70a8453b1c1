"""The name service as a daemon, asked by dig, with its upstream behind a chain of proxies."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.testing.certificates import Authority
from gostnet.testing.clients import resolve
from gostnet.testing.namespaces import Network
from gostnet.testing.servers import Ports, serving_in_thread

pytestmark = [pytest.mark.netns, pytest.mark.skipif(shutil.which("dig") is None, reason="dig is not installed")]

UPSTREAM = 5300


def dig(place: str, *words: str) -> list[str]:
    """Run dig +short and return its lines."""
    done = subprocess.run(
        ["ip", "netns", "exec", place, "dig", "+short", "+tries=1", "+time=5", *words],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("upstream", ["udp", "tcp"])
def test_dig_gets_answers_from_behind_a_chain(three: Network, daemon: Callable[..., Any], upstream: str) -> None:
    server, gateway = three.address("server"), three.address("gateway")
    zone = {"a.test": ["192.0.2.1", "2001:db8::1"]}
    with serving_in_thread(three["server"], [server], ports=Ports(dns=UPSTREAM), zone=zone) as servers:
        daemon(three["gateway"], "-L", "relay://:8420?bind=true", "-L", "socks5://:1080?udp=true")
        target = f"{upstream}://{server}:{UPSTREAM}"
        daemon(
            three["client"],
            *("-L", f"dns://127.0.0.1:53/{target}?hosts=own.test:192.0.2.9"),
            *("-L", f"dns://127.0.0.1:53/{target}?mode=tcp"),
            *("-F", f"relay://{gateway}:8420", "-F", "socks5://127.0.0.1:1080"),
        )
        client = three["client"]
        assert dig(client, "@127.0.0.1", "a.test", "A") == ["192.0.2.1"]
        assert dig(client, "@127.0.0.1", "a.test", "AAAA") == ["2001:db8::1"]
        assert dig(client, "@127.0.0.1", "a.test", "A", "+tcp", "+noedns") == ["192.0.2.1"]
        assert dig(client, "@127.0.0.1", "own.test", "A") == ["192.0.2.9"]
        # The upstream sees the last proxy, not the client.
        assert dig(client, "@127.0.0.1", "whoami", "TXT") == [f'"{server_side(three)}"']
        assert resolve(client, Endpoint("127.0.0.1", 53), "none.test").code == "NXDOMAIN"
        before = len(servers.witness.all())
        assert dig(client, "@127.0.0.1", "a.test", "A") == ["192.0.2.1"]
        assert len(servers.witness.all()) == before  # from the cache


def test_an_upstream_over_tls_is_verified_and_reached_through_the_chain(
    three: Network, daemon: Callable[..., Any], tmp_path: Path
) -> None:
    server, gateway = three.address("server"), three.address("gateway")
    authority = Authority()
    certificate, key = authority.issue(server).save(tmp_path)
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    trusted = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
    with serving_in_thread(three["server"], [server], ports=Ports(dns=UPSTREAM), zone={"a.test": ["192.0.2.1"]}):
        query = f"mode=tls&certFile={certificate}&keyFile={key}"
        daemon(three["server"], "-L", f"dns://:853/{server}:{UPSTREAM}?{query}")
        daemon(three["gateway"], "-L", "relay://:8420")
        words = ("-L", f"dns://127.0.0.1:53/tls://{server}", "-F", f"relay://{gateway}:8420")
        first = daemon(three["client"], *words, env=trusted)
        assert dig(three["client"], "@127.0.0.1", "a.test") == ["192.0.2.1"]
        first.stop()
        daemon(three["client"], *words)
        assert resolve(three["client"], Endpoint("127.0.0.1", 53), "a.test").code == "SERVFAIL"


def server_side(network: Network) -> str:
    """Return the gateway's address on the server's side."""
    return network.address("gateway", interface="wan0")
