"""Admission: every row of the table, names that are looked up, bad patterns."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from gostnet.core.address import Endpoint, parse_endpoint
from gostnet.core.contracts import admitted
from gostnet.core.errors import ConfigError, ResolveError
from gostnet.policies.admission import AddressAdmission, compile_clients
from gostnet.policies.entries import inline


def client(text: str) -> Endpoint:
    return parse_endpoint(text, default_port=0) if text not in ("", "@") else Endpoint(text, 0)


@pytest.mark.parametrize(
    ("row", "whitelist", "patterns", "clients"),
    [
        ("A01", False, ["10.0.0.0/8"], {"10.1.1.1:5": False, "11.1.1.1:5": True}),
        ("A02", True, ["10.0.0.0/8"], {"10.1.1.1:5": True, "11.1.1.1:5": False}),
        ("A03", True, [], {"1.1.1.1:1": False, "": True}),
        ("A04", False, [], {"1.1.1.1:1": True}),
        ("A05", False, ["10.0.0.1"], {"[::ffff:10.0.0.1]:5": False, "10.0.0.2:5": True}),
        ("A07", False, ["::1"], {"[::1]:5": False, "[::2]:5": True}),
        ("A08", False, ["fe80::/10"], {"[fe80::1%eth0]:5": False}),
        ("A08 exact", False, ["fe80::1"], {"[fe80::1%eth0]:5": False}),
        ("A09", False, ["10.0.0.1"], {"@": True}),
        ("A09 white", True, ["10.0.0.1"], {"@": False}),
    ],
)
def test_row(row: str, whitelist: bool, patterns: list[str], clients: dict[str, bool]) -> None:
    admission = AddressAdmission.from_patterns(patterns, whitelist=whitelist)
    assert {text: admission.admits(client(text)) for text in clients} == clients


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param("10.0.0.1:80", "write 10.0.0.1", id="A06 port"),
        pytest.param("10.0.0.1-10.0.0.9", "ranges are written as networks", id="A06 range"),
        pytest.param("*", "an address, a network", id="A06 star"),
        ("*.example.com", "an address, a network"),
        ("10.0.0.0/33", "an address, a network"),
        ("10.0.0.256", "an address, a network"),
        ("a b", "an address, a network"),
        ("-a.example", "an address, a network"),
        ("example.com:80", "write example.com"),
    ],
)
def test_bad_pattern_is_refused_with_its_place(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AddressAdmission.from_patterns(["10.0.0.1", pattern], path="admissions[0].matchers")
    assert caught.value.path == "admissions[0].matchers[1]"
    assert message in str(caught.value)


def test_group_row_a11() -> None:
    yes = AddressAdmission.from_patterns([])
    no = AddressAdmission.from_patterns([], whitelist=True)
    someone = client("1.1.1.1:1")
    assert not admitted([yes, no], someone)
    assert admitted([], someone)
    assert admitted([yes], someone)


class Names:
    """A resolver with a table that tests change."""

    def __init__(self, table: Mapping[str, list[str]]) -> None:
        self.table = dict(table)

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        if host not in self.table:
            raise ResolveError(f"{host} does not exist")
        return self.table[host]


def test_names_match_all_their_addresses_once_looked_up() -> None:
    admission = AddressAdmission.from_patterns(["Home.example", "other.example"], whitelist=True)
    assert not admission.admits(client("192.0.2.1:5"))
    names = Names({"home.example": ["192.0.2.1", "2001:db8::1"]})
    complaints = asyncio.run(admission.resolve_names(names))
    assert complaints == ["other.example: other.example does not exist"]
    assert admission.admits(client("192.0.2.1:5"))
    assert admission.admits(client("[2001:db8::1]:5"))
    assert not admission.admits(client("192.0.2.2:5"))


def test_a_failed_look_up_keeps_the_last_addresses_and_a_new_one_replaces_them() -> None:
    admission = AddressAdmission.from_patterns(["home.example"], whitelist=True)
    names = Names({"home.example": ["192.0.2.1"]})
    asyncio.run(admission.resolve_names(names))
    names.table = {}
    assert asyncio.run(admission.resolve_names(names)) != []
    assert admission.admits(client("192.0.2.1:5"))
    names.table = {"home.example": ["192.0.2.9"]}
    assert asyncio.run(admission.resolve_names(names)) == []
    assert not admission.admits(client("192.0.2.1:5"))
    assert admission.admits(client("192.0.2.9:5"))


def test_replacing_the_list_keeps_names_that_stay_and_drops_others() -> None:
    admission = AddressAdmission.from_patterns(["a.example", "b.example"], whitelist=True)
    asyncio.run(admission.resolve_names(Names({"a.example": ["192.0.2.1"], "b.example": ["192.0.2.2"]})))
    clients, problems = compile_clients(inline(["b.example", "10.0.0.0/8"], "matchers"))
    assert problems == []
    admission.replace(clients)
    assert not admission.admits(client("192.0.2.1:5"))
    assert admission.admits(client("192.0.2.2:5"))
    assert admission.admits(client("10.0.0.1:5"))
