"""Direct traffic by name: what our name service has answered stays in the kernel, and nothing else does."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet.core.address import Endpoint
from gostnet.testing.clients import echo_datagram, fetch, resolve
from gostnet.testing.namespaces import Network, Route, Topology, row
from gostnet.testing.processes import Process, ProcessFailed, gostnet
from gostnet.testing.servers import Servers, serving_in_thread
from gostnet.testing.state import await_same, snapshot

pytestmark = pytest.mark.netns

DIRECT, PROXIED, PRIVATE = "a.direct.test", "proxied.test", "private.direct.test"
ADDRESSES = {4: ("203.0.113.1", "203.0.113.2"), 6: ("2001:db8:1::1", "2001:db8:1::2")}
NAMES = ["*.direct.test"]
HTTP, ECHO = 80, 7
Daemon = Callable[..., Process]

SHORT = """
import sys
import gostnet.app.direct_names as names
names.LEAST, names.SLACK, names.NAMED_TIMEOUT = 1.0, 0.2, 1.5
from gostnet.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""gostnet, whose answers hold for a moment only."""

SMALL = """
import sys
import gostnet.kernel.capture as capture
capture.NAMED_SIZE = 1
from gostnet.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""gostnet, whose sets take one address."""


@pytest.fixture
def lan(build: Callable[[Topology], Network]) -> Network:
    """Client, gateway and server in a row; the server has public addresses as well."""
    topology = row("client", "gateway", "server")
    client, gateway, server = topology.hosts
    routes = (*gateway.routes, Route("203.0.113.0/24", "10.99.2.2"), Route("2001:db8:1::/64", "fd99:2::2"))
    server = dataclasses.replace(server, loopback=tuple(f"{a}/{b}" for a, b in _with_lengths()))
    hosts = (client, dataclasses.replace(gateway, routes=routes), server)
    return build(dataclasses.replace(topology, hosts=hosts))


def _with_lengths() -> Iterator[tuple[str, int]]:
    for version, length in ((4, 32), (6, 128)):
        yield from ((address, length) for address in ADDRESSES[version])


@pytest.fixture
def servers(lan: Network) -> Iterator[Servers]:
    first = [ADDRESSES[4][0], ADDRESSES[6][0]]
    second = [ADDRESSES[4][1], ADDRESSES[6][1]]
    own = lan.address("server", 4)
    zone = {DIRECT: first, PROXIED: second, PRIVATE: [own]}
    with serving_in_thread(lan["server"], [*first, *second, own], zone=zone) as found:
        yield found


def configuration(
    servers: Servers, method: str, capture: str, matchers: Mapping[str, Any], *, sniffing: bool = False
) -> dict[str, Any]:
    keys = {"capture": capture, "direct": "kernel", "direct.names": True}
    handler = {"chain": "out", "metadata": {"sniffing": sniffing}}
    node = {"name": "proxy", "addr": "127.0.0.1:1080", "connector": {"type": "socks5"}, "dialer": {"type": "tcp"}}
    upstream = servers.endpoint("dns/udp")
    return {
        "log": {"level": "debug"},
        "services": [
            {
                "name": "tcp",
                "addr": ":12345",
                "handler": {"type": "red", **handler},
                "listener": {"type": "red", "metadata": {**keys, "tproxy": method == "tproxy"}},
            },
            {
                "name": "udp",
                "addr": ":12346",
                "handler": {"type": "redu", **handler},
                "listener": {"type": "redu", "metadata": keys},
            },
            {
                "name": "dns",
                "addr": ":53",
                "handler": {"type": "dns"},
                "listener": {"type": "dns"},
                "forwarder": {"nodes": [{"name": "up", "addr": f"udp://{upstream.host}:{upstream.port}"}]},
            },
            {
                "name": "proxy",
                "addr": "127.0.0.1:1080",
                "handler": {"type": "socks5", "metadata": {"udp": True}},
                "listener": {"type": "tcp"},
            },
        ],
        "chains": [{"name": "out", "hops": [{"name": "hop", "bypass": "direct", "nodes": [node]}]}],
        "bypasses": [{"name": "direct", **matchers}],
    }


def listed(network: Network) -> str:
    command = ["ip", "netns", "exec", network["gateway"], "nft", "list", "ruleset"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def counted(network: Network, comment: str) -> int:
    """Return how many packets the rules with a comment have counted."""
    rules = [line for line in listed(network).splitlines() if line.endswith(f'comment "{comment}"')]
    return sum(int(line.partition("counter packets ")[2].partition(" ")[0] or 0) for line in rules)


def goes_directly(network: Network, source: str, target: Endpoint) -> bool:
    """Fetch, and tell whether the kernel let it go, and not the daemon."""
    while True:
        before = counted(network, "tcp: direct"), counted(network, "tcp")
        assert fetch(source, target, "/").status == 200
        direct, captured = counted(network, "tcp: direct") - before[0], counted(network, "tcp") - before[1]
        if direct < 0 or captured < 0 or direct == captured == 0:
            continue  # the rules, and with them their counters, have changed meanwhile
        assert (direct, captured > 0) in ((1, False), (0, True))
        return direct == 1


def await_true(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def ask(network: Network, source: str, name: str, kind: str = "A") -> tuple[str, ...]:
    return resolve(network[source], Endpoint(network.address("gateway", 4, "lan0"), 53), name, kind).records


@pytest.mark.parametrize("method", ["redirect", "tproxy"])
@pytest.mark.parametrize("capture", ["lan0", "local"])
def test_an_address_goes_directly_once_its_name_was_answered(
    lan: Network,
    servers: Servers,
    daemon: Daemon,
    unchanged: Any,
    peer: Any,
    method: str,
    capture: str,
) -> None:
    peer("nft")
    role = "client" if capture == "lan0" else "gateway"
    with unchanged(lan["gateway"]):
        process = daemon(lan["gateway"], configuration(servers, method, capture, {"matchers": NAMES}))
        for version, kind in ((4, "A"), (6, "AAAA")):
            first, second = (Endpoint(address, HTTP) for address in ADDRESSES[version])
            assert not goes_directly(lan, lan[role], first), "nobody has asked for its name"
            assert ask(lan, role, DIRECT, kind) == (first.host,)
            assert goes_directly(lan, lan[role], first)
            datagrams = counted(lan, "udp: direct")
            target = Endpoint(first.host, ECHO)
            assert echo_datagram(lan[role], target, b"direct") == (b"direct", target)
            assert counted(lan, "udp: direct") > datagrams
            assert ask(lan, role, PROXIED, kind) == (second.host,)
            assert not goes_directly(lan, lan[role], second)
        assert ask(lan, role, PRIVATE) == (lan.address("server", 4),)
        private = Endpoint(lan.address("server", 4), HTTP)
        assert not goes_directly(lan, lan[role], private)
        assert process.stop() == 0


def test_dig_brings_it_in_and_the_cache_does_not_repeat_it(
    lan: Network, servers: Servers, daemon: Daemon, peer: Any
) -> None:
    peer("nft"), peer("dig")
    process = daemon(lan["gateway"], configuration(servers, "tproxy", "lan0", {"matchers": NAMES}))
    command = ["ip", "netns", "exec", lan["client"], "dig", "+short", f"@{lan.address('gateway', 4, 'lan0')}", DIRECT]
    for _ in range(3):
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == [ADDRESSES[4][0]]
    assert sum("directly, by the kernel" in line for line in process.lines) == 1
    assert f"{ADDRESSES[4][0]} timeout" in listed(lan)
    if shutil.which("curl"):
        port = HTTP
        curl = ["ip", "netns", "exec", lan["client"], "curl", "-sf", f"http://{ADDRESSES[4][0]}:{port}/"]
        assert subprocess.run(curl, check=True, capture_output=True).returncode == 0
        assert counted(lan, "tcp: direct") == 1


def test_after_its_time_an_address_is_captured_again(lan: Network, servers: Servers, tmp_path: Path, peer: Any) -> None:
    peer("nft")
    path = tmp_path / "gostnet.yaml"
    path.write_text(yaml.safe_dump(configuration(servers, "tproxy", "lan0", {"matchers": NAMES})))
    target = Endpoint(ADDRESSES[4][0], HTTP)
    with Process([sys.executable, "-c", SHORT, "-C", str(path)], lan["gateway"], name="gostnet") as process:
        process.wait_ready()
        assert ask(lan, "client", DIRECT) == (target.host,)
        assert goes_directly(lan, lan["client"], target)
        await_true(lambda: not goes_directly(lan, lan["client"], target), "it is still in the set")
        assert ask(lan, "client", DIRECT) == (target.host,)
        assert goes_directly(lan, lan["client"], target)


def test_a_kernel_that_refuses_an_address_is_asked_no_more_and_the_daemon_has_the_traffic(
    lan: Network, servers: Servers, tmp_path: Path, peer: Any
) -> None:
    peer("nft")
    path = tmp_path / "gostnet.yaml"
    path.write_text(yaml.safe_dump(configuration(servers, "tproxy", "lan0", {"matchers": [*NAMES, PROXIED]})))
    first, second = (Endpoint(address, HTTP) for address in ADDRESSES[4])
    with Process([sys.executable, "-c", SMALL, "-C", str(path)], lan["gateway"], name="gostnet") as process:
        process.wait_ready()
        assert ask(lan, "client", DIRECT) == (first.host,)
        assert goes_directly(lan, lan["client"], first)
        for kind in ("A", "AAAA", "A"):
            assert ask(lan, "client", PROXIED, kind), "the client gets its answer all the same"
        assert not goes_directly(lan, lan["client"], second)
        assert goes_directly(lan, lan["client"], first), "what is there stays for its time"
        said = [record["msg"] for record in process.records if record["level"] == "warn"]
        assert len(said) == 1
        assert str(said[0]).startswith("engine kernel gives way to user: direct.names: nft add element inet")


def test_a_name_that_leaves_the_list_takes_its_addresses_along(
    lan: Network, servers: Servers, daemon: Daemon, tmp_path: Path, peer: Any
) -> None:
    peer("nft")
    path = tmp_path / "list"
    path.write_text("*.direct.test\nproxied.test\n")
    process = daemon(
        lan["gateway"], configuration(servers, "tproxy", "lan0", {"file": {"path": str(path)}, "reload": "1s"})
    )
    first, second = (Endpoint(address, HTTP) for address in ADDRESSES[4])
    for name, target in ((DIRECT, first), (PROXIED, second)):
        assert ask(lan, "client", name) == (target.host,)
        assert goes_directly(lan, lan["client"], target)
    path.write_text("*.direct.test\n")
    await_true(lambda: not goes_directly(lan, lan["client"], second), "the address is still in the set")
    assert goes_directly(lan, lan["client"], first), "what is still in the list stays"
    process.send(signal.SIGHUP)
    process.wait_for("config reloaded")
    assert goes_directly(lan, lan["client"], first), "nor does a reload change that"
    path.write_text("\n")
    await_true(lambda: not goes_directly(lan, lan["client"], first), "the list is empty")


def test_with_sniffing_the_names_that_were_answered_stay_in_the_kernel(
    lan: Network, servers: Servers, daemon: Daemon, peer: Any
) -> None:
    peer("nft")
    settings = configuration(servers, "tproxy", "lan0", {"matchers": [*NAMES, f"{ADDRESSES[4][1]}/32"]}, sniffing=True)
    daemon(lan["gateway"], settings)
    first, second = (Endpoint(address, HTTP) for address in ADDRESSES[4])
    assert ask(lan, "client", DIRECT) == (first.host,)
    assert goes_directly(lan, lan["client"], first)
    assert not goes_directly(lan, lan["client"], second), "whose name the daemon wants to see"


def test_a_kill_leaves_nothing(lan: Network, servers: Servers, daemon: Daemon) -> None:
    before = snapshot(lan["gateway"])
    process = daemon(lan["gateway"], configuration(servers, "tproxy", "lan0", {"matchers": NAMES}))
    assert ask(lan, "client", DIRECT) == (ADDRESSES[4][0],)
    process.kill()
    assert not await_same(before, lan["gateway"], timeout=5.0)


def test_the_plan_shows_the_sets(lan: Network, servers: Servers, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(configuration(servers, "tproxy", "lan0", {"matchers": NAMES})))
    with gostnet("plan", "-C", str(path), place=lan["gateway"]) as process:
        assert process.wait() == 0
        assert "flags timeout; timeout 3600s; size 32768;" in process.output
        assert "addresses that names are answered with come into the sets names4_" in process.output


def test_workers_refuse_it(lan: Network, servers: Servers, daemon: Daemon) -> None:
    settings = {**configuration(servers, "tproxy", "lan0", {"matchers": NAMES}), "workers": 2}
    with pytest.raises(ProcessFailed, match="another process holds the sets"):
        daemon(lan["gateway"], settings)
