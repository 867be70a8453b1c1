"""The handler over loopback: credentials, sources, roaming, networks behind peers, carriers that come and go."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from ipaddress import ip_address
from typing import Any

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.datagrams import Datagrams
from gostnet.core.errors import ConnError, DialRefused
from gostnet.core.flow import Flow, Shapers
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope, run
from gostnet.core.udp_socket import UdpSocket, listen_udp, open_udp
from gostnet.pipeline.connector import ConnectorContext
from gostnet.pipeline.handler import HandlerContext
from gostnet.protocols.relay.connector import RelayConnector
from gostnet.protocols.tun import client as client_module
from gostnet.protocols.tun import codec, handler
from gostnet.protocols.tun import server as server_module
from gostnet.protocols.tun.client import Liveness
from gostnet.protocols.tun.handler import TunHandler
from gostnet.testing.memory import MemoryDevice

from ..vectors import PATIENCE, UdpPeer, load, replay_server, router
from .kit import client, packet4, packet6, server, setup, silent

ANSWER = codec.encode_answer("127.0.0.1")


def registration(*addresses: str, passphrase: str = "") -> bytes:
    return codec.encode_registration(passphrase, [ip_address(text) for text in addresses])


async def register(peer: UdpPeer, address: Endpoint, *addresses: str, passphrase: str = "") -> None:
    await peer.send(registration(*addresses, passphrase=passphrase), address)
    assert (await peer.receive())[0] == ANSWER


# ---- server -----------------------------------------------------------------------------------------
def test_a_passphrase_of_the_server_is_asked_for() -> None:
    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.1/24"))
        witness = registration("192.168.0.9", passphrase="secret")
        async with server(device, passphrase="secret") as address:
            with UdpPeer() as good, UdpPeer() as bad:
                await register(good, address, "192.168.0.2", passphrase="secret")
                for wrong in ("", "secre", "secret1", "SECRET"):
                    await bad.send(registration("192.168.0.2", passphrase=wrong), address)
                    await silent(bad, address, witness, ANSWER)
                device.put(packet4("192.168.0.1", "192.168.0.2"))
                assert (await good.receive())[0] == packet4("192.168.0.1", "192.168.0.2")

    run(main())


@pytest.mark.parametrize("credentials", [True, False])
def test_packets_of_foreign_sources_are_dropped_where_credentials_are_asked_for(credentials: bool) -> None:
    options = {"passphrase": "secret"} if credentials else {}
    passphrase = "secret" if credentials else ""

    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.1/24"))
        async with server(device, **options) as address:
            with UdpPeer() as member, UdpPeer() as stranger:
                await register(member, address, "192.168.0.2", "fd00::2", passphrase=passphrase)
                forged = packet4("192.168.0.2", "192.168.0.1", b"forged")
                await stranger.send(forged, address)
                own = packet6("fd00::2", "fd00::1", b"own")
                await member.send(own, address)
                if not credentials:
                    assert await device.taken() == forged
                assert await device.taken() == own
                assert device.untouched

    run(main())


def test_strict_source_can_be_chosen_without_credentials_and_put_off_with_them() -> None:
    async def main(strict: bool, passphrase: str) -> None:
        device = MemoryDevice(setup("192.168.0.1/24"))
        async with server(device, strict_source=strict, passphrase=passphrase) as address:
            with UdpPeer() as peer:
                await peer.send(packet4("192.168.0.2", "192.168.0.1", b"before"), address)
                await register(peer, address, "192.168.0.2", passphrase=passphrase)
                await peer.send(packet4("192.168.0.2", "192.168.0.1", b"after"), address)
                first = await device.taken()
                assert first == packet4("192.168.0.2", "192.168.0.1", b"after" if strict else b"before")

    run(main(True, ""))
    run(main(False, "secret"))


def test_a_peer_that_moves_is_followed() -> None:
    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.1/24"))
        async with server(device) as address:
            with UdpPeer() as before, UdpPeer() as after:
                await register(before, address, "192.168.0.2")
                await register(after, address, "192.168.0.2")
                device.put(packet4("192.168.0.1", "192.168.0.2"))
                assert (await after.receive())[0] == packet4("192.168.0.1", "192.168.0.2")
                with pytest.raises(BlockingIOError):
                    before.sock.recv(100)

    run(main())


def test_networks_behind_a_peer_are_reached_by_it_and_may_be_sources() -> None:
    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.1/24", ways=[("10.1.0.0/16", "192.168.0.2")]))
        async with server(device, passphrase="x") as address:
            with UdpPeer() as site, UdpPeer() as other:
                await register(site, address, "192.168.0.2", passphrase="x")
                await register(other, address, "192.168.0.3", passphrase="x")
                there = packet4("192.168.0.3", "10.1.2.3")
                await other.send(there, address)
                assert (await site.receive())[0] == there
                back = packet4("10.1.2.3", "192.168.0.3")
                await site.send(back, address)
                assert (await other.receive())[0] == back
                assert device.untouched

    run(main())


def test_ipv6_peers_and_large_packets() -> None:
    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.1/24"))
        async with server(device, host="::1") as address:
            with UdpPeer("::1") as peer:
                await peer.send(registration("192.168.0.2"), address)
                assert (await peer.receive())[0] == codec.encode_answer("::1")
                large = packet4("192.168.0.1", "192.168.0.2", bytes(8900))
                device.put(large)
                assert (await peer.receive())[0] == large

    run(main())


def test_rubbish_does_no_harm() -> None:
    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.1/24"))
        async with server(device) as address:
            with UdpPeer() as peer:
                for data in (b"", b"G", b"GOST", b"\x45", b"\x60" + bytes(38), b"\xff" * 1000, b"GOST" + bytes(17)):
                    await peer.send(data, address)
                await register(peer, address, "192.168.0.2")
                device.put(b"\xff" * 40)
                device.put(packet4("192.168.0.1", "192.168.0.77"))
                device.put(packet4("192.168.0.1", "192.168.0.2"))
                assert (await peer.receive())[0] == packet4("192.168.0.1", "192.168.0.2")
                assert device.untouched

    run(main())


class Budget:
    """A limit that never refills."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, wanted: int) -> int:
        granted = min(wanted, self.left)
        self.left -= granted
        return granted

    def give_back(self, unused: int) -> None:
        self.left += unused

    def delay(self) -> float:
        return 1.0


class Limit:
    """Gives every flow these budgets."""

    def __init__(self, up: int, down: int) -> None:
        self.up, self.down = Budget(up), Budget(down)

    def shape(self, flow: Flow, into: Shapers) -> None:
        into.up.append(self.up)
        into.down.append(self.down)


def test_packets_over_the_services_limits_are_dropped_whole_in_both_roles() -> None:
    """Up is what leaves the device."""
    large, small = (packet4("192.168.0.1", "192.168.0.2", bytes(size)) for size in (100, 10))
    to_device = [packet4("192.168.0.2", "192.168.0.1", bytes(size)) for size in (100, 10)]

    async def main() -> None:
        device, limit = MemoryDevice(setup("192.168.0.1/24")), Limit(50, 50)
        async with server(device, egress=router(traffic=[limit])) as address:
            with UdpPeer() as peer:
                await register(peer, address, "192.168.0.2")
                device.put(large)
                device.put(small)
                assert (await peer.receive())[0] == small
                for packet in to_device:
                    await peer.send(packet, address)
                assert await device.taken() == to_device[1]
                assert (limit.up.left, limit.down.left) == (20, 20)
        device, limit = MemoryDevice(setup("192.168.0.1/24")), Limit(50, 50)
        with UdpPeer() as peer:
            async with client(device, peer.address, router(traffic=[limit])):
                _, source = await peer.receive()
                device.put(large)
                device.put(small)
                assert (await peer.receive())[0] == small
                for packet in to_device:
                    await peer.send(packet, source)
                assert await device.taken() == to_device[1]
                assert (limit.up.left, limit.down.left) == (20, 20)

    run(main())


class Users:
    """An auther whose users are addresses with one password."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        return username if username in self.names and password == "secret" else None


def made(users: Users | None = None, **options: Any) -> TunHandler:
    return TunHandler(TunHandler.Options(**options), HandlerContext(service="tun", authenticator=users))


@pytest.mark.parametrize("p2p", [False, True])
def test_peers_do_not_outlive_their_users_when_a_reload_hands_over(p2p: bool) -> None:
    """Twice, as the handler of a reload hands over at the next one."""

    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.1/24"))
        sock = listen_udp(Endpoint("127.0.0.1", 0))
        address = Endpoint.from_sockaddr(sock.getsockname())
        device.carrier = UdpSocket(sock, address)
        handlers = [made(Users(*names), p2p=p2p) for names in (("192.168.0.2", "192.168.0.3"), ("192.168.0.3",), ())]
        scope = Scope("server")
        scope.start(handlers[0].handle(Flow("", ANY, address, "udp"), device, router()), "server")
        with UdpPeer() as second, UdpPeer() as third:
            await register(second, address, "192.168.0.2", passphrase="secret")
            if not p2p:
                await register(third, address, "192.168.0.3", passphrase="secret")
            handlers[0].hand_over(handlers[1], router())
            device.put(packet4("192.168.0.1", "192.168.0.2"))
            await device.handled()
            if not p2p:
                device.put(packet4("192.168.0.1", "192.168.0.3"))
                assert (await third.receive())[0] == packet4("192.168.0.1", "192.168.0.3")
            # What it sends is not taken any more either, and it cannot come back.
            await second.send(packet4("192.168.0.2", "192.168.0.1"), address)
            await second.send(registration("192.168.0.2", passphrase="secret"), address)
            await register(third, address, "192.168.0.3", passphrase="secret")
            assert device.untouched
            with pytest.raises(BlockingIOError):
                second.sock.recv(100)
            handlers[1].hand_over(handlers[2], router())
            device.put(packet4("192.168.0.1", "192.168.0.3"))
            await device.handled()
            with pytest.raises(BlockingIOError):
                third.sock.recv(100)
        await scope.cancel()
        device.carrier.abort()

    run(main())


def test_users_that_are_taken_out_of_a_file_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "RECHECK", 0.0)
    monkeypatch.setattr(server_module, "TICK", 0.01)
    users = Users("192.168.0.2")

    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.1/24"))
        async with server(device, users) as address:
            with UdpPeer() as peer:
                await register(peer, address, "192.168.0.2", passphrase="secret")
                device.put(packet4("192.168.0.1", "192.168.0.2"))
                await peer.receive()
                users.names.clear()
                async with asyncio.timeout(PATIENCE):
                    while True:
                        device.put(packet4("192.168.0.1", "192.168.0.2"))
                        await device.handled()
                        try:
                            peer.sock.recv(100)
                        except BlockingIOError:
                            break
                        await asyncio.sleep(0.01)

    run(main())


def test_runs_of_packets_go_each_to_its_peer_in_order() -> None:
    """Peers alternate within one batch in both directions, with packets for the host between them."""

    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.1/24"))
        async with server(device) as address:
            with UdpPeer() as second, UdpPeer() as third:
                await register(second, address, "192.168.0.2")
                await register(third, address, "192.168.0.3")
                train = [
                    packet4("192.168.0.2", f"192.168.0.{to}", bytes([number]) * 100)
                    for number, to in enumerate((3, 3, 1, 3, 1, 1, 9, 3, 3))
                ]
                sent = second.sock.sendmsg(train, [(17, 103, len(train[0]).to_bytes(2, "little"))], 0, tuple(address))
                assert sent == sum(map(len, train))
                for number in (0, 1, 3, 7, 8):
                    assert (await third.receive())[0] == train[number]
                for number in (2, 4, 5, 6):
                    assert await device.taken() == train[number]
                assert device.untouched

    run(main())


# ---- client -----------------------------------------------------------------------------------------
def test_a_client_registers_once_without_keep_alive() -> None:
    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.2/24"))
        with UdpPeer() as peer:
            async with client(device, peer.address):
                data, source = await peer.receive()
                assert data == registration("192.168.0.2")
                await peer.send(b"rubbish that is no packet at all", source)
                await peer.send(ANSWER, source)
                await peer.send(packet4("192.168.0.1", "192.168.0.2"), source)
                assert await device.taken() == packet4("192.168.0.1", "192.168.0.2")
                device.put(packet4("192.168.0.2", "192.168.0.1"))
                assert (await peer.receive())[0] == packet4("192.168.0.2", "192.168.0.1")
                assert device.untouched

    run(main())


def test_a_client_registers_again_when_its_server_has_been_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keep-alive: that nobody listens is seen by the refusal of a packet."""
    monkeypatch.setattr(client_module, "TICK", 0.02)
    monkeypatch.setattr(client_module, "SILENCE", 1000.0)

    async def main() -> None:
        device, first, second = (MemoryDevice(setup(f"192.168.0.{n}/24")) for n in (2, 1, 1))
        async with AsyncExitStack() as stack:
            async with server(first) as address:
                await stack.enter_async_context(client(device, address))
                device.put(packet4("192.168.0.2", "192.168.0.1", b"1"))
                await first.taken()
            device.put(packet4("192.168.0.2", "192.168.0.1", b"lost"))
            await device.handled()
            async with server(second, port=address.port):
                async with asyncio.timeout(PATIENCE):
                    while True:  # the way back works as soon as the new server knows the client
                        second.put(packet4("192.168.0.1", "192.168.0.2"))
                        try:
                            assert await device.taken(0.05) == packet4("192.168.0.1", "192.168.0.2")
                            break
                        except TimeoutError:
                            continue

    run(main())


def test_a_client_dials_again_when_no_answer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "RECONNECT", 0.01)

    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.2/24"))
        with UdpPeer() as peer:
            async with client(device, peer.address, keepalive=True, ttl=0.03):
                sources = set()
                async with asyncio.timeout(PATIENCE):
                    while len(sources) < 3:
                        data, source = await peer.receive()
                        assert data == registration("192.168.0.2")
                        sources.add(source)

    run(main())


class Refusing:
    """A way out that fails some times, and whose associations then are those of `after`."""

    def __init__(self, times: int, after: Datagrams) -> None:
        self.times = times
        self.after = after

    async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
        flow.target = target
        self.times -= 1
        if self.times >= 0:
            raise DialRefused("dial: connection refused")
        return self.after

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        raise AssertionError("a client opens no stream")


def test_a_client_that_cannot_dial_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "RECONNECT", 0.001)

    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.2/24"))
        with UdpPeer() as peer:
            egress = Refusing(3, open_udp(peer.address))
            async with client(device, peer.address, egress):
                assert (await peer.receive())[0] == registration("192.168.0.2")
            assert egress.times == -1

    run(main())


def test_a_client_through_a_relay_says_what_gosts_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONNECT with network udp, then frames with their length; recorded with a real gost at both ends."""
    vector = load("tun-over-relay")
    answered: list[float] = []
    monkeypatch.setattr(Liveness, "answered", lambda self, now: answered.append(now))

    async def play(below: Stream) -> None:
        connector = RelayConnector(RelayConnector.Options(), ConnectorContext())

        class Chain:
            async def associate(self, flow: Flow, target: Endpoint | None) -> Datagrams:
                flow.target = target
                return await connector.associate(flow, below, target)

            async def connect(self, flow: Flow, target: Endpoint) -> Stream:
                raise AssertionError("a client opens no stream")

        device = MemoryDevice(setup("192.168.124.2/24"))
        device.put(vector.steps[0].data[-48:])  # a router solicitation
        async with client(device, Endpoint("127.0.0.1", 0x9539), Chain(), keepalive=True):
            async with asyncio.timeout(PATIENCE):
                while not answered:  # noqa: ASYNC110 - a list has no event
                    await asyncio.sleep(0.001)

    run(replay_server(vector, play))


# ---- the device ---------------------------------------------------------------------------------------
def test_a_device_that_is_closed_ends_the_handler_quietly() -> None:
    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.2/24"))
        with UdpPeer() as peer:
            async with client(device, peer.address) as task:
                await peer.receive()
                device.abort()
                async with asyncio.timeout(PATIENCE):
                    await task

    run(main())


def test_a_device_that_is_deleted_ends_the_handler_with_an_error() -> None:
    async def main() -> None:
        device = MemoryDevice(setup("192.168.0.2/24"))
        with UdpPeer() as peer:
            async with client(device, peer.address) as task:
                await peer.receive()
                device.delete()
                async with asyncio.timeout(PATIENCE):
                    await asyncio.wait((task,))
                assert isinstance(task.exception(), ConnError)

    loud: list[object] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: loud.append(context))
        await main()

    run(watched())
    assert len(loud) == 1  # the test's own task; none of the handler's parts


# ---- when to register -----------------------------------------------------------------------------------
def test_with_keep_alive_registrations_are_periodic_and_answers_needed() -> None:
    liveness = Liveness(10.0)
    liveness.begin(100.0)
    assert not liveness.look(109.9)
    assert liveness.look(110.0)
    assert not liveness.look(110.1)
    liveness.answered(111.0)
    assert liveness.look(120.0)
    assert liveness.wait(120.0) == 1.0
    assert liveness.wait(129.5) == 0.5
    assert liveness.look(141.0)
    with pytest.raises(ConnError, match="30s"):
        liveness.look(141.1)


def test_without_keep_alive_only_refusals_and_lasting_silence_register_again() -> None:
    liveness = Liveness(0.0)
    liveness.begin(100.0)
    assert not any(liveness.look(float(now)) for now in range(100, 1000))
    liveness.refused = True
    assert liveness.look(1000.0)
    assert not liveness.look(1001.0)
    liveness.unanswered = True
    assert [now for now in range(2000, 2015) if liveness.look(float(now))] == [2010]
    liveness.unanswered = True
    assert not liveness.look(3000.0)
    liveness.unanswered = False
    assert not any(liveness.look(float(now)) for now in range(3001, 3030))
