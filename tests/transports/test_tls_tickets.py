"""Resumption of TLS 1.3: what is resumed and what is not, what a ticket is used for, and what goes wrong with one."""

from __future__ import annotations

import gc
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gostnet.core.flow import Flow
from gostnet.core.stream import Stream
from gostnet.core.tasks import Scope, run
from gostnet.testing import stream_pair
from gostnet.testing.memory import MemoryStream
from gostnet.transports import openssl, tls_tickets
from gostnet.transports.certificates import generate
from gostnet.transports.tls import TlsLayer
from gostnet.transports.tls_context import TlsOptions, client_context
from gostnet.transports.tls_tickets import Ticket, Tickets

from .test_tls import client, handshake, server


async def talk(accepting: TlsLayer, dialling: TlsLayer, name: str = "gost.run", end: str = "close") -> bool:
    """Shake hands, say something both ways, end; tell whether an earlier session was resumed."""
    left, right = await handshake(accepting, dialling, stream_pair(), name)
    assert left.resumed == right.resumed
    await left.send(b"question")
    assert await right.receive() == b"question"
    await right.send(b"answer")
    assert await left.receive() == b"answer"
    if end == "close":
        await left.aclose()
        await right.aclose()
    else:
        left.abort()
        right.abort()
    return left.resumed


def resumptions(accepting: TlsLayer, dialling: TlsLayer, count: int = 3, **more: str) -> list[bool]:
    return [run(talk(accepting, dialling, **more)) for _ in range(count)]


# ---- resumed ----------------------------------------------------------------------------------------------
def test_functions_are_there() -> None:
    """With the interpreters that gostnet runs on; a static one may lack them, and then this says so."""
    assert openssl.sessions() is not None


@pytest.mark.parametrize("end", ["close", "abort"])
def test_sessions_are_resumed_however_the_last_one_ended(end: str) -> None:
    """OpenSSL itself gives up the session of a connection that was not closed in order."""
    assert resumptions(server(), client(), end=end) == [False, True, True]


def test_resumed_connection_shows_what_the_first_one_did() -> None:
    async def main() -> None:
        accepting, dialling = server(), client()
        shown = []
        for _ in range(2):
            left, right = await handshake(accepting, dialling, stream_pair())
            await right.send(b"x")
            assert await left.receive() == b"x"
            shown.append((left.resumed, left.peer_certificate, left.version, left.alpn))
        assert [each[0] for each in shown] == [False, True]
        assert shown[0][1:] == shown[1][1:]

    run(main())


def recorded() -> tuple[Stream, Stream, list[bytes], list[bytes]]:
    """Return two ends and what each is given to send."""
    pair = stream_pair()
    said: tuple[list[bytes], list[bytes]] = ([], [])
    for each, words in zip(pair, said, strict=True):

        class Recorder(MemoryStream):
            __slots__ = ()

            async def send(self, data: Any, words: list[bytes] = words) -> None:
                words.append(bytes(data))
                await super().send(data)

        each.__class__ = Recorder
    return *pair, *said


def test_every_resumption_agrees_on_a_new_key_and_uses_a_ticket_of_its_own() -> None:
    """RFC 8446 section 4.2.9 (psk_dhe_ke) and appendix C.4."""

    async def main() -> None:
        accepting, dialling = server(), client()
        hellos = []
        for number in range(3):
            near, far, asked, answered = recorded()
            left, right = await handshake(accepting, dialling, (near, far))
            await right.send(b"x")
            assert await left.receive() == b"x"
            assert left.resumed == (number > 0)
            assert b"\x00\x2d\x00\x02\x01\x01" in asked[0]  # the only kind of key exchange offered
            assert b"\x00\x33\x00\x24\x00\x1d\x00\x20" in answered[0]  # the server's key share, X25519
            hellos.append(asked[0])
        identities = [hello[hello.rindex(b"\x00\x29") :][:64] for hello in hellos[1:]]
        assert identities[0] != identities[1]

    run(main())


def test_ticket_is_used_once() -> None:
    async def main() -> None:
        accepting, dialling = server(), client()
        await talk(accepting, dialling)
        found = []
        for _ in range(3):  # nothing is received, so no ticket comes
            left, _ = await handshake(accepting, dialling, stream_pair())
            found.append(left.resumed)
        assert found == [True, False, False]

    run(main())


def test_tickets_are_those_of_the_name_and_the_address() -> None:
    accepting, dialling = server(), client()
    assert not run(talk(accepting, dialling, "a.example"))
    assert not run(talk(accepting, dialling, "b.example"))
    assert run(talk(accepting, dialling, "a.example"))


def test_no_more_tickets_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tickets, "EACH", 3)
    monkeypatch.setattr(Tickets, "SERVERS", 2)

    async def main() -> None:
        accepting, dialling = server(), client()
        for name in ("a.example", "b.example", "c.example"):
            opened = [await handshake(accepting, dialling, stream_pair(), name) for _ in range(5)]
            for left, right in opened:
                await right.send(b"x")
                assert await left.receive() == b"x"
        assert len(dialling._tickets) == 6
        assert not await talk(accepting, dialling, "a.example")
        assert await talk(accepting, dialling, "c.example")

    run(main())


def test_ticket_is_not_used_when_it_is_old() -> None:
    now = [100.0]
    accepting, dialling = server(), client()
    dialling._tickets = Tickets(lambda: now[0])
    assert resumptions(accepting, dialling, 2) == [False, True]
    now[0] += tls_tickets.AGE + 1
    assert resumptions(accepting, dialling, 2) == [False, True]


def test_resuming_again_and_again_does_not_put_the_next_full_handshake_off() -> None:
    """Each of them would otherwise trust a certificate that was looked at ever longer ago."""
    now = [100.0]
    accepting, dialling = server(), client()
    dialling._tickets = Tickets(lambda: now[0])
    found = []
    for _ in range(6):
        found += resumptions(accepting, dialling, 1)
        now[0] += tls_tickets.AGE * 0.4
    assert found == [False, True, True, False, True, True]


# ---- not resumed ------------------------------------------------------------------------------------------
def test_server_that_was_restarted_shakes_hands_in_full() -> None:
    """Or that has reloaded its configuration: the keys of its tickets are another context's."""
    dialling = client()
    assert resumptions(server(), dialling, 2) == [False, True]
    assert resumptions(server(), dialling, 2) == [False, True]


def test_client_that_was_reloaded_shakes_hands_in_full() -> None:
    accepting = server()
    assert resumptions(accepting, client(), 2) == [False, True]
    assert resumptions(accepting, client(), 2) == [False, True]


@pytest.mark.parametrize("change", ["older version", "other group"])
def test_server_that_has_changed_is_met_as_it_is(change: str) -> None:
    accepting, dialling = server(), client()
    assert resumptions(accepting, dialling, 2) == [False, True]
    changed = server(max_version="VersionTLS12") if change == "older version" else server()
    if change == "other group":
        changed._context.set_ecdh_curve("secp384r1")  # it asks for another hello
    assert resumptions(changed, dialling, 2) == [False, True]
    # And back, where the session of TLS 1.2 is of no use.
    assert resumptions(server(), dialling, 2) == [False, True]


def test_clients_that_must_show_certificates_show_them_every_time(tmp_path: Path) -> None:
    pair = generate("client.example")
    (tmp_path / "c").write_bytes(pair.certificate)
    (tmp_path / "k").write_bytes(pair.key)
    accepting = server(ca_file=str(tmp_path / "c"))
    dialling = client(cert_file=str(tmp_path / "c"), key_file=str(tmp_path / "k"))
    assert resumptions(accepting, dialling) == [False, False, False]


def test_clients_that_cannot_resume_get_no_ticket() -> None:
    """Go's say nothing of pre-shared keys unless they keep sessions."""
    accepting = server()

    def first_answer(hidden: bytes) -> int:
        sides = [ssl.MemoryBIO(), ssl.MemoryBIO()]
        near = client_context(TlsOptions()).wrap_bio(sides[0], sides[1])
        far = accepting._context.wrap_bio(sides[1], sides[0], server_side=True)
        with pytest.raises(ssl.SSLWantReadError):
            near.do_handshake()
        hello = sides[1].read()
        sides[1].write(hello)
        tls_tickets.grant(far, hello.replace(b"\x00\x2d\x00\x02\x01\x01", hidden))
        with pytest.raises(ssl.SSLWantReadError):
            far.do_handshake()
        near.do_handshake()
        far.do_handshake()
        return sides[0].pending

    assert first_answer(b"\x00\x2d\x00\x02\x01\x01") > 0
    assert first_answer(b"") == 0


def test_without_the_functions_nothing_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_tickets, "sessions", lambda: None)
    dialling = client()
    assert resumptions(server(), dialling) == [False, False, False]
    assert not len(dialling._tickets)


# ---- the pointers -----------------------------------------------------------------------------------------
@pytest.fixture
def probed_anew() -> Iterator[None]:
    openssl.sessions.cache_clear()
    yield
    openssl.sessions.cache_clear()


@pytest.mark.parametrize("header", [8, 24])
@pytest.mark.usefixtures("probed_anew")
def test_layout_that_is_another_is_not_believed(header: int, monkeypatch: pytest.MonkeyPatch) -> None:
    openssl.library()  # has its own probe
    monkeypatch.setattr(openssl, "_HEADER", header)
    assert openssl.sessions() is None


def test_connection_of_another_context_is_not_believed() -> None:
    assert not openssl._sound(lambda pointer: pointer)


@pytest.mark.usefixtures("probed_anew")
def test_library_without_the_functions_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openssl, "library", object)
    assert openssl.sessions() is None
    monkeypatch.setattr(openssl, "library", lambda: None)
    openssl.sessions.cache_clear()
    assert openssl.sessions() is None


def test_reference_is_given_back_once() -> None:
    freed: list[int] = []
    ticket = Ticket(4711, freed.append, 0.0)
    assert not freed
    del ticket
    assert freed == [4711]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_many_handshakes_leave_nothing_behind() -> None:
    """A session is 2 KiB with its ticket, a connection 20: what is forgotten of 1000 would be seen."""
    accepting, dialling = server(), client()

    def rounds(count: int) -> int:
        resumed = 0
        for _ in range(count):
            sides = [ssl.MemoryBIO(), ssl.MemoryBIO()]
            near = dialling._context.wrap_bio(sides[0], sides[1])
            offered = dialling._tickets.offer(near, "server")
            far = accepting._context.wrap_bio(sides[1], sides[0], server_side=True)
            for side in (near, far, near, far):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    if side is near:
                        hello = sides[1].read()
                        sides[1].write(hello)
                        tls_tickets.grant(far, hello)
            far.write(b"x")
            assert near.read(1) == b"x"
            dialling._tickets.keep(near, "server", offered)
            resumed += bool(near.session_reused)
        gc.collect()
        return resumed

    rounds(200)
    before = resident()
    assert rounds(1000) == 1000
    assert resident() - before < 512 << 10
    assert len(dialling._tickets) == 1


# ---- the end of the handshake -----------------------------------------------------------------------------
def test_client_s_first_data_go_with_the_end_of_its_handshake() -> None:
    async def main() -> None:
        near, far, asked, _ = recorded()
        answered = Scope("server").start(server().server(Flow(), far))
        left = await client().client(Flow(), near, "gost.run")
        await left.send(b"at once")
        right = await answered
        assert await right.receive() == b"at once"
        assert len(asked) == 2  # the hello, and everything else

    run(main())


def test_end_of_the_handshake_is_sent_by_itself() -> None:
    """Nobody sends or reads: the server's handshake ends all the same."""

    async def main() -> None:
        left, right = await handshake(server(), client(), stream_pair())
        await right.send(b"first")
        assert await left.receive() == b"first"
        await left.send(b"then")
        assert await right.receive() == b"then"

    run(main())


def test_connection_that_ends_at_once_ends_in_order() -> None:
    async def main() -> None:
        near, far = stream_pair()
        answered = Scope("server").start(server().server(Flow(), far))
        left = await client().client(Flow(), near, "gost.run")
        await left.aclose()
        assert await (await answered).receive() == b""

    run(main())
