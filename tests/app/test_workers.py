"""Several workers as one daemon: who serves what, what a reload and a death do, and what the limits promise."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet.core.address import Endpoint
from gostnet.core.errors import GostnetError
from gostnet.testing.clients import connect
from gostnet.testing.processes import Process, gostnet, workers
from gostnet.testing.receiver import Receiver, receiving
from gostnet.testing.servers import Servers

from .kit import Start, listening, through

SOCKS = {"name": "s", "addr": "127.0.0.1:0", "handler": {"type": "socks5"}}


def written(tmp_path: Path, *services: Mapping[str, Any], **more: Any) -> Path:
    """Put a configuration in place at once: somebody may be reading it."""
    path, fresh = tmp_path / "gost.yaml", tmp_path / "fresh.yaml"
    fresh.write_text(yaml.safe_dump({"workers": 2, "services": list(services), **more}))
    return fresh.replace(path)


def gone(pid: int, timeout: float = 5.0) -> bool:
    """Wait for the end of a process that is no child of ours."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout)[0])
    finally:
        os.close(descriptor)


def served_by(process: Process) -> list[int]:
    """Return, for each connection that has ended, the worker that has served it."""
    return [record["worker"] for record in process.records if ">-<" in record["msg"]]


def echo(proxy: Endpoint, target: Endpoint, data: bytes = b"x") -> None:
    with through(proxy, target) as sock:
        sock.sendall(data)
        assert sock.recv(len(data)) == data


def attempt(proxy: Endpoint, target: Endpoint) -> socket.socket | None:
    """Connect by SOCKS5, None for what is refused."""
    sock = connect(None, proxy)
    try:
        sock.sendall(b"\5\1\0")
        if sock.recv(2) == b"\5\0":
            sock.sendall(b"\5\1\0\1" + socket.inet_aton(target.host) + target.port.to_bytes(2, "big"))
            if sock.recv(64)[:2] == b"\5\0":
                return sock
    except ConnectionError:
        pass
    sock.close()
    return None


def until(true: Callable[[], object], timeout: float = 10.0) -> None:
    """Wait for what other processes do."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "it does not become true"
        time.sleep(0.01)


# ---- service ------------------------------------------------------------------------------------
def test_connections_are_spread_over_the_workers(start: Start, servers: Servers) -> None:
    process = start("--workers", "2", "-L", "socks5://127.0.0.1:0")
    proxy, target = listening(process), servers.endpoint("echo/tcp")
    for _ in range(40):
        echo(proxy, target)
    until(lambda: len(served_by(process)) == 40)
    counts = [served_by(process).count(worker) for worker in (0, 1)]
    assert min(counts) >= 5, counts
    assert process.stop() == 0
    last = process.records[-1]
    assert (last["msg"], "worker" in last) == ("stopped", False)


def test_one_worker_is_the_plain_daemon(start: Start) -> None:
    process = start("--workers", "1", "-L", "socks5://127.0.0.1:0")
    assert workers(process) == []
    assert all("worker" not in record for record in process.records)


def test_udp_of_a_client_stays_with_its_worker(start: Start, servers: Servers, tmp_path: Path) -> None:
    target = servers.endpoint("echo/udp")
    service = {
        "name": "u",
        "addr": "127.0.0.1:0",
        "handler": {"type": "udp"},
        "listener": {"type": "udp", "metadata": {"keepalive": True, "ttl": "1s"}},
        "forwarder": {"nodes": [{"name": "t", "addr": str(target)}]},
    }
    process = start("-C", str(written(tmp_path, service)))
    address = listening(process, "u")
    clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(20)]
    try:
        for client in clients:
            client.settimeout(5)
            client.connect(address)
            for number in range(5):
                client.send(b"%d" % number)
                assert client.recv(100) == b"%d" % number
        until(lambda: len(served_by(process)) >= 20)
    finally:
        for client in clients:
            client.close()
    assert len(served_by(process)) == 20  # a session for each client, no more
    assert set(served_by(process)) == {0, 1}


def test_a_listener_that_cannot_be_shared_has_one_worker(start: Start, tmp_path: Path) -> None:
    """The option `reuseport` is what tells."""
    from gostnet.app.assemble import Assembler
    from gostnet.app.catalog import catalog
    from gostnet.app.names import system_resolver
    from gostnet.app.share import Share
    from gostnet.config.argv import parse_args
    from gostnet.config.load import Loader
    from gostnet.policies.ledger import Ledger

    words = ("-L", "socks5://:0", "-L", "dns://:0", "-L", "udp://:0/1.1.1.1:53", "-L", "tun://:0?net=192.0.2.1/24")
    loaded = Loader(parse_args(words), environment={}).load()
    ledger = Ledger.create(2)
    os.close(ledger.descriptor)
    built = Assembler(loaded.config, catalog(), system_resolver, share=Share(1, ledger, {})).build()
    assert [service.listener.shared for service in built.services.values()] == [True, True, True, False]


def test_all_workers_have_the_same_certificate(start: Start, tmp_path: Path) -> None:
    process = start("--workers", "2", "-L", "socks5+tls://127.0.0.1:0")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    shown = set()
    for _ in range(16):
        with connect(None, listening(process)) as sock, context.wrap_socket(sock) as stream:
            shown.add(stream.getpeercert(binary_form=True))
    assert len(shown) == 1


def test_commands_of_a_service_run_once(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "hooks"
    hooks = {name: [f"sh -c 'echo {name} >> {log}'"] for name in ("preUp", "postUp", "preDown", "postDown")}
    process = start("-C", str(written(tmp_path, {**SOCKS, "metadata": hooks})))
    first = workers(process)[0]
    os.kill(first, signal.SIGKILL)
    process.wait_for("worker 0 serves again")
    assert process.stop() == 0
    assert log.read_text().split() == ["preUp", "postUp", "preDown", "postDown"]


# ---- everything or nothing ----------------------------------------------------------------------
def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gostnet", *words], capture_output=True, timeout=30, check=False, text=True
    )


def test_a_port_in_use_is_one_clear_line_and_nothing_stays() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = run("--workers", "2", "-L", "socks5://127.0.0.1:0", "-L", f"socks5://127.0.0.1:{port}")
    assert done.returncode == 1
    assert done.stderr.count(f"listen 127.0.0.1:{port}: Address already in use") == 1
    assert "Traceback" not in done.stderr
    assert '"msg":"ready"' not in done.stderr


def test_a_port_that_others_share_is_in_use_too(start: Start) -> None:
    process = start("--workers", "2", "-L", "socks5://127.0.0.1:0")
    port = listening(process).port
    done = run("--workers", "2", "-L", f"socks5://127.0.0.1:{port}")
    assert done.returncode == 1
    assert "Address already in use" in done.stderr


# ---- death --------------------------------------------------------------------------------------
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_is_replaced_and_the_others_go_on(start: Start, servers: Servers, victim: int) -> None:
    process = start("--workers", "2", "-L", "socks5://127.0.0.1:0")
    proxy, target = listening(process), servers.endpoint("echo/tcp")
    before = workers(process)
    held = [through(proxy, target) for _ in range(16)]
    os.kill(before[victim], signal.SIGKILL)
    process.wait_for(f"worker {victim} was killed by SIGKILL; it is replaced now")
    process.wait_for(f"worker {victim} serves again")
    alive = 0
    for sock in held:
        try:
            sock.sendall(b"x")
            alive += sock.recv(1) == b"x"
        except ConnectionError:
            pass
        sock.close()
    assert 0 < alive < 16  # those of the other worker
    after = workers(process)
    assert [old == new for old, new in zip(before, after, strict=True)] == [victim != 0, victim != 1]
    count = len(served_by(process))
    for _ in range(40):
        echo(proxy, target)
    until(lambda: len(served_by(process)) >= count + 40)
    assert set(served_by(process)[-40:]) == {0, 1}
    assert process.stop() == 0


def test_workers_end_with_their_supervisor(start: Start, servers: Servers) -> None:
    process = start("--workers", "2", "-L", "socks5://127.0.0.1:0")
    pids = workers(process)
    assert len(pids) == 2
    with through(listening(process), servers.endpoint("echo/tcp")):
        process.send(signal.SIGKILL)
        process.wait()
        assert all(gone(pid) for pid in pids)


def test_connections_are_drained_for_a_while_at_the_end(start: Start, servers: Servers) -> None:
    process = start("--workers", "2", "-L", "socks5://127.0.0.1:0")
    with through(listening(process), servers.endpoint("echo/tcp")):
        process.send(signal.SIGTERM)
        assert process.wait(12) == 0  # the connection is drained, then cut


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_while_it_drains_holds_nobody_up(
    start: Start, servers: Servers, tmp_path: Path, victim: int
) -> None:
    process = start("--workers", "2", "-L", "socks5://127.0.0.1:0")
    proxy, target = listening(process), servers.endpoint("echo/tcp")
    held = [through(proxy, target) for _ in range(12)]
    pids = workers(process)
    process.send(signal.SIGTERM)
    process.wait_for('"msg":"stopping"')
    os.kill(pids[victim], signal.SIGKILL)
    for sock in held:
        try:
            sock.sendall(b"x")
            sock.recv(1)
        except ConnectionError:
            pass
        sock.close()
    assert process.wait(4) == 0, "those who drain are not waited for once they have nothing left"
    assert "is replaced" not in process.errors
    assert all(gone(pid) for pid in pids)


# ---- reload -------------------------------------------------------------------------------------
def reload(process: Process, says: str) -> None:
    count = process.errors.count(says)
    process.send(signal.SIGHUP)
    until(lambda: process.errors.count(says) > count)


def test_a_reload_reaches_all_workers(start: Start, servers: Servers, tmp_path: Path) -> None:
    path = written(tmp_path, SOCKS)
    process = start("-C", str(path))
    proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
    pids = workers(process)
    kept = through(proxy, target)
    bypass = [{"name": "b", "matchers": ["127.0.0.1"]}]
    written(tmp_path, {**SOCKS, "bypass": "b"}, {**SOCKS, "name": "t"}, bypasses=bypass)
    reload(process, '"msg":"config reloaded"')
    for _ in range(20):
        assert attempt(proxy, target) is None
        echo(listening(process, "t"), target)
    kept.sendall(b"x")
    assert kept.recv(1) == b"x"
    kept.close()
    assert workers(process) == pids


def test_a_reload_that_fails_changes_no_worker(start: Start, servers: Servers, tmp_path: Path) -> None:
    path = written(tmp_path, SOCKS)
    process = start("-C", str(path))
    proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = {**SOCKS, "name": "t", "addr": f"127.0.0.1:{holder.getsockname()[1]}"}
        written(tmp_path, {**SOCKS, "handler": {"type": "http"}}, taken)
        reload(process, "Address already in use; the old configuration stays")
    path.write_text("services: [{name: s, addr: x, handler: {type: nothing}}]")
    reload(process, "the configuration has errors; the old one stays")
    for _ in range(20):
        echo(proxy, target)


def test_no_connection_is_refused_during_reloads(start: Start, servers: Servers, tmp_path: Path) -> None:
    process = start("-C", str(written(tmp_path, SOCKS)))
    address = listening(process, "s")
    target = servers.endpoint("echo/tcp")
    stop = threading.Event()
    done, failures = [0], []

    def ask() -> None:
        while not stop.is_set():
            try:
                echo(address, target)
                done[0] += 1
            except (OSError, AssertionError, GostnetError) as exc:
                failures.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(3):
        written(tmp_path, SOCKS, log={"level": "info" if number % 2 == 0 else "debug"})
        reload(process, '"msg":"config reloaded"')
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert done[0] > 20


def refusing(tmp_path: Path) -> None:
    """Write a configuration that refuses all of loopback."""
    written(tmp_path, {**SOCKS, "bypass": "b"}, bypasses=[{"name": "b", "matchers": ["127.0.0.1"]}])


def _refused(proxy: Endpoint, target: Endpoint) -> bool:
    sock = attempt(proxy, target)
    if sock is not None:
        sock.close()
    return sock is None


def refused_by(process: Process) -> set[int]:
    return {record["worker"] for record in process.records if ">!" in record["msg"]}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_reload_while_a_worker_is_replaced_reaches_all(
    start: Start, servers: Servers, tmp_path: Path, victim: int
) -> None:
    path = written(tmp_path, SOCKS)
    process = start("-C", str(path))
    proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
    refusing(tmp_path)
    os.kill(workers(process)[victim], signal.SIGKILL)
    process.send(signal.SIGHUP)
    process.wait_for('"msg":"config reloaded"')
    process.wait_for(f"worker {victim} serves again")
    for _ in range(40):
        assert attempt(proxy, target) is None
    until(lambda: refused_by(process) == {0, 1})
    assert "the old configuration stays" not in process.errors


def test_reloads_in_a_row_end_in_the_last_one(start: Start, servers: Servers, tmp_path: Path) -> None:
    path = written(tmp_path, SOCKS)
    process = start("-C", str(path))
    proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
    for _ in range(3):
        written(tmp_path, {**SOCKS, "metadata": {"labels": {"a": "b"}}})
        process.send(signal.SIGHUP)
    refusing(tmp_path)
    process.send(signal.SIGHUP)
    until(lambda: _refused(proxy, target) and refused_by(process) == {0, 1})
    for _ in range(20):
        assert attempt(proxy, target) is None


def test_another_number_of_workers_takes_a_restart(start: Start, tmp_path: Path) -> None:
    path = written(tmp_path, SOCKS)
    process = start("-C", str(path))
    path.write_text(yaml.safe_dump({"workers": 3, "services": [SOCKS]}))
    reload(process, "workers: 2 of them go on; another number takes a restart")
    assert len(workers(process)) == 2


# ---- limits -------------------------------------------------------------------------------------
def test_a_limit_of_connections_counts_all_workers_and_not_the_dead(
    start: Start, servers: Servers, tmp_path: Path
) -> None:
    limiter = [{"name": "c", "limits": ["$ 6"]}]
    process = start("-C", str(written(tmp_path, {**SOCKS, "climiter": "c"}, climiters=limiter)))
    proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")

    def take() -> list[socket.socket]:
        return [sock for _ in range(20) if (sock := attempt(proxy, target)) is not None]

    held = take()
    assert len(held) == 6
    os.kill(workers(process)[1], signal.SIGKILL)
    process.wait_for("worker 1 serves again")
    for sock in held:
        sock.close()
    until(lambda: len(_closed(take())) == 6)  # the slots of the dead are free, too


def _closed(socks: list[socket.socket]) -> list[socket.socket]:
    for sock in socks:
        sock.close()
    return socks


def test_a_quota_is_met_to_the_byte_by_all_workers_together(start: Start, servers: Servers, tmp_path: Path) -> None:
    quota = [{"name": "q", "limit": "100KB", "direction": "in", "store": {"file": str(tmp_path / "quota.json")}}]
    process = start("-C", str(written(tmp_path, {**SOCKS, "quotas": ["q"]}, quotas=quota)))
    proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
    got = 0
    for _ in range(20):
        sock = attempt(proxy, target)
        if sock is None:
            continue
        with sock:
            left = 10_000
            try:
                sock.sendall(bytes(left))
                while left and (data := sock.recv(65536)):
                    left -= len(data)
            except ConnectionError:
                pass
            got += 10_000 - left
    assert 80_000 <= got <= 102_400
    assert process.stop() == 0
    stored = json.loads((tmp_path / "quota.json").read_text())["q"]
    assert 102_400 <= stored["used"] < 102_400 + 1000  # the dialogue of a connection is charged when it ends


def test_a_quota_outlives_the_worker_that_keeps_its_file(start: Start, servers: Servers, tmp_path: Path) -> None:
    """It is killed before it has written; its successor writes what both have counted."""
    store = tmp_path / "quota.json"
    quota = [{"name": "q", "limit": "1MB", "direction": "in", "flush": "1h", "store": {"file": str(store)}}]
    process = start("-C", str(written(tmp_path, {**SOCKS, "quotas": ["q"]}, quotas=quota)))
    proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
    for _ in range(10):
        echo(proxy, target, bytes(1000))
    until(lambda: len(served_by(process)) == 10)
    for victim in (0, 1):
        os.kill(workers(process)[victim], signal.SIGKILL)
        process.wait_for(f"worker {victim} serves again")
    assert process.stop() == 0
    assert json.loads(store.read_text())["q"]["used"] == 10 * 1013


def test_a_rate_of_requests_counts_all_workers(start: Start, servers: Servers, tmp_path: Path) -> None:
    limiter = [{"name": "r", "limits": ["$ 0.5"]}]
    process = start("-C", str(written(tmp_path, {**SOCKS, "rlimiter": "r"}, rlimiters=limiter)))
    proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
    served = 0
    begun = time.monotonic()
    for _ in range(20):
        sock = attempt(proxy, target)
        if sock is not None:
            sock.close()
            served += 1
    assert 1 <= served <= 1 + 0.5 * (time.monotonic() - begun) + 1


def test_a_bandwidth_holds_for_all_workers_together(start: Start, servers: Servers, tmp_path: Path) -> None:
    limiter = [{"name": "l", "limits": ["$ 4MB 4MB 100KB"]}]
    process = start("-C", str(written(tmp_path, {**SOCKS, "limiter": "l"}, limiters=limiter)))
    proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
    seconds = 1.5
    totals = [0] * 6
    begun = time.monotonic()

    def pull(index: int) -> None:
        with through(proxy, target) as sock:
            sender = threading.Thread(target=_pour, args=(sock, begun + seconds))
            sender.start()
            sock.settimeout(0.2)
            while time.monotonic() < begun + seconds:
                try:
                    totals[index] += len(sock.recv(65536))
                except TimeoutError:
                    continue
            sender.join()

    threads = [threading.Thread(target=pull, args=(index,)) for index in range(len(totals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = sum(totals) / (time.monotonic() - begun)
    assert rate < 1.1 * (4 << 20) + (100 << 10) / seconds, rate
    assert rate > 0.5 * (4 << 20), rate


def _pour(sock: socket.socket, until: float) -> None:
    data = bytes(65536)
    while time.monotonic() < until:
        _, ready, _ = select.select([], [sock], [], 0.1)
        if ready:
            try:
                sock.send(data, socket.MSG_DONTWAIT)
            except OSError:
                return


# ---- the log ------------------------------------------------------------------------------------
def test_lines_of_the_workers_do_not_mix(start: Start, servers: Servers) -> None:
    process = start("--workers", "2", "-L", "socks5://127.0.0.1:0", "-DD")
    proxy, target = listening(process), servers.endpoint("echo/tcp")

    def ask() -> None:
        for _ in range(50):
            echo(proxy, target)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(served_by(process)) == 200)
    assert all(json.loads(line) for line in process.lines)


def test_gost_s_parallel_command_lines_have_workers_each(start: Start) -> None:
    process = gostnet("--workers", "2", "-L", "socks5://127.0.0.1:0", "--", "-L", "http://127.0.0.1:0")
    process.start()
    try:
        until(lambda: process.errors.count('"msg":"ready"') == 2)
        ready: Sequence[Mapping[str, Any]] = [r for r in process.records if r["msg"] == "ready"]
        assert sorted(r.get("workers", 1) for r in ready) == [1, 2]
    finally:
        assert process.stop() == 0


# ---- statistics ---------------------------------------------------------------------------------
def observed(url: str, **metadata: Any) -> dict[str, Any]:
    """Return a SOCKS5 service that an observer is told of every second, and the observer."""
    often = {"observer.period": "1s", **metadata}
    handler = {"type": "socks5", "observer": "o", "metadata": often}
    service = {**SOCKS, "handler": handler, "observer": "o", "metadata": {"enableStats": True, **often}}
    return {"services": [service], "observers": [{"name": "o", "plugin": {"type": "http", "addr": url}}]}


def events(observer: Receiver, kind: str, what: str) -> list[dict[str, Any]]:
    """Return what an observer was told, in order."""
    told = [event for posted in tuple(observer.posted) for event in json.loads(posted.body)["events"]]
    return [event[what] for event in told if (event["kind"], event["type"]) == (kind, what)]


def test_an_observer_sees_one_service_whatever_becomes_of_its_workers(
    start: Start, servers: Servers, tmp_path: Path
) -> None:
    """Whole counters: none is told twice, none is lost with a worker, none ever goes back."""
    with receiving() as observer:
        path = tmp_path / "gost.yaml"
        path.write_text(yaml.safe_dump({"workers": 2, **observed(observer.url)}))
        process = start("-C", str(path))
        proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
        made = 0
        for victim in (1, 0):
            held = [through(proxy, target) for _ in range(12)]
            for sock in held:
                sock.sendall(b"hello")
                assert sock.recv(100) == b"hello"
            made += len(held)
            until(lambda: events(observer, "handler", "stats")[-1:] != [])
            until(partial(lambda count: events(observer, "handler", "stats")[-1]["inputBytes"] == 5 * count, made))
            # Both are told in one period, one after the other.
            until(lambda: [each["currentConns"] for each in events(observer, "service", "stats")[-1:]] == [12])
            os.kill(workers(process)[victim], signal.SIGKILL)
            process.wait_for(f"worker {victim} serves again")
            for sock in held:
                sock.close()
            until(lambda: events(observer, "service", "stats")[-1]["currentConns"] == 0)
        for _ in range(10):
            echo(proxy, target, b"world")
        assert process.stop() == 0
        service, clients = events(observer, "service", "stats"), events(observer, "handler", "stats")
        states = [status["state"] for status in events(observer, "service", "status")]
    assert states == ["running", "ready", "closed"]
    assert service[-1] == {
        "totalConns": 34,
        "currentConns": 0,
        "totalErrs": 0,
        "inputBytes": 34 * (13 + 5),
        "outputBytes": 34 * (12 + 5),
    }
    assert (clients[-1]["totalConns"], clients[-1]["inputBytes"]) == (34, 34 * 5)
    for told in (service, clients):
        for name in ("totalConns", "inputBytes", "outputBytes"):
            figures = [stats[name] for stats in told]
            assert figures == sorted(figures)


def test_what_an_observer_is_told_adds_up_over_reloads_and_deaths(
    start: Start, servers: Servers, tmp_path: Path
) -> None:
    """Differences, and another service that comes and goes meanwhile."""
    with receiving() as observer:
        path = tmp_path / "gost.yaml"
        settings = {"workers": 2, **observed(observer.url, **{"observer.resetTraffic": True})}
        path.write_text(yaml.safe_dump(settings))
        process = start("-C", str(path))
        proxy, target = listening(process, "s"), servers.endpoint("echo/tcp")
        more = {**settings, "services": [*settings["services"], {**settings["services"][0], "name": "t"}]}
        for number, content in enumerate((more, settings, more)):
            for _ in range(10):
                echo(proxy, target)
            path.write_text(yaml.safe_dump(content))
            reload(process, '"msg":"config reloaded"')
            if content is more:
                latest = next(
                    r for r in reversed(process.records) if r.get("service") == "t" and "listening" in r["msg"]
                )
                echo(Endpoint("127.0.0.1", int(latest["msg"].rpartition(":")[2].removesuffix("/tcp"))), target)
            ended = 10 * (number + 1) + (number + 2) // 2
            until(partial(lambda count: len(served_by(process)) == count, ended))
            os.kill(workers(process)[number % 2], signal.SIGKILL)
            until(partial(lambda count: process.errors.count("serves again") > count, number))
        assert process.stop() == 0
        told = [event for posted in observer.posted for event in json.loads(posted.body)["events"]]
    sums = {
        name: sum(e["stats"]["inputBytes"] for e in told if (e["kind"], e["service"], e["type"]) == (*name, "stats"))
        for name in (("service", "s"), ("handler", "s"), ("service", "t"), ("handler", "t"))
    }
    assert list(sums.values()) == [30 * 14, 30, 2 * 14, 2]
    states = [e["status"]["state"] for e in told if (e["service"], e["type"]) == ("t", "status")]
    assert states == ["running", "ready", "closed"] * 2


def test_a_signal_during_the_start_ends_it_in_order(start: Start) -> None:
    process = gostnet("--workers", "2", "-L", "socks5://127.0.0.1:0")
    process.start()
    process.wait_for("listening on")  # the first worker, before the second begins
    process.send(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stop() == 0
