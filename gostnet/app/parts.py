"""What the assembling of a configuration shares: its named objects, how references to them are resolved, TLS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..config import schema
from ..core.contracts import Bypass, Layer, Resolver
from ..core.errors import ConfigError, Unavailable
from ..core.log import Logger
from ..core.options import Problem, bind_options
from ..core.registry import Catalog
from ..core.sockets import DEFAULT_KEEPALIVE, PLAIN, DialOptions, Keepalive
from ..pipeline.direct import Direct
from ..policies.build import Build, Ways, build_admissions, build_bypasses, build_hosts, build_resolvers
from ..policies.bypass import combine
from ..policies.entries import lines, strip_leading_comment
from ..policies.nameserver import HTTP_ALPN
from ..transports.certificates import Certificates
from ..transports.tls import TlsLayer
from .dialing import Trials, dial_options

T = TypeVar("T")


class Parts:
    """The named objects of one configuration that services and nodes refer to alike.

    own_mark    ORed into the mark of every socket of ours, 0 where nothing is captured
    direct      the way out of who has no interface, mark or namespace of its own
    trials      the ways out of the others, to be tried before the start
    """

    def __init__(
        self,
        config: schema.Config,
        catalog: Catalog,
        system: Resolver,
        log: Logger,
        *,
        own_mark: int = 0,
        lenient: bool = False,
    ) -> None:
        self.config = config
        self.log = log
        self.system = system
        self.own_mark = own_mark
        self.lenient = lenient
        self._catalog = catalog
        plain: Sequence[DialOptions] = dial_options("", 0, "", own_mark) if own_mark else (PLAIN,)
        self.direct = Direct(system, plain)
        self.trials = Trials()
        self._certificates = Certificates(config.tls, log=log)
        self.verifying = Lazy(lambda: self.client_tls(schema.TLS(secure=True), "tls"))
        self.verifying_http = Lazy(lambda: self.client_tls(schema.TLS(secure=True), "tls", HTTP_ALPN))
        self.build = Build(
            resolver=system, report=log.warn, options=plain[0], tls=self.verifying, https=self.verifying_http
        )
        self.bypasses = build_bypasses(config, self.build)
        self.admissions = build_admissions(config, self.build)
        self.hosts = build_hosts(config, self.build)
        self.resolvers: Mapping[str, Resolver] = {}

    def make_resolvers(self, way: Ways) -> None:
        """Make the resolvers, whose servers are asked by the ways out that `way` gives."""
        self.resolvers = build_resolvers(self.config, self.build, way)

    def named(self, table: Mapping[str, T], name: str, path: str, what: str) -> T | None:
        """Return the object called `name`, None for "". Raise ConfigError for a name that nothing bears."""
        if not name:
            return None
        found = table.get(name)
        if found is None and not self.lenient:
            raise ConfigError(path, f"there is no {what} {name!r}", code="config.dangling")
        return found

    def all_named(
        self, table: Mapping[str, T], one: str, many: Sequence[str], path: str, keys: tuple[str, str], what: str
    ) -> list[T]:
        """Return the objects that the keys `keys` of the section at `path` name. Raise ConfigError."""
        names = [(one, f"{path}.{keys[0]}")] if one else []
        names += [(name, f"{path}.{keys[1]}[{index}]") for index, name in enumerate(many)]
        found = (self.named(table, name, where, what) for name, where in names)
        return [item for item in found if item is not None]

    def bypass(self, section: schema.Service | schema.Hop | schema.Node | schema.ForwardNode) -> Bypass | None:
        """Return the bypasses that a section names, as one."""
        found = self.all_named(
            self.bypasses, section.bypass, section.bypasses, section.path, ("bypass", "bypasses"), "bypass"
        )
        return combine(found)

    def direct_by(
        self, interface: str, mark: int, netns: str, path: str, keepalive: Keepalive = DEFAULT_KEEPALIVE
    ) -> Direct:
        """Return the way out of the section at `path`, which has these for itself. Raise ConfigError."""
        ways = dial_options(interface, mark, netns, self.own_mark, keepalive, path)
        if interface or mark or netns:
            self.trials.ways[path] = ways
        return Direct(self.system, ways)

    def server_tls(self, section: schema.TLS | None, path: str, alpn: Sequence[str] = ()) -> Layer:
        """Return the server side of TLS. Raise ConfigError."""
        return TlsLayer.for_server(section, self._certificates, path, alpn=alpn)

    def client_tls(
        self, section: schema.TLS | None, path: str, alpn: Sequence[str] = (), handshake_timeout: float = 0.0
    ) -> Layer:
        """Return the client side of TLS. Raise ConfigError."""
        return TlsLayer.for_client(
            section, path, alpn=alpn, handshake_timeout=max(0.0, handshake_timeout), certificates=self._certificates
        )

    def component(self, kind: Any, name: str, path: str) -> Any:
        """Return the class behind a component's name. Raise ConfigError or Unavailable."""
        try:
            return self._catalog.of(kind).get(name, f"{path}.type")
        except Unavailable as exc:
            raise Unavailable(f"{path}.type: {exc}") from exc


class Lazy:
    """A TLS layer that is made when a peer first asks for it: most services never do."""

    def __init__(self, make: Callable[[], Layer]) -> None:
        self._make = make
        self._layer: Layer | None = None

    def _get(self) -> Layer:
        if self._layer is None:
            self._layer = self._make()
        return self._layer

    async def server(self, flow: Any, below: Any) -> Any:
        """Run the server side."""
        return await self._get().server(flow, below)

    async def client(self, flow: Any, below: Any, name: str) -> Any:
        """Run the client side."""
        return await self._get().client(flow, below, name)


def bind(options: type[T], metadata: Mapping[str, Any], path: str) -> T:
    """Return metadata as an options object. Raise ConfigError for the first error."""
    problems: list[Problem] = []
    bound = bind_options(options, metadata, path, set(), problems)
    for problem in problems:
        if problem.severity == "error":
            raise ConfigError(problem.path, problem.message, code=problem.code)
    return bound


def own_credentials(section: schema.Auth | None) -> tuple[str, str]:
    """Return user name and password of a section, those of its file if it names one. Raise ConfigError."""
    if section is None:
        return "", ""
    if not section.file:
        return section.username, section.password
    try:
        data = Path(section.file).read_bytes()
    except OSError as exc:
        raise ConfigError(f"{section.path}.file", f"cannot be read: {exc.strerror}", code="auth.file") from exc
    for entry in lines(data, section.file, strip_leading_comment):
        username, *rest = entry.text.split(None, 1)
        return username, rest[0] if rest else ""
    return section.username, section.password
