"""Short messages over HTTP/2, both sides in memory; the library h2, driven by hand, is the odd peer."""

from __future__ import annotations

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.core.errors import ProtocolError
from gostnet.wire.http2_messages import Fate, Message, ShortMessages

LIMIT = 65535
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
POST = [(b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"a"), (b":path", b"/q"), (b"x-a", b"1")]
OK = [(b":status", b"200"), (b"x-b", b"2"), (b"x-b", b"3")]


def exchange(client: ShortMessages, server: ShortMessages) -> tuple[list[Message], list[Message]]:
    """Carry bytes both ways until nobody has any; return what the client and the server have received."""
    at_client: list[Message] = []
    at_server: list[Message] = []
    while True:
        up, down = client.outgoing(), server.outgoing()
        if not up and not down:
            return at_client, at_server
        at_server += server.receive(up) if up else []
        at_client += client.receive(down) if down else []


def pair() -> tuple[ShortMessages, ShortMessages]:
    client, server = ShortMessages(client=True, limit=LIMIT), ShortMessages(client=False, limit=LIMIT, streams=3)
    exchange(client, server)
    return client, server


@pytest.mark.parametrize("size", [0, 1, 16384, 16385, LIMIT])
def test_a_request_and_its_response_are_whole_whatever_the_windows(size: int) -> None:
    client, server = pair()
    body = bytes(range(256)) * 256
    for _ in range(3):
        number = client.request(POST, body[:size])
        _, (request,) = exchange(client, server)
        assert (request.stream, request.body, request.fate) == (number, body[:size], Fate.WHOLE)
        assert (request.fields[b":path"], request.fields[b"x-a"]) == (b"/q", b"1")
        server.respond(request.stream, OK, body[:size])
        (response,), _ = exchange(client, server)
        assert (response.stream, response.body, response.fields[b"x-b"]) == (number, body[:size], b"2")


def test_answers_come_in_any_order_and_room_is_what_the_server_takes() -> None:
    client, server = pair()
    assert client.room == 3
    numbers = [client.request(POST, b"%d" % index) for index in range(3)]
    assert client.room == 0
    with pytest.raises(ProtocolError):
        client.request(POST, b"one too many")
    _, requests = exchange(client, server)
    for request in reversed(requests):
        server.respond(request.stream, OK, b"re " + request.body)
    responses, _ = exchange(client, server)
    assert [(item.stream, item.body) for item in responses] == [
        (number, b"re %d" % index) for index, number in reversed(list(enumerate(numbers)))
    ]
    assert client.room == 3


def test_a_body_over_the_limit_is_told_at_once_and_can_be_answered() -> None:
    client, server = pair()
    number = client.request(POST, b"x" * (LIMIT + 70000))
    _, (request,) = exchange(client, server)
    assert (request.fate, len(request.body)) == (Fate.LARGE, LIMIT)
    server.respond(number, OK, b"")
    (response,), rest = exchange(client, server)
    assert (response.stream, response.fate, rest) == (number, Fate.WHOLE, [])


def test_what_is_taken_back_is_reset_and_its_answer_goes_nowhere() -> None:
    client, server = pair()
    number = client.request(POST, b"a")
    exchange(client, server)
    client.cancel(number)
    client.cancel(number)
    _, (gone,) = exchange(client, server)
    assert (gone.stream, gone.fate) == (number, Fate.RESET)
    server.respond(number, OK, b"late")
    assert exchange(client, server) == ([], [])


def test_the_end_is_told() -> None:
    client, server = pair()
    server.end()
    exchange(client, server)
    assert (client.ending, client.room) == (True, 0)
    server.end()


def odd_client() -> h2.connection.H2Connection:
    peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    peer.initiate_connection()
    return peer


def test_a_peer_that_grants_no_window_gets_the_body_when_it_does() -> None:
    server = ShortMessages(client=False, limit=LIMIT)
    peer = odd_client()
    peer.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    peer.send_headers(
        1, [(":method", "GET"), (":scheme", "https"), (":authority", "a"), (":path", "/")], end_stream=True
    )
    (request,) = server.receive(peer.data_to_send())
    server.respond(request.stream, OK, b"hello")
    events = peer.receive_data(server.outgoing())
    assert not any(isinstance(event, h2.events.DataReceived) for event in events)
    peer.increment_flow_control_window(2, 1)
    server.receive(peer.data_to_send())
    first = [event for event in peer.receive_data(server.outgoing()) if isinstance(event, h2.events.DataReceived)]
    peer.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 100})
    server.receive(peer.data_to_send())
    rest = [event for event in peer.receive_data(server.outgoing()) if isinstance(event, h2.events.DataReceived)]
    assert b"".join(event.data or b"" for event in first + rest) == b"hello"


def test_empty_frames_end_a_request() -> None:
    server = ShortMessages(client=False, limit=LIMIT)
    peer = odd_client()
    peer.send_headers(1, [(":method", "POST"), (":scheme", "https"), (":authority", "a"), (":path", "/")])
    for _ in range(100):
        peer.send_data(1, b"")
    assert [message.fate for message in server.receive(peer.data_to_send())] == [Fate.LARGE]


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", PREFACE + b"\0\0\1\4" + bytes(6), PREFACE + b"\xff" * 20000]
)
def test_what_is_no_http2_breaks_the_protocol_and_the_peer_is_told(data: bytes) -> None:
    server = ShortMessages(client=False, limit=LIMIT)
    server.outgoing()
    with pytest.raises(ProtocolError, match="HTTP/2"):
        server.receive(data)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_taken_or_break_the_protocol(data: bytes, at: int) -> None:
    client, server = pair()
    client.request(POST, b"abc")
    honest = client.outgoing()
    try:
        server.receive(honest[:at] + data + honest[at:])
    except ProtocolError:
        server.end()
    server.outgoing()
