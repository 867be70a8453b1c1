"""HTTP/1.0 and 1.1 messages (RFC 9112): heads, targets, and the framing of bodies. No I/O.

A head is bytes up to and including the empty line. The field lines are parsed by llhttp (httptools), which is strict
about what smuggling lives on: folded lines, bare CR or LF, blanks before the colon, control characters, repeated or
signed Content-Length. Start lines are parsed here: llhttp knows a fixed list of methods, proxies pass on any, and an
association over HTTP asks for `CONNECT  HTTP/1.1` with nothing between the blanks.

Names and values are bytes as they came, in their order; look-ups are by name in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final, TypeAlias

import httptools

from ..core.address import Endpoint, parse_ip
from ..core.errors import EndOfStream, ProtocolError

Fields: TypeAlias = list[tuple[bytes, bytes]]

MAX_HEAD: Final = 65536
"""Bytes of a request head: what nginx and Apache take with the largest settings in use is half of it."""

MAX_RESPONSE_HEAD: Final = 262144
"""Bytes of a response head: what browsers accept."""

MAX_CHUNK_LINE: Final = 4096
"""Bytes of a chunk's size line, extensions included (Go's limit)."""

MAX_TRAILER: Final = 16384
"""Bytes of a trailer section."""

MAX_NAME: Final = 255
"""Bytes of a host name: more has no form in DNS or SOCKS."""

END: Final = b"\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n"
"""The chunk of size 0; trailer fields and an empty line follow."""


class HeadTooLarge(ProtocolError):
    """A head is longer than its limit."""

    code = "protocol.head-size"


# ---- heads --------------------------------------------------------------------------------------
class Head:
    """What requests and responses share.

    version    10 or 11; a higher minor version counts as 11 (RFC 9110 section 2.5)
    fields     (name, value) in order
    first      the first value of each name, by name in lower case
    """

    __slots__ = ("fields", "first", "version")

    def __init__(self, version: int, fields: Fields, first: dict[bytes, bytes]) -> None:
        self.version = version
        self.fields = fields
        self.first = first

    def get(self, name: bytes) -> bytes:
        """Return the first value of `name` (lower case), b"" if there is none."""
        return self.first.get(name, b"")

    def all(self, name: bytes) -> list[bytes]:
        """Return every value of `name` (lower case) in order."""
        if name not in self.first:
            return []
        return [value for key, value in self.fields if key.lower() == name]

    def tokens(self, name: bytes) -> list[bytes]:
        """Return the items of the comma-separated lists in all fields called `name`, in lower case."""
        if name not in self.first:
            return []
        return [item for item in (part.strip(b" \t").lower() for part in b",".join(self.all(name)).split(b",")) if item]


class Request(Head):
    """A request's head; `target` is as it came, empty only for CONNECT."""

    __slots__ = ("method", "target")

    def __init__(self, method: bytes, target: bytes, version: int, fields: Fields, first: dict[bytes, bytes]) -> None:
        self.method = method
        self.target = target
        self.version = version
        self.fields = fields
        self.first = first

    @property
    def persistent(self) -> bool:
        """Whether the client goes on with the connection (RFC 9112 section 9.3), Proxy-Connection included."""
        options = self.tokens(b"connection") + self.tokens(b"proxy-connection")
        return b"close" not in options if self.version > 10 else b"keep-alive" in options


class Response(Head):
    """A response's head."""

    __slots__ = ("reason", "status")

    def __init__(self, status: int, reason: bytes, version: int, fields: Fields, first: dict[bytes, bytes]) -> None:
        Head.__init__(self, version, fields, first)
        self.status = status
        self.reason = reason

    @property
    def persistent(self) -> bool:
        """Whether the server goes on with the connection (RFC 9112 section 9.3)."""
        options = self.tokens(b"connection")
        return b"close" not in options if self.version > 10 else b"keep-alive" in options


_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([^\x00-\x20\x7f]*) HTTP/1\.([0-9])\r\n").match
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?\r\n").match
_FIELD_NAME = re.compile(_TOKEN).fullmatch
_FIELD_VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*").fullmatch


class _Sink:
    """What llhttp calls for each field line."""

    __slots__ = ("complete", "fields", "first")

    def __init__(self) -> None:
        self.fields: Fields = []
        self.first: dict[bytes, bytes] = {}
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        value = value.rstrip(b" \t")
        self.fields.append((name, value))
        self.first.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        self.complete = True


_AS_REQUEST: Final = b"GET / HTTP/1.1\r\n"
_AS_RESPONSE: Final = b"HTTP/1.1 200 OK\r\n"


def _parse_lines(parser: Any, sink: _Sink, start: bytes, lines: bytes) -> None:
    """Parse field lines, the empty one included, behind a start line that llhttp knows. Raise ProtocolError."""
    try:
        parser.feed_data(start + lines)
    except httptools.HttpParserUpgrade:
        pass  # it leaves off behind the head, which is all it was given
    except httptools.HttpParserError as exc:
        # Complaints about what the fields mean come after the head is complete; they are decided below.
        if not sink.complete:
            raise ProtocolError(f"malformed HTTP head: {exc}") from exc
    if not sink.complete:
        raise ProtocolError("malformed HTTP head: it has no end")


def parse_request(head: bytes) -> Request:
    """Parse the head of a request, which ends with its first empty line. Raise ProtocolError."""
    line = _REQUEST_LINE(head)
    if line is None:
        raise ProtocolError(f"malformed request line {head[:64]!r}")
    method, target, minor = line.groups()
    if not target and method != b"CONNECT":
        raise ProtocolError(f"a {method.decode('ascii')} request without a target")
    sink = _Sink()
    _parse_lines(httptools.HttpRequestParser(sink), sink, _AS_REQUEST, head[line.end() :])
    first = sink.first
    request = Request(method, target, 11 if minor != b"0" else 10, sink.fields, first)
    if len(first) != len(sink.fields) and len(request.all(b"host")) > 1:
        raise ProtocolError("a request with several Host fields")  # RFC 9112 section 3.2
    return request


def parse_response(head: bytes) -> Response:
    """Parse the head of a response, which ends with its first empty line. Raise ProtocolError."""
    line = _STATUS_LINE(head)
    if line is None:
        raise ProtocolError(f"malformed status line {head[:64]!r}")
    minor, status, reason = line.groups()
    sink = _Sink()
    parser = httptools.HttpResponseParser(sink)
    # A length beside a transfer coding is told apart by `response_body`, which drops the length.
    parser.set_dangerous_leniencies(lenient_chunked_length=True)
    _parse_lines(parser, sink, _AS_RESPONSE, head[line.end() :])
    return Response(int(status), reason or b"", 11 if minor != b"0" else 10, sink.fields, sink.first)


class HeadReader:
    """Finds the end of one head in what arrives.

    Raises at once what can no longer become a head, so that who speaks something else does not keep the reader waiting.
    """

    __slots__ = ("_held", "_limit", "_response", "rest")

    def __init__(self, *, response: bool = False, limit: int = 0) -> None:
        self._response = response
        self._limit = limit or (MAX_RESPONSE_HEAD if response else MAX_HEAD)
        self._held = bytearray()
        self.rest = b""
        """What came after the head."""

    @property
    def started(self) -> bool:
        """Whether a part of a head has come."""
        return bool(self._held)

    def feed(self, data: bytes) -> bytes | None:
        """Return the head once `data` completes it, None before. Raise ProtocolError, HeadTooLarge."""
        held = self._held
        if not held and not data.startswith((b"\r", b"\n")):
            end = data.find(END) + 4
            if 4 <= end <= self._limit:
                self.rest = data[end:]
                return data[:end]
        known = len(held)
        held += data
        if not self._response:
            while held.startswith(b"\r\n"):  # empty lines before a request (RFC 9112 section 2.2)
                del held[:2]
                known = 0
        found = held.find(END, max(0, known - 3))
        if (len(held) if found < 0 else found + 4) > self._limit:
            raise HeadTooLarge(f"an HTTP head of more than {self._limit} bytes")
        if found < 0:
            self._reject_hopeless(known)
            return None
        head = bytes(held[: found + 4])
        self.rest = bytes(held[found + 4 :])
        held.clear()
        return head

    def _reject_hopeless(self, known: int) -> None:
        held = self._held
        if self._response:
            hopeless = not b"HTTP/1.".startswith(held[:7])
        else:
            hopeless = bool(held) and held != b"\r" and _FIELD_NAME(held[:1]) is None
        position = known
        while not hopeless and (position := held.find(b"\n", position)) >= 0:
            hopeless = position == 0 or held[position - 1] != 13
            position += 1
        if hopeless:
            raise ProtocolError(f"not HTTP/1: {bytes(held[:32])!r}")


# ---- targets ------------------------------------------------------------------------------------
_AUTHORITY = re.compile(rb"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z._~!$&'()*+,;=-]*))(?::([0-9]*))?").fullmatch
_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)").match


@lru_cache(maxsize=4096)
def parse_authority(authority: bytes, default_port: int) -> Endpoint:
    """Parse `host`, `host:port` or `[v6]:port` (RFC 3986 section 3.2 without user information).

    The host may be empty, and so may the port, for which `default_port` stands in. Raise ProtocolError.
    """
    found = _AUTHORITY(authority)
    if found is None:
        raise ProtocolError(f"{authority[:64]!r} is not an authority such as example.com:80")
    literal, name, port_text = found.groups()
    port = default_port
    if port_text and (len(port_text) > 5 or (port := int(port_text)) > 65535):
        raise ProtocolError(f"{authority[:64]!r} has no port between 0 and 65535")
    if literal is not None:
        ip = parse_ip(literal.decode("ascii"))
        if ip is None or b":" not in literal:
            raise ProtocolError(f"{authority[:64]!r} has no IPv6 address in its brackets")
        return Endpoint(str(ip), port)
    if len(name) > MAX_NAME:
        raise ProtocolError(f"a host name of {len(name)} bytes")
    return Endpoint(name.decode("ascii"), port)


def format_authority(target: Endpoint | None) -> bytes:
    """Return `host:port` for a request line, b"" for None. Raise ProtocolError for a name that no URL can hold.

    Names come from peers, so anything that could end the line is refused here. International names become ASCII.
    """
    if target is None:
        return b""
    host = target.host
    if ":" in host:
        if parse_ip(host) is None:
            raise ProtocolError(f"{host[:64]!r} is not an IPv6 address")
        return f"[{host}]:{target.port}".encode("ascii")
    try:
        name = host.encode("ascii") if host.isascii() else host.encode("idna")
    except UnicodeError as exc:
        raise ProtocolError(f"{host[:64]!r} is not a host name") from exc
    if len(name) > MAX_NAME or _AUTHORITY(name) is None or b"[" in name:
        raise ProtocolError(f"{host[:64]!r} is not a host name")
    return b"%b:%d" % (name, target.port)


def split_absolute(target: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Return (scheme in lower case, authority without user information, origin form) of an absolute-form target.

    The origin form is never empty; a fragment is dropped. None for any other form (RFC 9112 section 3.2).
    """
    found = _ABSOLUTE(target)
    if found is None:
        return None
    scheme, authority, path = found.groups()
    if not path.startswith(b"/"):
        path = b"/" + path
    return scheme.lower(), authority.rpartition(b"@")[2], path


# ---- writing ------------------------------------------------------------------------------------
def head_bytes(start_line: bytes, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a head; `start_line` comes without its CRLF. Names and values are written as they are."""
    return b"".join((start_line, b"\r\n", *[b"%b: %b\r\n" % field for field in fields], b"\r\n"))


def field_problem(name: str, value: str) -> str:
    """Return what is wrong with a field that a user configured, "" if it can be written."""
    try:
        raw_name, raw_value = name.encode("ascii"), value.encode("latin-1")
    except UnicodeError:
        return f"{name!r}: a header takes ASCII in its name and ISO 8859-1 in its value"
    if _FIELD_NAME(raw_name) is None:
        return f"{name!r} is not a header name"
    if _FIELD_VALUE(raw_value) is None:
        return f"the value of {name!r} has control characters"
    return ""


def _canonical(name: bytes) -> bytes:
    return b"-".join([part.capitalize() for part in name.split(b"-")])


_known_canonical: Final = lru_cache(maxsize=2048)(_canonical)


def canonical(name: bytes) -> bytes:
    """Return `name` as Go writes header names: Each-Word-Capitalised."""
    return _known_canonical(name) if len(name) <= 64 else _canonical(name)


_GO_REASONS: Final = {
    413: "Request Entity Too Large",
    414: "Request URI Too Long",
    416: "Requested Range Not Satisfiable",
    418: "I'm a teapot",
    422: "Unprocessable Entity",
}
_REASONS: Final = {status.value: status.phrase for status in HTTPStatus} | _GO_REASONS


def reason_of(status: int) -> str:
    """Return the reason phrase that Go writes for `status`."""
    return _REASONS.get(status) or f"status code {status}"


# ---- bodies -------------------------------------------------------------------------------------
class Body:
    """A body as it arrives.

    done       the end has been seen
    rest       what came after the end
    chunked    its end is told by the chunks themselves
    length     bytes in all where that was announced, None otherwise
    trailers   fields after a chunked body, valid when done
    """

    __slots__ = ("chunked", "done", "length", "rest", "trailers")

    def __init__(self, *, chunked: bool = False, length: int | None = None) -> None:
        self.chunked = chunked
        self.length = length
        self.done = False
        self.rest = b""
        self.trailers: Fields = []

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`, which may be b"". Raise ProtocolError. Not to be called when done."""
        raise AssertionError("abstract")

    def rechunk(self, data: bytes) -> bytes:
        """Return the payload in `data` as one chunk, b"" if there is none. Raise as `feed` does."""
        return encode_chunk(self.feed(data))

    def end(self) -> None:
        """Take note of the end of the stream. Raise EndOfStream when the body is not complete."""
        if not self.done:
            raise EndOfStream("the body ends before its end")


class FixedBody(Body):
    """A body of `length` bytes, at least 1."""

    __slots__ = ("left",)

    def __init__(self, length: int) -> None:
        super().__init__(length=length)
        self.left = length

    def feed(self, data: bytes) -> bytes:
        size = len(data)
        if size < self.left:
            self.left -= size
            return data
        self.done = True
        if size > self.left:
            self.rest = data[self.left :]
            data = data[: self.left]
        self.left = 0
        return data


class OpenBody(Body):
    """A body that ends with the stream: responses only."""

    __slots__ = ()

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> None:
        self.done = True


_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?").fullmatch


class ChunkedBody(Body):
    """A chunked body (RFC 9112 section 7.1); extensions are read over.

        SIZE [; extensions] CRLF  DATA CRLF  ...  0 [; extensions] CRLF  trailer fields  CRLF

    Lines end with CRLF only. A peer that spends far more on lines than on data is refused.
    """

    __slots__ = ("_excess", "_held", "_left", "_state")

    _SIZE, _DATA, _DATA_END, _TRAILER = range(4)

    _MAX_EXCESS = 16384
    """Bytes of lines beyond 16 and twice the data of each chunk (Go's measure)."""

    def __init__(self) -> None:
        super().__init__(chunked=True)
        self._state = self._SIZE
        self._held = b""
        self._left = 0
        self._excess = 0

    def feed(self, data: bytes) -> bytes:
        pieces = self._pieces(data)
        return pieces[0] if len(pieces) == 1 and isinstance(pieces[0], bytes) else b"".join(pieces)

    def rechunk(self, data: bytes) -> bytes:
        pieces = self._pieces(data)
        size = sum(map(len, pieces))
        return b"".join((b"%x\r\n" % size, *pieces, b"\r\n")) if size else b""

    def _pieces(self, data: bytes) -> list[bytes | memoryview]:
        """Return the payload in `data`, uncopied."""
        if self._held:
            data = self._held + data
            self._held = b""
        size = len(data)
        if self._state == self._DATA and size <= self._left:
            self._left -= size
            if not self._left:
                self._state = self._DATA_END
            return [data]
        view = memoryview(data)
        pieces: list[bytes | memoryview] = []
        position = 0
        while position < size and not self.done:
            state = self._state
            if state == self._DATA:
                end = min(position + self._left, size)
                pieces.append(view[position:end])
                self._left -= end - position
                position = end
                if not self._left:
                    self._state = self._DATA_END
            elif state == self._DATA_END:
                found = data[position : position + 2]
                if found != b"\r\n":
                    if found == b"\r":
                        self._held = found
                        break
                    raise ProtocolError(f"a chunk is followed by {found!r}")
                position += 2
                self._state = self._SIZE
            elif state == self._SIZE:
                end = data.find(b"\r\n", position, position + MAX_CHUNK_LINE + 2)
                if end < 0:
                    self._hold(data, position, MAX_CHUNK_LINE, "chunk size line")
                    break
                self._begin(data[position:end])
                position = end + 2
            else:
                position = self._trailer(data, position)
                if position < 0:
                    break
        if self.done and position < size:
            self.rest = data[position:]
        return pieces

    def _hold(self, data: bytes, position: int, limit: int, what: str) -> None:
        if len(data) - position > limit:
            raise ProtocolError(f"a {what} of more than {limit} bytes")
        self._held = data[position:] if position else data

    def _begin(self, line: bytes) -> None:
        found = _CHUNK_LINE(line)
        if found is None:
            raise ProtocolError(f"malformed chunk size {line[:32]!r}")
        self._left = int(found[1], 16)
        self._excess = max(0, self._excess + len(line) + 2 - 16 - 2 * self._left)
        if self._excess > self._MAX_EXCESS:
            raise ProtocolError("chunks with more extensions than data")
        self._state = self._DATA if self._left else self._TRAILER

    def _trailer(self, data: bytes, position: int) -> int:
        """Take the trailer section; return where it ends, -1 if it has not come in full."""
        if data.startswith(b"\r\n", position):
            self.done = True
            return position + 2
        end = data.find(END, position, position + MAX_TRAILER + 4)
        if end < 0:
            self._hold(data, position, MAX_TRAILER, "trailer section")
            return -1
        sink = _Sink()
        _parse_lines(httptools.HttpRequestParser(sink), sink, _AS_REQUEST, data[position : end + 4])
        self.trailers = [field for field in sink.fields if field[0].lower() not in _NOT_IN_TRAILERS]
        self.done = True
        return end + 4


_NOT_IN_TRAILERS: Final = frozenset(
    (
        b"authorization",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"host",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Fields that mean something for framing, routing or access; as trailers they are dropped (RFC 9110 section 6.5.1)."""


def is_chunked(head: Head) -> bool:
    """Whether the only transfer coding is `chunked`; False without any. Raise ProtocolError for all others."""
    if b"transfer-encoding" not in head.first:
        return False
    codings = head.all(b"transfer-encoding")
    if head.version < 11 or len(codings) > 1 or codings[0].lower() != b"chunked":
        raise ProtocolError(f"transfer coding {b', '.join(codings)[:64]!r} is not understood")
    return True


def content_length(head: Head) -> int | None:
    """Return the length that `head` announces, None without one. Raise ProtocolError."""
    text = head.first.get(b"content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        raise ProtocolError(f"malformed Content-Length {text[:32]!r}")
    return int(text)


def request_body(request: Request) -> Body | None:
    """Return what takes the body of `request`, None if it has none. Raise ProtocolError for ambiguous framing.

    RFC 9112 section 6.3: a length beside a transfer coding, or a coding in HTTP/1.0, is how requests are smuggled.
    """
    if is_chunked(request):
        if b"content-length" in request.first:
            raise ProtocolError("a request with Content-Length beside Transfer-Encoding")
        return ChunkedBody()
    length = content_length(request)
    return FixedBody(length) if length else None


def response_body(response: Response, method: bytes) -> Body | None:
    """Return what takes the body of the answer to a `method` request, None if it has none. Raise ProtocolError.

    A length beside `chunked` does not count; the writer must not pass it on, nor use the connection again.
    """
    status = response.status
    chunked, length = is_chunked(response), content_length(response)
    if method == b"HEAD" or status < 200 or status in (204, 304):
        return None
    if chunked:
        return ChunkedBody()
    if length is None:
        return OpenBody()
    return FixedBody(length) if length else None


def encode_chunk(data: bytes) -> bytes:
    """Return `data` as one chunk, b"" for b"" (an empty chunk would be the end)."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def encode_end(trailers: Fields) -> bytes:
    """Return the end of a chunked body."""
    return b"".join((LAST_CHUNK, *[b"%b: %b\r\n" % field for field in trailers], b"\r\n"))
