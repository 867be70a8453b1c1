"""Parts that several objects have: TLS, credentials, sources, sockets, selectors, matchers, probes."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.options import Seconds
from .section import Section, item


@dataclass(frozen=True, slots=True, kw_only=True)
class TLSOptions(Section):
    """Fine tuning of a TLS side."""

    min_version: str = item("")
    max_version: str = item("")
    cipher_suites: tuple[str, ...] = item(())
    alpn: tuple[str, ...] = item(())


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS(Section):
    """Certificates and verification of a server or client side, and the generated default certificate."""

    cert_file: str = item("")
    key_file: str = item("")
    ca_file: str = item("")
    secure: bool = item(False)
    server_name: str = item("")
    options: TLSOptions | None = item(None)
    validity: Seconds = item(0.0)
    common_name: str = item("")
    organization: str = item("")
    reject_unknown_sni: bool = item(False, name="rejectUnknownSNI")
    server_names: tuple[str, ...] = item(())


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTLS(Section):
    """TLS from a forwarder to its target."""

    server_name: str = item("")
    secure: bool = item(False)
    options: TLSOptions | None = item(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth(Section):
    """A user name and password, or a file that holds them."""

    username: str = item("")
    password: str = item("", secret=True)
    file: str = item("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin(Section):
    """A program that answers in place of an object."""

    type: str = item("", keep=True)
    addr: str = item("", keep=True)
    tls: TLS | None = item(None)
    timeout: Seconds = item(0.0)
    token: str = item("", secret=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLoader(Section):
    """Lines from a file."""

    path_: str = item("", name="path", keep=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisLoader(Section):
    """Entries from a Redis key."""

    addr: str = item("", keep=True)
    db: int = item(0)
    username: str = item("")
    password: str = item("", secret=True)
    key: str = item("")
    type: str = item("")


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPLoader(Section):
    """Lines from a URL."""

    url: str = item("", keep=True)
    timeout: Seconds = item(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SockOpts(Section):
    """Deprecated form of the metadata key so_mark."""

    mark: int = item(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector(Section):
    """How one of several is chosen, and when a failed one is left out."""

    strategy: str = item("", keep=True)
    max_fails: int = item(0, keep=True)
    fail_timeout: Seconds = item(0.0, keep=True)
    max_latency: Seconds = item(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter(Section):
    """Deprecated routing conditions of a node."""

    host: str = item("")
    protocol: str = item("")
    path_: str = item("", name="path")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matcher(Section):
    """A routing rule."""

    rule: str = item("")
    priority: int = item(0)
    body_size: int = item(0, yaml="bodysize")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Section):
    """An active liveness check; `fail_threshold` and `success_threshold` are gostnet's own."""

    type: str = item("", keep=True)
    addr: str = item("", keep="yaml")
    interval: Seconds = item(0.0, keep=True)
    timeout: Seconds = item(0.0, keep=True)
    http_path: str = item("")
    http_host: str = item("")
    http_headers: dict[str, str] = item({})
    expected_status: int = item(0)
    command: str = item("")
    fail_threshold: int = item(0)
    success_threshold: int = item(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class URLRewrite(Section):
    """One substitution in the request path."""

    match: str = item("", json="Match", keep=True)
    replacement: str = item("", json="Replacement", keep=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyRewrite(Section):
    """One substitution in a body."""

    type: str = item("", json="Type", keep=True)
    match: str = item("", json="Match", keep=True)
    replacement: str = item("", json="Replacement", keep=True)
    rewriter: str = item("", ref="rewriters")
    max_chunk_size: int = item(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPNode(Section):
    """What happens to HTTP on its way to a node."""

    host: str = item("")
    header: dict[str, str] = item({})
    request_header: dict[str, str] = item({})
    response_header: dict[str, str] = item({})
    rewrite: tuple[URLRewrite, ...] = item(())
    rewrite_url: tuple[URLRewrite, ...] = item((), name="rewriteURL")
    rewrite_body: tuple[BodyRewrite, ...] = item(())
    rewrite_request_body: tuple[BodyRewrite, ...] = item(())
    rewrite_response_body: tuple[BodyRewrite, ...] = item(())
    fail_codes: str = item("")
    auth: Auth | None = item(None)
