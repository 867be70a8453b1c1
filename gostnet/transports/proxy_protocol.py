"""The PROXY protocol below everything else: a listener reads its header, a dialer sends it, before any other byte.

Rows of docs/proxy-protocol.md: PP01, PP02, ...
"""

from __future__ import annotations

from typing import Final

from ..core.errors import EndOfStream, ProtocolError
from ..core.flow import Flow
from ..core.stream import Stream
from ..core.tasks import deadline
from ..wire.proxy_header import encode_proxy_header, parse_proxy_header

HEADER_TIMEOUT: Final = 10.0
"""Seconds for a client to send its header, as in GOST."""


class ProxyProtocol:
    """Both sides of it, as a layer that adds nothing to the stream.

    version    of the header that is sent: 1, or else 2; both are read
    timeout    seconds that a client may take
    """

    __slots__ = ("timeout", "version")

    def __init__(self, version: int = 2, *, timeout: float = HEADER_TIMEOUT) -> None:
        self.version = version
        self.timeout = timeout

    async def server(self, flow: Flow, below: Stream) -> Stream:
        """Read the header and put whom it speaks for into `flow`; `below` goes on with what follows.

        A client that begins with something else, or says nothing for `timeout` seconds, speaks for itself (PP02). Raise
        ProtocolError for a bad header, or one that does not end in time, EndOfStream, ConnError.
        """
        held = b""
        try:
            with deadline(self.timeout):
                while (header := parse_proxy_header(held)) is None:
                    data = await below.receive()
                    if not data:
                        if held:
                            raise EndOfStream("the client closed inside its PROXY header")
                        return below
                    held += data
        except TimeoutError as exc:
            if held:
                raise ProtocolError(f"no end of the PROXY header within {self.timeout:g}s") from exc
            return below
        if len(held) > header.size:
            below.unread(held[header.size :])
        if header.source is not None and header.destination is not None:
            flow.client = header.source
            flow.ingress = header.destination
            flow.hash = header.source.host
        return below

    async def client(self, flow: Flow, below: Stream, name: str) -> Stream:
        """Tell the server whose connection this is; nothing where that is not known (PP04). Raise ConnError."""
        header = encode_proxy_header(self.version, flow.client, flow.ingress)
        if header:
            await below.send(header)
        return below
