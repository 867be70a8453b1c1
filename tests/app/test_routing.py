"""Routing as users meet it: a daemon, a configuration, proxies that die and come back; with the real gost as well."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet.core.address import Endpoint
from gostnet.testing.clients import connect, fetch
from gostnet.testing.processes import Process, gostnet
from gostnet.testing.servers import Servers

from .kit import Start, listening

GOST = os.environ.get("GOST_BIN", "")

PEERS = [
    "plain",
    pytest.param(
        "gost", marks=[pytest.mark.interop, pytest.mark.skipif(not GOST, reason="GOST_BIN is not set: a path of gost")]
    ),
]


def closed_port() -> int:
    """Return a port of 127.0.0.1 where nobody listens at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Plain:
    """A SOCKS5 proxy of a few lines: IPv4 and names, one thread a direction."""

    def __init__(self, address: Endpoint) -> None:
        self._socket = socket.create_server(tuple(address))
        self._open: set[socket.socket] = {self._socket}
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, sock.makefile("rb") as reader:
                reader.read(reader.read(2)[1])
                sock.sendall(b"\5\0")
                kind = reader.read(4)[3]
                host = socket.inet_ntoa(reader.read(4)) if kind == 1 else reader.read(reader.read(1)[0]).decode()
                target = host, int.from_bytes(reader.read(2), "big")
                try:
                    upstream = socket.create_connection(target, 10)
                except OSError:
                    sock.sendall(b"\5\5\0\1" + bytes(6))
                    return
                self._open.add(upstream)
                with upstream:
                    sock.sendall(b"\5\0\0\1" + bytes(6))
                    back = threading.Thread(target=self._copy, args=(upstream, sock), daemon=True)
                    back.start()
                    while data := reader.read1(65536):
                        upstream.sendall(data)
                    upstream.shutdown(socket.SHUT_WR)
                    back.join(10)
        except (OSError, IndexError, ValueError):
            pass

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def kill(self) -> None:
        """Stop listening and cut what is open."""
        for sock in self._open:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._socket.close()


class Proxies:
    """SOCKS5 proxies that are started and killed by name; each keeps its port."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._running: dict[str, Plain | Process] = {}
        self.address: dict[str, Endpoint] = {}

    def __enter__(self) -> Proxies:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.kill(name)

    def start(self, name: str) -> None:
        """Start one and wait until it accepts."""
        address = self.address.setdefault(name, Endpoint("127.0.0.1", closed_port()))
        if self._kind == "plain":
            self._running[name] = Plain(address)
            return
        process = self._running[name] = Process([GOST, "-L", f"socks5://{address}"], name="gost")
        process.start()
        give_up = time.monotonic() + 20
        while True:
            try:
                connect(None, address).close()
                return
            except ConnectionRefusedError:
                assert time.monotonic() < give_up, process.errors
                time.sleep(0.01)

    def kill(self, name: str) -> None:
        """End one at once."""
        self._running.pop(name).kill()

    def node(self, name: str, **more: Any) -> dict[str, Any]:
        """Return its section in a hop."""
        return {
            "name": name,
            "addr": str(self.address[name]),
            "connector": {"type": "socks5"},
            "dialer": {"type": "tcp"},
            **more,
        }


@pytest.fixture(params=PEERS)
def proxies(request: pytest.FixtureRequest) -> Any:
    with Proxies(request.param) as made:
        yield made


def service(**handler: Any) -> dict[str, Any]:
    return {
        "name": "in",
        "addr": "127.0.0.1:0",
        "handler": {"type": "socks5", **handler},
        "listener": {"type": "tcp"},
    }


def chain(*nodes: dict[str, Any], name: str = "out", **selector: Any) -> dict[str, Any]:
    return {"name": name, "hops": [{"name": f"{name}-hop", "selector": selector, "nodes": list(nodes)}]}


class Ours:
    """The daemon under test, and how its flows went."""

    def __init__(self, start: Start, directory: Path, config: dict[str, Any]) -> None:
        self.path = directory / "config.yaml"
        self.write(config)
        self.process = start("-D", "-C", str(self.path))
        self.address = listening(self.process, "in")
        self._flows = 0

    def write(self, config: dict[str, Any]) -> None:
        self.path.write_text(yaml.safe_dump({"log": {"level": "debug"}, **config}))

    def ask(self, host: str, port: int, payload: bytes = b"ping") -> bytes:
        """Connect by SOCKS5 to a name or address and return the echo; b"" when it is refused."""
        with connect(None, self.address) as sock:
            sock.sendall(b"\5\1\0")
            assert sock.recv(2) == b"\5\0"
            try:
                where = b"\1" + socket.inet_aton(host)
            except OSError:
                where = b"\3" + bytes([len(host)]) + host.encode()
            sock.sendall(b"\5\1\0" + where + port.to_bytes(2, "big"))
            reply = sock.recv(300)
            if reply[1:2] != b"\0":
                return b""
            sock.sendall(payload)
            return sock.recv(len(payload))

    def records(self) -> list[dict[str, Any]]:
        """Return the lines that say what became of flows."""
        lines = [json.loads(line) for line in self.process.errors.splitlines()]
        return [line for line in lines if "route" in line or "dst" in line]

    def went(self, host: str, port: int) -> str:
        """Send something by the daemon and return the name of the node that carried it, "" for a failure."""
        before = len(self.records())
        answer = self.ask(host, port)
        give_up = time.monotonic() + 10
        while len(self.records()) <= before:
            assert time.monotonic() < give_up, self.process.errors
            time.sleep(0.005)
        return str(self.records()[before].get("route", "direct")).partition("@")[0] if answer else ""


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


# ---- failover ------------------------------------------------------------------------------------
def test_when_a_node_dies_the_others_carry_on(start: Start, tmp_path: Path, servers: Servers, proxies: Proxies) -> None:
    proxies.start("a")
    proxies.start("b")
    echo = servers.endpoint("echo/tcp")
    config = {
        "services": [service(chain="out", retries=1)],
        "chains": [chain(proxies.node("a"), proxies.node("b"), strategy="round", failTimeout="60s")],
    }
    ours = Ours(start, tmp_path, config)
    assert {ours.went(echo.host, echo.port) for _ in range(4)} == {"a", "b"}
    proxies.kill("a")
    assert [ours.went(echo.host, echo.port) for _ in range(6)] == ["b"] * 6


def test_l12_parallel_takes_whoever_is_reached(
    start: Start, tmp_path: Path, servers: Servers, proxies: Proxies
) -> None:
    proxies.start("live")
    echo = servers.endpoint("echo/tcp")
    with ExitStack() as stack:
        # It accepts and never says a word: in GOST most flows would be lost to it.
        mute = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        proxies.address["mute"] = Endpoint("127.0.0.1", mute.getsockname()[1])
        proxies.address["dead"] = Endpoint("127.0.0.1", closed_port())
        nodes = [proxies.node(name) for name in ("mute", "dead", "live")]
        config = {"services": [service(chain="out")], "chains": [chain(*nodes, strategy="parallel")]}
        ours = Ours(start, tmp_path, config)
        began = time.monotonic()
        assert [ours.went(echo.host, echo.port) for _ in range(5)] == ["live"] * 5
        assert time.monotonic() - began < 10


def test_a_probe_takes_a_node_out_and_brings_it_back(
    start: Start, tmp_path: Path, servers: Servers, proxies: Proxies
) -> None:
    proxies.start("a")
    proxies.start("b")
    echo = servers.endpoint("echo/tcp")
    web = servers.endpoint("http")
    probe = {
        "type": "http",
        "addr": str(web),
        "httpPath": "/status/204",
        "expectedStatus": 204,
        "interval": "200ms",
        "timeout": "2s",
        "successThreshold": 2,
    }
    config = {
        "services": [service(chain="out")],
        "chains": [
            chain(proxies.node("a", probe=probe), proxies.node("b"), strategy="fifo", failTimeout="1ms"),
        ],
    }
    ours = Ours(start, tmp_path, config)
    ours.process.wait_for("probe node a: ok in")
    assert ours.went(echo.host, echo.port) == "a"
    proxies.kill("a")
    ours.process.wait_for("node a is dead")
    # The fail timeout is long over, and yet nobody is sent there.
    assert [ours.went(echo.host, echo.port) for _ in range(3)] == ["b"] * 3
    proxies.start("a")
    ours.process.wait_for("node a is alive again")
    assert ours.went(echo.host, echo.port) == "a"
    # What a probe found outlasts a reload; without a probe nothing would lift it, so it is lifted then.
    proxies.kill("a")
    wait_until(lambda: ours.process.errors.count("node a is dead") == 2)
    ours.process.send(signal.SIGHUP)
    ours.process.wait_for("config reloaded")
    assert ours.went(echo.host, echo.port) == "b"
    assert ours.process.errors.count("node a is dead") == 2


def test_a_reload_ends_the_probes_of_before_with_what_they_run(start: Start, tmp_path: Path) -> None:
    note = tmp_path / "pids"
    note.touch()
    probe = {"type": "cmd", "command": f"echo $$ >>{note}; exec sleep 600", "interval": "1s", "timeout": "100s"}
    node = {"name": "n", "addr": "127.0.0.1:9", "connector": {"type": "socks5"}, "dialer": {"type": "tcp"}}
    config = {"services": [service(chain="out")], "chains": [chain({**node, "probe": probe})]}
    ours = Ours(start, tmp_path, config)
    wait_until(lambda: note.read_text() != "")
    pid = int(note.read_text())
    assert Path(f"/proc/{pid}").exists()
    ours.write({"services": config["services"], "chains": [chain(node)]})
    ours.process.send(signal.SIGHUP)
    ours.process.wait_for("config reloaded")
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert ours.process.stop() == 0


# ---- choosing ------------------------------------------------------------------------------------
def test_matchers_choose_nodes_and_what_none_is_for_fails(
    start: Start, tmp_path: Path, servers: Servers, proxies: Proxies
) -> None:
    proxies.start("named")
    proxies.start("numbered")
    echo = servers.endpoint("echo/tcp")
    rules = {
        "named": "Host(`localhost`) || Host(`*.localhost`)",
        "numbered": "ClientIP(`127.0.0.0/8`) && HostRegexp(`^127[.]0[.]0[.]1$`)",
    }
    nodes = [proxies.node(name, matcher={"rule": rule}) for name, rule in rules.items()]
    config = {"services": [service(chain="out", retries=3)], "chains": [chain(*nodes)]}
    ours = Ours(start, tmp_path, config)
    assert ours.went("localhost", echo.port) == "named"
    assert ours.went("127.0.0.1", echo.port) == "numbered"
    assert ours.went("127.0.0.2", echo.port) == ""
    ours.process.wait_for("hop out-hop: no node is for 127.0.0.2")
    hop = config["chains"][0]["hops"][0]
    ours.write({**config, "chains": [{"name": "out", "hops": [{**hop, "metadata": {"onNoNode": "direct"}}]}]})
    ours.process.send(signal.SIGHUP)
    ours.process.wait_for("config reloaded")
    assert ours.ask("127.0.0.1", echo.port) == b"ping"
    ours.ask("127.0.0.2", 9)  # nobody listens there, but now it is asked directly
    ours.process.wait_for("dial 127.0.0.2:9")


def test_chain_groups_choose_by_matcher_and_leave_out_what_a_probe_found_dead(
    start: Start, tmp_path: Path, servers: Servers, proxies: Proxies
) -> None:
    proxies.start("a")
    proxies.start("b")
    echo = servers.endpoint("echo/tcp")
    probe = {"type": "tcp", "addr": str(echo), "interval": "200ms", "timeout": "2s"}
    group = {
        "chains": [
            {"chain": "named", "matcher": {"rule": "Host(`localhost`)", "priority": 1}},
            {"chain": "first", "probe": probe},
            "second",
        ],
        "selector": {"strategy": "fifo"},
    }
    config = {
        "services": [service(chainGroup=group)],
        "chains": [
            chain(proxies.node("b"), name="named"),
            chain(proxies.node("a"), name="first"),
            chain(proxies.node("b"), name="second"),
        ],
    }
    ours = Ours(start, tmp_path, config)
    ours.process.wait_for("probe chain first: ok in")
    assert ours.went("127.0.0.1", echo.port) == "a"
    assert ours.went("localhost", echo.port) == "b"
    proxies.kill("a")
    ours.process.wait_for("chain first is dead")
    assert [ours.went("127.0.0.1", echo.port) for _ in range(3)] == ["b"] * 3


# ---- forwarders ----------------------------------------------------------------------------------
def forward(forwarder: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {
        "name": "in",
        "addr": "127.0.0.1:0",
        "handler": {"type": "tcp", "metadata": metadata},
        "listener": {"type": "tcp"},
        "forwarder": forwarder,
    }


def test_targets_are_chosen_by_what_is_sniffed(start: Start, tmp_path: Path, servers: Servers) -> None:
    web = servers.endpoint("http")
    nodes = [
        {"name": "api", "addr": str(web), "matcher": {"rule": "Host(`api.test`) && PathPrefix(`/status`)"}},
        {"name": "web", "addr": str(web), "filter": {"host": ".web.test", "protocol": "http"}},
        {"name": "old", "addr": str(web), "host": "old.test"},
    ]
    ours = Ours(start, tmp_path, {"services": [forward({"nodes": nodes}, sniffing=True)]})

    def status(host: str, path: str) -> int:
        try:
            return fetch(None, ours.address, path, host=host).status
        except OSError:
            return 0

    assert status("api.test", "/status/204") == 204
    assert status("www.web.test", "/status/201") == 201
    assert status("old.test", "/status/202") == 202
    assert status("api.test", "/") in (0, 502, 503)
    ours.process.wait_for("in: hop in: no node is for api.test")


def test_a_group_of_hops_gives_targets_and_probes_them(start: Start, tmp_path: Path, servers: Servers) -> None:
    echo = servers.endpoint("echo/tcp")
    flag = tmp_path / "alive"
    flag.touch()
    dead = Endpoint("127.0.0.1", closed_port())

    def plain(name: str, address: Endpoint) -> dict[str, Any]:
        return {"name": name, "addr": str(address)}

    config = {
        "services": [
            forward(
                {
                    "hopGroup": {
                        "hops": [
                            {
                                "hop": "first",
                                "probe": {"type": "cmd", "command": f"test -e {flag}", "interval": "200ms"},
                            },
                            {"hop": "second"},
                        ],
                        "selector": {"strategy": "fifo"},
                    }
                }
            )
        ],
        "hops": [
            {"name": "first", "nodes": [plain("one", dead), plain("two", echo)]},
            {"name": "second", "nodes": [plain("three", echo)]},
        ],
    }
    ours = Ours(start, tmp_path, config)

    def answered() -> bool:
        with connect(None, ours.address) as sock:
            sock.sendall(b"ping")
            return sock.recv(4) == b"ping"

    assert all(answered() for _ in range(4))
    flag.unlink()
    ours.process.wait_for("hop first is dead: the command ended with 1")
    assert answered()
    flag.touch()
    ours.process.wait_for("hop first is alive again")


def test_a_target_is_probed_by_the_services_own_way(start: Start, tmp_path: Path, servers: Servers) -> None:
    echo = servers.endpoint("echo/tcp")
    nodes = [
        {
            "name": "gone",
            "addr": f"127.0.0.1:{closed_port()}",
            "probe": {"type": "tcp", "addr": "unused:1", "interval": "200ms"},
        },
        {"name": "echo", "addr": str(echo), "probe": {"type": "tcp", "addr": "unused:1", "interval": "200ms"}},
    ]
    ours = Ours(start, tmp_path, {"services": [forward({"nodes": nodes, "selector": {"strategy": "lowestlatency"}})]})
    ours.process.wait_for("target gone is dead: dial")
    ours.process.wait_for("probe target echo: ok in")
    with connect(None, ours.address) as sock:
        sock.sendall(b"ping")
        assert sock.recv(4) == b"ping"


# ---- what is refused -----------------------------------------------------------------------------
def test_a_target_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    nodes = [{"name": "n", "addr": "127.0.0.1:9", "network": "udp"}]
    path.write_text(yaml.safe_dump({"services": [forward({"nodes": nodes})]}))
    with gostnet("-C", str(path)) as process:
        assert process.wait() == 1
        assert "network: 'udp' behind a tcp listener is not available" in process.errors
