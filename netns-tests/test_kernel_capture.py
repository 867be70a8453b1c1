"""What is captured and what is not, shown with traffic: client -- gateway -- server, the rules on the gateway."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import pytest
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from gostnet.core.resources import (
    MARK_OWN,
    Address,
    Capture,
    NftChain,
    NftRule,
    NftTable,
    Resource,
)
from gostnet.kernel import nft_expr
from gostnet.kernel.live import LiveKernel
from gostnet.kernel.provision import Provisioner
from gostnet.testing.namespaces import Network, Topology, read_sysctl, row, write_sysctl
from gostnet.testing.netlink import ROUTE, Netlink, interfaces
from gostnet.testing.state import diff, snapshot

pytestmark = pytest.mark.netns

TOPOLOGY: Topology = row("client", "gateway", "server")
CLIENT = {4: "10.99.1.1", 6: "fd99:1::1"}
LAN = {4: "10.99.1.2", 6: "fd99:1::2"}
WAN = {4: "10.99.2.1", 6: "fd99:2::1"}
SERVER = {4: "10.99.2.2", 6: "fd99:2::2"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
PROXY_PORT, ECHO_PORT, SERVICE_PORT = 12345, 7007, 2222
TIMEOUT = 3.0
REFUSED_TIMEOUT = 0.4
"""Seconds after which a packet that has to be lost counts as lost."""

IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75
SO_ORIGINAL_DST = 80
RECVORIGDSTADDR = {4: (socket.IPPROTO_IP, 20), 6: (socket.IPPROTO_IPV6, 74)}

Protocol = Literal["tcp", "udp"]
Target: TypeAlias = tuple[str, int]
MODES = [("tcp", "redirect"), ("tcp", "tproxy"), ("udp", "tproxy")]


# ---- actors -------------------------------------------------------------------------------------
class Actor:
    """Sockets served by threads, all ended by `close`."""

    def __init__(self, net: Network, role: str) -> None:
        self.net, self.role = net, role
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closing = False

    def open(self, version: int, kind: int, *, mark: int = 0, transparent: bool = False) -> socket.socket:
        sock = self.net.socket_in(self.role, FAMILY[version], kind)
        sock.setblocking(True)
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if transparent and version == 4:
            sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        elif transparent:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        self._sockets.append(sock)
        return sock

    def run(self, target: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                target()
            except OSError:
                if not self._closing and os.environ.get("DEBUG_ACTORS"):
                    raise

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()

    def accept_on(self, sock: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        def loop() -> None:
            while True:
                conn, _ = sock.accept()
                self._sockets.append(conn)
                self.run(partial(serve, conn))

        self.run(loop)

    def close(self) -> None:
        self._closing = True
        for sock in self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)  # wakes whoever reads; raises for unconnected ones all the same
            except OSError:
                pass
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        for sock in self._sockets:
            sock.close()


class Echo(Actor):
    """TCP and UDP, both families: says which address it sees, then echoes."""

    def __init__(self, net: Network, role: str, port: int = ECHO_PORT) -> None:
        super().__init__(net, role)
        for version in (4, 6):
            tcp, udp = self.open(version, socket.SOCK_STREAM), self.open(version, socket.SOCK_DGRAM)
            for sock in (tcp, udp):
                sock.bind(("", port))
            tcp.listen()
            self.accept_on(tcp, self._serve)
            self.run(partial(self._answer, udp))

    @staticmethod
    def _serve(conn: socket.socket) -> None:
        conn.sendall(f"{conn.getpeername()[0]}\n".encode())
        while data := conn.recv(65536):
            conn.sendall(data)
        conn.shutdown(socket.SHUT_WR)

    def _answer(self, sock: socket.socket) -> None:
        while True:
            data, peer = sock.recvfrom(65536)
            if self._closing:
                return
            sock.sendto(f"{peer[0]}\n".encode() + data, peer[:2])


class Proxy(Actor):
    """Relays what is captured to where it was going to; `log` says what came by."""

    def __init__(self, net: Network, role: str, protocol: Protocol, method: str, port: int = PROXY_PORT) -> None:
        super().__init__(net, role)
        self.log: list[Target] = []
        for version in (4, 6):
            transparent = method == "tproxy"
            kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
            sock = self.open(version, kind, mark=MARK_OWN, transparent=transparent)
            sock.bind(("", port))
            if protocol == "tcp":
                sock.listen()
                target = _local_address if transparent else _original_destination
                self.accept_on(sock, partial(self._relay, version, target))
            else:
                sock.setsockopt(*RECVORIGDSTADDR[version], 1)
                self.run(partial(self._datagrams, sock, version))

    def _relay(self, version: int, target_of: Callable[[socket.socket], Target], conn: socket.socket) -> None:
        target = target_of(conn)
        self.log.append(target)
        out = self.open(version, socket.SOCK_STREAM, mark=MARK_OWN)
        out.connect(target)
        self.run(partial(_pipe, conn, out))
        _pipe(out, conn)

    def _datagrams(self, sock: socket.socket, version: int) -> None:
        while True:
            data, control, _, client = sock.recvmsg(65536, 256)
            if self._closing:
                return
            target = _destination_of(control, version)
            self.log.append(target)
            out = self.open(version, socket.SOCK_DGRAM, mark=MARK_OWN)
            out.settimeout(TIMEOUT)
            out.sendto(data, target)
            answer = out.recv(65536)
            back = self.open(version, socket.SOCK_DGRAM, mark=MARK_OWN, transparent=True)
            back.bind(target)
            back.sendto(answer, client[:2])
            back.close()
            out.close()


def _pipe(source: socket.socket, sink: socket.socket) -> None:
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)


def _local_address(conn: socket.socket) -> Target:
    return conn.getsockname()[:2]


def _original_destination(conn: socket.socket) -> Target:
    if conn.family == socket.AF_INET:
        port, packed = struct.unpack("!2xH4s8x", conn.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16))
    else:
        port, packed = struct.unpack("!2xH4x16s4x", conn.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28))
    return socket.inet_ntop(conn.family, packed), port


def _destination_of(control: list[tuple[int, int, bytes]], version: int) -> Target:
    for level, kind, data in control:
        if (level, kind) == RECVORIGDSTADDR[version]:
            packed = data[4:8] if version == 4 else data[8:24]
            return socket.inet_ntop(FAMILY[version], packed), struct.unpack_from("!H", data, 2)[0]
    raise AssertionError("the datagram does not say where it was going to")


@dataclass
class Talk:
    """A connection, or a socket that sends datagrams to one peer."""

    sock: socket.socket
    seen: str = ""

    def ask(self, payload: bytes = b"hello") -> bytes:
        """Send and return what comes back."""
        self.sock.sendall(payload)
        if self.sock.type == socket.SOCK_DGRAM:
            self.seen, _, rest = self.sock.recv(65536).decode().partition("\n")
            return rest.encode()
        got = b""
        while len(got) < len(payload):
            chunk = self.sock.recv(65536)
            if not chunk:
                raise ConnectionError("ended")
            got += chunk
        return got


@contextmanager
def talk(
    net: Network,
    role: str,
    protocol: Protocol,
    target: Target,
    *,
    source: Target | None = None,
    mark: int = 0,
    timeout: float = TIMEOUT,
) -> Iterator[Talk]:
    """Connect from a host; with TCP the first line that comes is who the server sees."""
    version = 6 if ":" in target[0] else 4
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with net.socket_in(role, FAMILY[version], kind) as sock:
        sock.settimeout(timeout)
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if source is not None:
            sock.bind(source)
        sock.connect(target)
        talking = Talk(sock)
        if protocol == "tcp":
            line = b""
            while not line.endswith(b"\n"):
                chunk = sock.recv(1)
                if not chunk:
                    raise ConnectionError("ended")
                line += chunk
            talking.seen = line.decode().strip()
        yield talking


def seen(net: Network, role: str, protocol: Protocol, target: Target, **kwargs: object) -> str:
    """Exchange something and return which address the server saw."""
    with talk(net, role, protocol, target, **kwargs) as talking:  # type: ignore[arg-type]
        assert talking.ask(b"payload") == b"payload"
        return talking.seen


# ---- set-up -------------------------------------------------------------------------------------
@dataclass
class Scene:
    """The network, an echo server beyond the gateway, and the gateway's provisioner."""

    net: Network
    provisioner: Provisioner
    stack: ExitStack
    kernel: LiveKernel

    def proxy(self, protocol: Protocol, method: str, port: int = PROXY_PORT) -> Proxy:
        proxy = Proxy(self.net, "gateway", protocol, method, port)
        self.stack.callback(proxy.close)
        return proxy

    def echo(self, role: str, port: int) -> Echo:
        echo = Echo(self.net, role, port)
        self.stack.callback(echo.close)
        return echo

    def holds(self, item: Resource) -> None:
        """Have the gateway hold something that is the administrator's, until the end of the test."""
        self.kernel.put(item, None)
        self.stack.callback(self.kernel.drop, item)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Network(TOPOLOGY) as net, ExitStack() as stack:
        echo = Echo(net, "server")
        stack.callback(echo.close)
        before = snapshot(net["gateway"])
        kernel = LiveKernel(net["gateway"])
        with Provisioner("test", state_dir=tmp_path, netns=net["gateway"]) as provisioner:
            yield Scene(net, provisioner, stack, kernel)
        stack.close()
        kernel.close()
        assert diff(before, snapshot(net["gateway"])) == []
        assert list(tmp_path.iterdir()) == []


def capture(protocol: str, method: str, **kwargs: object) -> Capture:
    values = {"interfaces": ("lan0",)} | kwargs
    return Capture("gateway", protocol, method, PROXY_PORT, **values)  # type: ignore[arg-type]


# ---- what is captured ---------------------------------------------------------------------------
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("protocol", "method"), MODES)
def test_what_enters_by_an_interface_is_captured_until_rollback(
    scene: Scene, protocol: Protocol, method: str, version: int
) -> None:
    target = (SERVER[version], ECHO_PORT)
    proxy = scene.proxy(protocol, method)
    assert seen(scene.net, "client", protocol, target) == CLIENT[version]
    scene.provisioner.apply([capture(protocol, method)])
    assert seen(scene.net, "client", protocol, target) == WAN[version]
    assert proxy.log == [target]
    scene.provisioner.rollback()
    assert seen(scene.net, "client", protocol, target) == CLIENT[version]
    assert proxy.log == [target]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("protocol", "method"), MODES)
def test_local_captures_own_processes_but_not_own_sockets(
    scene: Scene, protocol: Protocol, method: str, version: int
) -> None:
    target = (SERVER[version], ECHO_PORT)
    proxy = scene.proxy(protocol, method)
    scene.provisioner.apply([capture(protocol, method, interfaces=(), local=True)])
    assert seen(scene.net, "gateway", protocol, target) == WAN[version]
    assert proxy.log == [target]
    assert seen(scene.net, "gateway", protocol, target, mark=MARK_OWN) == WAN[version]
    assert seen(scene.net, "client", protocol, target) == CLIENT[version]
    assert proxy.log == [target]
    scene.provisioner.rollback()
    assert seen(scene.net, "gateway", protocol, target) == WAN[version]
    assert proxy.log == [target]


def test_both_protocols_and_places_at_once(scene: Scene) -> None:
    red, redu = scene.proxy("tcp", "redirect"), scene.proxy("udp", "tproxy")
    scene.provisioner.apply([capture("tcp", "redirect", local=True), capture("udp", "tproxy", local=True)])
    count = 0
    for version in (4, 6):
        target = (SERVER[version], ECHO_PORT)
        for role in ("client", "gateway"):
            assert seen(scene.net, role, "tcp", target) == WAN[version]
            assert seen(scene.net, role, "udp", target) == WAN[version]
            count += 1
    assert (len(red.log), len(redu.log)) == (count, count)


def test_captured_connection_lives_through_a_reload_that_excludes_it(scene: Scene) -> None:
    for method in ("redirect", "tproxy"):
        proxy = scene.proxy("tcp", method, PROXY_PORT if method == "redirect" else PROXY_PORT + 1)
        port = PROXY_PORT if method == "redirect" else PROXY_PORT + 1
        wanted = Capture("gateway", "tcp", method, port, ("lan0",), True)
        scene.provisioner.apply([wanted])
        target = (SERVER[4], ECHO_PORT)
        with talk(scene.net, "client", "tcp", target) as from_lan, talk(scene.net, "gateway", "tcp", target) as own:
            assert len(proxy.log) == 2
            assert [str(step)[0] for step in scene.provisioner.apply([replace(wanted, exclude=("10.99.2.0/24",))])] == [
                "~"
            ]
            assert from_lan.ask(b"x" * 300000) == b"x" * 300000
            assert own.ask(b"y" * 300000) == b"y" * 300000
            assert seen(scene.net, "client", "tcp", target) == CLIENT[4]
            assert len(proxy.log) == 2
        scene.provisioner.rollback()


@pytest.mark.parametrize("narrowed", ["ports", "sources", "exclude"])
def test_nothing_escapes_while_the_rules_are_replaced(scene: Scene, narrowed: str) -> None:
    """Each kind of narrowing in turn: the kernel's sets are not as atomic as its rules."""
    scene.proxy("tcp", "redirect")
    wanted = capture("tcp", "redirect")
    scene.provisioner.apply([wanted])
    servers_saw: list[str] = []
    stop = threading.Event()

    def connect() -> None:
        while not stop.is_set():
            servers_saw.append(seen(scene.net, "client", "tcp", (SERVER[4], ECHO_PORT)))

    threads = [threading.Thread(target=connect) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 101):
        values = {
            "ports": ((1, 65535 - number),),
            "sources": ("10.99.1.0/24", f"192.0.2.{number}"),
            "exclude": (f"192.0.2.{number}",),
        }
        steps = scene.provisioner.apply([replace(wanted, **{narrowed: values[narrowed]})])
        assert [step.verb for step in steps] == ["change"]
    stop.set()
    for thread in threads:
        thread.join()
    assert len(servers_saw) >= 2
    assert set(servers_saw) == {WAN[4]}


def test_interface_is_captured_when_it_appears(scene: Scene) -> None:
    target = (SERVER[4], ECHO_PORT)
    for protocol, method in MODES:
        proxy = scene.proxy(protocol, method)
        scene.provisioner.apply([capture(protocol, method, interfaces=("late0",))])
        assert seen(scene.net, "client", protocol, target) == CLIENT[4]
        rename(scene.net["gateway"], "lan0", "late0")
        assert seen(scene.net, "client", protocol, target) == WAN[4]
        rename(scene.net["gateway"], "late0", "lan0")
        scene.kernel.put(Address("lan0", f"{LAN[6]}/64"), None)  # lost when it was down
        assert proxy.log == [target]
        scene.provisioner.rollback()
        proxy.close()


def rename(place: str, old: str, new: str) -> None:
    """Give an interface another name; down for the moment, so that every kernel allows it. IPv4 addresses stay."""
    with Netlink(ROUTE, place) as netlink:
        index = next(i.index for i in interfaces(netlink) if i.name == old)
        for name, flags in ((None, 0), (new, 0), (None, 1)):
            message = ifinfmsg()
            message["index"] = index
            if name is None:
                message["flags"], message["change"] = flags, 1
            else:
                message["attrs"] = [("IFLA_IFNAME", name)]
            netlink.change(f"rename {old}", 16, message)


# ---- what is left alone -------------------------------------------------------------------------
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("protocol", "method"), MODES)
def test_inbound_traffic_is_left_alone(scene: Scene, protocol: Protocol, method: str, version: int) -> None:
    proxy = scene.proxy(protocol, method)
    scene.echo("gateway", SERVICE_PORT)
    scene.echo("client", SERVICE_PORT)
    scene.provisioner.apply([capture(protocol, method, interfaces=("lan0", "wan0"), local=True)])
    # to the gateway itself, from beyond and from a captured interface, at either of its addresses
    for role, source, near in (("server", SERVER, WAN), ("client", CLIENT, LAN)):
        # A datagram server that is asked at its far address would answer from the near one, with or without us.
        for address in {near[version], *(LAN[version], WAN[version])[: 2 * (protocol == "tcp")]}:
            assert seen(scene.net, role, protocol, (address, SERVICE_PORT)) == source[version]
    assert seen(scene.net, "gateway", protocol, (LAN[version], SERVICE_PORT)) == LAN[version]
    assert proxy.log == []
    # from beyond to a host behind the gateway, whose answers enter by a captured interface
    scene.provisioner.apply([capture(protocol, method, local=True)])
    with talk(scene.net, "server", protocol, (CLIENT[version], SERVICE_PORT)) as talking:
        for _ in range(3):
            assert talking.ask() == b"hello"
        assert talking.seen == SERVER[version]
    assert proxy.log == []


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("protocol", "method"), MODES)
def test_port_forwarding_of_the_administrator_is_left_alone(
    scene: Scene, protocol: Protocol, method: str, version: int
) -> None:
    number = nft_expr.TCP if protocol == "tcp" else nft_expr.UDP
    forward = nft_expr.compose(
        nft_expr.protocol(number),
        nft_expr.ip_version(version),
        nft_expr.destination_within(WAN[version]),
        nft_expr.redirect(SERVICE_PORT, CLIENT[version]),
    )
    elsewhere = nft_expr.compose(
        nft_expr.protocol(number),
        nft_expr.ip_version(version),
        nft_expr.destination_within("192.0.2.1" if version == 4 else "2001:db8::1"),
        nft_expr.redirect(ECHO_PORT, SERVER[version]),
    )
    content = (
        NftChain("pre", "prerouting", "nat", -100),
        NftRule("pre", *forward),
        NftRule("pre", *elsewhere),
    )
    scene.holds(NftTable("admin", content, owner=False))
    proxy = scene.proxy(protocol, method)
    scene.echo("client", SERVICE_PORT)
    scene.provisioner.apply([capture(protocol, method, local=True)])
    with talk(scene.net, "server", protocol, (WAN[version], 8080)) as talking:
        for _ in range(3):
            assert talking.ask() == b"hello"
        assert talking.seen == SERVER[version]
    # what the administrator sends somewhere is not ours either, although it enters by a captured interface
    fixed = "192.0.2.1" if version == 4 else "2001:db8::1"
    assert seen(scene.net, "client", protocol, (fixed, 9)) == CLIENT[version]
    assert proxy.log == []


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("method", ["redirect", "tproxy"])
def test_connections_older_than_the_start_survive(scene: Scene, method: str, tracked: bool) -> None:
    if tracked:  # somebody's rules have had connection tracking on already
        content = (
            NftChain("c", "forward"),
            NftRule("c", *nft_expr.compose(nft_expr.reply(), nft_expr.accept())),
            NftChain("o", "output"),
            NftRule("o", *nft_expr.compose(nft_expr.reply(), nft_expr.accept())),
        )
        scene.holds(NftTable("admin", content, owner=False))
    proxy = scene.proxy("tcp", method)
    scene.echo("gateway", SERVICE_PORT)
    scene.echo("client", SERVICE_PORT)
    pairs = [
        (role, address, port)
        for version in (4, 6)
        for role, address, port in (
            ("client", SERVER[version], ECHO_PORT),
            ("gateway", SERVER[version], ECHO_PORT),
            ("server", WAN[version], SERVICE_PORT),
            ("server", CLIENT[version], SERVICE_PORT),
        )
    ]
    wanted = capture("tcp", method, local=True)
    with ExitStack() as stack:
        talks = [stack.enter_context(talk(scene.net, role, "tcp", (a, port))) for role, a, port in pairs]
        for change in ([wanted], [replace(wanted, exclude=("192.0.2.0/24",))], []):
            scene.provisioner.apply(change)
            for talking in talks:
                assert talking.ask(b"z" * 100000) == b"z" * 100000
    assert proxy.log == []


@pytest.mark.parametrize(("protocol", "method"), MODES)
def test_exclude_sources_and_ports_narrow_a_capture(scene: Scene, protocol: Protocol, method: str) -> None:
    proxy = scene.proxy(protocol, method)
    scene.echo("server", SERVICE_PORT)

    def captured(**kwargs: object) -> list[bool]:
        """Tell for IPv4, IPv6, and the other port whether traffic is captured."""
        scene.provisioner.apply([capture(protocol, method, local=True, **kwargs)])
        found = []
        for address, port in ((SERVER[4], ECHO_PORT), (SERVER[6], ECHO_PORT), (SERVER[4], SERVICE_PORT)):
            before = len(proxy.log)
            seen(scene.net, "client", protocol, (address, port))
            found.append(len(proxy.log) > before)
        return found

    assert captured() == [True, True, True]
    assert captured(exclude=("10.99.2.0/24",)) == [False, True, False]
    assert captured(exclude=("fd99:2::2", "10.99.2.3/32", "10.99.0.0/23")) == [True, False, True]
    assert captured(exclude=("10.0.0.0/8", "10.99.0.0/16", "::/0")) == [False, False, False]
    assert captured(sources=("10.99.1.1",)) == [True, False, True]
    assert captured(sources=("10.99.1.2/32", "fd99:1::/64")) == [False, True, False]
    assert captured(ports=((1, 7006), (7008, 65535))) == [False, False, True]
    assert captured(ports=((ECHO_PORT, ECHO_PORT), (60000, 65535))) == [True, True, False]
    scene.provisioner.apply([capture(protocol, method, interfaces=(), local=True, sources=("192.0.2.1",))])
    proxy.log.clear()
    seen(scene.net, "gateway", protocol, (SERVER[4], ECHO_PORT))
    assert proxy.log == [(SERVER[4], ECHO_PORT)], "sources concern interfaces only"


def test_the_first_of_several_captures_takes_what_it_wants(scene: Scene) -> None:
    first, second = scene.proxy("udp", "tproxy"), scene.proxy("udp", "tproxy", PROXY_PORT + 1)
    scene.echo("server", SERVICE_PORT)
    narrow = capture("udp", "tproxy", local=True, ports=((ECHO_PORT, ECHO_PORT),))
    rest = Capture("rest", "udp", "tproxy", PROXY_PORT + 1, ("lan0",), True)
    scene.provisioner.apply([narrow, rest])
    for role in ("client", "gateway"):
        for port in (ECHO_PORT, SERVICE_PORT):
            seen(scene.net, role, "udp", (SERVER[6], port))
    assert first.log == [(SERVER[6], ECHO_PORT)] * 2
    assert second.log == [(SERVER[6], SERVICE_PORT)] * 2


def test_dhcp_broadcast_multicast_and_icmp_are_left_alone(scene: Scene) -> None:
    proxy = scene.proxy("udp", "tproxy")
    renewal = scene.echo("server", 67)
    scene.provisioner.apply([capture("udp", "tproxy", local=True)])
    for role in ("client", "gateway"):
        source = CLIENT[4] if role == "client" else WAN[4]
        assert seen(scene.net, role, "udp", (SERVER[4], 67), source=("", 68)) == source
    assert renewal.net is scene.net
    with scene.net.socket_in("gateway", socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.settimeout(TIMEOUT)
        listener.bind(("", 5353))
        membership = socket.inet_aton("224.0.0.251") + socket.inet_aton(LAN[4])
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        for target in ("10.99.1.255", "255.255.255.255", "224.0.0.251"):
            with scene.net.socket_in("client", socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                sender.bind((CLIENT[4], 0))
                sender.sendto(target.encode(), (target, 5353))
            assert listener.recv(99) == target.encode()
    assert proxy.log == []
    assert ping(scene.net, "client", SERVER[4])


def ping(net: Network, role: str, target: str) -> bool:
    """Tell whether an echo request to an IPv4 address is answered."""
    with net.socket_in(role, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect((target, 0))
        body = struct.pack("!BBHHH", 8, 0, 0, 77, 1)
        total = sum(struct.unpack("!4H", body))
        body = body[:2] + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + body[4:]
        sock.send(body)
        packet = sock.recv(2048)
        return packet[20] == 0 and packet[24:26] == body[4:6]


# ---- surroundings -------------------------------------------------------------------------------
def test_capture_works_beside_reverse_path_filters(scene: Scene) -> None:
    """wg-quick sets src_valid_mark: then the way back to the client is looked up with the mark of the packet."""
    settings = {"net/ipv4/conf/all/src_valid_mark": "1", "net/ipv4/conf/all/rp_filter": "1"}
    settings["net/ipv4/fwmark_reflect"] = settings["net/ipv4/tcp_fwmark_accept"] = "1"
    for key, value in settings.items():
        scene.stack.callback(write_sysctl, scene.net["gateway"], key, read_sysctl(scene.net["gateway"], key))
        write_sysctl(scene.net["gateway"], key, value)
    tcp, udp = scene.proxy("tcp", "tproxy"), scene.proxy("udp", "tproxy")
    scene.provisioner.apply([capture("tcp", "tproxy", local=True), capture("udp", "tproxy", local=True)])
    for version in (4, 6):
        for role in ("client", "gateway"):
            for protocol in ("tcp", "udp"):
                assert seen(scene.net, role, protocol, (SERVER[version], ECHO_PORT)) == WAN[version]
    assert (len(tcp.log), len(udp.log)) == (4, 4)


def test_capture_by_tproxy_works_with_syn_cookies(scene: Scene) -> None:
    key = "net/ipv4/tcp_syncookies"
    scene.stack.callback(write_sysctl, scene.net["gateway"], key, read_sysctl(scene.net["gateway"], key))
    write_sysctl(scene.net["gateway"], key, "2")
    proxy = scene.proxy("tcp", "tproxy")
    scene.provisioner.apply([capture("tcp", "tproxy", local=True)])
    for version in (4, 6):
        for role in ("client", "gateway"):
            assert seen(scene.net, role, "tcp", (SERVER[version], ECHO_PORT)) == WAN[version]
    assert len(proxy.log) == 4


@pytest.mark.parametrize(("protocol", "method"), MODES)
def test_nothing_escapes_without_a_listener(scene: Scene, protocol: Protocol, method: str) -> None:
    scene.provisioner.apply([capture(protocol, method, local=True)])
    for role in ("client", "gateway"):
        for version in (4, 6):
            with pytest.raises(OSError, match=r"timed out|refused|unreachable|No route"):
                seen(scene.net, role, protocol, (SERVER[version], ECHO_PORT), timeout=REFUSED_TIMEOUT)


@pytest.mark.parametrize(("protocol", "method"), MODES)
def test_listener_at_an_address_of_its_own(scene: Scene, protocol: Protocol, method: str) -> None:
    proxy = scene.proxy(protocol, method)  # listens everywhere, so that only the rules can be wrong
    scene.provisioner.apply([capture(protocol, method, address=WAN[4], local=True)])
    for role, source in (("client", CLIENT), ("gateway", WAN)):
        proxy.log.clear()
        assert seen(scene.net, role, protocol, (SERVER[4], ECHO_PORT)) == WAN[4]
        assert proxy.log == [(SERVER[4], ECHO_PORT)]
        assert seen(scene.net, role, protocol, (SERVER[6], ECHO_PORT)) == source[6]
        assert proxy.log == [(SERVER[4], ECHO_PORT)]


def test_a_table_of_our_name_that_nobody_owns_is_replaced(scene: Scene) -> None:
    """A rule set that was saved while we ran, and loaded at boot."""
    old = NftTable("gostnet-test", (NftChain("c", "forward"),), owner=False)
    scene.kernel.put(old, None)
    proxy = scene.proxy("tcp", "redirect")
    scene.provisioner.apply([capture("tcp", "redirect")])
    assert seen(scene.net, "client", "tcp", (SERVER[4], ECHO_PORT)) == WAN[4]
    assert len(proxy.log) == 1
