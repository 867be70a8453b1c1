"""Control data of datagrams, against what the kernel and the socket module make of it."""

from __future__ import annotations

import socket
import struct

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.batches import IP_ORIGDSTADDR, IPV6_ORIGDSTADDR, UDP_GRO, asked_address, original_destination, pinned

IGNORED = (17, UDP_GRO, struct.pack("=i", 1200))


def control(*messages: tuple[int, int, bytes]) -> bytes:
    """Return what recvmsg would: a header of length, level and type, data, and padding to a word (cmsg(3))."""
    word = struct.calcsize("N")
    packed = b""
    for level, kind, data in messages:
        packed += struct.pack("@Nii", word + 8 + len(data), level, kind) + data
        packed += bytes(-len(packed) % word)
    return packed


def test_the_original_destination_is_found_among_others() -> None:
    four = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", 53, socket.inet_aton("192.0.2.7"))
    six = struct.pack("=H", socket.AF_INET6) + struct.pack(
        "!HI16sI", 853, 0, socket.inet_pton(socket.AF_INET6, "2001:db8::7"), 0
    )
    assert original_destination(control(IGNORED, (socket.SOL_IP, IP_ORIGDSTADDR, four))) == Endpoint("192.0.2.7", 53)
    found = original_destination(control((socket.IPPROTO_IPV6, IPV6_ORIGDSTADDR, six), IGNORED))
    assert found == Endpoint("2001:db8::7", 853)
    assert original_destination(control(IGNORED)) is None
    assert original_destination(control((socket.SOL_IP, IP_ORIGDSTADDR, four[:8]))) is None
    assert original_destination(b"") is None


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "fe80::1%3"])
def test_the_address_that_answers_leave_from_is_the_one_that_was_asked(host: str) -> None:
    (message,) = pinned(host, ":" in host)
    data = message[2]
    if ":" not in host:
        data = data[:4] + socket.inet_aton(host) + bytes(4)  # what the kernel tells beside it does not count
    assert asked_address(control(IGNORED, (message[0], message[1], data))) == host
