"""Checks of a configuration that could be read."""

# ruff: noqa: E501, SIM905  # messages are quoted whole, and words are easier to read in a row

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.argv import parse_args
from gostnet.config.check import check, ordered, report, summary
from gostnet.config.decode import Decoder
from gostnet.config.finding import Finding
from gostnet.config.load import Loader
from gostnet.config.parse import parse
from gostnet.config.schema import Config
from gostnet.config.tree import Place, Source
from gostnet.core.options import CommaList, Seconds, opt
from gostnet.core.registry import GOST_NAMES, Catalog


@dataclass(frozen=True, slots=True, kw_only=True)
class Socks:
    read_timeout: Seconds = opt(15.0, "Deadline.")
    hash: str = opt("", "Hash.", choices=("", "host"))
    mux_version: int = opt(1, "Version.", key="mux.version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Red:
    tproxy: bool = opt(False, "TPROXY.")
    capture: CommaList = opt([], "Capture.")
    exclude: CommaList = opt([], "Exclude.", key="capture.exclude")
    ports: CommaList = opt([], "Ports.", key="capture.ports")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tcp:
    reuseport: bool = opt(False, "Share.")
    keepalive: bool = opt(False, "Keepalive.")
    net: CommaList = opt([], "Networks.")

    def validate(self) -> Iterable[tuple[str, str]]:
        for text in self.net:
            if "/" not in text:
                yield "net", f"{text!r} is not a network"


class Component:
    def __init__(self, options: type[Any] | None) -> None:
        self.Options = options


def catalog(*unbuilt: str) -> Catalog:
    """Return a catalog in which everything is built but the names given."""
    made = Catalog()
    options: dict[str, type[Any]] = {"socks5": Socks, "red": Red, "tcp": Tcp, "udp": Tcp}
    for kind, names in GOST_NAMES.items():
        for name in names - set(unbuilt):
            known = options.get(name) if kind != "handler" or name == "socks5" else None
            made.of(kind).register(Component(known), name)
    return made


def findings(text: str, *, unbuilt: tuple[str, ...] = (), **options: Any) -> list[str]:
    decoder = Decoder()
    config = decoder.config(parse(text, "yaml", Source("f")))
    assert decoder.problems == [] or options.pop("faulty", False)
    return [str(finding) for finding in check(config, catalog(*unbuilt), **options)]


def on(*arguments: str, **options: Any) -> list[str]:
    """Return the findings about a command line."""
    loaded = Loader(parse_args(arguments), environment={}).load()
    return [str(finding) for finding in report(loaded, catalog(), **options)]


def service(text: str, **options: Any) -> list[str]:
    """Return the findings about one service whose fields are given, with positions cut off."""
    return [line.partition(": ")[2] for line in findings(f"services: [{{name: a, {text}}}]", **options)]


def test_a_sound_configuration_has_no_findings() -> None:
    assert (
        findings(
            """
services:
- name: a
  addr: :1080
  bypass: b
  handler: {type: socks5, chain: c, auther: u, metadata: {readTimeout: 5s, skipauth: 10.0.0.0/8, cache.status.404: 1}}
  listener: {type: tcp, metadata: {reuseport: true}}
  metadata: {so_mark: 255, interface: eth0, labels: {a: b}}
chains:
- name: c
  hops:
  - name: h
    nodes: [{name: n, addr: "h:1", connector: {type: socks5}, dialer: {type: tcp}, metadata: {weight: 2}}]
bypasses: [{name: b, matchers: [10.0.0.0/8]}]
authers: [{name: u, auths: [{username: x, password: y}]}]
"""
        )
        == []
    )


# ---- references and names ----
@pytest.mark.parametrize(
    ("text", "path", "label", "effect"),
    [
        ("handler: {chain: x}", "handler.chain", "chain", "traffic goes out directly"),
        ("listener: {type: rtcp, chain: x}", "listener.chain", "chain", "traffic goes out directly"),
        ("handler: {auther: x}", "handler.auther", "auther", "every login is accepted"),
        ("handler: {authers: [x]}", "handler.authers[0]", "auther", "every login is accepted"),
        ("admission: x", "admission", "admission", "every client is refused"),
        ("bypasses: [x]", "bypasses[0]", "bypass", "nothing is bypassed"),
        ("resolver: x", "resolver", "resolver", "the system's resolver is used"),
        ("hosts: x", "hosts", "hosts table", "it has no effect"),
        ("limiter: x", "limiter", "limiter", "there is no limit"),
        ("climiter: x", "climiter", "connection limiter", "there is no limit"),
        ("rlimiter: x", "rlimiter", "rate limiter", "there is no limit"),
        ("quotas: [x]", "quotas[0]", "quota", "there is no limit"),
        ("observer: x", "observer", "observer", "it has no effect"),
        ("logger: x", "logger", "logger", "it has no effect"),
        ("forwarder: {hop: x}", "forwarder.hop", "hop", "traffic leaves the chain here"),
        ("handler: {type: tunnel, metadata: {ingress: x}}", "handler.metadata.ingress", "ingress", "it has no effect"),
        (
            "handler: {type: http, metadata: {mitm.bypass: x}}",
            "handler.metadata.mitm.bypass",
            "bypass",
            "nothing is bypassed",
        ),
        ("listener: {type: tun, metadata: {router: x}}", "listener.metadata.router", "router", "it has no effect"),
        (
            "forwarder: {nodes: [{addr: 'h:1', bypass: x}]}",
            "forwarder.nodes[0].bypass",
            "bypass",
            "nothing is bypassed",
        ),
        (
            "forwarder: {nodes: [{addr: 'h:1', matcher: {rule: '!BYPASS(`x`)'}}]}",
            "forwarder.nodes[0].matcher.rule",
            "bypass",
            "nothing is bypassed",
        ),
        (
            "handler: {chainGroup: {chains: [x]}}",
            "handler.chainGroup.chains[0].chain",
            "chain",
            "traffic goes out directly",
        ),
    ],
)
def test_dangling_references_are_errors_or_lenient_warnings(text: str, path: str, label: str, effect: str) -> None:
    unbuilt = ("tunnel", "http", "tun", "rtcp")
    strict = [line for line in service(text, unbuilt=unbuilt) if "[reference.dangling]" in line]
    assert strict == [f"error: services[0].{path}: no {label} is named 'x' (in GOST, {effect}) [reference.dangling]"]
    lenient = [line for line in service(text, unbuilt=unbuilt, lenient=True) if "[reference.dangling]" in line]
    assert lenient == [f"warning: services[0].{path}: no {label} is named 'x' ({effect}) [reference.dangling]"]


def test_the_nearest_name_is_suggested() -> None:
    found = findings("services: [{name: a, bypass: lokal}]\nbypasses: [{name: local}]")
    assert (
        "f:1:30: error: services[0].bypass: no bypass is named 'lokal' (in GOST, nothing is bypassed); did you mean 'local'? [reference.dangling]"
        in found
    )


def test_hops_of_chains_are_references_only_without_content() -> None:
    text = "chains: [{name: c, hops: [{name: h}]}]"
    assert "no hop is named 'h'" in findings(text)[0]
    assert findings(f"{text}\nhops: [{{name: h, file: {{path: /x}}}}]") == []
    # GOST takes a hop with a loader alone for a reference.
    assert findings("chains: [{name: c, hops: [{name: h, file: {path: /x}}]}]") == []


def test_names_of_quotas_are_trimmed() -> None:
    assert findings("services: [{name: a, quotas: [' q ']}]\nquotas: [{name: q, limit: 1GB}]") == []


def test_duplicate_and_missing_names() -> None:
    assert findings("bypasses: [{name: b}, {name: b}]")[1:] == [
        "f:1:30: error: bypasses[1].name: bypass 'b' is defined twice, first at f:1:19 [name.duplicate]",
        "f:1:30: warning: bypasses[1].name: bypass 'b' is not used by anything [name.unused]",
    ]
    assert findings("services: [{addr: ':1'}]") == [
        "f:1:12: error: services[0]: has no name; GOST would bind its port and never serve it [service.name]"
    ]
    assert "warning: loggers[0]: has no name" in findings("loggers: [{log: {}}]")[0]


def test_a_name_of_the_command_line_may_collide_with_a_file() -> None:
    inline = '{"services": [{"name": "service-0", "addr": ":2"}]}'
    [found] = on("-C", inline, "-L", ":1")
    assert found == (
        "-L#1:1: error: services[1].name: service 'service-0' is defined twice, first at -C#1:1:24 [name.duplicate]"
    )


# ---- components ----
def test_unknown_and_unbuilt_components() -> None:
    assert service("handler: {type: sock5}") == [
        "error: services[0].handler.type: unknown handler 'sock5'; did you mean 'socks5'? [config.unknown-component]"
    ]
    assert service("handler: {type: tls}") == [
        "error: services[0].handler.type: unknown handler 'tls'; 'tls' is a listener [config.unknown-component]"
    ]
    assert service("listener: {type: kcp}", unbuilt=("kcp",)) == [
        "error: services[0].listener.type: listener 'kcp' is not available in this version [unavailable]"
    ]
    assert service("addr: ''", unbuilt=("auto",)) == [
        "error: services[0].handler: handler 'auto' is not available in this version [unavailable]"
    ]
    found = findings("hops: [{name: h, nodes: [{name: n, addr: 'h:1', dialer: {type: wg}}]}]")
    assert found == ["f:1:64: error: hops[0].nodes[0].dialer.type: unknown dialer 'wg' [config.unknown-component]"]


def test_fields_that_this_version_does_not_act_upon() -> None:
    text = "quotas: [{name: q, limit: 1GB}]\nauthers: [{name: u, plugin: {addr: 'h:1'}}]\nservices: [{name: a, quotas: [q], handler: {auther: u}}]"
    assert findings(text, unsupported={"Service.quotas", "*.plugin"}) == [
        "f:2:29: error: authers[0].plugin: 'plugin' is not available in this version [unavailable]",
        "f:3:30: error: services[0].quotas: 'quotas' is not available in this version [unavailable]",
    ]
    assert findings(text) == []


def test_the_kill_switch_is_not_passed_over() -> None:
    assert "killSwitch: 'killSwitch' is not available in this version" in findings("killSwitch: true")[0]


# ---- addresses ----
@pytest.mark.parametrize("address", ["8080", "'foo:x'", "':70000'", "'::1:80'"])
def test_bad_listen_addresses(address: str) -> None:
    assert "is not an address" in service(f"addr: {address}")[0]
    assert service(f"addr: {address}, handler: {{type: rtcp}}, listener: {{type: rtcp}}") == []


def test_path_listeners_need_a_path() -> None:
    assert service("handler: {type: unix}, listener: {type: unix}") == [
        "error: services[0]: a unix listener needs a path as addr [address]"
    ]


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ("addr: ':80'", "addr: ':80'", True),
        ("addr: ':80'", "addr: '0.0.0.0:80'", True),
        ("addr: ':80'", "addr: '[::]:80'", True),
        ("addr: ':80'", "addr: '127.0.0.1:80'", False),
        ("addr: ':0'", "addr: ':0'", False),
        ("addr: ''", "addr: ''", False),
        ("addr: ':80'", "addr: ':80', listener: {type: tls}", True),
        ("addr: ':80'", "addr: ':80', listener: {type: quic}", False),
        ("addr: ':80', listener: {type: quic}", "addr: ':80', listener: {type: redu}", True),
        ("addr: ':80', listener: {type: dns}", "addr: ':80', listener: {type: dns, metadata: {mode: tls}}", False),
        ("addr: ':80'", "addr: ':80', metadata: {netns: x}", False),
        (
            "addr: ':80', listener: {metadata: {reuseport: true}}",
            "addr: ':80', listener: {metadata: {reuseport: 1}}",
            False,
        ),
        ("addr: ':80', listener: {metadata: {reuseport: true}}", "addr: ':80'", True),
        ("addr: /a, listener: {type: unix}", "addr: /a, listener: {type: unix}", True),
        ("addr: ':80', listener: {type: rtcp}", "addr: ':80', listener: {type: rtcp}", False),
    ],
)
def test_two_services_at_one_address(first: str, second: str, clash: bool) -> None:
    found = findings(f"services: [{{name: a, {first}}}, {{name: b, {second}}}]")
    assert [line for line in found if "[address.duplicate]" in line] == (found if clash else [])
    if clash:
        assert "is the address of 'a' too" in found[0]


def test_node_and_target_addresses() -> None:
    def node(address: str, dialer: str) -> list[str]:
        return findings(
            f"hops: [{{name: h, nodes: [{{name: n, addr: {address}, connector: {{type: {dialer}}}, dialer: {{type: {dialer}}}}}]}}]"
        )

    assert "'h' is not an address: 'h' has no port" in node("h", "tcp")[0]
    assert "'' is empty" in node("''", "tcp")[0]
    assert node("/x.sock", "unix") == []
    assert node("''", "direct") == []
    assert service("forwarder: {nodes: [{addr: dns.example.com}, {addr: 'tls://1.1.1.1:853'}, {addr: /x.sock}]}") == []
    assert "'h:x' is not an address" in service("forwarder: {nodes: [{addr: 'h:x'}]}")[0]


# ---- values ----
@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (
            "bypasses: [{name: b, matchers: ['10.0.0.0/8:80']}]",
            "bypasses[0].matchers[0]: '10.0.0.0/8:80' is not a network such as 10.0.0.0/8; a network takes no port [pattern.bypass]",
        ),
        (
            "bypasses: [{name: b, network: icmp}]",
            "bypasses[0].network: 'icmp' is not one of tcp, udp [bypass.network]",
        ),
        (
            "admissions: [{name: b, matchers: ['*']}]",
            "admissions[0].matchers[0]: '*' holds a wildcard, which admissions do not know; use a network [pattern.admission]",
        ),
        (
            "limiters: [{name: b, limits: ['$ 100']}]",
            "limiters[0].limits[0]: '$ 100' says '100', which is not a size such as 512KB, and would limit nothing [limit]",
        ),
        (
            "climiters: [{name: b, limits: ['$ x']}]",
            "climiters[0].limits[0]: '$ x' says 'x', which is not a number, and would limit nothing [limit]",
        ),
        (
            "rlimiters: [{name: b, limits: ['$']}]",
            "rlimiters[0].limits[0]: '$' is not KEY RATE, such as '$ 10' [limit]",
        ),
        (
            "quotas: [{name: b, limit: 10}]",
            "quotas[0].limit: '10' is not a size such as 10GB, and would limit nothing [limit]",
        ),
        (
            "quotas: [{name: b, startsAt: 2026-01-01}]",
            "quotas[0].startsAt: '2026-01-01' is not a time such as 2026-01-31T00:00:00Z [quota.time]",
        ),
        ("quotas: [{name: b, flush: '10'}]", "quotas[0].flush: '10' is not a duration such as 10s [config.type]"),
        (
            "quotas: [{name: b, store: {type: redis}}]",
            "quotas[0].store.type: 'redis' saves nothing; use file [quota.store]",
        ),
        (
            "resolvers: [{name: b, nameservers: [{addr: 'quic://1.1.1.1'}]}]",
            "resolvers[0].nameservers[0].addr: 'quic://1.1.1.1' has a scheme that is none of udp, tcp, tls, https [resolver.addr]",
        ),
        (
            "resolvers: [{name: b, nameservers: [{addr: 1.1.1.1, only: v6}]}]",
            "resolvers[0].nameservers[0].only: 'v6' is not one of ipv4, ipv6, ip4, ip6; did you mean 'ipv6'? [resolver.family]",
        ),
        (
            "resolvers: [{name: b, nameservers: [{addr: 1.1.1.1, clientIP: x}]}]",
            "resolvers[0].nameservers[0].clientIP: 'x' is not an address [address]",
        ),
        (
            "hosts: [{name: b, mappings: [{ip: 1.2.3, hostname: a}]}]",
            "hosts[0].mappings[0].ip: '1.2.3' is not an address [hosts.ip]",
        ),
        (
            "ingresses: [{name: b, rules: [{hostname: a}]}]",
            "ingresses[0].rules[0]: needs hostname and endpoint [ingress.incomplete]",
        ),
        (
            "routers: [{name: b, routes: [{dst: 10.0.0.0/99, gateway: a}]}]",
            "routers[0].routes[0].dst: '10.0.0.0/99' is not a network such as 10.0.0.0/8 [network]",
        ),
        (
            "authers: [{name: b, auths: [{password: p}]}]",
            "authers[0].auths[0]: has no user name and is passed over [auth.no-username]",
        ),
        (
            "authers: [{name: b, http: {url: x}}]",
            "authers[0].http.url: 'x' is not a URL that begins with http:// [loader.incomplete]",
        ),
        (
            "authers: [{name: b, plugin: {type: http, addr: 'h:1'}}]",
            "authers[0].plugin.addr: 'h:1' is not a URL such as http://127.0.0.1:8000 [plugin.addr]",
        ),
        (
            "log: {level: verbose}",
            "log.level: 'verbose' is not one of trace, debug, info, warn, error, fatal [log.level]",
        ),
        ("log: {format: jsn}", "log.format: 'jsn' is not one of json, text; did you mean 'json'? [log.format]"),
        ("api: {accesslog: true}", "api: has no addr; it would listen on a random port of all interfaces [address]"),
        ("api: {addr: 'x'}", "api.addr: 'x' is not an address: 'x' has no port; write x:PORT [address]"),
        ("tls: {certFile: a}", "tls: a certificate needs both files; keyFile is missing [tls.pair]"),
        (
            "tls: {options: {minVersion: TLS12}}",
            "tls.options.minVersion: 'TLS12' is not one of VersionTLS10, VersionTLS11, VersionTLS12, VersionTLS13",
        ),
        ("chains: [{name: b}]", "chains[0]: has no hops; traffic would go out directly [chain.empty]"),
        (
            "chains: [{name: b, hops: [{}]}]",
            "chains[0].hops[0]: has no nodes; traffic would leave the chain here [hop.empty]",
        ),
        ("hops: [{name: h, selector: {strategy: robin}}]", "hops[0].selector.strategy: 'robin' is not one of round,"),
        (
            "hops: [{name: h, sockopts: {mark: 0x02000000}}]",
            "hops[0].sockopts.mark: 0x2000000 touches the bits 0x03000000, which gostnet uses itself [so_mark.reserved]",
        ),
        (
            "hops: [{name: h, metadata: {so_mark: 0x01000000}}]",
            "hops[0].metadata.so_mark: 0x1000000 touches the bits 0x03000000, which gostnet uses itself [config.value]",
        ),
        ("authers: [{name: b, file: {}}]", "authers[0].file: has no path [loader.incomplete]"),
        ("authers: [{name: b, redis: {db: 1}}]", "authers[0].redis: has no addr [loader.incomplete]"),
        ("authers: [{name: b, plugin: {type: grpc}}]", "authers[0].plugin: has no addr [plugin.addr]"),
        (
            "routers: [{name: b, routes: [{dst: 10.0.0.0/8}]}]",
            "routers[0].routes[0]: needs dst and gateway [router.incomplete]",
        ),
        (
            "routers: [{name: b, routes: [{net: x, gateway: a}]}]",
            "routers[0].routes[0].net: 'x' is not a network such as 10.0.0.0/8 [network]",
        ),
        ("hosts: [{name: b, mappings: [{ip: 1.2.3.4}]}]", "hosts[0].mappings[0]: has no hostname [hosts.name]"),
        ("metrics: {addr: x}", "metrics.addr: 'x' is not an address: 'x' has no port; write x:PORT [address]"),
        (
            "hops: [{name: h, sockopts: {mark: -1}}]",
            "hops[0].sockopts.mark: -1 is not a mark of 32 bits [so_mark.reserved]",
        ),
        (
            "hops: [{name: h, nodes: [{name: n, addr: 'h:1', probe: {type: cmd}}]}]",
            "hops[0].nodes[0].probe: has no command; nothing would be probed [probe.incomplete]",
        ),
        (
            "hops: [{name: h, nodes: [{name: n, addr: 'h:1', probe: {type: tcp, addr: 'h:1', interval: 1ms}}]}]",
            "hops[0].nodes[0].probe.interval: 0.001s is too short; write a unit, as in 30s: a bare number counts nanoseconds [probe.time]",
        ),
        (
            "hops: [{name: h, nodes: [{name: n, addr: 'h:1', probe: {type: http, addr: 'h:1', httpHeaders: {'a b': c}}}]}]",
            "hops[0].nodes[0].probe.httpHeaders: 'a b' is not a header and its value [probe.header]",
        ),
        (
            "hops: [{name: h, nodes: [{name: n, addr: 'h:1', matcher: {rule: 'Host(`a`) && Hots(`b`)'}}]}]",
            "hops[0].nodes[0].matcher.rule: there is no function 'Hots'; did you mean 'Host'?, at character 14 of the rule [matcher.rule]",
        ),
        (
            "hops: [{name: h, nodes: [{name: n, addr: 'h:1', matcher: {rule: 'HostRegexp(`(?=a)`)'}}]}]",
            "hops[0].nodes[0].matcher.rule: HostRegexp: '(?=a)' uses (?=a, which RE2 does not have, at character 1 of the rule [matcher.rule]",
        ),
    ],
)
def test_values_that_gost_passes_over_are_errors(text: str, finding: str) -> None:
    errors = [line for line in findings(text) if ": error: " in line]
    assert len(errors) == 1
    assert f": error: {finding}" in errors[0]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (
            "handler: {auth: {password: p}}",
            "error: services[0].handler.auth: a password without a user name protects nothing: everybody is let in [auth.no-username]",
        ),
        (
            "handler: {auth: {username: u}}",
            "warning: services[0].handler.auth: user 'u' is let in with any password [auth.any-password]",
        ),
        ("handler: {retries: -1}", "error: services[0].handler.retries: -1 is less than 0 [handler.retries]"),
        (
            "handler: {tls: {caFile: c}}",
            "error: services[0].handler.tls.caFile: clients are only verified by a server that has certFile and keyFile too [tls.ca-ignored]",
        ),
        (
            "listener: {type: tls, tls: {caFile: c}}",
            "error: services[0].listener.tls.caFile: clients are only verified by a server that has certFile and keyFile too [tls.ca-ignored]",
        ),
        (
            "listener: {type: tcp, tls: {certFile: c, keyFile: k}}",
            "warning: services[0].listener.tls: a tcp listener speaks no TLS; its certificate is not used [tls.unused]",
        ),
        (
            "listener: {type: tcp, auth: {username: u, password: p}}",
            "error: services[0].listener.auth: a tcp listener asks for no credentials; give them to the handler [auth.unused]",
        ),
        ("forwarder: {}", "error: services[0].forwarder: has no nodes and no hop [forwarder.empty]"),
        (
            "handler: {chainGroup: {chains: [{}]}}",
            "error: services[0].handler.chainGroup.chains[0]: names no chain; traffic would go out directly [chain.empty]",
        ),
        (
            "recorders: [{record: recorder.service.handler}]",
            "error: services[0].recorders[0]: has no name of a recorder [recorder.name]",
        ),
        (
            "handler: {type: http}, listener: {type: ssh, auth: {password: p}}",
            "error: services[0].listener.auth: a password without a user name protects nothing: everybody is let in [auth.no-username]",
        ),
        (
            "handler: {chainGroup: {selector: {strategy: parallel}}}",
            "error: services[0].handler.chainGroup.selector.strategy: 'parallel' works among nodes only, not among chains or hops [selector.strategy]",
        ),
        (
            "listener: {type: udp}, forwarder: {nodes: [{addr: 'h:500'}]}",
            "warning: services[0].listener: each client gets one reply; set keepalive=true for what answers more often [udp.one-reply]",
        ),
        (
            "metadata: {dialTimeout: soon}",
            "error: services[0].metadata.dialTimeout: 'soon' is not a duration such as 10s [config.value]",
        ),
        (
            "metadata: {limiter.scope: conns}",
            "error: services[0].metadata.limiter.scope: 'conns' is not one of service, conn, client; did you mean 'conn'? [config.value]",
        ),
        (
            "handler: {metadata: {skipauth: '10.0.0.0/8,x'}}",
            "error: services[0].handler.metadata.skipauth: 'x' is not a network or address such as 10.0.0.0/8 [config.value]",
        ),
        (
            "listener: {metadata: {net: 10.0.0.1}}",
            "error: services[0].listener.metadata.net: '10.0.0.1' is not a network [config.value]",
        ),
    ],
)
def test_values_of_services(text: str, finding: str) -> None:
    assert service(text) == [finding]


def test_advice_is_silent_where_it_does_not_apply() -> None:
    assert service("handler: {type: ss, auth: {username: none}}") == []
    for text in ("metadata: {keepalive: true}", "metadata: {KeepAlive: 'true'}"):
        assert service(f"listener: {{type: udp, {text}}}, forwarder: {{nodes: [{{addr: 'h:500'}}]}}") == []
    assert service("listener: {type: udp}, forwarder: {nodes: [{addr: 'h:53'}]}") == []
    assert (
        "[auth.unused]"
        in service("handler: {auth: {username: u, password: p}}, listener: {auth: {username: u, password: p}}")[0]
    )


def test_what_has_no_effect_is_warned_about() -> None:
    assert findings("climiters: [{name: c, limits: ['$ 0']}]\nservices: [{name: a, climiter: c}]") == [
        "f:1:32: warning: climiters[0].limits[0]: '$ 0' limits nothing: 0 is no limit [limit.zero]"
    ]
    assert "loggers[0]: has no log and receives nothing [logger.empty]" in findings("loggers: [{name: l}]")[0]
    assert "metrics: has no addr and is off [address]" in findings("metrics: {path: /x}")[0]
    node = "{name: n, addr: 'h:1', dialer: {type: tls, auth: {username: u}}}"
    assert findings(f"hops: [{{name: h, nodes: [{node}]}}]") == [
        "f:1:75: warning: hops[0].nodes[0].dialer.auth: a tls dialer sends no credentials; give them to the connector [auth.unused]"
    ]
    found = service("handler: {chainGroup: {chains: [x]}}, listener: {chain: x}")
    assert (
        "warning: services[0].listener.chain: a tcp listener does not use a chain; give it to the handler [chain.unused]"
        in found
    )
    found = service("handler: {auther: x, auth: {username: u, password: p}}")
    assert "warning: services[0].handler.auth: is not used because there is an auther [auth.unused]" in found


def test_open_apis_are_warned_about() -> None:
    assert "[api.open]" in findings("api: {addr: ':1'}")[0]
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:///run/x"):
        assert findings(f"api: {{addr: '{address}'}}") == []
    assert findings("api: {addr: ':1', auth: {username: u, password: p}}") == []


# ---- metadata ----
def test_unknown_metadata_keys() -> None:
    text = "handler: {type: socks5, metadata: {readTimeot: 1s, mux: {version: 2}, reuseport: true}}"
    assert service(text) == [
        "warning: services[0].handler.metadata.readTimeot: nothing reads this key; did you mean 'readTimeout'? [metadata.unknown-key]",
        "warning: services[0].handler.metadata.mux: nested keys are not read; write them with a dot, such as mux.version [metadata.unknown-key]",
        "warning: services[0].handler.metadata.reuseport: has no effect here; it is an option of another part of this service or hop [metadata.unknown-key]",
    ]
    assert all(line.startswith("error: ") for line in service(text, strict=True))


def test_unbuilt_components_may_know_any_key() -> None:
    found = service("handler: {type: http, metadata: {x: 1}}", unbuilt=("http",))
    assert [line for line in found if "unknown-key" in line] == []


def test_keys_of_a_url_are_known_if_any_part_knows_them() -> None:
    assert on("-L", "socks5://:1?readTimeout=5s&reuseport=true&interface=eth0&enableStats=true&prefer=ipv6") == []
    [found] = on("-L", "socks5://:1?readTimeot=5s")
    assert found.startswith("-L#1:13: warning: services[0].")
    assert found.endswith(
        "metadata.readTimeot: nothing reads this key; did you mean 'readTimeout'? [metadata.unknown-key]"
    )
    assert on("-L", "socks5://:1?readTimeout=soon") == [
        "-L#1:13: error: services[0].handler.metadata.readTimeout: 'soon' is not a duration such as 10s [config.value]"
    ]
    assert on("-L", ":1", "-F", "socks5://h:1?readTimeout=5s&keepalive=true&weight=2") == []
    assert len(on("-L", ":1", "-F", "socks5://h:1?foo=1")) == 1


def test_capture_is_for_listeners_that_capture() -> None:
    assert (
        service(
            "handler: {type: red}, listener: {type: red, metadata: {capture: [lan0, local], capture.exclude: 192.0.2.0/24, capture.ports: '80,8000-8100'}}"
        )
        == []
    )
    assert service("listener: {metadata: {capture: [lan0]}}") == [
        "error: services[0].listener.metadata.capture: a tcp listener captures nothing; use red (TCP), redu (UDP) or tungo [capture.listener]"
    ]
    assert on("-L", "socks5://:1?capture=lan0") == [
        "-L#1:13: error: services[0].listener.metadata.capture: a tcp listener captures nothing; use red (TCP), redu (UDP) or tungo [capture.listener]"
    ]
    assert on("-L", "red://:1?capture=lan0&tproxy=true") == []


@pytest.mark.parametrize(
    ("metadata", "finding"),
    [
        ("capture: 'a/b'", "capture: 'a/b' is not an interface name [capture.value]"),
        ("capture: abcdefghijklmnop", "capture: 'abcdefghijklmnop' is not an interface name [capture.value]"),
        (
            "capture: lan0, capture.exclude: x",
            "capture.exclude: 'x' is not a network or address such as 10.0.0.0/8 [capture.value]",
        ),
        (
            "capture: lan0, capture.ports: 80-70",
            "capture.ports: '80-70' is a range whose end is before its beginning [capture.value]",
        ),
        ("capture.ports: 80", "capture.ports: says nothing without capture [capture.unused]"),
        (
            "capture: {a: b}",
            "capture: {'a': 'b'} is not a list, or a string of items separated by commas [config.value]",
        ),
    ],
)
def test_capture_values(metadata: str, finding: str) -> None:
    found = service(f"handler: {{type: red}}, listener: {{type: red, metadata: {{{metadata}}}}}")
    assert found == [f"error: services[0].listener.metadata.{finding}"]


# ---- the report ----
def test_unknown_keys_are_errors_when_checking_or_strict() -> None:
    inline = '{"services": [{"name": "a", "adr": ":1"}]}'
    [running] = on("-C", inline)
    assert running == "-C#1:1:29: warning: services[0].adr: unknown key; did you mean 'addr'? [config.unknown-key]"
    assert ": error: " in on("-C", inline, checking=True)[0]
    assert ": error: " in on("-C", inline, strict=True)[0]


def test_what_could_not_be_read_is_not_checked_further() -> None:
    inline = '{"services": [{"name": "a", "addr": 5, "bypass": "x"}]}'
    [found] = on("-C", inline)
    assert "[config.type]" in found


def test_findings_come_in_the_order_of_the_sources() -> None:
    found = on("-C", '{"services": [{"name": "a", "bypass": "x"}], "log": {"level": "x"}}', "-L", "htp://:1?x=1#y")
    assert [line.split(": ")[0] for line in found] == [
        "-L#1:1",
        "-L#1:10",
        "-L#1:13",
        "-C#1:1:39",
        "-C#1:1:63",
    ]


def test_findings_at_one_place_are_said_once() -> None:
    place = Place(Source("f"), 1, 1)
    one = Finding(place, "a", "x", "c")
    assert ordered([one, one, Finding(place, "b", "x", "c"), Finding(place, "a", "y", "c")]) == [
        one,
        Finding(place, "a", "y", "c"),
    ]


def test_summary_counts() -> None:
    place = Place(Source("f"), 1, 1)
    assert summary([]) == "0 errors, 0 warnings"
    assert summary([Finding(place, "", "x", "c"), Finding(place, "", "y", "c", "warning")]) == "1 errors, 1 warnings"


def test_findings_as_data() -> None:
    found = Finding(Place(Source("f"), 2, 3), "a.b", "is wrong", "c.d")
    assert str(found) == "f:2:3: error: a.b: is wrong [c.d]"
    assert found.as_data() == {
        "source": "f",
        "line": 2,
        "column": 3,
        "severity": "error",
        "path": "a.b",
        "message": "is wrong",
        "code": "c.d",
    }


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-5, 70000)
        | st.text(max_size=6)
        | st.sampled_from(["a", "tcp", "10.0.0.0/8"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    "name addr handler listener forwarder nodes metadata auth limits matchers type chain hops plugin "
                    "capture so_mark skipauth selector tls".split(" ")
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=25,
    ).flatmap(
        lambda value: st.tuples(st.sampled_from(["services", "chains", "hops", "limiters", "bypasses"]), st.just(value))
    )
)
def test_whatever_can_be_read_can_be_checked(pair: tuple[str, Any]) -> None:
    decoder = Decoder()
    config = decoder.config(parse(json.dumps({pair[0]: pair[1]}), "json", Source("f")))
    assert isinstance(config, Config)
    for finding in check(config, catalog("kcp")):
        assert str(finding).startswith("f:1:")


@pytest.mark.parametrize(
    ("row", "text", "finding"),
    [
        ("R11", "services: [{name: s, handler: {chain: nope}}]", "no chain is named 'nope'"),
        (
            "G06",
            "services: [{name: s, handler: {chainGroup: {chains: [{chain: c, matcher: {rule: x}}]}}}]",
            "there is no function 'x'",
        ),
        (
            "G08",
            "services: [{name: s, handler: {chainGroup: {chains: [c], selector: {strategy: parallel}}}}]",
            "'parallel' works among nodes only",
        ),
        (
            "P04",
            "hops: [{name: h, nodes: [{name: n, addr: 'h:1', probe: {type: http}}]}]",
            "has no addr; nothing would be probed",
        ),
    ],
)
def test_routes_that_gost_would_get_wrong_are_errors(row: str, text: str, finding: str) -> None:
    assert any(": error: " in line and finding in line for line in findings(text)), row
