"""HTTP from threads, by the sockets that the configuration wants: what loaders, recorders and observers ask with."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

from ..core.errors import ConfigError, GostnetError
from ..core.sockets import PLAIN, DialOptions, make_socket

TIMEOUT: Final = 5.0
"""Seconds for one request where the configuration says 0, which is for ever in GOST (E08)."""
MAX_ANSWER: Final = 65536
"""Bytes of an answer that are looked at: `{"ok":true}` is all that there can be."""

Dial = Callable[..., socket.socket]


class PostError(GostnetError):
    """A request was not answered as it should be."""

    code = "post"


def dial_any(
    options: DialOptions, address: tuple[str, int], timeout: float | None = None, source: object = None
) -> socket.socket:
    """Connect to the first address of a name that answers, with the mark and interface of `options`."""
    error: OSError | None = None
    for family, kind, proto, _, sockaddr in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        sock = make_socket(family, kind, options.netns, proto)
        try:
            sock.settimeout(timeout)
            options.apply(sock, str(sockaddr[0]))
            sock.connect(sockaddr)
            return sock
        except OSError as exc:
            sock.close()
            error = exc
        except BaseException:
            sock.close()
            raise
    raise error or OSError(f"{address[0]} has no address")


def connection(kind: type[http.client.HTTPConnection], dial: Dial, host: str, **options: Any) -> Any:
    """Return a connection of `kind` that `dial` opens."""
    made = kind(host, **options)
    # The library's own hook for another way to connect: it is what its tests replace.
    made._create_connection = dial  # type: ignore[attr-defined]
    return made


class Poster:
    """Sends bodies to a URL with POST, over one connection that is kept; several threads wait for each other."""

    def __init__(
        self,
        url: str,
        timeout: float = 0.0,
        headers: Mapping[str, str] | None = None,
        options: DialOptions = PLAIN,
        path: str = "",
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Raise ConfigError that names `path` for a URL that is not one of HTTP; without a scheme it is http://."""
        url = url if url.startswith("http") else f"http://{url}"
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(path, f"{url[:64]!r} is not a URL such as http://127.0.0.1:8000/", code="config.url")
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._free = threading.Lock()
        self._target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        timeout = timeout if timeout > 0 else TIMEOUT
        dial = partial(dial_any, options)
        host = parts.hostname or ""
        kept: dict[str, Any] = {"port": parts.port, "timeout": timeout}
        if parts.scheme == "https":
            kept["context"] = context or ssl.create_default_context()
            self._connection = connection(http.client.HTTPSConnection, dial, host, **kept)
        else:
            self._connection = connection(http.client.HTTPConnection, dial, host, **kept)

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Send `body`; return the status and the beginning of the answer. Raise PostError."""
        with self._free:
            return self._post(body)

    def _post(self, body: bytes) -> tuple[int, bytes]:
        reused = self._connection.sock is not None
        try:
            return self._exchange(body)
        except (OSError, http.client.HTTPException) as exc:
            self._connection.close()
            if not reused or isinstance(exc, TimeoutError):
                raise PostError(f"{self.name}: {exc or type(exc).__name__}") from exc
        try:
            return self._exchange(body)  # the server had closed the kept connection
        except (OSError, http.client.HTTPException) as exc:
            self._connection.close()
            raise PostError(f"{self.name}: {exc or type(exc).__name__}") from exc

    def _exchange(self, body: bytes) -> tuple[int, bytes]:
        self._connection.request("POST", self._target, body, self._headers)
        answer = self._connection.getresponse()
        data = answer.read(MAX_ANSWER + 1)
        if len(data) > MAX_ANSWER:
            self._connection.close()
        return answer.status, data

    def call(self, message: object) -> None:
        """Send `message` as JSON to a plugin. Raise PostError unless it answers 200 and `{"ok": true}`."""
        status, data = self.post(json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode())
        if status != 200:
            raise PostError(f"{self.name}: status {status}")
        try:
            agreed = json.loads(data).get("ok") is True
        except (ValueError, AttributeError):
            agreed = False
        if not agreed:
            raise PostError(f"{self.name}: the answer is not ok")

    def close(self) -> None:
        """Close the kept connection."""
        self._connection.close()
