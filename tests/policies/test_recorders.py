"""Recorders: the queue that never blocks, the sinks, and what a record looks like."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import BypassDenied, DialRefused, RateDenied
from gostnet.core.flow import Flow
from gostnet.policies import recorders
from gostnet.policies.post import Poster, PostError
from gostnet.policies.recorders import (
    CLIENT,
    DIAL,
    DIAL_ERROR,
    HANDLER,
    FileSink,
    HTTPSink,
    PluginSink,
    Record,
    Recorder,
    Records,
    Rotation,
    TCPSink,
    Use,
    stamp,
)
from gostnet.testing.receiver import receiving


def record(data: bytes, metadata: dict[str, Any] | None = None) -> Record:
    return Record(data, metadata or {})


class Gated:
    """A sink that waits for leave."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.entered = threading.Event()
        self.leave = threading.Event()
        self.closed = 0

    def write(self, records: Sequence[Record]) -> None:
        self.entered.set()
        assert self.leave.wait(10)
        self.taken += [item.data for item in records]

    def close(self) -> None:
        self.closed += 1


# ---- the queue -----------------------------------------------------------------------------------
def test_a_slow_sink_holds_nobody_up_and_what_is_dropped_is_counted_and_told() -> None:
    told: list[str] = []
    sink = Gated()
    recorder = Recorder("r", sink, told.append, limit=3)
    recorder.put(record(b"0"))
    assert sink.entered.wait(10)
    for number in range(1, 10):
        recorder.put(record(b"%d" % number))
    assert recorder.dropped == 6
    sink.leave.set()
    recorder.close()
    assert sink.taken == [b"0", b"1", b"2", b"3"]
    assert recorder.written == 4
    assert told == ["recorder r: 6 records dropped, it is too slow"]
    assert sink.closed == 1


def test_the_end_waits_for_what_is_queued_and_then_takes_nothing() -> None:
    sink = Gated()
    sink.leave.set()
    recorder = Recorder("r", sink)
    for _ in range(1000):
        recorder.put(record(b"x"))
    recorder.close()
    recorder.put(record(b"late"))
    assert sink.taken == [b"x"] * 1000
    assert recorder.dropped == 1


def test_a_failure_is_told_once_until_it_works_again(tmp_path: Path) -> None:
    told: list[str] = []
    place = tmp_path / "below" / "file"
    (tmp_path / "below").write_text("in the way")
    sink = FileSink(str(place), "\n")
    with pytest.raises(OSError, match=r"exists|directory"):
        sink.write([record(b"lost")])
    recorder = Recorder("r", sink, told.append)
    recorder.put(record(b"lost"))
    recorder.close()
    assert len(told) == 1
    assert told[0].startswith("recorder r: ")


# ---- files ---------------------------------------------------------------------------------------
def test_a_file_is_appended_to_with_its_directories_and_separators(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "records"
    sink = FileSink(str(path), "|")
    sink.write([record(b"one"), record(b"two")])
    sink.close()
    sink.write([record(b"three")])
    assert path.read_bytes() == b"one|two|three|"
    sink.close()


def test_a_file_that_was_renamed_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "records"
    sink = FileSink(str(path), "\n")
    sink.write([record(b"old")])
    os.rename(path, tmp_path / "aside")
    sink.write([record(b"new")])
    sink.close()
    assert path.read_bytes() == b"new\n"


@pytest.mark.parametrize("compress", [False, True])
def test_a_file_is_put_aside_when_it_is_full(tmp_path: Path, compress: bool) -> None:
    now = [1_700_000_000.25]
    path = tmp_path / "records.log"
    sink = FileSink(str(path), "\n", Rotation(10, backups=2, compress=compress), lambda: now[0])
    (tmp_path / "records-note.log").write_text("not ours")
    for word in (b"aaaaaa", b"bbbbbb", b"cccccc", b"dddddd"):
        sink.write([record(word)])
        now[0] += 1
    sink.close()
    assert path.read_bytes() == b"dddddd\n"
    aside = sorted(found.name for found in tmp_path.iterdir() if found.name not in ("records.log", "records-note.log"))
    end = ".log.gz" if compress else ".log"
    assert aside == [f"records-2023-11-14T22-13-22.250{end}", f"records-2023-11-14T22-13-23.250{end}"]
    data = (tmp_path / aside[0]).read_bytes()
    assert (gzip.decompress(data) if compress else data) == b"bbbbbb\n"


def test_what_was_put_aside_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    now = [1_700_000_000.0]
    path = tmp_path / "r"
    sink = FileSink(str(path), "", Rotation(3, age=1), lambda: now[0])
    for _ in range(3):
        sink.write([record(b"xyz")])
        now[0] += 20 * 3600
    assert len(list(tmp_path.iterdir())) == 3
    sink.write([record(b"xyz")])
    sink.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_files_put_aside_in_the_same_moment_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.log"
    sink = FileSink(str(path), "\n", Rotation(5, compress=True), lambda: 1_700_000_000.0)
    sink.write([record(b"%04d" % number) for number in range(20)])
    sink.close()
    found = b"".join(gzip.decompress(each.read_bytes()) for each in sorted(tmp_path.glob("*.gz")))
    assert found + path.read_bytes() == b"".join(b"%04d\n" % number for number in range(20))


def test_what_somebody_who_died_has_left_is_packed(tmp_path: Path) -> None:
    path = tmp_path / "r.log"
    left = tmp_path / "r-2023-11-14T22-13-19.000.log"
    left.write_text("left")
    left.with_name(left.name + ".part").write_text("a half")
    sink = FileSink(str(path), "", Rotation(3, compress=True), lambda: 1_700_000_000.0)
    sink.write([record(b"xyz"), record(b"abc")])
    sink.close()
    assert gzip.decompress(left.with_name(left.name + ".gz").read_bytes()) == b"left"
    assert len(list(tmp_path.iterdir())) == 3


_WRITER = """
import sys
from gostnet.policies.recorders import FileSink, Record, Rotation
path, name = sys.argv[1:]
sink = FileSink(path, "\\n", Rotation(4000, compress=True))
print("here", flush=True)
sys.stdin.readline()
for first in range(0, 2000, 20):
    sink.write([Record(b"%s %d" % (name.encode(), number), {}) for number in range(first, first + 20)])
    print(first, flush=True)
"""


def test_several_processes_turn_a_file_over_and_nothing_is_lost_or_written_twice(tmp_path: Path) -> None:
    """One of them is killed in the middle of it."""
    path = tmp_path / "r.log"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("a", "b", "victim")
    ]
    for writer in writers:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "here\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    victim = writers[2]
    assert victim.stdout is not None
    while victim.stdout.readline() != "600\n":
        pass
    victim.kill()
    for writer in writers:
        writer.communicate(timeout=30)
    with contextlib.closing(FileSink(str(path), "\n", Rotation(4000, compress=True))) as sink:
        for _ in range(4):
            sink.write([record(b"last" * 500)])  # turns it over, and packs what the victim has left
    files = [path, *tmp_path.glob("r-*")]
    assert all(file.suffix == ".gz" for file in files[1:])
    contents = [gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes() for file in files]
    assert max(map(len, contents)) <= 4000
    words = b"".join(contents).decode().splitlines()
    for name in ("a", "b"):
        assert sorted(int(word.split()[1]) for word in words if word.startswith(name + " ")) == list(range(2000))
    survived = sorted(int(word.split()[1]) for word in words if word.startswith("victim "))
    assert len(set(survived)) == len(survived)
    assert survived[:620] == list(range(620))


# ---- TCP, HTTP -----------------------------------------------------------------------------------
def test_a_tcp_record_is_a_connection_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        sink = TCPSink(Endpoint(host, port))
        sink.write([record(b"one"), record(b"two")])
        got = []
        for _ in range(2):
            conn, _ = server.accept()
            with conn:
                got.append(conn.recv(100) + conn.recv(100))
    assert got == [b"one", b"two"]
    with pytest.raises(ConnectionRefusedError):
        sink.write([record(b"three")])


def test_http_records_are_posted_over_one_connection() -> None:
    with receiving() as server:
        sink = HTTPSink(Poster(server.url, headers={"X-Key": "k"}))
        sink.write([record(b'{"a":1}'), record(b"two")])
        assert [(it.path, it.body) for it in server.posted] == [("/in?key=1", b'{"a":1}'), ("/in?key=1", b"two")]
        headers = server.posted[0].headers
        assert (headers["Content-Type"], headers["X-Key"]) == ("application/json", "k")
        assert len({it.peer for it in server.posted}) == 1
        server.status = 400
        with pytest.raises(PostError, match="status 400"):
            sink.write([record(b"three")])
        sink.close()


def test_a_plugin_gets_base64_and_must_say_ok() -> None:
    with receiving() as server:
        sink = PluginSink(Poster(server.url))
        sink.write([record(b"data", {"http.body": True}), record(b"more")])
        bodies = [json.loads(it.body) for it in server.posted]
        assert [base64.b64decode(body["data"]) for body in bodies] == [b"data", b"more"]
        assert base64.b64decode(bodies[0]["metadata"]) == b'{"http.body":true}'
        assert bodies[1]["metadata"] == "bnVsbA=="
        for server.status, server.answer in ((200, b'{"ok":false}'), (200, b"[]"), (201, b'{"ok":true}')):
            with pytest.raises(PostError):
                sink.write([record(b"no")])
        sink.close()


def test_a_kept_connection_that_the_server_closed_is_made_again() -> None:
    with receiving() as server:
        poster = Poster(server.url)
        server.drops = True
        assert poster.post(b"one")[0] == 200
        assert server.dropped.wait(10)
        server.drops = False
        assert poster.post(b"two")[0] == 200
        assert len({it.peer for it in server.posted}) == 2
        poster.close()
    with pytest.raises(PostError, match="refused"):
        poster.post(b"three")
    poster.close()


# ---- records -------------------------------------------------------------------------------------
class Kept:
    def __init__(self) -> None:
        self.data: list[bytes] = []

    def write(self, records: Sequence[Record]) -> None:
        self.data += [item.data for item in records]

    def close(self) -> None:
        pass


ENDS = (Endpoint("192.0.2.7", 1234), Endpoint("127.0.0.1", 1080))


def flow_to(target: Endpoint) -> Flow:
    return Flow("s", ENDS[0], ENDS[1], "tcp", target)


def recorded(*names: str, labels: dict[str, str] | None = None) -> tuple[Records, Kept, Recorder]:
    sink = Kept()
    recorder = Recorder("r", sink)
    return Records("s", {name: Use(recorder, {}) for name in names}, labels), sink, recorder


def test_addresses_are_recorded_when_they_come_up() -> None:
    records, sink, recorder = recorded(CLIENT, DIAL, DIAL_ERROR)
    flow = flow_to(Endpoint("example.com", 80))
    records.accepted(flow, ENDS)
    records.came(flow)
    assert flow.details is None
    records.dialling(flow, Endpoint("example.com", 80))
    records.failed(flow, Endpoint("example.com", 80))
    records.ended(flow, (0, 0))
    recorder.close()
    assert sink.data == [b"192.0.2.7", b"example.com", b"example.com"]


def test_w01_w05_a_connection_is_an_object_with_gosts_fields_in_gosts_order() -> None:
    records, sink, recorder = recorded(HANDLER, labels={"tenant": "acme"})
    flow = flow_to(Endpoint("127.0.0.1", 7000))
    records.accepted(flow, ENDS)
    flow.user = "u1"
    flow.route = ("n0@10.0.0.1:1080",)
    records.dialling(flow, Endpoint("127.0.0.1", 7000))
    records.reached(flow, Endpoint("127.0.0.1", 7000), Endpoint("10.0.0.2", 5), Endpoint("10.0.0.1", 1080))
    records.ended(flow, (36, 24))
    recorder.close()
    (data,) = sink.data
    found = json.loads(data)
    assert list(found) == [
        *("service", "labels", "network", "remote", "local", "client", "src", "dst", "host", "clientIP", "clientID"),
        *("route", "inputBytes", "outputBytes", "sid", "duration", "time"),
    ]
    assert found["duration"] >= 0
    assert {key: found[key] for key in found if key not in ("duration", "time")} == {
        "service": "s",
        "labels": {"tenant": "acme"},
        "network": "tcp",
        "remote": "192.0.2.7:1234",
        "local": "127.0.0.1:1080",
        "client": "192.0.2.7:1234",
        "src": "10.0.0.2:5",
        "dst": "10.0.0.1:1080",
        "host": "127.0.0.1:7000",
        "clientIP": "",
        "clientID": "u1",
        "route": "n0@10.0.0.1:1080 > 127.0.0.1:7000",
        "inputBytes": 36,
        "outputBytes": 24,
        "sid": flow.sid,
    }


def test_w02_w03_errors_are_said_and_addresses_are_empty() -> None:
    records, sink, recorder = recorded(HANDLER)
    refused, limited = flow_to(Endpoint("127.0.0.1", 1)), flow_to(Endpoint("127.0.0.1", 1))
    for flow, error in ((refused, DialRefused("dial 127.0.0.1:1: Connection refused")), (limited, RateDenied())):
        records.accepted(flow, ENDS)
        flow.error = error
        records.ended(flow, (0, 0))
    recorder.close()
    first, second = (json.loads(data) for data in sink.data)
    assert (first["err"], first["src"], first["dst"]) == ("dial 127.0.0.1:1: Connection refused", "", "")
    assert (second["err"], second["inputBytes"], second["outputBytes"]) == ("rate limit", 0, 0)


def test_w04_what_a_bypass_refuses_says_so() -> None:
    records, sink, recorder = recorded(HANDLER)
    flow = flow_to(Endpoint("blocked.example", 443))
    records.accepted(flow, ENDS)
    flow.error = BypassDenied("blocked.example:443 is bypassed by the service")
    records.ended(flow, (10, 10))
    recorder.close()
    (found,) = (json.loads(data) for data in sink.data)
    assert found["err"] == "blocked.example:443 is bypassed by the service"
    assert "route" not in found


def test_a_flow_whose_parts_were_recorded_has_no_record_of_its_own() -> None:
    records, sink, recorder = recorded(HANDLER)
    flow = flow_to(Endpoint("127.0.0.1", 80))
    records.accepted(flow, ENDS)
    assert flow.details is not None
    flow.details.add_part({"proto": "http", "http": {"method": "GET"}})
    records.ended(flow, (1, 1))
    recorder.close()
    (found,) = (json.loads(data) for data in sink.data)
    assert (found["proto"], found["http"]) == ("http", {"method": "GET"})


def test_times_are_written_as_go_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for zone, expected in (("UTC", "2023-11-14T22:13:20.25Z"), ("XYZ-3:30", "2023-11-15T01:43:20.25+03:30")):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        recorders._second.cache_clear()
        assert stamp(1_700_000_000.25) == expected
    monkeypatch.undo()
    time.tzset()
    recorders._second.cache_clear()
    assert "." not in stamp(1_700_000_000)
