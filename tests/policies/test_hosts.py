"""Hosts: every row of the table, lines, aliases."""

from __future__ import annotations

import pytest

from gostnet.policies.entries import lines
from gostnet.policies.hosts import HostTable, Mapping, StaticHosts, compile_hosts, parse_mapping

TABLE = StaticHosts(
    HostTable(
        [
            Mapping("example.com", "10.0.0.1"),
            Mapping("example.com", "::1"),
            Mapping(".example.org", "10.0.0.2"),
            Mapping(".b.example.org", "10.0.0.3"),
            Mapping("*.star.com", "10.0.0.4"),
            Mapping("v6only.com", "::5"),
            Mapping(".v6only.com", "10.0.0.6"),
            Mapping("1.2.3.4", "10.0.0.7"),
            Mapping(".com", "10.0.0.8"),
            Mapping("a.b.c", "10.0.0.9"),
        ]
    )
)


@pytest.mark.parametrize(
    ("row", "family", "name", "expected"),
    [
        ("N01", 0, "example.com", ["10.0.0.1", "::1"]),
        ("N02", 4, "example.com", ["10.0.0.1"]),
        ("N02", 6, "example.com", ["::1"]),
        # GOST compares the case and falls to .com.
        ("N03", 0, "EXAMPLE.com", ["10.0.0.1", "::1"]),
        ("N04", 0, "www.example.com", ["10.0.0.8"]),
        ("N05", 0, "example.org", ["10.0.0.2"]),
        ("N05", 0, "a.example.org", ["10.0.0.2"]),
        ("N06", 0, "b.example.org", ["10.0.0.3"]),
        ("N06", 0, "a.b.example.org", ["10.0.0.3"]),
        ("N07", 6, "a.example.org", []),
        # GOST takes the star for a letter, and the entry is dead.
        ("N08", 0, "a.star.com", ["10.0.0.4"]),
        ("N08", 0, "a.b.star.com", ["10.0.0.4"]),
        ("N08", 0, "star.com", ["10.0.0.8"]),
        ("N09", 4, "v6only.com", []),
        ("N10", 4, "x.v6only.com", ["10.0.0.6"]),
        ("N11", 0, "1.2.3.4", ["10.0.0.7"]),
        ("N12", 0, "com", ["10.0.0.8"]),
        ("N13", 0, "nomatch.net", []),
        ("N13", 0, "example.com.", []),
        ("N14", 0, "x.a.b.c", []),
        ("empty", 0, "", []),
    ],
)
def test_row(row: str, family: int, name: str, expected: list[str]) -> None:
    assert TABLE.lookup(name, family) == expected


@pytest.mark.parametrize("everything", [".", "*"])
def test_row_n15_a_dot_covers_everything(everything: str) -> None:
    hosts = StaticHosts(HostTable([Mapping(everything, "10.0.0.2"), Mapping("a.com", "10.0.0.1")]))
    assert hosts.lookup("other.com") == ["10.0.0.2"]
    assert hosts.lookup("a.com") == ["10.0.0.1"]
    assert hosts.lookup("single") == ["10.0.0.2"]


def test_row_n16_a_line_with_two_names() -> None:
    text = "127.0.0.1 \t localhost  loopback # c\n\n# only a comment\n::ffff:10.0.0.1 mapped\r\n"
    table, problems = compile_hosts([], lines(text.encode(), "file /etc/x"))
    assert problems == []
    hosts = StaticHosts(table)
    assert hosts.lookup("localhost") == ["127.0.0.1"]
    assert hosts.lookup("loopback") == ["127.0.0.1"]
    assert hosts.lookup("mapped") == ["10.0.0.1"]
    assert len(table) == 3


def test_bad_lines_are_left_out_and_named() -> None:
    table, problems = compile_hosts([], lines(b"10.0.0.1 a\n10.0.0.x b\n10.0.0.3\n", "file /etc/x"))
    assert [str(problem) for problem in problems] == [
        "file /etc/x: line 2: '10.0.0.x' is not an IP address",
        "file /etc/x: line 3: 10.0.0.3 has no name",
    ]
    assert StaticHosts(table).lookup("a") == ["10.0.0.1"]


def test_order_is_that_of_the_sources_and_repeated_addresses_are_dropped() -> None:
    inline = [Mapping("a", "10.0.0.2"), Mapping("A", "10.0.0.1")]
    table, _ = compile_hosts(inline, lines(b"10.0.0.2 a\n10.0.0.3 a", "file x"))
    assert StaticHosts(table).lookup("a") == ["10.0.0.2", "10.0.0.1", "10.0.0.3"]


def test_aliases_are_names_too() -> None:
    assert parse_mapping(" 10.0.0.1 ", ("a", " b ", "")) == [Mapping("a", "10.0.0.1"), Mapping("b", "10.0.0.1")]
    assert parse_mapping("nonsense", ("a",)) is None


def test_the_result_belongs_to_the_caller() -> None:
    hosts = StaticHosts(HostTable([Mapping("a", "10.0.0.1")]))
    hosts.lookup("a").clear()
    assert hosts.lookup("a") == ["10.0.0.1"]
    hosts.replace(HostTable())
    assert hosts.lookup("a") == []
