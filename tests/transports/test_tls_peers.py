"""TLS with the openssl program and with the real gost, in both roles."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gostnet.config import schema
from gostnet.core.errors import ConnError, DialError, GostnetError, ProtocolError
from gostnet.core.flow import Flow
from gostnet.core.sockets import SocketStream, connect_tcp
from gostnet.core.stream import CHUNK, Buffer, Stream
from gostnet.core.tasks import Scope, in_thread, run
from gostnet.testing.certificates import Authority
from gostnet.testing.processes import Process
from gostnet.testing.servers import pattern
from gostnet.transports.certificates import Certificates, Identity, generate
from gostnet.transports.tls import TlsLayer

OPENSSL = shutil.which("openssl")
GOST = os.environ.get("GOST_BIN", "")

needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="the program openssl is not installed")
VERSIONS = pytest.mark.parametrize("version", ["1.2", "1.3"])


@dataclass(frozen=True)
class World:
    """Certificates as files: an authority's, a server's for a.example and 127.0.0.1, a client's."""

    directory: Path
    ca: str
    server: dict[str, str]
    client: dict[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("world")
    authority = Authority()
    (directory / "ca.crt").write_bytes(authority.certificate)

    def files(stem: str, *names: str) -> dict[str, str]:
        certificate, key = authority.issue(*names).save(directory, stem)
        return {"cert_file": str(certificate), "key_file": str(key)}

    return World(
        directory, str(directory / "ca.crt"), files("server", "a.example", "127.0.0.1"), files("client", "c.example")
    )


class Fixed(Certificates):
    """Certificates whose default is made once: nothing is read or written."""

    def default(self) -> Identity:
        return Identity(generate())


def server(**options: Any) -> TlsLayer:
    return TlsLayer.for_server(schema.TLS(**options), Fixed())


def client(**options: Any) -> TlsLayer:
    return TlsLayer.for_client(schema.TLS(**options))


def limited(version: str) -> schema.TLSOptions:
    word = "VersionTLS" + version.replace(".", "")
    return schema.TLSOptions(min_version=word, max_version=word)


async def everything(stream: Stream) -> bytes:
    found = bytearray()
    while data := await stream.receive():
        found += data
    return bytes(found)


async def line(stream: Stream) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        data = await stream.receive()
        assert data, f"the stream ended after {found!r}"
        found += data
    return found


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock


async def accept(sock: socket.socket) -> SocketStream:
    connection, _ = await asyncio.get_running_loop().sock_accept(sock)
    connection.setblocking(False)
    return SocketStream(connection)


# ---- the program openssl --------------------------------------------------------------------------------------
@asynccontextmanager
async def s_client(port: int, *arguments: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    assert OPENSSL is not None
    # Starting it blocks for a millisecond; asyncio's own processes are not asked for as they need a child watcher.
    program = subprocess.Popen(  # noqa: ASYNC220
        [OPENSSL, "s_client", "-connect", f"127.0.0.1:{port}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield program
    finally:
        program.kill()
        await in_thread(program.communicate)


def say(program: subprocess.Popen[bytes], text: bytes) -> None:
    assert program.stdin is not None
    program.stdin.write(text)
    program.stdin.flush()


async def until(condition: Callable[[], object]) -> None:
    """Let the other tasks run until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what it looks at has no event
            await asyncio.sleep(0)


async def hear(pipe: Any, wanted: bytes) -> bytes:
    """Read lines until one contains `wanted`."""
    while text := await in_thread(pipe.readline):
        if wanted in text:
            return bytes(text)
    raise AssertionError(f"openssl ended without {wanted!r}")


@needs_openssl
@VERSIONS
def test_openssl_as_client(version: str) -> None:
    async def main() -> None:
        options = limited(version)
        with listening() as sock:
            async with s_client(sock.getsockname()[1], "-servername", "a.example") as program:
                stream = await server(options=options).server(Flow(), await accept(sock))
                assert stream.version == f"TLSv{version}"
                await stream.send(b"welcome\n")
                await hear(program.stdout, b"welcome")
                say(program, b"hello\n")
                assert await line(stream) == b"hello\n"
                say(program, b"Q\n")
                assert await stream.receive() == b""
                await stream.aclose()

    run(main())


RECORD = 5 + 1 + 16
"""What a record of TLS 1.3 adds to its text: header, type, tag."""


@needs_openssl
@pytest.mark.parametrize("command", [b"K\n", b"k\n"], ids=["asks for ours", "its own"])
def test_keys_are_updated_at_the_wish_of_the_peer(command: bytes) -> None:
    async def main() -> None:
        with listening() as sock:
            async with s_client(sock.getsockname()[1]) as program:
                below = await accept(sock)
                stream = await server().server(Flow(), below)
                await stream.send(b"tickets go with this\n")
                for number in range(3):
                    say(program, command)
                    await hear(program.stderr, b"KEYUPDATE")
                    say(program, b"after %d\n" % number)
                    assert await line(stream) == b"after %d\n" % number
                    before = below.sent
                    await stream.send(b"answer %d\n" % number)
                    # Our own update waits for data, and goes in front of them: a handshake message of 5 bytes.
                    assert below.sent - before == RECORD + 9 + (RECORD + 5 if command == b"K\n" else 0)
                    await hear(program.stdout, b"answer %d" % number)
                say(program, b"Q\n")
                assert await stream.receive() == b""
                await stream.aclose()

    run(main())


@needs_openssl
def test_renegotiation_is_refused() -> None:
    async def main() -> None:
        with listening() as sock:
            async with s_client(sock.getsockname()[1], "-tls1_2") as program:
                stream = await server().server(Flow(), await accept(sock))
                say(program, b"R\n")
                await hear(program.stderr, b"RENEGOTIATING")
                reading = Scope("read").start(stream.receive())
                say(program, b"hello\n")
                await until(lambda: stream._outgoing.pending)
                await stream.send(b"answer\n")
                await hear(program.stderr, b"no renegotiation")
                with pytest.raises(ConnError):
                    assert await reading
                    raise ConnError("openssl went on")
                stream.abort()

    run(main())


class Sluice(Stream):
    """A stream that lets so many bytes through, and then waits for `open`."""

    __slots__ = ("below", "budget", "held", "opened", "seen")

    def __init__(self, below: Stream) -> None:
        super().__init__(below.local, below.remote)
        self.below = below
        self.budget = 1 << 30
        self.opened = asyncio.Event()
        self.held = b""
        self.seen = 0

    def open(self) -> None:
        self.budget = 1 << 30
        self.opened.set()

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if not self.budget:
            await self.opened.wait()
        data = self.held or await self.below.receive(max_bytes)
        data, self.held = data[: self.budget], data[self.budget :]
        self.budget -= len(data)
        self.seen += len(data)
        return data

    async def send(self, data: Buffer) -> None:
        await self.below.send(data)

    async def send_eof(self) -> None:
        await self.below.send_eof()

    async def aclose(self) -> None:
        await self.below.aclose()
        self.open()

    def abort(self) -> None:
        self.below.abort()
        self.open()


@contextmanager
def s_server(world: World, *arguments: str) -> Iterator[int]:
    """Run a server that answers each line with its reverse; yield its port."""
    assert OPENSSL is not None
    own = ["-cert", world.server["cert_file"], "-key", world.server["key_file"], "-CAfile", world.ca]
    with Process([OPENSSL, "s_server", "-accept", "127.0.0.1:0", "-rev", *own, *arguments]) as program:
        yield int(program.wait_for("ACCEPT ").rpartition(":")[2])


@needs_openssl
@VERSIONS
def test_openssl_as_server(world: World, version: str) -> None:
    async def main(port: int) -> None:
        layer = client(ca_file=world.ca, secure=True, server_name="a.example", options=limited(version))
        for resumed in (False, True):
            stream = await layer.client(Flow(), await connect_tcp("127.0.0.1", port), "")
            await stream.send(b"hello\n")
            assert await line(stream) == b"olleh\n"
            assert stream.resumed == resumed
            await stream.aclose()

    with s_server(world) as port:
        run(main(port))


@needs_openssl
@pytest.mark.parametrize("action", ["send", "large send", "end", "close", "abort", "peer ends"])
def test_half_a_handshake_message_holds_what_is_sent(world: World, action: str) -> None:
    """A ticket with the client's certificate spans records of 512 bytes; OpenSSL sends nothing in between."""

    async def main(port: int) -> None:
        below = Sluice(await connect_tcp("127.0.0.1", port))
        layer = client(**world.client)
        stream = await layer.client(Flow(), below, "a.example")
        below.budget = 700
        scope = Scope("both")
        reading = scope.start(everything(stream) if action in ("end", "peer ends") else line(stream))
        await until(lambda: not below.budget)
        await until(lambda: not stream._cipher)
        assert stream._records.partial
        text = b"h" * 100_000 + b"\n" if action == "large send" else b"hello\n"
        if action == "close":
            await stream.aclose()  # nothing can be said any more
            with pytest.raises(ConnError):
                await reading
            return
        sending = scope.start(stream.send_eof() if action == "end" else stream.send(text))
        await until(lambda: stream._stalled)
        assert not sending.done()
        if action == "abort":
            stream.abort()
            for task in (sending, reading):
                with pytest.raises(ConnError):
                    await task
            return
        if action == "peer ends":
            below.held, below.budget = b"", 1
            below.below.abort()
            below.below = Ended()
            below.opened.set()
            for task in (sending, reading):
                with pytest.raises(ConnError):
                    await task
            stream.abort()
            return
        below.open()
        await sending
        if action == "end":
            assert await reading == b""
        else:
            reply = await reading
            # It reverses at most 16 KiB at a time.
            while len(reply.replace(b"\n", b"")) < len(text) - 1:
                reply += await line(stream)
            assert reply.replace(b"\n", b"") == text[-2::-1]
        await stream.aclose()

    with s_server(world, "-max_send_frag", "512", "-Verify", "1") as port:
        run(main(port))


class Ended(Stream):
    """A stream at its end."""

    __slots__ = ()

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        return b""

    async def send(self, data: Buffer) -> None:
        raise ConnError("closed")

    async def send_eof(self) -> None:
        raise ConnError("closed")

    async def aclose(self) -> None:
        return None

    def abort(self) -> None:
        return None


# ---- the real gost ------------------------------------------------------------------------------------------
gost = pytest.mark.interop
needs_gost = pytest.mark.skipif(not GOST, reason="GOST_BIN is not set")


@contextmanager
def running_gost(world: World, *arguments: str) -> Iterator[int]:
    """Run gost with its home in the test's directory; yield the port of its service."""
    with Process([GOST, *arguments], env={"HOME": str(world.directory)}, directory=world.directory) as program:
        said = program.wait_for("listening on ")
        yield int(said.partition("listening on ")[2].partition("/tcp")[0].rpartition(":")[2])


def query(**options: str) -> str:
    return "&".join(f"{key}={value}" for key, value in options.items())


def of_files(files: dict[str, str]) -> dict[str, str]:
    return {"cert": files["cert_file"], "key": files["key_file"]}


@asynccontextmanager
async def origin(sock: socket.socket) -> AsyncIterator[list[SocketStream]]:
    """Serve plain TCP: take everything to its end, then give it back. Yield what has been accepted so far."""
    scope = Scope("origin")
    accepted: list[SocketStream] = []

    async def attend(stream: Stream) -> None:
        try:
            await stream.send(await everything(stream))
            await stream.aclose()
        except ConnError:
            stream.abort()

    async def serve() -> None:
        while True:
            accepted.append(await accept(sock))
            scope.launch(attend(accepted[-1]))

    scope.start(serve())
    try:
        yield accepted
    finally:
        await scope.cancel()
        for stream in accepted:
            stream.abort()


async def exchange(stream: Stream, size: int, arrived: Callable[[], object] | None = None) -> None:
    """Send `size` bytes and, once they have `arrived`, the end; all of it comes back after that."""
    await stream.send(pattern(size))
    if arrived is not None:
        await until(arrived)
    await stream.send_eof()
    found = await everything(stream)
    assert len(found) == size
    assert found == pattern(size)
    await stream.aclose()


@gost
@needs_gost
@VERSIONS
def test_gost_as_server(world: World, version: str) -> None:
    async def main(port: int, behind: socket.socket) -> None:
        layer = client(ca_file=world.ca, secure=True, server_name="a.example", options=limited(version), **world.client)
        async with origin(behind) as accepted:
            for number, size in enumerate((0, 5, 3 << 20, 100)):
                stream = await layer.client(Flow(), await connect_tcp("127.0.0.1", port), "127.0.0.1")
                assert stream.version == f"TLSv{version}"

                def arrived(number: int = number, size: int = size) -> bool:
                    return len(accepted) > number and accepted[number].received >= size

                # gost 3.3.0 drops data that are followed by close_notify at once, where it can tell the alert from
                # data, which is in TLS 1.2: its reader returns both in one go, and its pump looks at the end first.
                await exchange(stream, size, arrived if version == "1.2" else None)
            assert stream.resumed
            below = await connect_tcp("127.0.0.1", port)
            stranger = client(options=limited(version))
            with pytest.raises(
                GostnetError, match=r"the peer refuses: (certificate required|bad certificate|handshake)"
            ):
                refused = await stranger.client(Flow(), below, "")
                await refused.receive()
            below.abort()
            # gost dials before it shakes hands.
            await until(lambda: len(accepted) == 5)

    with listening() as behind:
        target = f"127.0.0.1:{behind.getsockname()[1]}"
        options = query(**of_files(world.server), ca=world.ca)
        with running_gost(world, "-L", f"forward+tls://127.0.0.1:0/{target}?{options}") as port:
            run(main(port, behind))


@gost
@needs_gost
def test_gost_refuses_unknown_names(world: World) -> None:
    """What our server answers to them is what gost's does."""
    config = world.directory / "sni.yaml"
    config.write_text(
        f"""
services:
- name: a
  addr: 127.0.0.1:0
  handler: {{type: socks5}}
  listener:
    type: tls
    tls:
      certFile: {world.server["cert_file"]}
      keyFile: {world.server["key_file"]}
      rejectUnknownSNI: true
      serverNames: [a.example]
"""
    )

    async def main(port: int) -> None:
        accepting = server(reject_unknown_sni=True, server_names=("a.example",))
        for name, fits in (("a.example", True), ("A.EXAMPLE", True), ("b.example", False), ("127.0.0.1", False)):
            told = []
            for ours in (False, True):
                with listening() as sock:
                    scope = Scope("server")
                    to = sock.getsockname()[1] if ours else port
                    below = await connect_tcp("127.0.0.1", to)
                    if ours:
                        scope.start(quietly(accepting, await accept(sock)))
                    try:
                        stream = await client().client(Flow(), below, name)
                        told.append("")
                        stream.abort()
                    except DialError as exc:
                        told.append(str(exc).partition(": ")[2])
                        below.abort()
                    await scope.cancel()
            assert told[0] == told[1]
            assert (told[0] == "") == fits

    with running_gost(world, "-C", str(config)) as port:
        run(main(port))


async def quietly(accepting: TlsLayer, below: Stream) -> None:
    try:
        await accepting.server(Flow(), below)
    except ProtocolError:
        pass
    finally:
        below.abort()


@gost
@needs_gost
@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, True),
        ({"secure": "true", "ca": "CA", "serverName": "a.example"}, True),
        ({"secure": "true", "ca": "CA"}, True),
        ({"secure": "true", "ca": "CA", "serverName": "b.example"}, False),
        ({"ca": "CA", "serverName": "b.example"}, True),
        ({"secure": "true", "serverName": "a.example"}, False),
    ],
)
def test_gost_as_client(world: World, options: dict[str, str], fits: bool) -> None:
    given = {key: world.ca if value == "CA" else value for key, value in options.items()}

    async def serve(sock: socket.socket) -> None:
        accepting = server(ca_file=world.ca, **world.server)
        for _ in range(2):
            below = await accept(sock)
            try:
                stream = await accepting.server(Flow(), below)
                await stream.send(await everything(stream))
                await stream.aclose()
            except GostnetError:
                pass
            finally:
                below.abort()

    async def main(port: int, sock: socket.socket) -> None:
        serving = Scope("server")
        serving.start(serve(sock))
        plain = await connect_tcp("127.0.0.1", port)
        if fits:
            await exchange(plain, 3 << 20)
            await exchange(await connect_tcp("127.0.0.1", port), 7)
        else:
            try:
                assert await plain.receive() == b""
            except ConnError:
                pass
            plain.abort()
        await serving.cancel()

    with listening() as sock:
        node = query(**of_files(world.client), **given)
        to = f"forward+tls://127.0.0.1:{sock.getsockname()[1]}?{node}"
        with running_gost(world, "-L", "tcp://127.0.0.1:0/192.0.2.1:80", "-F", to) as port:
            run(main(port, sock))


@gost
@needs_gost
def test_saved_certificate_is_shared_with_gost(world: World, tmp_path: Path) -> None:
    async def shown(port: int) -> bytes:
        stream = await client().client(Flow(), await connect_tcp("127.0.0.1", port), "")
        found = ssl.DER_cert_to_PEM_cert(stream.peer_certificate).encode()
        await stream.aclose()
        return found

    def gost_shows(home: Path) -> bytes:
        home.mkdir(exist_ok=True)
        place = World(home, world.ca, world.server, world.client)
        with running_gost(place, "-L", "socks5+tls://127.0.0.1:0") as port:
            return run(shown(port))

    ours = Certificates(working=tmp_path, saved=tmp_path / "ours" / ".gost").default().pair
    assert gost_shows(tmp_path / "ours") == ours.certificate
    theirs = gost_shows(tmp_path / "theirs")
    found = Certificates(working=tmp_path, saved=tmp_path / "theirs" / ".gost").default().pair
    assert found.certificate == theirs
