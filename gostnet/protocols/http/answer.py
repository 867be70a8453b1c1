"""The last words to a client, and which they are."""

from __future__ import annotations

from typing import Final

from ...core.errors import ConnError, GostnetError, LimitDenied, PolicyDenied
from ...core.stream import Stream
from ...core.tasks import deadline

LINGER: Final = 2.0
"""Seconds that a client gets to take its last answer and to close."""

DRAINED: Final = 1 << 20
"""Bytes of a request that nobody wants which are read all the same."""

_STATUS: Final = ((LimitDenied, 503), (PolicyDenied, 403), (GostnetError, 503))


def status_of(error: GostnetError) -> int:
    """Return the status that tells a client of `error`. # GOST: 503 for every failure to reach the target."""
    return next(status for kind, status in _STATUS if isinstance(error, kind))


async def part(client: Stream, last: bytes = b"") -> None:
    """Send `last`, end our direction, and close once the client has closed or its time is up. Never raises ConnError.

    Closing while bytes of the client are unread would reset the connection, and the reset may overtake the answer
    (RFC 9112 section 9.6).
    """
    try:
        with deadline(LINGER):
            if last:
                await client.send(last)
            await client.send_eof()
            left = DRAINED
            while left > 0 and (data := await client.receive()):
                left -= len(data)
            await client.aclose()
    except (ConnError, TimeoutError):
        pass
