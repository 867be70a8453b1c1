"""Quotas, recorders and observers of a real daemon; records beside those of the real gost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet.core.address import Endpoint
from gostnet.testing.clients import connect, echo, echo_datagram, fetch, resolve
from gostnet.testing.processes import Process
from gostnet.testing.receiver import receiving
from gostnet.testing.servers import Servers

from .kit import Start, listening, through

GOST = os.environ.get("GOST_BIN", "")


def everything(sock: socket.socket) -> tuple[bytes, bool]:
    """Return what comes until the end, and whether that was a reset."""
    data = b""
    while True:
        try:
            more = sock.recv(65536)
        except ConnectionResetError:
            return data, True
        if not more:
            return data, False
        data += more


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


# ---- quotas --------------------------------------------------------------------------------------
def forwarder(name: str, target: Endpoint, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "addr": "127.0.0.1:0",
        "handler": {"type": "tcp"},
        "listener": {"type": "tcp"},
        "forwarder": {"nodes": [{"name": "t", "addr": str(target)}]},
        **more,
    }


@pytest.mark.parametrize("engine", ["auto", "native", "splice", "copy"])
def test_q05_q06_the_limit_is_met_to_the_byte_and_those_who_come_later_are_refused(
    start: Start, servers: Servers, tmp_path: Path, engine: str
) -> None:
    limit = 300_000
    target = servers.endpoint("echo/tcp")
    store = tmp_path / "quota.json"
    config = {
        "services": [
            forwarder("one", target, quotas=["q"], metadata={"engine": engine}),
            forwarder("two", target, quotas=["q"], metadata={"engine": engine}),
        ],
        "quotas": [{"name": "q", "limit": f"{limit}B", "direction": "out", "store": {"file": str(store)}}],
    }
    process = start("-C", json.dumps(config))
    one, two = listening(process, "one"), listening(process, "two")
    assert echo(None, one, b"x" * 100_000) == b"x" * 100_000
    with connect(None, two) as idle, connect(None, two) as sock:
        idle.sendall(b"1")
        assert idle.recv(1) == b"1"
        broken: list[OSError] = []
        sender = threading.Thread(target=_send_all, args=(sock, 1 << 22, broken))
        sender.start()
        data, reset = everything(sock)
        sender.join()
        assert 0 < len(data) <= limit - 100_001  # the reset overtakes what has been sent and not read yet
        assert reset or broken, "a part must not be taken for the whole"
        assert everything(idle) == (b"", True), "flows that say nothing are cut too"
    for place in (one, two):
        with connect(None, place) as sock:
            assert everything(sock)[0] == b""
    process.stop()
    assert json.loads(store.read_text())["q"]["used"] == limit
    assert sum("the limit of" in line for line in process.lines) == 1
    assert "Traceback" not in process.errors
    cut = [record for record in process.records if record.get("code") == "denied.quota"]
    assert len(cut) == 2, "the talker and the idle one; who comes later is a line at level debug"


def _send_all(sock: socket.socket, size: int, broken: list[OSError]) -> None:
    try:
        sock.sendall(b"y" * size)
    except OSError as exc:
        broken.append(exc)  # whoever calls first is told of the reset, the other one only of the end


def test_q07_a_quota_survives_reload_and_restart_until_its_window_changes(
    start: Start, servers: Servers, tmp_path: Path
) -> None:
    path, store = tmp_path / "c.yaml", tmp_path / "quota.json"
    port = free_port()
    target = servers.endpoint("echo/tcp")

    def write(limit: str, **window: str) -> None:
        service = {**forwarder("s", target, quotas=["q"]), "addr": f"127.0.0.1:{port}"}
        quota = {"name": "q", "limit": limit, "store": {"file": str(store)}, **window}
        path.write_text(yaml.safe_dump({"services": [service], "quotas": [quota]}))

    def reload(process: Process) -> None:
        seen = len([line for line in process.lines if "config reloaded" in line])
        process.send(signal.SIGHUP)
        deadline = time.monotonic() + 10
        while len([line for line in process.lines if "config reloaded" in line]) == seen:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def served() -> bool:
        with connect(None, place) as sock:
            try:
                sock.sendall(b"x" * 100)
                return sock.recv(100) != b""
            except ConnectionError:
                return False

    place = Endpoint("127.0.0.1", port)
    write("1KB")
    process = start("-C", str(path))
    assert echo(None, place, b"x" * 500) == b"x" * 500  # 1000 of 1024 bytes
    write("1000B")
    reload(process)
    assert not served()
    write("2KB")
    reload(process)
    assert served()
    process.stop()
    used = json.loads(store.read_text())["q"]["used"]
    assert 1200 <= used <= 1300
    write("1200B")
    process = start("-C", str(path))
    assert not served()
    write("1200B", startsAt="2020-01-01T00:00:00Z")
    reload(process)
    assert served()


def test_a_quota_counts_dialogues_and_dns(start: Start, servers: Servers, tmp_path: Path) -> None:
    store = tmp_path / "quota.json"
    config = {
        "services": [
            {"name": "s", "addr": "127.0.0.1:0", "handler": {"type": "socks5"}, "listener": {}, "quotas": ["q"]},
            {
                "name": "d",
                "addr": "127.0.0.1:0",
                "handler": {"type": "dns"},
                "listener": {"type": "dns"},
                "forwarder": {"nodes": [{"name": "t", "addr": str(servers.endpoint("dns/udp"))}]},
                "quotas": ["dns"],
            },
        ],
        "quotas": [
            {"name": "q", "store": {"file": str(store)}},
            {"name": "dns", "direction": "in", "store": {"file": str(store)}},
        ],
    }
    process = start("-C", json.dumps(config))
    with through(listening(process, "s"), servers.endpoint("echo/tcp")) as sock:
        sock.sendall(b"0123456789")
        assert sock.recv(100) == b"0123456789"
    resolve(None, listening(process, "d"), "example.com")
    process.stop()
    found = json.loads(store.read_text())
    assert found["q"]["used"] == 3 + 2 + 10 + 10 + 10 + 10
    assert found["dns"]["used"] == 12 + 17


def test_a_quota_ends_associations_too(start: Start, servers: Servers, tmp_path: Path) -> None:
    service = {
        **forwarder("s", servers.endpoint("echo/udp"), quotas=["q"]),
        "handler": {"type": "udp"},
        "listener": {"type": "udp", "metadata": {"keepalive": True, "ttl": "60s"}},
    }
    config = {
        "services": [service],
        "quotas": [{"name": "q", "limit": "150B", "direction": "in", "store": {"file": str(tmp_path / "q.json")}}],
        "log": {"level": "debug"},
    }
    process = start("-C", json.dumps(config))
    place = listening(process, "s")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((place.host, place.port))
        sock.settimeout(10)
        sock.send(b"a" * 100)
        assert sock.recv(1000) == b"a" * 100
        sock.send(b"b" * 100)  # does not fit, and is not cut into a part that does
        sock.send(b"c" * 50)
        assert sock.recv(1000) == b"c" * 50
        sock.send(b"d")
        process.wait_for(lambda line: "is used up" in line)
        sock.send(b"e")
        process.wait_for(lambda line: "is used up" in line and '"level":"debug"' in line)
    process.stop()
    assert json.loads((tmp_path / "q.json").read_text())["q"]["used"] == 150


def test_q08_a_quota_that_leaves_the_configuration_lets_everybody_go_on(
    start: Start, servers: Servers, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    place = Endpoint("127.0.0.1", free_port())
    service = {**forwarder("s", servers.endpoint("echo/tcp")), "addr": str(place)}
    uses = [{"name": "f", "record": "recorder.service.handler"}]
    quota = {"name": "q", "limit": "10B", "store": {"file": str(tmp_path / "q.json")}}
    recorders = [{"name": "f", "file": {"path": str(tmp_path / "records"), "sep": "\n"}}]
    with_quota = {"services": [{**service, "quotas": ["q"], "recorders": uses}], "quotas": [quota]}
    path.write_text(yaml.safe_dump({**with_quota, "recorders": recorders}))
    process = start("-C", str(path))
    with connect(None, place) as sock:
        sock.sendall(b"1234")
        assert sock.recv(10) == b"1234"
        path.write_text(yaml.safe_dump({"services": [{**service, "recorders": uses}], "recorders": recorders}))
        process.send(signal.SIGHUP)
        process.wait_for("config reloaded")
        sock.sendall(b"5" * 100)
        assert sock.recv(100) == b"5" * 100
        client = sock.getsockname()[1]
    # Its recorder is in both configurations, so what began before the reload is recorded after it.
    (record,) = records(tmp_path, 1)
    assert (record["client"], record["inputBytes"]) == (f"127.0.0.1:{client}", 104)


# ---- observers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [1, 2])
def test_e01_e02_e05_an_observer_is_told_of_states_and_of_both_kinds_of_counters(
    start: Start, servers: Servers, workers: int
) -> None:
    with receiving() as observer:
        config = {
            "workers": str(workers),
            "services": [
                {
                    "name": "s",
                    "addr": "127.0.0.1:0",
                    "handler": {
                        "type": "socks5",
                        "observer": "o",
                        "metadata": {"observer.period": "1s", "observer.resetTraffic": True},
                    },
                    "listener": {"type": "tcp"},
                    "observer": "o",
                    "metadata": {"enableStats": True, "observer.period": "1s", "observer.resetTraffic": True},
                }
            ],
            "observers": [{"name": "o", "plugin": {"type": "http", "addr": observer.url}}],
        }
        process = start("-C", json.dumps(config))
        observer.wait_for(lambda posted: b'"ready"' in posted.body)
        with through(listening(process, "s"), servers.endpoint("echo/tcp")) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"
        with connect(None, listening(process, "s")) as sock:
            sock.sendall(b"\5\1\0\5\1\0\1\x7f\0\0\1\0\1")
            assert len(everything(sock)[0]) == 12
        process.stop()
        told = [event for posted in observer.posted for event in json.loads(posted.body)["events"]]
    states = [event["status"]["state"] for event in told if event["type"] == "status"]
    assert states == ["running", "ready", "closed"]
    service = [event["stats"] for event in told if event["type"] == "stats" and event["kind"] == "service"]
    clients = [event["stats"] for event in told if event["type"] == "stats" and event["kind"] == "handler"]
    assert (service[-1]["totalConns"], service[-1]["currentConns"], service[-1]["totalErrs"]) == (2, 0, 1)
    assert sum(stats["inputBytes"] for stats in service) == 13 + 5 + 13
    assert sum(stats["inputBytes"] for stats in clients) == 5
    assert sum(stats["outputBytes"] for stats in clients) == 5


# ---- recorders -----------------------------------------------------------------------------------
RECORDS = ("recorder.service.client.address", "recorder.service.router.dial.address", "recorder.service.handler")

VOLATILE = ("sid", "duration", "time", "remote", "client", "src")
"""Fields that differ from one connection to the next."""

BETTERED = {
    ("s5", "err"): "errors have words of their own",
    ("ht", "inputBytes"): "gost counts bodies of forwarded requests only, not their heads",
    ("dn", "host"): "an answer from the cache has no upstream",
    ("dn", "route"): "an answer from the cache has no upstream",
    ("dn", "outputBytes"): "names in answers are compressed",
    ("dn", "dns.answer"): "answers have their own order and flags",
    ("ht", "http.response.header"): "the answer to CONNECT is not shown",
}


def recording(servers: Servers, directory: Path) -> tuple[dict[str, Any], dict[str, Endpoint]]:
    """Return a configuration with the handlers that records are compared of, and where they listen."""
    places = {name: Endpoint("127.0.0.1", free_port()) for name in ("s5", "ht", "ch", "fw", "ud", "re", "dn")}
    echoing = {"nodes": [{"name": "t0", "addr": str(servers.endpoint("echo/tcp"))}]}
    asked = {"nodes": [{"name": "t0", "addr": str(servers.endpoint("echo/udp"))}]}
    naming = {"nodes": [{"name": "t0", "addr": f"udp://{servers.endpoint('dns/udp')}"}]}
    kinds: dict[str, dict[str, Any]] = {
        "s5": {
            "handler": {"type": "socks5", "auth": {"username": "u1", "password": "p"}},
            "metadata": {"labels": {"tenant": "acme"}},
        },
        "ht": {"handler": {"type": "http"}},
        "ch": {"handler": {"type": "socks5", "chain": "c"}},
        "fw": {"handler": {"type": "tcp"}, "forwarder": echoing},
        "ud": {"handler": {"type": "udp"}, "listener": {"type": "udp"}, "forwarder": asked},
        "re": {"handler": {"type": "relay"}},
        "dn": {"handler": {"type": "dns"}, "listener": {"type": "dns"}, "forwarder": naming},
    }
    uses = [
        {"name": "f", "record": "recorder.service.handler"},
        *({"name": "a", "record": record} for record in RECORDS[:2]),
        {"name": "a", "record": "recorder.service.router.dial.address.error"},
    ]
    node = {"name": "n0", "addr": str(places["ht"]), "connector": {"type": "http"}, "dialer": {"type": "tcp"}}
    config = {
        "services": [
            {"name": name, "addr": str(places[name]), "listener": {"type": "tcp"}, "recorders": uses, **kind}
            for name, kind in kinds.items()
        ],
        "chains": [{"name": "c", "hops": [{"name": "h0", "nodes": [node]}]}],
        "recorders": [
            {"name": "f", "file": {"path": str(directory / "records"), "sep": "\n"}},
            {"name": "a", "file": {"path": str(directory / "addresses"), "sep": "\n"}},
        ],
    }
    return config, places


def use(servers: Servers, places: dict[str, Endpoint]) -> None:
    """Do the same with any proxy: one connection after the other."""
    target = servers.endpoint("echo/tcp")

    def said(place: Endpoint, *dialogue: tuple[bytes, int]) -> None:
        with connect(None, place) as sock:
            for request, size in dialogue:
                sock.sendall(request)
                got = b""
                while len(got) < size:
                    more = sock.recv(size - len(got))
                    assert more, (place, request, got)
                    got += more

    address = b"\1" + socket.inet_aton(target.host) + target.port.to_bytes(2, "big")
    login = ((b"\5\1\2", 2), (b"\1\2u1\1p", 2))
    said(places["s5"], *login, (b"\5\1\0" + address, 10), (b"0123456789", 10))
    said(places["s5"], *login, (b"\5\1\0\1\x7f\0\0\1\0\1", 10))
    said(places["ch"], (b"\5\1\0", 2), (b"\5\1\0" + address, 10), (b"0123456789", 10))
    said(places["fw"], (b"hi there", 8))
    said(places["re"], (b"\1\1\0\x0a\2\0\7" + address + b"hello", 4 + 5))
    origin = servers.endpoint("http")
    fetch(
        None, places["ht"], f"http://{origin}/?a=1", headers={"Host": str(origin), "Proxy-Authorization": "Basic eDp5"}
    )
    echo_datagram(None, places["ud"], b"abc")
    resolve(None, places["dn"], "example.com")


def records(directory: Path, count: int) -> list[dict[str, Any]]:
    """Wait for `count` records of handlers; return them in the order in which their connections began."""
    path = directory / "records"
    deadline = time.monotonic() + 15
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            found = [json.loads(line) for line in lines]
            return sorted(found, key=lambda record: datetime.fromisoformat(record["time"]))
        assert time.monotonic() < deadline, lines
        time.sleep(0.02)


CONNECTIONS = 9
"""What `use` makes, and the connection of the chain to its node."""


def test_w01_w05_every_handler_records_what_it_served(start: Start, servers: Servers, tmp_path: Path) -> None:
    config, places = recording(servers, tmp_path)
    process = start("-C", json.dumps(config))
    use(servers, places)
    found = records(tmp_path, CONNECTIONS)
    process.stop()
    by_service: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        by_service.setdefault(record["service"], []).append(record)
    target = str(servers.endpoint("echo/tcp"))
    first, refused = by_service["s5"]
    assert (first["inputBytes"], first["outputBytes"]) == (3 + 6 + 10 + 10, 2 + 2 + 10 + 10)
    assert (first["clientID"], first["route"], first["labels"]) == ("u1", target, {"tenant": "acme"})
    assert (first["dst"], first["host"]) == (target, target)
    assert "refused" in refused["err"]
    assert (refused["src"], refused["dst"], refused["route"]) == ("", "", "127.0.0.1:1")
    (chained,) = by_service["ch"]
    assert (chained["route"], chained["dst"]) == (f"n0@{places['ht']} > {target}", str(places["ht"]))
    assert (by_service["fw"][0]["node"], by_service["ud"][0]["network"]) == ("t0", "udp")
    connected, got = sorted(by_service["ht"], key=lambda record: record["http"]["method"])
    assert (connected["http"]["uri"], got["http"]["statusCode"]) == (target, 200)
    assert got["http"]["request"]["header"]["Proxy-Authorization"] == ["***"]
    (named,) = by_service["dn"]
    assert named["dns"]["name"] == "example.com."
    assert ";example.com.\tIN\t A\n" in named["dns"]["question"]
    addresses = (tmp_path / "addresses").read_text().split()
    assert set(addresses) == {"127.0.0.1"}
    # Who came to the seven services (twice to s5 and ht), where all but dn went, and the one that failed.
    assert len(addresses) == 9 + 8 + 1


def test_a_rotated_file_keeps_every_record(start: Start, servers: Servers, tmp_path: Path) -> None:
    target = servers.endpoint("echo/tcp")
    uses = [{"name": "f", "record": "recorder.service.handler"}]
    sink = {"path": str(tmp_path / "r.log"), "sep": "\n", "rotation": {"maxSize": 1}}
    config = {
        "services": [forwarder("s", target, recorders=uses)],
        "recorders": [{"name": "f", "file": sink}],
    }
    process = start("-C", json.dumps(config))
    for _ in range(3):
        assert echo(None, listening(process, "s"), b"x") == b"x"
    process.stop()
    assert len((tmp_path / "r.log").read_text().splitlines()) == 3


@pytest.mark.interop
@pytest.mark.skipif(not GOST, reason="GOST_BIN is not set: it is the path of a gost binary")
def test_records_are_those_of_gost_field_by_field(start: Start, servers: Servers, tmp_path: Path) -> None:
    binary = shutil.which(GOST)
    assert binary is not None
    seen: list[dict[tuple[str, int], dict[str, Any]]] = []
    for name in ("theirs", "ours"):
        directory = tmp_path / name
        directory.mkdir()
        config, places = recording(servers, directory)
        path = directory / "config.json"
        path.write_text(json.dumps(config))
        process = start("-C", str(path)) if name == "ours" else Process([binary, "-C", str(path)])
        if name == "theirs":
            process.start()
            process.wait_for(lambda line: '"service":"dn"' in line and "listening on" in line)
        try:
            use(servers, places)
            found = records(directory, CONNECTIONS)
        finally:
            process.stop()
        seen.append(_by_kind(found, places))
    theirs, ours = seen
    assert theirs.keys() == ours.keys()
    different = set()
    for key, record in theirs.items():
        assert [field for field in record if field in ours[key]] == [field for field in ours[key] if field in record]
        for field in (record.keys() | ours[key].keys()) - set(VOLATILE):
            different |= set(_differences(record.get(field), ours[key].get(field), (record["service"], field)))
    assert different <= BETTERED.keys()


def _by_kind(found: list[dict[str, Any]], places: dict[str, Endpoint]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return records by service and method, numbered, with the names of services in place of their ports."""
    kinds: dict[tuple[str, int], dict[str, Any]] = {}
    for record in found:
        text = json.dumps(record)
        if record.get("dns"):
            text = text.replace(str(record["dns"]["id"]), "0")
        for label, place in places.items():
            text = re.sub(rf"127\.0\.0\.1:{place.port}\b", label, text)
        kind = record["service"] + (record.get("http") or {}).get("method", "")
        number = sum(known == kind for known, _ in kinds)
        kinds[kind, number] = json.loads(text)
    return kinds


def _differences(theirs: Any, ours: Any, place: tuple[str, str]) -> Iterator[tuple[str, str]]:
    if isinstance(theirs, dict) and isinstance(ours, dict) and not place[1].endswith(".header"):
        for key in theirs.keys() | ours.keys():
            yield from _differences(theirs.get(key), ours.get(key), (place[0], f"{place[1]}.{key}"))
    elif isinstance(theirs, dict) and isinstance(ours, dict):
        if theirs.keys() != ours.keys():
            yield place
    elif theirs != ours:
        yield place
