"""The grammar of -L and -F, apart from what it means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.url import UrlError, decode_base64, decode_pair, expand_ports, hostname, split


def test_parts_and_columns() -> None:
    url = split("socks5+tls://user:p%40ss@h:80/a:1,b:2?x=1&y=a+b", free_host=True)
    assert (url.scheme, url.parts) == ("socks5+tls", ["socks5", "tls"])
    assert (url.username, url.password) == ("user", "p@ss")
    assert (url.host, url.path) == ("h:80", "/a:1,b:2")
    assert [(pair.key, pair.value, pair.column) for pair in url.pairs] == [("x", "1", 39), ("y", "a b", 43)]
    assert url.columns == {"scheme": 1, "user": 14, "host": 26, "path": 30, "query": 39}


def test_the_last_at_sign_ends_the_user() -> None:
    url = split("http://a@b@h:1", free_host=True)
    assert (url.username, url.password, url.host) == ("a@b", None, "h:1")


def test_an_at_sign_behind_the_host_is_no_user() -> None:
    url = split("http://h:1/x@y?z=@", free_host=True)
    assert (url.username, url.host, url.path) == (None, "h:1", "/x@y")


def test_first_of_repeated_keys_counts() -> None:
    assert split("http://?a=1&a=2&A=3", free_host=True).query()["a"].value == "1"


@pytest.mark.parametrize(
    ("address", "expanded"),
    [
        (":80", [":80"]),
        (":080", [":80"]),
        ("h:80-82", ["h:80", "h:81", "h:82"]),
        ("[::1]:80-81", ["[::1]:80", "[::1]:81"]),
        ("h", ["h"]),
        ("h:", ["h:0"]),
        ("::1:80", ["::1:80"]),
        ("[::1]", ["[::1]"]),
        ("tls://1.1.1.1:853-855", ["tls://1.1.1.1:853-855"]),
        (":65535", [":65535"]),
    ],
)
def test_port_ranges(address: str, expanded: list[str]) -> None:
    assert expand_ports(address) == (expanded, "")


@pytest.mark.parametrize("address", ["h:x", "h:65536", "h:80-", "h:-80", "h:80-x", "h: 80", "h:1-2-3", "h:+5"])
def test_bad_ports_become_zero(address: str) -> None:
    found, wrong = expand_ports(address)
    assert found == ["h:0"]
    assert "is not a port between 0 and 65535" in wrong


@pytest.mark.parametrize("address", ["h:5-3", "h:80-70000", "h:0-999999"])
def test_bad_ranges_stay(address: str) -> None:
    found, wrong = expand_ports(address)
    assert found == [address]
    assert "is not a range of ports" in wrong


def test_all_ports() -> None:
    found, wrong = expand_ports(":0-65535")
    assert (len(found), wrong) == (65536, "")


@pytest.mark.parametrize(("host", "name"), [("h:1", "h"), ("h", "h"), ("[::1]:1", "::1"), (":1", ""), ("", "")])
def test_hostname(host: str, name: str) -> None:
    assert hostname(host) == name


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("dXNlcjpwYXNz", "user:pass"),
        ("YTpi", "a:b"),
        ("YTpiYw", "a:bc"),
        ("YTpiYw==", "a:bc"),
        ("_-8", "\ufffd\ufffd"),
        ("/+8=", "\ufffd\ufffd"),
        ("!!!", None),
        ("YTpiYw=", None),
        ("abcde", None),
        ("", ""),
    ],
)
def test_base64(text: str, decoded: str | None) -> None:
    assert decode_base64(text) == decoded


def test_pairs_in_base64() -> None:
    assert decode_pair("YTpi") == ("a", "b")
    assert decode_pair("none") is None
    assert decode_pair("YWI") is None
    assert decode_pair("") is None


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/a%20b", "/a%20b"),
        ("/a b", "/a%20b"),
        ("/\u00e4", "/%C3%A4"),
        ("/a[b]", "/a[b]"),
        ('/a"b', "/a%22b"),
        ("/%41", "/%41"),
        ("/%41 b", "/A%20b"),
    ],
)
def test_path_stays_escaped(path: str, kept: str) -> None:
    assert split(f"tcp://:1{path}", free_host=True).path == kept


@given(st.text(max_size=60), st.booleans())
def test_any_text_is_split_or_refused(text: str, free_host: bool) -> None:
    columns = []
    try:
        url = split(text, free_host=free_host)
        columns = [column for column, *_ in url.complaints]
        assert "/" not in url.host
    except UrlError as exc:
        columns.append(exc.column)
    assert all(1 <= column <= len(text) + 1 for column in columns)
