"""What the real gost said and heard, replayed against the handler in both roles."""

from __future__ import annotations

import json
from ipaddress import ip_address

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.tasks import run
from gostnet.protocols.tun import codec
from gostnet.testing.memory import MemoryDevice

from ..vectors import VECTORS, UdpPeer, load
from .kit import client, server, setup, silent

OWN = "192.168.123.1/24"
WITNESS = codec.encode_registration("userpass1", [ip_address("192.168.123.2")])
ANSWER = codec.encode_answer("127.0.0.1")


class OneUser:
    """Knows 192.168.123.2 with the password of the recording."""

    def authenticate(self, username: str, password: str, client: Endpoint) -> str | None:
        return username if (username, password) == ("192.168.123.2", "userpass1") else None


@pytest.mark.parametrize(
    ("name", "users", "options"),
    [
        ("tun-keepalive", None, {}),
        ("tun-auth", OneUser(), {}),
        ("tun-self-ip", None, {}),
        ("tun-short-keepalive", None, {}),
        ("tun-noregister", None, {}),
        ("tun-p2p", None, {"p2p": True}),
        ("tun-peer-to-peer", None, {}),
    ],
)
def test_server(name: str, users: OneUser | None, options: dict[str, bool]) -> None:
    """Packets to the server's device are answered by its kernel, which is played here: the next server step."""
    steps = json.loads((VECTORS / f"{name}.json").read_text())["steps"]

    async def main() -> None:
        device = MemoryDevice(setup(OWN))
        async with server(device, users, **options) as address:
            with UdpPeer() as a, UdpPeer() as b:
                peers = {"a": a, "b": b}
                for number, step in enumerate(steps):
                    data, peer = bytes.fromhex(step["hex"]), peers[step["peer"]]
                    if step["from"] == "client":
                        await peer.send(data, address)
                        following = steps[number + 1] if number + 1 < len(steps) else None
                        hairpin = following is not None and following["hex"] == step["hex"]
                        if data[:1] in (b"\x45", b"\x60") and not hairpin:
                            assert await device.taken() == data
                            if following is not None and following["hex"]:
                                device.put(bytes.fromhex(following["hex"]))
                    elif data:
                        assert (await peer.receive())[0] == data, f"{name}, step {number}"
                    elif not options:
                        await silent(peer, address, WITNESS, ANSWER)
                assert device.untouched

    run(main())


@pytest.mark.parametrize(
    ("name", "net", "passphrase"),
    [
        ("tun-client", ("192.168.124.2/24", "fd00::2/64"), "pass-1234567890123456"),
        ("tun-udp-keepalive", ("192.168.123.2/24", "fd00:123::2/64"), "secret"),
    ],
)
def test_client(name: str, net: tuple[str, ...], passphrase: str) -> None:
    async def main() -> None:
        device = MemoryDevice(setup(*net))
        with UdpPeer() as peer:
            async with client(device, peer.address, keepalive=True, ttl=0.05, passphrase=passphrase):
                source: Endpoint | None = None
                waiting: list[bytes] = []
                for number, step in enumerate(load(name).steps):
                    if step.sender == "server":
                        assert source is not None
                        await peer.send(step.data, source)
                        if not codec.is_answer(step.data):
                            assert await device.taken() == step.data
                        continue
                    if not step.data.startswith(codec.MAGIC):
                        device.put(step.data)
                    # Registrations come by the clock, so one may come before the packet that is waited for.
                    while step.data not in waiting:
                        data, source = await peer.receive()
                        waiting.append(data)
                    assert all(data == step.data or data.startswith(codec.MAGIC) for data in waiting), number
                    waiting.clear()
                assert device.untouched

    run(main())
