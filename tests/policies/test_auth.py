"""Authentication: every row of the table, groups, clients that need no password."""

from __future__ import annotations

import pytest

from gostnet.core.address import ANY, Endpoint
from gostnet.core.errors import ConfigError
from gostnet.policies.auth import (
    AnyOf,
    SkipAuth,
    StaticAuthenticator,
    Users,
    authenticator_of,
    compile_users,
    parse_skipauth,
)
from gostnet.policies.entries import lines, strip_leading_comment


def table(**passwords: str) -> StaticAuthenticator:
    return StaticAuthenticator(Users(passwords))


TABLE = StaticAuthenticator(Users({"u": "p", "nopass": "", "": "x"}))


@pytest.mark.parametrize(
    ("row", "username", "password", "expected"),
    [
        ("U01", "u", "p", "u"),
        ("U01", "u", "P", None),
        ("U01", "u", "", None),
        ("U02", "nopass", "anything", "nopass"),
        ("U02", "nopass", "", "nopass"),
        ("U03", "x", "", None),
        ("U04", "", "x", ""),
        ("unknown", "v", "p", None),
    ],
)
def test_row(row: str, username: str, password: str, expected: str | None) -> None:
    assert TABLE.authenticate(username, password, ANY) == expected


def test_row_u05_an_empty_table_refuses_everybody() -> None:
    assert table().authenticate("a", "b", ANY) is None
    assert table().authenticate("", "", ANY) is None


def test_row_u06_clients_of_skipauth_need_no_password() -> None:
    skip = SkipAuth(table(u="p"), parse_skipauth(["10.0.0.0/8", "192.0.2.1"], "skipauth"))
    assert skip.authenticate("bad", "bad", Endpoint("10.1.1.1", 5)) == ""
    assert skip.authenticate("bad", "bad", Endpoint("192.0.2.1", 5)) == ""
    assert skip.authenticate("bad", "bad", Endpoint("192.0.2.2", 5)) is None
    assert skip.authenticate("u", "p", Endpoint("192.0.2.2", 5)) == "u"


def read(text: str) -> StaticAuthenticator:
    users, problems = compile_users({"inline": "1"}, lines(text.encode(), "file x", strip_leading_comment))
    assert problems == []
    return StaticAuthenticator(users)


@pytest.mark.parametrize(
    ("row", "line", "username", "password"),
    [
        ("U08", "admin   #123456", "admin", "#123456"),
        ("U09", "onlyuser", "onlyuser", "anything"),
        ("blanks", "  user\tsome words  inside \r", "user", "some words  inside"),
        ("crlf", "user secret\r", "user", "secret"),
    ],
)
def test_line_row(row: str, line: str, username: str, password: str) -> None:
    auther = read(f"# comment\n\n{line}\n  # another user\n")
    assert auther.authenticate(username, password, ANY) == username
    assert auther.authenticate("#", "comment", ANY) is None
    assert len(auther.users) == 2
    assert auther.authenticate("inline", "1", ANY) == "inline"


def test_later_lines_replace_earlier_ones() -> None:
    auther = read("inline 2\nuser a\nuser b\n")
    assert auther.authenticate("inline", "1", ANY) is None
    assert auther.authenticate("inline", "2", ANY) == "inline"
    assert auther.authenticate("user", "b", ANY) == "user"


def test_a_table_can_be_replaced() -> None:
    auther = table(u="p")
    auther.replace(Users({"v": "q"}))
    assert auther.authenticate("u", "p", ANY) is None
    assert auther.authenticate("v", "q", ANY) == "v"


def test_passwords_are_not_kept_and_any_text_is_compared() -> None:
    users = Users({"u": "p\u00e9\U0001f511"})
    assert users.accepts("u", "p\u00e9\U0001f511")
    assert not users.accepts("u", "p\u00e9")
    assert not users.accepts("u", "\udcff")
    assert all("p\u00e9".encode() not in digest for digest in users._digests.values() if digest is not None)


def test_any_of_several_accepts() -> None:
    both = AnyOf([table(a="1"), table(b="2", a="3")])
    assert both.authenticate("a", "1", ANY) == "a"
    assert both.authenticate("a", "3", ANY) == "a"
    assert both.authenticate("b", "2", ANY) == "b"
    assert both.authenticate("b", "1", ANY) is None
    assert AnyOf([]).authenticate("a", "1", ANY) is None


def test_what_a_handler_asks() -> None:
    assert authenticator_of([]) is None
    assert authenticator_of([], password="p") is None
    own = authenticator_of([], "u", "p")
    assert own is not None
    assert own.authenticate("u", "p", ANY) == "u"
    assert own.authenticate("u", "q", ANY) is None
    named = authenticator_of([table(a="1")], "u", "p")
    assert named is not None
    assert named.authenticate("u", "p", ANY) is None  # its own pair does not count beside names
    assert named.authenticate("a", "1", ANY) == "a"
    several = authenticator_of([table(a="1"), table(b="2")])
    assert several is not None
    assert several.authenticate("b", "2", ANY) == "b"
    networks = parse_skipauth("10.0.0.0/8", "skipauth")
    assert authenticator_of([], skip=networks) is None
    skipping = authenticator_of([table()], skip=networks)
    assert skipping is not None
    assert skipping.authenticate("", "", Endpoint("10.0.0.1", 1)) == ""
    assert skipping.authenticate("", "", Endpoint("11.0.0.1", 1)) is None


def test_skipauth_is_a_list_or_a_string_with_commas() -> None:
    networks = parse_skipauth("10.0.0.0/8, ::1,", "skipauth")
    assert Endpoint("::1", 1) in networks
    assert Endpoint("10.0.0.1", 1) in networks
    assert not parse_skipauth([], "skipauth")
    with pytest.raises(ConfigError, match=r"services\[0\]\.handler\.metadata\.skipauth: 'lan' is not an address"):
        parse_skipauth("lan", "services[0].handler.metadata.skipauth")
    with pytest.raises(ConfigError, match="not a list"):
        parse_skipauth(5, "skipauth")
