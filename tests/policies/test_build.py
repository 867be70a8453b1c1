"""From configuration text to policy objects: every section, places of errors, loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gostnet.config.decode import Decoder
from gostnet.config.parse import parse
from gostnet.config.schema import Config
from gostnet.config.tree import Source
from gostnet.core.address import ANY, Endpoint
from gostnet.core.egress import Egress
from gostnet.core.errors import ConfigError, ResolveError
from gostnet.core.flow import Flow, Shapers
from gostnet.core.tasks import run
from gostnet.policies.build import (
    Build,
    build_admissions,
    build_authers,
    build_bypasses,
    build_climiters,
    build_hosts,
    build_limiters,
    build_resolvers,
    build_rlimiters,
)
from gostnet.policies.loader import LoadError, Reloader

from .dns_kit import Loopback


def config_of(text: str) -> Config:
    decoder = Decoder()
    config = decoder.config(parse(text, "yaml", Source("f", "file")))
    assert decoder.problems == []
    return config


def everything(text: str) -> list[str]:
    """Build all sections; return the problems as text."""
    config, build = config_of(text), Build()
    build_admissions(config, build)
    build_bypasses(config, build)
    build_authers(config, build)
    build_hosts(config, build)
    build_resolvers(config, build, lambda chain, path: Loopback())
    build_limiters(config, build)
    build_climiters(config, build)
    build_rlimiters(config, build)
    build.close()
    return [f"{problem.severity}: {problem}" for problem in build.problems]


def test_an_empty_configuration_has_no_policies() -> None:
    config, build = config_of(""), Build()
    assert build_bypasses(config, build) == {}
    assert build_resolvers(config, build, lambda chain, path: Loopback()) == {}
    assert build.problems == []


def test_bypasses() -> None:
    config = config_of(
        """
        bypasses:
        - name: black
          matchers: [10.0.0.0/8, " *.example.com:443 ", ""]
        - name: white
          whitelist: true
          network: UDP
          matchers: [dns.example]
        - name: old
          reverse: true
          matchers: [a]
        - matchers: [nobody can refer to it]
        """
    )
    build = Build()
    made = build_bypasses(config, build)
    assert build.problems == []
    assert list(made) == ["black", "white", "old"]
    assert made["black"].contains("tcp", Endpoint("a.example.com", 443))
    assert not made["black"].contains("tcp", Endpoint("a.example.com", 80))
    assert made["white"].contains("udp", Endpoint("a", 1))
    assert not made["white"].contains("tcp", Endpoint("a", 1))
    assert made["old"].contains("tcp", Endpoint("b", 1))


def test_every_error_is_told_with_its_place() -> None:
    problems = everything(
        """
        admissions:
        - {name: a, matchers: [10.0.0.1, 10.0.0.1-10.0.0.9, "*"]}
        bypasses:
        - {name: b, network: tcp4, matchers: [a, b, 10.0.0.0/8:80, ":80"]}
        hosts:
        - {name: h, mappings: [{ip: 10.0.0.1, hostname: a}, {ip: ten, hostname: b}, {ip: 10.0.0.2, hostname: ""}]}
        resolvers:
        - name: r
          nameservers:
          - {addr: "tls://1.1.1.1"}
          - {addr: 1.1.1.1, prefer: inet}
          - {addr: 1.1.1.1, only: both}
          - {addr: 1.1.1.1, clientIP: me}
        - {name: empty}
        limiters: [{name: l, limits: ["$ 1MB", "$$ 100"]}]
        climiters: [{name: c, limits: ["$ x"]}]
        rlimiters: [{name: r, limits: [x]}]
        """
    )
    assert [line.partition(": ")[2].partition(": ")[0] for line in problems if line.startswith("error")] == [
        "admissions[0].matchers[1]",
        "admissions[0].matchers[2]",
        "bypasses[0].matchers[2]",
        "bypasses[0].network",
        "hosts[0].mappings[1].ip",
        "hosts[0].mappings[2].hostname",
        "resolvers[0].nameservers[0].addr",
        "resolvers[0].nameservers[1].prefer",
        "resolvers[0].nameservers[2].only",
        "resolvers[0].nameservers[3].clientIP",
        "resolvers[1].nameservers",
        "limiters[0].limits[1]",
        "climiters[0].limits[0]",
        "rlimiters[0].limits[0]",
    ]
    assert [line for line in problems if line.startswith("warning")] == [
        "warning: bypasses[0].matchers[3]: ':80' never matches: it has no host; write *:80 for any host"
    ]


@pytest.mark.parametrize(
    "section", ["admissions", "bypasses", "authers", "hosts", "limiters", "climiters", "rlimiters"]
)
def test_what_is_not_built_yet_is_refused(section: str) -> None:
    text = f"""
        {section}:
        - name: x
          plugin: {{type: http, addr: "http://127.0.0.1:1"}}
          redis: {{addr: "127.0.0.1:6379"}}
          http: {{url: "ftp://example.com/x"}}
        """
    problems = everything(text)
    assert problems[:2] == [
        f"error: {section}[0].plugin: a plugin is not available in this version",
        f"error: {section}[0].redis: a Redis loader is not available in this version",
    ]
    assert problems[2].startswith(f"error: {section}[0].http.url: 'ftp://example.com/x' is not a URL")


def test_plugins_of_resolvers_are_refused() -> None:
    problems = everything('resolvers: [{name: r, plugin: {type: http, addr: "http://127.0.0.1:1"}}]')
    assert problems == ["error: resolvers[0].plugin: a plugin is not available in this version"]


def test_authers() -> None:
    config = config_of(
        "authers: [{name: a, auths: [{username: u, password: p}, {username: '', password: x}, {username: n}]}]"
    )
    made = build_authers(config, Build())
    assert made["a"].authenticate("u", "p", ANY) == "u"
    assert made["a"].authenticate("u", "q", ANY) is None
    assert made["a"].authenticate("n", "whatever", ANY) == "n"
    assert made["a"].authenticate("", "x", ANY) is None


def test_hosts_with_aliases() -> None:
    config = config_of("hosts: [{name: h, mappings: [{ip: 10.0.0.1, hostname: a, aliases: [b, .c]}]}]")
    made = build_hosts(config, Build())
    assert [made["h"].lookup(name) for name in ("a", "b", "x.c", "d")] == [["10.0.0.1"]] * 3 + [[]]


def test_resolvers_know_their_servers_and_the_ways_to_them() -> None:
    config = config_of(
        """
        resolvers:
        - name: r
          nameservers:
          - {addr: "tcp://8.8.8.8", chain: out, prefer: ipv6, ttl: 30s, timeout: 2s, async: true}
          - {addr: 1.1.1.1, only: ip4, clientIP: 1.2.3.4, ttl: -1s, async: true}
          - {addr: ""}
        """
    )
    ways: list[tuple[str, str]] = []

    def way(chain: str, path: str) -> Egress:
        ways.append((chain, path))
        return Loopback()

    build = Build()
    (first, second) = build_resolvers(config, build, way)["r"].servers
    assert build.problems == []
    assert ways == [("out", "resolvers[0].nameservers[0].chain"), ("", "resolvers[0].nameservers[1].chain")]
    assert (str(first), first.prefer, first.only, first.ttl, first.timeout, first.stale) == (
        ("tcp://8.8.8.8:53", 6, 0, 30.0, 2.0, True)
    )
    assert (str(second), second.only, second.subnet, second.ttl, second.timeout, second.stale) == (
        ("udp://1.1.1.1:53", 4, "1.2.3.4", -1.0, 5.0, False)
    )


def test_a_chain_that_is_not_there_is_an_error() -> None:
    config = config_of("resolvers: [{name: r, nameservers: [{addr: 1.1.1.1, chain: nosuch}]}]")
    build = Build()

    def way(chain: str, path: str) -> Egress:
        raise ConfigError(path, f"no chain is called {chain!r}", code="config.reference")

    made = build_resolvers(config, build, way)
    assert [str(problem) for problem in build.problems] == [
        "resolvers[0].nameservers[0].chain: no chain is called 'nosuch'"
    ]
    assert made["r"].servers == ()


def test_limiters() -> None:
    config = config_of(
        """
        limiters: [{name: l, limits: ["$ 1KB 2KB"]}]
        climiters: [{name: c, limits: ["$ 1"]}]
        rlimiters: [{name: r, limits: ["$ 1"]}]
        """
    )
    build = Build(clock=lambda: 5.0)
    shapers = Shapers()
    build_limiters(config, build)["l"].shape(Flow(client=Endpoint("192.0.2.1", 1)), shapers)
    assert [shaper.take(9999) for shaper in (*shapers.up, *shapers.down)] == [1024, 2048]
    client = Endpoint("192.0.2.1", 1)
    connections = build_climiters(config, build)["c"]
    assert connections.acquire(client) is not None
    assert connections.acquire(client) is None
    rates = build_rlimiters(config, build)["r"]
    assert [rates.allow(client) for _ in range(3)] == [True, True, False]
    assert build.problems == []
    assert build.reloaders == []


LOADED = {
    "admissions": "10.0.0.0/8 # comment\n",
    "bypasses": "# comment\n\n.example.com\n",
    "authers": "# comment\nu p\n",
    "hosts": "10.0.0.1 a b # comment\n",
    "limiters": "$ 1KB\n",
    "climiters": "$ 1 # one\n",
    "rlimiters": "$ 1\n",
}


@pytest.mark.parametrize("section", LOADED)
def test_tables_from_files_join_those_of_the_configuration(section: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text(LOADED[section] + "\n  \n")
    config = config_of(f"{section}: [{{name: x, reload: 10s, file: {{path: {path}}}}}]")
    reports: list[str] = []
    build = Build(report=reports.append, clock=lambda: 5.0)
    client = Endpoint("10.0.0.9", 1)
    flow, shapers = Flow(client=client), Shapers()
    match section:
        case "admissions":
            admission = build_admissions(config, build)["x"]
        case "bypasses":
            bypass = build_bypasses(config, build)["x"]
        case "authers":
            auther = build_authers(config, build)["x"]
        case "hosts":
            hosts = build_hosts(config, build)["x"]
        case "limiters":
            limiter = build_limiters(config, build)["x"]
        case "climiters":
            connections = build_climiters(config, build)["x"]
        case _:
            rates = build_rlimiters(config, build)["x"]
    assert build.problems == []
    (reloader,) = build.reloaders
    assert isinstance(reloader, Reloader)
    assert reloader.name == f"{section[:-1] if section not in ('bypasses', 'hosts') else section} x".replace(
        "bypasses", "bypass"
    )
    assert reloader.period == 10.0
    assert run(reloader.load())
    build.close()
    assert reports == []
    match section:
        case "admissions":
            assert not admission.admits(client)
        case "bypasses":
            assert bypass.contains("tcp", Endpoint("a.example.com", 1))
        case "authers":
            assert auther.authenticate("u", "p", ANY) == "u"
        case "hosts":
            assert hosts.lookup("b") == ["10.0.0.1"]
        case "limiters":
            limiter.shape(flow, shapers)
            assert [shaper.take(9999) for shaper in shapers.up] == [1024]
        case "climiters":
            assert connections.acquire(client) is not None
            assert connections.acquire(client) is None
        case _:
            assert [rates.allow(client) for _ in range(3)] == [True, True, False]


def test_a_missing_file_of_users_leaves_those_of_the_configuration(tmp_path: Path) -> None:
    config = config_of(
        f"authers: [{{name: a, auths: [{{username: u, password: p}}], file: {{path: {tmp_path}/missing}}}}]"
    )
    reports: list[str] = []
    build = Build(report=reports.append)
    auther = build_authers(config, build)["a"]
    (reloader,) = build.reloaders
    assert not run(reloader.load())
    build.close()
    assert auther.authenticate("u", "p", ANY) == "u"
    assert reports == [f"auther a: file {tmp_path}/missing: No such file or directory"]


def test_passwords_may_contain_what_is_a_comment_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text("admin   #123456\n")
    config = config_of(f"authers: [{{name: a, file: {{path: {path}}}}}]")
    build = Build()
    auther = build_authers(config, build)["a"]
    assert run(build.reloaders[0].load())
    build.close()
    assert auther.authenticate("admin", "#123456", ANY) == "admin"


class Names:
    async def resolve(self, host: str, family: int = 0) -> list[str]:
        if host != "home.example":
            raise ResolveError(f"{host} does not exist")
        return ["192.0.2.1"]


def test_names_in_admissions_are_looked_up_before_the_start() -> None:
    config = config_of("admissions: [{name: a, whitelist: true, matchers: [home.example, gone.example]}]")
    reports: list[str] = []
    build = Build(resolver=Names(), report=reports.append)
    admission = build_admissions(config, build)["a"]
    (reloader,) = build.reloaders
    assert not run(reloader.load())
    build.close()
    assert admission.admits(Endpoint("192.0.2.1", 5))
    assert not admission.admits(Endpoint("192.0.2.2", 5))
    assert reports == ["admission a: gone.example: gone.example does not exist"]


def test_loaders_without_a_place_are_none() -> None:
    config = config_of("bypasses: [{name: b, matchers: [a], file: {path: ''}, http: {url: ''}, reload: 10s}]")
    build = Build()
    build_bypasses(config, build)
    assert build.reloaders == []
    assert build.problems == []


# ---- what would be open without its file ---------------------------------------------------------
BUILDERS: dict[str, Callable[[Config, Build], object]] = {
    "bypasses": build_bypasses,
    "admissions": build_admissions,
    "limiters": build_limiters,
    "climiters": build_climiters,
    "rlimiters": build_rlimiters,
}


def first_load(section: str, more: str, path: Path) -> bool:
    """Load what the only source of a policy has; return whether it was complete."""
    build = Build()
    BUILDERS[section](config_of(f"{section}: [{{name: x, file: {{path: {path}}}{more}}}]"), build)
    (reloader,) = build.reloaders

    async def main() -> bool:
        try:
            return await reloader.load()
        finally:
            build.close()

    return run(main())


@pytest.mark.parametrize("section", BUILDERS)
def test_without_the_only_source_a_policy_that_would_be_open_is_refused(section: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"x would hold nobody back: file .*missing: No such file"):
        first_load(section, "", tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.touch()
    assert first_load(section, "", empty), "a file without lines is what its owner wants"


@pytest.mark.parametrize(
    ("section", "more"),
    [
        ("bypasses", ", matchers: [a.test]"),
        ("admissions", ", matchers: [192.0.2.1]"),
        ("admissions", ", whitelist: true"),
        ("climiters", ", limits: ['$ 5']"),
    ],
)
def test_without_a_source_what_has_lines_or_is_closed_goes_on(section: str, more: str, tmp_path: Path) -> None:
    assert first_load(section, more, tmp_path / "missing") is False


def test_only_the_first_load_must_not_fail(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("a.test\n")
    build = Build()
    table = build_bypasses(config_of(f"bypasses: [{{name: x, file: {{path: {path}}}}}]"), build)
    (reloader,) = build.reloaders

    async def main() -> None:
        assert await reloader.load()
        path.unlink()
        assert not await reloader.load()
        assert table["x"].contains("tcp", Endpoint("a.test", 1))
        build.close()

    run(main())
