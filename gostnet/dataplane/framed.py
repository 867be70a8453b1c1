"""Datagrams over a stream: UDP-tun frames with an address each, or length frames to one target."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.address import ANY, Endpoint
from ..core.datagrams import Datagram, Datagrams, pieces
from ..core.errors import ProtocolError
from ..core.stream import CHUNK, Stream
from ..wire.udp_frames import MAX_DATA, LengthFrames, TunFrames, encode_length_frames, encode_tun_frames


class TunDatagrams(Datagrams):
    """UDP-tun frames (wire.udp_frames) on a stream, which it owns.

    Every frame is delivered whole, whatever its size, several per read; every batch is one write. Back-pressure of the
    stream holds `send` back. Empty datagrams are taken and not sent (the format cannot carry them to GOST).

    target    what every datagram goes to and is said to come from, for associations with one target; None takes the
              address of each frame
    """

    __slots__ = ("_frames", "_stream", "_target")

    def __init__(self, stream: Stream, target: Endpoint | None = None, local: Endpoint = ANY) -> None:
        super().__init__(local, MAX_DATA)
        self._stream = stream
        self._target = target
        self._frames = TunFrames()

    async def receive(self) -> Sequence[Datagram]:
        """Return the datagrams of one or more reads; a frame that the end of the stream cuts off is lost.

        Raise ProtocolError when the stream stops making sense, ConnError when it broke.
        """
        frames, target = self._frames, self._target
        while frames.error is None:
            data = await self._stream.receive(CHUNK)
            if not data:
                return ()
            if batch := frames.feed(data):
                if target is not None:
                    return [Datagram(payload, target) for payload, _ in batch]
                return [Datagram(payload, peer) for payload, peer in batch]
        raise ProtocolError(f"UDP-tun frame: {frames.error}")

    async def send(self, batch: Sequence[Datagram]) -> None:
        target = self._target
        if target is not None:
            data = encode_tun_frames((part, target) for datagram in batch for part in pieces(datagram))
        else:
            data = encode_tun_frames((part, datagram.peer) for datagram in batch for part in pieces(datagram))
        if data:
            await self._stream.send(data)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        self._stream.abort()


class LengthDatagrams(Datagrams):
    """Length frames (wire.udp_frames) on a stream, which it owns: datagrams of one `target`, empty ones included."""

    __slots__ = ("_frames", "_stream", "_target")

    def __init__(self, stream: Stream, target: Endpoint, local: Endpoint = ANY) -> None:
        super().__init__(local, MAX_DATA)
        self._stream = stream
        self._target = target
        self._frames = LengthFrames()

    async def receive(self) -> Sequence[Datagram]:
        """Return the datagrams of one or more reads; a frame that the end of the stream cuts off is lost."""
        frames, target = self._frames, self._target
        while data := await self._stream.receive(CHUNK):
            if batch := frames.feed(data):
                return [Datagram(payload, target) for payload in batch]
        return ()

    async def send(self, batch: Sequence[Datagram]) -> None:
        data = encode_length_frames(part for datagram in batch for part in pieces(datagram))
        if data:
            await self._stream.send(data)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        self._stream.abort()
