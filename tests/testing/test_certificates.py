"""Certificates made on the spot are good for what they are for, and for nothing else."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest

from gostnet.testing.certificates import Authority


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shake hands in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
        if not waiting:
            return ends[0], ends[1]
    raise AssertionError("the handshake does not end")


@pytest.mark.parametrize("name", ["web.lab", "192.0.2.1", "2001:db8::1"])
def test_names_and_addresses_of_a_certificate_are_accepted(name: str) -> None:
    authority = Authority()
    identity = authority.issue("web.lab", "192.0.2.1", "2001:db8::1")
    client, server = handshake(authority.client_context("h2"), identity.server_context("h2", "http/1.1"), name)
    assert client.selected_alpn_protocol() == server.selected_alpn_protocol() == "h2"


def test_other_names_and_authorities_are_refused() -> None:
    authority = Authority()
    server = authority.issue("web.lab").server_context()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(authority.client_context(), server, "other.lab")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(Authority().client_context(), server, "web.lab")


def test_client_may_show_a_certificate() -> None:
    authority = Authority()
    server = authority.issue("web.lab").server_context()
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(cadata=authority.certificate.decode())
    _, seen = handshake(authority.client_context(identity=authority.issue("me")), server, "web.lab")
    subject = seen.getpeercert()
    assert subject is not None
    assert (("commonName", "me"),) in subject["subject"]


def test_saved_key_is_private(tmp_path: Path) -> None:
    identity = Authority().issue("web.lab")
    certificate, key = identity.save(tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert (certificate.name, key.name) == ("server.crt", "server.key")
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)


def test_key_is_not_shown() -> None:
    assert "PRIVATE" not in repr(Authority().issue("web.lab"))
