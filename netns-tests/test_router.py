"""Routers and the kernel: the kernel as a router, routes that come and go with the daemon, and peers by gateway."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet.kernel import netns
from gostnet.kernel.changes import Changes, Topic
from gostnet.kernel.routeget import KernelRouter
from gostnet.testing.namespaces import Network, Topology, row
from gostnet.testing.processes import Process, run_program

pytestmark = pytest.mark.netns

Daemon = Callable[..., Process]

PATIENCE = 15


def ip(place: str, *words: str) -> str:
    with netns.inside(place):
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def routes(place: str) -> list[str]:
    """Return the routes of gostnet's own in the main table."""
    lines = [*ip(place, "-4", "route", "show", "proto", "250").splitlines()]
    lines += ip(place, "-6", "route", "show", "proto", "250").splitlines()
    return [" ".join(line.split()[:3]) for line in lines]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until notices of the kernel, which come by the loop, have made something true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # the condition is the router's, which has no event
            await asyncio.sleep(0.01)


# ---- the kernel as a router -------------------------------------------------------------------------
def test_the_kernel_answers_as_any_router(three: Network) -> None:
    place = three["gateway"]
    near = three.address("client", 4)

    async def main() -> None:
        router = KernelRouter(place)
        try:
            direct = router.get_route(near)
            assert direct is not None
            assert (direct.gateway, direct.protocol) == ("", "kernel")
            assert str(direct.network) == near.rpartition(".")[0] + ".0/24"
            assert router.get_route("10.88.1.1") is None
            assert router.get_route("no address") is None
            generation = router.generation
            ip(place, "route", "add", "10.88.0.0/16", "via", near, "proto", "bgp")
            await until(lambda: router.generation != generation)
            found = router.get_route("10.88.1.1")
            assert found is not None
            assert (str(found.network), found.gateway, found.protocol) == ("10.88.0.0/16", near, "bgp")
            assert router.get_route("10.88.1.1", protocol="bgp") == found
            assert router.get_route("10.88.1.1", protocol="static") is None
            assert router.get_route("10.88.1.1", network="10.88.0.0/16") == found
            assert router.get_route("10.88.1.1", network="10.88.1.0/24") is None
            generation = router.generation
            ip(place, "route", "add", "10.88.1.0/24", "dev", "wan0")
            await until(lambda: router.generation != generation)
            longer = router.get_route("10.88.1.1")
            assert longer is not None
            assert (str(longer.network), longer.gateway, longer.protocol) == ("10.88.1.0/24", "", "boot")
        finally:
            router.close()

    asyncio.run(main())


def test_of_one_device_and_of_both_ip_versions(three: Network) -> None:
    place = three["gateway"]
    far = three.address("server", 6)

    async def main() -> None:
        lan, wan, gone = (KernelRouter(place, device) for device in ("lan0", "wan0", "no-such"))
        try:
            ip(place, "-6", "route", "add", "fd88::/32", "via", far)
            assert wan.get_route("fd88::1").gateway == far  # type: ignore[union-attr]
            assert lan.get_route("fd88::1") is None
            assert gone.get_route("fd88::1") is None
        finally:
            for router in (lan, wan, gone):
                router.close()

    asyncio.run(main())


def test_only_what_is_asked_for_is_told(three: Network) -> None:
    place = three["gateway"]
    told: list[str] = []

    async def main() -> None:
        links = Topic.LINKS | Topic.OWN_ROUTES
        with (
            Changes(links, lambda: told.append("links"), place),
            Changes(Topic.ROUTES, lambda: told.append("routes"), place),
        ):
            ip(place, "route", "add", "10.88.0.0/16", "dev", "wan0")
            await until(lambda: "routes" in told)
            ip(place, "route", "del", "10.88.0.0/16")
            ip(place, "route", "add", "10.88.0.0/16", "dev", "wan0", "proto", "250")
            assert "links" not in told
            ip(place, "route", "del", "10.88.0.0/16")
            await until(lambda: "links" in told)
            told.clear()
            ip(place, "link", "set", "wan0", "mtu", "1400")
            await until(lambda: "links" in told)

    asyncio.run(main())


# ---- routes of the configuration --------------------------------------------------------------------
def router_config(*rows: tuple[str, str], **more: Any) -> dict[str, Any]:
    entries = [{"dst": destination, "gateway": gateway} for destination, gateway in rows]
    return {
        "routers": [{"name": "r", "routes": entries, **more}],
        "services": [{"name": "proxy", "addr": ":1080", "handler": {"type": "socks5"}}],
    }


@pytest.mark.parametrize("ending", ["TERM", "INT", "KILL"])
def test_routes_come_and_go_with_the_daemon(three: Network, daemon: Daemon, unchanged: Any, ending: str) -> None:
    place, via, via6 = three["gateway"], three.address("client", 4), three.address("client", 6)
    ip(place, "route", "add", "10.77.0.0/16", "via", three.address("server", 4))
    with unchanged(place, timeout=5.0):
        config = router_config(
            ("10.77.0.0/16", via),
            ("10.76.0.0/16", via),
            ("10.79.0.1", via),
            ("10.78.0.0/16", "198.51.100.1"),
            ("10.75.0.0/16", via),
            ("fd88::/32", via6),
        )
        process = daemon(place, config)
        assert routes(place) == [
            *(f"10.{number}.0.0/16 via {via}" for number in (75, 76, 77)),
            f"fd88::/32 via {via6}",
        ]
        process.wait_for("10.78.0.0/16")
        assert "tried again" in process.errors
        process.send(getattr(signal, f"SIG{ending}"))
        process.wait()


def test_a_gateway_that_can_be_reached_later_gets_its_route(three: Network, daemon: Daemon, unchanged: Any) -> None:
    place = three["gateway"]
    with unchanged(place):
        process = daemon(place, router_config(("10.78.0.0/16", "198.51.100.1")))
        assert routes(place) == []
        ip(place, "address", "add", "198.51.100.2/24", "dev", "wan0")
        process.wait_for("+ ip route add 10.78.0.0/16 via 198.51.100.1")
        assert routes(place) == ["10.78.0.0/16 via 198.51.100.1"]
        ip(place, "route", "del", "10.78.0.0/16")
        process.wait_for(lambda line: "ip route add" in line and routes(place) != [])
        assert process.stop() == 0
        ip(place, "address", "del", "198.51.100.2/24", "dev", "wan0")


def test_a_file_and_reloads_change_the_kernels_routes(
    three: Network, daemon: Daemon, unchanged: Any, tmp_path: Path
) -> None:
    place, via = three["gateway"], three.address("client", 4)
    table, path = tmp_path / "routes", tmp_path / "live.yaml"
    table.write_text(f"# from a file\n\n10.81.0.0/16 {via}\n")

    def write(*rows: tuple[str, str]) -> None:
        path.write_text(yaml.safe_dump(router_config(*rows, file={"path": str(table)}, reload="1s")))

    write(("10.80.0.0/16", via))
    with unchanged(place):
        process = daemon(place, "-C", str(path))
        assert routes(place) == [f"10.{number}.0.0/16 via {via}" for number in (80, 81)]
        table.write_text(f"10.82.0.0/16 {via}\n")
        process.wait_for("ip route del 10.81.0.0/16")
        assert routes(place) == [f"10.{number}.0.0/16 via {via}" for number in (80, 82)]
        write(("10.83.0.0/16", via))
        process.send(signal.SIGHUP)
        process.wait_for("config reloaded")
        assert routes(place) == [f"10.{number}.0.0/16 via {via}" for number in (82, 83)]
        assert process.stop() == 0


def test_plan_shows_the_routes(three: Network, tmp_path: Path, unchanged: Any) -> None:
    place, via = three["gateway"], three.address("client", 4)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(router_config(("10.80.0.0/16", via))))
    with unchanged(place):
        planned = run_program([sys.executable, "-m", "gostnet", "plan", "-C", str(path)], place)
    assert f"+ ip route add 10.80.0.0/16 via {via} table 254 proto 250" in planned.output


# ---- peers of a tun server --------------------------------------------------------------------------
NETS = {"server": "192.168.123.1", "client": "192.168.123.2", "other": "192.168.123.3"}
PORT = 8421


@pytest.fixture
def star(build: Callable[[Topology], Network]) -> Network:
    """A tun server between two clients, behind each of which there are networks, played by addresses of theirs."""
    network = build(row("client", "server", "other"))
    for role, numbers in (("client", (61, 62)), ("other", (62, 63))):
        for number in numbers:
            ip(network[role], "address", "add", f"10.{number}.0.{1 if role == 'client' else 2}/32", "dev", "lo")
    return network


def vpn(star: Network, daemon: Daemon, config: Any) -> Process:
    server = daemon(star["server"], *config)
    for role, interface in (("client", "lan0"), ("other", "wan0")):
        near = star.address("server", 4, interface)
        query = f"net={NETS[role]}/24&name=vpn&keepalive=true&ttl=1s"
        daemon(star[role], "--instance", role, "-L", f"tun://:0/{near}:{PORT}?{query}")
    for role in ("client", "other"):
        assert ping(star["server"], NETS[role])
    return server


def server_service(router: str, **metadata: str) -> dict[str, Any]:
    listener = {"type": "tun", "metadata": {"net": f"{NETS['server']}/24", "name": "vpn", "router": router, **metadata}}
    return {"name": "vpn", "addr": f":{PORT}", "handler": {"type": "tun"}, "listener": listener}


def ping(place: str, address: str, patience: int = PATIENCE) -> bool:
    """Ping until one answer comes."""
    words = ["ping", "-n", "-c1", "-i0.2", f"-w{patience}", address]
    return run_program(words, place, timeout=patience + 5, check=False).wait() == 0


def test_a_named_router_chooses_the_peer_by_its_gateway(
    star: Network, daemon: Daemon, unchanged: Any, tmp_path: Path
) -> None:
    """The longest prefix counts, the kernel has the routes once the device is there, and a new table holds at once."""
    table, path = tmp_path / "routes", tmp_path / "live.yaml"
    table.write_text(f"10.63.0.0/16 {NETS['other']}\n")
    rows = [("10.62.0.0/16", NETS["client"]), ("10.62.0.2/32", NETS["other"]), ("10.61.0.0/16", NETS["client"])]
    config = router_config(*rows, file={"path": str(table)}, reload="1s")
    path.write_text(yaml.safe_dump(config | {"services": [server_service("r")]}))
    with unchanged(star["server"]):
        server = vpn(star, daemon, ("-C", str(path)))
        assert len(routes(star["server"])) == 4
        for address in ("10.61.0.1", "10.62.0.1", "10.62.0.2", "10.63.0.2"):
            assert ping(star["server"], address), address
        assert not ping(star["server"], "10.62.0.3", 1)
        ip(star["client"], "address", "add", "10.63.0.2/32", "dev", "lo")
        ip(star["other"], "address", "del", "10.63.0.2/32", "dev", "lo")
        table.write_text(f"10.63.0.0/16 {NETS['client']}\n")
        server.wait_for("~ ip route replace 10.63.0.0/16")
        assert ping(star["server"], "10.63.0.2")
        server.send(signal.SIGHUP)
        server.wait_for("config reloaded")
        assert ping(star["server"], "10.62.0.2", 2)
        table.write_text(f"10.64.0.0/16 {NETS['client']}\n")
        ip(star["client"], "address", "add", "10.64.0.1/32", "dev", "lo")
        server.wait_for("+ ip route add 10.64.0.0/16")
        assert ping(star["server"], "10.64.0.1")
        assert server.stop() == 0


def test_the_kernels_routing_chooses_the_peer(star: Network, daemon: Daemon) -> None:
    vpn(star, daemon, ({"services": [server_service("kernel")]},))
    place = star["server"]
    assert not ping(place, "10.61.0.1", 1)
    ip(place, "route", "add", "10.61.0.0/16", "via", NETS["client"], "dev", "vpn")
    assert ping(place, "10.61.0.1")
    ip(place, "route", "add", "10.62.0.0/16", "via", NETS["client"], "dev", "vpn", "proto", "bgp")
    assert ping(place, "10.62.0.1")
    ip(place, "route", "replace", "10.62.0.0/16", "via", NETS["other"], "dev", "vpn", "proto", "bgp")
    assert ping(place, "10.62.0.2")


def test_a_router_that_nobody_has_is_an_error(star: Network) -> None:
    url = f"tun://:{PORT}?net={NETS['server']}/24&router=nobody"
    process = Process([sys.executable, "-m", "gostnet", "-L", url], star["server"])
    with process:
        assert process.wait(20) == 1
        assert "nobody" in process.errors
