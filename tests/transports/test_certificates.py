"""Certificates: what files may hold, what is said of those that cannot be used, and the one that is made and kept."""

from __future__ import annotations

import os
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gostnet.config import schema
from gostnet.core.errors import ConfigError
from gostnet.core.log import DEBUG, Logger, NullSink
from gostnet.testing.certificates import Authority
from gostnet.transports import certificates
from gostnet.transports.certificates import (
    Certificates,
    KeyPair,
    generate,
    read_authorities,
    read_key_pair,
    saved_directory,
)

NOW = datetime(2030, 6, 1, 12, 0, 0, tzinfo=UTC)


class Lines(NullSink):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def write(self, line: bytes) -> None:
        self.lines.append(line.decode())


def logger() -> tuple[Logger, list[str]]:
    sink = Lines()
    return Logger(sink, DEBUG), sink.lines


def parsed(pair: KeyPair) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pair.certificate)


def at(tmp_path: Path, **options: object) -> Certificates:
    """Return certificates that look into two directories of the test's own."""
    (tmp_path / "working").mkdir(exist_ok=True)
    options.setdefault("working", tmp_path / "working")
    options.setdefault("saved", tmp_path / "home" / ".gost")
    return Certificates(None, **options)  # type: ignore[arg-type]


# ---- the one that is made ------------------------------------------------------------------------------
def test_generated_certificate_is_as_gosts() -> None:
    pair = generate(now=NOW)
    certificate = parsed(pair)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert certificate.subject == certificate.issuer
    assert [(item.oid, item.value) for item in certificate.subject] == [
        (NameOID.ORGANIZATION_NAME, "GOST"),
        (NameOID.COMMON_NAME, "gost.run"),
    ]
    assert certificate.serial_number.bit_length() <= 128
    assert certificate.not_valid_before_utc == NOW
    assert certificate.not_valid_after_utc == NOW + timedelta(days=365)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert usage.value.key_cert_sign
    assert not usage.value.crl_sign
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert list(purposes.value) == [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["gost.run"]
    assert certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    assert certificate.signature_hash_algorithm is not None
    assert certificate.signature_hash_algorithm.name == "sha256"
    assert pair.key.startswith(b"-----BEGIN PRIVATE KEY-----")
    certificate.verify_directly_issued_by(certificate)


def test_generated_certificate_takes_the_configured_words() -> None:
    certificate = parsed(generate("proxy.example", "Example", 3600.0, NOW))
    assert certificate.subject.rfc4514_string() == "CN=proxy.example,O=Example"
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(hours=1)


def test_global_block_names_what_is_generated(tmp_path: Path) -> None:
    section = schema.TLS(common_name="a.example", organization="A", validity=86400.0)
    made = Certificates(section, working=tmp_path, saved=tmp_path, now=lambda: NOW)
    certificate = parsed(made.default().pair)
    assert certificate.subject.rfc4514_string() == "CN=a.example,O=A"
    assert certificate.not_valid_after_utc == NOW + timedelta(days=1)


# ---- where the default is found -------------------------------------------------------------------------
def test_default_is_generated_once_and_kept(tmp_path: Path) -> None:
    first = at(tmp_path)
    assert not (tmp_path / "home").exists(), "nothing is written before somebody asks"
    pair = first.default().pair
    assert first.default().pair is pair
    directory = tmp_path / "home" / ".gost"
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}
    assert modes == {"auto-ca-cert.pem": 0o644, "auto-ca-key.pem": 0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert at(tmp_path).default().pair.certificate == pair.certificate
    assert pair.origin == str(directory / "auto-ca-cert.pem")


def test_pair_of_the_working_directory_comes_first(tmp_path: Path) -> None:
    kept = at(tmp_path).default().pair
    own = generate("own.example")
    (tmp_path / "working" / "cert.pem").write_bytes(own.certificate)
    (tmp_path / "working" / "key.pem").write_bytes(own.key)
    found = at(tmp_path).default().pair
    assert found.certificate == own.certificate
    (tmp_path / "working" / "key.pem").unlink()
    assert at(tmp_path).default().pair.certificate == kept.certificate


def test_broken_pair_of_the_working_directory_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    log, lines = logger()
    made = at(tmp_path, log=log)
    (tmp_path / "working" / "cert.pem").write_bytes(generate("a.example").certificate)
    (tmp_path / "working" / "key.pem").write_bytes(generate("b.example").key)
    assert parsed(made.default().pair).subject.rfc4514_string() == "CN=gost.run,O=GOST"
    assert "does not belong to the certificate" in lines[0]


def test_working_directory_and_home_are_the_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "root"))
    assert saved_directory() == tmp_path / "root" / ".gost"
    Certificates().default()
    assert (tmp_path / "root" / ".gost" / "auto-ca-key.pem").exists()
    own = generate("own.example")
    Path("cert.pem").write_bytes(own.certificate)
    Path("key.pem").write_bytes(own.key)
    assert Certificates().default().pair.certificate == own.certificate
    monkeypatch.delenv("HOME")
    assert saved_directory() == Path(".gost")


def test_expired_saved_certificate_is_replaced(tmp_path: Path) -> None:
    old = at(tmp_path, now=lambda: NOW).default().pair
    last_day = at(tmp_path, now=lambda: NOW + timedelta(days=364))
    assert last_day.default().pair.certificate == old.certificate
    log, lines = logger()
    fresh = at(tmp_path, now=lambda: NOW + timedelta(days=365), log=log).default().pair
    assert fresh.certificate != old.certificate
    assert parsed(fresh).not_valid_after_utc == NOW + timedelta(days=730)
    assert (tmp_path / "home" / ".gost" / "auto-ca-cert.pem").read_bytes() == fresh.certificate
    assert "expired" in lines[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda certificate, key: certificate.write_bytes(b""),
        lambda certificate, key: key.unlink(),
        lambda certificate, key: key.write_bytes(generate().key),
        lambda certificate, key: certificate.write_bytes(
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        ),
    ],
    ids=["empty certificate", "no key", "foreign key", "garbage"],
)
def test_damaged_saved_certificate_is_replaced(tmp_path: Path, damage: object) -> None:
    old = at(tmp_path).default().pair
    directory = tmp_path / "home" / ".gost"
    damage(directory / "auto-ca-cert.pem", directory / "auto-ca-key.pem")  # type: ignore[operator]
    fresh = at(tmp_path).default().pair
    assert fresh.certificate != old.certificate
    again = at(tmp_path).default().pair
    assert again.certificate == fresh.certificate


def test_certificate_that_cannot_be_saved_is_used_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log, lines = logger()
    made = at(tmp_path, saved=tmp_path / "file" / ".gost", log=log)
    made.default().pair.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    assert '"level":"warn"' in lines[0]
    assert "Not a directory" in lines[0]


def test_certificate_that_cannot_be_written_is_used_with_a_warning(tmp_path: Path) -> None:
    directory = tmp_path / "home" / ".gost"
    (directory / "auto-ca-key.pem").mkdir(parents=True)
    log, lines = logger()
    assert at(tmp_path, log=log).default().pair.origin == "generated at start"
    assert "cannot be kept" in lines[0]
    assert sorted(os.listdir(directory)) == ["auto-ca-key.pem"], "no temporary file is left"


def test_processes_that_start_together_get_one_certificate(tmp_path: Path) -> None:
    found: list[bytes] = []
    begin = threading.Barrier(4)

    def work() -> None:
        made = at(tmp_path)
        begin.wait()
        found.append(made.default().pair.certificate)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


# ---- files of the configuration -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def test_global_files_are_read_at_once(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue("a.example").save(tmp_path)
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    section = schema.TLS(cert_file=str(certificate), key_file=str(key), ca_file=str(tmp_path / "ca.crt"), path="tls")
    identity = Certificates(section).default()
    assert identity.pair.certificate == certificate.read_bytes()
    assert [text.strip() for text in identity.clients] == [authority.certificate.decode().strip()]
    with pytest.raises(ConfigError, match=r"^tls\.caFile: cannot read '/nowhere': No such file"):
        Certificates(schema.TLS(cert_file=str(certificate), key_file=str(key), ca_file="/nowhere"))
    with pytest.raises(ConfigError, match=r"^tls\.certFile: is missing"):
        Certificates(schema.TLS(ca_file=str(tmp_path / "ca.crt")))


def test_expired_certificate_of_the_configuration_is_used_with_a_warning(tmp_path: Path) -> None:
    pair = generate("old.example", validity=60.0, now=NOW)
    (tmp_path / "c").write_bytes(pair.certificate)
    (tmp_path / "k").write_bytes(pair.key)
    log, lines = logger()
    section = schema.TLS(cert_file=str(tmp_path / "c"), key_file=str(tmp_path / "k"))
    Certificates(section, log=log, now=lambda: NOW)
    assert not lines
    Certificates(section, log=log, now=lambda: NOW + timedelta(minutes=1))
    assert "has expired on 2030-06-01" in lines[0]


def test_key_may_be_in_the_file_of_the_certificate(tmp_path: Path, authority: Authority) -> None:
    identity = authority.issue("a.example")
    both = tmp_path / "both.pem"
    both.write_bytes(b"# a comment in \xe4\xf6\xfc\n" + identity.key + identity.certificate + authority.certificate)
    pair = read_key_pair(str(both), str(both))
    assert parsed(pair).subject.rfc4514_string() == "CN=a.example"
    assert pair.certificate.count(b"BEGIN CERTIFICATE") == 2, "the chain is kept"


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("kind", ["ec", "rsa 2048", "rsa 1024"])
def test_keys_of_every_usual_form_are_taken(tmp_path: Path, form: serialization.PrivateFormat, kind: str) -> None:
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    if kind == "ec":
        key = ec.generate_private_key(ec.SECP384R1())
    else:
        key = rsa.generate_private_key(65537, int(kind.split()[1]))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a.example")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "c").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "k").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    assert read_key_pair(str(tmp_path / "c"), str(tmp_path / "k")).origin == str(tmp_path / "c")


def der(pair: KeyPair) -> bytes:
    return parsed(pair).public_bytes(serialization.Encoding.DER)


def encrypted(pair: KeyPair, form: serialization.PrivateFormat) -> bytes:
    key = serialization.load_pem_private_key(pair.key, None)
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"secret"))


PAIR = generate("a.example")
PKCS8, TRADITIONAL = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL
BROKEN = b"-----BEGIN %s-----\nMIIB\n-----END %s-----\n"
BROKEN_CERTIFICATE = BROKEN % (b"CERTIFICATE", b"CERTIFICATE")
BROKEN_KEY = BROKEN % (b"PRIVATE KEY", b"PRIVATE KEY")


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        (None, PAIR.key, "certFile: cannot read 'c': No such file or directory"),
        (PAIR.certificate, None, "keyFile: cannot read 'k': No such file or directory"),
        (b" \n", PAIR.key, "certFile: 'c' is empty"),
        (PAIR.certificate, b"", "keyFile: 'k' is empty"),
        (b"hello", PAIR.key, "certFile: 'c' holds no PEM certificate"),
        (der(PAIR), PAIR.key, "certFile: 'c' holds no PEM certificate, it looks like DER; PEM is needed"),
        (PAIR.key, PAIR.key, "certFile: 'c' holds a private key, not a certificate"),
        (PAIR.certificate, PAIR.certificate, "keyFile: 'k' holds a certificate, not a private key"),
        (BROKEN_CERTIFICATE, PAIR.key, "certFile: the first certificate in 'c' cannot be parsed"),
        (PAIR.certificate, BROKEN_KEY, "keyFile: the private key in 'k' cannot be parsed"),
        (
            PAIR.certificate,
            generate().key,
            "keyFile: the key in 'k' does not belong to the certificate in 'c'",
        ),
        (PAIR.certificate, encrypted(PAIR, PKCS8), "keyFile: the private key in 'k' is encrypted"),
        (PAIR.certificate, encrypted(PAIR, TRADITIONAL), "keyFile: the private key in 'k' is encrypted"),
    ],
)
def test_files_that_cannot_be_used_are_named_with_their_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificate: bytes | None, key: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("c", certificate), ("k", key)):
        if data is not None:
            Path(name).write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_key_pair("c", "k", "services[0].listener.tls")
    assert str(caught.value).startswith(f"services[0].listener.tls.{message}")
    assert "secret" not in str(caught.value)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tls\.keyFile: is missing, and certFile 'c' is given$"):
        read_key_pair("c", "")
    with pytest.raises(ConfigError, match=r"^tls\.certFile: is missing, and keyFile 'k' is given$"):
        read_key_pair("", "k")


def test_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the name of a file"):
        read_key_pair("a\0b", "k")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_key_pair(str(tmp_path), "k")


def test_endless_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "LARGEST", 1 << 20)
    with pytest.raises(ConfigError, match="is larger than 1 MiB"):
        read_key_pair("/dev/zero", "k")


def test_authorities_that_can_be_parsed_are_taken(tmp_path: Path, authority: Authority) -> None:
    file = tmp_path / "ca.pem"
    file.write_bytes(b"caf\xc3\xa9\n" + authority.certificate + BROKEN_CERTIFICATE + Authority("other").certificate)
    found = read_authorities(str(file))
    assert len(found) == 2
    assert found[0].strip() == authority.certificate.decode().strip()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "'ca' is empty"),
        (PAIR.key, "'ca' holds a private key, not a certificate"),
        (BROKEN_CERTIFICATE * 2, "no certificate in 'ca' can be parsed"),
        (None, "cannot read 'ca': No such file or directory"),
    ],
)
def test_authorities_that_cannot_be_used_are_named_with_their_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path("ca").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_authorities("ca", "nodes[1].tls")
    assert str(caught.value) == f"nodes[1].tls.caFile: {message}"


# ---- secrets and descriptors ------------------------------------------------------------------------------
def test_pair_shows_no_key() -> None:
    assert repr(PAIR) == "KeyPair(origin='generated at start')"


@pytest.mark.parametrize("proc", [True, False], ids=["memory", "temporary file"])
def test_loading_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proc: bool) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not proc:
        monkeypatch.setattr(certificates.os.path, "exists", lambda name: False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    before = os.listdir("/proc/self/fd")
    PAIR.load_into(context)
    with pytest.raises(ssl.SSLError):
        KeyPair(PAIR.certificate, encrypted(PAIR, PKCS8), "").load_into(context)
    assert os.listdir("/proc/self/fd") == before
    assert not list(tmp_path.iterdir())
