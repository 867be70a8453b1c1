"""The connector `sni`: the first bytes themselves say where to, under another name if that is wanted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...core.address import Endpoint
from ...core.datagrams import Datagrams
from ...core.errors import DialError
from ...core.flow import Flow
from ...core.options import Seconds, opt
from ...core.passing import PassingStream
from ...core.registry import component
from ...core.stream import Buffer, Stream
from ...pipeline.connector import ConnectorContext
from ...wire.client_hello import host_name
from .codec import Disguise


@component("connector", "sni")
class SniConnector:
    """Leaves it to the proxy to find the target in TLS or HTTP. Nothing is asked, and nothing answered."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        """Options of `sni`."""

        host: str = opt("", "Name shown in place of the real one, which then travels encoded beside it.")
        timeout: Seconds = opt(0.0, "Accepted for compatibility: there is no answer to wait for.")

        def validate(self) -> Iterable[tuple[str, str]]:
            """Yield a cover that no hello can carry."""
            if self.host and not host_name(self.host.encode("utf-8", "replace")):
                yield "host", f"{self.host!r} is not a host name"

    def __init__(self, options: Options, context: ConnectorContext) -> None:
        self._cover = options.host.encode("ascii")

    async def handshake(self, flow: Flow, below: Stream) -> Stream:
        """Nothing is said before the client speaks."""
        return below

    async def connect(self, flow: Flow, below: Stream, target: Endpoint) -> Stream:
        """Return `below`, or a stream that disguises the first bytes sent; `target` is what the client will name."""
        return Disguised(below, self._cover) if self._cover else below

    async def associate(self, flow: Flow, below: Stream, target: Endpoint | None) -> Datagrams:
        """SNI proxies have no datagrams. Raise DialError."""
        raise DialError("an SNI proxy carries no UDP")


class Disguised(PassingStream):
    """A stream over `below`, which it owns; what is sent is held until the name in it can be exchanged."""

    __slots__ = ("_disguise",)

    def __init__(self, below: Stream, cover: bytes) -> None:
        super().__init__(below)
        self._disguise: Disguise | None = Disguise(cover)

    async def send(self, data: Buffer) -> None:
        if self._disguise is not None:
            first = self._disguise.feed(bytes(data))
            if first is None:
                return
            self._disguise = None
            data = first
        await self._below.send(data)

    async def send_eof(self) -> None:
        if self._disguise is not None:
            held = self._disguise.rest()
            self._disguise = None
            if held:
                await self._below.send(held)
        await self._below.send_eof()

    def transparent_over(self) -> Stream | None:
        """Return the stream below once the first bytes have gone out."""
        return self._below if self._disguise is None else None
