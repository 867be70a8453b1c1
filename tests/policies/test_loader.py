"""Loaders: files and URLs, what is kept when they fail, what is told and how often."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gostnet.core.errors import ConfigError
from gostnet.core.options import Problem
from gostnet.core.sockets import DialOptions
from gostnet.core.tasks import run
from gostnet.policies import loader as module
from gostnet.policies.entries import Entry, lines, strip_leading_comment
from gostnet.policies.loader import FileSource, HTTPSource, LoadError, Reloader, Source
from gostnet.policies.threads import Threads
from gostnet.testing.certificates import Authority


# ---- lines --------------------------------------------------------------------------------------
def test_comments_blank_lines_and_any_line_ends() -> None:
    data = b"\xef\xbb\xbfone # first\r\n\n   \n# only\n\ttwo\n\xff\nlast"
    found = [(entry.text, entry.where) for entry in lines(data, "file x")]
    assert found == [
        ("one", "file x: line 1"),
        ("two", "file x: line 5"),
        ("\ufffd", "file x: line 6"),
        ("last", "file x: line 7"),
    ]
    assert [entry.text for entry in lines(b"u #p\n # c\n", "x", strip_leading_comment)] == ["u #p"]
    assert lines(b"", "x") == []


# ---- files --------------------------------------------------------------------------------------
def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(b"a\nb\n")
    source = FileSource(str(path))
    assert source.read() == b"a\nb\n"
    assert source.name == f"file {path}"


def test_what_is_no_readable_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 101)
    monkeypatch.setattr(module, "MAX_SIZE", 100)
    for name, message in (
        ("missing", "No such file"),
        (".", "not a regular file|Is a directory"),
        ("pipe", "not a regular file"),
        ("large", "larger than"),
    ):
        with pytest.raises(LoadError, match=message):
            FileSource(str(tmp_path / name)).read()
    (tmp_path / "large").write_bytes(b"x" * 100)
    assert len(FileSource(str(tmp_path / "large")).read()) == 100


# ---- URLs ---------------------------------------------------------------------------------------
class Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.paths.append(self.path)
        body = b"10.0.0.1 # list\n"
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/list")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status = {"/missing": 404, "/empty": 204}.get(self.path, 200)
        self.send_response(status)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"4\r\na\nb\n\r\n0\r\n\r\n")
            return
        if self.path == "/large":
            body = b"x" * 4000
        self.send_header("Content-Length", str(len(body) + (10 if self.path == "/short" else 0)))
        self.end_headers()
        if self.path == "/drip":
            for byte in body:
                self.wfile.write(bytes((byte,)))
                server.dripped.release()
                if not server.next.acquire(timeout=20):
                    return
            return
        if status != 204:
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args: object) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Web)
        self.paths: list[str] = []
        self.dripped = threading.Semaphore(0)
        self.next = threading.Semaphore(0)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


@contextmanager
def web(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    with Server() as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def test_urls_are_fetched_and_followed() -> None:
    with web() as server:
        assert HTTPSource(server.url("/list")).read() == b"10.0.0.1 # list\n"
        assert HTTPSource(server.url("/moved")).read() == b"10.0.0.1 # list\n"
        assert HTTPSource(server.url("/chunked")).read() == b"a\nb\n"
        assert server.paths == ["/list", "/moved", "/list", "/chunked"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "status 404"),
        ("/empty", "status 204"),
        ("/short", "10 bytes are missing"),
        ("/elsewhere", "status 302"),
        ("/large", "larger than"),
    ],
)
def test_anything_but_a_whole_answer_is_an_error(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SIZE", 1000)
    with web() as server, pytest.raises(LoadError, match=message):
        HTTPSource(server.url(path)).read()


def test_a_dripping_answer_ends_with_the_time_out() -> None:
    with web() as server:
        source = HTTPSource(server.url("/drip"), 0.3)
        failures: list[LoadError] = []

        def read() -> None:
            try:
                source.read()
            except LoadError as exc:
                failures.append(exc)

        thread = threading.Thread(target=read)
        thread.start()
        while thread.is_alive():
            if server.dripped.acquire(timeout=0.05):
                thread.join(0.1)  # less than the time-out of a single read
                server.next.release()
        assert "not complete within 0.3s" in str(failures[0]) or "timed out" in str(failures[0])


def test_a_server_that_is_not_there_is_an_error() -> None:
    with web() as server:
        url = server.url("/list")
    with pytest.raises(LoadError, match="Connection refused"):
        HTTPSource(url).read()


def test_certificates_are_verified() -> None:
    identity = Authority().issue("127.0.0.1")
    with web(identity.server_context()) as server:
        with pytest.raises(LoadError, match="certificate verify failed"):
            HTTPSource(server.url("/list").replace("http:", "https:")).read()
        assert server.paths == []


def test_sockets_have_the_options_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[str] = []
    options = DialOptions(interface="127.0.0.1")
    monkeypatch.setattr(DialOptions, "apply", lambda self, sock, target: applied.append(f"{self.interface} {target}"))
    with web() as server:
        HTTPSource(server.url("/list"), options=options).read()
    assert applied == ["127.0.0.1 127.0.0.1"]


def test_names_of_urls_tell_no_secrets() -> None:
    source = HTTPSource("https://user:secret@example.com:8443/list?token=secret#x")
    assert source.name == "url https://example.com:8443/list"


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.com/x", "example.com/list", "http://", "http://[x"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^bypasses\[0\]\.http\.url: .* is not a URL such as"):
        HTTPSource(url, path="bypasses[0].http.url")


# ---- reloading ----------------------------------------------------------------------------------
class Script:
    """A source whose content tests change; an exception as content is raised."""

    timeout = 5.0

    def __init__(self, name: str, content: bytes | LoadError) -> None:
        self.name = name
        self.content = content
        self.gate: threading.Event | None = None

    def read(self) -> bytes:
        if self.gate is not None:
            assert self.gate.wait(20)
        if isinstance(self.content, LoadError):
            raise self.content
        return self.content


class Enough(Exception):
    """Ends `run`."""


class Rig:
    def __init__(
        self, *sources: Source, period: float = 0.0, settle: Callable[[], Sequence[str]] | None = None
    ) -> None:
        self.tables: list[list[str]] = []
        self.reports: list[str] = []
        self.pauses: list[float] = []
        self.compiled = 0
        self.naps = 3

        async def settled() -> Sequence[str]:
            assert settle is not None
            return settle()

        async def sleep(seconds: float) -> None:
            self.pauses.append(seconds)
            if len(self.pauses) >= self.naps:
                raise Enough

        self.threads = Threads("test", 2)
        self.reloader: Reloader[list[str]] = Reloader(
            "bypass x",
            sources,
            self.compile,
            self.tables.append,
            self.threads,
            period=period,
            settle=settled if settle is not None else None,
            report=self.reports.append,
            sleep=sleep,
        )

    def compile(self, entries: Sequence[Entry]) -> tuple[list[str], list[Problem]]:
        self.compiled += 1
        problems = [Problem("bypasses[0].matchers[0]", "told when the configuration was read")]
        problems += [entry.error(f"{entry.text} is bad", "bad") for entry in entries if entry.text.startswith("bad")]
        return [entry.text for entry in entries if not entry.text.startswith("bad")], problems

    def load(self) -> bool:
        return run(self.reloader.load())

    def run(self) -> None:
        run(self.reloader.run())


def test_sources_are_joined_in_order_and_an_unchanged_one_costs_nothing() -> None:
    first, second = Script("file a", b"1\n2"), Script("url b", b"3\n")
    rig = Rig(first, second)
    assert rig.load()
    assert rig.load()
    assert rig.tables == [["1", "2", "3"]]
    assert rig.compiled == 1
    second.content = b"4"
    assert rig.load()
    assert rig.tables[1:] == [["1", "2", "4"]]
    assert rig.reports == []


def test_an_emptied_source_empties_the_table() -> None:
    source = Script("file a", b"1")
    rig = Rig(source)
    rig.load()
    source.content = b"# nothing\n"
    assert rig.load()
    assert rig.tables == [["1"], []]


def test_a_failing_source_keeps_its_lines_and_is_told_once() -> None:
    first, second = Script("file a", b"1"), Script("url b", b"2")
    rig = Rig(first, second)
    rig.load()
    second.content = LoadError("status 500")
    first.content = b"9"
    assert not rig.load()
    assert not rig.load()
    assert rig.tables[-1] == ["9", "2"]
    assert rig.reports == ["bypass x: url b: status 500"]
    second.content = b"2"
    assert rig.load()
    second.content = LoadError("status 500")
    assert not rig.load()
    assert rig.reports == ["bypass x: url b: status 500"] * 2


def test_a_source_that_fails_at_the_start_leaves_what_the_others_have() -> None:
    rig = Rig(Script("file a", LoadError("No such file or directory")), Script("url b", b"2"))
    assert not rig.load()
    assert rig.tables == [["2"]]


def test_bad_lines_are_left_out_and_told_once_with_their_places() -> None:
    source = Script("file a", b"bad1\nok\nbad2\nbad3\nbad4\nbad5\n")
    rig = Rig(source)
    assert rig.load()
    rig.load()
    assert rig.tables == [["ok"]]
    assert rig.reports == [
        "bypass x: file a: line 1: bad1 is bad",
        "bypass x: file a: line 3: bad2 is bad",
        "bypass x: file a: line 4: bad3 is bad",
        "bypass x: 2 more lines are wrong",
    ]


def test_it_loads_once_a_period_of_at_least_a_second() -> None:
    source = Script("file a", b"1")
    rig = Rig(source, period=10e-9)  # `reload: 10` in a file is ten nanoseconds
    rig.load()
    with pytest.raises(Enough):
        rig.run()
    assert rig.pauses == [1.0, 1.0, 1.0]
    slow = Rig(source, period=60)
    slow.load()
    with pytest.raises(Enough):
        slow.run()
    assert slow.pauses == [60.0] * 3


def test_without_a_period_it_ends_once_everything_is_there() -> None:
    source = Script("file a", b"1")
    rig = Rig(source)
    rig.load()
    rig.run()
    assert rig.pauses == []
    source.content = LoadError("gone")
    rig.load()
    rig.naps = 2
    with pytest.raises(Enough):
        rig.run()
    source.content = b"2"
    rig.naps = 9
    rig.run()
    assert rig.pauses == [module.RETRY] * 3
    assert rig.tables[-1] == ["2"]


def test_a_failure_is_not_left_for_a_long_period() -> None:
    rig = Rig(Script("file a", LoadError("gone")), period=3600)
    rig.load()
    with pytest.raises(Enough):
        rig.run()
    assert rig.pauses == [module.RETRY] * 3


def test_names_that_are_not_known_yet_are_tried_again() -> None:
    unknown = ["home.example does not exist"]
    rig = Rig(settle=lambda: tuple(unknown))
    assert not rig.load()
    assert rig.tables == []  # nothing to load: the table of the configuration stays
    rig.naps = 2
    with pytest.raises(Enough):
        rig.run()
    assert rig.reports == ["bypass x: home.example does not exist"]
    unknown.clear()
    rig.naps = 9
    rig.run()
    assert rig.reloader.complete


def test_a_source_that_hangs_is_given_up_and_not_asked_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.05)
    source = Script("file a", b"1")
    source.timeout = 0.0
    gate = source.gate = threading.Event()
    rig = Rig(source)

    async def main() -> None:
        assert not await rig.reloader.load()
        assert not await rig.reloader.load()
        assert rig.reports == [
            "bypass x: file a: not complete within 0s",
            "bypass x: file a: still being read since the last time",
        ]
        gate.set()
        source.timeout = 20.0
        while rig.reloader._sources[0][1].reading:
            await rig.threads.run(lambda: None)
        assert await rig.reloader.load()

    run(main())
    assert rig.tables[-1] == ["1"]


def test_more_work_than_threads_take_is_a_failure_not_a_crash() -> None:
    rig = Rig(Script("file a", b"1"))
    rig.threads.close()
    assert not rig.load()
    assert "closed" in rig.reports[0]
