"""What datagrams do without: calls that the kernel, or a sandbox, does not have."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from gostnet.dataplane.native import library

SYSTEM_CALLS = {"x86_64": (299, 307, 54, 56, 435), "aarch64": (243, 269, 208, 220, 435)}
"""recvmmsg, sendmmsg, setsockopt, clone, clone3."""

SCRIPT = """
import asyncio, ctypes, errno, json, struct, sys
from gostnet.core.address import Endpoint
from gostnet.core.datagrams import Datagram
from gostnet.core.log import Logger, Sink
from gostnet.core.tasks import Scope, run
from gostnet.core.udp_socket import UdpSocket, listen_udp, open_udp
from gostnet.dataplane.pump import pump
from gostnet.transports.udp import UdpOptions, UdpSource

RECEIVE, SEND, OPTION, CLONE, CLONE3 = map(int, sys.argv[2:])
ALLOW, FAIL = 0x7FFF0000, 0x00050000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06


def without(what):
    def call(number, error):
        return [(LOAD, 0, 0, 0), (EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL | error)]

    def option(name):
        level, kind = 16 + 8 * 1, 16 + 8 * 2
        return [(LOAD, 0, 0, 0), (EQUAL, 0, 5, OPTION), (LOAD, 0, 0, level), (EQUAL, 0, 3, 17),
                (LOAD, 0, 0, kind), (EQUAL, 0, 1, name), (RETURN, 0, 0, FAIL | errno.ENOPROTOOPT)]

    program = {
        "mmsg": call(RECEIVE, errno.ENOSYS) + call(SEND, errno.ENOSYS),
        "threads": call(CLONE, errno.EAGAIN) + call(CLONE3, errno.EAGAIN),
        "UDP_SEGMENT": option(103),
        "UDP_GRO": option(104),
    }[what] + [(RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    fprog = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, fprog, 0, 0) == 0


class Lines(Sink):
    lines = []

    def write(self, line):
        self.lines.append(json.loads(line)["msg"])


async def main():
    without(sys.argv[1])
    here = Endpoint("127.0.0.1", 0)
    target = UdpSocket(sock := listen_udp(here), Endpoint.from_sockaddr(sock.getsockname()))
    source = UdpSource(here, UdpOptions(keepalive=True, read_queue_size=10_000), log=Logger(Lines(-1)))
    await source.open()
    scope = Scope("test")

    async def echo():
        while batch := await target.receive():
            await target.send(batch)

    async def pass_on(flow, session):
        upstream = open_udp(target.local)
        try:
            await pump(flow, session, upstream)
        finally:
            upstream.abort()

    async def serve():
        while True:
            for flow, session in await source.accept():
                scope.launch(pass_on(flow, session))

    scope.start(echo())
    scope.start(serve())
    for turn in range(2):
        clients = [open_udp(source.address) for _ in range(3)]
        for again in range(4):
            for number, client in enumerate(clients):
                sent = [bytes([number, index]) * (600 if index % 10 else 6) for index in range(100)]
                await client.send([Datagram(data, source.address) for data in sent])
                got = []
                async with asyncio.timeout(10):
                    while len(got) < len(sent):
                        got += [bytes(datagram.data) for datagram in await client.receive()]
                assert got == sent
        for client in clients:
            client.abort()
    source._sessions.collect()
    await scope.cancel()
    source.abort()
    target.abort()


run(main())
print(json.dumps(Lines.lines))
"""

SAID = {
    "mmsg": '["the kernel lacks recvmmsg or sendmmsg: datagrams are taken and sent one by one"]',
    "threads": '["engine native gives way to copy: datagrams: no thread: Resource temporarily unavailable"]',
    "UDP_SEGMENT": '["the kernel does not cut trains of datagrams for a way out of this host:'
    ' there they are sent one by one"]',
    "UDP_GRO": '["the kernel lacks UDP_GRO: datagrams arrive one by one"]',
}


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("what", SAID)
def test_datagrams_go_without(what: str, native: str) -> None:
    """Bytes, boundaries and order are the same, and the log says once why it takes more."""
    numbers = SYSTEM_CALLS.get(platform.machine())
    if numbers is None:
        pytest.skip(f"the numbers of the system calls of {platform.machine()} are not known here")
    if native == "1" and library.load()[0] is None:
        pytest.skip(library.load()[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what, *map(str, numbers)],
        env={"PATH": "/usr/bin:/bin", "GOSTNET_NATIVE": native, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (SAID[what] if native == "1" else "[]")
