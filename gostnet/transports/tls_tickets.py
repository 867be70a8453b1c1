"""Resumption of TLS 1.3 (RFC 8446 section 2.2): no certificate, no signature, a third of the work less.

Python's ssl can do it too, but copies a session through its encoded form whenever it is read or set, certificate and
all, which costs more than the handshake saves. Here OpenSSL's own object is handed on.
"""

from __future__ import annotations

import ssl
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Final

from .openssl import connection_pointer, sessions

AGE: Final = 600.0
"""Seconds after a handshake in full in which what stems from it may be resumed: as long is a server trusted whose
certificate has expired meanwhile."""

_DHE_KEYS: Final = b"\x00\x2d\x00\x02\x01\x01"
"""The extension psk_key_exchange_modes with psk_dhe_ke alone (RFC 8446 section 4.2.9): sent by clients that resume."""


class Ticket:
    """What resumes one session: it owns one reference to OpenSSL's object.

    since    when the handshake in full was that it stems from, on the monotonic clock
    """

    __slots__ = ("_free", "pointer", "since")

    def __init__(self, pointer: int, free: Callable[[int], object], since: float) -> None:
        self.pointer = pointer
        self.since = since
        self._free = free

    def __del__(self) -> None:
        self._free(self.pointer)


class Tickets:
    """Tickets by the server that gave them. Each is used once, so that nobody sees connections belong together.

    A new key is agreed on every time, so what is recorded stays secret from who gets at a server's ticket keys later.
    """

    __slots__ = ("_now", "_tickets")

    EACH = 32
    """Tickets kept for a server: that many handshakes may be in progress before one of them gives the next."""

    SERVERS = 64

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._tickets: dict[Hashable, deque[Ticket]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._tickets.values()))

    def offer(self, tls: ssl.SSLObject, server: Hashable) -> Ticket | None:
        """Let a client that has said nothing yet offer a ticket, and return that, None if there is none."""
        calls = sessions()
        held = self._tickets.get(server)
        if calls is None or not held:
            return None
        now = self._now()
        while held:
            ticket = held.pop()
            if now <= ticket.since + AGE:
                return ticket if calls.set_session(connection_pointer(tls), ticket.pointer) == 1 else None
        return None

    def keep(self, tls: ssl.SSLObject, server: Hashable, offered: Ticket | None) -> None:
        """Keep the ticket that a server of TLS 1.3 has given, if it has: it comes with or before its first data.

        `offered` is what `offer` returned: the session at hand is that one until a new ticket comes. (It must have
        lived until now, or another session may be in its place.)
        """
        calls = sessions()
        if calls is None:
            return
        session = calls.get_session(connection_pointer(tls))
        if not session or (offered is not None and session == offered.pointer) or not calls.has_ticket(session):
            return
        # A copy: OpenSSL declares the session of a connection that breaks unfit for use.
        copy = calls.dup(session)
        if not copy:
            return
        since = offered.since if offered is not None and tls.session_reused else self._now()
        ticket = Ticket(copy, calls.free, since)
        tickets = self._tickets
        held = tickets.get(server)
        if held is None:
            if len(tickets) >= self.SERVERS:
                del tickets[next(iter(tickets))]
            held = tickets[server] = deque(maxlen=self.EACH)
        held.append(ticket)


def grant(tls: ssl.SSLObject, hello: bytes) -> None:
    """Let a server give one ticket to a client whose hello says that it resumes, however late it comes to that."""
    calls: Any = sessions()
    if calls is not None and _DHE_KEYS in hello:
        calls.set_num_tickets(connection_pointer(tls), 1)
