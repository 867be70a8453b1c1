"""The PROXY protocol on listeners and towards nodes; the rows PP01, PP02, ... are those of docs/proxy-protocol.md."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.contracts import Policies
from gostnet.core.egress import Egress
from gostnet.core.errors import ConnError, EndOfStream, ProtocolError
from gostnet.core.flow import Flow
from gostnet.core.sockets import SocketStream, connect_tcp
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope, run
from gostnet.pipeline.service import Service
from gostnet.pipeline.transport import Listener, StreamDialer, Transport
from gostnet.testing.certificates import Authority
from gostnet.testing.memory import stream_pair
from gostnet.testing.processes import Process, ProcessFailed, gostnet
from gostnet.transports.certificates import Certificates
from gostnet.transports.proxy_protocol import ProxyProtocol
from gostnet.transports.tcp import TcpOptions, TcpSource
from gostnet.transports.tls import TlsLayer
from gostnet.wire.proxy_header import encode_proxy_header, parse_proxy_header

HAPROXY = shutil.which("haproxy")
GOST = os.environ.get("GOST_BIN", "")

CLIENT, SERVER = Endpoint("192.0.2.1", 56324), Endpoint("198.51.100.2", 443)
PEER, OWN = Endpoint("10.0.0.1", 1000), Endpoint("10.0.0.2", 2000)


def accepted() -> Flow:
    return Flow("test", PEER, OWN)


# ---- reading ------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [1, 2])
def test_pp01_a_header_is_believed_and_what_follows_is_left(version: int) -> None:
    async def main() -> None:
        near, far = stream_pair()
        flow = accepted()
        await far.send(encode_proxy_header(version, CLIENT, SERVER) + b"hello")
        assert await ProxyProtocol().server(flow, near) is near
        assert (flow.client, flow.ingress, flow.hash) == (CLIENT, SERVER, CLIENT.host)
        assert await near.receive() == b"hello"

    run(main())


@pytest.mark.parametrize("version", [1, 2])
def test_pp01_a_header_may_come_byte_by_byte(version: int) -> None:
    async def main() -> None:
        near, far = stream_pair(window=1)
        flow = accepted()
        scope = Scope("test")
        scope.launch(far.send(encode_proxy_header(version, CLIENT, SERVER)))
        assert await ProxyProtocol().server(flow, near) is near
        assert (flow.client, flow.ingress) == (CLIENT, SERVER)
        await scope.cancel()

    run(main())


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01 a ClientHello", b"PUT / HTTP/1.1\r\n", b"\r\n\r\n", b"PROXY UNKNOWN\r\n"]
)
def test_pp02_a_client_that_sends_no_header_speaks_for_itself(data: bytes) -> None:
    async def main() -> None:
        near, far = stream_pair()
        flow = accepted()
        await far.send(data + b"|rest")
        await ProxyProtocol().server(flow, near)
        assert (flow.client, flow.ingress, flow.hash) == (PEER, OWN, PEER.host)
        found = await near.receive()
        assert found == (b"|rest" if data.startswith(b"PROXY ") else data + b"|rest")

    run(main())


def test_pp02_a_silent_client_speaks_for_itself_and_so_does_one_that_closes() -> None:
    async def main() -> None:
        near, far = stream_pair()
        flow = accepted()
        await ProxyProtocol(timeout=0.02).server(flow, near)
        await far.send(b"late")
        assert await near.receive() == b"late"
        await far.aclose()
        await ProxyProtocol().server(flow, near)
        assert await near.receive() == b""
        assert flow.client == PEER

    run(main())


@pytest.mark.parametrize(
    ("data", "closes", "error"),
    [
        (b"PROXY TCP4 nonsense\r\n", False, ProtocolError),
        (b"PROXY TCP4 192.0.2.1 198", True, EndOfStream),
        (encode_proxy_header(2, CLIENT, SERVER)[:-1], False, ProtocolError),
    ],
)
def test_pp03_a_bad_header_is_an_error(data: bytes, closes: bool, error: type[Exception]) -> None:
    async def main() -> None:
        near, far = stream_pair()
        flow = accepted()
        await far.send(data)
        if closes:
            await far.aclose()
        with pytest.raises(error):
            await ProxyProtocol(timeout=0.02).server(flow, near)
        assert flow.client == PEER

    run(main())


# ---- in a service -------------------------------------------------------------------------------
class Teller:
    """Tells each client who it is."""

    accepts = (Stream,)

    async def handle(self, flow: Flow, conn: Stream, egress: Egress) -> None:
        await conn.send(f"{flow.client} at {flow.ingress}".encode())


class Only:
    """Admits one address."""

    def __init__(self, host: str) -> None:
        self.host = host

    def admits(self, client: Endpoint) -> bool:
        return client.host == self.host


class Nowhere:
    """No way out."""

    async def connect(self, flow: Flow, target: Endpoint) -> Stream:
        raise AssertionError("nobody connects")

    async def associate(self, flow: Flow, target: Endpoint | None) -> Any:
        raise AssertionError("nobody associates")


async def served(layers: Sequence[Any] = (), policies: Policies | None = None) -> tuple[Service, Scope]:
    listener = Listener("tcp", TcpSource(Endpoint("127.0.0.1", 0), TcpOptions()), layers)
    listener.preface = ProxyProtocol()
    service = Service("test", listener, Teller(), Nowhere(), policies)
    await service.open()
    scope = Scope("service")
    scope.start(service.serve())
    return service, scope


async def client(service: Service) -> SocketStream:
    return await connect_tcp(*service.listener.source.address)


async def everything(stream: Stream) -> bytes:
    found = b""
    try:
        while data := await stream.receive():
            found += data
    except ConnError:
        pass
    return found


def test_admission_is_about_whom_the_header_names() -> None:
    async def main() -> None:
        service, scope = await served(policies=Policies((Only(CLIENT.host),)))
        header = encode_proxy_header(2, CLIENT, SERVER)
        silent = await client(service)
        for data, answer in (
            (header, f"{CLIENT} at {SERVER}".encode()),
            (encode_proxy_header(1, SERVER, CLIENT), b""),
            (b"no header", b""),
            (b"PROXY nonsense\r\n", b""),
            (header, f"{CLIENT} at {SERVER}".encode()),
        ):
            stream = await client(service)
            await stream.send(data)
            assert await everything(stream) == answer
            stream.abort()
        silent.abort()
        await service.aclose()
        await scope.cancel()
        await service.drain(1)

    run(main())


def test_the_header_comes_before_tls_both_ways(tmp_path: Path) -> None:
    class Sockets:
        async def connect(self, flow: Flow, target: Endpoint) -> Stream:
            return await connect_tcp(*target)

        async def associate(self, flow: Flow, target: Endpoint | None) -> Any:
            raise AssertionError("nobody associates")

    async def main() -> None:
        layer = TlsLayer.for_server(None, Certificates(None, saved=tmp_path))
        service, scope = await served((layer,))
        transport = Transport("tls", StreamDialer(), (ProxyProtocol(1), TlsLayer.for_client(None)))
        flow = Flow("test", CLIENT, SERVER)
        stream = await transport.dial(flow, service.listener.source.address, Sockets())
        assert await everything(stream) == f"{CLIENT} at {SERVER}".encode()
        await stream.aclose()
        await service.aclose()
        await scope.cancel()
        await service.drain(1)

    run(main())


def test_pp04_nothing_is_told_of_a_flow_without_a_client() -> None:
    async def main() -> None:
        near, far = stream_pair()
        assert await ProxyProtocol(2).client(Flow("resolver", ANY), near, "") is near
        await near.aclose()
        assert await far.receive() == b""

    run(main())


# ---- the real ones ------------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Cast:
    """Programs that forward from one port to another, with the PROXY protocol between them."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        certificate, key = Authority().issue("localhost").save(directory, "server")
        self.pem = directory / "both.pem"
        self.pem.write_bytes(certificate.read_bytes() + key.read_bytes())
        self.files = f"cert={certificate}&key={key}"

    def front(self, which: str, to: int, *, tls: bool, version: int) -> int:
        """Run what takes a connection and tells `to`, where it sends it, whose it is; return its port."""
        port = free_port()
        scheme = "tls" if tls else "tcp"
        if which == "haproxy":
            told = "send-proxy-v2" if version == 2 else "send-proxy"
            secure = " ssl verify none" if tls else ""
            self._haproxy(port, "", f"127.0.0.1:{to} {told}{secure}")
        else:
            node = f"forward+{scheme}://127.0.0.1:{to}?proxyProtocol={version}"
            self._run(which, "-L", f"tcp://127.0.0.1:{port}/127.0.0.1:9", "-F", node)
        return port

    def back(self, which: str, to: int, *, tls: bool) -> int:
        """Run what is told, and tells `to` in turn; return its port."""
        port = free_port()
        if which == "haproxy":
            secure = f" ssl crt {self.pem}" if tls else ""
            self._haproxy(port, f"accept-proxy{secure}", f"127.0.0.1:{to} send-proxy")
        else:
            scheme = "tls" if tls else "tcp"
            keys = f"proxyProtocol=1&handler.proxyProtocol=1&{self.files}"
            self._run(which, "-L", f"forward+{scheme}://127.0.0.1:{port}/127.0.0.1:{to}?{keys}")
        return port

    def _run(self, which: str, *words: str) -> None:
        environment = {"HOME": str(self.directory)}
        if which == "gost":
            process = Process([GOST, *words], env=environment, directory=self.directory, name="gost")
            self._stack.enter_context(process).wait_for("listening on")
        else:
            self._stack.enter_context(gostnet(*words, env=environment)).wait_ready()

    def _haproxy(self, port: int, bind: str, server: str) -> None:
        assert HAPROXY is not None
        file = self.directory / f"haproxy-{len(list(self.directory.iterdir()))}.cfg"
        file.write_text(
            "global\n  log stdout format raw local0\n"
            "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n"
            f"listen one\n  bind 127.0.0.1:{port} {bind}\n  server s {server}\n"
        )
        program = self._stack.enter_context(Process([HAPROXY, "-db", "-f", str(file)], name="haproxy"))
        while not listens(port):  # it does not say when it does
            with pytest.raises(ProcessFailed, match="did not print"):
                program.wait_for("never said", 0.01)


@pytest.fixture
def cast(tmp_path: Path) -> Iterator[Cast]:
    with ExitStack() as stack:
        yield Cast(tmp_path, stack)


@contextmanager
def target() -> Iterator[tuple[int, Callable[[socket.socket], bytes]]]:
    """Listen; yield the port, and what sends `hello!` and returns what arrives up to the `!`, after it is answered."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)

        def take(sender: socket.socket) -> bytes:
            sender.sendall(b"hello!")
            connection, _ = listening.accept()
            with connection:
                connection.settimeout(10)
                found = b""
                while not found.endswith(b"!"):
                    data = connection.recv(4096)
                    assert data, f"the connection ended after {found!r}"
                    found += data
                connection.sendall(b"answer")
                assert sender.recv(6, socket.MSG_WAITALL) == b"answer"
            return found

        yield listening.getsockname()[1], take


def listens(port: int) -> bool:
    """Tell whether somebody on this host listens on a port of 127.0.0.1."""
    wanted = f"0100007F:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return any(row[1] == wanted and row[3] == "0A" for row in map(str.split, lines[1:]))


CASES = [
    pytest.param(front, back, tls, version, id=f"{front}-{back}-{'tls' if tls else 'tcp'}-{version}")
    for front, back in (
        ("gostnet", "gostnet"),
        ("haproxy", "gostnet"),
        ("gostnet", "haproxy"),
        ("gost", "gostnet"),
        ("gostnet", "gost"),
    )
    for tls in (False, True)
    for version in (1, 2)
    if version == 2 or front != "gost"
]


@pytest.mark.interop
@pytest.mark.parametrize(("front", "back", "tls", "version"), CASES)
def test_the_client_is_told_from_end_to_end(cast: Cast, front: str, back: str, tls: bool, version: int) -> None:
    for name, found in (("gost", GOST), ("haproxy", HAPROXY)):
        if name in (front, back) and not found:
            pytest.skip(f"there is no {name} here (gost: GOST_BIN)")
    with target() as (port, take):
        last = cast.back(back, port, tls=tls)
        first = cast.front(front, last, tls=tls, version=version)
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", first), 10) as sender:
                own = Endpoint.from_sockaddr(sender.getsockname())
                found = take(sender)
            header = parse_proxy_header(found)
            assert header is not None
            assert (header.source, header.destination) == (own, Endpoint("127.0.0.1", first))
            assert found[header.size :] == b"hello!"
