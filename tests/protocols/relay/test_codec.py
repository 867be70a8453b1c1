"""Relay messages on bytes: whole, cut, wrong, and both sides against each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import Endpoint
from gostnet.core.drive import run_handshake
from gostnet.core.errors import EndOfStream, ProtocolError, UpstreamRejected
from gostnet.core.sansio import run_on_bytes
from gostnet.core.tasks import run, together
from gostnet.protocols.relay.codec import (
    Command,
    Network,
    Request,
    Response,
    ResponseHead,
    Status,
    accept,
    ask,
    encode_credentials,
    encode_request,
    encode_response,
    read_request,
    read_response,
)
from gostnet.testing import stream_pair
from gostnet.testing.memory import Trickle

TARGET = Endpoint("127.0.0.1", 7007)

# Requests as the real gost 3.3.0 sends them.
GOLDEN = [
    ("0101000a020007017f0000011b5f", Request(1, Network.TCP, TARGET)),
    ("0101001701000a04757365720470617373020007017f0000011b5f", Request(1, Network.TCP, TARGET, ("user", "pass"))),
    ("0101001002000d03096c6f63616c686f73741b5f", Request(1, Network.TCP, Endpoint("localhost", 7007))),
    ("0181000f0400020001020007017f0000011b5f", Request(1, Network.UDP, TARGET)),
    ("0182000f040002000102000701000000000000", Request(2, Network.UDP, Endpoint("0.0.0.0", 0))),
    ("0102000f0400020000020007017f0000012329", Request(2, Network.TCP, Endpoint("127.0.0.1", 9001))),
    ("01010012040002001002000a0306752e736f636b0000", Request(1, Network.UNIX, Endpoint("u.sock", 0))),
    ("01010015040002001102000d0309707479432c393630300000", Request(1, Network.SERIAL, Endpoint("ptyC,9600", 0))),
    ("01010000", Request(1)),
]


@pytest.mark.parametrize(("wire", "request_"), GOLDEN)
def test_requests_are_gosts_in_both_directions(wire: str, request_: Request) -> None:
    data = bytes.fromhex(wire)
    assert encode_request(request_) == data
    assert run_on_bytes(read_request(), data + b"payload") == (request_, b"", b"payload")


@pytest.mark.parametrize(("wire", "request_"), GOLDEN)
def test_a_request_cut_anywhere_is_not_complete(wire: str, request_: Request) -> None:
    data = bytes.fromhex(wire)
    for size in range(len(data)):
        with pytest.raises(EndOfStream):
            run_on_bytes(read_request(), data[:size])


def test_the_credentials_come_first_in_a_bind_and_second_elsewhere() -> None:
    any_ = Endpoint("0.0.0.0", 0)
    bind = encode_request(Request(Command.BIND, Network.UDP, any_, ("u", "p")))
    assert bind.hex() == "01820016" + "010004" + "01750170" + "0400020001" + "02000701000000000000"
    connect = encode_request(Request(Command.CONNECT, Network.UDP, TARGET, ("u", "p")))
    assert connect.hex() == "01810016" + "0400020001" + "010004" + "01750170" + "020007017f0000011b5f"


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ("0100000a020007017f0000011b5f", Request(0, Network.TCP, TARGET)),
        ("0105000a020007017f0000011b5f", Request(5, Network.TCP, TARGET)),
        ("0171000a020007017f0000011b5f", Request(1, Network.TCP, TARGET)),
        ("0101000f7f00026869020007017f0000011b5f", Request(1, Network.TCP, TARGET)),
        ("01010014020007010a0000010050020007017f0000011b5f", Request(1, Network.TCP, TARGET)),
        ("0101000504000200ff", Request(1, Network.TCP)),
        ("010100060400030001ff", Request(1, Network.UDP)),
        ("018100050400020010", Request(1, Network.UDP)),
        ("0101000a0100070161000203626364", None),
        ("0101000702000403000050", Request(1, Network.TCP, Endpoint("", 80))),
        (
            "0102001a0400020000020012030e302e302e302e303a3a33383535330000",
            Request(2, Network.TCP, Endpoint("0.0.0.0", 38553)),
        ),
    ],
    ids=[
        "command 0",
        "unknown command",
        "bits 4 to 6 of the command",
        "unknown feature",
        "the last of two addresses",
        "unknown network",
        "a longer network",
        "the bit wins over the network",
        "credentials",
        "empty host",
        "an empty host as 3.3.0 sends it",
    ],
)
def test_what_gost_takes_is_taken(wire: str, expected: Request | None) -> None:
    if expected is None:
        wire = "0101" + "000a" + "01" + "0007" + "0161" + "0362636465"
        request, _, rest = run_on_bytes(read_request(), bytes.fromhex(wire))
        assert (request.credentials, rest) == (("a", "bcd"), b"")
        return
    assert run_on_bytes(read_request(), bytes.fromhex(wire)) == (expected, b"", b"")


@pytest.mark.parametrize(
    "wire",
    [
        "02010000",
        "00010000",
        "0101000101",
        "010100020100",
        "01010003010001",
        "0101000401000201",
        "0101000401000100",
        "010100050100020161",
        "01010006010003016101",
        "01010003040000",
        "0101000404000100",
        "01010003020000",
        "0101000a020007057f0000011b5f",
        "0101000b020008017f0000011b5f00",
        "01010008020005030220200050",
        "010100080200050302ffff0050",
    ],
)
def test_what_is_malformed_is_refused(wire: str) -> None:
    with pytest.raises(ProtocolError):
        run_on_bytes(read_request(), bytes.fromhex(wire))


@pytest.mark.parametrize("credentials", [("u" * 256, ""), ("", "p" * 256), ("ü" * 128, "")])
def test_credentials_that_do_not_fit_are_refused(credentials: tuple[str, str]) -> None:
    with pytest.raises(ProtocolError, match="255"):
        encode_credentials(*credentials)


def test_a_password_shows_in_no_repr() -> None:
    assert "geheim" not in repr(Request(1, Network.TCP, TARGET, ("user", "geheim")))


RESPONSES = [
    ("01000000", Response(0)),
    ("0100000a020007017f0000012329", Response(0, Endpoint("127.0.0.1", 9001))),
    ("010000160200130400000000000000000000000000000000ac6c", Response(0, Endpoint("::", 0xAC6C))),
    ("01070000", Response(7)),
]


@pytest.mark.parametrize(("wire", "response"), RESPONSES)
def test_responses_are_gosts_in_both_directions(wire: str, response: Response) -> None:
    data = bytes.fromhex(wire)
    assert encode_response(response.status, response.address) == data
    assert run_on_bytes(read_response(), data + b"x") == (response, b"", b"x")
    for size in range(len(data)):
        with pytest.raises(EndOfStream):
            run_on_bytes(read_response(), data[:size])


@pytest.mark.parametrize("status", [status for status in Status if status != Status.OK])
def test_a_refusal_names_its_status(status: Status) -> None:
    with pytest.raises(UpstreamRejected, match=rf"answers {status:d} \([a-z ]+\)") as caught:
        accept(Response(status))
    assert caught.value.reply == status
    assert "unknown" not in str(caught.value)
    with pytest.raises(UpstreamRejected, match="answers 99"):
        accept(Response(99))


# ---- the response in front of a stream ----------------------------------------------------------
@pytest.mark.parametrize("wire", ["01000000", "0100000a020007017f0000012329", "010000037f0000"])
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_a_response_is_taken_off_however_it_is_cut(wire: str, piece: int) -> None:
    data = bytes.fromhex(wire) + b"payload"
    head = ResponseHead()
    for start in range(0, len(data), piece):
        rest = head.feed(data[start : start + piece])
        if rest is not None:
            assert rest + data[start + piece :] == b"payload"
            return
    raise AssertionError("never complete")


def test_a_refusal_is_seen_with_its_last_byte_and_a_stranger_with_the_first() -> None:
    head = ResponseHead()
    assert head.feed(bytes.fromhex("01070000")[:3]) is None
    with pytest.raises(UpstreamRejected):
        head.feed(b"\0")
    with pytest.raises(ProtocolError, match="version 72"):
        ResponseHead().feed(b"HTTP/1.1 200 OK")
    with pytest.raises(ProtocolError):
        ResponseHead().feed(bytes.fromhex("0100000101"))


# ---- properties ---------------------------------------------------------------------------------
hosts = st.one_of(
    st.ip_addresses().map(str).filter(lambda text: not text.startswith("::ffff:")),
    st.from_regex(r"[a-z][a-z0-9.-]{0,40}", fullmatch=True),
    st.just(""),
)
endpoints = st.builds(Endpoint, hosts, st.integers(0, 65535))
words = st.text(max_size=60).filter(lambda text: len(text.encode("utf-8", "replace")) <= 255)
words = words.filter(lambda text: text.encode("utf-8", "replace").decode() == text)
requests = st.builds(
    Request,
    st.integers(0, 15),
    st.sampled_from(Network),
    st.none() | endpoints,
    st.none() | st.tuples(words, words),
)


@given(requests, st.binary(max_size=8))
def test_a_request_survives_the_wire(request_: Request, after: bytes) -> None:
    assert run_on_bytes(read_request(), encode_request(request_) + after) == (request_, b"", after)


@given(st.integers(0, 255), st.none() | endpoints)
def test_a_response_survives_the_wire(status: int, address: Endpoint | None) -> None:
    wire = encode_response(status, address)
    assert run_on_bytes(read_response(), wire) == (Response(status, address), b"", b"")


messages = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda command, body: bytes((1, command)) + len(body).to_bytes(2, "big") + body,
        st.integers(0, 255),
        st.lists(
            st.builds(
                lambda kind, body: bytes((kind,)) + len(body).to_bytes(2, "big") + body,
                st.integers(0, 6),
                st.binary(max_size=24),
            ),
            max_size=4,
        ).map(b"".join),
    ),
)


@given(messages)
def test_any_bytes_are_a_request_or_an_error(data: bytes) -> None:
    try:
        request, _, _ = run_on_bytes(read_request(), data)
    except ProtocolError:
        return
    assert run_on_bytes(read_request(), encode_request(request))[0] == request


@given(messages, st.integers(1, 9))
def test_the_head_reads_what_the_dialogue_reads(data: bytes, piece: int) -> None:
    def dialogue() -> object:
        try:
            response, _, rest = run_on_bytes(read_response(), data)
            accept(response)
        except EndOfStream:
            return None
        except ProtocolError:
            return ProtocolError
        except UpstreamRejected as exc:
            return exc.reply
        return rest

    def head() -> object:
        reader = ResponseHead()
        for start in range(0, len(data), piece):
            try:
                rest = reader.feed(data[start : start + piece])
            except ProtocolError:
                return ProtocolError
            except UpstreamRejected as exc:
                return exc.reply
            if rest is not None:
                return rest + data[start + piece :]
        return None

    expected = dialogue()
    if expected is None and data and data[0] != 1:
        expected = ProtocolError  # the head need not wait for four bytes to see that
    assert head() == expected


# ---- both sides ---------------------------------------------------------------------------------
@pytest.mark.parametrize("piece", [1, 5, 4096])
def test_both_sides_understand_each_other(piece: int) -> None:
    async def main() -> None:
        left, right = stream_pair()
        asked = Request(Command.CONNECT, Network.UDP, Endpoint("name.example", 53), ("user", "pass"))

        async def client() -> None:
            below = Trickle(left, piece)
            response = await run_handshake(below, ask(encode_request(asked)))
            assert response == Response(0, TARGET)
            assert await below.receive(1) == b"r"

        async def server() -> None:
            below = Trickle(right, piece)
            assert await run_handshake(below, read_request()) == asked
            await below.send(encode_response(Status.OK, TARGET) + b"rest")

        await together(client(), server())

    run(main())
