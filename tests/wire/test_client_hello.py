"""ClientHellos of OpenSSL, whole, in pieces, over many records, cut off, hostile."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.core.errors import ProtocolError
from gostnet.wire.client_hello import (
    MAX_HELLO,
    ClientHello,
    HelloReader,
    extensions,
    host_name,
    parse_client_hello,
    server_name,
)

NAME = "www.example.com"


def hello_of(name: str | None = NAME, alpn: tuple[str, ...] = ()) -> bytes:
    """Return what OpenSSL sends first."""
    context = ssl.create_default_context()
    if name is None:
        context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(list(alpn))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


HELLO = hello_of(alpn=("h2", "http/1.1"))


def in_records(hello: bytes, size: int) -> bytes:
    """Cut the handshake message of one record into records of `size` bytes."""
    message = hello[5:]
    return b"".join(
        b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part
        for part in (message[start : start + size] for start in range(0, len(message), size))
    )


def test_name_alpn_and_versions_of_openssl() -> None:
    hello = HelloReader().feed(HELLO)
    assert hello is not None
    assert hello.server_name == "www.example.com"
    assert hello.alpn == ("h2", "http/1.1")
    assert 0x0304 in hello.versions
    assert not hello.ech


def test_hello_without_a_name() -> None:
    assert HelloReader().feed(hello_of(None)) is not None
    hello = HelloReader().feed(hello_of(None))
    assert hello is not None
    assert hello.server_name == ""


@pytest.mark.parametrize(
    "words",
    [
        ("curl", "-sk", "--resolve", f"{NAME}:{{port}}:127.0.0.1", f"https://{NAME}:{{port}}/"),
        ("openssl", "s_client", "-servername", NAME, "-alpn", "h2,http/1.1", "-connect", "127.0.0.1:{port}"),
    ],
    ids=lambda words: words[0],
)
def test_hello_of_real_programs(words: tuple[str, ...]) -> None:
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        arguments = [word.format(port=server.getsockname()[1]) for word in words]
        program = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        reader = HelloReader()
        hello = None
        with program, server.accept()[0] as client:
            client.settimeout(10)
            while hello is None and (data := client.recv(100)):
                hello = reader.feed(data)
            program.kill()
    assert hello is not None
    assert hello.server_name == "www.example.com"
    assert hello.alpn[0] == "h2"
    assert 0x0304 in hello.versions


@given(st.lists(st.integers(1, len(HELLO) - 1), max_size=12))
@settings(max_examples=60)
def test_hello_split_anywhere_is_known_with_its_last_byte_and_not_before(cuts: list[int]) -> None:
    reader = HelloReader()
    edges = [0, *sorted(set(cuts)), len(HELLO)]
    for start, end in pairwise(edges[:-1]):
        assert reader.feed(HELLO[start:end]) is None
    hello = reader.feed(HELLO[edges[-2] :])
    assert hello is not None
    assert hello.server_name == "www.example.com"


@pytest.mark.parametrize("size", [1, 2, 3, 50, 400])
def test_hello_over_many_records(size: int) -> None:
    data = in_records(HELLO, size)
    hello = HelloReader().feed(data + b"\x17\x03\x03what follows")
    assert hello is not None
    assert hello.server_name == "www.example.com"
    reader = HelloReader()
    answers = [reader.feed(data[index : index + 1]) for index in range(len(data))]
    assert answers[-1] is not None
    assert not any(answers[:-1])


@pytest.mark.parametrize(
    "data",
    [
        b"\x17",
        b"\x16\x02",
        b"\x16\x03\x09",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x04\x02",
        b"\x16\x03\x01\x01\x00\x01\x02\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
        in_records(HELLO, 200)[:205] + b"\x14",
    ],
    ids=["type", "major", "minor", "empty", "record size", "server hello", "hello size", "empty hello", "between"],
)
def test_something_else_is_refused_with_its_first_wrong_byte(data: bytes) -> None:
    reader = HelloReader()
    with pytest.raises(ProtocolError):
        reader.feed(data)
    reader = HelloReader()
    assert all(reader.feed(data[index : index + 1]) is None for index in range(len(data) - 1))
    with pytest.raises(ProtocolError):
        reader.feed(data[-1:])


def test_nothing_beyond_the_largest_hello_is_gathered() -> None:
    start = b"\x16\x03\x01\x40\x00\x01" + (MAX_HELLO + 1).to_bytes(3, "big")
    with pytest.raises(ProtocolError, match="65537 bytes"):
        HelloReader().feed(start)


@given(st.binary(max_size=300), st.integers(0, len(HELLO)))
@settings(max_examples=200)
def test_any_bytes_either_parse_or_raise_protocol_error(noise: bytes, at: int) -> None:
    for data in (noise, HELLO[:at] + noise, HELLO[:at] + noise + HELLO[at + len(noise) :]):
        try:
            found = HelloReader().feed(data)
        except ProtocolError:
            continue
        assert found is None or isinstance(found, ClientHello)


@given(st.integers(0, len(HELLO) - 6), st.integers(0, 255))
@settings(max_examples=200)
def test_one_wrong_byte_in_the_message_never_raises_anything_else(at: int, value: int) -> None:
    message = bytearray(HELLO[5:])
    message[at] = value
    try:
        parse_client_hello(bytes(message))
    except ProtocolError:
        pass


def test_extensions_name_the_place_of_their_bodies() -> None:
    message = HELLO[5:]
    bodies = {kind: message[start:end] for kind, start, end in extensions(message)}
    assert server_name(bodies[0]) == b"www.example.com"


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"WWW.Example.com", "www.example.com"),
        (b"example.com.", "example.com"),
        (b"_sip.x", "_sip.x"),
        (b"", ""),
        (b"a b", ""),
        (b"a\x00.com", ""),
        (b"192.0.2.1", ""),
        (b"a" * 256, ""),
        (b"\xc3\xa4.de", ""),
        (b"-x", ""),
    ],
)
def test_host_name_takes_names_only(raw: bytes, name: str) -> None:
    assert host_name(raw) == name
