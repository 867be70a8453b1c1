"""curl as the client, Python's http.server as the origin: neither was written with this proxy in mind."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from gostnet.core.address import Endpoint
from gostnet.core.tasks import in_thread, run

from ..vectors import served
from .kit import Users, Watched, way_out

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

PAGE = bytes(range(256)) * 8192
"""2 MiB."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves PAGE, echoes digests of what is sent."""

    protocol_version = "HTTP/1.1"
    requests: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _note(self) -> None:
        self.requests.append((self.requestline, {name.lower(): value for name, value in self.headers.items()}))

    def do_GET(self) -> None:
        self._note()
        if self.path == "/old":
            self.protocol_version = "HTTP/1.0"
        self.send_response(200)
        if self.path == "/page":
            self.send_header("Content-Length", str(len(PAGE)))
        elif self.path == "/chunks":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.path == "/chunks":
            for start in range(0, len(PAGE), 10000):
                piece = PAGE[start : start + 10000]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(PAGE)
            self.close_connection = self.path != "/page"

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._note()
        digest = hashlib.sha256()
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                digest.update(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            digest.update(self.rfile.read(int(self.headers["Content-Length"])))
        body = digest.hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST


@pytest.fixture
def web() -> Iterator[int]:
    Handler.requests.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def curl(handler: Watched, *words: str, data: bytes = b"") -> bytes:
    """Run curl through a proxy with `handler`; return its output. Raise AssertionError when it fails."""

    async def main() -> bytes:
        async with served(handler, way_out()) as address:
            return await in_thread(_curl, address, words, data)

    return run(main())


def _curl(proxy: Endpoint, words: tuple[str, ...], data: bytes) -> bytes:
    command = [
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--max-time",
        "20",
        "--noproxy",
        "",
        "-x",
        f"http://{proxy}",
    ]
    done = subprocess.run([*command, *words], input=data, capture_output=True, check=False, timeout=30)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


@pytest.mark.parametrize("path", ["/page", "/chunks", "/end", "/old"])
@pytest.mark.parametrize("words", [(), ("-p",), ("-0",)], ids=["forward", "tunnel", "http1.0"])
@pytest.mark.parametrize("keepalive", [False, True])
def test_downloads(web: int, path: str, words: tuple[str, ...], keepalive: bool) -> None:
    with Watched({"keepalive": keepalive}) as handler:
        assert curl(handler, *words, f"http://127.0.0.1:{web}{path}") == PAGE


def test_head(web: int) -> None:
    seen = curl(Watched(), "-I", f"http://127.0.0.1:{web}/page")
    assert f"Content-Length: {len(PAGE)}\r\n".encode() in seen


@pytest.mark.parametrize(
    "words",
    [
        ("--data-binary", "@-"),
        ("--data-binary", "@-", "-H", "Transfer-Encoding: chunked"),
        ("-T", "-"),
        ("--data-binary", "@-", "-H", "Expect:"),
        ("--data-binary", "@-", "-0"),
    ],
    ids=["length", "chunks", "put from a pipe", "no expectation", "http1.0"],
)
def test_uploads(web: int, words: tuple[str, ...]) -> None:
    seen = curl(Watched(), *words, f"http://127.0.0.1:{web}/up", data=PAGE)
    assert seen == hashlib.sha256(PAGE).hexdigest().encode()


def test_several_requests_on_one_connection(web: int, tmp_path: Path) -> None:
    handler = Watched(users=Users())
    urls = [f"http://127.0.0.1:{web}/page"] * 3
    shown = curl(
        handler,
        "-U",
        "user:pass",
        "--write-out",
        "%{num_connects} ",
        *[word for url in urls for word in ("-o", str(tmp_path / "page"), url)],
    )
    # http.server says nothing about the connection, so ours goes on: one for three requests.
    assert shown == b"1 0 0 "
    assert (tmp_path / "page").read_bytes() == PAGE
    assert len(Handler.requests) == 3
    assert all(fields["connection"] == "close" for _, fields in Handler.requests)


def test_compression(web: int) -> None:
    with Watched({"compression": True, "keepalive": True}) as handler:
        assert curl(handler, "-H", "Accept-Encoding;", f"http://127.0.0.1:{web}/page") == PAGE


def test_wrong_credentials(web: int) -> None:
    with pytest.raises(AssertionError, match="407"):
        curl(Watched(users=Users()), "-U", "user:wrong", f"http://127.0.0.1:{web}/page")
    assert Handler.requests == []
