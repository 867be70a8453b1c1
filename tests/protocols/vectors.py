"""Replay of recorded dialogues (tests/data/vectors/*.json) against live handlers and connectors.

A vector is what the real gost 3.3.0 said and heard: steps of bytes, each from the client or the server. Bytes that
follow each other in one direction are one step. Ports, and whatever else differs between runs, are substituted.

A handler plays the server's part; `served` runs it in a real service on loopback:

    async def main() -> None:
        async with echo_server() as port, served(Socks5Handler(Socks5Handler.Options(), HandlerContext())) as address:
            vector = load("socks5-connect-noauth")
            ports = {TARGET_PORT: port.to_bytes(2, "big")}
            await replay_client(vector, address, replace=ports, vary={3: [slice(8, 10)]})

    run(main())

`replay_client` sends the client's steps and compares what comes back: `vary` names, by number of the step (from 0),
the bytes of a step that may be anything; `patterns` gives a regular expression (bytes, DOTALL) for a step whose length
varies too. `replace` is applied to every step of both sides, so give it strings of bytes that mean one thing only.

A connector plays the client's part against a peer that only knows the vector:

    async def play(below: Stream) -> None:
        stream = await connector.connect(Flow(), await connector.handshake(Flow(), below), Endpoint("127.0.0.1", 7007))
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"

    await replay_server(load("socks5-client-notls"), play)

Everything is a real socket and has a deadline; nothing here uses the project's streams but `served` and `play`.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gostnet.core.address import Endpoint
from gostnet.core.contracts import Policies
from gostnet.core.egress import Egress
from gostnet.core.errors import ResolveError
from gostnet.core.log import Logger
from gostnet.core.sockets import SocketStream
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope
from gostnet.pipeline.direct import Direct
from gostnet.pipeline.router import ServiceRouter
from gostnet.pipeline.service import Service
from gostnet.pipeline.transport import Listener
from gostnet.transports.tcp import TcpOptions, TcpSource

VECTORS = Path(__file__).parent.parent / "data" / "vectors"

TARGET_PORT = (7007).to_bytes(2, "big")
"""The port of the echo server in all recordings."""

PATIENCE = 10.0
"""Seconds after which a step that does not come counts as missing."""


@dataclass(frozen=True, slots=True)
class Step:
    """Bytes from one side, by the connection or by UDP, or the end of its direction."""

    sender: str
    data: bytes
    eof: bool = False
    udp: bool = False


@dataclass(frozen=True, slots=True)
class Vector:
    """A recorded dialogue."""

    name: str
    steps: tuple[Step, ...]


def load(name: str) -> Vector:
    """Read tests/data/vectors/NAME.json."""
    raw = json.loads((VECTORS / f"{name}.json").read_text())
    return Vector(
        name,
        tuple(
            Step(
                step["from"],
                bytes.fromhex(step.get("hex", "")),
                step.get("event") == "EOF",
                step.get("transport") == "udp",
            )
            for step in raw["steps"]
        ),
    )


def substituted(data: bytes, replace: Mapping[bytes, bytes]) -> bytes:
    """Return `data` with every key of `replace` exchanged for its value."""
    for old, new in replace.items():
        data = data.replace(old, new)
    return data


def expected(data: bytes, vary: Sequence[slice]) -> re.Pattern[bytes]:
    """Return the pattern of a step of this length, any bytes allowed where `vary` says."""
    free = {index for piece in vary for index in range(*piece.indices(len(data)))}
    parts = (b"." if index in free else re.escape(data[index : index + 1]) for index in range(len(data)))
    return re.compile(b"".join(parts), re.DOTALL)


# ---- a service under test -----------------------------------------------------------------------
class Names:
    """A resolver that knows `localhost`, and whatever else it is told."""

    def __init__(self, **names: list[str]) -> None:
        self.names = {"localhost": ["127.0.0.1"], **names}
        self.asked: list[str] = []

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        """Return the addresses. Raise ResolveError."""
        self.asked.append(host)
        if host not in self.names:
            raise ResolveError(f"{host} has no address")
        return self.names[host]


def router(**options: Any) -> ServiceRouter:
    """Return a direct way out that knows the name localhost; `options` are ServiceRouter's."""
    return ServiceRouter(Direct(Names()), **options)


@asynccontextmanager
async def served(
    handler: Any, egress: Egress | None = None, *, host: str = "127.0.0.1", log: Logger | None = None
) -> AsyncIterator[Endpoint]:
    """Run `handler` in a service on loopback, a free port; yield its address. Every connection is ended at the end."""
    service = Service(
        "test",
        Listener("tcp", TcpSource(Endpoint(host, 0), TcpOptions())),
        handler,
        egress or router(),
        Policies(),
        log,
    )
    await service.open()
    scope = Scope("served")
    task = scope.start(service.serve(), "serve")
    try:
        yield service.listener.source.address
    finally:
        task.cancel()
        await service.aclose()
        await service.drain(0)
        await scope.cancel()


@asynccontextmanager
async def echo_server(host: str = "127.0.0.1") -> AsyncIterator[int]:
    """Echo TCP (half-close included) and UDP on one and the same free port; yield the port."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            pass
        finally:
            writer.close()

    def echo_datagrams() -> None:
        # Not by a transport of asyncio's: those drop empty datagrams.
        while True:
            try:
                data, peer = datagrams.recvfrom(65536)
                datagrams.sendto(data, peer)
            except BlockingIOError:
                return
            except OSError:
                continue

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for attempt in range(20):
        server = await asyncio.start_server(echo, host, 0, family=family)
        port: int = server.sockets[0].getsockname()[1]
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        datagrams.setblocking(False)
        try:
            datagrams.bind((host, port))
            break
        except OSError:
            server.close()  # somebody has the number for UDP
            datagrams.close()
            if attempt == 19:
                raise
    loop = asyncio.get_running_loop()
    loop.add_reader(datagrams, echo_datagrams)
    try:
        yield port
    finally:
        loop.remove_reader(datagrams)
        datagrams.close()
        server.close()


# ---- a plain peer -------------------------------------------------------------------------------
class Peer:
    """A socket in asyncio's own hands, independent of the project's streams: what tests talk to handlers with."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, address: Endpoint) -> Peer:
        """Connect to `address`."""
        peer = cls(socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM))
        await peer._loop.sock_connect(peer.sock, tuple(address))
        return peer

    @property
    def address(self) -> Endpoint:
        """The local address."""
        return Endpoint.from_sockaddr(self.sock.getsockname())

    async def send(self, data: bytes) -> None:
        """Write all of `data`."""
        async with asyncio.timeout(PATIENCE):
            await self._loop.sock_sendall(self.sock, data)

    async def receive(self, count: int = 65536) -> bytes:
        """Return what comes next, b"" at the end; the end of a connection that was reset too."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self._loop.sock_recv(self.sock, count)
            except ConnectionResetError:
                return b""

    async def exactly(self, count: int) -> bytes:
        """Return `count` bytes, fewer only at the end."""
        data = b""
        while len(data) < count and (piece := await self.receive(count - len(data))):
            data += piece
        return data

    async def rest(self) -> bytes:
        """Return everything up to the end."""
        data = b""
        while piece := await self.receive():
            data += piece
        return data

    async def match(self, pattern: re.Pattern[bytes], least: int = 1) -> bytes:
        """Return what comes once it matches `pattern` as a whole; what has come when it ends or is late."""
        data = await self.exactly(least)
        try:
            while not pattern.fullmatch(data) and (piece := await self.receive()):
                data += piece
        except TimeoutError:
            pass
        return data

    def shut(self) -> None:
        """End our direction."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class UdpPeer:
    """A UDP socket on loopback in asyncio's own hands."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.bind((host, 0))
        self._loop = asyncio.get_running_loop()

    @property
    def address(self) -> Endpoint:
        """The local address."""
        return Endpoint.from_sockaddr(self.sock.getsockname())

    async def send(self, data: bytes, to: Endpoint) -> None:
        """Send one datagram."""
        self.sock.sendto(data, tuple(to))

    async def receive(self) -> tuple[bytes, Endpoint]:
        """Return the next datagram and who sent it."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    data, sender = self.sock.recvfrom(65536)
                except BlockingIOError:
                    await self._readable()
                else:
                    return data, Endpoint.from_sockaddr(sender)

    async def _readable(self) -> None:
        # uvloop has no sock_recvfrom.
        ready = asyncio.Event()
        self._loop.add_reader(self.sock, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(self.sock)

    def __enter__(self) -> UdpPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


class Listening:
    """A listening socket on loopback whose connections the test serves by itself."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family)
        self._server.setblocking(False)
        self.address = Endpoint.from_sockaddr(self._server.getsockname())

    async def accept(self) -> Peer:
        """Return the next connection; the caller closes it."""
        async with asyncio.timeout(PATIENCE):
            sock, _ = await asyncio.get_running_loop().sock_accept(self._server)
        return Peer(sock)

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()


def closed_port() -> int:
    """Return a port of 127.0.0.1 where nobody listens at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# ---- replay -------------------------------------------------------------------------------------
async def replay_client(
    vector: Vector,
    address: Endpoint,
    *,
    replace: Mapping[bytes, bytes] | None = None,
    vary: Mapping[int, Sequence[slice]] | None = None,
    patterns: Mapping[int, bytes] | None = None,
    relay: Callable[[bytes], Endpoint] | None = None,
) -> list[bytes]:
    """Play the client's part against the server at `address`; return the bytes of each step as they were.

    relay    finds where UDP steps go in all that the server has said so far

    Raise AssertionError, with the step's number, for a step of the server's that differs.
    """
    replace, vary, patterns = replace or {}, vary or {}, patterns or {}
    seen: list[bytes] = []
    said = b""
    with await Peer.connect(address) as peer, UdpPeer(address.host) as udp:
        for number, step in enumerate(vector.steps):
            data = substituted(step.data, replace)
            where = f"{vector.name}, step {number}"
            if step.sender == "client":
                if step.udp:
                    assert relay is not None, f"{where} is UDP: say where it goes"
                    await udp.send(data, relay(said))
                elif step.eof:
                    peer.shut()
                else:
                    await peer.send(data)
                seen.append(data)
                continue
            if step.udp:
                got, _ = await udp.receive()
                _compare(where, got, expected(data, vary.get(number, ())), data)
            elif step.eof:
                got = await peer.rest()
                assert got == b"", f"{where}: {got!r} instead of the end"
            elif number in patterns:
                pattern = re.compile(patterns[number], re.DOTALL)
                got = await peer.match(pattern)
                _compare(where, got, pattern, data)
            else:
                got = await peer.exactly(len(data))
                _compare(where, got, expected(data, vary.get(number, ())), data)
            if not step.udp:
                said += got
            seen.append(got)
    return seen


async def replay_server(
    vector: Vector,
    play: Callable[[Stream], Awaitable[None]],
    *,
    replace: Mapping[bytes, bytes] | None = None,
    vary: Mapping[int, Sequence[slice]] | None = None,
    patterns: Mapping[int, bytes] | None = None,
    until: int | None = None,
) -> list[bytes]:
    """Play the server's part for `play`, which gets a connected stream and is the client; return the steps' bytes.

    until    the number of steps to play; the server's end comes in place of the rest

    Raise AssertionError for a step of the client's that differs, and what `play` raises.
    """
    replace, vary, patterns = replace or {}, vary or {}, patterns or {}
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    below = SocketStream(theirs, Endpoint("127.0.0.1", 40000), Endpoint("127.0.0.1", 1080))
    scope = Scope("replay")
    failure: list[BaseException] = []

    async def client() -> None:
        try:
            await play(below)
        except Exception as exc:
            failure.append(exc)
            below.abort()

    task = scope.start(client(), "client")
    seen: list[bytes] = []
    try:
        with Peer(ours) as peer:
            for number, step in enumerate(vector.steps[:until]):
                data = substituted(step.data, replace)
                where = f"{vector.name}, step {number}"
                if step.sender == "server":
                    if step.eof:
                        peer.shut()
                    else:
                        await peer.send(data)
                    seen.append(data)
                    continue
                if step.eof:
                    got = await peer.rest()
                    problem = f"{where}: {got!r} instead of the end" if got else ""
                    pattern = None
                elif number in patterns:
                    pattern = re.compile(patterns[number], re.DOTALL)
                    got = await peer.match(pattern)
                else:
                    pattern = expected(data, vary.get(number, ()))
                    got = await peer.exactly(len(data))
                if failure:
                    raise failure[0]
                if pattern is not None:
                    _compare(where, got, pattern, data)
                else:
                    assert not problem, problem
                seen.append(got)
            if until is not None:
                peer.shut()
            async with asyncio.timeout(PATIENCE):
                await task
            if failure:
                raise failure[0]
    finally:
        below.abort()
        await scope.cancel()
    return seen


def _compare(where: str, got: bytes, pattern: re.Pattern[bytes], data: bytes) -> None:
    assert pattern.fullmatch(got), f"{where}: {got!r} instead of {data!r}"
