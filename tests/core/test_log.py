"""Log lines: what they look like, and how they reach a descriptor without holding anybody up."""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Iterator

import pytest

from gostnet.core.flow import new_sid
from gostnet.core.log import Logger, NullSink, Sink


class Kept(NullSink):
    """Keeps the lines it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[bytes] = []

    def write(self, line: bytes) -> None:
        self.lines.append(line)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def read_lines(reading: int, count: int) -> list[bytes]:
    data = b""
    while data.count(b"\n") < count:
        ready, _, _ = select.select([reading], [], [], 10)
        assert ready, f"only {data!r} came"
        data += os.read(reading, 1 << 20)
    return data.splitlines()


def test_values_of_every_kind_are_json() -> None:
    sink = Kept()
    log = Logger(sink, fields={"service": 'a "quoted" one', "worker": 1})
    values = {"text": 'line\nbreak "é"', "number": 7, "yes": True, "none": None, "part": 0.5, "list": [1, "x"]}
    log.info("who >-< where", **values)
    said = json.loads(sink.lines[0])
    assert said.pop("time")
    assert said == {
        "level": "info",
        "msg": "who >-< where",
        "service": 'a "quoted" one',
        "worker": 1,
        **values,
    }


def test_lone_line_is_written_at_once_and_order_is_kept(pipe: tuple[int, int]) -> None:
    sink = Sink(pipe[1])
    sink.write(b"first\n")
    assert read_lines(pipe[0], 1) == [b"first"]
    wanted = [b"%d" % number for number in range(1000)]
    for line in wanted:
        sink.write(line + b"\n")
    assert read_lines(pipe[0], 1000) == wanted
    sink.close()


def test_lines_of_several_threads_all_arrive(pipe: tuple[int, int]) -> None:
    sink = Sink(pipe[1])

    def write(name: int) -> None:
        for number in range(200):
            sink.write(b"%d %d\n" % (name, number))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    lines = read_lines(pipe[0], 800)
    for thread in threads:
        thread.join()
    sink.close()
    assert sorted(lines) == sorted(b"%d %d" % (name, number) for name in range(4) for number in range(200))


def test_close_writes_what_waits(pipe: tuple[int, int]) -> None:
    sink = Sink(pipe[1])
    for number in range(50):
        sink.write(b"%d\n" % number)
    sink.close()
    os.set_blocking(pipe[0], False)
    assert os.read(pipe[0], 1 << 16).splitlines() == [b"%d" % number for number in range(50)]
    sink.write(b"later\n")  # the last words of a daemon may come after that
    assert read_lines(pipe[0], 1) == [b"later"]
    sink.close()


def test_who_reads_too_slowly_is_told_how_much_is_lost(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sink, "MOST", 10)
    held = threading.Lock()
    sink = Sink(pipe[1], turn=held)
    with held:
        for number in range(100):
            sink.write(b"%d\n" % number)
    sink.close()
    sink.write(b"end\n")
    data = b""
    while not data.endswith(b"end\n"):
        data += os.read(pipe[0], 1 << 16)
    sink.close()
    lost = [int(json.loads(line)["msg"].split()[0]) for line in data.splitlines() if b"lost" in line]
    numbers = [int(line) for line in data.splitlines() if line.isdigit()]
    assert len(numbers) + sum(lost) == 100
    assert 10 <= len(numbers) < 100
    assert numbers == sorted(numbers)


def test_session_ids_differ_and_sort_by_time() -> None:
    ids = [new_sid() for _ in range(5000)]
    assert len(set(ids)) == 5000
    assert all(len(sid) == 20 and set(sid) <= set("0123456789abcdefghijklmnopqrstuv") for sid in ids)
    assert ids[0][:6] <= ids[-1][:6]
