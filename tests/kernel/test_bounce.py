"""The program that turns packets around, run on made-up ones."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from gostnet.core.errors import KernelError
from gostnet.dataplane.tun_device import open_device
from gostnet.kernel import bounce, netns
from gostnet.kernel.bpf import Direction, Program, Verdict, attached, attachment_problem, load, loading_problem

pytestmark = pytest.mark.skipif(bool(loading_problem()), reason=loading_problem() or "bpf is usable")


@pytest.fixture
def program() -> Iterator[Program]:
    with load(bounce.program(), "bounce") as loaded:
        yield loaded


def frame(version: int, protocol: int) -> bytes:
    """An Ethernet frame, as the kernel wants it for a trial; on a TUN device there is no such header."""
    if version == 4:
        packet = struct.pack("!BBHHHBBHII", 0x45, 0, 40, 0, 0, 64, protocol, 0, 0x0A000001, 0x0A000002) + bytes(20)
        return bytes(12) + b"\x08\x00" + packet
    return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 20, protocol, 64) + bytes(52)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("protocol", "verdict"),
    [(6, Verdict.REDIRECT), (17, Verdict.REDIRECT), (1, Verdict.NEXT), (58, Verdict.NEXT), (0, Verdict.NEXT)],
)
def test_tcp_and_udp_are_turned_around_and_all_else_goes_on(
    program: Program, version: int, protocol: int, verdict: Verdict
) -> None:
    assert program.run(frame(version, protocol))[0] == verdict


def test_fragments_of_ipv6_are_turned_around_and_other_protocols_are_not(program: Program) -> None:
    assert program.run(frame(6, 44))[0] == Verdict.REDIRECT
    assert program.run(bytes(12) + b"\x08\x06" + bytes(46))[0] == Verdict.NEXT


@pytest.mark.skipif(bool(attachment_problem()), reason=attachment_problem() or "tcx is there")
def test_the_bounce_ends_when_it_is_closed() -> None:
    with netns.anonymous() as place, netns.inside(place):
        fd, name = open_device("tg%d")
        try:
            made = bounce.Bounce(name, "tcx")
            assert len(attached(socket.if_nametoindex(name), Direction.EGRESS)) == 1
            made.close()
            assert not attached(socket.if_nametoindex(name), Direction.EGRESS)
        finally:
            os.close(fd)


def test_no_device_is_named() -> None:
    with pytest.raises(KernelError, match="tc qdisc add dev nowhere clsact: No such device"):
        bounce.Bounce("nowhere", "clsact")
