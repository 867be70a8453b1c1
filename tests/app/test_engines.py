"""What the daemon's log says of engines: what each flow had, and what has given way, once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet.core.address import Endpoint
from gostnet.testing.clients import connect, echo_datagram
from gostnet.testing.processes import Process
from gostnet.testing.servers import Servers

from .kit import listening

WITHOUT = """
import sys
{0}
from gostnet.cli import main
sys.exit(main(sys.argv[1:]))
"""
NO_UVLOOP = "sys.modules['uvloop'] = None"
NO_LIBRARY = "import gostnet.dataplane.native.library as it; it.LIBRARY = it.LIBRARY.with_name('is-not-there')"


def forwarder(name: str, target: Endpoint) -> dict[str, Any]:
    node = {"name": "target", "addr": f"{target.host}:{target.port}"}
    return {
        "name": name,
        "addr": "127.0.0.1:0",
        "handler": {"type": name},
        "listener": {"type": name, "metadata": {"keepalive": True, "ttl": "1s"} if name == "udp" else {}},
        "forwarder": {"nodes": [node]},
    }


@pytest.mark.parametrize(
    ("without", "lines", "engines"),
    [
        (NO_UVLOOP, {"engine uvloop gives way to asyncio"}, {}),
        (
            NO_LIBRARY,
            {"engine native gives way to splice", "engine native gives way to copy"},
            {"tcp": "splice: native is not built", "udp": "copy: native is not built"},
        ),
    ],
)
def test_what_gives_way_is_said_once_and_flows_say_what_they_had(
    servers: Servers, tmp_path: Path, without: str, lines: set[str], engines: dict[str, str]
) -> None:
    path = tmp_path / "gostnet.yaml"
    services = [forwarder(name, servers.endpoint(f"echo/{name}")) for name in ("tcp", "udp")]
    path.write_text(yaml.safe_dump({"log": {"level": "debug"}, "services": services}))
    arguments = [sys.executable, "-c", WITHOUT.format(without), "-C", str(path)]
    with Process(arguments, name="gostnet") as process:
        process.wait_ready()
        for _ in range(2):
            with connect(None, listening(process, "tcp")) as sock:
                sock.sendall(b"hello")
                assert sock.recv(100) == b"hello"
            target = listening(process, "udp")
            assert echo_datagram(None, target, b"hello") == (b"hello", target)
        assert process.stop() == 0
        said = [str(record["msg"]) for record in process.records if record["level"] == "warn"]
        assert {line.partition(":")[0] for line in said} == lines
        assert len(said) == len(lines)
        flows = [record for record in process.records if ">-<" in str(record["msg"])]
        assert {record["service"] for record in flows} == {"tcp", "udp"}
        for record in flows:
            assert str(record["engine"]).startswith(engines.get(str(record["service"]), "")), record
