"""TUN and TAP devices of the kernel, in a network namespace of the test's own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from gostnet.core.errors import ConfigError, ConnError, KernelError
from gostnet.core.packets import Medium
from gostnet.core.resources import Address, Link
from gostnet.core.tasks import Scope, run
from gostnet.dataplane import tun_device
from gostnet.dataplane.tun_device import Backend, TunDevice, open_device
from gostnet.kernel import netns
from gostnet.kernel.netlink import RouteNetlink
from gostnet.testing.netlink import ROUTE, Netlink

PATIENCE = 10.0
BACKENDS = pytest.mark.parametrize("backend", ["ioctl", "pytun"])


@pytest.fixture
def place() -> Iterator[netns.Namespace]:
    try:
        namespace = netns.anonymous()
    except KernelError as exc:
        pytest.skip(str(exc))
    with namespace, netns.inside(namespace):
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            pytest.skip("/dev/net/tun cannot be used")
        yield namespace


def links() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


@BACKENDS
def test_a_device_is_private_to_the_process_and_gone_with_its_descriptor(
    place: netns.Namespace, backend: Backend
) -> None:
    if backend == "pytun":
        pytest.importorskip("pytun")
    fd, name = open_device("gt0", backend=backend)
    try:
        assert name == "gt0"
        assert "gt0" in links()
        assert not os.get_inheritable(fd)
        assert not os.get_blocking(fd)
        with pytest.raises(BlockingIOError):
            os.read(fd, 100)
    finally:
        os.close(fd)
    assert "gt0" not in links()


@BACKENDS
def test_the_kernel_chooses_a_name(place: netns.Namespace, backend: Backend) -> None:
    if backend == "pytun":
        pytest.importorskip("pytun")
    first, second = open_device(backend=backend), open_device("gt%d", backend=backend)
    try:
        assert (first[1], second[1]) == ("tun0", "gt0")
    finally:
        os.close(first[0])
        os.close(second[0])


def test_a_device_with_a_header_has_a_longer_queue(place: netns.Namespace) -> None:
    fd, name = open_device("gt0", vnet_header=True)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, 0x8942, name.encode().ljust(40, b"\0"))  # SIOCGIFTXQLEN
        assert int.from_bytes(answer[16:20], "little") == tun_device.QUEUE_LENGTH
    finally:
        os.close(fd)


def _segments(count: int, port: int, sequence: int) -> list[bytes]:
    """Return SYN-less segments for a port that nobody has: the kernel answers each with one reset."""
    found = []
    for number in range(count):
        tcp = struct.pack(">HHIIBBHHH", 4000, port, sequence + number * 100, 1, 0x50, 0x10, 500, 0, 0)
        ends = ip_address("192.168.9.2").packed + ip_address("192.168.9.1").packed
        tcp = _with_sum(tcp + bytes([number]) * 100, ends + struct.pack(">HH", 6, 120), 16)
        head = struct.pack(">BBHHHBBH", 0x45, 0, 140, 0, 0x4000, 64, 6, 0) + ends
        found.append(_with_sum(head, b"", 10) + tcp)
    return found


def _with_sum(data: bytes, pseudo: bytes, at: int) -> bytes:
    total = sum(struct.unpack(f">{len(data + pseudo) // 2}H", data + pseudo)) % 65535
    return data[:at] + (0xFFFF - total).to_bytes(2, "big") + data[at + 2 :]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_enters_the_kernel_in_one_piece_and_is_verified(place: netns.Namespace, damaged: bool) -> None:
    """A reset answers what the kernel has accepted; a sum that is wrong is answered by nothing."""

    async def main() -> None:
        device = opened(place, joins=True)
        packets = _segments(10, 9, 1000)
        if damaged:
            packets[4] = packets[4][:-1] + b"\xff"
        await device.send(packets)
        assert (device.sent, device.dropped) == (10, 0)
        lone = _segments(1, 10, 7)
        await device.send(lone)
        resets: list[int] = []
        async with asyncio.timeout(PATIENCE):
            while 10 not in resets:
                batch = [packet for packet in await device.receive() if packet[0] == 0x45 and packet[9] == 6]
                resets += [int.from_bytes(packet[20:22], "big") for packet in batch]
        assert resets == ([10] if damaged else [9, 10])
        device.abort()

    run(main())


def test_refusals_are_told_in_words(place: netns.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    fd, _ = open_device("gt0")
    try:
        with pytest.raises(KernelError, match=r"open tun device gt0: .* in use"):
            open_device("gt0")
        with pytest.raises(KernelError, match="another kind"):
            open_device("gt0", Medium.ETHERNET)
        with pytest.raises(KernelError, match="another kind"):
            open_device("lo")
    finally:
        os.close(fd)
    for name in ("x" * 16, "a/b", "a b", ".", "..", " a"):
        with pytest.raises(ConfigError, match="not the name of an interface"):
            open_device(name)
    monkeypatch.setattr(tun_device, "_PATH", "/dev/net/missing")
    with pytest.raises(KernelError, match="/dev/net/missing is missing") as caught:
        open_device()
    assert "modprobe tun" in caught.value.hint


def test_a_failed_opening_leaves_no_descriptor(place: netns.Namespace) -> None:
    fd, _ = open_device("gt0")
    before = sorted(os.listdir("/proc/self/fd"))
    for backend in ("ioctl", "pytun"):
        with pytest.raises((KernelError, ConfigError)):
            open_device("gt0", backend=backend)  # type: ignore[arg-type]
    assert sorted(os.listdir("/proc/self/fd")) == before
    os.close(fd)


def opened(place: netns.Namespace, name: str = "gt0", mtu: int = 1420, *, joins: bool = False) -> TunDevice:
    """Return a device that is up, with addresses of both versions. Loopback is not."""
    fd, name = open_device(name, vnet_header=joins)
    with RouteNetlink() as kernel:
        kernel.put_link(Link(name, mtu))
        kernel.put_address(Address(name, "192.168.9.1/24"))
        kernel.put_address(Address(name, "fd09::1/64"))
        # The kernel makes the route to an IPv6 address of its own later, and drops what comes for it until then.
        deadline = time.monotonic() + PATIENCE
        while all(route.destination != "fd09::1/128" for route in kernel.routes(6, 255)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    return TunDevice(fd, name, mtu, joins=joins)


def udp(version: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind(("192.168.9.1" if version == 4 else "fd09::1", 0))
    sock.settimeout(PATIENCE)
    return sock


def data_of(packet: bytes) -> bytes:
    """Return what a UDP packet carries, b"" for any other."""
    if packet[0] >> 4 == 4:
        return packet[28:] if packet[9] == 17 else b""
    return packet[48:] if packet[6] == 17 else b""


async def next_data(device: TunDevice) -> bytes:
    """Return the next UDP packet; the kernel sends neighbour discovery of its own accord."""
    async with asyncio.timeout(PATIENCE):
        while True:
            for packet in await device.receive():
                if data_of(bytes(packet)):
                    return bytes(packet)


@pytest.mark.parametrize("version", [4, 6])
def test_packets_go_both_ways(place: netns.Namespace, version: int) -> None:
    async def main() -> None:
        device = opened(place)
        there = "192.168.9.2" if version == 4 else "fd09::2"
        with udp(version) as sock:
            sock.sendto(b"question", (there, 7))
            packet = bytearray(await next_data(device))
            assert data_of(bytes(packet)) == b"question"
            # Sent back with the ends exchanged; the checksums do not mind the order of what they sum.
            first, size = (12, 4) if version == 4 else (8, 16)
            assert bytes(packet[first + size : first + 2 * size]) == ip_address(there).packed
            ends = packet[first : first + size], packet[first + size : first + 2 * size]
            packet[first : first + 2 * size] = ends[1] + ends[0]
            at = 20 if version == 4 else 40
            packet[at : at + 4] = packet[at + 2 : at + 4] + packet[at : at + 2]
            await device.send([packet])
            assert sock.recvfrom(100)[0] == b"question"
        assert device.sent == 1
        await device.aclose()
        assert "gt0" not in links()

    run(main())


def test_batches_are_bounded_and_whatever_waits_comes_in_order(place: netns.Namespace) -> None:
    async def main() -> None:
        device = opened(place)
        with udp(4) as sock:
            for number in range(200):
                sock.sendto(number.to_bytes(2, "big"), ("192.168.9.2", 7))
            found: list[int] = []
            while len(found) < 200:
                batch = await device.receive()
                assert 0 < len(batch) <= TunDevice.BATCH
                found += [int.from_bytes(data_of(bytes(p)), "big") for p in batch if data_of(bytes(p))]
            assert found == list(range(200))
        device.abort()

    run(main())


def test_a_packet_larger_than_the_mtu_at_the_start_is_not_cut(place: netns.Namespace) -> None:
    async def main() -> None:
        device = opened(place)
        with RouteNetlink() as kernel:
            kernel.put_link(Link("gt0", 9000))
        with udp(4) as sock:
            sock.sendto(bytes(8900), ("192.168.9.2", 7))
            assert data_of(await next_data(device)) == bytes(8900)
        device.abort()

    run(main())


def test_what_the_kernel_refuses_is_dropped(place: netns.Namespace) -> None:
    async def main() -> None:
        device = opened(place)
        await device.send([b"\xff" * 40, b""])
        assert (device.sent, device.dropped) == (0, 2)
        with RouteNetlink() as kernel:
            kernel.put_link(Link("gt0", 1420, up=False))
        await device.send([b"\x45" + bytes(39)])
        assert device.dropped == 3
        device.abort()

    run(main())


@pytest.mark.parametrize("in_fiber", [False, True])
def test_closing_wakes_the_reader_with_nothing(place: netns.Namespace, in_fiber: bool) -> None:
    async def main() -> None:
        device = opened(place)
        closings: list[int] = []
        device._on_close = lambda: closings.append(1)
        results: list[object] = []

        async def read() -> None:
            while batch := await device.receive():
                assert batch
            results.append(batch)

        scope = Scope("test")
        work = scope.launch(read()) if in_fiber else scope.start(read())
        for _ in range(3):
            await asyncio.sleep(0)
        assert not work.done()
        device.abort()
        device.abort()
        await scope.drain(PATIENCE)
        assert results == [[]]
        assert closings == [1]
        with pytest.raises(ConnError, match="closed by this side"):
            await device.send([b"x"])

    run(main())


def test_a_device_that_somebody_deletes_is_an_error(place: netns.Namespace) -> None:
    async def main() -> None:
        device = opened(place)
        scope = Scope("test")
        failures: list[BaseException] = []

        async def read() -> None:
            try:
                while await device.receive():
                    pass
            except ConnError as exc:
                failures.append(exc)

        scope.launch(read())
        device.check()
        _delete("gt0")
        await scope.drain(PATIENCE)
        assert [str(exc) for exc in failures] == ["device gt0 is gone"]
        with pytest.raises(ConnError, match="gone"):
            device.check()
        with pytest.raises(ConnError, match="gone"):
            await device.send([b"\x45" + bytes(39)])
        device.abort()
        device.check()

    run(main())


def _delete(name: str) -> None:
    message = ifinfmsg()
    message["index"] = socket.if_nametoindex(name)
    with Netlink(ROUTE) as kernel:
        kernel.change(f"delete {name}", 17, message)  # RTM_DELLINK


def test_a_tap_device_has_frames(place: netns.Namespace) -> None:
    fd, name = open_device("gt1", Medium.ETHERNET)
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, 0x800454D2, bytes(40))[16:18], "little")  # TUNGETIFF
        assert flags & 0x1003 == 0x1002  # IFF_TAP, IFF_NO_PI
        assert name == "gt1"
    finally:
        os.close(fd)
