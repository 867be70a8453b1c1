"""What -L, -F, -api and -metrics stand for."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config.argv import parse_args
from gostnet.config.dump import dump
from gostnet.config.load import Loaded, Loader


def load(*arguments: str, worker: str = "") -> Loaded:
    environment = {"_GOST_ID": worker} if worker else {}
    return Loader(parse_args(arguments), environment=environment).load()


def built(line: str, **options: str) -> dict[str, Any]:
    """Return the configuration that a command line spells, as data; nothing may be wrong with it."""
    loaded = load(*shlex.split(line), **options)
    assert loaded.findings == []
    result: dict[str, Any] = json.loads(dump(loaded.config, "json"))
    return result


def faulty(line: str) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration in spite of findings, and the findings."""
    loaded = load(*shlex.split(line))
    return json.loads(dump(loaded.config, "json")), [str(finding) for finding in loaded.findings]


def service(line: str) -> dict[str, Any]:
    [found] = built(line)["services"]
    return dict(found)


def node(line: str) -> dict[str, Any]:
    [hop] = built(f"-L :1 {line}")["chains"][0]["hops"]
    [found] = hop["nodes"]
    return dict(found)


@pytest.mark.parametrize(
    ("url", "handler", "listener"),
    [
        (":8080", "auto", "tcp"),
        ("auto://:8080", "auto", "tcp"),
        ("HTTP://:8080", "http", "tcp"),
        ("https://:1", "http", "tls"),
        ("http+tls://:1", "http", "tls"),
        ("http2://:1", "http2", "http2"),
        ("http3://:1", "http3", "http3"),
        ("h2://:1", "auto", "h2"),
        ("h2c://:1", "auto", "h2c"),
        ("h3://:1", "auto", "h3"),
        ("wt://:1", "auto", "wt"),
        ("socks://:1", "socks", "tcp"),
        ("socks5://:1", "socks5", "tcp"),
        ("socks4a://:1", "socks4a", "tcp"),
        ("ss://:1", "ss", "tcp"),
        ("ssu://:1", "ssu", "udp"),
        ("relay://:1", "relay", "tcp"),
        ("masque://:1", "masque", "tcp"),
        ("tcp://:1", "tcp", "tcp"),
        ("udp://:1", "udp", "udp"),
        ("forward://:1", "forward", "tcp"),
        ("rtcp://:1", "rtcp", "rtcp"),
        ("red://:1", "red", "red"),
        ("redir://:1", "redir", "redir"),
        ("redu://:1", "redu", "redu"),
        ("tun://:1", "tun", "tun"),
        ("tap://:1", "tap", "tap"),
        ("tungo://:1", "tungo", "tungo"),
        ("dns://:1", "dns", "dns"),
        ("stdio://h:1", "tcp", "stdio"),
        ("ssh://:1", "auto", "ssh"),
        ("sshd://:1", "sshd", "sshd"),
        *(
            (f"{name}://:1", "auto", name)
            for name in ("tls", "mtls", "mtcp", "ws", "wss", "mws", "mwss", "grpc", "quic")
        ),
        *((f"{name}://:1", "auto", name) for name in ("kcp", "dtls", "ftcp", "icmp", "icmp6", "pht", "phts", "ohttp")),
    ],
)
def test_scheme_of_a_service(url: str, handler: str, listener: str) -> None:
    found = service(f"-L {url}")
    assert (found["handler"]["type"], found["listener"]["type"]) == (handler, listener)


@pytest.mark.parametrize(
    ("url", "connector", "dialer"),
    [
        ("h:1", "http", "tcp"),
        ("https://h:1", "http", "tls"),
        ("http2://h:1", "http2", "http2"),
        ("http3://h:1", "http", "http3"),
        ("h3://h:1", "http", "h3"),
        ("socks5://h:1", "socks5", "tcp"),
        ("socks5+tls://h:1", "socks5", "tls"),
        ("ssu://h:1", "ssu", "udp"),
        ("udp://h:1", "http", "udp"),
        ("direct://:0", "direct", "direct"),
        ("virtual://:0", "virtual", "virtual"),
        ("ssh://h:1", "http", "ssh"),
        ("sshd://h:1", "sshd", "sshd"),
        ("utls://h:1", "http", "utls"),
        ("ohttps://h:1", "http", "ohttps"),
        ("masque+h3-masque://h:1", "masque", "h3-masque"),
    ],
)
def test_scheme_of_a_node(url: str, connector: str, dialer: str) -> None:
    found = node(f"-F {url}")
    assert (found["connector"]["type"], found["dialer"]["type"]) == (connector, dialer)


@pytest.mark.parametrize(
    ("line", "place", "message"),
    [
        (
            "-L sock5://:1",
            "-L#1:1",
            "scheme: 'sock5' is not a scheme; did you mean 'socks5'?; GOST would silently take 'auto'",
        ),
        (
            "-L htpt+tls://:1",
            "-L#1:1",
            "scheme: 'htpt' is not a handler; did you mean 'http'?; GOST would silently take 'auto'",
        ),
        (
            "-L http+tsl://:1",
            "-L#1:1",
            "scheme: 'tsl' is not a listener; did you mean 'tls'?; GOST would silently take 'tcp'",
        ),
        ("-L a+b+c://:1", "-L#1:1", "scheme: 'a+b+c' has more than two parts; GOST would ignore all of them"),
        (
            "-L :1 -F wg://h:1",
            "-F#1:1",
            "scheme: 'wg' is not a scheme; GOST would silently take 'http'",
        ),
        (
            "-L :1 -F socks5+tlss://h:1",
            "-F#1:1",
            "scheme: 'tlss' is not a dialer; did you mean 'tls'?; GOST would silently take 'tcp'",
        ),
    ],
)
def test_misspelt_scheme_is_an_error_and_means_what_gost_takes(line: str, place: str, message: str) -> None:
    data, findings = faulty(line)
    assert findings == [f"{place}: error: {message} [url.scheme]"]
    assert data["services"][0]["handler"]["type"] in ("auto", "http")


@pytest.mark.parametrize("name", ["unknown", "foo+bar"])
def test_fallback_of_unknown_schemes(name: str) -> None:
    data, _ = faulty(f"-L {name}://:1 -F {name}://h:1")
    [found] = data["services"]
    assert (found["handler"]["type"], found["listener"]["type"]) == ("auto", "tcp")
    [hop] = data["chains"][0]["hops"]
    assert (hop["nodes"][0]["connector"]["type"], hop["nodes"][0]["dialer"]["type"]) == ("http", "tcp")


def test_addresses() -> None:
    assert service("-L '  :1  '")["addr"] == ":1"
    assert service("-L 8080")["addr"] == "8080"
    assert service("-L tcp://[::1]:80")["addr"] == "[::1]:80"
    assert service("-L http://1.2.3.4:")["addr"] == "1.2.3.4:0"


def test_user_information() -> None:
    found = service("-L 'http://user:pa%3Ass@:8080?a=1&a=2&B=x'")
    assert found["handler"]["auth"] == {"username": "user", "password": "pa:ss"}
    for part in (found, found["handler"], found["listener"]):
        assert part["metadata"] == {"a": "1", "B": "x"}
    assert service("-L http://u@:1")["handler"]["auth"] == {"username": "u"}
    assert service("-L http://:p@:1")["handler"]["auth"] == {"password": "p"}
    assert service("-L http://@:1")["handler"]["auth"] == {}
    assert service("-L ss://aes-256-gcm:p@ss@:8338")["handler"]["auth"] == {
        "username": "aes-256-gcm",
        "password": "p@ss",
    }
    assert service("-L http://u%2Bv:a+b@:1")["handler"]["auth"] == {"username": "u+v", "password": "a+b"}


def test_base64_credentials() -> None:
    assert service("-L 'http://:1?auth=dXNlcjpwYXNz'")["handler"] == {
        "type": "http",
        "auth": {"username": "user", "password": "pass"},
    }
    assert service("-L 'http://u:p@:1?auth=dXNlcjpwYXNz'")["handler"]["auth"] == {"username": "u", "password": "p"}
    assert service("-L ss://YWVzLTEyOC1nY206cGFzcw@:8338")["handler"]["auth"] == {
        "username": "aes-128-gcm",
        "password": "pass",
    }
    assert service("-L ss://none@:8338")["handler"]["auth"] == {"username": "none"}
    assert node("-F ssh://YTpi@h:22")["dialer"]["auth"] == {"username": "a", "password": "b"}
    assert node("-F 'http://h:1?auth=dTpw'")["connector"]["auth"] == {"username": "u", "password": "p"}


def test_broken_base64_is_fatal() -> None:
    for line in ("-L http://:1?auth=!!!", "-L :1 -F http://h:1?auth=!!!"):
        loaded = load(*line.split())
        assert loaded.broken
        assert "is not base64 of USER:PASSWORD" in str(loaded.findings[0])
        assert "!!!" not in str(loaded.findings[0])


def test_ssh_credentials_go_to_listener_and_dialer() -> None:
    found = service("-L ssh://u:p@:22")
    assert found["listener"]["auth"] == {"username": "u", "password": "p"}
    assert "auth" not in found["handler"]
    found = node("-F sshd://u:p@h:22")
    assert found["dialer"]["auth"] == {"username": "u", "password": "p"}
    assert "auth" not in found["connector"]


def test_server_certificate() -> None:
    found = service("-L 'http+tls://gost:gost@:8443?cert=c.pem&key=k.pem&ca=ca.pem'")
    assert found["listener"] == {"type": "tls", "tls": {"certFile": "c.pem", "keyFile": "k.pem", "caFile": "ca.pem"}}
    assert "metadata" not in found
    found = service("-L 'http://:1?key=abc&secure=true&ca=x'")
    assert found["listener"] == {"type": "tcp", "metadata": {"secure": "true"}}


def test_forward_targets() -> None:
    found = service("-L tcp://:8080/192.168.1.1:80,192.168.1.2:80")
    assert found["forwarder"]["nodes"] == [
        {"name": "target-0", "addr": "192.168.1.1:80"},
        {"name": "target-1", "addr": "192.168.1.2:80"},
    ]
    assert service("-L 'tcp://:8080/[::1]:80'")["forwarder"]["nodes"][0]["addr"] == "[::1]:80"
    assert service("-L tcp://:8080/a%20b:80")["forwarder"]["nodes"][0]["addr"] == "a%20b:80"
    assert service("-L 'tcp://:8080/a b:80'")["forwarder"]["nodes"][0]["addr"] == "a%20b:80"
    assert "forwarder" not in service("-L tcp://:8080/")
    assert [each["addr"] for each in service("-L udp://:1/h:1000-1001")["forwarder"]["nodes"]] == ["h:1000", "h:1001"]
    found = service("-L stdio://example.com:22")
    assert (found["addr"], found["forwarder"]["nodes"][0]["addr"]) == ("example.com:22", "example.com:22")


@pytest.mark.parametrize(
    ("url", "handler", "listener"),
    [
        ("forward+tls://:1/2.2.2.2:80", "forward", "tls"),
        ("relay://:1/2.2.2.2:80", "relay", "tcp"),
        ("relay+wss://:1/2.2.2.2:80", "relay", "wss"),
        ("tls://:1/2.2.2.2:80", "forward", "tls"),
        ("tap://:8421/h:8421", "tap", "tap"),
        ("rtcp://:2222/:22", "rtcp", "rtcp"),
    ],
)
def test_a_target_decides_about_the_handler(url: str, handler: str, listener: str) -> None:
    found = service(f"-L {url}")
    assert (found["handler"]["type"], found["listener"]["type"]) == (handler, listener)


@pytest.mark.parametrize(("url", "handler"), [("http://[::]:8080/x:1", "tcp"), ("socks5+tls://:1/h:2", "forward")])
def test_a_target_replaces_a_handler_that_was_asked_for(url: str, handler: str) -> None:
    data, findings = faulty(f"-L {url}")
    assert data["services"][0]["handler"]["type"] == handler
    assert ": warning: " in findings[0]
    assert "is not spoken [url.handler-replaced]" in findings[0]


def test_port_ranges_pair_with_targets() -> None:
    def targets(line: str) -> list[list[str]]:
        return [
            [each["addr"] for each in found.get("forwarder", {"nodes": []})["nodes"]]
            for found in faulty(line)[0]["services"]
        ]

    assert targets("-L tcp://:8000-8002/192.168.1.1:9000-9002") == [[f"192.168.1.1:900{n}"] for n in range(3)]
    assert targets("-L tcp://:8000-8002/h:80") == [["h:80"]] * 3
    assert targets("-L tcp://:8000-8001/h:9000-9004") == [["h:9000"], ["h:9001"]]
    assert targets("-L tcp://:8000-8002/a:1,b:2") == [["a:1"], ["b:2"], []]
    names = [found["name"] for found in built("-L http://:8000-8001 -L :1")["services"]]
    assert names == ["service-0", "service-1", "service-2"]


def test_ports_without_a_target_are_an_error_and_spare_targets_a_warning() -> None:
    assert ": error: target: 3 ports and 2 targets" in faulty("-L tcp://:8000-8002/a:1,b:2")[1][0]
    assert ": warning: target: 2 ports and 5 targets" in faulty("-L tcp://:8000-8001/h:9000-9004")[1][0]


@pytest.mark.parametrize(
    ("line", "address", "column"),
    [
        ("-L http://:abc", ":0", 8),
        ("-L http://:70000", ":0", 8),
        ("-L 'http://:8080#frag'", ":0", 8),
        ("-L http://u:p@h:5-3", "h:5-3", 12),
        ("-L http://:80-70000", ":80-70000", 8),
        ("-L '  http://h:x'", "h:0", 10),
    ],
)
def test_bad_ports_are_errors(line: str, address: str, column: int) -> None:
    data, findings = faulty(line)
    assert [found["addr"] for found in data["services"]] == [address]
    assert findings[0].startswith(f"-L#1:{column}: error: port: ")
    assert findings[0].endswith(" [url.port]")


def test_bad_port_of_a_target_is_an_error() -> None:
    data, findings = faulty("-L tcp://:1/a:80,h:abc")
    assert [each["addr"] for each in data["services"][0]["forwarder"]["nodes"]] == ["a:80", "h:0"]
    assert findings == ["-L#1:15: error: target: 'abc' is not a port between 0 and 65535 [url.port]"]


def test_a_range_of_ports_makes_as_many_services() -> None:
    found = built("-L tcp://:1000-1999/h:1")["services"]
    assert len(found) == 1000
    assert (found[-1]["name"], found[-1]["addr"]) == ("service-999", ":1999")


def test_keys_lifted_to_the_forwarder() -> None:
    found = service("-L 'tcp://:1/a:1,b:2?strategy=fifo&max_fails=2&fail_timeout=5s'")
    assert found["forwarder"]["selector"] == {"strategy": "fifo", "maxFails": 2, "failTimeout": 5_000_000_000}
    assert "metadata" not in found
    found = service("-L 'tcp://:1/a:1?maxFails=2'")
    assert found["forwarder"]["selector"] == {"strategy": "round", "maxFails": 2, "failTimeout": 30_000_000_000}
    found = service("-L 'http://:1?strategy=fifo&maxFails=2'")
    assert "forwarder" not in found
    assert "metadata" not in found


def test_keys_lifted_to_the_service() -> None:
    line = (
        "-L 'http://:1?interface=eth0&so_mark=5&proxyProtocol=1&netns=n1&netns.out=n2"
        "&service.a=1&handler.b=2&listener.c=3'"
    )
    found = service(line)
    assert found["metadata"] == {
        "a": "1",
        "interface": "eth0",
        "netns": "n1",
        "netns.out": "n2",
        "proxyProtocol": 1,
        "so_mark": 5,
    }
    assert found["handler"]["metadata"] == {"b": "2"}
    assert found["listener"]["metadata"] == {"c": "3"}


def test_keys_that_become_objects() -> None:
    line = (
        "-L 'http://:8080?admission=~127.0.0.1,10.0.0.0/8&bypass=~*.local,,1.1.1.1&resolver=1.1.1.1,tls://8.8.8.8:853"
        "&prefer=ipv6&hosts=a.com:1.2.3.4,b.com:::1&retries=2&limiter.in=1MB&limiter.out=2MB&limiter.conn.in=100KB"
        "&climiter=10&rlimiter=2.50'"
    )
    found = built(line)
    [made] = found["services"]
    assert {
        key: made[key] for key in ("admission", "bypass", "resolver", "hosts", "limiter", "climiter", "rlimiter")
    } == {
        "admission": "admission-0",
        "bypass": "bypass-0",
        "resolver": "resolver-0",
        "hosts": "hosts-0",
        "limiter": "limiter-0",
        "climiter": "climiter-0",
        "rlimiter": "rlimiter-0",
    }
    assert made["handler"]["retries"] == 2
    assert made["handler"]["metadata"] == {"prefer": "ipv6"}
    assert found["admissions"] == [{"name": "admission-0", "whitelist": True, "matchers": ["127.0.0.1", "10.0.0.0/8"]}]
    assert found["bypasses"] == [{"name": "bypass-0", "whitelist": True, "matchers": ["*.local", "1.1.1.1"]}]
    assert found["resolvers"][0]["nameservers"] == [
        {"addr": "1.1.1.1", "prefer": "ipv6"},
        {"addr": "tls://8.8.8.8:853", "prefer": "ipv6"},
    ]
    assert found["hosts"][0]["mappings"] == [
        {"ip": "1.2.3.4", "hostname": "a.com"},
        {"ip": "::1", "hostname": "b.com"},
    ]
    assert found["limiters"][0]["limits"] == ["$ 1MB 2MB", "$$ 100KB "]
    assert found["climiters"][0]["limits"] == ["$ 10"]
    assert found["rlimiters"][0]["limits"] == ["$ 2.5"]


def test_outward_limit_alone_limits_outward() -> None:
    # GOST: `$  1MB` is written, and read back as the inward limit.
    assert built("-L http://:1?limiter.out=1MB")["limiters"][0]["limits"] == ["$ 0B 1MB"]
    assert built("-L http://:1?limiter.conn.out=1MB")["limiters"][0]["limits"] == ["$$ 0B 1MB"]


def test_each_port_of_a_range_has_its_own_objects() -> None:
    found = built("-L http://:8000-8001?bypass=a.com")
    assert [each["bypass"] for each in found["services"]] == ["bypass-0", "bypass-1"]
    assert len(found["bypasses"]) == 2


def test_numbering_runs_over_the_whole_line_nodes_first() -> None:
    found = built("-L http://:1?bypass=b.com -F http://h:1?bypass=a.com")
    assert [each["matchers"] for each in found["bypasses"]] == [["a.com"], ["b.com"]]
    assert found["services"][0]["bypass"] == "bypass-1"


def test_values_that_lift_nothing_stay() -> None:
    found = service("-L 'http://:8080?climiter=0&rlimiter=-1&retries=0&admission=&bypass='")
    assert found["metadata"] == {"climiter": "0", "rlimiter": "-1", "retries": "0", "admission": "", "bypass": ""}
    assert set(found) == {"name", "addr", "handler", "listener", "metadata"}


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("-L :1?climiter=x", "-L#1:4: error: query.climiter: 'x' is not an integer [url.value]"),
        ("-L :1?rlimiter=x", "-L#1:4: error: query.rlimiter: 'x' is not a number [url.value]"),
        ("-L :1?retries=x", "-L#1:4: error: query.retries: 'x' is not an integer [url.value]"),
        ("-L :1?failTimeout=x", "-L#1:4: error: query.failTimeout: 'x' is not a duration such as 10s [url.value]"),
        (
            "-L :1?hosts=a,b:1.1.1.1",
            "-L#1:4: error: query.hosts: 'a' is not NAME:ADDRESS and would be ignored [url.value]",
        ),
        (
            "-L :1 -F http://h:1?secure=yes",
            "-F#1:12: error: query.secure: 'yes' is not a boolean such as true [url.value]",
        ),
        ("-L :1?a=%%%", "-L#1:6: error: query.a: is ignored because '%%%' is not an escape such as %2F [url.escape]"),
        ("-L ':1?a=1;b=2'", "-L#1:4: error: query.a: is ignored because of the ';'; write %3B [url.escape]"),
        (
            "-L ':1?a=1#b&c=2'",
            "-L#1:7: error: fragment: is cut off at '#'; write %23 for a '#' that belongs to a value [url.fragment]",
        ),
        (
            "-L :1 -F http://",
            "-F#1:8: error: host: names no host, so the chain would have no node here; "
            "write direct://:0 to go without a proxy [url.host]",
        ),
        (
            "-L :1 -F http://h:1/x",
            "-F#1:11: warning: path: the path '/x' of a node has no meaning and is ignored [url.path]",
        ),
    ],
)
def test_what_would_be_passed_over_is_reported(line: str, finding: str) -> None:
    assert faulty(line)[1] == [finding]


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        (
            "-L x_y://:1",
            "-L#1:1: error: scheme: no valid scheme before '://'; begin with one, such as auto:// [url.scheme]",
        ),
        (
            "-L h:1/tls://1.1.1.1:853",
            "-L#1:1: error: scheme: no valid scheme before '://'; begin with one, such as auto:// [url.scheme]",
        ),
        ("-L http://:1/%zz", "-L#1:11: error: path: '%zz' is not an escape such as %2F [url.escape]"),
        ("-L 'http://u<s@:80'", "-L#1:9: error: user: '<' must be written %3C [url.syntax]"),
        ("-L 'http://u#s@:80'", "-L#1:9: error: user: '#' must be written %23 [url.syntax]"),
        ("-L 'http://u:%z@:80'", "-L#1:10: error: password: '%z' is not an escape such as %2F [url.escape]"),
        ("-L :1 -F http://[::1:80", "-F#1:8: error: host: '[::1:80' has no closing bracket [url.syntax]"),
        (
            "-L :1 -F http://::1:80",
            "-F#1:8: error: port: ':1:80' is not a port between 0 and 65535; write [::1:80]:PORT for IPv6 [url.port]",
        ),
        ("-L :1 -F http://a%20b:1", "-F#1:8: error: host: 'a%20b:1' is not a host name or address [url.syntax]"),
        ("-L :1 -F http://h:x", "-F#1:8: error: port: 'x' is not a port between 0 and 65535 [url.port]"),
        ("-L :1 -F ''", "-F#1: error: url: is empty [url.syntax]"),
    ],
)
def test_what_is_no_url_at_all_is_fatal(line: str, finding: str) -> None:
    loaded = load(*shlex.split(line))
    assert [str(each) for each in loaded.findings] == [finding]
    assert loaded.broken


def test_control_characters_are_refused() -> None:
    assert "'\\n' is not allowed" in str(load("-L", "http://:1\n2").findings[0])


def test_chain_goes_to_the_handler_or_to_a_reverse_listener() -> None:
    assert service("-L :8080 -F :1")["handler"]["chain"] == "chain-0"
    for scheme in ("rtcp", "rudp", "runix"):
        found = service(f"-L {scheme}://:2222/:22 -F relay+tls://u:p@h:1")
        assert found["listener"]["chain"] == "chain-0"
        assert "chain" not in found["handler"]


def test_nodes() -> None:
    assert node("-F :1") == {
        "name": "node-0",
        "addr": ":1",
        "connector": {"type": "http"},
        "dialer": {"type": "tcp"},
    }
    found = node("-F 'socks5://[::1]:1080'")
    assert (found["addr"], found["dialer"]["tls"]) == ("[::1]:1080", {"serverName": "::1"})
    found = node("-F 'https://h:443?tls.servername=x.y'")
    assert found["dialer"]["tls"] == {"serverName": "x.y"}
    assert found["addr"] == "h:443"


def test_zones_are_unescaped_in_nodes() -> None:
    found = node("-F 'tls://[fe80::1%25eth0]:1080'")
    assert (found["addr"], found["dialer"]["tls"]) == ("[fe80::1%eth0]:1080", {"serverName": "fe80::1%eth0"})


def test_a_path_of_a_node_may_hold_commas() -> None:
    # GOST makes a second node of the 9600.
    assert node("-F serial:///dev/ttyUSB0,9600")["addr"] == "/dev/ttyUSB0,9600"


def test_lifted_keys_of_a_node_do_not_stay_in_the_hop() -> None:
    # GOST: secrets and TLS keys remain in the hop's metadata, which -O and the API show.
    [hop] = built("-L :1 -F 'https://h:443?secure=true&serverName=z&cert=c&key=k&auth=dTpw'")["chains"][0]["hops"]
    assert "metadata" not in hop
    [found] = hop["nodes"]
    assert found["dialer"]["tls"] == {"certFile": "c", "keyFile": "k", "secure": True, "serverName": "z"}
    assert found["connector"]["auth"] == {"username": "u", "password": "p"}


def test_hop_keys() -> None:
    line = (
        "-L :8080 -F 'http://h:1?bypass=~a.com&resolver=1.1.1.1&hosts=a:1.1.1.1&strategy=rand&maxFails=3&failTimeout=60"
        "&interface=eth0&so_mark=7&proxyProtocol=2&node.x=1&hop.y=2&dialer.z=3&connector.w=4&plain=1'"
    )
    found = built(line)
    [hop] = found["chains"][0]["hops"]
    assert hop["selector"] == {"strategy": "rand", "maxFails": 3, "failTimeout": 60_000_000_000}
    assert (hop["bypass"], hop["resolver"], hop["hosts"]) == ("bypass-0", "resolver-0", "hosts-0")
    assert hop["metadata"] == {"interface": "eth0", "plain": "1", "proxyProtocol": 2, "so_mark": 7, "y": "2"}
    [made] = hop["nodes"]
    assert made["metadata"] == {"plain": "1", "x": "1"}
    assert made["connector"]["metadata"] == {"plain": "1", "w": "4"}
    assert made["dialer"]["metadata"] == {"plain": "1", "z": "3"}
    assert found["resolvers"][0]["nameservers"] == [{"addr": "1.1.1.1"}]


def test_each_of_several_hosts_has_its_own_server_name() -> None:
    # GOST refuses this documented form, or gives all nodes one odd name.
    [hop] = built("-L :1 -F 'tls://a:1,[::2]:2,c:3'")["chains"][0]["hops"]
    assert [(each["name"], each["addr"], each["dialer"]["tls"]["serverName"]) for each in hop["nodes"]] == [
        ("node-0", "a:1", "a"),
        ("node-1", "[::2]:2", "::2"),
        ("node-2", "c:3", "c"),
    ]


def test_hops_are_in_order() -> None:
    hops = built("-L :1 -F http://a:1 -F socks5://b:2")["chains"][0]["hops"]
    assert [(hop["name"], hop["nodes"][0]["addr"]) for hop in hops] == [("hop-0", "a:1"), ("hop-1", "b:2")]


@pytest.mark.parametrize(
    ("url", "address", "targets"),
    [
        ("unix:///var/run/a.sock", "/var/run/a.sock", []),
        ("http+unix:///run/a.sock", "/run/a.sock", []),
        ("unix:///run/a.sock/192.168.1.1:80", "/run/a.sock/192.168.1.1:80", []),
        ("serial:///dev/ttyUSB0,9600", "/dev/ttyUSB0,9600", []),
        ("unix://a.sock/b.sock", "a.sock", ["b.sock"]),
        ("serial://COM1,9600,odd/COM2", "COM1,9600,odd", ["COM2"]),
    ],
)
def test_paths_as_addresses(url: str, address: str, targets: list[str]) -> None:
    found = service(f"-L {url}")
    assert found["addr"] == address
    assert [each["addr"] for each in found.get("forwarder", {"nodes": []})["nodes"]] == targets


def test_paths_as_node_addresses() -> None:
    found = node("-F http+unix:///run/x.sock")
    assert (found["addr"], found["dialer"]) == ("/run/x.sock", {"type": "unix"})
    assert node("-F unix://gost.sock")["addr"] == "gost.sock"


def test_dns_becomes_a_list() -> None:
    found = service("-L 'tun://:8421?net=192.168.123.1/24&dns=1.1.1.1,8.8.8.8'")
    assert found["listener"]["metadata"] == {"net": "192.168.123.1/24", "dns": ["1.1.1.1", "8.8.8.8"]}


def test_dns_targets_keep_their_schemes() -> None:
    found = service("-L 'dns://:10053/1.1.1.1,tls://1.1.1.1:853,https://1.0.0.1/dns-query?mode=udp'")
    assert [each["addr"] for each in found["forwarder"]["nodes"]] == [
        "1.1.1.1",
        "tls://1.1.1.1:853",
        "https://1.0.0.1/dns-query",
    ]


def test_targets_of_workers_bear_their_number() -> None:
    found = built("-L tcp://:2/3.3.3.3:3", worker="1")
    assert found["services"][0]["name"] == "service-0"
    assert found["services"][0]["forwarder"]["nodes"][0]["name"] == "go-1@target-0"


def test_blank_services_are_ignored() -> None:
    assert [found["addr"] for found in built("-L '' -L '  ' -L :1")["services"]] == [":1"]


def test_api_and_metrics() -> None:
    assert built("-api 'u:p@:1?accesslog=1&pathPrefix=api'")["api"] == {
        "addr": ":1",
        "pathPrefix": "api",
        "accesslog": True,
        "auth": {"username": "u", "password": "p"},
    }
    assert built("-metrics 'http://u:p@h:1?path=/x' -L :1")["metrics"] == {
        "addr": "h:1",
        "path": "/x",
        "auth": {"username": "u", "password": "p"},
    }
    # GOST: an empty address, which is a random TCP port on all interfaces.
    assert built("-api unix:///run/api.sock")["api"]["addr"] == "unix:///run/api.sock"


def test_faults_of_api_and_metrics_have_a_place() -> None:
    assert faulty("-api ':1?accesslgo=1'")[1] == [
        "-api:4: warning: api.accesslgo: unknown key; did you mean 'accesslog'? [config.unknown-key]"
    ]
    assert "api.?addr: unknown key" in faulty("-api ':1?addr=x'")[1][0]
    loaded = load("-L", ":1", "-metrics", "http://h:x")
    assert loaded.broken
    assert str(loaded.findings[0]).startswith("-metrics:8: error: port: ")


def test_places_are_columns_of_the_argument() -> None:
    positions = load("-L", " http://u:p@:80/h:1?a=1&bb=2", "-F", "x:1,yy:2").config.positions

    def column(path: str) -> str:
        spot = positions.exact(path)
        assert spot is not None
        return str(spot.value)

    assert column("services[0].handler.type") == "-L#1:2"
    assert column("services[0].handler.auth") == "-L#1:9"
    assert column("services[0].addr") == "-L#1:13"
    assert column("services[0].forwarder.nodes[0].addr") == "-L#1:17"
    assert column("services[0].listener.metadata.a") == "-L#1:21"
    assert column("services[0].listener.metadata.bb") == "-L#1:25"
    assert column("chains[0].hops[0].nodes[1].addr") == "-F#1:5"


@given(st.text(max_size=40), st.sampled_from(["", "http://", "tcp://:1/", "http://:1?", "unix://", "x+y://"]))
def test_any_argument_is_read_or_refused(text: str, start: str) -> None:
    for flag in ("-L", "-F", "-api", "-metrics"):
        loaded = load("-L", ":1", flag, start + text)
        dump(loaded.config, "yaml")
        for finding in loaded.findings:
            assert str(finding)
