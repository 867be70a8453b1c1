"""A certificate authority for tests and the lab: keys are made on the spot and nothing is kept."""

from __future__ import annotations

import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_VALIDITY = timedelta(days=30)
_SKEW = timedelta(days=1)
"""A certificate is valid from the day before, so that a clock that is a little off does no harm."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate (PEM) and its private key (PEM, unencrypted)."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Identity(...)"

    def save(self, directory: Path, stem: str = "server") -> tuple[Path, Path]:
        """Write STEM.crt and STEM.key (mode 0600) and return their paths."""
        certificate, key = directory / f"{stem}.crt", directory / f"{stem}.key"
        certificate.write_bytes(self.certificate)
        key.touch(mode=0o600)
        key.write_bytes(self.key)
        return certificate, key

    def server_context(self, *alpn: str) -> ssl.SSLContext:
        """Return a context for the accepting side that offers the ALPN protocols."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._load(context)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        with tempfile.TemporaryDirectory() as name:  # the module reads certificates from files only
            context.load_cert_chain(*self.save(Path(name)))


class Authority:
    """Issues certificates that whoever trusts its own certificate accepts."""

    def __init__(self, name: str = "gostnet test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = _usage(signs=False, issues=True)
        self._certificate = (
            _builder(subject, subject, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def certificate(self) -> bytes:
        """The authority's own certificate, PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, *names: str) -> Identity:
        """Return an identity, fit for both sides of TLS, for host names and IP addresses; at least one."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        issuer = self._key.public_key()
        certificate = (
            _builder(subject, self._certificate.subject, key)
            .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=True, issues=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Identity(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    def client_context(self, *alpn: str, identity: Identity | None = None) -> ssl.SSLContext:
        """Return a context for the connecting side: trusts this authority only, shows `identity` when asked for one."""
        context = ssl.create_default_context(cadata=self.certificate.decode())
        if identity is not None:
            identity._load(context)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _VALIDITY)
    )


def _usage(*, signs: bool, issues: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs,
        key_cert_sign=issues,
        crl_sign=issues,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)
