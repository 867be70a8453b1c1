"""The daemon as a process: what it prints, how it ends, what a reload keeps. On loopback, without privileges."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet import __version__
from gostnet.core.address import Endpoint
from gostnet.testing.clients import connect
from gostnet.testing.processes import gostnet
from gostnet.testing.servers import Servers

from .kit import Start, listening, through


def run(*words: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "gostnet", *words],
        input=stdin,
        capture_output=True,
        timeout=30,
        check=False,
        env={**os.environ, **(env or {})},
    )
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


# ---- words and exit codes -------------------------------------------------------------------------
def test_version_is_one_line() -> None:
    done = run("-V")
    assert done.returncode == 0
    assert re.fullmatch(rf"gostnet {re.escape(__version__)} \(Python \d+\.\d+\.\d+ linux/\w+\)\n", done.stdout)


@pytest.mark.parametrize("words", [("-X",), ("chek",), ("-R", "soon", "-L", ":0"), ("check", "stray")])
def test_wrong_usage_exits_with_2(words: Sequence[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_check_prints_findings_with_place_and_a_count(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "services:\n- name: s\n  addr: ':1080'\n  handler: {type: socks5, chain: nowhere}\n  lisener: {type: tcp}\n"
    )
    done = run("check", "-C", str(path))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"{path}:4:") and "error" in line and "nowhere" in line for line in lines)
    assert any(line.startswith(f"{path}:5:3: ") and "listener" in line for line in lines)
    assert re.fullmatch(r"\d+ errors, \d+ warnings", lines[-1])


def test_check_of_a_clean_command_line_exits_with_0() -> None:
    done = run("check", "-L", "socks5://:1080")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("0 errors")


def test_a_name_that_is_not_built_is_refused_by_name() -> None:
    done = run("-L", "socks5+kcp://:0")
    assert done.returncode == 1
    assert "listener 'kcp' is not available in this version" in done.stderr


def test_a_misspelt_name_is_refused_with_a_suggestion() -> None:
    done = run("-L", "sock5://:0")
    assert done.returncode == 1
    assert "socks5" in done.stderr


def test_a_dangling_chain_is_refused_unless_lenient(start: Start, servers: Servers) -> None:
    text = json.dumps(
        {"services": [{"name": "s", "addr": ":0", "handler": {"type": "socks5", "chain": "x"}, "listener": {}}]}
    )
    done = run("-C", text)
    assert done.returncode == 1
    assert "'x'" in done.stderr
    process = gostnet("--lenient", "-C", text)
    process.start()
    process.wait_ready()
    process.stop()
    assert "warning" in process.errors


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = run("-L", "socks5://127.0.0.1:0", "-L", f"socks5://127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"listen 127.0.0.1:{port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_standard_input_is_a_configuration(start: Start) -> None:
    done = run("check", "-C", "-", stdin=b"services: [{name: s, addr: ':0', handler: {type: socks5}}]\n")
    assert done.returncode == 0, done.stdout


# ---- life -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_0(start: Start, number: int) -> None:
    process = start("-L", "socks5://127.0.0.1:0")
    process.send(number)
    assert process.wait() == 0
    assert '"msg":"stopped"' in process.errors


def test_connections_finish_while_it_drains(start: Start, servers: Servers) -> None:
    process = start("-L", "socks5://127.0.0.1:0")
    sock = through(listening(process), servers.endpoint("echo/tcp"))
    process.send(signal.SIGTERM)
    process.wait_for('"msg":"stopping"')
    sock.sendall(b"last words")
    assert sock.recv(100) == b"last words"
    sock.close()
    assert process.wait() == 0


def test_systemd_is_told(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(10)
        process = start("-L", "socks5://127.0.0.1:0", env={"NOTIFY_SOCKET": str(path)})
        assert sock.recv(100) == b"READY=1"
        process.send(signal.SIGTERM)
        assert sock.recv(100) == b"STOPPING=1"


def test_one_line_per_flow_says_who_where_and_how_much(start: Start, servers: Servers) -> None:
    process = start("-L", "socks5://127.0.0.1:0")
    target = servers.endpoint("echo/tcp")
    sock = through(listening(process), target)
    sock.sendall(b"12345")
    assert sock.recv(100) == b"12345"
    client = sock.getsockname()[1]
    sock.close()
    record = json.loads(process.wait_for(">-<"))
    assert record["client"] == f"127.0.0.1:{client}"
    assert record["dst"] == str(target)
    assert (record["inputBytes"], record["outputBytes"]) == (5, 5)
    assert len(record["sid"]) == 20


def _service(name: str, port: int, **handler: Any) -> dict[str, Any]:
    return {"name": name, "addr": f"127.0.0.1:{port}", "handler": {"type": "socks5", **handler}}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_reload_keeps_sockets_and_connections_and_takes_the_new_handler(
    start: Start, servers: Servers, tmp_path: Path
) -> None:
    path = tmp_path / "live.yaml"
    port, other = _free_port(), _free_port()
    proxy, target = Endpoint("127.0.0.1", port), servers.endpoint("echo/tcp")
    path.write_text(yaml.safe_dump({"services": [_service("a", port), _service("gone", other)]}))
    process = start("-C", str(path))
    kept = through(proxy, target)
    leaving = through(Endpoint("127.0.0.1", other), target)
    refused = {"bypasses": [{"name": "b", "matchers": ["127.0.0.0/8"]}]}
    path.write_text(yaml.safe_dump({"services": [{**_service("a", port), "bypass": "b"}], **refused}))
    process.send(signal.SIGHUP)
    process.wait_for("config reloaded")
    kept.sendall(b"old")
    assert kept.recv(10) == b"old"
    with connect(None, proxy) as sock:
        sock.sendall(b"\5\1\0")
        assert sock.recv(2) == b"\5\0"
        sock.sendall(b"\5\1\0\1\x7f\0\0\1" + target.port.to_bytes(2, "big"))
        assert sock.recv(64)[1] == 2
    with pytest.raises(ConnectionRefusedError):
        connect(None, Endpoint("127.0.0.1", other))
    leaving.sendall(b"drains")
    assert leaving.recv(10) == b"drains"
    kept.close()
    leaving.close()


def test_a_bad_reload_changes_nothing(start: Start, servers: Servers, tmp_path: Path) -> None:
    path = tmp_path / "live.yaml"
    port = _free_port()
    path.write_text(yaml.safe_dump({"services": [_service("a", port)]}))
    process = start("-C", str(path))
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        for text in (
            "services: [",
            yaml.safe_dump({"services": [_service("a", port, chain="nowhere")]}),
            yaml.safe_dump({"services": [_service("b", port), _service("c", taken)]}),
        ):
            path.write_text(text)
            seen = process.errors.count("configuration stays") + process.errors.count("the old one stays")
            process.send(signal.SIGHUP)
            process.wait_for(
                lambda line, seen=seen: (
                    ("stays" in line)
                    and process.errors.count("configuration stays") + process.errors.count("the old one stays") > seen
                )
            )
            with through(Endpoint("127.0.0.1", port), servers.endpoint("echo/tcp")) as sock:
                sock.sendall(b"alive")
                assert sock.recv(10) == b"alive"


def test_hooks_run_in_order_and_a_failing_one_is_a_warning(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "hooks"
    script = tmp_path / "hook"
    script.write_text(f'#!/bin/sh\necho "$1" >> {log}\n')
    script.chmod(0o755)
    stages = {key: [f"{script} {key}"] for key in ("preUp", "postUp", "preDown", "postDown")}
    stages["postUp"].append("/nonexistent/program")
    process = start("-C", json.dumps({"services": [{**_service("a", 0), "metadata": stages}]}))
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    assert log.read_text().split() == ["preUp", "postUp", "preDown", "postDown"]
    assert "[post-up] /nonexistent/program: no such file or directory" in process.errors


def test_workers_run_beside_each_other_and_end_together(tmp_path: Path) -> None:
    process = gostnet("-L", "socks5://127.0.0.1:0", "--", "-L", "socks4://127.0.0.1:0")
    process.start()
    process.wait_for('"handler":"socks5"')
    process.wait_for('"handler":"socks4"')
    process.wait_for(lambda line: '"msg":"ready"' in line and process.errors.count('"msg":"ready"') == 2)
    process.send(signal.SIGTERM)
    assert process.wait() == 0


def test_it_sleeps_when_nothing_happens(start: Start) -> None:
    process = start("-L", "socks5://127.0.0.1:0")

    def switches() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"voluntary_ctxt_switches:\s+(\d+)", status)[1])  # type: ignore[index]

    import time

    time.sleep(0.3)  # what follows the start, such as the log's thread, comes to rest
    before = switches()
    time.sleep(1.0)  # the time over which wake-ups are counted
    assert switches() - before <= 1
