"""What the listener `tungo` asks of the kernel, as its options say; nothing is opened."""

from __future__ import annotations

from typing import Any

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.errors import ConfigError
from gostnet.core.options import bind_options
from gostnet.core.resources import Address, Capture, Inlet, Link, Resource, Sysctl
from gostnet.ingress import tungo
from gostnet.pipeline.transport import ListenerContext
from gostnet.protocols.transparent.tungo import TungoHandler

CONTEXT = ListenerContext("t", "services[0].listener")


def resources(address: Endpoint = ANY, **keys: Any) -> list[Resource]:
    metadata = {key.replace("__", "."): value for key, value in keys.items()}
    options = bind_options(tungo.TungoOptions, metadata, "m", set(), [])
    return list(tungo.TungoListener.make(address, options, CONTEXT).source.resources())


def only(found: list[Resource], kind: type[Resource]) -> list[Any]:
    return [item for item in found if isinstance(item, kind)]


@pytest.fixture(autouse=True)
def loose(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A host that checks no reverse path and has IPv6."""
    settings = {"net.ipv4.conf.all.rp_filter": "0", "net.ipv6.conf.lo.disable_ipv6": "0"}
    monkeypatch.setattr("gostnet.kernel.sysctl.read", lambda name: settings.get(name, "0"))
    return settings


def test_routes_and_addresses() -> None:
    found = resources(
        Endpoint("127.0.0.1", 12345), name="t.1", net="172.20.0.1/24", route="10.0.0.0/8", routes="fd00::/8 fd20::9"
    )
    (inlet,) = only(found, Inlet)
    assert inlet == Inlet("t", "t.1", 12345, 12345, (("10.0.0.0/8", ""), ("fd00::/8", "fd20::9")))
    assert only(found, Link) == [Link("t.1", 1500)]
    assert only(found, Address) == [Address("t.1", "172.20.0.1/24")]
    assert Sysctl("net.ipv4.conf.t/1.accept_local", "1") in found
    assert Sysctl("net.ipv4.conf.t/1.rp_filter", "0") in found
    assert not only(found, Capture)


def test_capture_beside_the_device() -> None:
    found = resources(Endpoint("", 1), capture="lan0,local", capture__ports="80", mtu=9000)
    captures = only(found, Capture)
    assert [(c.protocol, c.method, c.interfaces, c.local, c.device) for c in captures] == [
        ("tcp", "tproxy", ("lan0",), True, "tungo"),
        ("udp", "tproxy", ("lan0",), True, "tungo"),
    ]
    assert only(found, Link) == [Link("tungo", 9000)]


def test_a_port_that_is_not_known_yet_is_shown_as_some_port() -> None:
    (inlet,) = only(resources(), Inlet)
    assert (inlet.tcp, inlet.udp) == (tungo.UNKNOWN_PORT, tungo.UNKNOWN_PORT)


def test_a_host_that_checks_the_reverse_path(loose: dict[str, str]) -> None:
    loose["net.ipv4.conf.all.rp_filter"] = "1"
    found = resources(route="10.0.0.0/8")
    assert Sysctl("net.ipv4.conf.tungo.rp_filter", "2") in found
    assert Sysctl("net.ipv4.conf.all.src_valid_mark", "1") in found
    assert only(found, Address) == [Address("tungo", tungo.DUMMY_ADDRESS)]
    assert not only(resources(net="172.20.0.1/24"), Address)[1:]
    assert Sysctl("net.ipv4.conf.all.src_valid_mark", "1") not in resources(capture="local")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"net": "10.0.0.300/24"}, r"metadata\.net: '10\.0\.0\.300/24' is not an address"),
        ({"route": "ten"}, r"metadata\.route: 'ten' is not a network"),
        ({"route": "10.0.0.0/8", "gw": "fd00::1"}, "other IP version"),
        ({"capture__ports": "80"}, "says nothing without `capture`"),
    ],
)
def test_what_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resources(**keys)


@pytest.mark.parametrize("group", ["10.0.0.1", "nonsense"])
def test_groups_that_are_none_are_refused(group: str) -> None:
    metadata = {"multicastGroups": f"224.0.0.251,{group}"}
    with pytest.raises(ConfigError, match=f"^m.multicastGroups: '{group}' is not a multicast address"):
        bind_options(TungoHandler.Options, metadata, "m")
