"""The proxy's words, without I/O: replies, credentials, targets, heads that are passed on, CONNECT of the client."""

from __future__ import annotations

import base64
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.errors import EndOfStream, ProtocolError, UpstreamRejected
from gostnet.core.sansio import run_on_bytes
from gostnet.protocols.http.codec import (
    ConnectRequest,
    Gunzip,
    Replies,
    asked_host,
    client_response,
    connect,
    connect_target,
    credentials,
    decoy_request,
    empty_answer,
    forward_target,
    interim_response,
    upstream_request,
)
from gostnet.wire.gost_target import encode_target
from gostnet.wire.http1 import Request, Response, parse_request, parse_response, request_body


def request(line: bytes, *lines: bytes) -> Request:
    return parse_request(b"\r\n".join((line, *lines, b"", b"")))


def response(*lines: bytes, start: bytes = b"HTTP/1.1 200 OK") -> Response:
    return parse_response(b"\r\n".join((start, *lines, b"", b"")))


GET = b"GET http://a.test/x HTTP/1.1"


# ---- replies ------------------------------------------------------------------------------------
def test_replies_without_configured_fields() -> None:
    replies = Replies("gost/3.0", "gost", {})
    assert replies.established == b"HTTP/1.1 200 Connection established\r\nProxy-Agent: gost/3.0\r\n\r\n"
    assert replies.refusal(403) == b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nProxy-Agent: gost/3.0\r\n\r\n"
    assert replies.bad_request == b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
    assert replies.udp == b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    assert replies.udp_disabled == b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    assert empty_answer(503, 10) == b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


def test_configured_fields_go_on_refusals_and_udp_answers_only() -> None:
    """As the real gost writes them: sorted, the agent's name among them."""
    replies = Replies("me/1", 'a"b\\c', {"X-A": "1", "x-b-c": "2"})
    more = b"Proxy-Agent: me/1\r\nX-A: 1\r\nX-B-C: 2\r\n"
    assert replies.refusal(503) == b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n" + more + b"\r\n"
    assert replies.udp == b"HTTP/1.1 200 OK\r\n" + more + b"Content-Length: 0\r\n\r\n"
    assert replies.udp_disabled == b"HTTP/1.1 403 Forbidden\r\n" + more + b"Content-Length: 0\r\n\r\n"
    assert replies.established == b"HTTP/1.1 200 Connection established\r\nProxy-Agent: me/1\r\n\r\n"
    assert b"X-A" not in replies.bad_request
    challenge = replies.challenge(request(GET))
    assert challenge.endswith(b'\r\nProxy-Authenticate: Basic realm="a\\"b\\\\c"\r\n\r\n')
    assert b"X-A" not in challenge


def test_a_configured_agent_replaces_ours_on_refusals() -> None:
    replies = Replies("gost/3.0", "gost", {"proxy-agent": "other"})
    assert replies.refusal(503).count(b"Proxy-Agent: other\r\n") == 1
    assert b"gost/3.0" not in replies.refusal(503)


# ---- what requests want -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"Basic dXNlcjpwYXNz", ("user", "pass")),
        (b"basic  dXNlcjpwYXNz", ("user", "pass")),
        (b"Basic " + base64.b64encode("ü:p:q".encode()), ("ü", "p:q")),
        (b"Basic " + base64.b64encode(b":"), ("", "")),
        (b"Basic " + base64.b64encode(b"user"), ("", "")),
        (b"Basic " + base64.b64encode(b"\xff:x"), ("\ufffd", "x")),
        (b"Basic dXNlcjpwYXNz!", ("", "")),
        (b"Basic dXNlcjpwYXN", ("", "")),
        (b"Bearer dXNlcjpwYXNz", ("", "")),
        (b"Basic", ("", "")),
        (b"dXNlcjpwYXNz", ("", "")),
    ],
)
def test_credentials(value: bytes, found: tuple[str, str]) -> None:
    assert credentials(request(GET, b"Proxy-Authorization: " + value)) == found


def test_no_credentials() -> None:
    assert credentials(request(GET)) == ("", "")


HIDDEN = encode_target(b"real.test:8443")


@pytest.mark.parametrize(
    ("line", "lines", "target"),
    [
        (b"CONNECT a.test:443 HTTP/1.1", (), Endpoint("a.test", 443)),
        (b"CONNECT a.test HTTP/1.1", (), Endpoint("a.test", 80)),
        (b"CONNECT u:p@a.test:1 HTTP/1.1", (), Endpoint("a.test", 1)),
        (b"CONNECT [::1]:2 HTTP/1.1", (b"Host: other",), Endpoint("::1", 2)),
        (b"CONNECT  HTTP/1.1", (b"Host: ",), Endpoint("", 80)),
        (b"CONNECT  HTTP/1.1", (b"Host: b.test:3",), Endpoint("b.test", 3)),
        (b"CONNECT a.test:443 HTTP/1.1", (b"Gost-Target: " + HIDDEN,), Endpoint("real.test", 8443)),
        (b"CONNECT a.test:443 HTTP/1.1", (b"Gost-Target: nonsense",), Endpoint("a.test", 443)),
        (
            b"CONNECT a.test:443 HTTP/1.1",
            (b"X-Gost-Target: " + encode_target(b"x.test"), b"Gost-Target: " + HIDDEN),
            Endpoint("x.test", 80),
        ),
        (b"CONNECT a.test:443 HTTP/1.1", (b"Gost-Target: " + encode_target(b"a b"),), Endpoint("a.test", 443)),
        (b"POST http://a.test/ HTTP/1.1", (), Endpoint("a.test", 80)),
        (b"POST / HTTP/1.1", (b"Host: c.test:4",), Endpoint("c.test", 4)),
    ],
)
def test_targets_of_connect_and_udp(line: bytes, lines: tuple[bytes, ...], target: Endpoint) -> None:
    assert connect_target(request(line, *lines)) == target


@pytest.mark.parametrize("target", [b"/x", b"a:b", b"http://a.test/", b"a.test:65536", b"*"])
def test_targets_of_connect_that_are_refused(target: bytes) -> None:
    if target == b"*":
        assert connect_target(request(b"CONNECT * HTTP/1.1")).host == "*"  # a name that nobody has
        return
    with pytest.raises(ProtocolError):
        connect_target(request(b"CONNECT %b HTTP/1.1" % target))


@pytest.mark.parametrize(
    ("line", "lines", "place"),
    [
        (b"GET http://a.test:81/x?y HTTP/1.1", (b"Host: other",), (b"a.test:81", b"/x?y")),
        (b"GET HTTP://a.test HTTP/1.1", (), (b"a.test", b"/")),
        (b"OPTIONS http://a.test HTTP/1.1", (), (b"a.test", b"*")),
        (b"OPTIONS http://a.test/ HTTP/1.1", (), (b"a.test", b"/")),
        (b"GET http://front.test/x HTTP/1.1", (b"Gost-Target: " + HIDDEN,), (b"real.test:8443", b"/x")),
        (b"GET /x HTTP/1.1", (b"Host: front.test", b"Gost-Target: " + HIDDEN), (b"real.test:8443", b"/x")),
        (b"GET /x HTTP/1.1", (b"Host: a.test",), None),
        (b"OPTIONS * HTTP/1.1", (b"Host: a.test",), None),
        (b"GET http:///x HTTP/1.1", (b"Host: a.test",), None),
        (b"GET http://:80/x HTTP/1.1", (), None),
    ],
)
def test_targets_of_forwarded_requests(
    line: bytes, lines: tuple[bytes, ...], place: tuple[bytes, bytes] | None
) -> None:
    assert forward_target(request(line, *lines)) == place


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        (b"GET https://a.test/ HTTP/1.1", ()),
        (b"GET ftp://a.test/ HTTP/1.1", ()),
        (b"GET http://a b/ HTTP/1.1".replace(b" b", b"\xc3\xa4"), ()),
        (b"GET http://a.test:x/ HTTP/1.1", ()),
        (b"GET /x HTTP/1.1", ()),
        (b"GET /x HTTP/1.1", (b"Host: a/b",)),
        (b"GET x HTTP/1.1", (b"Host: a.test",)),
    ],
)
def test_requests_that_no_proxy_serves(line: bytes, lines: tuple[bytes, ...]) -> None:
    with pytest.raises(ProtocolError):
        forward_target(request(line, *lines))


@pytest.mark.parametrize(
    ("line", "host"),
    [
        (b"CONNECT A.test:1 HTTP/1.1", "a.test"),
        (b"GET http://B.test:2/x HTTP/1.1", "b.test"),
        (b"GET /x HTTP/1.1", ""),
        (b"CONNECT /x HTTP/1.1", ""),
    ],
)
def test_host_that_knocks(line: bytes, host: str) -> None:
    assert asked_host(request(line, b"Host: c.test")) == host


# ---- heads of forwarded messages ----------------------------------------------------------------
def forwarded(line: bytes, *lines: bytes, close: bool = True, zipped: bool = False) -> bytes:
    message = request(line, *lines)
    place = forward_target(message)
    assert place is not None
    return upstream_request(message, *place, request_body(message), close=close, gzip=zipped)


FROM_GOST = {
    "sorted, canonical, values in order": (
        (GET, b"accept: */*", b"Cookie: b", b"x-Z: 1", b"COOKIE: a", b"x-a: 3"),
        b"GET /x HTTP/1.1\r\nHost: a.test\r\nUser-Agent: Go-http-client/1.1\r\nAccept: */*\r\nCookie: b\r\n"
        b"Cookie: a\r\nX-A: 3\r\nX-Z: 1\r\nConnection: close\r\n\r\n",
    ),
    "own agent": (
        (GET, b"User-Agent: t", b"Proxy-Connection: keep-alive"),
        b"GET /x HTTP/1.1\r\nHost: a.test\r\nUser-Agent: t\r\nConnection: close\r\n\r\n",
    ),
    "empty agent": ((GET, b"User-Agent:"), b"GET /x HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"),
    "empty body": (
        (b"POST http://a.test/x HTTP/1.1",),
        b"POST /x HTTP/1.1\r\nHost: a.test\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 0\r\n"
        b"Connection: close\r\n\r\n",
    ),
    "no body": (
        (b"DELETE http://a.test?q HTTP/1.1",),
        b"DELETE /?q HTTP/1.1\r\nHost: a.test\r\nUser-Agent: Go-http-client/1.1\r\nConnection: close\r\n\r\n",
    ),
    "expectation, trailers wanted": (
        (b"POST http://a.test/x HTTP/1.1", b"Content-Length: 2", b"Expect: 100-continue", b"TE: trailers"),
        b"POST /x HTTP/1.1\r\nHost: a.test\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 2\r\n"
        b"Expect: 100-continue\r\nTe: trailers\r\nConnection: close\r\n\r\n",
    ),
    "chunks and trailers": (
        (b"POST http://a.test/x HTTP/1.1", b"Transfer-Encoding: Chunked", b"Trailer: X-T"),
        b"POST /x HTTP/1.1\r\nHost: a.test\r\nUser-Agent: Go-http-client/1.1\r\nTransfer-Encoding: chunked\r\n"
        b"Trailer: X-T\r\nConnection: close\r\n\r\n",
    ),
    "switch": (
        (GET, b"Connection: Upgrade", b"Upgrade: websocket"),
        b"GET /x HTTP/1.1\r\nHost: a.test\r\nUser-Agent: Go-http-client/1.1\r\nConnection: Upgrade\r\n"
        b"Upgrade: websocket\r\n\r\n",
    ),
}


@pytest.mark.parametrize(("lines", "expected"), FROM_GOST.values(), ids=FROM_GOST.keys())
def test_requests_go_out_as_gosts(lines: tuple[bytes, ...], expected: bytes) -> None:
    """The expectations were captured from gost 3.3.0."""
    assert forwarded(*lines) == expected


def test_what_belongs_to_the_hop_ends_here() -> None:
    head = forwarded(
        GET,
        b"Connection: keep-alive, X-Mine, content-length, Host",
        b"X-Mine: 1",
        b"Keep-Alive: timeout=5",
        b"Proxy-Authorization: Basic secret",
        b"Proxy-Connection: x",
        b"Gost-Record: off",
        b"Gost-Target: zzz",
        b"X-Gost-Target: zzz",
        b"TE: gzip;q=0.5, chunked",
        b"Upgrade: h2c",
        b"X-Other: 2",
        close=False,
    )
    assert head == b"GET /x HTTP/1.1\r\nHost: a.test\r\nUser-Agent: Go-http-client/1.1\r\nX-Other: 2\r\n\r\n"


def test_upgrade_is_not_for_http_1_0() -> None:
    lines = (b"Connection: Upgrade", b"Upgrade: websocket")
    assert b"Upgrade" not in forwarded(b"GET http://a.test/x HTTP/1.0", *lines)


def test_gzip_is_asked_for_before_the_close() -> None:
    assert forwarded(GET, zipped=True).endswith(b"\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n")


def test_decoy_gets_the_request_as_it_is() -> None:
    """As gost: origin form, `Host` and `User-Agent` first, nothing removed."""
    head = decoy_request(request(b"POST http://x.test/p HTTP/1.1", b"Host: y", b"b: 1", b"Content-Length: 3", b"A: 2"))
    assert head == (
        b"POST /p HTTP/1.1\r\nHost: x.test\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 3\r\n"
        b"A: 2\r\nB: 1\r\n\r\n"
    )
    head = decoy_request(request(b"CONNECT a.test:1 HTTP/1.1", b"Host: y", b"User-Agent:"))
    assert head == b"CONNECT a.test:1 HTTP/1.1\r\nHost: a.test:1\r\n\r\n"
    assert decoy_request(request(b"GET /x HTTP/1.1", b"Host: y")).startswith(b"GET /x HTTP/1.1\r\nHost: y\r\n")


def test_responses_go_out_as_gosts() -> None:
    """The expectations were captured from gost 3.3.0, but for the version, which is the proxy's own."""
    origin = response(b"Server: x", b"Connection: close", b"Content-Length: 2", b"age: 1", start=b"HTTP/1.1 200 Fine")
    assert client_response(origin, 11, close=True, length=2) == (
        b"HTTP/1.1 200 Fine\r\nConnection: close\r\nContent-Length: 2\r\nAge: 1\r\nServer: x\r\n\r\n"
    )
    assert client_response(response(b"B: 1", b"Content-Length: 0"), 11, close=False, length=0) == (
        b"HTTP/1.1 200 OK\r\nB: 1\r\nContent-Length: 0\r\n\r\n"
    )
    chunked = response(b"Server: x", b"Transfer-Encoding: chunked", b"Age: 1", b"Trailer: X-T")
    assert client_response(chunked, 11, close=False, chunked=True) == (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\nAge: 1\r\nServer: x\r\n\r\n"
    )
    assert client_response(response(b"Content-Length: 2", b"X: y"), 10, close=False, length=2) == (
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\nX: y\r\n\r\n"
    )
    assert client_response(response(b"X: y"), 10, close=True) == b"HTTP/1.0 200 OK\r\nConnection: close\r\nX: y\r\n\r\n"


def test_responses_lose_what_belongs_to_the_hop() -> None:
    origin = response(
        b"Connection: keep-alive, X-Mine",
        b"Keep-Alive: timeout=5",
        b"X-Mine: 1",
        b"Upgrade: h2c",
        b"Set-Cookie: b",
        b"Set-Cookie: a",
        b"Content-Encoding: gzip",
    )
    assert client_response(origin, 11, close=False, length=1) == (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Encoding: gzip\r\nSet-Cookie: b\r\nSet-Cookie: a\r\n\r\n"
    )
    assert b"gzip" not in client_response(origin, 11, close=False, chunked=True, decoded=True)


def test_interim_responses() -> None:
    assert interim_response(response(b"link: x", b"Connection: close", start=b"HTTP/1.1 103 Early Hints")) == (
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    )
    switch = response(b"Upgrade: websocket", b"Connection: Upgrade", b"A: b", start=b"HTTP/1.1 101 Switching")
    assert interim_response(switch) == (
        b"HTTP/1.1 101 Switching\r\nA: b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    )


# ---- gzip ---------------------------------------------------------------------------------------
@given(st.lists(st.binary(max_size=400), min_size=1, max_size=3), st.integers(1, 500))
def test_gzip_comes_off_however_it_is_cut(members: list[bytes], piece: int) -> None:
    data = b"".join(gzip.compress(member) for member in members)
    decoder = Gunzip()
    out = b"".join(part for start in range(0, len(data), piece) for part in decoder.feed(data[start : start + piece]))
    decoder.end()
    assert out == b"".join(members)


def test_a_bomb_comes_in_pieces() -> None:
    pieces = list(Gunzip().feed(gzip.compress(bytes(10_000_000))))
    assert sum(map(len, pieces)) == 10_000_000
    assert max(map(len, pieces)) <= Gunzip.PIECE


ZIPPED = gzip.compress(b"x" * 100, mtime=0)


@pytest.mark.parametrize(
    "data",
    [b"plain text", ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:], zlib.compress(b"x"), ZIPPED + b"xx"],
    ids=["plain", "checksum", "zlib", "garbage behind"],
)
def test_what_is_not_gzip_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(Gunzip().feed(data))


def test_gzip_cut_off_is_refused() -> None:
    decoder = Gunzip()
    list(decoder.feed(gzip.compress(b"x" * 100)[:-1]))
    with pytest.raises(ProtocolError):
        decoder.end()
    Gunzip().end()  # an empty body has no header either


# ---- the client side ----------------------------------------------------------------------------
def test_connect_requests() -> None:
    plain = ConnectRequest({})
    assert plain.to(Endpoint("::1", 80)) == (
        b"CONNECT [::1]:80 HTTP/1.1\r\nHost: [::1]:80\r\nUser-Agent: Go-http-client/1.1\r\n"
        b"Proxy-Connection: keep-alive\r\n\r\n"
    )
    full = ConnectRequest(
        {"x-a": "1", "user-agent": "me", "Host": "no", "content-length": "3", "Accept": "b"}, "user", "pass"
    )
    assert full.to(Endpoint("a.test", 1), udp=True) == (
        b"CONNECT a.test:1 HTTP/1.1\r\nHost: a.test:1\r\nUser-Agent: me\r\nAccept: b\r\n"
        b"Proxy-Authorization: Basic dXNlcjpwYXNz\r\nProxy-Connection: keep-alive\r\nX-A: 1\r\n"
        b"X-Gost-Protocol: udp\r\n\r\n"
    )
    assert b"X-Gost-Protocol" not in full.to(Endpoint("a.test", 1))
    assert b"User-Agent" not in ConnectRequest({"User-Agent": ""}).to(None)


def test_names_cannot_break_out_of_the_request() -> None:
    with pytest.raises(ProtocolError):
        ConnectRequest({}).to(Endpoint("a\r\nX-Evil: 1", 80))


OK = b"HTTP/1.1 200 Connection established\r\nProxy-Agent: gost/3.0\r\n\r\n"


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 x\r\nA: b\r\n\r\n"])
def test_connect_leaves_what_follows_the_answer(before: bytes) -> None:
    answer, sent, left = run_on_bytes(connect(b"question"), before + OK + b"220 smtp.test ESMTP\r\n")
    assert (answer.status, sent, left) == (200, b"question", b"220 smtp.test ESMTP\r\n")


def test_connect_takes_no_body_from_the_answer() -> None:
    """RFC 9110 section 9.3.6: framing fields in the answer to CONNECT do not count."""
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\npayload"
    assert run_on_bytes(connect(b""), data)[2] == b"payload"


@pytest.mark.parametrize("status", [201, 204, 302, 403, 407, 502, 503])
def test_connect_refused(status: int) -> None:
    data = b"HTTP/1.1 %d Because\r\nContent-Length: 0\r\n\r\n" % status
    with pytest.raises(UpstreamRejected, match=f"{status} Because") as caught:
        run_on_bytes(connect(b""), data)
    assert caught.value.reply == status
    assert bool(caught.value.hint) is (status == 407)


@pytest.mark.parametrize("size", range(len(OK)))
def test_connect_answer_cut_off(size: int) -> None:
    with pytest.raises(EndOfStream):
        run_on_bytes(connect(b""), OK[:size])


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-x\r\n\r\n\r\n", b"HTTP/1.1 200 OK\nA: b\r\n\r\n", b"\r\n\r\n", OK.replace(b":", b"")]
)
def test_connect_answer_malformed(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        run_on_bytes(connect(b""), data)


def test_interim_answers_without_end_are_a_refusal() -> None:
    with pytest.raises(UpstreamRejected):
        run_on_bytes(connect(b""), b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
