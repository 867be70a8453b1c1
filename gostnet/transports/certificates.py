"""Certificates: read from files, or made, kept and renewed by ourselves.

Everything is read when a configuration is assembled, so a reload takes what the files hold by then. What a file lacks
is told by its own name, not in OpenSSL's words.
"""

from __future__ import annotations

import fcntl
import os
import re
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..config import schema
from ..core.errors import ConfigError
from ..core.log import Logger, quiet

if TYPE_CHECKING:
    from cryptography import x509

# The package cryptography is imported where it is used: a daemon whose certificates are in order starts without it,
# 40 ms sooner.

_CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_KEY: Final = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)

VALIDITY: Final = 365 * 86400.0
COMMON_NAME: Final = "gost.run"
ORGANIZATION: Final = "GOST"
"""GOST's defaults for the certificate that it makes for itself."""

SAVED_CERTIFICATE: Final = "auto-ca-cert.pem"
SAVED_KEY: Final = "auto-ca-key.pem"

LARGEST: Final = 16 << 20
"""Bytes of the largest file that is taken for PEM; the bundle of all public authorities has some 250 KiB."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate with the chain that leads to it, and its private key: PEM, the key not encrypted.

    origin    where it is from, for messages: a file, or how it was made
    """

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    origin: str

    def load_into(self, context: ssl.SSLContext) -> None:
        """Make it the context's own certificate. Raise ssl.SSLError for one that OpenSSL does not accept."""
        with _readable(self.certificate) as certificate, _readable(self.key) as key:
            # An empty answer makes an encrypted key an error; without a callback OpenSSL would ask the terminal.
            context.load_cert_chain(certificate, key, password=lambda: b"")

    def expires(self) -> datetime:
        """Return the end of its validity. Raise ValueError if it cannot be parsed."""
        return _parsed(self.certificate).not_valid_after_utc


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server shows, and whom it lets in.

    clients    certificates (PEM) of the authorities one of which a client's certificate must be from; () asks for none
    own        the certificate is one that we have made for ourselves
    """

    pair: KeyPair
    clients: tuple[str, ...] = ()
    own: bool = False


@contextmanager
def _readable(data: bytes) -> Iterator[str]:
    """Give `data` a file name for as long as it takes to load it: the module ssl reads certificates from files only."""
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        name = f"/proc/self/fd/{fd}"
        if os.path.exists(name):
            yield name
            return
    finally:
        os.close(fd)
    with tempfile.NamedTemporaryFile() as file:  # no /proc in this root; the file's mode is 0600
        file.write(data)
        file.flush()
        yield file.name


# ---- files ------------------------------------------------------------------------------------------
def read_key_pair(certificate_file: str, key_file: str, path: str = "tls") -> KeyPair:
    """Read a certificate with its chain, and its key, which may be in the same file.

    `path` is the place of the TLS block in the configuration. Raise ConfigError that names the key of the block, the
    file, and what is wrong with it.
    """
    if not certificate_file:
        raise ConfigError(f"{path}.certFile", f"is missing, and keyFile {key_file!r} is given", code="tls.pair")
    if not key_file:
        raise ConfigError(f"{path}.keyFile", f"is missing, and certFile {certificate_file!r} is given", code="tls.pair")
    certificate = _read(certificate_file, f"{path}.certFile")
    if not _CERTIFICATE.search(certificate):
        raise ConfigError(f"{path}.certFile", _no_pem(certificate, certificate_file, "certificate"), code="tls.file")
    key = _read(key_file, f"{path}.keyFile")
    if not _KEY.search(key):
        raise ConfigError(f"{path}.keyFile", _no_pem(key, key_file, "private key"), code="tls.file")
    if b"ENCRYPTED" in key:
        raise ConfigError(
            f"{path}.keyFile",
            f"the private key in {key_file!r} is encrypted, and nobody could be asked for its passphrase",
            hint="`openssl pkey -in FILE -out PLAIN` takes the passphrase away",
            code="tls.file",
        )
    pair = KeyPair(certificate, key, certificate_file)
    try:
        pair.load_into(_probe())
    except ssl.SSLError as exc:
        key_of_block, message = _diagnose(pair, certificate_file, key_file, exc)
        raise ConfigError(f"{path}.{key_of_block}", message, code="tls.file") from exc
    return pair


def read_authorities(file: str, path: str = "tls") -> tuple[str, ...]:
    """Read the certificates of a bundle, PEM; those that cannot be parsed are left out, as long as one is left.

    Raise ConfigError.
    """
    where = f"{path}.caFile"
    data = _read(file, where)
    blocks = _CERTIFICATE.findall(data)
    if not blocks:
        raise ConfigError(where, _no_pem(data, file, "certificate"), code="tls.file")
    probe = _probe()
    usable = []
    for block in blocks:
        text = block.decode("ascii", "replace")
        try:
            probe.load_verify_locations(cadata=text)
        except ssl.SSLError:
            continue
        usable.append(text)
    if not usable:
        raise ConfigError(where, f"no certificate in {file!r} can be parsed", code="tls.file")
    return tuple(usable)


def _read(file: str, where: str) -> bytes:
    try:
        with open(file, "rb") as source:
            data = source.read(LARGEST + 1)
    except OSError as exc:
        raise ConfigError(where, f"cannot read {file!r}: {exc.strerror}", code="tls.file") from exc
    except ValueError as exc:  # a NUL in the name
        raise ConfigError(where, f"{file!r} is not the name of a file", code="tls.file") from exc
    if len(data) > LARGEST:
        raise ConfigError(where, f"{file!r} is larger than {LARGEST >> 20} MiB", code="tls.file")
    return data


def _no_pem(data: bytes, file: str, wanted: str) -> str:
    if not data.strip():
        return f"{file!r} is empty"
    other = "private key" if wanted == "certificate" else "certificate"
    if (_KEY if wanted == "certificate" else _CERTIFICATE).search(data):
        return f"{file!r} holds a {other}, not a {wanted}"
    # DER is a SEQUENCE with a length of two bytes: what all certificates and most keys are.
    form = ", it looks like DER; PEM is needed" if data[:2] == b"\x30\x82" else ""
    return f"{file!r} holds no PEM {wanted}{form}"


def _probe() -> ssl.SSLContext:
    """Return a context to try certificates with, as lenient as those that will use them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(f"DEFAULT@SECLEVEL={SECURITY_LEVEL}")
    return context


SECURITY_LEVEL: Final = 1
"""OpenSSL's level for own certificates: RSA from 1024 bits on, where Go draws the line too."""


def _parsed(certificate: bytes) -> x509.Certificate:
    from cryptography import x509

    return x509.load_pem_x509_certificate(certificate)


def _diagnose(pair: KeyPair, certificate_file: str, key_file: str, exc: ssl.SSLError) -> tuple[str, str]:
    """Say which of the two files is at fault: (key of the TLS block, message)."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    def public(key: Any) -> bytes:
        data: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return data

    try:
        certified = public(_parsed(pair.certificate).public_key())
    except (ValueError, UnsupportedAlgorithm):
        return "certFile", f"the first certificate in {certificate_file!r} cannot be parsed"
    try:
        own = public(load_pem_private_key(pair.key, None).public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return "keyFile", f"the private key in {key_file!r} cannot be parsed"
    if own != certified:
        return "keyFile", f"the key in {key_file!r} does not belong to the certificate in {certificate_file!r}"
    words = (exc.reason or str(exc)).replace("_", " ").lower()
    return "certFile", f"{certificate_file!r} cannot be used: {words}"


# ---- our own ------------------------------------------------------------------------------------------
def generate(
    common_name: str = "", organization: str = "", validity: float = 0.0, now: datetime | None = None
) -> KeyPair:
    """Make a self-signed certificate, such as GOST makes for itself, for ECDSA on P-256.

    Empty words and a validity (seconds) of 0 or less take GOST's defaults. It is an authority of its own, so that
    clients can take a copy of it as their caFile.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    begin = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    name = common_name or COMMON_NAME
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization or ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(os.urandom(16)) | 1)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(seconds=validity if validity > 0 else VALIDITY))
        .add_extension(usage, critical=True)
        .add_extension(purposes, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        "generated at start",
    )


def saved_directory() -> Path:
    """Return where the certificate that we made is kept: `.gost` in $HOME, or in the working directory without one."""
    return Path(os.environ.get("HOME", ""), ".gost")


class Certificates:
    """The certificate of everything that has none of its own, found or made when it is first asked for.

    In this order: the files of the configuration's top-level `tls` block; `cert.pem` and `key.pem` of the working
    directory; the certificate that was saved earlier; a new one, which is saved.
    One such object belongs to one generation of the configuration. `clients` keeps the contexts of clients that are
    configured alike, which share them: the system's authorities take 20 ms to load.
    """

    def __init__(
        self,
        section: schema.TLS | None = None,
        *,
        working: Path | None = None,
        saved: Path | None = None,
        log: Logger | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the files that the block names. Raise ConfigError for them.

        working    the directory of `cert.pem` and `key.pem`, by default the working directory
        saved      the directory of our own certificate, by default `saved_directory()`
        """
        self._section = section or schema.TLS(path="tls")
        self._working = working or Path()
        self._saved = saved
        self._now = now
        self._default: Identity | None = None
        self.log = log or quiet()
        self.clients: dict[object, ssl.SSLContext] = {}
        given = self._section
        if given.cert_file or given.key_file or given.ca_file:
            # GOST: a caFile that cannot be read turns the check of clients off; here it is an error.
            path = given.path or "tls"
            pair = self.checked(read_key_pair(given.cert_file, given.key_file, path))
            self._default = Identity(pair, read_authorities(given.ca_file, path) if given.ca_file else ())

    def default(self) -> Identity:
        """Return the default identity. A certificate that cannot be saved is used all the same, with a warning."""
        if self._default is None:
            found = self._of_working_directory()
            self._default = Identity(found) if found is not None else Identity(self._kept(), own=True)
        return self._default

    def checked(self, pair: KeyPair) -> KeyPair:
        """Return `pair`; warn when it is not valid any more, which clients that verify will notice."""
        try:
            expires = pair.expires()
        except ValueError:
            return pair  # OpenSSL has parsed it, so the handshake will work
        if expires <= self._now():
            self.log.warn(f"the certificate {pair.origin} has expired on {expires:%Y-%m-%d}", file=pair.origin)
        return pair

    def _of_working_directory(self) -> KeyPair | None:
        certificate, key = self._working / "cert.pem", self._working / "key.pem"
        if not (certificate.exists() and key.exists()):
            return None
        try:
            return self.checked(read_key_pair(str(certificate), str(key)))
        except ConfigError as exc:
            # GOST: a pair that cannot be used is passed over.
            self.log.warn(f"cert.pem and key.pem of the working directory are not used: {exc.reason}")
            return None

    def _kept(self) -> KeyPair:
        """Return the saved certificate if it is still valid, else a new one, saved."""
        directory = self._saved or saved_directory()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            self.log.warn(f"the generated certificate cannot be kept in {directory}: {exc.strerror}")
            return self._generated()
        try:
            # Several processes may start at once, and each must end up with the pair that is on disk.
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            return self._saved_pair(directory) or self._save(directory, self._generated())
        finally:
            os.close(fd)

    def _generated(self) -> KeyPair:
        section = self._section
        return generate(section.common_name, section.organization, section.validity, self._now())

    def _saved_pair(self, directory: Path) -> KeyPair | None:
        certificate, key = directory / SAVED_CERTIFICATE, directory / SAVED_KEY
        try:
            pair = read_key_pair(str(certificate), str(key))
            expires = pair.expires()
        except (ConfigError, ValueError):
            return None
        if expires <= self._now():
            self.log.info(f"the saved certificate has expired on {expires:%Y-%m-%d} and is replaced", file=pair.origin)
            return None
        return pair

    def _save(self, directory: Path, pair: KeyPair) -> KeyPair:
        try:
            _write(directory / SAVED_KEY, pair.key, 0o600)
            _write(directory / SAVED_CERTIFICATE, pair.certificate, 0o644)
        except OSError as exc:
            self.log.warn(f"the generated certificate cannot be kept in {directory}: {exc.strerror}")
            return pair
        return KeyPair(pair.certificate, pair.key, str(directory / SAVED_CERTIFICATE))


def _write(file: Path, data: bytes, mode: int) -> None:
    """Replace a file in one step: a reader sees the old content or the new, a crash leaves one of them."""
    fd, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(fd, "wb") as target:
            os.fchmod(fd, mode)
            target.write(data)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


__all__ = ["Certificates", "Identity", "KeyPair", "generate", "read_authorities", "read_key_pair", "saved_directory"]
