"""What clients speak by their first bytes, in every way they may be cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.core.flow import Sniffed
from gostnet.wire.sniff import METHODS, PREFACE, UNKNOWN, DatagramRecogniser, StreamRecogniser

GET = b"GET /a/b?q=1 HTTP/1.1\r\nHost: WWW.Example.com:8080\r\nX-Thing: one\r\n\r\n"


def verdict(data: bytes) -> Sniffed | None:
    whole = StreamRecogniser().feed(data)
    reader = StreamRecogniser()
    for index in range(len(data)):
        found = reader.feed(data[index : index + 1])
        if found is not None:
            assert whole is not None
            assert found.protocol == whole.protocol
            assert found.host == whole.host
            return whole
    assert whole is None
    return None


def test_http_request() -> None:
    found = StreamRecogniser().feed(GET + b"rest")
    assert found == Sniffed(
        "http",
        "www.example.com",
        8080,
        method="GET",
        path="/a/b",
        query="q=1",
        headers=(("Host", "WWW.Example.com:8080"), ("X-Thing", "one")),
        body=b"rest",
    )
    assert verdict(GET) is not None


@pytest.mark.parametrize(
    ("data", "host", "port", "path"),
    [
        (b"GET http://a.test:81/x HTTP/1.1\r\nHost: b.test\r\n\r\n", "a.test", 81, "/x"),
        (b"CONNECT c.test:443 HTTP/1.1\r\nHost: c.test:443\r\n\r\n", "c.test", 443, ""),
        (b"GET / HTTP/1.0\r\n\r\n", "", 0, "/"),
        (b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:81\r\n\r\n", "2001:db8::1", 81, "/"),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "", 0, "/"),
        (b"OPTIONS * HTTP/1.1\r\nHost: d.test.\r\n\r\n", "d.test", 0, "*"),
        (b"PROPFIND / HTTP/1.1\r\nHost: e.test\r\n\r\n", "e.test", 0, "/"),
    ],
)
def test_where_http_says_its_host(data: bytes, host: str, port: int, path: str) -> None:
    found = verdict(data)
    assert found is not None
    assert (found.protocol, found.host, found.port, found.path) == ("http", host, port, path)
    assert found.proxied == data.startswith((b"GET http:", b"CONNECT"))


@pytest.mark.parametrize(
    ("data", "protocol"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "ssh"),
        (b"*1\r\n$4\r\nPING\r\n", "redis"),
        (PREFACE, "http"),
        (b"hello world", ""),
        (b"GETTING there", ""),
        (b"GET / HTTP/9.9\r\n\r\n", ""),
        (b"GET\x00", ""),
        (b"\x05\x01\x00", ""),
        (b"\x00", ""),
        (b"\x16\x03\x01\x00\x04\x02\x00", ""),
        (b"HELO there\r\n", ""),
        (b"PRI * HTTP/2.0\r\n\r\nXX", ""),
        (b"SSH-1.5", ""),
    ],
)
def test_verdict_is_the_same_however_the_bytes_arrive(data: bytes, protocol: str) -> None:
    found = verdict(data)
    assert found is not None
    assert found.protocol == protocol


@pytest.mark.parametrize("first", [b"h", b"\x05", b"\xff", b"\r", b"Q", b"E"])
def test_one_byte_is_enough_where_it_fits_nothing(first: bytes) -> None:
    assert StreamRecogniser().feed(first) is UNKNOWN


@pytest.mark.parametrize("data", [b"", *[method[:-1] for method in METHODS], PREFACE[:-1], b"SSH-", GET[:-1]])
def test_more_is_awaited_while_it_may_be_one_of_them(data: bytes) -> None:
    assert StreamRecogniser().feed(data) is None


@given(st.binary(max_size=100), st.sampled_from([b"", b"GET ", b"\x16\x03\x01", b"POST /", GET[:40], PREFACE[:9]]))
@settings(max_examples=300)
def test_recogniser_never_raises(noise: bytes, start: bytes) -> None:
    StreamRecogniser().feed(start + noise)
    reader = StreamRecogniser()
    for index in range(len(noise)):
        if reader.feed((start + noise)[index : index + 1]) is not None:
            break


def test_http_head_without_end_is_given_up() -> None:
    reader = StreamRecogniser()
    assert reader.feed(b"GET / HTTP/1.1\r\n") is None
    found = None
    for _ in range(70):
        found = reader.feed(b"X: " + b"y" * 1000 + b"\r\n")
        if found is not None:
            break
    assert found is UNKNOWN


def test_dns_query_is_named_as_such_and_its_name_is_no_host() -> None:
    query = bytes.fromhex("123401000001000000000000076578616d706c6503636f6d0000010001")
    assert DatagramRecogniser().feed(query) == Sniffed("dns")
    assert DatagramRecogniser().feed(b"anything") is UNKNOWN


@given(st.binary(max_size=100))
def test_datagrams_never_raise(noise: bytes) -> None:
    assert DatagramRecogniser().feed(noise) is not None or noise[:1] >= b"\x80"
