"""TLS: the layer and its stream, over any stream, by OpenSSL's memory BIOs.

OpenSSL never sees a socket: what arrives is written into one BIO in large pieces, and what it wants to send is taken
out of the other. Reading and writing are separate tasks that share the OpenSSL object; they never meet, because every
call into it is synchronous and each task sends or receives below on its own.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, cast

from ..config import schema
from ..core.address import parse_ip
from ..core.errors import ConnError, DialError, DialTimeout, EndOfStream, GostnetError, ProtocolError
from ..core.fiber import Fiber, deadline
from ..core.flow import Flow
from ..core.hub import current_hub
from ..core.stream import CHUNK, Buffer, Stream
from .certificates import Certificates
from .tls_context import JudgedServer, TlsOptions, client_context, server_context
from .tls_tickets import Tickets, grant


# ---- the layer --------------------------------------------------------------------------------------
class TlsLayer:
    """One side of TLS as it is configured, for any number of streams. Server or client, as its context is.

    handshake_timeout    seconds for the client's handshake; 0 leaves it to the caller's deadline
    """

    __slots__ = ("_context", "_grants", "_options", "_scratch", "_sessions", "_tickets", "handshake_timeout")

    SESSIONS = 64
    """Names for which a session of TLS 1.2 is kept, to save the round trip that a full handshake takes more.

    GOST resumes nothing.
    """

    def __init__(
        self, context: ssl.SSLContext, options: TlsOptions | None = None, *, handshake_timeout: float = 0.0
    ) -> None:
        self._context = context
        self._options = options or TlsOptions()
        self._sessions: dict[str, ssl.SSLSession] = {}
        self._tickets = Tickets()
        # Who must show a certificate shows it every time.
        self._grants = context.verify_mode == ssl.CERT_NONE
        self._scratch = Scratch()
        self.handshake_timeout = handshake_timeout

    @classmethod
    def for_server(
        cls, section: schema.TLS | None, certificates: Certificates, path: str = "tls", *, alpn: Sequence[str] = ()
    ) -> TlsLayer:
        """Make the layer of a listener or handler, whose block may be absent. Raise ConfigError."""
        options = TlsOptions.of(section, path, alpn)
        return cls(server_context(options, certificates, path), options)

    @classmethod
    def for_client(
        cls,
        section: schema.TLS | schema.NodeTLS | None,
        path: str = "tls",
        *,
        alpn: Sequence[str] = (),
        handshake_timeout: float = 0.0,
        certificates: Certificates | None = None,
    ) -> TlsLayer:
        """Make the layer of a dialer or connector. Raise ConfigError.

        With `certificates`, layers that differ in the name only share a context.
        """
        options = TlsOptions.of(section, path, alpn)
        known = certificates.clients if certificates is not None else {}
        kind = replace(options, server_name="")
        context = known.get(kind)
        if context is None:
            context = known[kind] = client_context(options, path)
        return cls(context, options, handshake_timeout=handshake_timeout)

    async def server(self, flow: Flow, below: Stream) -> TlsStream:
        """Wait for a client's handshake on `below`, which stays the caller's until this returns.

        Raise ProtocolError, EndOfStream or ConnError. The caller owns the deadline; a cancelled handshake leaves
        nothing but `below`.
        """
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._context.wrap_bio(incoming, outgoing, server_side=True)
        stream = TlsStream(below, tls, incoming, outgoing, self._scratch)
        await stream.handshake(grants=self._grants)
        return stream

    async def client(self, flow: Flow, below: Stream, name: str) -> TlsStream:
        """Shake hands with the server on `below`, which stays the caller's until this returns.

        The name shown, and verified if that is configured, is the block's serverName or else `name`; an IP address is
        never shown. Raise DialError for whatever goes wrong; a cancelled handshake leaves nothing but `below`.
        """
        host = self._options.server_name or name
        try:
            with deadline(self.handshake_timeout):
                return await self._connect(below, _plain_name(host))
        except TimeoutError as exc:
            raise DialTimeout(f"tls handshake with {host or below.remote}: no answer in time") from exc
        except DialError:
            raise
        except GostnetError as exc:
            raise DialError(f"tls handshake with {host or below.remote}: {exc}") from exc

    async def _connect(self, below: Stream, name: str) -> TlsStream:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._wrap(incoming, outgoing, name, self._sessions.get(name))
        server = (name, below.remote)
        offered = self._tickets.offer(tls, server)
        stream = TlsStream(below, tls, incoming, outgoing, self._scratch)
        await stream.handshake()
        if stream.version == "TLSv1.3":
            self._sessions.pop(name, None)
            stream.at_first_data = partial(self._tickets.keep, tls, server, offered)
        elif not stream.resumed:
            self._keep_session(name, tls.session)
        return stream

    def _keep_session(self, name: str, session: ssl.SSLSession | None) -> None:
        sessions = self._sessions
        sessions.pop(name, None)
        if session is not None and session.has_ticket:
            if len(sessions) >= self.SESSIONS:
                del sessions[next(iter(sessions))]
            sessions[name] = session

    def _wrap(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, name: str, session: ssl.SSLSession | None
    ) -> ssl.SSLObject:
        context = self._context
        try:
            return context.wrap_bio(incoming, outgoing, server_hostname=name or None, session=session)
        except (ValueError, TypeError) as exc:  # no name to check, or one that is none: too long a label, a NUL
            if context.check_hostname:
                raise ProtocolError(f"{name[:64]!r} is not a name that a certificate could be for") from exc
            return context.wrap_bio(incoming, outgoing, session=session)


def _plain_name(host: str) -> str:
    """Return a host as certificates and SNI write it: without brackets, zone and final dots."""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    bare = host.rpartition("%")[0]
    if bare and parse_ip(bare) is not None:
        return bare
    return host.rstrip(".")


# ---- the stream -------------------------------------------------------------------------------------
RECORD: Final = 16384
"""Bytes of plain text in the largest record (RFC 8446 section 5.1)."""

PIECE: Final = 49152
"""Bytes that pass through a BIO at a time: three records. A BIO keeps the size it once had, so this is what a
connection costs that is idle after a transfer; larger pieces are not faster (measured up to 256 KiB)."""

SMALL: Final = 32768
LARGE: Final = 262144
"""Bytes asked for by a read below: the small size until a read has been filled. An allocation of the large size costs
system calls of its own (above malloc's threshold), which a connection of small messages must not pay."""

OVERFLOW: Final = 16384
"""Bytes of answers to handshake messages that may wait for the next `send`, such as refusals of renegotiation."""

LAST_WORDS: Final = 1.0
CLOSE: Final = 5.0
"""Seconds for an alert, and for the close_notify of `aclose` (Go's limit for it): a peer that reads nothing must not
hold the connection."""


class Scratch:
    """The buffer in which records are gathered, shared by the streams of a layer: none uses it across an await."""

    __slots__ = ("view",)

    def __init__(self) -> None:
        self.view: memoryview | None = None

    def get(self) -> memoryview:
        """Return the buffer, LARGE bytes."""
        if self.view is None:
            self.view = memoryview(bytearray(LARGE))
        return self.view


class Records:
    """Where records end in the bytes that go by: what OpenSSL knows and Python's ssl does not tell.

    partial    how many bytes of the last record have gone by, 0 when it is complete
    """

    __slots__ = ("_header", "_left", "partial")

    def __init__(self) -> None:
        self._header = b""
        self._left = 0
        self.partial = 0

    def whole(self, data: bytes, size: int) -> bool:
        """Whether `data`, `size` bytes and 5 at least, are one record, and the last one was complete before."""
        return not self.partial and size == 5 + (data[3] << 8 | data[4])

    def advance(self, data: bytes, start: int, end: int) -> None:
        """Go over `data[start:end]`. Each record is type 1 | version 2 | length 2 | length bytes."""
        at = start + self._left
        begin = start - self.partial
        if self._header:
            header = self._header + data[start : start + 5 - len(self._header)][: end - start]
            if len(header) < 5:
                self._header = header
                self.partial = len(header)
                return
            self._header = b""
            at = begin + 5 + (header[3] << 8 | header[4])
        while at + 5 <= end:
            begin = at
            at += 5 + (data[at + 3] << 8 | data[at + 4])
        if at > end:
            self._left = at - end
            self.partial = end - begin
        else:
            self._left = 0
            self._header = data[at:end]
            self.partial = end - at


class TlsStream(Stream):
    """A stream inside TLS. It owns the stream below.

    The end of a direction is close_notify, and the other goes on after it; TCP stays open until `aclose`. A peer that
    ends its TCP stream without close_notify has ended, as long as no record is cut: many do so, and Go takes it too.
    What answers a peer's handshake messages (key updates) goes out with the next `send`, in front of its data. So does
    the end of a client's handshake in TLS 1.3, if that comes before the loop's next turn.

    at_first_data    called once, when the peer's first data have been decrypted
    """

    __slots__ = (
        "_at",
        "_below",
        "_buffered",
        "_cipher",
        "_closed",
        "_cut",
        "_ended",
        "_eof_sent",
        "_fault",
        "_incoming",
        "_opening",
        "_outgoing",
        "_read_into",
        "_records",
        "_scratch",
        "_sending",
        "_stalled",
        "_tls",
        "_want",
        "at_first_data",
    )

    def __init__(
        self,
        below: Stream,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        scratch: Scratch | None = None,
    ) -> None:
        """Take the stream below and OpenSSL's object with its two BIOs; `handshake` is to follow."""
        self.local = below.local
        self.remote = below.remote
        self._head = b""
        self._below = below
        self._tls = tls
        self._read_into = cast("Callable[[int, memoryview], int]", tls.read)
        self._incoming = incoming
        self._outgoing = outgoing
        self._scratch = scratch or Scratch()
        self._records = Records()
        self._cipher = b""  # received and not yet in the BIO, from _at on
        self._at = 0
        self._want = SMALL
        self._buffered = False  # OpenSSL holds plain text
        self._ended = False  # the peer's direction
        self._eof_sent = False
        self._opening: bool | asyncio.Future[None] = False  # the end of the handshake is to be sent, or is being sent
        self._sending = False
        self._cut = False  # a send was interrupted, perhaps inside a record
        self._closed = False
        self._fault = ""  # what broke the TLS connection
        self.at_first_data: Callable[[], object] | None = None
        self._stalled: asyncio.Future[None] | None = None  # a writer that needs the reader to go on

    # ---- what the handshake has brought ---------------------------------------------------------
    @property
    def alpn(self) -> str:
        """The protocol that was agreed on, "" for none."""
        return self._tls.selected_alpn_protocol() or ""

    @property
    def version(self) -> str:
        """The version, such as TLSv1.3."""
        return self._tls.version() or ""

    @property
    def resumed(self) -> bool:
        """Whether an earlier session was resumed."""
        return bool(self._tls.session_reused)

    @property
    def peer_certificate(self) -> bytes:
        """The peer's certificate, DER, b"" if it showed none."""
        return self._tls.getpeercert(binary_form=True) or b""

    async def handshake(self, *, grants: bool = False) -> None:
        """Shake hands. Raise ProtocolError, EndOfStream or ConnError; the stream below is then the caller's to abort.

        After a server's handshake in TLS 1.3 only tickets are left to send: they go with the first data, which saves
        a packet, and a reset to clients that close without reading them. A server that `grants` gives one to a client
        that can use it. What a client has left to say goes with its first data too, or soon.
        """
        tls, below, incoming, outgoing = self._tls, self._below, self._incoming, self._outgoing
        hello: bytearray | None = None
        if isinstance(tls, JudgedServer):
            hello = tls.hello = bytearray()
        first = True
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError as exc:
                await self._alert()
                raise ProtocolError(describe(exc)) from exc
            else:
                done = True
            if done and tls.version() == "TLSv1.3":
                if not tls.server_side:
                    self._opening = True
                    current_hub().call_ready(self._open_alone)
                return
            if outgoing.pending:
                await below.send(outgoing.read())
            if done:
                return
            chunk = await below.receive(SMALL)
            if not chunk:
                raise EndOfStream("the peer closed during the TLS handshake")
            if first:
                # Handshake and alert; what is neither is no TLS, and OpenSSL's words for it are misleading.
                if chunk[0] not in (22, 21):
                    raise ProtocolError(f"the peer does not speak TLS: {chunk[:64]!r}")
                first = False
                if grants:
                    grant(tls, chunk)
            if hello is not None:
                hello += chunk
            incoming.write(chunk)
            self._records.advance(chunk, 0, len(chunk))

    # ---- receiving ------------------------------------------------------------------------------
    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        while True:
            if self._closed:
                raise ConnError("closed by this side")
            if self._head:
                return self._take_head(max_bytes)
            if self._fault:
                data = b""
            elif self._buffered or self._cipher or self._incoming.pending > self._records.partial:
                data = self._decrypt(max_bytes)
            else:
                data = b""
            if data:
                if self.at_first_data is not None:
                    self._tell_first_data()
                return data
            if self._fault:
                await self._alert()
                raise ConnError(self._fault)
            if self._ended:
                return b""
            try:
                chunk = await self._below.receive(self._want)
            except ConnError as exc:
                self._fault = str(exc)
                self._wake_writer()
                raise
            if chunk:
                size = len(chunk)
                if size == self._want:
                    self._want = LARGE
                elif size <= SMALL >> 1:
                    self._want = SMALL
                if not (6 <= size <= max_bytes and self._records.whole(chunk, size)):
                    self._cipher = chunk
                    continue
                # One record and nothing else, as small messages come: it needs no care for what is left over.
                self._incoming.write(chunk)
                try:
                    data = self._tls.read(RECORD)
                except ssl.SSLError as exc:
                    self._cannot_read(exc)
                    data = b""
                else:
                    self._ended = not data
                if self._stalled is not None:
                    self._wake_writer()
                if data:
                    if self.at_first_data is not None:
                        self._tell_first_data()
                    return data
            elif self._records.partial:
                self._fault = "the peer closed in the middle of a TLS record"
                self._wake_writer()
            else:
                self._ended = True
                self._wake_writer()

    def _tell_first_data(self) -> None:
        told, self.at_first_data = self.at_first_data, None
        if told is not None:
            told()

    def _cannot_read(self, exc: ssl.SSLError) -> None:
        """Note why OpenSSL has no plain text to give: it was a handshake message, the end, or a fault."""
        self._buffered = False
        if isinstance(exc, ssl.SSLWantReadError):
            if self._outgoing.pending > OVERFLOW and not self._sending:
                self._fault = "the peer asks for answers and reads none"
        elif isinstance(exc, ssl.SSLZeroReturnError):
            self._ended = True
        else:
            self._fault = describe(exc)

    def _decrypt(self, limit: int) -> bytes:
        """Return up to `limit` bytes of what has arrived, b"" if it holds no plain text."""
        incoming, records = self._incoming, self._records
        view: memoryview | None = None
        filled = 0
        while filled < limit:
            if not self._buffered:
                pending = incoming.pending
                # Without a whole record OpenSSL would only raise an exception, at the price of a small record.
                if pending <= records.partial:
                    if self._cipher:
                        self._feed()
                        continue
                    break
                want = min(limit - filled, RECORD, pending)
            else:
                want = min(limit - filled, RECORD)
            data = b""
            try:
                if view is None:
                    data = self._tls.read(want)
                    size = len(data)
                else:
                    size = self._read_into(want, view[filled:])
            except ssl.SSLError as exc:
                self._cannot_read(exc)
                if self._fault:
                    break
                if not self._ended:
                    continue
                size = 0
            if not size:
                self._ended = True
                self._buffered = False
                self._cipher = b""
                break
            self._buffered = size == want and self._tls.pending() > 0
            if view is None:
                if size == limit or not (self._buffered or self._cipher or incoming.pending > records.partial):
                    return data
                view = self._scratch.get()
                limit = min(limit, LARGE)
                view[:size] = data
            filled += size
        if self._stalled is not None:
            self._wake_writer()
        return bytes(view[:filled]) if view is not None else b""

    def _feed(self) -> None:
        """Put the next piece of what was received into the BIO."""
        data, start = self._cipher, self._at
        size = len(data)
        if start == 0 and size <= PIECE:
            self._incoming.write(data)
            end = size
        else:
            end = min(start + PIECE, size)
            self._incoming.write(memoryview(data)[start:end])
        self._records.advance(data, start, end)
        if end == size:
            self._cipher = b""
            self._at = 0
        else:
            self._at = end

    async def _alert(self) -> None:
        """Tell the peer what broke the connection, if nobody is sending."""
        if not self._outgoing.pending or self._sending or self._cut:
            return
        self._cut = True
        try:
            # Bounded, as the peer may not read; the error is raised all the same.
            with deadline(LAST_WORDS):
                await self._below.send(self._outgoing.read())
        except (ConnError, TimeoutError):
            pass

    # ---- sending --------------------------------------------------------------------------------
    def _open_alone(self) -> None:
        """Send the end of the handshake, which no data have taken along."""
        if self._opening is True and not self._closed:
            Fiber(self._open(), "tls").start()

    async def _open(self) -> None:
        gate = self._opening = asyncio.get_running_loop().create_future()
        sent = False
        try:
            await self._below.send(self._outgoing.read())
            sent = True
        except ConnError:
            pass  # the peer does not listen: its last words are still to be read
        finally:
            self._opening = False
            self._cut = not sent
            if not gate.done():
                gate.set_result(None)

    async def _take_along(self) -> None:
        """Let what is sent next bring the end of the handshake, or wait for who is sending that."""
        if self._opening is True:
            self._opening = False
        elif self._opening:
            await self._opening

    async def send(self, data: Buffer) -> None:
        size = len(data)
        if self._opening and size:
            await self._take_along()
        if self._sending or self._cut or self._closed or self._eof_sent or self._fault:
            self._may_send()
        self._sending = True
        try:
            if size <= PIECE:
                if size:
                    if self._encrypt(data):
                        await self._below.send(self._outgoing.read())
                    else:
                        await self._send_stalled(data)
                return
            view = memoryview(data)
            for start in range(0, size, PIECE):
                piece = view[start : start + PIECE]
                if self._encrypt(piece):
                    await self._below.send(self._outgoing.read())
                else:
                    await self._send_stalled(piece)
        except BaseException:
            self._cut = True
            raise
        finally:
            self._sending = False

    def _may_send(self) -> None:
        if self._sending:
            raise RuntimeError("two tasks write the same stream")
        if self._closed or self._eof_sent:
            raise ConnError("closed by this side")
        if self._fault:
            raise ConnError(self._fault)
        if self._cut:
            raise ConnError("an earlier send was interrupted")

    def _encrypt(self, data: Buffer) -> bool:
        """Put `data` into the outgoing BIO. False if OpenSSL wants the rest of a handshake message first."""
        try:
            self._tls.write(data)  # whole: neither the BIO nor Python's mode of OpenSSL writes a part
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as exc:
            self._fault = describe(exc)
            raise ConnError(self._fault) from exc
        return True

    async def _send_stalled(self, data: Buffer) -> None:
        """Send when the reader has got past the handshake message that it is in the middle of."""
        while not self._encrypt(data):
            await self._until_reader_moves()
        await self._below.send(self._outgoing.read())

    async def _until_reader_moves(self) -> None:
        if self._ended or self._fault or self._closed:
            raise ConnError(self._fault or "the peer closed in the middle of a handshake message")
        self._stalled = asyncio.get_running_loop().create_future()
        try:
            await self._stalled
        finally:
            self._stalled = None
        if self._closed:
            raise ConnError("closed by this side")

    def _wake_writer(self) -> None:
        stalled = self._stalled
        if stalled is not None and not stalled.done():
            stalled.set_result(None)

    async def send_eof(self) -> None:
        if self._eof_sent or self._closed:
            return
        await self._take_along()
        self._may_send()
        self._sending = True
        try:
            while not self._notify():
                await self._until_reader_moves()
            self._eof_sent = True
            await self._below.send(self._outgoing.read())
        except BaseException:
            self._cut = True
            raise
        finally:
            self._sending = False

    def _notify(self) -> bool:
        """Put close_notify into the outgoing BIO. False if OpenSSL wants the rest of a handshake message first."""
        self._set_aside()
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:
            pass  # it looks for the peer's close_notify at once, which may be a long time coming
        except ssl.SSLError as exc:
            if exc.reason == "SHUTDOWN_WHILE_IN_INIT":
                return False
            self._fault = describe(exc)
            raise ConnError(self._fault) from exc
        return True

    def _set_aside(self) -> None:
        """Take what OpenSSL still holds: a shutdown that meets data breaks the connection and loses them."""
        found = []
        try:
            while data := self._tls.read(RECORD):
                found.append(data)
            self._ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            self._fault = describe(exc)
            raise ConnError(self._fault) from exc
        finally:
            self._buffered = False
            if found:
                self._head += b"".join(found)

    # ---- closing --------------------------------------------------------------------------------
    async def aclose(self) -> None:
        """Send close_notify unless that is done, and close below; a peer that does not read holds it CLOSE seconds."""
        if self._closed:
            return
        if not (self._eof_sent or self._sending or self._cut or self._fault):
            try:
                with deadline(CLOSE):
                    await self._last_notify()
            except (ConnError, TimeoutError):
                pass  # the peer is gone, or sees the end of TCP instead
            except BaseException:
                self.abort()
                raise
        if not self._closed:
            self._end()
            await self._below.aclose()

    async def _last_notify(self) -> None:
        await self._take_along()
        if not self._cut and self._notify():
            self._eof_sent = True
            await self._below.send(self._outgoing.read())

    def abort(self) -> None:
        self._end()
        self._below.abort()

    def reset(self) -> None:
        """Abort so that the peer sees it: by a TCP reset where a socket is below.

        Without it the end of TCP between two records would pass for the end of the data.
        """
        self._end()
        self._below.reset()

    def _end(self) -> None:
        self._closed = True
        self._head = self._cipher = b""
        self._wake_writer()


def describe(exc: ssl.SSLError) -> str:
    """Return what went wrong in OpenSSL's words, without its codes and its file names."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {exc.verify_message.rstrip('.')}"
    words = _CODES.sub("", str(exc.args[-1]))
    alert = _ALERT.match(words)
    return f"the peer refuses: {alert[1]}" if alert else words


_CODES: Final = re.compile(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$")
_ALERT: Final = re.compile(r"(?:ssl|tls)v\w+ alert (.*)")
