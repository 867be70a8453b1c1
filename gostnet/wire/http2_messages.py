"""HTTP/2 (RFC 9113) for messages that are short enough to be held whole, such as those of DNS over HTTPS.

The library h2 keeps the connection's state; here its events become messages, and what is sent waits for the windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from ..core.errors import ProtocolError

MAX_FIELDS: Final = 16384
"""Bytes of the fields of one message, as told to the peer: more than any honest one has, less than an attack wants."""
_HEADER: Final = 9
"""Bytes of the header of a frame (RFC 9113 section 4.1)."""
_FEW: Final = 16
"""Empty DATA frames of a message that are let pass: they cost the sender next to nothing (CVE-2019-9518)."""


class Fate(Enum):
    """How a message ended."""

    WHOLE = "whole"
    LARGE = "large"
    RESET = "reset"


@dataclass(slots=True)
class Message:
    """One request or response, `fields` by name in lower case; of those that come twice the first counts.

    fate    LARGE: the body was longer than the limit, and what is here is its beginning; RESET: the peer took it back
    """

    stream: int
    fields: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    fate: Fate = Fate.WHOLE


class _Incoming:
    __slots__ = ("body", "empty", "fields")

    def __init__(self, fields: dict[bytes, bytes]) -> None:
        self.fields = fields
        self.body = bytearray()
        self.empty = 0


class ShortMessages:
    """One side of a connection. Whoever calls anything sends what `outgoing` returns afterwards.

    limit     bytes of a body
    streams   requests at a time that this side takes, if it is the server
    """

    def __init__(self, *, client: bool, limit: int, streams: int = 64) -> None:
        config = h2.config.H2Configuration(client_side=client, header_encoding=None)
        self._h2 = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        settings = {codes.MAX_HEADER_LIST_SIZE: MAX_FIELDS, codes.MAX_CONCURRENT_STREAMS: streams}
        if client:
            settings[codes.ENABLE_PUSH] = 0
        # What is set later counts only once the peer has acknowledged it, and is not in the first frame.
        self._h2.local_settings = h2.settings.Settings(client=client, initial_values=settings)
        self._h2.decoder.max_header_list_size = MAX_FIELDS
        self._h2.initiate_connection()
        self._limit = limit
        self._incoming: dict[int, _Incoming] = {}
        self._unsent: dict[int, bytes] = {}
        self.ending = False
        """The peer wants no further requests on this connection."""

    def outgoing(self) -> bytes:
        """Return what is to be sent now."""
        data: bytes = self._h2.data_to_send()
        return data

    @property
    def room(self) -> int:
        """Requests that the peer takes beside those that are under way; 0 when the connection is ending."""
        if self.ending:
            return 0
        return max(0, int(self._h2.remote_settings.max_concurrent_streams) - self._h2.open_outbound_streams)

    # ---- receiving -------------------------------------------------------------------------------
    def receive(self, data: bytes) -> list[Message]:
        """Return the messages that `data` completes. Raise ProtocolError; what is outgoing then tells the peer why."""
        try:
            events = self._h2.receive_data(data)
        except h2.exceptions.ProtocolError as exc:
            raise ProtocolError(f"HTTP/2: {exc or type(exc).__name__}") from exc
        # h2 holds a frame of up to 16 MiB before it looks at the length.
        if len(self._h2.incoming_buffer._data) > _HEADER + self._h2.max_inbound_frame_size:
            self.end()
            raise ProtocolError("HTTP/2: a frame that is too long")
        found: list[Message] = []
        for event in events:
            message = self._take(event)
            if message is not None:
                found.append(message)
        return found

    def _take(self, event: h2.events.Event) -> Message | None:
        match event:
            case h2.events.RequestReceived() | h2.events.ResponseReceived():
                fields: dict[bytes, bytes] = {}
                for name, value in event.headers or ():
                    fields.setdefault(bytes(name), bytes(value))
                self._incoming[_of(event)] = _Incoming(fields)
            case h2.events.DataReceived():
                return self._data(event)
            case h2.events.StreamEnded():
                incoming = self._incoming.pop(_of(event), None)
                if incoming is not None:
                    return Message(_of(event), incoming.fields, bytes(incoming.body))
            case h2.events.StreamReset():
                self._incoming.pop(_of(event), None)
                self._unsent.pop(_of(event), None)
                return Message(_of(event), fate=Fate.RESET)
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                for stream in tuple(self._unsent):
                    self._push(stream)
            case h2.events.ConnectionTerminated():
                self.ending = True
            case _:
                pass
        return None

    def _data(self, event: h2.events.DataReceived) -> Message | None:
        stream = _of(event)
        if event.flow_controlled_length:
            self._h2.acknowledge_received_data(event.flow_controlled_length, stream)
        incoming = self._incoming.get(stream)
        if incoming is None:
            return None
        incoming.body += event.data or b""
        incoming.empty += not event.data
        if len(incoming.body) > self._limit or incoming.empty > _FEW:
            del self._incoming[stream]
            return Message(stream, incoming.fields, bytes(incoming.body[: self._limit]), Fate.LARGE)
        return None

    # ---- sending ---------------------------------------------------------------------------------
    def request(self, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> int:
        """Begin a request and return its stream. Raise ProtocolError where there is no `room`."""
        try:
            stream: int = self._h2.get_next_available_stream_id()
            self._send(stream, fields, body)
        except h2.exceptions.ProtocolError as exc:
            raise ProtocolError(f"HTTP/2: {exc or type(exc).__name__}") from exc
        return stream

    def respond(self, stream: int, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Answer a request, unless the peer has taken it back."""
        try:
            self._send(stream, fields, body)
        except h2.exceptions.ProtocolError:
            self._unsent.pop(stream, None)

    def cancel(self, stream: int) -> None:
        """Take a request back, or give up a response."""
        self._incoming.pop(stream, None)
        self._unsent.pop(stream, None)
        try:
            self._h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        except h2.exceptions.ProtocolError:
            pass  # it has ended meanwhile

    def end(self) -> None:
        """Tell the peer that the connection ends."""
        try:
            self._h2.close_connection()
        except h2.exceptions.ProtocolError:
            pass  # it has ended, by the peer's fault

    def _send(self, stream: int, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        self._h2.send_headers(stream, list(fields), end_stream=not body)
        if body:
            self._unsent[stream] = body
            self._push(stream)

    def _push(self, stream: int) -> None:
        """Send as much of a body as the windows let through."""
        body = self._unsent.pop(stream)
        try:
            while body:
                size = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size, len(body))
                if size <= 0:
                    self._unsent[stream] = body
                    return
                self._h2.send_data(stream, body[:size], end_stream=size == len(body))
                body = body[size:]
        except h2.exceptions.ProtocolError:
            pass  # the peer has taken the request back


def _of(event: h2.events.Event) -> int:
    stream: int = getattr(event, "stream_id", 0) or 0
    return stream
