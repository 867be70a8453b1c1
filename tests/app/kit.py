"""What tests of the whole daemon share: where it listens, and a SOCKS5 client."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable

from gostnet.core.address import Endpoint
from gostnet.testing.clients import connect
from gostnet.testing.processes import Process

Start = Callable[..., Process]
"""Starts the daemon with these words and waits until it is ready."""


def listening(process: Process, service: str = "service-0") -> Endpoint:
    """Return where a service listens, from the log."""
    for line in process.errors.splitlines():
        record = json.loads(line)
        if record.get("service") == service and record["msg"].startswith("listening on "):
            port = re.search(r":(\d+)/", record["msg"])
            assert port is not None
            return Endpoint("127.0.0.1", int(port[1]))
    raise AssertionError(process.errors)


def through(proxy: Endpoint, target: Endpoint) -> socket.socket:
    """Connect to `target` by SOCKS5 without authentication."""
    sock = connect(None, proxy)
    host = socket.inet_aton(target.host)
    sock.sendall(b"\5\1\0")
    assert sock.recv(2) == b"\5\0"
    sock.sendall(b"\5\1\0\1" + host + target.port.to_bytes(2, "big"))
    reply = sock.recv(64)
    assert reply[:2] == b"\5\0", reply
    return sock
