"""The name service as a daemon, asked by dig, with its upstream behind a chain of proxies."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from gostnet.core.address import Endpoint
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


def server_side(network: Network) -> str:
    """Return the gateway's address on the server's side."""
    return network.address("gateway", interface="wan0")
