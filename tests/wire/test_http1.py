"""HTTP/1 heads and bodies: whole, byte by byte, cut off, hostile; h11 as the strict oracle."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.errors import EndOfStream, ProtocolError
from gostnet.wire.gost_target import decode_target, encode_target
from gostnet.wire.http1 import (
    MAX_CHUNK_LINE,
    MAX_HEAD,
    MAX_TRAILER,
    Body,
    ChunkedBody,
    FixedBody,
    HeadReader,
    HeadTooLarge,
    OpenBody,
    canonical,
    content_length,
    encode_chunk,
    encode_end,
    field_problem,
    format_authority,
    head_bytes,
    is_chunked,
    parse_authority,
    parse_request,
    parse_response,
    reason_of,
    request_body,
    response_body,
    split_absolute,
)

GET = b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n"


def request_with(*lines: bytes, start: bytes = b"POST /x HTTP/1.1") -> bytes:
    return b"\r\n".join((start, b"Host: a.test", *lines, b"", b""))


def response_with(*lines: bytes, start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((start, *lines, b"", b""))


def whole(body: Body, data: bytes, piece: int = 0) -> bytes:
    """Feed `data` in pieces until the body is done; what follows its end must come back untouched."""
    out = b""
    step = piece or max(1, len(data))
    for start in range(0, len(data), step):
        if body.done:
            body.rest += data[start : start + step]
        else:
            out += body.feed(data[start : start + step])
    return out


# ---- heads --------------------------------------------------------------------------------------
def test_request_head_is_parsed_with_order_and_case_kept() -> None:
    request = parse_request(GET + b"X-b: 1\r\nx-B:\t 2 \t\r\nEmpty:\r\nBytes: \xff\xfe\r\n\r\n")
    assert (request.method, request.target, request.version) == (b"GET", b"http://a.test/", 11)
    assert request.fields == [
        (b"Host", b"a.test"),
        (b"X-b", b"1"),
        (b"x-B", b"2"),
        (b"Empty", b""),
        (b"Bytes", b"\xff\xfe"),
    ]
    assert request.get(b"x-b") == b"1"
    assert request.all(b"x-b") == [b"1", b"2"]
    assert request.get(b"absent") == b""
    assert request.all(b"absent") == []


def test_tokens_join_all_lines() -> None:
    request = parse_request(GET + b"Connection: Close, ,x\r\nCONNECTION: Upgrade\r\n\r\n")
    assert request.tokens(b"connection") == [b"close", b"x", b"upgrade"]
    assert request.tokens(b"te") == []


@pytest.mark.parametrize(
    ("line", "method", "target", "version"),
    [
        (b"CONNECT a:1 HTTP/1.1", b"CONNECT", b"a:1", 11),
        (b"CONNECT  HTTP/1.1", b"CONNECT", b"", 11),
        (b"GET / HTTP/1.0", b"GET", b"/", 10),
        (b"GET / HTTP/1.7", b"GET", b"/", 11),
        (b"x!#$%&'*+-.^_`|~9 * HTTP/1.1", b"x!#$%&'*+-.^_`|~9", b"*", 11),
        (b"GET /\xc3\xbc HTTP/1.1", b"GET", b"/\xc3\xbc", 11),
    ],
)
def test_request_lines_that_are_taken(line: bytes, method: bytes, target: bytes, version: int) -> None:
    request = parse_request(line + b"\r\n\r\n")
    assert (request.method, request.target, request.version, request.fields) == (method, target, version, [])


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET",
        b"GET /",
        b"GET  HTTP/1.1",
        b"GET / HTTP/2.0",
        b"GET / HTTP/1.10",
        b"GET / HTTP/11",
        b"GET / http/1.1",
        b"GET  / HTTP/1.1",
        b"GET /  HTTP/1.1",
        b"GET / HTTP/1.1 ",
        b" GET / HTTP/1.1",
        b"GET\t/\tHTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"GET /\x00 HTTP/1.1",
        b"GET /\x7f HTTP/1.1",
        b"G(T / HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"\x16\x03\x01\x02\x00",
    ],
)
def test_request_lines_that_are_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_request(line + b"\r\nHost: a\r\n\r\n")


SMUGGLING = {
    "folded line": b"A: b\r\n c: d\r\n",
    "folded by tab": b"A: b\r\n\tc: d\r\n",
    "fold of the first line": b" A: b\r\n",
    "blank before the colon": b"Content-Length : 3\r\n",
    "tab before the colon": b"Content-Length\t: 3\r\n",
    "blank in the name": b"Content Length: 3\r\n",
    "no colon": b"Content-Length\r\n",
    "no name": b": 3\r\n",
    "bare line feed": b"A: b\nContent-Length: 3\r\n",
    "bare carriage return": b"A: b\rContent-Length: 3\r\n",
    "carriage return twice": b"A: b\r\r\n",
    "line feed first": b"A: b\n\r\n",
    "NUL in a value": b"A: b\0c\r\n",
    "NUL in a name": b"A\0: b\r\n",
    "control character": b"A: b\x01\r\n",
    "DEL": b"A: b\x7f\r\n",
    "high byte in a name": b"\xc3\xa4: b\r\n",
    "quote in a name": b'"A": b\r\n',
    "two lengths": b"Content-Length: 3\r\nContent-Length: 4\r\n",
    "the same length twice": b"Content-Length: 3\r\nContent-Length: 3\r\n",
    "list of lengths": b"Content-Length: 3, 3\r\n",
    "signed length": b"Content-Length: +3\r\n",
    "negative length": b"Content-Length: -3\r\n",
    "hexadecimal length": b"Content-Length: 0x3\r\n",
    "length with a point": b"Content-Length: 3.0\r\n",
    "length with a blank": b"Content-Length: 3 3\r\n",
    "length in other digits": b"Content-Length: \xd9\xa3\r\n",
    "empty length": b"Content-Length:\r\n",
    "length beyond 64 bits": b"Content-Length: 18446744073709551619\r\n",
    "length and chunked": b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
    "chunked and length": b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
    "chunked twice": b"Transfer-Encoding: chunked, chunked\r\n",
    "chunked on two lines": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    "chunked is not last": b"Transfer-Encoding: chunked, gzip\r\n",
    "two codings": b"Transfer-Encoding: gzip, chunked\r\n",
    "two codings on two lines": b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
    "identity and chunked": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
    "almost chunked": b"Transfer-Encoding: xchunked\r\n",
    "chunked in quotes": b'Transfer-Encoding: "chunked"\r\n',
    "chunked with a parameter": b"Transfer-Encoding: chunked;x\r\n",
    "vertical tab before chunked": b"Transfer-Encoding: \x0bchunked\r\n",
    "no-break space after chunked": b"Transfer-Encoding: chunked\xa0\r\n",
    "identity": b"Transfer-Encoding: identity\r\n",
    "empty coding": b"Transfer-Encoding:\r\n",
    "two hosts": b"Host: b.test\r\n",
    "the same host twice": b"host: a.test\r\n",
}


@pytest.mark.parametrize("lines", SMUGGLING.values(), ids=SMUGGLING.keys())
def test_ambiguous_requests_are_refused(lines: bytes) -> None:
    with pytest.raises(ProtocolError):
        request_body(parse_request(b"POST / HTTP/1.1\r\nHost: a.test\r\n" + lines + b"\r\n"))


def test_transfer_coding_in_http_1_0_is_refused() -> None:
    with pytest.raises(ProtocolError):
        request_body(parse_request(request_with(b"Transfer-Encoding: chunked", start=b"POST / HTTP/1.0")))
    with pytest.raises(ProtocolError):
        response_body(parse_response(response_with(b"Transfer-Encoding: chunked", start=b"HTTP/1.0 200 OK")), b"GET")


def test_request_framing() -> None:
    assert request_body(parse_request(request_with())) is None
    assert request_body(parse_request(request_with(b"Content-Length: 0"))) is None
    fixed = request_body(parse_request(request_with(b"Content-Length: 7 ")))
    assert isinstance(fixed, FixedBody)
    assert (fixed.length, fixed.chunked) == (7, False)
    chunked = request_body(parse_request(request_with(b"Transfer-Encoding: CHUNKED \t")))
    assert isinstance(chunked, ChunkedBody)
    assert (chunked.length, chunked.chunked) == (None, True)


@pytest.mark.parametrize(
    ("head", "method", "kind"),
    [
        (response_with(), b"GET", OpenBody),
        (response_with(b"Content-Length: 3"), b"GET", FixedBody),
        (response_with(b"Content-Length: 0"), b"GET", None),
        (response_with(b"Content-Length: 3"), b"HEAD", None),
        (response_with(b"Transfer-Encoding: chunked"), b"HEAD", None),
        (response_with(b"Transfer-Encoding: Chunked"), b"GET", ChunkedBody),
        (response_with(b"Content-Length: 3", b"Transfer-Encoding: chunked"), b"GET", ChunkedBody),
        (response_with(b"Content-Length: 3", start=b"HTTP/1.1 204 No Content"), b"GET", None),
        (response_with(b"Content-Length: 3", start=b"HTTP/1.1 304 Not Modified"), b"GET", None),
        (response_with(start=b"HTTP/1.1 100 Continue"), b"GET", None),
    ],
)
def test_response_framing(head: bytes, method: bytes, kind: type[Body] | None) -> None:
    body = response_body(parse_response(head), method)
    assert type(body) is (kind or type(None))


@pytest.mark.parametrize(
    "lines",
    [
        (b"Transfer-Encoding: gzip",),
        (b"Transfer-Encoding: gzip, chunked",),
        (b"Transfer-Encoding: chunked, gzip",),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    ],
)
def test_transfer_codings_nobody_asked_for_are_refused(lines: tuple[bytes, ...]) -> None:
    with pytest.raises(ProtocolError):
        response_body(parse_response(response_with(*lines)), b"GET")


@pytest.mark.parametrize(
    ("line", "status", "reason", "version"),
    [
        (b"HTTP/1.1 200 OK", 200, b"OK", 11),
        (b"HTTP/1.0 404 Not Found at all", 404, b"Not Found at all", 10),
        (b"HTTP/1.1 200 ", 200, b"", 11),
        (b"HTTP/1.1 200", 200, b"", 11),
        (b"HTTP/1.1 599 \xfcber", 599, b"\xfcber", 11),
        (b"HTTP/1.3 999 x\ty", 999, b"x\ty", 11),
    ],
)
def test_status_lines_that_are_taken(line: bytes, status: int, reason: bytes, version: int) -> None:
    response = parse_response(line + b"\r\nA: b\r\n\r\n")
    assert (response.status, response.reason, response.version) == (status, reason, version)
    assert response.fields == [(b"A", b"b")]


@pytest.mark.parametrize(
    "line",
    [
        b"HTTP/2.0 200 OK",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 099 OK",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.1\t200 OK",
        b"HTTP/1.1 200OK",
        b"HTTP/1.1 200 O\x00K",
        b"http/1.1 200 OK",
        b"ICY 200 OK",
        b"<html>",
    ],
)
def test_status_lines_that_are_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_response(line + b"\r\n\r\n")


@pytest.mark.parametrize(
    ("version", "lines", "persistent"),
    [
        (b"1.1", (), True),
        (b"1.1", (b"Connection: x, Close",), False),
        (b"1.1", (b"Proxy-Connection: close",), False),
        (b"1.0", (), False),
        (b"1.0", (b"Connection: Keep-Alive",), True),
        (b"1.0", (b"Proxy-Connection: keep-alive",), True),
    ],
)
def test_persistence(version: bytes, lines: tuple[bytes, ...], persistent: bool) -> None:
    request = parse_request(request_with(*lines, start=b"GET / HTTP/" + version))
    assert request.persistent is persistent
    response = parse_response(response_with(*lines, start=b"HTTP/" + version + b" 200 OK"))
    if not any(line.startswith(b"Proxy-") for line in lines):
        assert response.persistent is persistent


# ---- finding the end of a head --------------------------------------------------------------------
HEADS = {
    "request": (GET + b"X: y\r\n\r\n", False),
    "no fields": (b"CONNECT a:1 HTTP/1.1\r\n\r\n", False),
    "response": (response_with(b"Server: x"), True),
}


@pytest.mark.parametrize(("head", "response"), HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("rest", [b"", b"\r\n\r\nmore"])
def test_head_is_found_however_it_is_cut(head: bytes, response: bool, rest: bytes) -> None:
    for cut in range(1, len(head)):
        reader = HeadReader(response=response)
        assert reader.feed(head[:cut]) is None
        assert reader.started
        assert reader.feed(head[cut:] + rest) == head
        assert reader.rest == rest
    reader = HeadReader(response=response)
    for byte in head[:-1]:
        assert reader.feed(bytes((byte,))) is None
    assert reader.feed(head[-1:]) == head
    assert reader.rest == b""


def test_empty_lines_before_a_request_are_skipped() -> None:
    head = GET + b"\r\n"
    assert HeadReader().feed(b"\r\n\r\n" + head) == head
    reader = HeadReader()
    found = [reader.feed(bytes((byte,))) for byte in b"\r\n" + head]
    assert found[-1] == head
    assert not any(found[:-1])
    with pytest.raises(ProtocolError):
        parse_response(HeadReader(response=True).feed(b"\r\n" + response_with()) or b"")


@pytest.mark.parametrize(
    ("data", "response"),
    [
        (b"\x16\x03\x01\x02\x00\x01", False),
        (b"\x05\x01\x00", False),
        (b" GET", False),
        (b"\nGET", False),
        (b"GET / HTTP/1.1\nHost: a\n\n", False),
        (b"GET / HTTP/1.1\r\nHost: a\nX", False),
        (b"SSH-2.0-x", True),
        (b"H", True),
        (b"HTTP/2", True),
        (b"HTTP/1.1 200 OK\n", True),
    ],
)
def test_what_cannot_become_a_head_is_refused_at_once(data: bytes, response: bool) -> None:
    reader = HeadReader(response=response)
    if data == b"H":
        assert reader.feed(data) is None
        return
    with pytest.raises(ProtocolError):
        reader.feed(data)


def test_bare_line_feed_is_seen_across_reads() -> None:
    reader = HeadReader()
    assert reader.feed(b"GET / HTTP/1.1\r") is None
    assert reader.feed(b"\nHost: a") is None
    with pytest.raises(ProtocolError):
        reader.feed(b"\n")


def test_head_has_a_limit() -> None:
    fitting = b"GET / HTTP/1.1\r\nX: " + b"y" * (MAX_HEAD - 23) + b"\r\n\r\n"
    assert len(fitting) == MAX_HEAD
    assert HeadReader().feed(fitting) == fitting
    assert parse_request(fitting).get(b"x") == b"y" * (MAX_HEAD - 23)
    with pytest.raises(HeadTooLarge):
        HeadReader().feed(b"GET / HTTP/1.1\r\nX: y" + b"y" * (MAX_HEAD - 23) + b"\r\n\r\n")
    reader = HeadReader(limit=100)
    assert reader.feed(b"GET / HTTP/1.1\r\nX: " + b"y" * 81) is None
    with pytest.raises(HeadTooLarge):
        reader.feed(b"y")
    with pytest.raises(HeadTooLarge):
        HeadReader(limit=16).feed(b"\r\n" + b"GET / HTTP/1.1\r\n\r\n")


# ---- targets ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("authority", "endpoint"),
    [
        (b"a.test:443", Endpoint("a.test", 443)),
        (b"a.test", Endpoint("a.test", 80)),
        (b"a.test:", Endpoint("a.test", 80)),
        (b"A_b-c.test.:0", Endpoint("A_b-c.test.", 0)),
        (b"192.0.2.1:65535", Endpoint("192.0.2.1", 65535)),
        (b"[2001:DB8::1]:8080", Endpoint("2001:db8::1", 8080)),
        (b"[::1]", Endpoint("::1", 80)),
        (b"[::ffff:192.0.2.1]:1", Endpoint("192.0.2.1", 1)),
        (b"", Endpoint("", 80)),
        (b":81", Endpoint("", 81)),
    ],
)
def test_authorities(authority: bytes, endpoint: Endpoint) -> None:
    assert parse_authority(authority, 80) == endpoint


@pytest.mark.parametrize(
    "authority",
    [
        b"a:65536",
        b"a:123456",
        b"a:-1",
        b"a:x",
        b"a:1:2",
        b"::1",
        b"[::1",
        b"[]:1",
        b"[1.2.3.4]:1",
        b"[::g]:1",
        b"[::1]x:1",
        b"a b:1",
        b"a/b",
        b"a@b:1",
        b"a\r\nb:1",
        b"a%41:1",
        b"\xc3\xa4:1",
        b"a" * 256,
    ],
)
def test_authorities_that_are_refused(authority: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_authority(authority, 80)


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (None, b""),
        (Endpoint("a.test", 443), b"a.test:443"),
        (Endpoint("192.0.2.1", 1), b"192.0.2.1:1"),
        (Endpoint("::1", 80), b"[::1]:80"),
        (Endpoint("bücher.test", 80), b"xn--bcher-kva.test:80"),
    ],
)
def test_endpoints_as_authorities(endpoint: Endpoint | None, text: bytes) -> None:
    assert format_authority(endpoint) == text


@pytest.mark.parametrize(
    "host",
    ["a b", "a\r\nX: y", "a/b", "a@b", "a\0", "[a", "a:1", "a" * 256, "\udcff", "a?b", "ä" * 70],
)
def test_names_that_would_break_a_request_line_are_refused(host: str) -> None:
    with pytest.raises(ProtocolError):
        format_authority(Endpoint(host, 80))


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        (b"http://a.test/x?y#z", (b"http", b"a.test", b"/x?y")),
        (b"HTTP://a.test:81", (b"http", b"a.test:81", b"/")),
        (b"http://a.test?q", (b"http", b"a.test", b"/?q")),
        (b"http://user:secret@a.test/", (b"http", b"a.test", b"/")),
        (b"https://[::1]:4/", (b"https", b"[::1]:4", b"/")),
        (b"http:///x", (b"http", b"", b"/x")),
        (b"/x", None),
        (b"*", None),
        (b"a.test:80", None),
        (b"http:/a", None),
    ],
)
def test_absolute_targets(target: bytes, parts: tuple[bytes, bytes, bytes] | None) -> None:
    assert split_absolute(target) == parts


# ---- bodies -------------------------------------------------------------------------------------
CHUNKED = b'3\r\nabc\r\n00000000A;x="y z" ; b\r\n0123456789\r\n0;end\r\nX-T: v\r\nX-U: w\r\n\r\n'


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\n\r\n"])
def test_bodies_however_they_are_cut(piece: int, rest: bytes) -> None:
    cases: list[tuple[Body, bytes, bytes]] = [
        (FixedBody(5), b"hello", b"hello"),
        (ChunkedBody(), CHUNKED, b"abc0123456789"),
        (ChunkedBody(), b"0\r\n\r\n", b""),
        (ChunkedBody(), b"5\t\r\nhello\r\n0 \r\n\r\n", b"hello"),
    ]
    for body, data, payload in cases:
        assert whole(body, data + rest, piece) == payload
        assert body.done
        assert body.rest == rest
        body.end()
    assert cases[1][0].trailers == [(b"X-T", b"v"), (b"X-U", b"w")]


@pytest.mark.parametrize("data", [b"hello", CHUNKED])
def test_bodies_cut_off_are_not_whole(data: bytes) -> None:
    for size in range(len(data)):
        body: Body = FixedBody(5) if data == b"hello" else ChunkedBody()
        whole(body, data[:size])
        assert not body.done
        with pytest.raises(EndOfStream):
            body.end()


def test_open_body_ends_with_the_stream() -> None:
    body = OpenBody()
    assert body.feed(b"abc") == b"abc"
    assert not body.done
    body.end()
    assert body.done


BAD_CHUNKS = {
    "no size": b"\r\nabc",
    "blank before the size": b" 3\r\nabc\r\n",
    "sign": b"+3\r\nabc\r\n",
    "negative": b"-3\r\nabc\r\n",
    "prefix": b"0x3\r\nabc\r\n",
    "underscore": b"1_0\r\nabc\r\n",
    "not hexadecimal": b"g\r\nabc\r\n",
    "more than 64 bits": b"1" * 17 + b"\r\nabc",
    "bare line feed": b"3\nabc\r\n0\r\n\r\n",
    "line feed in an extension": b"3;a\nb\r\nabc\r\n",
    "carriage return in an extension": b"3;a\rb\r\nabc\r\n",
    "NUL in an extension": b"3;a\0\r\nabc\r\n",
    "extension without semicolon": b"3 a\r\nabc\r\n",
    "data too long": b"3\r\nabcd\r\n",
    "line feed after data": b"3\r\nabc\n",
    "carriage return and more": b"3\r\nabc\rx",
    "folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "trailer without colon": b"0\r\nAb\r\n\r\n",
    "bare line feed in trailers": b"0\r\nA: b\nC: d\r\n\r\n",
    "length in trailers": b"0\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("data", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
@pytest.mark.parametrize("piece", [1, 0])
def test_malformed_chunks_are_refused(data: bytes, piece: int) -> None:
    with pytest.raises(ProtocolError):
        whole(ChunkedBody(), data + b"x" * (2 * MAX_CHUNK_LINE), piece)


def test_chunk_lines_and_trailers_have_limits() -> None:
    body = ChunkedBody()
    assert body.feed(b"0;" + b"x" * (MAX_CHUNK_LINE - 2)) == b""
    with pytest.raises(ProtocolError):
        body.feed(b"x")
    with pytest.raises(ProtocolError):
        ChunkedBody().feed(b"0\r\nA: " + b"x" * MAX_TRAILER)
    body = ChunkedBody()
    with pytest.raises(ProtocolError, match="extensions"):
        for _ in range(100):
            body.feed(b"1;" + b"x" * 1000 + b"\r\ny\r\n")
    body = ChunkedBody()
    for _ in range(5000):  # the measure is fair to many small chunks without extensions
        assert body.feed(b"1\r\nx\r\n") == b"x"


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=6), st.integers(1, 80))
def test_chunks_said_anew_hold_the_same(parts: list[bytes], piece: int) -> None:
    data = b"".join(map(encode_chunk, parts)) + encode_end([(b"A", b"b")]) + b"rest"
    body, again, out = ChunkedBody(), ChunkedBody(), b""
    for start in range(0, len(data), piece):
        if body.done:
            body.rest += data[start : start + piece]
        else:
            chunk = body.rechunk(data[start : start + piece])
            assert chunk == b"" or whole(again, chunk) != b""
            out += chunk
    assert body.rest == b"rest"
    assert not again.done
    assert whole(ChunkedBody(), out + encode_end([])) == b"".join(parts)
    fixed = FixedBody(3)
    assert fixed.rechunk(b"ab") == b"2\r\nab\r\n"
    assert fixed.rechunk(b"cd") == b"1\r\nc\r\n"
    assert (fixed.done, fixed.rest) == (True, b"d")


def test_trailers_that_would_change_the_message_are_dropped() -> None:
    body = ChunkedBody()
    body.feed(b"0\r\nHost: evil\r\nAuthorization: x\r\nX-Sum: 1\r\ncontent-type: y\r\n\r\n")
    assert body.trailers == [(b"X-Sum", b"1")]


def test_chunks_are_written_as_they_are_read() -> None:
    assert encode_chunk(b"") == b""
    assert encode_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"
    assert encode_end([]) == b"0\r\n\r\n"
    assert encode_end([(b"A", b"b")]) == b"0\r\nA: b\r\n\r\n"


# ---- writing ------------------------------------------------------------------------------------
def test_heads_are_written() -> None:
    assert head_bytes(b"GET / HTTP/1.1", [(b"A", b"b"), (b"C", b"")]) == b"GET / HTTP/1.1\r\nA: b\r\nC: \r\n\r\n"
    assert canonical(b"x-forwarded-FOR") == b"X-Forwarded-For"
    assert canonical(b"etag") == b"Etag"
    assert canonical(b"x_a-1b") == b"X_a-1b"
    assert canonical(b"a" * 100) == b"A" + b"a" * 99
    assert reason_of(503) == "Service Unavailable"
    assert reason_of(418) == "I'm a teapot"
    assert reason_of(599) == "status code 599"


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [("X-A", "b c", True), ("X-A", "", True), ("X A", "b", False), ("", "b", False), ("X", "a\r\nb", False)],
)
def test_configured_fields_are_checked(name: str, value: str, fine: bool) -> None:
    assert (field_problem(name, value) == "") is fine


def test_configured_fields_must_be_encodable() -> None:
    assert field_problem("Ä", "b")
    assert field_problem("X", "€")
    assert field_problem("X", "ä") == ""


# ---- properties ---------------------------------------------------------------------------------
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_head_or_a_protocol_error(data: bytes, response: bool) -> None:
    try:
        head = HeadReader(response=response).feed(data)
        if head is None:
            return
        if response:
            message = parse_response(head)
            response_body(message, b"GET")
        else:
            request_body(parse_request(head))
    except ProtocolError:
        pass


PIECES = st.sampled_from(
    [b"0", b"1", b"a", b"F", b"\r\n", b"\r", b"\n", b";x", b" ", b"abc", b"\0", b"0\r\n\r\n", b"X: y\r\n", b":"]
)


@given(st.lists(PIECES, max_size=30), st.integers(1, 20))
def test_any_bytes_are_chunks_or_a_protocol_error(pieces: list[bytes], piece: int) -> None:
    """And the verdict does not depend on how they are cut."""
    data = b"".join(pieces)

    def run(step: int) -> object:
        body = ChunkedBody()
        try:
            return whole(body, data, step), body.done, body.trailers, body.rest
        except ProtocolError:
            return "refused"

    assert run(0) == run(piece) == run(1)


TOKEN = st.text("abcXYZ019-_!", min_size=1, max_size=12).map(lambda text: text.encode())
VALUE = st.binary(max_size=20).map(
    lambda raw: bytes(byte for byte in raw if byte == 9 or (byte >= 32 and byte != 127)).strip(b" \t")
)


@given(TOKEN, st.text("/ab?=&%:.~", min_size=1, max_size=20), st.lists(st.tuples(TOKEN, VALUE), max_size=8))
def test_what_is_written_is_read_back(method: bytes, target: str, fields: list[tuple[bytes, bytes]]) -> None:
    framing = (b"host", b"content-length", b"transfer-encoding")
    fields = [field for field in fields if field[0].lower() not in framing]
    head = head_bytes(b"%b %b HTTP/1.1" % (method, target.encode()), fields)
    reader = HeadReader()
    assert reader.feed(head + b"rest") == head
    assert reader.rest == b"rest"
    request = parse_request(head)
    assert (request.method, request.target, request.fields) == (method, target.encode(), fields)


LINES = st.lists(
    st.sampled_from(
        [
            b"Content-Length: 3",
            b"content-length: 5",
            b"Content-Length : 3",
            b"Content-Length: 3, 3",
            b"Transfer-Encoding: chunked",
            b"Transfer-Encoding: Chunked",
            b"Transfer-Encoding: identity",
            b"Transfer-Encoding:\tchunked",
            b"X-A: b",
            b"X-A:",
            b" folded",
            b"X\x0b: y",
            b"Host: b.test",
            b"X: \xff",
            b"X: a\tb",
            b": x",
            b"nothing",
            b"X: a\0",
            b"X: a\x7f",
        ]
    ),
    max_size=5,
)


@settings(max_examples=300)
@given(
    st.sampled_from([b"POST /x HTTP/1.1", b"POST http://a.test/ HTTP/1.1", b"GET /x HTTP/1.0", b"FOO * HTTP/1.1"]),
    LINES,
    st.sampled_from([b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"3;x\r\nabc\r\n0\r\nT: v\r\n\r\n", b"abcdefgh"]),
)
def test_what_we_take_the_oracle_takes_and_reads_alike(start: bytes, lines: list[bytes], data: bytes) -> None:
    """h11 may refuse less than we do, never more; and where both take a message, its fields and its body agree."""
    head = b"\r\n".join((start, b"Host: a.test", *lines, b"", b""))
    try:
        request = parse_request(head)
        body = request_body(request)
        payload = whole(body, data) if body is not None else b""
    except ProtocolError:
        return
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(head + data)
    event = oracle.next_event()
    assert isinstance(event, h11.Request)
    assert (bytes(event.method), bytes(event.target)) == (request.method, request.target)
    raw = [(bytes(name), bytes(value)) for name, value in event.headers.raw_items()]
    framing = (b"transfer-encoding", b"content-length")
    for ours, theirs in zip(request.fields, raw, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == theirs[1] or (ours[0].lower() in framing and ours[1].lower() == theirs[1])
    read = b""
    done = False
    while not isinstance(event := oracle.next_event(), type(h11.NEED_DATA)):
        if isinstance(event, h11.Data):
            read += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            done = True
            trailers = [(bytes(name).lower(), bytes(value)) for name, value in event.headers]
            assert trailers == [(n.lower(), v) for n, v in (body.trailers if body is not None else [])]
            break
        elif event is h11.PAUSED:
            break
    assert read == payload
    assert done is (body is None or body.done)


@settings(max_examples=200)
@given(
    st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 204 No Content", b"HTTP/1.1 304 Not Modified", b"HTTP/1.0 200 OK"]),
    LINES.map(lambda lines: [line for line in lines if not line.startswith(b"Host")]),
    st.sampled_from([b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"abcdefgh"]),
    st.sampled_from([b"GET", b"HEAD"]),
)
def test_responses_are_read_as_the_oracle_reads_them(
    start: bytes, lines: list[bytes], data: bytes, method: bytes
) -> None:
    head = b"\r\n".join((start, *lines, b"", b""))
    try:
        response = parse_response(head)
        body = response_body(response, method)
        payload = whole(body, data) if body is not None else b""
    except ProtocolError:
        return
    oracle = h11.Connection(h11.CLIENT)
    oracle.send(h11.Request(method=method, target="/", headers=[("Host", "a.test")]))
    oracle.send(h11.EndOfMessage())
    oracle.receive_data(head + data)
    event = oracle.next_event()
    assert isinstance(event, h11.Response)
    assert event.status_code == response.status
    read = b""
    while isinstance(event := oracle.next_event(), h11.Data):
        read += bytes(event.data)
    assert read == payload


@given(st.binary(max_size=300))
def test_hidden_targets_come_back(name: bytes) -> None:
    assert decode_target(encode_target(name)) == name


@given(st.binary(max_size=40))
def test_anything_else_is_no_hidden_target(value: bytes) -> None:
    name = decode_target(value)
    assert name is None or encode_target(name) == value or value.endswith((b"=",))


def test_hidden_targets_are_gosts() -> None:
    assert encode_target(b"localhost") == b"nsIII2JHOWpZV3hvYjNOMA"
    assert encode_target(b"www.example.com") == b"LtZCu2QzZDNMbVY0WVcxd2JHVXVZMjl0"
    assert decode_target(b"Bkj31U1USTNMakF1TUM0eE9qY3dNRGM") == b"127.0.0.1:7007"
    for damaged in (b"", b"nsI", b"nsIII2JHOWpZV3hvYjNOMB!", b"osIII2JHOWpZV3hvYjNOMA", b"nsIII2JHOWpZV3hvYjNOMA="):
        assert decode_target(damaged) is None


def test_announced_framing_of_heads_without_a_body() -> None:
    head = parse_response(response_with(b"Content-Length: 12"))
    assert content_length(head) == 12
    assert not is_chunked(head)
