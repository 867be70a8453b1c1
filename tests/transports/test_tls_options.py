"""What a TLS block makes of both sides: verification, names, client certificates, protocols, versions, suites."""

from __future__ import annotations

import ssl
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostnet.config import schema
from gostnet.core.errors import ConfigError, ConnError, DialError, GostnetError, ProtocolError
from gostnet.core.flow import Flow
from gostnet.core.tasks import Scope, run
from gostnet.testing import stream_pair
from gostnet.testing.certificates import Authority
from gostnet.transports.certificates import Certificates, Identity, KeyPair, generate
from gostnet.transports.tls import TlsLayer, TlsStream
from gostnet.transports.tls_context import CIPHER_SUITES, TlsOptions, offered_protocols

VERSIONS = pytest.mark.parametrize("version", ["VersionTLS12", "VersionTLS13"])
ALERT_INTERNAL_ERROR = "the peer refuses: internal error"


class Fixed(Certificates):
    """Certificates whose default is made once for all tests: nothing is read or written."""

    def default(self) -> Identity:
        return Identity(_pair())


@cache
def _pair() -> KeyPair:
    return generate("gost.run")


def tls(**options: Any) -> schema.TLS:
    fine = {key: options.pop(key) for key in ("min_version", "max_version", "cipher_suites", "alpn") if key in options}
    return schema.TLS(options=schema.TLSOptions(**fine) if fine else None, **options)


def server(**options: Any) -> TlsLayer:
    return TlsLayer.for_server(tls(**options), Fixed())


def client(**options: Any) -> TlsLayer:
    return TlsLayer.for_client(tls(**options))


async def settled(work: Coroutine[Any, Any, TlsStream]) -> TlsStream | GostnetError:
    try:
        return await work
    except GostnetError as exc:
        return exc


class Outcome:
    """What both sides of a handshake got."""

    def __init__(self, left: TlsStream | GostnetError, right: TlsStream | GostnetError) -> None:
        self.left = left
        self.right = right

    def streams(self) -> tuple[TlsStream, TlsStream]:
        assert isinstance(self.left, TlsStream), self.left
        assert isinstance(self.right, TlsStream), self.right
        return self.left, self.right

    def client_refuses(self, message: str) -> None:
        assert isinstance(self.left, DialError), self.left
        assert message in str(self.left)
        assert isinstance(self.right, ProtocolError), self.right

    def server_refuses(self, message: str, told: str) -> None:
        assert isinstance(self.right, ProtocolError), self.right
        assert message in str(self.right)
        assert isinstance(self.left, DialError), self.left
        assert told in str(self.left)


async def meet(accepting: TlsLayer, dialling: TlsLayer, name: str = "gost.run") -> Outcome:
    near, far = stream_pair()
    accepted = Scope("server").start(settled(accepting.server(Flow(), far)))
    opened = await settled(dialling.client(Flow(), near, name))
    if isinstance(opened, BaseException):
        await near.aclose()
    return Outcome(opened, await accepted)


def met(accepting: TlsLayer, dialling: TlsLayer, name: str = "gost.run") -> Outcome:
    return run(meet(accepting, dialling, name))


class World:
    """An authority and another, a server's and a client's certificate, as files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority()
        self.ca = self._write("ca.crt", self.authority.certificate)
        self.other_ca = self._write("other.crt", Authority("other").certificate)
        self.server = self.files("server", "a.example", "192.0.2.7", "2001:db8::7")
        self.client = self.files("client", "client.example")

    def _write(self, name: str, data: bytes) -> str:
        (self.directory / name).write_bytes(data)
        return str(self.directory / name)

    def files(self, stem: str, *names: str) -> dict[str, str]:
        certificate, key = self.authority.issue(*names).save(self.directory, stem)
        return {"cert_file": str(certificate), "key_file": str(key)}

    def pair(self, stem: str, pair: KeyPair) -> dict[str, str]:
        return {
            "cert_file": self._write(f"{stem}.crt", pair.certificate),
            "key_file": self._write(f"{stem}.key", pair.key),
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# ---- what a client verifies -------------------------------------------------------------------------------
@VERSIONS
def test_client_verifies_nothing_by_default(world: World, version: str) -> None:
    for accepting in (server(max_version=version), server(max_version=version, **world.server)):
        for name in ("gost.run", "b.example", "192.0.2.1", ""):
            left, _ = met(accepting, client(), name).streams()
            assert left.version == version.replace("VersionTLS1", "TLSv1.")


@VERSIONS
def test_secure_client_verifies_chain_and_name(world: World, version: str) -> None:
    accepting = server(max_version=version, **world.server)
    dialling = client(secure=True, ca_file=world.ca)
    for name in ("a.example", "A.Example", "a.example.", "192.0.2.7", "2001:db8::7", "[2001:db8::7]"):
        met(accepting, dialling, name).streams()
    for name in ("b.example", "example", "192.0.2.8", "2001:db8::8"):
        met(accepting, dialling, name).client_refuses("the certificate is not accepted: ")
    met(accepting, client(secure=True, ca_file=world.ca, server_name="a.example"), "b.example").streams()
    met(accepting, client(secure=True, ca_file=world.other_ca), "a.example").client_refuses(
        "unable to get local issuer certificate"
    )


def test_client_with_authorities_only_verifies_the_chain_and_no_name(world: World) -> None:
    accepting = server(**world.server)
    for name in ("a.example", "b.example", "192.0.2.8", ""):
        met(accepting, client(ca_file=world.ca), name).streams()
    met(accepting, client(ca_file=world.other_ca), "a.example").client_refuses("unable to get local issuer")
    met(server(), client(ca_file=world.ca)).client_refuses("self-signed certificate")


def test_failed_verification_is_told_to_the_server(world: World) -> None:
    outcome = met(server(**world.server), client(ca_file=world.other_ca))
    assert str(outcome.right) == "the peer refuses: unknown ca"


def test_certificate_itself_may_be_the_authority(world: World) -> None:
    """A copy of a server's own certificate pins it, whether or not it is one that may sign."""
    met(server(**world.server), client(ca_file=world.server["cert_file"])).streams()
    own = world.pair("own", _pair())
    met(server(), client(ca_file=own["cert_file"], secure=True)).streams()
    met(server(), client(ca_file=own["cert_file"], secure=True), "b.example").client_refuses("Hostname mismatch")


def test_common_name_is_no_name(world: World) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cn.example")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    pair = KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()),
        "",
    )
    files = world.pair("cn", pair)
    met(server(**files), client(ca_file=files["cert_file"])).streams()
    dialling = client(ca_file=files["cert_file"], secure=True)
    met(server(**files), dialling, "cn.example").client_refuses("Hostname mismatch")


def test_expired_certificate_is_refused_where_the_chain_is_verified(world: World) -> None:
    files = world.pair("expired", generate("gost.run", validity=60.0, now=datetime(2020, 1, 1, tzinfo=UTC)))
    met(server(**files), client()).streams()
    for secure in (False, True):
        dialling = client(ca_file=files["cert_file"], secure=secure)
        met(server(**files), dialling).client_refuses("certificate has expired")


@pytest.mark.parametrize("found", [True, False], ids=["OpenSSL's place", "a distribution's place"])
def test_secure_client_without_authorities_trusts_the_system_s(
    world: World, monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    if found:
        monkeypatch.setenv("SSL_CERT_FILE", world.ca)
        monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
    else:
        nothing = ssl.DefaultVerifyPaths(None, None, "", "", "", "")
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nothing)
        monkeypatch.setattr("gostnet.transports.tls_context._ROOTS", ("/nowhere", world.ca))
    dialling = client(secure=True)
    met(server(**world.server), dialling, "a.example").streams()
    met(server(**world.server), dialling, "b.example").client_refuses("Hostname mismatch")
    met(server(), dialling).client_refuses("self-signed certificate")


@pytest.mark.parametrize("name", ["", ".a.example", "a" * 64 + ".example", "a\0b", "fe80::1%eth0%"])
def test_secure_client_refuses_names_that_no_certificate_has(world: World, name: str) -> None:
    near, _ = stream_pair()
    dialling = client(secure=True, ca_file=world.ca)
    with pytest.raises(DialError, match=r"tls handshake with .*(is not a name|not accepted|closed)"):
        run(refused(dialling, near, name))
    if name and name != "fe80::1%eth0%":
        assert near.sent == 0


async def refused(dialling: TlsLayer, near: Any, name: str) -> None:
    near.faults.end_at = 0
    await dialling.client(Flow(), near, name)


# ---- what a client shows ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a.example", "a.example"),
        ("a.example.", "a.example"),
        ("localhost", "localhost"),
        ("under_score.example", "under_score.example"),
        ("192.0.2.1", None),
        ("2001:db8::1", None),
        ("[2001:db8::1]", None),
        ("fe80::1%eth0", None),
        ("", None),
        (".a.example", None),
        ("a" * 64 + ".example", None),
    ],
)
def test_client_shows_host_names_only(name: str, shown: str | None) -> None:
    seen: list[str | None] = []
    accepting = server()
    accepting._context.sni_callback = lambda tls, name, context: seen.append(name)
    met(accepting, client(), name).streams()
    assert seen == [shown]


def test_configured_name_is_shown_instead_of_the_node_s() -> None:
    seen: list[str | None] = []
    accepting = server()
    accepting._context.sni_callback = lambda tls, name, context: seen.append(name)
    met(accepting, client(server_name="cover.example"), "a.example").streams()
    assert seen == ["cover.example"]


# ---- client certificates ------------------------------------------------------------------------------------
@VERSIONS
def test_server_with_authorities_wants_a_client_certificate(world: World, version: str) -> None:
    accepting = server(max_version=version, ca_file=world.ca, **world.server)
    _, right = met(accepting, client(**world.client)).streams()
    certificate = Path(world.client["cert_file"]).read_text()
    assert ssl.DER_cert_to_PEM_cert(right.peer_certificate) == certificate

    async def exchange() -> None:
        left, right = (await meet(accepting, client(**world.client))).streams()
        await left.send(b"hello")
        assert await right.receive() == b"hello"
        await right.send(b"welcome")
        assert await left.receive() == b"welcome"

    run(exchange())


@pytest.mark.parametrize("stranger", [False, True], ids=["none", "of another authority"])
def test_server_refuses_clients_without_a_good_certificate(world: World, stranger: bool) -> None:
    own = world.pair("stranger", generate("client.example")) if stranger else {}
    message = "self-signed certificate" if stranger else "peer did not return a certificate"
    options = {"ca_file": world.ca, **world.server}
    told = "unknown ca" if stranger else "handshake failure"
    met(server(max_version="VersionTLS12", **options), client(**own)).server_refuses(
        message, f"the peer refuses: {told}"
    )

    async def main() -> None:
        # In TLS 1.3 the client is done before the server has seen its certificate.
        outcome = await meet(server(**options), client(**own))
        assert isinstance(outcome.right, ProtocolError)
        assert message in str(outcome.right)
        assert isinstance(outcome.left, TlsStream)
        told = "unknown ca" if stranger else "certificate required"
        with pytest.raises(ConnError, match=f"the peer refuses: {told}"):
            await outcome.left.receive()

    run(main())


def test_authorities_without_a_certificate_of_ones_own_count_too(world: World) -> None:
    """GOST forgets a listener's caFile then, and lets everybody in."""
    accepting = server(ca_file=world.ca, max_version="VersionTLS12")
    met(accepting, client(**world.client)).streams()
    met(accepting, client()).server_refuses("peer did not return a certificate", "handshake failure")


def test_authorities_of_the_global_block_hold_for_listeners_without_a_certificate(world: World) -> None:
    certificates = Certificates(schema.TLS(ca_file=world.ca, **world.server))
    accepting = TlsLayer.for_server(tls(max_version="VersionTLS12"), certificates)
    met(accepting, client(ca_file=world.ca, **world.client)).streams()
    met(accepting, client()).server_refuses("peer did not return a certificate", "handshake failure")
    own = TlsLayer.for_server(tls(**world.server), certificates)
    met(own, client()).streams()


# ---- SNI ------------------------------------------------------------------------------------------------
@VERSIONS
def test_server_may_refuse_clients_that_name_nobody(version: str) -> None:
    accepting = server(reject_unknown_sni=True, max_version=version)
    met(accepting, client(), "any.example").streams()
    for name in ("192.0.2.1", ""):
        met(accepting, client(), name).server_refuses("", ALERT_INTERNAL_ERROR)


@VERSIONS
def test_server_may_refuse_unknown_names(version: str) -> None:
    accepting = server(reject_unknown_sni=True, server_names=("a.example", "B.Example"), max_version=version)
    dialling = client()
    for name in ("a.example", "A.EXAMPLE", "b.example", "b.example"):
        met(accepting, dialling, name).streams()
    for name in ("c.example", "sub.a.example", "192.0.2.1", ""):
        met(accepting, client(), name).server_refuses("", ALERT_INTERNAL_ERROR)


def test_names_without_the_switch_mean_nothing() -> None:
    met(server(server_names=("a.example",)), client(), "b.example").streams()


# ---- ALPN -----------------------------------------------------------------------------------------------
@VERSIONS
@pytest.mark.parametrize(
    ("wanted", "offered", "agreed"),
    [
        ((), (), ""),
        ((), ("h2", "http/1.1"), ""),
        (("h2",), (), ""),
        (("h2", "http/1.1"), ("http/1.1", "h2"), "h2"),
        (("h2", "http/1.1"), ("http/1.1",), "http/1.1"),
        (("h2",), ("http/1.1",), ""),
        (("h2",), ("x", "http/1.1"), ""),
        (("x", "y"), ("z", "y"), "y"),
    ],
)
def test_protocol_is_agreed_on(version: str, wanted: tuple[str, ...], offered: tuple[str, ...], agreed: str) -> None:
    left, right = met(server(alpn=wanted, max_version=version), client(alpn=offered)).streams()
    assert left.alpn == right.alpn == agreed


@VERSIONS
@pytest.mark.parametrize(("wanted", "offered"), [(("h2",), ("x",)), (("x",), ("http/1.1",)), (("x",), ("xy", "y"))])
def test_foreign_protocols_are_refused(version: str, wanted: tuple[str, ...], offered: tuple[str, ...]) -> None:
    met(server(alpn=wanted, max_version=version), client(alpn=offered)).server_refuses(
        "", "the peer refuses: no application protocol"
    )


def test_foreign_protocols_are_refused_in_a_long_hello_that_comes_in_pieces() -> None:
    protocols = tuple(f"{number:0200}" for number in range(60))

    async def main(offered: tuple[str, ...]) -> Outcome:
        near, far = stream_pair(window=100)
        far.faults.piece = 7
        accepted = Scope("server").start(settled(server(alpn=("h2",)).server(Flow(), far)))
        opened = await settled(client(alpn=offered).client(Flow(), near, "a.example"))
        return Outcome(opened, await accepted)

    run(main(protocols)).server_refuses("", "no application protocol")
    left, _ = run(main((*protocols, "h2"))).streams()
    assert left.alpn == "h2"


def test_transport_s_protocols_give_way_to_configured_ones() -> None:
    certificates = Fixed()
    accepting = TlsLayer.for_server(None, certificates, alpn=("h2", "http/1.1"))
    for section, agreed in ((None, "h2"), (tls(), "h2"), (tls(alpn=("http/1.1",)), "http/1.1")):
        left, _ = met(accepting, TlsLayer.for_client(section, alpn=("h2",))).streams()
        assert left.alpn == agreed


@given(st.binary(max_size=400))
def test_search_for_protocols_takes_any_bytes(data: bytes) -> None:
    for stream in (
        data,
        b"\x16\x03\x01" + len(data).to_bytes(2) + data,
        b"\x16\x03\x01\x01\x00\x01\x00\x00\xfc" + data,
    ):
        assert isinstance(offered_protocols(stream), list)


@given(st.lists(st.text("abc/.12", min_size=1, max_size=20), max_size=12), st.integers(0, 400))
def test_protocols_are_found_in_a_real_hello(protocols: list[str], cut: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if protocols:
        context.set_alpn_protocols(protocols)
    outgoing = ssl.MemoryBIO()
    side = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="a.example")
    with pytest.raises(ssl.SSLWantReadError):
        side.do_handshake()
    hello = outgoing.read()
    assert offered_protocols(hello) == protocols
    assert isinstance(offered_protocols(hello[:cut]), list)
    body = hello[5:]
    parts = (body[:cut], body[cut:])
    pieces = b"".join(b"\x16\x03\x01" + len(part).to_bytes(2) + part for part in parts if part)
    assert offered_protocols(pieces) == protocols


# ---- versions and suites --------------------------------------------------------------------------------------
def test_versions_are_1_2_and_1_3_by_default() -> None:
    left, _ = met(server(), client()).streams()
    assert left.version == "TLSv1.3"
    old = client(min_version="VersionTLS10", max_version="VersionTLS11")
    met(server(), old).server_refuses("unsupported protocol", "the peer refuses: protocol version")


@pytest.mark.parametrize("word", ["VersionTLS10", "versiontls11", "VERSIONTLS12", "VersionTLS13"])
def test_versions_can_be_fixed(word: str) -> None:
    left, _ = met(server(min_version=word, max_version=word), client(min_version="VersionTLS10")).streams()
    version = word[-2:]
    assert left.version == {"10": "TLSv1", "11": "TLSv1.1", "12": "TLSv1.2", "13": "TLSv1.3"}[version]


def test_lowest_version_is_kept() -> None:
    met(server(min_version="VersionTLS13"), client(max_version="VersionTLS12")).server_refuses(
        "unsupported protocol", "the peer refuses: protocol version"
    )
    met(server(max_version="VersionTLS12"), client(min_version="VersionTLS13")).server_refuses(
        "unsupported protocol", "the peer refuses: protocol version"
    )


def suite_of(accepting: TlsLayer, dialling: TlsLayer) -> str:
    left, _ = met(accepting, dialling).streams()
    return str(left._tls.cipher()[0])  # type: ignore[index]


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize(
    "name", [name for name in CIPHER_SUITES if "ECDHE_ECDSA" in name and "RC4" not in name and "3DES" not in name]
)
def test_suites_can_be_fixed_by_go_s_names(name: str, side: str) -> None:
    fixed = {"cipher_suites": (name,)}
    accepting = server(max_version="VersionTLS12", **(fixed if side == "server" else {}))
    everything = {"cipher_suites": tuple(CIPHER_SUITES)}
    if side == "server":
        assert suite_of(accepting, client(**everything)) == CIPHER_SUITES[name]
    else:
        accepting = server(max_version="VersionTLS12", **everything)
        assert suite_of(accepting, client(cipher_suites=(name.lower(),))) == CIPHER_SUITES[name]


def test_suites_of_rsa_work_with_its_keys(world: World) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    files = world.pair("rsa", _signed(rsa.generate_private_key(65537, 2048)))
    for name in ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_RSA_WITH_AES_256_CBC_SHA"):
        accepting = server(cipher_suites=(name,), max_version="VersionTLS12", **files)
        assert suite_of(accepting, client(cipher_suites=(name,))) == CIPHER_SUITES[name]
    met(server(max_version="VersionTLS12", **files), client(secure=True, ca_file=files["cert_file"])).streams()


def test_short_keys_are_taken_unless_the_client_verifies(world: World) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    files = world.pair("short", _signed(rsa.generate_private_key(65537, 1024)))
    met(server(**files), client()).streams()
    dialling = client(secure=True, ca_file=files["cert_file"])
    met(server(**files), dialling).client_refuses("EE certificate key too weak")


def _signed(key: Any) -> KeyPair:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gost.run")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("gost.run")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    return KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()),
        "",
    )


def test_client_s_order_of_suites_counts() -> None:
    """As with Go: a client without AES instructions puts ChaCha20 first, gost AES-128."""
    first = "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"
    second = "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"
    for order in ((first, second), (second, first)):
        dialling = client(cipher_suites=order, max_version="VersionTLS12")
        assert suite_of(server(), dialling) == CIPHER_SUITES[order[0]]


def test_suites_of_tls_1_3_cannot_be_chosen() -> None:
    options = TlsOptions.of(tls(cipher_suites=("TLS_CHACHA20_POLY1305_SHA256",)))
    assert options.suites == ()
    left, _ = met(server(cipher_suites=("TLS_CHACHA20_POLY1305_SHA256",)), client()).streams()
    assert left.version == "TLSv1.3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_version": "TLS1.2"}, "minVersion: 'TLS1.2' is not one of VersionTLS10, VersionTLS11"),
        ({"max_version": "1.3"}, "maxVersion: '1.3' is not one of"),
        (
            {"max_version": "VersionTLS11"},
            "maxVersion: VersionTLS11 is below the lowest version, VersionTLS12; set minVersion too",
        ),
        ({"min_version": "VersionTLS13", "max_version": "VersionTLS12"}, "maxVersion: VersionTLS12 is below"),
        (
            {"cipher_suites": ("TLS_RSA_WITH_RC4_128_SHA", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA265")},
            "cipherSuites[1]: 'TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA265' is not the name of a cipher suite;"
            " did you mean 'TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256'?",
        ),
        ({"alpn": ("h2", "")}, "alpn[1]: '' is not 1 to 255 bytes long"),
        ({"alpn": ("x" * 256,)}, "alpn[0]: "),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    for make in (
        lambda section: TlsLayer.for_server(section, Fixed(), "services[0].listener.tls"),
        lambda section: TlsLayer.for_client(section, "services[0].listener.tls"),
    ):
        with pytest.raises(ConfigError) as caught:
            make(tls(**options))
        assert str(caught.value).startswith(f"services[0].listener.tls.options.{message}")


def test_suites_that_this_openssl_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"options\.cipherSuites: OpenSSL .* has none of TLS_RSA_WITH_RC4_128_SHA$"):
        server(cipher_suites=("TLS_RSA_WITH_RC4_128_SHA",))


def test_files_of_a_block_are_checked_when_the_layer_is_made(world: World) -> None:
    path = "services[0].listener.tls"
    for section, message in (
        (tls(cert_file="/nowhere", key_file="/nowhere"), "certFile: cannot read '/nowhere'"),
        (tls(cert_file=world.server["cert_file"]), "keyFile: is missing"),
        (tls(ca_file="/nowhere"), "caFile: cannot read '/nowhere'"),
    ):
        for make in (
            lambda section: TlsLayer.for_server(section, Fixed(), path),
            lambda section: TlsLayer.for_client(section, path),
        ):
            with pytest.raises(ConfigError) as caught:
                make(section)
            assert str(caught.value).startswith(f"{path}.{message}")


# ---- sessions, contexts, generations ------------------------------------------------------------------------------
def test_sessions_are_resumed() -> None:
    for version in ("VersionTLS12", "VersionTLS13"):
        accepting, dialling = server(max_version=version), client()

        async def talk(accepting: TlsLayer = accepting, dialling: TlsLayer = dialling) -> bool:
            left, right = (await meet(accepting, dialling)).streams()
            await right.send(b"hello")
            assert await left.receive() == b"hello"
            assert left.resumed == right.resumed
            return left.resumed

        assert [run(talk()) for _ in range(3)] == [False, True, True]


def test_sessions_of_another_name_are_not_resumed() -> None:
    accepting, dialling = server(max_version="VersionTLS12"), client()
    assert not met(accepting, dialling, "a.example").streams()[0].resumed
    assert not met(accepting, dialling, "b.example").streams()[0].resumed
    assert met(accepting, dialling, "a.example").streams()[0].resumed


def test_session_that_the_server_has_forgotten_does_no_harm() -> None:
    dialling = client()
    for _ in range(3):
        assert not met(server(max_version="VersionTLS12"), dialling).streams()[0].resumed


def test_sessions_are_kept_for_so_many_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TlsLayer, "SESSIONS", 2)
    accepting, dialling = server(max_version="VersionTLS12"), client()
    for name in ("a.example", "b.example", "c.example"):
        met(accepting, dialling, name)
    assert list(dialling._sessions) == ["b.example", "c.example"]


def test_clients_that_are_configured_alike_share_a_context(world: World) -> None:
    certificates = Fixed()
    sections = [tls(ca_file=world.ca, server_name="a.example"), tls(ca_file=world.ca), tls(), None]
    layers = [TlsLayer.for_client(section, certificates=certificates) for section in sections]
    contexts = [layer._context for layer in layers]
    assert contexts[0] is contexts[1]
    assert contexts[2] is contexts[3]
    assert contexts[0] is not contexts[2]
    met(server(**world.server), layers[0], "b.example").streams()


def test_forwarder_s_block_has_no_files() -> None:
    section = schema.NodeTLS(server_name="b.example", secure=True, options=schema.TLSOptions(alpn=("h2",)))
    options = TlsOptions.of(section)
    assert options == TlsOptions(server_name="b.example", secure=True, alpn=("h2",))


def test_files_of_a_new_generation_are_read_again(tmp_path: Path) -> None:
    """A reload makes new layers; what the files hold by then is what their clients see."""
    section = tls(cert_file=str(tmp_path / "c"), key_file=str(tmp_path / "k"))
    layers = []
    pairs = [generate("first.example"), generate("second.example")]
    for pair in pairs:
        (tmp_path / "c").write_bytes(pair.certificate)
        (tmp_path / "k").write_bytes(pair.key)
        layers.append(TlsLayer.for_server(section, Fixed()))
    for layer, pair in zip(layers, pairs, strict=True):
        left, _ = met(layer, client()).streams()
        assert ssl.DER_cert_to_PEM_cert(left.peer_certificate).encode() == pair.certificate
