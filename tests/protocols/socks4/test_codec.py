"""SOCKS4 dialogues on bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.drive import run_handshake
from gostnet.core.errors import EndOfStream, GostnetError, ProtocolError, UpstreamRejected
from gostnet.core.sansio import run_on_bytes
from gostnet.core.tasks import run
from gostnet.protocols.socks4.codec import Code, Request, ask, encode_reply, encode_request, read_request
from gostnet.testing import stream_pair
from gostnet.testing.memory import Trickle

REQUESTS = [
    ("04011b5f7f00000100", Request(1, Endpoint("127.0.0.1", 7007), "")),
    ("04011b5f7f0000017573657200", Request(1, Endpoint("127.0.0.1", 7007), "user")),
    ("0402005000000000" + "00", Request(2, Endpoint("0.0.0.0", 80), "")),
    ("0401005000000001" + "00" + "6c6f63616c686f737400", Request(1, Endpoint("localhost", 80), "")),
    ("04010050000000ff" + "7500" + "3a3a3100", Request(1, Endpoint("::1", 80), "u")),
    ("0401005000000001" + "00" + "00", Request(1, Endpoint("", 80), "")),
    ("040100507f000001" + "ff00", Request(1, Endpoint("127.0.0.1", 80), "\ufffd")),
]


@pytest.mark.parametrize(("written", "request_"), REQUESTS)
def test_requests_are_read_whole_and_cut(written: str, request_: Request) -> None:
    data = bytes.fromhex(written)
    assert run_on_bytes(read_request(), data + b"early") == (request_, b"", b"early")
    for size in range(len(data)):
        with pytest.raises(EndOfStream):
            run_on_bytes(read_request(), data[:size])


@pytest.mark.parametrize(("written", "request_"), REQUESTS)
def test_requests_may_come_byte_by_byte(written: str, request_: Request) -> None:
    async def main() -> None:
        left, right = stream_pair()
        await left.send(bytes.fromhex(written) + b"early")
        slow = Trickle(right)
        assert await run_handshake(slow, read_request()) == request_
        assert b"".join([await slow.receive() for _ in b"early"]) == b"early"

    run(main())


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("05010000", "instead of SOCKS4"),
        ("0401005000000001" + "00" + "610a6200", "not a name"),
        ("0401005000000001" + "00" + "61206200", "not a name"),
        ("0401005000000001" + "00" + "ff00", "not a name"),
    ],
)
def test_nonsense_is_refused(written: str, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        run_on_bytes(read_request(), bytes.fromhex(written) + bytes(8))


@pytest.mark.parametrize("start", ["040100507f000001", "040100500000000100"])
def test_texts_without_an_end_are_not_read_for_ever(start: str) -> None:
    async def main() -> None:
        left, right = stream_pair()
        await left.send(bytes.fromhex(start) + b"x" * 600)
        with pytest.raises(ProtocolError, match="within"):
            await run_handshake(right, read_request())

    run(main())


def test_replies_are_those_of_gost() -> None:
    assert [encode_reply(code).hex() for code in Code] == [
        "005a000000000000",
        "005b000000000000",
        "005c000000000000",
        "005d000000000000",
    ]


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        ("005b000000000000", UpstreamRejected, r"rejected or failed \(91\)"),
        ("005d000000000000", UpstreamRejected, r"the user id is not accepted \(93\)"),
        ("0000000000000000", UpstreamRejected, r"unknown code \(0\)"),
        ("045a000000000000", ProtocolError, "version 4"),
        ("005a", EndOfStream, "wanted 8"),
    ],
)
def test_a_refusal_is_an_error_with_its_code(reply: str, error: type[GostnetError], message: str) -> None:
    target = Endpoint("example.com", 80)
    with pytest.raises(error, match=message) as caught:
        run_on_bytes(ask(encode_request(target), target), bytes.fromhex(reply))
    if isinstance(caught.value, UpstreamRejected):
        assert caught.value.reply == bytes.fromhex(reply)[1]


def test_the_reply_ends_where_it_ends() -> None:
    target = Endpoint("example.com", 80)
    request = encode_request(target, b"me")
    assert run_on_bytes(ask(request, target), bytes.fromhex("005a123456789abc") + b"server first") == (
        None,
        request,
        b"server first",
    )


@pytest.mark.parametrize(
    ("target", "userid", "by_address"),
    [
        (Endpoint("example.com", 80), b"", True),
        (Endpoint("::1", 80), b"", True),
        (Endpoint("0.0.0.5", 80), b"", True),
        (Endpoint("a\0b", 80), b"", False),
        (Endpoint("", 80), b"", False),
        (Endpoint("x" * 256, 80), b"", False),
        (Endpoint("\udcff", 80), b"", False),
        (Endpoint("example.com", 80), b"a\0b", False),
        (Endpoint("example.com", 80), b"x" * 512, False),
    ],
)
def test_what_the_format_cannot_carry_is_never_sent(target: Endpoint, userid: bytes, by_address: bool) -> None:
    with pytest.raises(ProtocolError):
        encode_request(target, userid, by_address=by_address)


users = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=100)


@given(st.from_regex(r"[a-z0-9.-]{1,255}", fullmatch=True), st.integers(0, 65535), users)
def test_the_server_understands_the_client(host: str, port: int, user: str) -> None:
    target = Endpoint(host, port)
    request, _, rest = run_on_bytes(read_request(), encode_request(target, user.encode()))
    assert (request, rest) == (Request(1, target, user), b"")


@given(st.ip_addresses(v=4, network="64.0.0.0/2"), st.integers(0, 65535))
def test_the_server_understands_addresses(address: object, port: int) -> None:
    target = Endpoint(str(address), port)
    assert run_on_bytes(read_request(), encode_request(target, by_address=True))[0].target == target


@given(st.binary(max_size=700))
def test_any_bytes_are_a_request_or_an_error(data: bytes) -> None:
    for start in (b"", b"\x04\x01\0\x50\0\0\0\1"):
        try:
            run_on_bytes(read_request(), start + data)
        except ProtocolError:
            pass
