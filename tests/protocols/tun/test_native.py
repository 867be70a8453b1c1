"""The pump in C behind the handler: when it is taken, what stays Python's, and what happens when it fails."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.contracts import Authenticator
from gostnet.core.flow import Flow, Shapers
from gostnet.core.log import Logger
from gostnet.core.packets import Packets
from gostnet.core.tasks import Scope, run
from gostnet.core.udp_socket import UdpSocket, listen_udp
from gostnet.dataplane.native import library, tun_pump
from gostnet.dataplane.native.tun_pump import TunPump
from gostnet.dataplane.tcp_runs import PLAIN
from gostnet.dataplane.tun_device import TunDevice
from gostnet.pipeline.devices import first_ended
from gostnet.pipeline.handler import HandlerContext
from gostnet.protocols.tun import codec, native
from gostnet.protocols.tun.client import ClientSession, Liveness
from gostnet.protocols.tun.server import PeerServer
from gostnet.testing.memory import datagrams_pair

from ..vectors import UdpPeer
from .kit import MemoryDevice, packet4, setup

there = pytest.mark.skipif(library.load()[0] is None, reason=library.load()[1] or "the library is there")
OURS, THEIRS = "192.168.0.1", "192.168.0.2"


class Said(Logger):
    """A logger whose lines are kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warned = asyncio.Event()

    def debug(self, message: str, **_: Any) -> None:
        pass

    def info(self, message: str, **_: Any) -> None:
        self.lines.append(f"info {message}")

    def warn(self, message: str, **_: Any) -> None:
        self.lines.append(f"warn {message}")
        self.warned.set()


@pytest.fixture(autouse=True)
def _no_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices here are pairs of sockets."""
    monkeypatch.setattr(tun_pump, "set_offload", lambda fd, features: True)


class Fake(TunDevice):
    """A device whose kernel is the test."""

    def __init__(self, **ways: Any) -> None:
        self.far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.far.setblocking(False)
        near.setblocking(False)
        super().__init__(near.detach(), "fake", 1420, setup=setup(f"{OURS}/24", **ways), joins=True)

    def check(self) -> None:
        """It is never gone."""

    def abort(self) -> None:
        super().abort()
        self.far.close()

    def route(self, packet: bytes) -> None:
        self.far.send(PLAIN + packet)

    async def taken(self) -> bytes:
        for _ in range(5000):
            try:
                return self.far.recv(70000)[10:]
            except BlockingIOError:
                await asyncio.sleep(0.001)
        raise AssertionError("nothing has come out of the device")


# ---- which one -----------------------------------------------------------------------------------------
def chosen(flow: Flow | None = None, device: Packets | None = None, carrier: Any = None) -> tuple[str, str]:
    """Return (what is said of the choice, the flow's label)."""
    log, flow = Said(), flow or Flow("", ANY)

    async def main() -> None:
        udp = UdpSocket(listen_udp(Endpoint("127.0.0.1", 0)))
        fake = device or Fake()
        path = native.start(flow, fake, carrier or udp, log, server=True)
        if path is not None:
            path.close()
        fake.abort()
        udp.abort()

    run(main())
    return log.lines[-1], flow.labels["pump"]


@there
def test_the_pump_in_c_is_taken_where_nothing_speaks_against_it() -> None:
    assert chosen() == ("info fake: pump in C", "c")


@there
def test_each_reason_for_the_pump_in_python_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    limited, recorded, copied = Flow("", ANY), Flow("", ANY), Flow("", ANY)
    limited.shapers = Shapers(up=[object()])  # type: ignore[list-item]
    recorded.taps = [lambda data, up: None]
    copied.engine = "copy"
    routed = MemoryDevice(setup(f"{OURS}/24"))
    routed.setup = replace(routed.setup, router=object())  # type: ignore[arg-type]
    assert chosen(flow=limited) == ("info fake: pump in Python: there are traffic limits", "python")
    assert chosen(flow=recorded)[0].endswith(": the packets are recorded")
    assert chosen(flow=copied)[0].endswith(": the service has the engine copy")
    assert chosen(device=routed)[0].endswith(": a router chooses among peers")
    assert chosen(device=MemoryDevice(setup(f"{OURS}/24")))[0].endswith(": the device takes no runs")
    assert chosen(carrier=datagrams_pair()[0])[0].endswith(": packets go through a chain")
    monkeypatch.setattr(native, "load", lambda: (None, "switched off by a test"))
    assert chosen()[0] == "info fake: pump in Python: switched off by a test"


@there
def test_a_pump_that_cannot_be_started_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EAGAIN, "no more threads")

    monkeypatch.setattr(native, "TunPump", refuse)
    assert chosen() == ("info fake: pump in Python: [Errno 11] no more threads", "python")


# ---- with peers ----------------------------------------------------------------------------------------
class Breaking(TunPump):
    """A pump whose thread ends when the test says so, with the next thing that it leaves."""

    broken = False

    @property
    def ended(self) -> int:
        return errno.EIO if self.broken else super().ended


class Serving:
    """A server of a fake device, and what it says."""

    def __init__(self, device: Fake, server: PeerServer, address: Endpoint, log: Said, flow: Flow) -> None:
        self.device = device
        self.server = server
        self.address = address
        self.log = log
        self.flow = flow

    async def register(self, peer: UdpPeer, *addresses: str, passphrase: str = "") -> None:
        """Register, and wait for the answer."""
        registration = codec.encode_registration(passphrase, [ip_address(text) for text in addresses])
        await peer.send(registration, self.address)
        assert codec.is_answer((await peer.receive())[0])


@asynccontextmanager
async def serving(users: Authenticator | None = None, *, p2p: bool = False, **options: Any) -> AsyncIterator[Serving]:
    """Serve a fake device; the pump is the one in C."""
    device, log, flow = Fake(), Said(), Flow("", ANY)
    sock = listen_udp(Endpoint("127.0.0.1", 0))
    address = Endpoint.from_sockaddr(sock.getsockname())
    carrier = UdpSocket(sock, address)
    context = HandlerContext(service="tun", authenticator=users, log=log)
    server = PeerServer(flow, device, carrier, context, p2p=p2p, choice="pump", **options)
    assert "info fake: pump in C" in log.lines
    scope = Scope("server")
    task = scope.start(first_ended(server.serve(), server.attend()), "server")
    await asyncio.sleep(0)  # it begins: what is cancelled before that has never been awaited
    try:
        yield Serving(device, server, address, log, flow)
        assert not task.done(), "the server has ended"
    finally:
        await scope.cancel()
        server.close()
        carrier.abort()
        device.abort()


@there
@pytest.mark.parametrize("p2p", [False, True])
def test_peers_register_move_and_are_counted(p2p: bool) -> None:
    async def main() -> None:
        async with serving(p2p=p2p) as place:
            with UdpPeer() as one, UdpPeer() as two:
                await place.register(one, THEIRS)
                place.device.route(packet := packet4(OURS, THEIRS, b"to one"))
                assert await one.receive() == (packet, place.address)
                await one.send(packet := packet4(THEIRS, OURS, b"from one"), place.address)
                assert await place.device.taken() == packet
                await place.register(two, THEIRS)
                place.device.route(packet4(OURS, THEIRS, b"to the second"))
                assert (await two.receive())[0] == packet4(OURS, THEIRS, b"to the second")
            place.server.close()
            assert (place.flow.meter.up, place.flow.meter.down) == (26 + 33, 28)
            assert f"info fake: {THEIRS} at {one_line(place.log)}" in place.log.lines

    def one_line(log: Said) -> str:
        return next(line for line in log.lines if f"{THEIRS} at" in line).rpartition(" ")[2]

    run(main())


@there
def test_who_loses_the_credentials_is_no_peer_any_more() -> None:
    class Users:
        gone = False

        def authenticate(self, user: str, password: str, client: Endpoint) -> str | None:
            return None if self.gone or password != "secret" else user

    async def main() -> None:
        users = Users()
        async with serving(users) as place:
            with UdpPeer() as one, UdpPeer() as stranger:
                await place.register(one, THEIRS, passphrase="secret")
                await stranger.send(packet4(THEIRS, OURS, b"forged: credentials make sources strict"), place.address)
                await one.send(packet4("192.168.0.77", OURS, b"not its own"), place.address)
                await one.send(packet := packet4(THEIRS, OURS, b"its own"), place.address)
                assert await place.device.taken() == packet
                users.gone = True
                place.server.check_peers()
                await one.send(packet4(THEIRS, OURS, b"too late"), place.address)
                users.gone = False
                await place.register(one, THEIRS, passphrase="secret")
                await one.send(packet := packet4(THEIRS, OURS, b"again"), place.address)
                assert await place.device.taken() == packet

    run(main())


@there
def test_a_pump_that_fails_is_replaced_by_the_one_in_python_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TunPump", Breaking)

    async def main() -> None:
        async with serving() as place:
            with UdpPeer() as peer:
                await place.register(peer, THEIRS)
                monkeypatch.setattr(Breaking, "broken", True)
                await place.register(peer, THEIRS)
                for number in range(3):
                    place.device.route(packet := packet4(OURS, THEIRS, b"by Python %d" % number))
                    assert (await peer.receive())[0] == packet
                    await peer.send(packet := packet4(THEIRS, OURS, b"by Python %d" % number), place.address)
                    assert await place.device.taken() == packet
            lines = [line for line in place.log.lines if "from now on" in line]
            why = f"EIO: {os.strerror(errno.EIO)}"
            assert lines == [f"warn fake: pump in Python from now on, that in C has ended: {why}"]
            assert place.flow.labels["pump"] == "python"

    run(main())


@there
@pytest.mark.parametrize("breaks", [False, True])
def test_a_client_hears_its_answers_and_its_server(monkeypatch: pytest.MonkeyPatch, breaks: bool) -> None:
    monkeypatch.setattr(native, "TunPump", Breaking)

    async def main() -> None:
        device, log, flow = Fake(), Said(), Flow("", ANY)
        with UdpPeer() as server:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            sock.connect(tuple(server.address))
            upstream = UdpSocket(sock, peer=server.address)
            registration = codec.encode_registration("", [ip_address(OURS)])
            liveness = Liveness(0.0)
            session = ClientSession(flow, device, upstream, registration, liveness, log=log)
            scope = Scope("client")
            scope.start(first_ended(session.serve(), session.attend()), "client")
            await asyncio.sleep(0)  # it begins: what is cancelled before that has never been awaited
            await session.register()
            data, client = await server.receive()
            assert data == registration
            monkeypatch.setattr(Breaking, "broken", breaks)
            await server.send(codec.encode_answer("127.0.0.1"), client)
            if breaks:
                await log.warned.wait()
            for _ in range(2):
                device.route(packet := packet4(OURS, THEIRS))
                assert (await server.receive())[0] == packet
                await server.send(packet, client)
                assert await device.taken() == packet
            await scope.cancel()
            session.close()
            assert (flow.meter.up, flow.meter.down) == (54, 54)
            assert any("from now on" in line for line in log.lines) == breaks
            device.abort()
            upstream.abort()

    run(main())
