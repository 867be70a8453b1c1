"""What the HTTP proxy protocol says, in bytes: replies, credentials, CONNECT, and the heads of forwarded messages.

Heads are written as GOST's are, that is as Go's net/http does: `Host`, `User-Agent`, framing, then the other fields by
canonical name. Origins and clients see the same bytes behind either program. What RFC 9110 section 7.6.1 wants removed
is removed, which GOST does only in part.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator, Mapping
from typing import Final

from ...core.address import Endpoint
from ...core.errors import ProtocolError, UpstreamRejected
from ...core.sansio import Handshake, ReadUntil, Send
from ...wire.gost_target import decode_target
from ...wire.http1 import (
    END,
    MAX_RESPONSE_HEAD,
    Body,
    Fields,
    Head,
    Request,
    Response,
    canonical,
    format_authority,
    head_bytes,
    parse_authority,
    parse_response,
    reason_of,
    split_absolute,
)

AGENT: Final = "gost/3.0"
USER_AGENT: Final = b"Go-http-client/1.1"
"""What GOST's requests say; forwarded requests without one get it too."""

DEFAULT_PORT: Final = 80
"""Of targets without a port. # GOST: for CONNECT as well."""


# ---- replies of the proxy -----------------------------------------------------------------------
def _fields(header: Mapping[str, str], **more: str) -> Fields:
    """Return configured fields, sorted; `more` gives those that are not configured, with _ for -."""
    found = {name.replace("_", "-"): value for name, value in more.items()}
    found.update((canonical(name.encode("ascii")).decode("ascii"), value) for name, value in header.items())
    return sorted((name.encode("ascii"), value.encode("latin-1")) for name, value in found.items())


def status_line(status: int, version: int = 11) -> bytes:
    """Return the start line of an answer of our own."""
    return f"HTTP/1.{version - 10} {status} {reason_of(status)}".encode("latin-1")


class Replies:
    """Every answer that the proxy itself gives, made once.

    established   CONNECT succeeded
    bad_request   the request cannot be served by a proxy; `too_large` is the same for its size
    udp           an association is open; `udp_disabled`: there are none here
    """

    def __init__(self, agent: str, realm: str, header: Mapping[str, str]) -> None:
        close = (b"Connection", b"close")
        self.established = head_bytes(
            b"HTTP/1.1 200 Connection established", [(b"Proxy-Agent", agent.encode("latin-1"))]
        )
        self.bad_request = head_bytes(status_line(400), [close])
        self.too_large = head_bytes(status_line(431), [close])
        # GOST: the configured fields go on refusals and on the UDP answers, on the latter with the agent's name.
        self._refusal_fields = [close, *_fields(header, Proxy_Agent=agent)]
        self._refusals: dict[int, bytes] = {}
        udp_fields = [*(self._refusal_fields[1:] if header else ()), (b"Content-Length", b"0")]
        self.udp = head_bytes(status_line(200), udp_fields)
        self.udp_disabled = head_bytes(status_line(403), udp_fields)
        quoted = realm.replace("\\", "\\\\").replace('"', '\\"')
        challenge = (b"Proxy-Authenticate", f'Basic realm="{quoted}"'.encode("latin-1"))
        self._challenge = head_bytes(status_line(407), [close, challenge])
        self._challenge_kept = head_bytes(status_line(407), [close, challenge, (b"Proxy-Connection", b"close")])

    def refusal(self, status: int) -> bytes:
        """Return the answer to a CONNECT that failed."""
        reply = self._refusals.get(status)
        if reply is None:
            reply = self._refusals[status] = head_bytes(status_line(status), self._refusal_fields)
        return reply

    def challenge(self, request: Request) -> bytes:
        """Return the answer to missing or wrong credentials."""
        kept = request.get(b"proxy-connection").lower() == b"keep-alive"
        return self._challenge_kept if kept else self._challenge


def empty_answer(status: int, version: int) -> bytes:
    """Return the answer to a forwarded request that failed."""
    return head_bytes(status_line(status, version), [(b"Content-Length", b"0")])


def decoy_status(status: int) -> bytes:
    """Return the answer of the probe resistance `code`."""
    return head_bytes(status_line(status), [(b"Connection", b"close")])


# ---- what a request wants -----------------------------------------------------------------------
def credentials(request: Request) -> tuple[str, str]:
    """Return (user, password) of `Proxy-Authorization: Basic`, two empty strings without any (RFC 7617)."""
    scheme, _, encoded = request.get(b"proxy-authorization").partition(b" ")
    if scheme.lower() != b"basic":
        return "", ""
    try:
        plain = base64.b64decode(encoded.strip(b" "), validate=True)
    except binascii.Error:
        return "", ""
    user, colon, password = plain.decode("utf-8", "replace").partition(":")
    return (user, password) if colon else ("", "")


def wants_udp(request: Request) -> bool:
    """Whether the request asks for an association (GOST: x/handler/http/udp.go)."""
    return request.get(b"x-gost-protocol") == b"udp"


def asked_host(request: Request) -> str:
    """Return the host in the request's target, in lower case, "" if there is none."""
    authority = request.target
    if request.method != b"CONNECT":
        absolute = split_absolute(request.target)
        authority = absolute[1] if absolute is not None else b""
    try:
        return parse_authority(authority, DEFAULT_PORT).host.lower()
    except ProtocolError:
        return ""


def hidden_target(request: Request) -> bytes:
    """Return what Gost-Target or X-Gost-Target (which wins) stand for, b"" without a valid one."""
    found = b""
    first = request.first
    for name in (b"gost-target", b"x-gost-target"):
        if name in first and (name_and_port := decode_target(first[name])):
            try:
                parse_authority(name_and_port, DEFAULT_PORT)
            except ProtocolError:
                continue
            found = name_and_port
    return found


def connect_target(request: Request) -> Endpoint:
    """Return where a CONNECT, or a request for an association, goes; an empty host if it does not say.

    Raise ProtocolError.
    """
    if request.method == b"CONNECT":
        authority = request.target or request.get(b"host")
    else:
        absolute = split_absolute(request.target)
        authority = absolute[1] if absolute is not None else request.get(b"host")
    return parse_authority(hidden_target(request) or authority.rpartition(b"@")[2], DEFAULT_PORT)


def forward_target(request: Request) -> tuple[bytes, bytes] | None:
    """Return (authority, origin form) of a request to be forwarded.

    None for one that does not say where to (GOST answers 503, as for an origin that is down). Raise ProtocolError for
    schemes other than http and for requests that no proxy can serve.
    """
    absolute = split_absolute(request.target)
    hidden = hidden_target(request)
    if absolute is not None:
        scheme, authority, path = absolute
        if scheme != b"http":
            raise ProtocolError(f"scheme {scheme[:16]!r} is not forwarded")
        if request.method == b"OPTIONS" and request.target.count(b"/") == 2 and path == b"/":
            path = b"*"  # RFC 9112 section 3.2.4
        parse_authority(authority, DEFAULT_PORT)
    else:
        authority, path = b"", request.target
        host = parse_authority(request.get(b"host"), DEFAULT_PORT).host
        if not host or not (path.startswith(b"/") or path == b"*"):
            raise ProtocolError(f"target {path[:64]!r} is not for a proxy")
    authority = hidden or authority
    if not authority or authority.startswith(b":"):
        return None
    return authority, path


# ---- heads of forwarded messages ----------------------------------------------------------------
_HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Fields that are written anew or end here (RFC 9110 section 7.6.1)."""

_NOT_FORWARDED: Final = _HOP_BY_HOP | {
    b"gost-record",
    b"gost-target",
    b"host",
    b"proxy-authorization",
    b"user-agent",
    b"x-gost-target",
}

_EMPTY_BODY_SAID: Final = frozenset((b"PATCH", b"POST", b"PUT"))
"""Methods whose requests say `Content-Length: 0` when they have no body (RFC 9110 section 8.6)."""


def upgrade_of(head: Head) -> bytes:
    """Return the value of Upgrade where Connection names it (RFC 9110 section 7.8), b"" otherwise."""
    return head.get(b"upgrade") if head.version > 10 and b"upgrade" in head.tokens(b"connection") else b""


def _end_to_end(head: Head, dropped: frozenset[bytes]) -> Fields:
    """Return the fields that go on, with canonical names."""
    if b"connection" in head.first:
        dropped = dropped | frozenset(head.tokens(b"connection"))
    return [(canonical(name), value) for name, value in head.fields if name.lower() not in dropped]


def _by_name(field: tuple[bytes, bytes]) -> bytes:
    return field[0]


def _framing(body: Body | None) -> Fields:
    if body is None:
        return []
    if body.chunked:
        return [(b"Transfer-Encoding", b"chunked")]
    return [(b"Content-Length", b"%d" % body.length)] if body.length is not None else []


def upstream_request(
    request: Request, host: bytes, path: bytes, body: Body | None, *, close: bool, gzip: bool = False
) -> bytes:
    """Return the head in which `request` goes to the origin.

    close    the connection is not to be used again; not said where a protocol switch is asked for
    gzip     ask for gzip on our own account
    """
    lines: Fields = [(b"Host", host)]
    agent = request.first.get(b"user-agent", USER_AGENT)
    if agent:
        lines.append((b"User-Agent", agent))
    lines += _framing(body)
    if body is None and request.method in _EMPTY_BODY_SAID:
        lines.append((b"Content-Length", b"0"))
    if body is not None and body.chunked and b"trailer" in request.first:
        lines.append((b"Trailer", b", ".join(request.all(b"trailer"))))
    rest = _end_to_end(request, _NOT_FORWARDED)
    if b"trailers" in request.tokens(b"te"):
        rest.append((b"Te", b"trailers"))
    upgrade = upgrade_of(request)
    if upgrade:
        rest.append((b"Connection", b"Upgrade"))
        rest.append((b"Upgrade", upgrade))
    rest.sort(key=_by_name)
    lines += rest
    if gzip:
        lines.append((b"Accept-Encoding", b"gzip"))
    if close and not upgrade:
        lines.append((b"Connection", b"close"))
    return head_bytes(b"%b %b HTTP/1.1" % (request.method, path), lines)


def decoy_request(request: Request) -> bytes:
    """Return the head in which a prober's request goes to the decoy of the probe resistance `host`, unchanged but for
    its form; what follows it is passed on as it is."""
    absolute = split_absolute(request.target)
    host, path = (absolute[1], absolute[2]) if absolute is not None else (request.get(b"host"), request.target)
    if request.method == b"CONNECT":
        host = request.target or host
        path = host
    framing = [(canonical(name), value) for name, value in request.fields if name.lower() in _FRAMING]
    rest = [(canonical(name), value) for name, value in request.fields if name.lower() not in _FRAMING | _START]
    agent = request.first.get(b"user-agent", USER_AGENT)
    start = [(b"Host", host), *([(b"User-Agent", agent)] if agent else ())]
    return head_bytes(b"%b %b HTTP/1.1" % (request.method, path), [*start, *framing, *sorted(rest, key=_by_name)])


_FRAMING: Final = frozenset((b"content-length", b"transfer-encoding"))
_START: Final = frozenset((b"host", b"user-agent"))


def client_response(
    response: Response,
    version: int,
    *,
    close: bool,
    chunked: bool = False,
    length: int | None = None,
    decoded: bool = False,
    more: Fields | None = None,
) -> bytes:
    """Return the head in which `response` goes to a client that speaks HTTP/1.`version - 10`.

    close      the connection ends behind the response
    chunked, length    how the body is framed; neither: by the end of the stream, or there is none
    decoded    the body has lost its content coding
    more       further fields
    """
    lines: Fields = [(b"Connection", b"close")] if close else []
    if chunked:
        lines.append((b"Transfer-Encoding", b"chunked"))
        if b"trailer" in response.first:
            lines.append((b"Trailer", b", ".join(response.all(b"trailer"))))
    elif length:
        lines.append((b"Content-Length", b"%d" % length))
    rest = _end_to_end(response, _DECODED if decoded else _HOP_BY_HOP)
    if version == 10 and not close:
        rest.append((b"Connection", b"keep-alive"))  # GOST: also to a client that did not ask for it
    if more:
        rest += more
    rest.sort(key=_by_name)
    lines += rest
    if length == 0 and not chunked:
        lines.append((b"Content-Length", b"0"))
    return head_bytes(b"HTTP/1.%d %d %b" % (version - 10, response.status, response.reason), lines)


_DECODED: Final = _HOP_BY_HOP | {b"content-encoding"}


def interim_response(response: Response) -> bytes:
    """Return the head of a 1xx response for the client; with 101 the fields of the switch stay in it."""
    fields = _end_to_end(response, _HOP_BY_HOP)
    if response.status == 101:
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", response.get(b"upgrade"))]
    fields.sort(key=_by_name)
    return head_bytes(b"HTTP/1.1 %d %b" % (response.status, response.reason), fields)


class Gunzip:
    """Takes gzip off a body, in pieces of at most PIECE bytes, so that a bomb only costs its receiver."""

    PIECE = 65536

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(31)
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` holds. Raise ProtocolError when it is not gzip."""
        while data:
            if self._stream.eof:  # several members in a row are one body (RFC 1952 section 2.2)
                self._stream = zlib.decompressobj(31)
            self._begun = True
            piece = self._step(data)
            data = self._stream.unconsumed_tail or self._stream.unused_data
            if piece:
                yield piece
        while not self._stream.eof and (piece := self._step(b"")):
            yield piece

    def _step(self, data: bytes) -> bytes:
        try:
            return self._stream.decompress(data, self.PIECE)
        except zlib.error as exc:
            raise ProtocolError(f"a gzip body: {exc}") from exc

    def end(self) -> None:
        """Raise ProtocolError when the body is cut off."""
        if self._begun and not self._stream.eof:
            raise ProtocolError("a gzip body ends before its end")


# ---- the client side ----------------------------------------------------------------------------
class ConnectRequest:
    """The CONNECT requests of one node; all that does not depend on the target is made once."""

    __slots__ = ("_agent", "_tcp", "_udp")

    def __init__(self, header: Mapping[str, str], username: str = "", password: str = "") -> None:
        fields = dict(_fields(header))
        agent = fields.pop(b"User-Agent", USER_AGENT)
        for name in (b"Host", b"Content-Length", b"Transfer-Encoding", b"Trailer"):
            fields.pop(name, None)
        fields[b"Proxy-Connection"] = b"keep-alive"
        if username or password:
            secret = base64.b64encode(f"{username}:{password}".encode())
            fields[b"Proxy-Authorization"] = b"Basic " + secret
        self._agent = b"User-Agent: %b\r\n" % agent if agent else b""
        self._tcp = self._lines(fields)
        self._udp = self._lines(fields | {b"X-Gost-Protocol": b"udp"})

    def _lines(self, fields: dict[bytes, bytes]) -> bytes:
        return self._agent + b"".join(b"%b: %b\r\n" % field for field in sorted(fields.items())) + b"\r\n"

    def to(self, target: Endpoint | None, *, udp: bool = False) -> bytes:
        """Return the request for `target`; None asks for an association with any peer. Raise ProtocolError."""
        authority = format_authority(target)
        lines = self._udp if udp else self._tcp
        return b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b" % (authority, authority, lines)


def connect(request: bytes) -> Handshake[Response]:
    """Send a CONNECT request and read the answer. Raise UpstreamRejected unless it is 200, ProtocolError."""
    yield Send(request)
    for _ in range(_MOST_INTERIM):
        response = parse_response((yield ReadUntil(END, MAX_RESPONSE_HEAD)))
        if response.status >= 200:
            break
    if response.status != 200:
        shown = response.reason[:64].decode("latin-1")
        hint = "the credentials of the node are missing or wrong" if response.status == 407 else ""
        raise UpstreamRejected(f"the proxy answered {response.status} {shown}", response.status, hint=hint)
    return response


_MOST_INTERIM: Final = 16
"""1xx answers taken before the final one: none are useful here, a server may still send some."""
