"""SOCKS5 dialogues on bytes: whole, cut, wrong, and both sides against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.address import ANY, Endpoint
from gostnet.core.drive import run_handshake
from gostnet.core.errors import AuthDenied, EndOfStream, GostnetError, ProtocolError, UpstreamRejected
from gostnet.core.sansio import Handshake, run_on_bytes
from gostnet.core.tasks import run, together
from gostnet.protocols.socks5.codec import (
    Command,
    Credentials,
    Method,
    Reply,
    Request,
    ask,
    choose_method,
    encode_credentials,
    encode_reply,
    encode_request,
    log_in,
    negotiate,
    serve,
    serve_request,
)
from gostnet.testing import stream_pair
from gostnet.testing.memory import Trickle

TARGET = Endpoint("127.0.0.1", 7007)
GOOD: dict[object, object] = {Credentials("user", "pass"): True, Credentials("user", "bad"): False}
CONNECT = "050100017f0000011b5f"


def _open() -> Handshake[Request | Method]:
    return serve(authenticates=False, tls=False)


def _guarded() -> Handshake[Request | Method]:
    return serve(authenticates=True, tls=False)


def _negotiate() -> Handshake[Method]:
    return negotiate(bytes((0, 2)))


def _log_in() -> Handshake[None]:
    return log_in("user", "pass")


def _connect() -> Handshake[Endpoint]:
    return ask(Command.CONNECT, TARGET)


DIALOGUES: list[tuple[Callable[[], Handshake[Any]], str, Any, str]] = [
    (_open, "050100" + CONNECT, Request(1, TARGET), "0500"),
    (_open, "0503020001" + "05f30001000000000000", Request(0xF3, Endpoint("0.0.0.0", 0)), "0500"),
    (
        _open,
        "050100" + "05010003096c6f63616c686f73741b5f",
        Request(1, Endpoint("localhost", 7007)),
        "0500",
    ),
    (_open, "050100" + "05ff55040000000000000000000000000000000100ff", Request(255, Endpoint("::1", 255)), "0500"),
    (_guarded, "05020002" + "0104757365720470617373" + CONNECT, Request(1, TARGET), "0502" + "0100"),
    (_negotiate, "0502", Method.PASSWORD, "05020002"),
    (_log_in, "0100", None, "0104757365720470617373"),
    (_connect, "050000017f000001be2a", Endpoint("127.0.0.1", 0xBE2A), CONNECT),
    (_connect, "0500000300be2a", Endpoint("", 0xBE2A), CONNECT),
]


@pytest.mark.parametrize(("dialogue", "incoming", "result", "sent"), DIALOGUES)
def test_a_dialogue_takes_its_own_bytes_and_no_more(
    dialogue: Callable[[], Handshake[Any]], incoming: str, result: Any, sent: str
) -> None:
    data = bytes.fromhex(incoming)
    for early in (b"", b"GET / HTTP/1.1\r\n"):
        assert run_on_bytes(dialogue(), data + early, GOOD) == (result, bytes.fromhex(sent), early)


@pytest.mark.parametrize(("dialogue", "incoming", "result", "sent"), DIALOGUES)
def test_a_dialogue_is_never_satisfied_with_less(
    dialogue: Callable[[], Handshake[Any]], incoming: str, result: Any, sent: str
) -> None:
    data = bytes.fromhex(incoming)
    for size in range(len(data)):
        with pytest.raises(EndOfStream):
            run_on_bytes(dialogue(), data[:size], GOOD)


@pytest.mark.parametrize(("dialogue", "incoming", "result", "sent"), DIALOGUES)
def test_a_dialogue_does_not_care_how_bytes_come(
    dialogue: Callable[[], Handshake[Any]], incoming: str, result: Any, sent: str
) -> None:
    async def main() -> None:
        left, right = stream_pair()
        await left.send(bytes.fromhex(incoming) + b"early")

        async def answer(question: object) -> object:
            return GOOD[question]

        slow = Trickle(right)
        assert await run_handshake(slow, dialogue(), answer) == result
        assert await left.receive() == bytes.fromhex(sent)
        assert b"".join([await slow.receive() for _ in b"early"]) == b"early"

    run(main())


@pytest.mark.parametrize(
    ("dialogue", "incoming", "error", "message"),
    [
        (_open, "040100", ProtocolError, "version 4 instead of SOCKS5"),
        (_open, "474554202f", ProtocolError, "version 71"),
        (_open, "0500", ProtocolError, "the client offers no method"),
        (_open, "050102", ProtocolError, "the client offers 02"),
        (_open, "05028082", ProtocolError, "the client offers 80 82"),
        (_guarded, "050100", AuthDenied, "no method in common"),
        (_guarded, "050102" + "0504757365720470617373", ProtocolError, "version 5 of the user name"),
        (_guarded, "050102" + "010475736572" + "03626164", AuthDenied, "'user' are not accepted"),
        (_open, "050100" + "040100017f0000011b5f", ProtocolError, "version 4 in a SOCKS5 request"),
        (_open, "050100" + "05010002" + "7f0000011b5f", ProtocolError, "address type 2"),
        (_open, "050100" + "05010000" + "7f0000011b5f", ProtocolError, "address type 0"),
        (_open, "050100" + "0501000303610a620050", ProtocolError, "not a name"),
        (_open, "050100" + "0501000302fffe0050", ProtocolError, "not a name"),
        (_negotiate, "0400", ProtocolError, "version 4"),
        (_negotiate, "05ff", UpstreamRejected, "none of the methods 00 02"),
        (_negotiate, "0501", ProtocolError, "method 0x01, which was not offered"),
        (_negotiate, "0580", ProtocolError, "method 0x80, which was not offered"),
        (_log_in, "0101", UpstreamRejected, "does not accept the credentials"),
        (_log_in, "0500", ProtocolError, "version 5"),
        (_connect, "0505", UpstreamRejected, r"refuses 127.0.0.1:7007: connection refused \(5\)"),
        (_connect, "0563000100", UpstreamRejected, r"unknown reply \(99\)"),
        (_connect, "0400", ProtocolError, "version 4"),
        (_connect, "0500000900", ProtocolError, "address type 9"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(
    dialogue: Callable[[], Handshake[Any]], incoming: str, error: type[GostnetError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run_on_bytes(dialogue(), bytes.fromhex(incoming), GOOD)
    assert type(caught.value) is error


def test_a_refused_login_is_told_before_it_ends() -> None:
    sent: list[bytes] = []
    dialogue = serve_request(authenticates=True)
    effect = next(dialogue)
    for value in (b"\x01\x04", b"user\x03", b"bad"):
        effect = dialogue.send(value)
    effect = dialogue.send(False)
    sent.append(effect.data)  # type: ignore[union-attr]
    with pytest.raises(AuthDenied):
        dialogue.send(None)
    assert sent == [b"\x01\x01"]


def test_a_tls_method_ends_the_first_part() -> None:
    for authenticates, chosen in ((False, Method.TLS), (True, Method.TLS_PASSWORD)):
        dialogue = serve(authenticates=authenticates, tls=True)
        hello = b"\x16\x03\x01"
        result = run_on_bytes(dialogue, bytes.fromhex("050400028082") + hello)
        assert result == (chosen, bytes((5, chosen)), hello)


@pytest.mark.parametrize(
    ("offered", "authenticates", "tls", "method"),
    [
        ("00", False, False, 0x00),
        ("00", False, True, 0x00),
        ("00", True, True, 0xFF),
        ("0002", True, False, 0x02),
        ("0002", False, True, 0x00),
        ("02", False, True, 0xFF),
        ("0080", False, True, 0x80),
        ("0080", False, False, 0x00),
        ("80", False, False, 0xFF),
        ("00028082", True, True, 0x82),
        ("00028082", True, False, 0x02),
        ("00028082", False, True, 0x80),
        ("0080", True, True, 0xFF),
        ("82", False, True, 0xFF),
        ("", False, False, 0xFF),
    ],
)
def test_the_choice_of_a_method_is_that_of_gost(offered: str, authenticates: bool, tls: bool, method: int) -> None:
    assert choose_method(bytes.fromhex(offered), authenticates=authenticates, tls=tls) == method


def test_a_proxy_that_wants_credentials_unasked_is_obeyed() -> None:
    """# GOST: its client sends empty ones then."""
    assert run_on_bytes(negotiate(b"\0"), b"\x05\x02")[0] is Method.PASSWORD
    assert encode_credentials("", "") == b"\x01\0\0"


def test_a_reply_whose_address_makes_no_sense_is_still_a_success() -> None:
    assert run_on_bytes(_connect(), bytes.fromhex("05000003020a0a0050"))[0] == ANY


def test_secrets_do_not_show() -> None:
    assert "pass" not in repr(Credentials("user", "pass"))
    with pytest.raises(AuthDenied) as caught:
        run_on_bytes(serve_request(authenticates=True), bytes.fromhex("010475736572") + b"\x03bad", GOOD)
    assert "bad" not in str(caught.value)


@pytest.mark.parametrize("text", ["x" * 256, "\u00fc" * 128])
def test_credentials_that_do_not_fit_are_refused(text: str) -> None:
    for username, password in ((text, ""), ("", text)):
        with pytest.raises(ProtocolError, match="at most 255 bytes"):
            encode_credentials(username, password)


def test_replies_and_requests_are_those_of_gost() -> None:
    assert encode_reply(Reply.NETWORK_UNREACHABLE) == bytes.fromhex("05030001000000000000")
    assert encode_reply(Reply.SUCCEEDED, TARGET) == bytes.fromhex("050000017f0000011b5f")
    assert encode_request(Command.UDP_TUN) == bytes.fromhex("05f30001000000000000")


words = st.text(max_size=60)
hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6, network="2001:db8::/32").map(str),
    st.from_regex(r"[a-z][a-z0-9.-]{0,80}", fullmatch=True),
)


@given(words, words, hosts, st.integers(0, 65535), st.sampled_from(Command))
def test_the_server_understands_the_client(
    username: str, password: str, host: str, port: int, command: Command
) -> None:
    target = Endpoint(host, port)

    async def main() -> None:
        left, right = stream_pair()
        shown: list[object] = []

        async def accept(question: object) -> bool:
            shown.append(question)
            return True

        async def client() -> None:
            assert await run_handshake(left, negotiate(b"\0\2")) is Method.PASSWORD
            await run_handshake(left, log_in(username, password))
            assert await run_handshake(left, ask(command, target)) == target

        async def server() -> None:
            request = await run_handshake(right, _guarded(), accept)
            assert request == Request(command, target)
            await right.send(encode_reply(Reply.SUCCEEDED, target))

        await together(client(), server())
        assert shown == [Credentials(username, password)]

    run(main(), uvloop=False)


@given(st.binary(max_size=600))
def test_any_bytes_are_a_dialogue_or_an_error(data: bytes) -> None:
    for make in (_open, lambda: serve(authenticates=False, tls=True), _negotiate, _log_in, _connect):
        for start in (b"", b"\x05\x01\x00", b"\x05\x00\x00"):
            try:
                run_on_bytes(make(), start + data)
            except (ProtocolError, UpstreamRejected):
                pass
