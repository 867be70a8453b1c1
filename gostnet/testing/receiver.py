"""An HTTP server that remembers what is posted to it: the other end of recorders, observers and plugins."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Posted:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes
    peer: tuple[str, int]


class Receiver(ThreadingHTTPServer):
    """Answers every POST with `status` and `answer`; with `drops` it then closes the connection without saying so."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.answer = b'{"ok":true}'
        self.drops = False
        self.dropped = threading.Event()
        self.posted: list[Posted] = []
        self._changed = threading.Condition()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}/in?key=1"

    def note(self, posted: Posted) -> None:
        """Remember a request."""
        with self._changed:
            self.posted.append(posted)
            self._changed.notify_all()

    def wait_for(self, wanted: Callable[[Posted], bool], timeout: float = 10.0) -> None:
        """Wait for a request. Raise AssertionError when it does not come."""
        with self._changed:
            came = self._changed.wait_for(lambda: any(wanted(posted) for posted in self.posted), timeout)
        assert came, self.posted


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        host, port = self.client_address[:2]
        self.server.note(Posted(self.path, dict(self.headers), body, (str(host), int(port))))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)
        self.close_connection = self.server.drops

    def finish(self) -> None:
        super().finish()
        self.server.dropped.set()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver for the length of a block."""
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="receiver")
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
