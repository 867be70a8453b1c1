"""Rules and filters against flows. Rows J01-J43 and F01-F13 of docs/routing.md, as data."""

from __future__ import annotations

import pytest

from gostnet.config.matcher import RuleError
from gostnet.core.address import ANY, Endpoint
from gostnet.core.errors import ConfigError
from gostnet.core.flow import Flow, Network, Sniffed
from gostnet.policies.matcher import FilterMatcher, RuleMatcher, compile_matcher


def flow(
    *,
    client: str = "",
    network: Network = "tcp",
    protocol: str = "",
    method: str = "",
    path: str = "",
    query: str = "",
    headers: tuple[tuple[str, str], ...] = (),
    body: bytes = b"",
) -> Flow:
    made = Flow(client=Endpoint(client, 1) if client else ANY, network=network)
    made.sniffed = Sniffed(protocol=protocol, method=method, path=path, query=query, headers=headers, body=body)
    return made


HOSTS = [
    ("J01", "Host(`example.com`)", {"EXAMPLE.COM:443": True, "www.example.com": False, "": False}),
    (
        "J02",
        "Host(`*.example.com`)",
        {"example.com": False, "a.example.com": True, "a.b.example.com:80": True, "xexample.com": False},
    ),
    ("J02", "Host(`.example.com`)", {"example.com": False, "a.example.com": True}),
    ("J03", "Host(`*example.com`)", {"xexample.com": True, "a.example.com": True, "example.com": True}),
    ("J04", "Host(`*`)", {"example.com": False}),
    ("J05", "Host(`example.com:443`)", {"example.com:443": False}),
    ("J06", "Host(`::1`)", {"[::1]:443": True, "::1": True}),
    ("J07", "Host(` example.com `)", {"example.com": True}),
    ("J08", 'Host("example.com")', {"example.com": True}),
    ("J10", "host(`a`)", {"a": True}),
    ("J10", "HOST(`a`)", {"a": True}),
    ("J11", "hostregexp(`a`)", {"a": True}),
    ("J11", "HOSTREGEXP(`a`)", {"a": True}),
    ("J11", "Hostregexp(`a`)", {"a": True}),
    ("J12", "HostRegexp(`^a`)", {"ABC": True}),
    ("J12", "HostRegexp(`^A`)", {"ABC": False}),
    ("J13", "Host(`a`) || Host(`b`) && Path(`/zzz`)", {"a": True, "b": False}),
    ("J14", "(Host(`a`) || Host(`b`)) && Path(`/zzz`)", {"a": False}),
    ("J15", "!(Host(`a`) || Host(`b`))", {"c": True, "a": False}),
    ("J16", "!!Host(`a`)", {"a": True, "b": False}),
    ("J40", "Host(`a`)\n|| Host(`b`)", {"b": True}),
    ("J41", "Host(`a`) // comment", {"a": True}),
]


@pytest.mark.parametrize(("row", "rule", "expected"), HOSTS)
def test_host_rules(row: str, rule: str, expected: dict[str, bool]) -> None:
    matcher = RuleMatcher(rule)
    assert {host: matcher.matches(flow(), host) for host in expected} == expected, row


REFUSED = [
    ("J09", "Host('example.com')"),
    ("J10", "hOsT(`a`)"),
    ("J11", "hostRegexp(`a`)"),
    ("J17", "Host(`a`) & Host(`b`)"),
    ("J17", "Host(`a`) == true"),
    ("J17", "true"),
    ("J17", "Host(`a`) and Host(`b`)"),
    ("J18", "Host(`a`,`b`)"),
    ("J18", "Host()"),
    ("J18", "Host(``)"),
    ("J21", "PathPrefix(`api`)"),
    ("J26", "Header(`x-a`,`ge`,1)"),
    ("J28", "Header(`X`,`==`,`100`)"),
    ("J28", "Header(`X`,`gt`,`abc`)"),
    ("J35", "ClientIP(`10.0.0`)"),
    ("J39", "DstPort(`80`)"),
    ("J42", "Host(`exämple.com`)"),
    ("J43", ""),
]


@pytest.mark.parametrize(("row", "rule"), REFUSED)
def test_rules_that_are_refused(row: str, rule: str) -> None:
    with pytest.raises(RuleError):
        RuleMatcher(rule)


REQUESTS = [
    ("J19", "Method(`get`)", flow(method="GET"), True),
    ("J19", "Method(`get`)", flow(method="get"), False),
    ("J20", "PathPrefix(`/api`)", flow(path="/apifoo"), True),
    ("J22", "Path(`/api/x/`)", flow(path="/api/x"), False),
    ("J22", "Path(`/api/x`)", flow(path="/api/x"), True),
    ("J23", "PathRegexp(`x$`)", flow(path="/api/x"), True),
    ("J23", 'PathRegexp("^/api/\\\\w$")', flow(path="/api/x"), True),
    ("J24", "Header(`x-a`)", flow(headers=(("X-A", "1"),)), True),
    ("J24", "Header(`x-b`)", flow(headers=(("X-A", "1"),)), False),
    ("J25", "Header(`x-a`,`ge`,`1`)", flow(headers=(("X-A", "1"),)), True),
    ("J27", "Header(`x-a`,`ge`)", flow(headers=(("X-A", "1"),)), False),
    ("J27", "Header(`x-a`,`ge`)", flow(headers=(("X-A", "ge"),)), True),
    ("J29", "Header(`X-V`,`gt`,`100`)", flow(headers=(("X-V", "50"), ("x-v", "200"))), True),
    ("J29", "Header(`X-V`,`gt`,`100`)", flow(headers=(("X-V", "abc"),)), False),
    ("J29", "HeaderRegexp(`x-v`,`^a.c$`)", flow(headers=(("X-V", "abc"),)), True),
    ("J29", "HeaderRegexp(`x-v`)", flow(headers=(("X-V", ""),)), True),
    ("J30", "Query(`page`,`le`,`5`)", flow(query="page=5"), True),
    ("J30", "Query(`page`,`le`,`5`)", flow(query="page=6"), False),
    ("J30", "Query(`page`,`le`,`5`)", flow(query="page=abc"), False),
    ("J30", "Query(`page`)", flow(query="a=1&page="), True),
    ("J30", "Query(`Page`)", flow(query="page=1"), False),
    ("J30", "Query(`q`,`a b`)", flow(query="q=a+b"), True),
    ("J30", "QueryRegexp(`q`,`b$`)", flow(query="q=a&q=b"), True),
    ("J31", "BodyJSON(`a.b.0`,`^1$`)", flow(body=b'{"a":{"b":[1]}}'), True),
    ("J31", r"BodyJSON(`a\.b`,`^x$`)", flow(body=b'{"a.b":"x"}'), True),
    ("J31", "BodyJSON(`a.#`,`eq`,`2`)", flow(body=b'{"a":[1,2]}'), True),
    ("J32", "BodyJSON(`missing`,`^$`)", flow(body=b'{"a":1}'), True),
    ("J33", "BodyJSON(`age`,`gt`,`0`)", flow(body=b"{}"), False),
    ("J33", "BodyJSON(`age`,`gt`,`0`)", flow(), False),
    ("J33", "BodyJSON(`age`,`gt`,`0`)", flow(body=b"{ not json"), False),
    ("J33", "BodyRegexp(`.*`)", flow(), False),
    ("J33", "BodyRegexp(`needle`)", flow(body=b"a needle \xff"), True),
    ("J34", "ClientIP(`10.0.0.0/8`)", flow(client="10.1.2.3"), True),
    ("J34", "ClientIP(`10.0.0.0/8`)", flow(client="11.1.2.3"), False),
    ("J34", "ClientIP(`::ffff:10.1.2.3`)", flow(client="10.1.2.3"), True),
    ("J34", "ClientIP(`fd00::/8`)", flow(client="fd01::1"), True),
    ("J34", "ClientIP(`0.0.0.0/0`)", flow(), False),
    ("J36", "Network(`t`)", flow(), True),
    ("J36", "Network(`TCP`)", flow(), True),
    ("J36", "Network(`udp`)", flow(), False),
    ("J37", "Proto(`HTTP`)", flow(protocol="http"), True),
    ("J37", "Proto(`HTTP`)", flow(protocol="HTTP"), False),
    ("J37", "Proto(`tls`)", Flow(), False),
    ("J38", "Bypass(`nosuch`)", flow(), True),
    ("J38", "Admission(`nosuch`)", flow(client="10.0.0.1"), False),
]


@pytest.mark.parametrize(("row", "rule", "asked", "expected"), REQUESTS)
def test_request_rules(row: str, rule: str, asked: Flow, expected: bool) -> None:
    assert RuleMatcher(rule).matches(asked, "") is expected, row


def test_the_sniffed_name_counts_before_the_one_that_was_dialled() -> None:
    asked = Flow()
    asked.sniffed = Sniffed("tls", "inside.test")
    assert RuleMatcher("Host(`inside.test`)").matches(asked, "192.0.2.1")
    assert not RuleMatcher("Host(`192.0.2.1`)").matches(asked, "192.0.2.1")


def test_objects_by_name_are_asked() -> None:
    class Contains:
        def contains(self, network: Network, target: Endpoint) -> bool:
            return target == Endpoint("inner.test", 443)

    class Admits:
        def admits(self, client: Endpoint) -> bool:
            return client.host == "10.0.0.1"

    asked = Flow(client=Endpoint("10.0.0.1", 5), target=Endpoint("inner.test", 443))
    rule = RuleMatcher("Bypass(`b`)", bypasses={"b": Contains()})
    assert not rule.matches(asked, "inner.test")
    assert rule.matches(asked, "outer.test")
    rule = RuleMatcher("Admission(`a`)", admissions={"a": Admits()})
    assert rule.matches(asked, "")
    assert not rule.matches(Flow(client=Endpoint("10.0.0.2", 5)), "")


def test_body_size_bounds_what_is_searched() -> None:
    asked = flow(body=b"0123456789needle")
    assert RuleMatcher("BodyRegexp(`needle`)").matches(asked, "")
    assert not RuleMatcher("BodyRegexp(`needle`)", body_size=10).matches(asked, "")


FILTERS = [
    ("F01", {"host": "example.com"}, "example.com", True),
    ("F02", {"host": "example.com"}, "Example.com", True),
    ("F03", {"host": "example.com"}, "example.com:443", True),
    ("F04", {"host": "example.com"}, "www.example.com", False),
    ("F05", {"host": ".example.com"}, "example.com", True),
    ("F05", {"host": "*.example.com"}, "example.com", True),
    ("F06", {"host": ".example.com"}, "www.example.com:80", True),
    ("F07", {"host": ".example.com"}, "notexample.com", False),
    ("F07", {"host": "*.example.com"}, "notexample.com", False),
    ("F08", {"host": "*example.com"}, "notexample.com", True),
    ("F09", {"host": "*"}, "anything", True),
    ("F10", {"host": "example.com"}, "", False),
    ("F11", {"host": ""}, "anything", True),
]


@pytest.mark.parametrize(("row", "options", "host", "expected"), FILTERS)
def test_filters_by_host(row: str, options: dict[str, str], host: str, expected: bool) -> None:
    assert FilterMatcher(**options).matches(Flow(), host) is expected, row


def test_f12_the_protocol_is_exact() -> None:
    assert FilterMatcher(protocol="http").matches(flow(protocol="http"), "")
    assert not FilterMatcher(protocol="http").matches(flow(protocol="HTTP"), "")
    assert not FilterMatcher(protocol="http").matches(Flow(), "")


def test_f13_the_path_is_a_prefix_of_text() -> None:
    assert FilterMatcher(path="/api").matches(flow(path="/apix"), "")
    assert not FilterMatcher(path="/api").matches(flow(path="/ap"), "")


def test_a_bad_rule_names_its_place() -> None:
    with pytest.raises(ConfigError, match=r"chains\[0\].hops\[0\].nodes\[0\].matcher.rule: there is no function 'Hos'"):
        compile_matcher("Hos(`a`)", "chains[0].hops[0].nodes[0].matcher.rule")
