"""What is captured and what is not, shown with traffic: client -- gateway -- server, the rules on the gateway."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from gostnet.core.resources import (
    MARK_OWN,
    Capture,
    NftChain,
    NftRule,
    NftTable,
    Resource,
    Route,
    Rule,
)
from gostnet.kernel import nft_expr
from gostnet.kernel.live import LiveKernel
from gostnet.kernel.nft import Nft, Transaction
from gostnet.kernel.provision import Provisioner
from gostnet.testing.namespaces import Network, Topology, row, write_sysctl
from gostnet.testing.netlink import ROUTE, Netlink, interfaces
from gostnet.testing.state import diff, snapshot

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

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
                self.run(lambda: serve(conn))

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
            self.run(lambda udp=udp: self._answer(udp))

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
        self.log: list[tuple[str, int]] = []
        for version in (4, 6):
            transparent = method == "tproxy"
            kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
            sock = self.open(version, kind, mark=MARK_OWN, transparent=transparent)
            sock.bind(("", port))
            if protocol == "tcp":
                sock.listen()
                target = _local_address if transparent else _original_destination
                self.accept_on(sock, lambda conn, v=version, of=target: self._relay(conn, v, of(conn)))
            else:
                sock.setsockopt(*RECVORIGDSTADDR[version], 1)
                self.run(lambda sock=sock, version=version: self._datagrams(sock, version))

    def _relay(self, conn: socket.socket, version: int, target: tuple[str, int]) -> None:
        self.log.append(target)
        out = self.open(version, socket.SOCK_STREAM, mark=MARK_OWN)
        out.connect(target)
        self.run(lambda: _pipe(conn, out))
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


def _local_address(conn: socket.socket) -> tuple[str, int]:
    return conn.getsockname()[:2]


def _original_destination(conn: socket.socket) -> tuple[str, int]:
    if conn.family == socket.AF_INET:
        port, packed = struct.unpack("!2xH4s8x", conn.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16))
    else:
        port, packed = struct.unpack("!2xH4x16s4x", conn.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28))
    return socket.inet_ntop(conn.family, packed), port


def _destination_of(control: list[tuple[int, int, bytes]], version: int) -> tuple[str, int]:
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
    target: tuple[str, int],
    *,
    source: tuple[str, int] | None = None,
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


def seen(net: Network, role: str, protocol: Protocol, target: tuple[str, int], **kwargs: object) -> str:
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
    proxies: list[Proxy] = field(default_factory=list)

    def proxy(self, protocol: Protocol, method: str, port: int = PROXY_PORT) -> Proxy:
        proxy = Proxy(self.net, "gateway", protocol, method, port)
        self.stack.callback(proxy.close)
        self.proxies.append(proxy)
        return proxy

    def echo(self, role: str, port: int) -> Echo:
        echo = Echo(self.net, role, port)
        self.stack.callback(echo.close)
        return echo

    def holds(self, item: Resource) -> None:
        """Have the gateway hold something that is the administrator's, until the end of the test."""
        kernel = LiveKernel(self.net["gateway"])
        self.stack.callback(kernel.close)
        kernel.put(item, None)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Network(TOPOLOGY) as net, ExitStack() as stack:
        echo = Echo(net, "server")
        stack.callback(echo.close)
        before = snapshot(net["gateway"])
        with Provisioner("test", state_dir=tmp_path, netns=net["gateway"]) as provisioner:
            yield Scene(net, provisioner, stack)
        stack.close()
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
