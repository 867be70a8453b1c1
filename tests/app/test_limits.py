"""Limits as users meet them: a daemon, a configuration, clients on every kind of handler."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet.core.address import Endpoint
from gostnet.testing.clients import connect, echo_datagram, resolve
from gostnet.testing.servers import Servers

from .kit import Start, listening

TIMES = 5
"""Clients that come at once."""


def socks5(proxy: Endpoint, target: Endpoint) -> bool:
    return answered(proxy, b"\5\1\0")


def http(proxy: Endpoint, target: Endpoint) -> bool:
    return answered(proxy, f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())


def relay(proxy: Endpoint, target: Endpoint) -> bool:
    # GOST relay: version 1, CONNECT, the length of the features, one address feature (IPv4).
    address = b"\x02\x00\x07\x01" + socket.inet_aton(target.host) + target.port.to_bytes(2, "big")
    return answered(proxy, b"\x01\x01" + len(address).to_bytes(2, "big") + address + b"hello")


def stream(proxy: Endpoint, target: Endpoint) -> bool:
    return answered(proxy, b"hello")


def datagram(proxy: Endpoint, target: Endpoint) -> bool:
    try:
        return echo_datagram(None, proxy, b"hello", timeout=0.5)[0] == b"hello"
    except TimeoutError:
        return False


def query(proxy: Endpoint, target: Endpoint) -> bool:
    try:
        resolve(None, proxy, "example.com", timeout=0.3)
    except TimeoutError:
        return False
    return True


def answered(proxy: Endpoint, request: bytes) -> bool:
    """Whether anything comes back before the end."""
    with connect(None, proxy) as sock:
        try:
            sock.sendall(request)
            return sock.recv(100) != b""
        except ConnectionError:
            return False


SERVICES: dict[str, tuple[Callable[[Endpoint, Endpoint], bool], str, dict[str, Any]]] = {
    "socks5": (socks5, "echo/tcp", {"handler": {"type": "socks5"}}),
    "http": (http, "echo/tcp", {"handler": {"type": "http"}}),
    "auto": (http, "echo/tcp", {"handler": {"type": "auto"}}),
    "relay": (relay, "echo/tcp", {"handler": {"type": "relay"}}),
    "tcp": (stream, "echo/tcp", {"handler": {"type": "tcp"}, "forwarder": {}}),
    "udp": (
        datagram,
        "echo/udp",
        {"handler": {"type": "udp"}, "listener": {"type": "udp", "metadata": {"keepalive": True}}, "forwarder": {}},
    ),
    "dns": (query, "dns/udp", {"handler": {"type": "dns"}, "listener": {"type": "dns"}, "forwarder": {}}),
}


@pytest.mark.parametrize("name", SERVICES)
def test_k07_a_rate_limit_holds_on_every_handler(start: Start, servers: Servers, name: str) -> None:
    ask, server, section = SERVICES[name]
    target = servers.endpoint(server)
    section = {"name": "s", "addr": "127.0.0.1:0", "listener": {"type": "tcp"}, **section, "rlimiter": "r"}
    if "forwarder" in section:
        section["forwarder"] = {"nodes": [{"name": "t", "addr": str(target)}]}
    config = {
        "services": [section],
        "rlimiters": [{"name": "r", "limits": ["127.0.0.0/8 0.001", "$ 100"]}],
        "log": {"level": "debug"},
    }
    process = start("-C", json.dumps(config))
    proxy = listening(process, "s")
    assert [ask(proxy, target) for _ in range(TIMES)] == [True] + [False] * (TIMES - 1)
    process.stop()
    refused = [record for record in process.records if record["msg"].endswith(": rate limit")]
    assert len(refused) == TIMES - 1
    assert {record["level"] for record in refused} == {"debug"}
    assert not [record for record in process.records if record["level"] in ("warn", "error")]


def test_k07_every_query_of_a_dns_connection_counts(start: Start, servers: Servers) -> None:
    config = {
        "services": [
            {
                "name": "s",
                "addr": "127.0.0.1:0",
                "handler": {"type": "dns"},
                "listener": {"type": "dns", "metadata": {"mode": "tcp"}},
                "forwarder": {"nodes": [{"name": "t", "addr": str(servers.endpoint("dns/udp"))}]},
                "rlimiter": "r",
            }
        ],
        "rlimiters": [{"name": "r", "limits": ["$ 2.001"]}],
    }
    process = start("-C", json.dumps(config))
    question = b"\x07example\x03com\x00\x00\x01\x00\x01"
    message = b"\x12\x34\x01\x00\x00\x01" + bytes(6) + question
    with connect(None, listening(process, "s")) as sock:
        sock.sendall((len(message).to_bytes(2, "big") + message) * 5)
        data = b""
        while more := sock.recv(4096):
            data += more
    answers = 0
    while data:
        data = data[2 + int.from_bytes(data[:2], "big") :]
        answers += 1
    assert answers == 3


def test_a_reload_forgets_no_connection_and_changes_the_rate_of_what_runs(
    start: Start, servers: Servers, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]

    def write(connections: str, rate: str) -> None:
        service = {
            "name": "s",
            "addr": f"127.0.0.1:{port}",
            "handler": {"type": "tcp"},
            "listener": {"type": "tcp"},
            "forwarder": {"nodes": [{"name": "t", "addr": str(servers.endpoint("echo/tcp"))}]},
            "climiter": "c",
            "limiter": "l",
        }
        limits = {"climiters": [{"name": "c", "limits": [f"$ {connections}"]}]}
        limits["limiters"] = [{"name": "l", "limits": [f"$ {rate} {rate} 100KB"]}]
        path.write_text(yaml.safe_dump({"services": [service], **limits}))

    place = Endpoint("127.0.0.1", port)
    write("2", "1B")
    process = start("-C", str(path))
    with connect(None, place) as first, connect(None, place) as second:
        for sock in (first, second):
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        first.sendall(b"y" * 150_000)  # what is above 100 KiB would take half a day
        write("2", "100MB")
        process.send(signal.SIGHUP)
        process.wait_for("config reloaded")
        assert not stream(place, place)
        left = 150_000
        while left:
            left -= len(first.recv(65536))
