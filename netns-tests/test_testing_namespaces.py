"""Networks of namespaces in the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import KernelError
from gostnet.kernel import netns
from gostnet.testing.clients import echo, echo_datagram
from gostnet.testing.namespaces import (
    End,
    Host,
    Link,
    Network,
    Route,
    Topology,
    own_name,
    read_sysctl,
    row,
    sweep,
    write_sysctl,
)
from gostnet.testing.servers import serving_in_thread
from gostnet.testing.state import diff, snapshot

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("version", [4, 6])
def test_row_carries_traffic_from_end_to_end_at_once(build: Callable[[Topology], Network], version: int) -> None:
    network = build(row("a", "b", "c", "d"))
    far = network.address("d", version)
    with serving_in_thread(network["d"], [far]) as servers:
        target = servers.endpoint("echo/tcp", version)
        assert echo(network["a"], target, b"there and back") == b"there and back"
        assert echo_datagram(network["a"], target, b"datagram") == (b"datagram", target)
        (seen,) = servers.witness.all("echo/tcp")
    assert seen.client.host == network.address("a", version)


def test_state_is_settled_at_once(build: Callable[[Topology], Network]) -> None:
    network = build(row("a", "b", "c"))
    before = {role: snapshot(place) for role, place in network.names.items()}
    with serving_in_thread(network["c"], network.topology.addresses("c")) as servers:
        for version in (4, 6):
            echo(network["a"], servers.endpoint("echo/tcp", version), b"x")
    assert {role: diff(before[role], snapshot(place)) for role, place in network.names.items()} == {
        "a": [],
        "b": [],
        "c": [],
    }


def test_declared_settings_hold(build: Callable[[Topology], Network]) -> None:
    topology = Topology(
        (
            Host("a", loopback=("192.0.2.1/32", "2001:db8::1/128"), sysctls={"net/ipv4/conf/all/rp_filter": 1}),
            Host("b", forwarding=True, routes=(Route("192.0.2.0/24", "10.1.0.1"), Route("198.51.100.0/24", "", "x"))),
        ),
        (Link(End("a", "left", ("10.1.0.1/24",), mtu=1400), End("b", "x", ("10.1.0.2/24",), mtu=1280)),),
    )
    network = build(topology)
    assert read_sysctl(network["a"], "net.ipv4.conf.all.rp_filter") == "1"
    assert read_sysctl(network["b"], "net/ipv4/ip_forward") == "1"
    a, b = str(snapshot(network["a"])), str(snapshot(network["b"]))
    assert "addresses: lo 192.0.2.1/32" in a
    assert "addresses: lo 2001:db8::1/128" in a
    assert "left up kind veth mtu 1400" in a
    assert "x up kind veth mtu 1280" in b
    assert "192.0.2.0/24 proto 4 scope 0 type 1 tos 0 flags 0x0 gateway 10.1.0.1 oif x" in b
    assert "198.51.100.0/24 proto 4 scope 253" in b


def test_settings_of_the_host_are_not_inherited(build: Callable[[Topology], Network]) -> None:
    network = build(Topology((Host("a"),)))
    assert read_sysctl(network["a"], "net/ipv4/conf/all/rp_filter") == "0"
    assert read_sysctl(network["a"], "net/ipv4/ip_forward") == "0"
    assert read_sysctl(network["a"], "net/ipv6/conf/all/disable_ipv6") == "0"


def test_sysctls_are_those_of_the_namespace(build: Callable[[Topology], Network]) -> None:
    network = build(Topology((Host("a"), Host("b"))))
    write_sysctl(network["a"], "net.ipv4.ip_default_ttl", 33)
    assert read_sysctl(network["a"], "net.ipv4.ip_default_ttl") == "33"
    assert read_sysctl(network["b"], "net.ipv4.ip_default_ttl") != "33"
    with pytest.raises(KernelError, match="read sysctl net/none"):
        read_sysctl(network["a"], "net/none")
    with pytest.raises(KernelError, match="set sysctl"):
        write_sysctl(network["a"], "net/ipv4/ip_forward", "nonsense")


def test_network_that_cannot_be_built_leaves_nothing() -> None:
    topology = Topology(
        (Host("a"), Host("b")),
        (Link(End("a", "x", ("10.1.0.1/24",)), End("b", "a-name-that-is-too-long")),),
    )
    with pytest.raises(KernelError, match="connect a and b"):
        Network(topology).up()
    assert not netns.exists(own_name("a"))


def test_down_and_up_again() -> None:
    network = Network(row("a", "b"))
    network.up()
    write_sysctl(network["a"], "net/ipv4/ip_default_ttl", 33)
    network.up()
    assert read_sysctl(network["a"], "net/ipv4/ip_default_ttl") == "64"
    network.down()
    network.down()
    assert not any(netns.exists(name) for name in network.names.values())


def test_address_says_when_there_is_none(build: Callable[[Topology], Network]) -> None:
    network = build(Topology((Host("a"),)))
    with pytest.raises(LookupError, match="no address of IPv6"):
        network.address("a", 6)


def test_sweep_takes_what_the_dead_left_and_nothing_else() -> None:
    code = """
import os, signal
from gostnet.testing.namespaces import Network, row
Network(row("a", "b")).up()
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = subprocess.run([sys.executable, "-c", code], check=False)
    assert child.returncode == -9
    mine = own_name("mine")
    netns.create(mine)
    other = f"gn-{os.getppid()}-other-{os.getpid()}"
    netns.create(other)
    try:
        swept = sweep()
        assert len([name for name in swept if name.endswith(("-a", "-b"))]) >= 2
        assert netns.exists(mine)
        assert netns.exists(other)
    finally:
        netns.delete(mine)
        netns.delete(other)


def test_unchanged_fails_when_something_changed(build: Callable[[Topology], Network], unchanged: Callable) -> None:  # type: ignore[type-arg]
    network = build(row("a", "b"))
    with unchanged(network["a"]):
        write_sysctl(network["a"], "net/ipv4/ip_default_ttl", 33)
        write_sysctl(network["a"], "net/ipv4/ip_default_ttl", 64)
    with pytest.raises(AssertionError, match="ip_default_ttl = 33"):
        with unchanged(network["a"], timeout=0.0):
            write_sysctl(network["a"], "net/ipv4/ip_default_ttl", 33)


def test_server_of_an_unknown_address_is_refused(build: Callable[[Topology], Network]) -> None:
    network = build(row("a", "b"))
    with pytest.raises(KernelError, match=r"serve http on 192\.0\.2\.9:80"):
        with serving_in_thread(network["a"], ["192.0.2.9"]):
            pass


def test_namespaces_separate_networks(build: Callable[[Topology], Network]) -> None:
    network = build(Topology((Host("a"), Host("b"))))
    with pytest.raises(OSError, match="unreachable"):
        echo(network["a"], Endpoint("10.99.1.2", 7), b"x", timeout=1.0)
