"""The VPN's kernel engine: two gostnets that leave packets to the kernel, beside peers that cannot take them so."""

from __future__ import annotations

import ctypes
import json
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from vpn import OUTSIDE, PATIENCE, PORT, TUN, exchange, ping

from gostnet.kernel import netns
from gostnet.kernel.bpf import (
    Assembly,
    At,
    Direction,
    Field,
    Helper,
    Register,
    Size,
    Test,
    Verdict,
    attached,
    attachment_problem,
    load,
    objects,
)
from gostnet.testing.clients import connect, echo
from gostnet.testing.namespaces import Network, Topology, row, write_sysctl
from gostnet.testing.processes import Process, gostnet, run_program
from gostnet.testing.servers import serving_in_thread

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(attachment_problem()), reason=attachment_problem() or "the kernel takes programs"),
]

Daemon = Callable[..., Process]


def moved(place: str, device: str) -> int:
    """Return the packets that a process has read from a device: what it counts as sent is what waits to be read."""
    with netns.inside(place):
        shown = subprocess.run(["ip", "-j", "-s", "link", "show", device], capture_output=True, text=True, check=True)
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["packets"])


def wait_for_engine(place: str, device: str, address: str) -> None:
    """Wait until the kernel carries pings: none of them is handed to the process any more."""
    deadline = time.monotonic() + PATIENCE
    while True:
        assert ping(place, address)
        before = moved(place, device)
        assert ping(place, address)
        if moved(place, device) == before:
            return
        assert time.monotonic() < deadline, "the process still carries the packets"


def programs(place: str) -> int:
    """Return how many programs are at work on the devices of a namespace."""
    with netns.inside(place):
        return sum(len(attached(index, way)) for index, _ in socket.if_nameindex() for way in Direction)


def detach(program: int) -> None:
    """Take a program off the device where it is, as bpftool(8) does."""
    link = 0
    while True:
        attributes = ctypes.create_string_buffer(struct.pack("=II", link, 0), 128)
        objects._call(31, attributes)  # BPF_LINK_GET_NEXT_ID; ENOENT behind the last one fails the test
        link = struct.unpack_from("=II", attributes)[1]
        with objects.Link(objects._call(30, struct.pack("=I", link))) as found:  # BPF_LINK_GET_FD_BY_ID
            if found.program == program:
                found.detach()
                return


def totals(process: Process) -> tuple[int, int]:
    """Return the bytes of the record that a client leaves at its end."""
    found = re.findall(r'"inputBytes":(\d+),"outputBytes":(\d+)', process.errors + process.output)
    return int(found[-1][0]), int(found[-1][1])


@OUTSIDE
@pytest.mark.parametrize("p2p", ["false", "true"])
def test_packets_of_both_ip_versions_are_left_to_the_kernel(
    two: Network, daemon: Daemon, unchanged: Any, p2p: str, outside: int
) -> None:
    with unchanged(two["server"]), unchanged(two["client"]):
        server = daemon(two["server"], "-L", TUN.server(p2p=p2p))
        client = daemon(two["client"], "-L", TUN.client(two.address("server", outside)))
        for address in TUN.nets["server"]:
            wait_for_engine(two["client"], "tun-client", address)
        for address in TUN.nets["client"]:
            wait_for_engine(two["server"], "tun-server", address)
        before = moved(two["client"], "tun-client"), moved(two["server"], "tun-server")
        exchange(two["client"], two["server"], TUN.nets["server"])
        exchange(two["server"], two["client"], TUN.nets["client"])
        after = moved(two["client"], "tun-client"), moved(two["server"], "tun-server")
        # Fragments go the kernel's way too; what the process gets is a few packets of the kernel's own.
        assert after[0] - before[0] < 20
        assert after[1] - before[1] < 20
        assert client.stop() == 0
        assert server.stop() == 0
        up, down = totals(client)
        assert up > 1_600_000
        assert down > 1_600_000
        assert '"engine":"kernel"' in client.errors


@pytest.mark.parametrize("pump", ["server", "client"])
def test_a_peer_with_the_pump_gets_packets_from_the_pump(two: Network, daemon: Daemon, pump: str) -> None:
    engines = {"server": "auto", "client": "auto", pump: "pump"}
    daemon(two["server"], "-L", TUN.server(tun_engine=engines["server"]))
    daemon(two["client"], "-L", TUN.client(two.address("server"), tun_engine=engines["client"]))
    for _ in range(2):
        exchange(two["client"], two["server"], TUN.nets["server"])
        exchange(two["server"], two["client"], TUN.nets["client"])


@pytest.mark.interop
@OUTSIDE
@pytest.mark.parametrize("role", ["gost-server", "gost-client"])
def test_the_real_gost_gets_packets_from_the_pump(
    two: Network, launch: Callable[..., Process], role: str, outside: int
) -> None:
    words = {"server": ("-L", TUN.server()), "client": ("-L", TUN.client(two.address("server", outside)))}
    for side in ("server", "client"):
        launch("gost" if role == f"gost-{side}" else "gostnet", two[side], *words[side])
    exchange(two["client"], two["server"], TUN.nets["server"])
    exchange(two["server"], two["client"], TUN.nets["client"])
    assert programs(two["client" if role == "gost-server" else "server"]) > 0


@pytest.mark.parametrize("engines", [("auto", "auto"), ("auto", "pump"), ("pump", "auto")])
def test_peers_reach_each_other_whatever_their_engines(star: Network, daemon: Daemon, engines: tuple[str, str]) -> None:
    daemon(star["server"], "-L", TUN.server(passphrase="x"))
    for role, side, engine in zip(("client", "other"), ("lan0", "wan0"), engines, strict=True):
        url = TUN.client(star.address("server", 4, side), role, tun_engine=engine, passphrase="x")
        daemon(star[role], "-L", url)
        if engine == "auto":
            wait_for_engine(star[role], f"tun-{role}", TUN.nets["server"][0])
    exchange(star["client"], star["other"], TUN.nets["other"])
    exchange(star["other"], star["client"], TUN.nets["client"])


def test_a_source_that_is_not_the_peers_own_is_dropped_in_the_kernel(two: Network, daemon: Daemon) -> None:
    daemon(two["server"], "-L", TUN.server(passphrase="x"))
    daemon(two["client"], "-L", TUN.client(two.address("server"), passphrase="x"))
    wait_for_engine(two["client"], "tun-client", TUN.nets["server"][0])
    with netns.inside(two["client"]):
        subprocess.run(["ip", "address", "add", "192.168.123.99/24", "dev", "tun-client"], check=True)
    forged = ["ping", "-n", "-c2", "-i0.2", "-w1", "-I", "192.168.123.99", TUN.nets["server"][0]]
    with netns.inside(two["server"]):
        before = subprocess.run(["ip", "-s", "link", "show", "tun-server"], capture_output=True, text=True, check=True)
    assert run_program(forged, two["client"], check=False).wait() != 0
    with netns.inside(two["server"]):
        after = subprocess.run(["ip", "-s", "link", "show", "tun-server"], capture_output=True, text=True, check=True)
    assert after.stdout == before.stdout
    assert ping(two["client"], TUN.nets["server"][0])


def test_a_server_that_comes_back_with_the_pump_is_served_by_the_pump(two: Network, daemon: Daemon) -> None:
    server = daemon(two["server"], "-L", TUN.server())
    daemon(two["client"], "-L", TUN.client(two.address("server")))
    wait_for_engine(two["client"], "tun-client", TUN.nets["server"][0])
    server.kill()
    server = daemon(two["server"], "-L", TUN.server(tun_engine="pump"))
    exchange(two["client"], two["server"], TUN.nets["server"])
    server.kill()
    daemon(two["server"], "-L", TUN.server())
    wait_for_engine(two["client"], "tun-client", TUN.nets["server"][0])


def test_a_client_that_moves_is_followed_by_the_kernel(two: Network, daemon: Daemon) -> None:
    daemon(two["server"], "-L", TUN.server())
    daemon(two["client"], "-L", TUN.client(two.address("server")))
    wait_for_engine(two["server"], "tun-server", TUN.nets["client"][0])
    old = two.address("client")
    new = old.rpartition(".")[0] + ".77"
    with netns.inside(two["client"]):
        for verb, address in (("add", new), ("del", old)):
            subprocess.run(["ip", "address", verb, f"{address}/24", "dev", "wan0"], check=True)
        subprocess.run(["ip", "address", "replace", f"{new}/24", "dev", "wan0"], check=True)
    wait_for_engine(two["server"], "tun-server", TUN.nets["client"][0])
    exchange(two["server"], two["client"], TUN.nets["client"])


def test_packets_that_are_forwarded_beyond_the_tunnel_are_whole(
    build: Callable[[Topology], Network], daemon: Daemon, gost_bin: str
) -> None:
    """The gateway is the client; the host behind it, a user-space peer of a second tunnel, reads what came by."""
    three = build(row("client", "gateway", "server"))
    behind = three.address("client")
    network = behind.rpartition(".")[0] + ".0/24"
    with netns.inside(three["server"]):
        subprocess.run(["ip", "route", "del", "default"], check=True)
    daemon(three["server"], "-L", TUN.server(routes=f"{network}%20{TUN.nets['client'][0]}"))
    daemon(three["gateway"], "-L", TUN.client(three.address("server")))
    wait_for_engine(three["server"], "tun-server", TUN.nets["client"][0])
    with serving_in_thread(three["client"], [behind]) as servers:
        data = os.urandom(2_000_000)
        assert echo(three["server"], servers.endpoint("echo/tcp", 4), data) == data
        with connect(three["server"], servers.endpoint("echo/tcp", 4)) as sock:
            sock.sendall(b"x" * 100_000)
            left = 100_000
            while left:
                left -= len(sock.recv(left))


def hands_over(place: str, device: str, words: Sequence[str]) -> int:
    """Ping once; return how many packets the process has read meanwhile."""
    before = moved(place, device)
    run_program(["ping", "-n", "-c1", "-w5", *words], place).wait()
    return moved(place, device) - before


@OUTSIDE
def test_what_just_fits_goes_by_the_kernel_and_what_does_not_by_the_process(
    two: Network, daemon: Daemon, outside: int
) -> None:
    room = {4: 1472, 6: 1452}[outside]
    daemon(two["server"], "-L", TUN.server(mtu="1480"))
    daemon(two["client"], "-L", TUN.client(two.address("server", outside), mtu="1480"))
    for address, headers in zip(TUN.nets["server"], (28, 48), strict=True):
        wait_for_engine(two["client"], "tun-client", address)
        for size, handed in ((room, 0), (room + 1, 1), (1480, 1)):
            words = ["-M", "do", "-s", str(size - headers), address]
            # What the kernel itself sends now and then comes on top.
            assert min(hands_over(two["client"], "tun-client", words) for _ in range(3)) == handed, size


@OUTSIDE
@pytest.mark.parametrize("timestamps", ["0", "1"])
def test_segments_of_every_size_that_fits_go_by_the_kernel(
    two: Network, daemon: Daemon, outside: int, timestamps: str
) -> None:
    mtu = {4: "1472", 6: "1452"}[outside]
    write_sysctl(two["client"], "net.ipv4.tcp_timestamps", timestamps)
    daemon(two["server"], "-L", TUN.server(mtu=mtu))
    daemon(two["client"], "-L", TUN.client(two.address("server", outside), mtu=mtu))
    with serving_in_thread(two["server"], list(TUN.nets["server"])) as servers:
        for version, address in zip((4, 6), TUN.nets["server"], strict=True):
            wait_for_engine(two["client"], "tun-client", address)
            before = moved(two["client"], "tun-client"), moved(two["server"], "tun-server")
            data = os.urandom(3_000_000)
            assert echo(two["client"], servers.endpoint("echo/tcp", version), data) == data
            assert moved(two["client"], "tun-client") - before[0] < 20
            assert moved(two["server"], "tun-server") - before[1] < 20


@OUTSIDE
def test_the_bytes_of_the_record_are_those_of_the_packets(two: Network, daemon: Daemon, outside: int) -> None:
    daemon(two["server"], "-L", TUN.server())
    client = daemon(two["client"], "-L", TUN.client(two.address("server", outside)))
    address = TUN.nets["server"][0]
    wait_for_engine(two["client"], "tun-client", address)
    words = ["ping", "-n", "-q", "-c50", "-i0.01", "-s", "1000", address]
    run_program(words, two["client"]).wait()
    assert client.stop() == 0
    # What the kernel says by itself goes to nobody, so that nothing comes back but answers: these, and those before.
    pings, rest = divmod(totals(client)[1] - 50 * 1028, 84)
    assert rest == 0
    assert 2 <= pings < 200


def test_peers_are_found_by_link_local_addresses(two: Network, daemon: Daemon) -> None:
    with netns.inside(two["server"]):
        shown = subprocess.run(
            ["ip", "-6", "address", "show", "scope", "link", "dev", "lan0"], capture_output=True, text=True, check=True
        )
    local = re.findall(r"fe80::[0-9a-f:]+", shown.stdout)[0]
    daemon(two["server"], "-L", TUN.server())
    daemon(two["client"], "-L", TUN.client(f"{local}%25wan0"))
    wait_for_engine(two["client"], "tun-client", TUN.nets["server"][0])
    wait_for_engine(two["server"], "tun-server", TUN.nets["client"][1])
    exchange(two["client"], two["server"], TUN.nets["server"])


def test_a_client_may_come_back_by_the_other_ip_version(two: Network, daemon: Daemon) -> None:
    daemon(two["server"], "-L", TUN.server())
    for outside in (4, 6, 4):
        client = daemon(two["client"], "-L", TUN.client(two.address("server", outside)))
        wait_for_engine(two["client"], "tun-client", TUN.nets["server"][1])
        wait_for_engine(two["server"], "tun-server", TUN.nets["client"][0])
        exchange(two["server"], two["client"], TUN.nets["client"])
        client.kill()


def test_clients_by_both_ip_versions_reach_each_other(star: Network, daemon: Daemon) -> None:
    daemon(star["server"], "-L", TUN.server(passphrase="x"))
    daemon(star["client"], "-L", TUN.client(star.address("server", 4, "lan0"), passphrase="x"))
    daemon(star["other"], "-L", TUN.client(star.address("server", 6, "wan0"), "other", passphrase="x"))
    for role in ("client", "other"):
        wait_for_engine(star[role], f"tun-{role}", TUN.nets["server"][0])
        wait_for_engine(star["server"], "tun-server", TUN.nets[role][0])
    exchange(star["client"], star["other"], TUN.nets["other"])
    exchange(star["other"], star["client"], TUN.nets["client"])


def dropping_what_has_no_checksum(outside: int) -> Assembly:
    """Return a program that drops such datagrams of UDP, as some networks do."""
    header, ethernet = {4: (20, 0x0800), 6: (40, 0x86DD)}[outside]
    code = Assembly()
    code.move(Register.R6, Register.R1)
    code.load(Register.R1, Register.R6, Field.PROTOCOL)
    code.jump_if(Register.R1, Test.NOT_EQUAL, socket.htons(ethernet), "pass")
    for at, size, width, wanted in ((9 if outside == 4 else 6, 1, Size.BYTE, 17), (header + 6, 2, Size.HALF, 0)):
        code.call(Helper.SKB_LOAD_BYTES, Register.R6, 14 + at, At(Register.R10, -8), size)
        code.jump_if(Register.R0, Test.NOT_EQUAL, 0, "pass")
        code.load(Register.R1, Register.R10, -8, width)
        code.jump_if(Register.R1, Test.NOT_EQUAL, wanted, "pass")
    code.leave(Verdict.DROP)
    code.label("pass")
    code.leave(Verdict.NEXT)
    return code


@OUTSIDE
@pytest.mark.parametrize("side", ["lan0", "wan0"])
def test_a_network_that_drops_datagrams_without_a_checksum_leaves_the_pump(
    three: Network, daemon: Daemon, outside: int, side: str
) -> None:
    """On the way of the client's offers, and on that of the server's."""
    with ExitStack() as stack:
        with netns.inside(three["gateway"]), load(dropping_what_has_no_checksum(outside), "drops") as program:
            stack.enter_context(program.attach(side, Direction.INGRESS))
        daemon(three["server"], "-L", TUN.server())
        daemon(three["client"], "-L", TUN.client(three.address("server", outside)))
        for _ in range(2):
            exchange(three["client"], three["server"], TUN.nets["server"])
            exchange(three["server"], three["client"], TUN.nets["client"])
        # Towards whom no offer of the other one has come through nothing goes by the kernel.
        blind = ("server", "client") if side == "lan0" else ("client", "server")
        assert hands_over(three[blind[0]], f"tun-{blind[0]}", [TUN.nets[blind[1]][0]]) > 0


# ---- what fails while it runs -------------------------------------------------------------------
def wait_for_pump(place: str, device: str, address: str) -> None:
    """Wait until the process carries pings."""
    deadline = time.monotonic() + PATIENCE
    while not hands_over(place, device, ["-i0.2", address]):
        assert time.monotonic() < deadline, "the kernel still carries the packets"


@pytest.mark.parametrize("role", ["server", "client"])
def test_programs_that_somebody_takes_off_leave_the_pump(two: Network, daemon: Daemon, role: str) -> None:
    ends = {
        "server": daemon(two["server"], "-L", TUN.server()),
        "client": daemon(two["client"], "-L", TUN.client(two.address("server"))),
    }
    wait_for_engine(two["client"], "tun-client", TUN.nets["server"][0])
    wait_for_engine(two["server"], "tun-server", TUN.nets["client"][0])
    with netns.inside(two[role]):
        (program,) = attached(socket.if_nametoindex(f"tun-{role}"), Direction.EGRESS)
    detach(program)
    said = ends[role].wait_for("engine pump from now on")
    assert "its program has been taken off the device" in said
    for other in ("server", "client"):
        peer = "client" if other == "server" else "server"
        wait_for_pump(two[other], f"tun-{other}", TUN.nets[peer][0])
    exchange(two["client"], two["server"], TUN.nets["server"])
    exchange(two["server"], two["client"], TUN.nets["client"])
    assert programs(two[role]) == 0
    assert ends[role].errors.count("engine pump from now on") == 1
    assert ends["client"].stop() == 0
    assert totals(ends["client"])[0] > 800_000


def test_a_network_device_that_goes_and_comes_back_is_used_again(two: Network, daemon: Daemon) -> None:
    daemon(two["server"], "-L", TUN.server())
    client = daemon(two["client"], "-L", TUN.client(two.address("server")))
    wait_for_engine(two["client"], "tun-client", TUN.nets["server"][0])
    for state in ("down", "up"):
        with netns.inside(two["client"]):
            subprocess.run(["ip", "link", "set", "wan0", state], check=True)
        if state == "down":
            client.wait_for("engine pump for")
    client.wait_for("engine kernel for")
    wait_for_engine(two["client"], "tun-client", TUN.nets["server"][0])
    exchange(two["client"], two["server"], TUN.nets["server"])


def test_a_peer_that_has_not_asked_gets_nothing_from_the_kernel_inside_a_host(two: Network, daemon: Daemon) -> None:
    daemon(two["server"], "-L", TUN.server(tun_engine="pump"))
    daemon(two["client"], "-L", TUN.client(two.address("server"), tun_engine="kernel"))
    exchange(two["client"], two["server"], TUN.nets["server"])
    assert hands_over(two["client"], "tun-client", [TUN.nets["server"][0]]) > 0


@pytest.mark.parametrize("ending", ["TERM", "KILL"])
def test_programs_end_with_the_process(two: Network, daemon: Daemon, unchanged: Any, ending: str) -> None:
    import signal

    with unchanged(two["server"], timeout=5.0):
        server = daemon(two["server"], "-L", TUN.server())
        daemon(two["client"], "-L", TUN.client(two.address("server")))
        wait_for_engine(two["client"], "tun-client", TUN.nets["server"][0])
        assert programs(two["server"]) >= 2
        server.send(getattr(signal, f"SIG{ending}"))
        server.wait()
        deadline = time.monotonic() + PATIENCE
        while programs(two["server"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_why_the_pump_is_used_is_said(two: Network, daemon: Daemon) -> None:
    limited = {
        "services": [
            {
                "name": "vpn",
                "addr": f":{PORT}",
                "handler": {"type": "tun"},
                "listener": {"type": "tun", "metadata": {"net": TUN.net("server"), "name": "tun-server"}},
                "limiter": "some",
            }
        ],
        "limiters": [{"name": "some", "limits": ["$ 100MB 100MB"]}],
    }
    server = daemon(two["server"], limited)
    assert "engine pump: there are traffic limits" in server.wait_for("engine ")
    client = daemon(two["client"], "-L", TUN.client(two.address("server"), tun_engine="pump"))
    assert "engine pump: chosen" in client.wait_for("engine ")
    exchange(two["client"], two["server"], TUN.nets["server"])
    client.stop()
    daemon(two["server"], "--instance", "relay", "-L", "relay://:8443")
    relayed = TUN.client(two.address("server"), tun_engine="kernel")
    client = daemon(two["client"], "-L", relayed, "-F", f"relay://{two.address('server')}:8443")
    said = client.wait_for("engine ")
    assert "engine pump: packets go through a chain" in said


def test_without_the_right_to_load_programs_the_pump_does_it(
    two: Network, daemon: Daemon, peer: Callable[[str], str]
) -> None:
    daemon(two["server"], "-L", TUN.server())
    client = gostnet("-L", TUN.client(two.address("server")), place=two["client"])
    dropped = Process(
        [peer("setpriv"), "--bounding-set=-bpf,-sys_admin", "--inh-caps=-bpf,-sys_admin", *client.arguments],
        two["client"],
        name="gostnet",
    )
    with dropped:
        said = dropped.wait_for("engine ")
        assert "engine pump" in said
        assert "CAP_BPF" in said
        exchange(two["client"], two["server"], TUN.nets["server"])
