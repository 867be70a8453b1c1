"""The order of TLS 1.3's suites: what is agreed on with peers that prefer others, and what a Python without it does."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from gostnet.transports import tls_context, tls_suites
from gostnet.transports.certificates import Certificates, generate
from gostnet.transports.tls_context import TlsOptions, client_context, server_context


@pytest.fixture(autouse=True)
def as_new() -> Iterator[None]:
    tls_suites._setter.cache_clear()
    tls_suites._has_aes.cache_clear()
    yield
    tls_suites._setter.cache_clear()
    tls_suites._has_aes.cache_clear()


def agreed(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    """Shake hands in memory and return the suite."""
    upwards, downwards = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(downwards, upwards, server_hostname="gost.run"),
        server.wrap_bio(upwards, downwards, server_side=True),
    ]
    for _ in range(4):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    found = sides[0].cipher()
    assert found is not None
    return found[0]


def foreign() -> ssl.SSLContext:
    """A client in OpenSSL's own order, AES-256 first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def serving(tmp_path: Path) -> ssl.SSLContext:
    return server_context(TlsOptions(), Certificates(working=tmp_path, saved=tmp_path / "saved"))


def test_order_can_be_chosen_here() -> None:
    """With the interpreters that gostnet runs on; a static one may lack it, and then this says so."""
    assert tls_suites._setter() is not None


def test_aes_128_is_agreed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_suites, "_has_aes", lambda: True)
    server = serving(tmp_path)
    assert agreed(server, client_context(TlsOptions())) == "TLS_AES_128_GCM_SHA256"
    assert agreed(server, foreign()) == "TLS_AES_128_GCM_SHA256"


def test_client_without_aes_gets_chacha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_suites, "_has_aes", lambda: True)
    server = serving(tmp_path)
    monkeypatch.setattr(tls_suites, "_has_aes", lambda: False)
    assert agreed(server, client_context(TlsOptions())) == "TLS_CHACHA20_POLY1305_SHA256"


def test_without_the_setter_the_order_is_openssls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_suites, "_setter", lambda: None)
    server = serving(tmp_path)
    assert not tls_suites.prefer(foreign(), server=False)
    assert agreed(server, client_context(TlsOptions())) == "TLS_AES_256_GCM_SHA384"


def test_tickets_are_for_who_resumes_where_that_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of a certificate that we made resume nothing then; a public one has clients that do."""
    monkeypatch.setattr(tls_context, "sessions", lambda: None)
    assert serving(tmp_path).num_tickets == 0
    pair = generate()
    tmp_path.joinpath("cert.pem").write_bytes(pair.certificate)
    tmp_path.joinpath("key.pem").write_bytes(pair.key)
    assert serving(tmp_path).num_tickets == 1
