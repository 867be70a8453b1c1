"""The small servers, asked by the small clients, on loopback."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import struct
from collections.abc import Iterator

import dns.flags
import dns.message
import pytest

from gostnet.core.address import Endpoint
from gostnet.core.errors import KernelError
from gostnet.core.tasks import run
from gostnet.testing.certificates import Authority
from gostnet.testing.clients import connect, echo, echo_datagram, fetch, resolve
from gostnet.testing.servers import FREE_PORTS, Ports, Servers, pattern, serving, serving_in_thread

ZONE = {
    "web.lab": ["192.0.2.1", "2001:db8::1"],
    "four.lab": ["192.0.2.4"],
    "many.lab": [f"192.0.2.{number}" for number in range(1, 200)],
}


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with serving_in_thread(None, ["127.0.0.1"], zone=ZONE, ports=FREE_PORTS) as servers:
        yield servers


def test_pattern_is_endless_and_without_period_of_a_power_of_two() -> None:
    assert pattern(5) == bytes(range(5))
    assert pattern(300)[251:] == pattern(49)
    assert pattern(1000, 777) == pattern(2000)[777:1777]
    assert pattern(200_000, 70_000) == pattern(270_000)[70_000:]
    assert pattern(0) == b""


def test_root_says_who_came_from_where(servers: Servers) -> None:
    target = servers.endpoint("http")
    reply = fetch(None, target)
    assert reply.status == 200
    assert reply.body.startswith(b"hello: you came from 127.0.0.1:")
    assert reply.body.endswith(f"to {target} by http\n".encode())


def test_whoami_over_tls_for_who_trusts_the_authority(servers: Servers) -> None:
    reply = fetch(
        None, servers.endpoint("https"), "/whoami", host="web.lab", tls=servers.authority.client_context("http/1.1")
    )
    assert reply.json()["client"] == "127.0.0.1"
    assert reply.json()["scheme"] == "https"
    assert reply.json()["host"].startswith("web.lab")


def test_tls_is_refused_by_who_trusts_another_authority_or_asks_for_another_name(servers: Servers) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        fetch(None, servers.endpoint("https"), host="web.lab", tls=Authority().client_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        fetch(None, servers.endpoint("https"), host="other.lab", tls=servers.authority.client_context())


@pytest.mark.parametrize("path", ["bytes", "chunked"])
@pytest.mark.parametrize("size", [0, 1, 65_536, 1_000_000])
def test_download_is_the_pattern(servers: Servers, path: str, size: int) -> None:
    reply = fetch(None, servers.endpoint("http"), f"/{path}/{size}")
    assert reply.body == pattern(size)
    assert reply.headers.get("content-length") == (str(size) if path == "bytes" else None)


def test_upload_is_counted_and_hashed(servers: Servers) -> None:
    body = pattern(1_000_000)
    reply = fetch(None, servers.endpoint("http"), "/upload", method="POST", body=body)
    assert reply.json() == {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def test_head_has_the_length_and_no_body(servers: Servers) -> None:
    reply = fetch(None, servers.endpoint("http"), "/bytes/1234", method="HEAD")
    assert (reply.headers["content-length"], reply.body) == ("1234", b"")


def test_headers_come_back_in_order(servers: Servers) -> None:
    reply = fetch(None, servers.endpoint("http"), "/headers", headers={"X-One": "1", "x-two": "2"})
    assert [pair for pair in reply.json() if pair[0].lower().startswith("x-")] == [["X-One", "1"], ["x-two", "2"]]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/bytes/many", 404),
        ("GET", "/slow/never", 404),
        ("GET", "/status/418", 418),
        ("GET", "/status/204", 204),
        ("DELETE", "/", 405),
        ("POST", "/", 405),
        ("GET", "/?question=1", 200),
        ("GET", "/slow/0", 200),
    ],
)
def test_status(servers: Servers, method: str, path: str, status: int) -> None:
    assert fetch(None, servers.endpoint("http"), path, method=method).status == status


def test_slow_answer_comes_late(servers: Servers) -> None:
    with pytest.raises(TimeoutError):
        fetch(None, servers.endpoint("http"), "/slow/30", timeout=0.05)


def test_requests_may_come_in_a_row_and_in_pieces(servers: Servers) -> None:
    with connect(None, servers.endpoint("http")) as sock:
        sock.sendall(b"GET /bytes/3 HTTP/1.1\r\nHost: a\r\n\r\nGET http://a/bytes/4?x HTTP/1.1\r\nHo")
        sock.sendall(b"st: a\r\nConnection: close\r\n\r\n")
        data = b""
        while more := sock.recv(4096):
            data += more
    assert data.count(b"HTTP/1.1 200 OK") == 2
    assert b"\r\n\r\n\x00\x01\x02HTTP/1.1" in data
    assert data.endswith(b"Connection: close\r\n\r\n\x00\x01\x02\x03")


def test_continue_is_given_when_asked_for(servers: Servers) -> None:
    with connect(None, servers.endpoint("http")) as sock:
        sock.sendall(b"PUT /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"ok")
        assert b'"size":2' in sock.recv(4096)


@pytest.mark.parametrize("data", [b"\x16\x03\x01 not http\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"])
def test_what_is_not_understood_ends_the_connection(servers: Servers, data: bytes) -> None:
    with connect(None, servers.endpoint("http")) as sock:
        sock.sendall(data)
        reply = b""
        while more := sock.recv(4096):
            reply += more
    assert reply.startswith(b"HTTP/1.1 400 ")


def test_echo_returns_everything_up_to_the_end(servers: Servers) -> None:
    data = pattern(300_000)
    assert echo(None, servers.endpoint("echo/tcp"), data) == data
    assert echo(None, servers.endpoint("echo/tcp"), b"") == b""


@pytest.mark.parametrize("size", [0, 1, 1400, 65_507])
def test_echo_of_datagrams(servers: Servers, size: int) -> None:
    target = servers.endpoint("echo/udp")
    assert echo_datagram(None, target, pattern(size)) == (pattern(size), target)


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "code", "records"),
    [
        ("web.lab", "A", "NOERROR", ("192.0.2.1",)),
        ("WEB.lab", "AAAA", "NOERROR", ("2001:db8::1",)),
        ("four.lab", "AAAA", "NOERROR", ()),
        ("web.lab", "MX", "NOERROR", ()),
        ("none.lab", "A", "NXDOMAIN", ()),
        ("whoami.lab", "TXT", "NOERROR", ("127.0.0.1",)),
    ],
)
def test_dns_answers(servers: Servers, tcp: bool, name: str, kind: str, code: str, records: tuple[str, ...]) -> None:
    answer = resolve(None, servers.endpoint("dns/tcp" if tcp else "dns/udp"), name, kind, tcp=tcp)
    assert (answer.code, answer.records) == (code, records)


def test_dns_answer_that_is_too_large_is_cut_by_udp_and_whole_by_tcp(servers: Servers) -> None:
    query = dns.message.make_query("many.lab", "A")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(query.to_wire(), servers.endpoint("dns/udp"))
        reply = dns.message.from_wire(sock.recv(65535))
    assert reply.flags & dns.flags.TC
    assert not reply.answer
    assert len(resolve(None, servers.endpoint("dns/tcp"), "many.lab", tcp=True).records) == 199


def test_dns_size_that_is_announced_is_used(servers: Servers) -> None:
    query = dns.message.make_query("many.lab", "A", use_edns=0, payload=4096)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(query.to_wire(), servers.endpoint("dns/udp"))
        reply = dns.message.from_wire(sock.recv(65535))
    assert len(reply.answer[0]) == 199


def test_dns_server_survives_what_is_no_query(servers: Servers) -> None:
    reply = dns.message.make_response(dns.message.make_query("web.lab", "A")).to_wire()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for data in (b"", b"x", bytes(11), bytes(12), b"\xff" * 600, reply):
            sock.sendto(data, servers.endpoint("dns/udp"))
    with connect(None, servers.endpoint("dns/tcp")) as stream:
        stream.sendall(struct.pack("!H", 5) + b"hello")
    assert resolve(None, servers.endpoint("dns/udp"), "web.lab").code == "NOERROR"


def test_witness_tells_what_was_asked_and_by_whom(servers: Servers) -> None:
    servers.witness.clear()
    with connect(None, servers.endpoint("echo/tcp")) as sock:
        sock.sendall(b"look at me")
        own = Endpoint.from_sockaddr(sock.getsockname())
        seen = servers.witness.wait_for(lambda seen: seen.client == own)
    assert (seen.service, seen.detail) == ("echo/tcp", "b'look at me'")
    assert seen.server == servers.endpoint("echo/tcp")
    fetch(None, servers.endpoint("http"), "/status/200")
    assert [seen.detail for seen in servers.witness.all("http")] == ["GET /status/200"]
    with pytest.raises(TimeoutError, match="no such request"):
        servers.witness.wait_for(lambda seen: seen.service == "none", timeout=0.01)


def test_port_in_use_is_refused_and_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        with pytest.raises(KernelError, match=f"serve https on 127.0.0.1:{port}: Address already in use"):
            with serving_in_thread(None, ["127.0.0.1"], ports=Ports(other, port, None, None)):
                pass
        with pytest.raises(ConnectionRefusedError):
            connect(None, Endpoint("127.0.0.1", other))


def test_end_drops_connections_and_frees_ports() -> None:
    async def main() -> Endpoint:
        async with serving(None, ["127.0.0.1"], ports=Ports(None, None, 0, None)) as servers:
            return servers.endpoint("echo/tcp")

    with pytest.raises(ConnectionRefusedError):
        connect(None, run(main(), uvloop=False))
    with serving_in_thread(None, ["127.0.0.1"], ports=FREE_PORTS) as servers:
        sock = connect(None, servers.endpoint("http"))
        sock.sendall(b"GET /slow/60 HTTP/1.1\r\nHost: a\r\n\r\n")
        servers.witness.wait_for(lambda seen: seen.detail == "GET /slow/60")
    with sock, pytest.raises(ConnectionError):
        if sock.recv(1) == b"":
            raise ConnectionError


def test_services_may_be_left_out() -> None:
    with serving_in_thread(None, ["127.0.0.1"], ports=Ports(0, None, None, None)) as servers:
        assert fetch(None, servers.endpoint("http")).status == 200
        with pytest.raises(KeyError):
            servers.endpoint("dns/udp")


def test_json_of_a_reply() -> None:
    with serving_in_thread(None, ["127.0.0.1"], ports=FREE_PORTS) as servers:
        reply = fetch(None, servers.endpoint("http"))
    with pytest.raises(json.JSONDecodeError):
        reply.json()
