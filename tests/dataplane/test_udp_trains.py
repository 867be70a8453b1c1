"""Trains of datagrams over loopback, with the kernel's help and without."""

from __future__ import annotations

import socket

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import ConnError
from gostnet.core.tasks import run
from gostnet.core.udp_socket import UdpSocket, listen_udp, open_udp
from gostnet.dataplane.udp_trains import Trains, split

PATIENCE = 5.0


async def received(udp: UdpSocket, trains: Trains, count: int) -> tuple[list[bytes], int]:
    """Return `count` datagrams, and in how many trains they came."""
    found: list[bytes] = []
    batches = 0
    while len(found) < count:
        batch = trains.receive_now()
        batches += len(batch)
        found += [bytes(part) for train, stride, _ in batch for part in split(train, stride)]
        if trains.drained and len(found) < count:
            await udp.readiness.readable()
    return found, batches


def pair(host: str = "127.0.0.1") -> tuple[UdpSocket, UdpSocket]:
    sock = listen_udp(Endpoint(host, 0))
    address = Endpoint.from_sockaddr(sock.getsockname())
    return UdpSocket(sock, address), open_udp(address)


@pytest.fixture(params=["with the kernel", "one by one"])
def helped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "with the kernel")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagrams_arrive_whole_and_in_order(helped: bool, host: str) -> None:
    sizes = [1000] * 100 + [400, 1000, 1000, 1, 1400, 1400, 1300] + [9000] * 12 + [50] * 200

    async def main() -> None:
        into, out = pair(host)
        receiver, sender = Trains(into), Trains(out)
        assert (sender.missing, receiver.missing) == ("", "")
        if not helped:
            out.cuts = 0
        packets = [bytes([n % 256]) * size for n, size in enumerate(sizes)]
        assert sender.send_from(packets, 0) == len(packets)
        found, trains = await received(into, receiver, len(packets))
        assert found == packets
        assert (trains < 30) == helped
        into.abort()
        out.abort()

    run(main())


def test_an_unconnected_socket_names_its_peer() -> None:
    async def main() -> None:
        into, out = pair()
        receiver = Trains(into)
        out.sock.send(b"hello")
        await into.readiness.readable()
        ((_, _, peer),) = receiver.receive_now()
        assert peer == out.sock.getsockname()
        assert receiver.send_from([b"a" * 100] * 3, 1, peer) == 3
        back = Trains(out)
        found, _ = await received(out, back, 2)
        assert found == [b"a" * 100] * 2
        into.abort()
        out.abort()

    run(main())


def test_a_train_that_the_kernel_will_not_cut_goes_as_datagrams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A datagram larger than the way's MTU cannot be part of a train, but can be fragmented."""

    async def main() -> None:
        into, out = pair()
        receiver, sender = Trains(into), Trains(out)
        refusals: list[int] = []
        real = out.sock

        class Refusing:
            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

            def sendmsg(self, *_: object) -> int:
                refusals.append(1)
                raise OSError(90, "message too long")

        out._sock = Refusing()  # type: ignore[assignment]
        packets = [b"x" * 1000] * 5
        assert sender.send_from(packets, 0) == 5
        assert (await received(into, receiver, 5))[0] == packets
        assert refusals == [1]
        assert sender.cuts
        into.abort()
        out.abort()

    run(main())


def test_a_full_socket_says_where_it_stopped() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        udp = UdpSocket(ours)
        trains = Trains(udp)
        assert trains.missing == "UDP_SEGMENT, UDP_GRO"  # it is no UDP socket
        packets = [bytes(1000)] * 100_000
        stopped = trains.send_from(packets, 0)
        assert 0 < stopped < len(packets)
        for _ in range(stopped):
            theirs.recv(2000)
        assert trains.send_from(packets[: stopped + 1], stopped) == stopped + 1
        udp.abort()
        theirs.close()

    run(main())


def test_a_refusal_is_noted_and_loses_nothing() -> None:
    async def main() -> None:
        into, out = pair()
        address = into.local
        into.abort()
        trains = Trains(out)
        trains.send_from([b"lost"], 0)
        back = UdpSocket(listen_udp(address), address)
        receiver = Trains(back)
        trains.send_from([b"kept" * 10] * 3, 0)
        assert trains.refused
        found, _ = await received(back, receiver, 3)
        assert found == [b"kept" * 10] * 3
        back.abort()
        out.abort()
        with pytest.raises(ConnError, match="closed by this side"):
            trains.receive_now()
        with pytest.raises(ConnError, match="closed by this side"):
            trains.send_from([b"x"], 0)

    run(main())
