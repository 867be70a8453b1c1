"""What a TLS block of the configuration makes of OpenSSL: options, contexts, and a server's look at a ClientHello."""

from __future__ import annotations

import os
import ssl
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from ..config import schema
from ..core.errors import ConfigError
from ..core.options import Problem
from ..core.suggest import did_you_mean
from .certificates import SECURITY_LEVEL, Certificates, read_authorities, read_key_pair
from .openssl import sessions
from .tls_suites import prefer

VERSIONS: Final = {
    "VersionTLS10": ssl.TLSVersion.TLSv1,
    "VersionTLS11": ssl.TLSVersion.TLSv1_1,
    "VersionTLS12": ssl.TLSVersion.TLSv1_2,
    "VersionTLS13": ssl.TLSVersion.TLSv1_3,
}
_BY_LOWER: Final = {name.lower(): name for name in VERSIONS}

CIPHER_SUITES: Final = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256": "ECDHE-ECDSA-AES128-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256": "ECDHE-RSA-AES128-SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256": "AES128-GCM-SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384": "AES256-GCM-SHA384",
    "TLS_RSA_WITH_AES_128_CBC_SHA": "AES128-SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA": "AES256-SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA256": "AES128-SHA256",
    "TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA": "ECDHE-RSA-DES-CBC3-SHA",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA": "DES-CBC3-SHA",
    "TLS_ECDHE_ECDSA_WITH_RC4_128_SHA": "ECDHE-ECDSA-RC4-SHA",
    "TLS_ECDHE_RSA_WITH_RC4_128_SHA": "ECDHE-RSA-RC4-SHA",
    "TLS_RSA_WITH_RC4_128_SHA": "RC4-SHA",
}
"""Go's names of the suites up to TLS 1.2 and OpenSSL's; the first ten are Go's defaults, in its order."""

_DEFAULT_SUITES: Final = tuple(CIPHER_SUITES)[:10]
_TLS13_SUITES: Final = frozenset(("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"))

_ROOTS: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Where distributions keep the authorities, for a Python whose OpenSSL was built elsewhere."""


# ---- options ----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class TlsOptions:
    """What a TLS block says, with GOST's defaults and without its files' contents.

    minimum, maximum    names such as VersionTLS12; "" for the default: 1.2, and the newest
    suites              Go's names of suites up to TLS 1.2; () for Go's defaults. Those of TLS 1.3 cannot be chosen
    alpn                protocols, the preferred one first; () for none
    """

    cert_file: str = ""
    key_file: str = ""
    ca_file: str = ""
    secure: bool = False
    server_name: str = ""
    minimum: str = ""
    maximum: str = ""
    suites: tuple[str, ...] = ()
    alpn: tuple[str, ...] = ()
    reject_unknown_sni: bool = False
    server_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, section: schema.TLS | schema.NodeTLS | None, path: str = "tls", alpn: Sequence[str] = ()) -> TlsOptions:
        """Take what a block of the configuration says; None is an empty block.

        `alpn` is what the transport offers unless the block says otherwise. Raise ConfigError for an unknown version or
        suite, which GOST ignores, and with it what the user wanted to be safe from.
        """
        if section is None:
            return cls(alpn=tuple(alpn))
        if isinstance(section, schema.NodeTLS):
            made = cls(secure=section.secure, server_name=section.server_name)
        else:
            made = cls(
                cert_file=section.cert_file,
                key_file=section.key_file,
                ca_file=section.ca_file,
                secure=section.secure,
                server_name=section.server_name,
                reject_unknown_sni=section.reject_unknown_sni,
                server_names=section.server_names,
            )
        fine = section.options or schema.TLSOptions()
        where = f"{path}.options"
        for index, name in enumerate(fine.alpn):
            if not 1 <= len(name.encode()) <= 255:
                raise ConfigError(f"{where}.alpn[{index}]", f"{name[:64]!r} is not 1 to 255 bytes long", code="tls")
        suites = [_suite(name, f"{where}.cipherSuites[{index}]") for index, name in enumerate(fine.cipher_suites)]
        made = replace(
            made,
            minimum=_version(fine.min_version, f"{where}.minVersion"),
            maximum=_version(fine.max_version, f"{where}.maxVersion"),
            suites=tuple(name for name in suites if name not in _TLS13_SUITES),
            alpn=fine.alpn or tuple(alpn),
        )
        lowest, highest = made.range()
        if lowest > highest:
            raise ConfigError(
                f"{where}.maxVersion",
                f"{highest} is below the lowest version, {lowest}; set minVersion too",
                code="tls",
            )
        return made

    def range(self) -> tuple[str, str]:
        """Return the names of the lowest and the highest version."""
        return self.minimum or "VersionTLS12", self.maximum or "VersionTLS13"


def _version(word: str, where: str) -> str:
    if not word:
        return ""
    name = _BY_LOWER.get(word.lower())
    if name is None:
        raise ConfigError(where, f"{word[:64]!r} is not one of {', '.join(VERSIONS)}", code="tls")
    return name


def _suite(word: str, where: str) -> str:
    name = word.upper()
    if name not in CIPHER_SUITES and name not in _TLS13_SUITES:
        suggestion = did_you_mean(word, [*CIPHER_SUITES, *_TLS13_SUITES])
        raise ConfigError(where, f"{word[:64]!r} is not the name of a cipher suite{suggestion}", code="tls")
    return name


def block_problems(section: schema.TLS) -> Iterator[Problem]:
    """Yield what is wrong with a TLS block and with the files that it names, which are read for that."""

    def pair() -> None:
        # That one of the two is missing is told by the check of the block itself.
        if section.cert_file and section.key_file:
            read_key_pair(section.cert_file, section.key_file, section.path)

    def authorities() -> None:
        if section.ca_file:
            read_authorities(section.ca_file, section.path)

    for read in (lambda: TlsOptions.of(section, section.path), pair, authorities):
        try:
            read()
        except ConfigError as exc:
            yield Problem(exc.path, exc.reason, exc.code)


# ---- contexts ---------------------------------------------------------------------------------------
def server_context(options: TlsOptions, certificates: Certificates, path: str = "tls") -> ssl.SSLContext:
    """Return the context of an accepting side. Raise ConfigError for certificates that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _tune(context, options, path, SECURITY_LEVEL)
    # As with Go our order counts, but for a client without AES instructions, such as a phone, ChaCha20 comes first.
    # Where the order cannot be chosen the client's counts: gost puts AES-128-GCM first.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    prefer(context, server=True)
    # One goes to who can use it, see tls_tickets; where that cannot be told, as Go does. Each costs an encryption.
    context.num_tickets = 0 if sessions() is not None else 1
    if options.cert_file or options.key_file:
        pair = certificates.checked(read_key_pair(options.cert_file, options.key_file, path))
        clients: tuple[str, ...] = ()
    else:
        identity = certificates.default()
        pair, clients = identity.pair, identity.clients
        if identity.own:
            context.num_tickets = 0  # without `sessions` gostnet resumes nothing of TLS 1.3, and gost never does
    pair.load_into(context)
    if options.ca_file:
        # GOST: without a certFile of its own a listener forgets its caFile, and lets everybody in.
        clients = read_authorities(options.ca_file, path)
    if clients:
        _trust(context, clients)
        context.verify_mode = ssl.CERT_REQUIRED
    if options.reject_unknown_sni or options.alpn:
        context.sslobject_class = JudgedServer
        context.sni_callback = _hello_check(options)
    return context


def client_context(options: TlsOptions, path: str = "tls") -> ssl.SSLContext:
    """Return the context of a connecting side. Raise ConfigError for certificates that cannot be used.

    Without `secure` nothing is verified, or, with a caFile, the chain but not the name.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.hostname_checks_common_name = False
    _tune(context, options, path, 2 if options.secure else SECURITY_LEVEL)
    prefer(context, server=False)
    if options.cert_file or options.key_file:
        read_key_pair(options.cert_file, options.key_file, path).load_into(context)
    if options.ca_file:
        _trust(context, read_authorities(options.ca_file, path))
    elif options.secure:
        _trust_system(context)
    context.verify_mode = ssl.CERT_REQUIRED if options.secure or options.ca_file else ssl.CERT_NONE
    context.check_hostname = options.secure
    return context


def _tune(context: ssl.SSLContext, options: TlsOptions, path: str, level: int) -> None:
    """Set what both sides have in common."""
    context.options |= ssl.OP_NO_RENEGOTIATION
    lowest, highest = options.range()
    old = lowest < "VersionTLS12"
    if old:
        level = 0  # the signatures of TLS 1.0 and 1.1 are SHA-1, below every other level
    with warnings.catch_warnings():
        if old:
            warnings.simplefilter("ignore", DeprecationWarning)  # the user has asked for it
        context.minimum_version = VERSIONS[lowest]
        context.maximum_version = VERSIONS[highest]
    names = options.suites or _DEFAULT_SUITES
    try:
        context.set_ciphers(":".join([*(CIPHER_SUITES[name] for name in names), f"@SECLEVEL={level}"]))
    except ssl.SSLError as exc:
        raise ConfigError(
            f"{path}.options.cipherSuites",
            f"{ssl.OPENSSL_VERSION} has none of {', '.join(names)}",
            code="tls",
        ) from exc
    if options.alpn:
        context.set_alpn_protocols(list(options.alpn))


def _trust(context: ssl.SSLContext, authorities: Sequence[str]) -> None:
    """Accept certificates from these authorities, and, as Go does, each of these certificates itself."""
    context.load_verify_locations(cadata="\n".join(authorities))
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _trust_system(context: ssl.SSLContext) -> None:
    """Accept certificates from the system's authorities (SSL_CERT_FILE and SSL_CERT_DIR replace them)."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile or paths.capath:
        context.load_default_certs()
        return
    for file in _ROOTS:
        if os.path.exists(file):
            context.load_verify_locations(file)
            return


# ---- the server's look at a ClientHello ---------------------------------------------------------------
class JudgedServer(ssl.SSLObject):
    """The server's side of a handshake that is judged by its ClientHello.

    hello    what the client has sent so far; given back by the judgement
    """

    hello: bytearray | None = None


_Judge: TypeAlias = Callable[[ssl.SSLObject, str | None, ssl.SSLContext], int | None]


def _hello_check(options: TlsOptions) -> _Judge:
    """Return the callback that refuses unknown names and foreign protocols, with the alerts that Go sends."""
    names = frozenset(name.lower() for name in options.server_names)
    reject, alpn = options.reject_unknown_sni, options.alpn

    def judge(tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
        if reject and (not name or (names and name.lower() not in names)):
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        if alpn and isinstance(tls, JudgedServer) and tls.hello is not None:
            offered = offered_protocols(bytes(tls.hello))
            tls.hello = None
            # RFC 7301 section 3.2. Go lets clients pass that know HTTP/1.1 only, where it would speak h2 itself.
            if offered and not set(alpn) & set(offered) and not ("h2" in alpn and "http/1.1" in offered):
                return _NO_APPLICATION_PROTOCOL
        return None

    return judge


_NO_APPLICATION_PROTOCOL: Final = 120


def offered_protocols(stream: bytes) -> list[str]:
    """Return the ALPN protocols in the ClientHello with which a TLS connection begins, [] if there are none.

    record: type 22 | version 2 | length 2 | fragment         handshake: type 1 | length 3 | body
    body: version 2 | random 32 | session id 1+n | suites 2+n | compression 1+n | extensions 2+n
    extension: type 2 | length 2 | data; ALPN is type 16: length 2 | (length 1 | name) ... (RFC 8446 section 4.1.2)
    OpenSSL has accepted the same bytes before; whatever is cut short ends the search.
    """
    message = bytearray()
    at = 0
    while stream[at : at + 1] == b"\x16" and at + 5 <= len(stream):
        end = at + 5 + int.from_bytes(stream[at + 3 : at + 5])
        message += stream[at + 5 : end]
        at = end
    size = int.from_bytes(message[1:4])
    body = memoryview(message)[4 : 4 + size]
    at = 34
    for width in (1, 2, 1):
        at += width + int.from_bytes(body[at : at + width])
    at += 2
    while at + 4 <= len(body):
        kind, length = int.from_bytes(body[at : at + 2]), int.from_bytes(body[at + 2 : at + 4])
        if kind == 16:
            return _names(bytes(body[at + 6 : at + 4 + length]))
        at += 4 + length
    return []


def _names(listed: bytes) -> list[str]:
    found = []
    at = 0
    while at < len(listed):
        end = at + 1 + listed[at]
        found.append(listed[at + 1 : end].decode("ascii", "replace"))
        at = end
    return found
