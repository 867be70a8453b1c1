"""The handler over loopback: who gets which frame, ciphers, loop tests, and the recorded dialogue of gost."""

from __future__ import annotations

import asyncio
import json

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import ConnError
from gostnet.core.packets import Medium
from gostnet.core.tasks import run
from gostnet.protocols.tap import codec
from gostnet.protocols.tap import handler as handler_module
from gostnet.testing.memory import MemoryDevice

from ..vectors import VECTORS, UdpPeer
from .kit import BROADCAST, MULTICAST, client, drain, frame, handler, introduced, mac, nothing, server

CIPHER = ("AEAD_AES_128_GCM", "pw")


# ---- the switch -------------------------------------------------------------------------------------
@pytest.mark.parametrize("everybody", [BROADCAST, MULTICAST], ids=["broadcast", "multicast"])
def test_frames_for_everybody_reach_all_but_the_sender(everybody: bytes) -> None:
    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        async with server(device) as address:
            with UdpPeer() as one, UdpPeer() as two, UdpPeer() as three:
                for number, peer in enumerate((one, two, three), 1):
                    await introduced(peer, address, device, mac(number))
                drain(one)
                drain(two)
                sent = frame(mac(1), everybody)
                await one.send(sent, address)
                assert await device.taken() == sent
                assert (await two.receive())[0] == sent
                assert (await three.receive())[0] == sent
                back = frame(mac(9), everybody, b"from the device")
                device.put(back)
                for peer in (one, two, three):
                    assert (await peer.receive())[0] == back
                assert nothing(one)

    run(main())


def test_frames_for_one_reach_that_one() -> None:
    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        async with server(device) as address:
            with UdpPeer() as one, UdpPeer() as two:
                await introduced(one, address, device, mac(1))
                await introduced(two, address, device, mac(2))
                drain(one)  # it got the other's introduction
                between = frame(mac(1), mac(2))
                await one.send(between, address)
                assert (await two.receive())[0] == between
                device.put(frame(mac(9), mac(1), b"down"))
                assert (await one.receive())[0] == frame(mac(9), mac(1), b"down")
                up = frame(mac(2), mac(9), b"up")
                await two.send(up, address)
                assert await device.taken() == up
                assert device.untouched
                assert nothing(one)
                assert nothing(two)

    run(main())


def test_frames_for_who_is_not_known_go_everywhere() -> None:
    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        async with server(device) as address:
            with UdpPeer() as one, UdpPeer() as two:
                await introduced(one, address, device, mac(1))
                await introduced(two, address, device, mac(2))
                drain(one)
                unknown = frame(mac(1), mac(0x77))
                await one.send(unknown, address)
                assert (await two.receive())[0] == unknown
                assert await device.taken() == unknown
                assert nothing(one)

    run(main())


def test_an_address_that_moves_is_followed() -> None:
    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        async with server(device) as address:
            with UdpPeer() as before, UdpPeer() as after:
                await introduced(before, address, device, mac(1))
                await introduced(after, address, device, mac(1))
                drain(before)
                device.put(frame(mac(9), mac(1)))
                assert (await after.receive())[0] == frame(mac(9), mac(1))
                assert nothing(before)

    run(main())


def test_rubbish_and_impossible_sources_do_no_harm() -> None:
    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        async with server(device) as address:
            with UdpPeer() as peer:
                for data in (b"", b"x", frame(mac(1), mac(2))[:13], frame(BROADCAST, mac(2)), b"GOST" + bytes(30)):
                    await peer.send(data, address)
                await introduced(peer, address, device, mac(1))
                device.put(b"short")
                device.put(frame(mac(9), mac(1)))
                assert (await peer.receive())[0] == frame(mac(9), mac(1))

    run(main())


def test_a_frame_to_ones_own_peer_is_not_sent_back_but_a_loop_test_is() -> None:
    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        async with server(device) as address:
            with UdpPeer() as peer:
                await introduced(peer, address, device, mac(1))
                await introduced(peer, address, device, mac(2))
                await peer.send(frame(mac(1), mac(2)), address)
                test = codec.loop_test(mac(3))
                await peer.send(test, address)
                assert (await peer.receive())[0] == test
                assert device.untouched

    run(main())


# ---- ciphers ----------------------------------------------------------------------------------------
def test_only_who_has_the_key_is_heard() -> None:
    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        key = codec.cipher_of(*CIPHER, "", "")
        assert key is not None
        async with server(device, handler(*CIPHER)) as address:
            with UdpPeer() as stranger, UdpPeer() as member:
                await stranger.send(frame(mac(1), BROADCAST), address)
                await member.send(key.seal(frame(mac(2), BROADCAST), bytes(16)), address)
                assert await device.taken() == frame(mac(2), BROADCAST)
                device.put(frame(mac(9), BROADCAST))
                assert key.open((await member.receive())[0]) == frame(mac(9), BROADCAST)
                assert nothing(stranger)
                assert device.untouched

    run(main())


@pytest.mark.parametrize("name", ["tap-arp", "tap-arp-aead"])
@pytest.mark.parametrize("role", ["server", "client"])
def test_the_recorded_dialogue(name: str, role: str) -> None:
    """A neighbour is asked for and answers: gost's client is the peer, then gost's server is."""
    question, answer = json.loads((VECTORS / f"{name}.json").read_text())["steps"]
    plain = [bytes.fromhex(step.get("plain", step["hex"])) for step in (question, answer)]
    cipher = CIPHER if "plain" in question else ("", "")
    key = codec.cipher_of(*cipher, "", "")

    def opened(data: bytes) -> bytes:
        return data if key is None else key.open(data)

    async def as_server() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        async with server(device, handler(*cipher)) as address:
            with UdpPeer() as peer:
                await peer.send(bytes.fromhex(question["hex"]), address)
                assert await device.taken() == plain[0]
                device.put(plain[1])
                assert opened((await peer.receive())[0]) == plain[1]

    async def as_client() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        with UdpPeer() as peer:
            async with client(device, peer.address, *cipher):
                device.put(plain[0])
                data, sender = await peer.receive()
                assert opened(data) == plain[0]
                await peer.send(bytes.fromhex(answer["hex"]), sender)
                assert await device.taken() == plain[1]

    run(as_server() if role == "server" else as_client())


# ---- client -----------------------------------------------------------------------------------------
def test_client_and_server() -> None:
    async def main() -> None:
        near, far = MemoryDevice(medium=Medium.ETHERNET), MemoryDevice(medium=Medium.ETHERNET)
        async with server(far, handler(*CIPHER)) as address, client(near, address, *CIPHER):
            for size in (1, 1500, 9000):
                near.put(frame(mac(1), BROADCAST, bytes(size)))
                assert await far.taken() == frame(mac(1), BROADCAST, bytes(size))
                far.put(frame(mac(2), mac(1), bytes(size)))
                assert await near.taken() == frame(mac(2), mac(1), bytes(size))

    run(main())


def test_a_keepalive_that_is_answered_keeps_the_session_and_is_not_for_the_device() -> None:
    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        with UdpPeer() as peer:
            async with client(device, peer.address, keepalive=True, ttl=0.05):
                test, sender = await peer.receive()
                assert codec.is_loop_test(test)
                assert not codec.is_group(test)
                for _ in range(8):
                    await peer.send(test, sender)
                    again, same = await peer.receive()
                    assert (again, same) == (test, sender)
                other = codec.loop_test(mac(7))  # somebody else's is a frame as any
                await peer.send(other, sender)
                assert await device.taken() == other

    run(main())


def test_a_server_that_is_silent_is_dialled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler_module, "RECONNECT", (0.01,))

    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        with UdpPeer() as peer:
            async with client(device, peer.address, keepalive=True, ttl=0.02):
                test, first = await peer.receive()
                second = first
                while second == first:
                    again, second = await peer.receive()
                assert again == test  # by which the server finds it at its new port

    run(main())


def test_without_a_keepalive_nothing_is_sent_that_the_kernel_has_not_sent() -> None:
    async def main() -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        with UdpPeer() as peer:
            async with client(device, peer.address):
                device.put(frame(mac(1), BROADCAST))
                assert (await peer.receive())[0] == frame(mac(1), BROADCAST)
                assert nothing(peer)

    run(main())


def test_a_device_that_is_gone_ends_it_and_a_closed_one_does_quietly() -> None:
    async def main(gone: bool) -> None:
        device = MemoryDevice(medium=Medium.ETHERNET)
        async with client(device, Endpoint("127.0.0.1", 9)) as task:
            if gone:
                device.delete()
                with pytest.raises(ConnError, match="gone"):
                    async with asyncio.timeout(5):
                        await task
            else:
                device.abort()
                async with asyncio.timeout(5):
                    await task

    run(main(True))
    run(main(False))
