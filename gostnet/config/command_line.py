"""Services and nodes from the command line: the trees that `-L`, `-F`, `-api` and `-metrics` stand for.

They look like those of a file, and their places are columns in the arguments. What GOST takes silently and wrongly (a
misspelt scheme, a bad port) gives the same tree here, and an error beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from ..core.options import Severity, Unusable, to_bool, to_float, to_int, to_seconds
from ..core.registry import GOST_NAMES, Kind
from ..core.suggest import did_you_mean
from ..core.units import format_nanoseconds
from .decode import plain_decimal
from .finding import Finding
from .names import PATH_SCHEMES, is_known
from .tree import Entry, List, Map, Place, Scalar, Source, Tree
from .url import Url, UrlError, decode_base64, decode_pair, expand_ports, hostname, split


@dataclass(frozen=True, slots=True)
class _Argument:
    """Places in one argument."""

    source: Source

    def at(self, column: int) -> Place:
        return Place(self.source, 0, column)

    def scalar(self, value: str | int | float | bool, column: int) -> Scalar:
        return Scalar(value, self.at(column))

    def list(self, items: Iterable[Tree], column: int) -> List:
        return List(list(items), self.at(column))

    def map(self, column: int, entries: Mapping[str, Tree | None]) -> Map:
        """Return a map of those entries that are there."""
        place = self.at(column)
        return Map([Entry(key, value.place, value) for key, value in entries.items() if value is not None], place)


@dataclass(slots=True)
class _Values:
    """What is left of a query: key -> (value, column). Look-ups ignore case, removals do not, as in GOST."""

    values: dict[str, tuple[Any, int]]

    def find(self, *keys: str) -> tuple[str, int]:
        """Return the text and column of the first of `keys` that exists, ("", 0) if none does."""
        lower = {key.lower(): value for key, value in self.values.items()}
        for key in keys:
            if key.lower() in lower:
                value, column = lower[key.lower()]
                return (value if isinstance(value, str) else str(value)), column
        return "", 0

    def number(self, key: str) -> tuple[int, int]:
        """Return the integer of `key`, 0 if it is absent or none."""
        text, column = self.find(key)
        try:
            return to_int(text), column
        except Unusable:
            return 0, column

    def drop(self, *keys: str) -> None:
        for key in keys:
            self.values.pop(key, None)

    def rename(self, key: str, new: str, value: Any) -> None:
        """Move a key, as it is spelt here, to `new`."""
        column = self.find(key)[1]
        self.values.pop(key, None)
        self.values[new] = (value, column)


_Target: TypeAlias = tuple[str, int]
"""An address and its column."""


@dataclass(frozen=True, slots=True)
class _NodeParts:
    """What of a node's URL is not metadata; `tls` holds text and column of each key."""

    connector: str
    dialer: str
    auth: Map | None
    tls: dict[str, tuple[str, int]]
    secure: bool
    path_like: bool


_COUNTERPART: Final[Mapping[Kind, Kind]] = {
    "handler": "listener",
    "listener": "handler",
    "connector": "dialer",
    "dialer": "connector",
}
_NOT_IN_QUERY: Final = frozenset(("addr", "auth", "auther", "path", "pathprefix", "accesslog"))
_CERT: Final = ("tls.certFile", "certFile", "cert")
_KEY: Final = ("tls.keyFile", "keyFile", "key")
_CA: Final = ("tls.caFile", "caFile", "ca")
_SELECTOR: Final = ("strategy", "maxFails", "max_fails", "failTimeout", "fail_timeout")


@dataclass(slots=True)
class CommandLine:
    """Builds the tree of all -L and -F; `findings` collects what is wrong with them."""

    prefix: str = ""
    """Of the names of forward targets: `go-N@` in worker N."""
    findings: list[Finding] = field(default_factory=list)
    _lists: dict[str, list[Tree]] = field(default_factory=dict)
    _services: int = 0

    def build(self, services: Iterable[str], nodes: Iterable[str]) -> Map:
        """Return the configuration that the arguments spell."""
        hops = [self._hop(text, number) for number, text in enumerate(nodes, 1)]
        chain = ""
        if hops:
            chain = "chain-0"
            first = _Argument(Source("-F#1", "url"))
            built = [hop for hop in hops if hop is not None]
            self._append("chains", first.map(1, {"name": first.scalar(chain, 1), "hops": first.list(built, 1)}))
        for number, text in enumerate(services, 1):
            if text.strip():
                self._listen(text, number, chain)
        place = Place(Source("command line", "url"))
        return Map([Entry(key, place, List(items, place)) for key, items in self._lists.items()], place)

    def _append(self, key: str, tree: Tree) -> None:
        self._lists.setdefault(key, []).append(tree)

    def _split(self, text: str, argument: _Argument, *, free_host: bool) -> Url | None:
        try:
            url = split(text, free_host=free_host)
        except UrlError as exc:
            self.findings.append(Finding(argument.at(exc.column), exc.part, exc.reason, exc.code, fatal=True))
            return None
        for column, part, message, code in url.complaints:
            self._complain(argument, column, part, message, code)
        return url

    def _complain(
        self, argument: _Argument, column: int, part: str, message: str, code: str, severity: Severity = "error"
    ) -> None:
        self.findings.append(Finding(argument.at(column), part, message, code, severity))

    # ---- what -L and -F have in common ----
    def _component(self, argument: _Argument, url: Url, name: str, kind: Kind, fallback: str) -> str:
        """Return `name`, or what GOST silently puts in place of a name it does not know, with an error.

        A scheme of one word names both components; one of them may be missing, as the handler of `tls://` is.
        """
        if is_known(kind, name):
            return name
        known = GOST_NAMES[kind]
        if len(url.parts) == 1:
            known = GOST_NAMES[kind] | GOST_NAMES[_COUNTERPART[kind]] | {"auto", "https"}
            if name in known or kind in ("listener", "dialer"):
                return fallback
        if len(url.parts) <= 2:
            what = "scheme" if len(url.parts) == 1 else kind
            message = f"{name!r} is not a {what}{did_you_mean(name, known)}; GOST would silently take {fallback!r}"
            self._complain(argument, url.columns["scheme"], "scheme", message, "url.scheme")
        return fallback

    def _words(self, argument: _Argument, url: Url) -> tuple[str, str]:
        parts = url.parts
        if len(parts) == 1:
            return parts[0], parts[0]
        if len(parts) == 2:
            return parts[0], parts[1]
        message = f"{url.scheme!r} has more than two parts; GOST would ignore all of them"
        self._complain(argument, url.columns["scheme"], "scheme", message, "url.scheme")
        return "", ""

    def _auth(self, argument: _Argument, url: Url, values: _Values) -> Map | None:
        """Return the credentials: user information, else the key `auth`, which is base64 of user:password."""
        encoded, column = values.find("auth")
        values.drop("auth")
        if url.username is not None:
            column = url.columns["user"]
            username, password = url.username, url.password or ""
            if url.scheme.startswith("ss") and url.password is None:
                # The form of Shadowsocks links (SIP002): base64 of method:password in place of the user.
                username, password = decode_pair(username) or (username, "")
        elif encoded:
            decoded = decode_base64(encoded)
            if decoded is None:
                message = "the value is not base64 of USER:PASSWORD"
                self.findings.append(Finding(argument.at(column), "query.auth", message, "url.auth", fatal=True))
                return None
            username, _, password = decoded.partition(":")
        else:
            return None
        return argument.map(
            column,
            {
                "username": argument.scalar(username, column) if username else None,
                "password": argument.scalar(password, column) if password else None,
            },
        )

    def _selector(self, argument: _Argument, values: _Values) -> Map | None:
        strategy, column = values.find("strategy")
        fails_text, fails_column = values.find("maxFails", "max_fails")
        timeout_text, timeout_column = values.find("failTimeout", "fail_timeout")
        fails = self._checked(argument, "maxFails", fails_text, fails_column, to_int)
        timeout = self._checked(argument, "failTimeout", timeout_text, timeout_column, to_seconds)
        if not strategy and fails <= 0 and timeout <= 0:
            return None
        values.drop(*_SELECTOR)
        column = max(column, fails_column, timeout_column)
        nanoseconds = round((timeout if timeout > 0 else 30.0) * 1e9)
        return argument.map(
            column,
            {
                "strategy": argument.scalar(strategy or "round", column),
                "maxFails": argument.scalar(int(fails) if fails > 0 else 1, fails_column or column),
                "failTimeout": argument.scalar(format_nanoseconds(nanoseconds), timeout_column or column),
            },
        )

    def _checked(self, argument: _Argument, key: str, text: str, column: int, parse: Any) -> float:
        """Return the number in `text`, 0 and an error if it is none, 0 if it is empty."""
        if not text:
            return 0
        try:
            return float(parse(text))
        except Unusable as exc:
            self._complain(argument, column, f"query.{key}", f"{text[:64]!r} is not {exc}", "url.value")
            return 0

    def _patterns(self, argument: _Argument, values: _Values, key: str, where: str) -> str:
        """Make an admission or bypass of a comma-separated value; return its name, "" if there is none."""
        text, column = values.find(key)
        if not text:
            return ""
        values.drop(key)
        whitelist = text.startswith("~")
        items = [argument.scalar(each, column) for each in text.removeprefix("~").split(",") if each]
        name = f"{key}-{len(self._lists.get(where, []))}"
        entries: dict[str, Tree | None] = {
            "name": argument.scalar(name, column),
            "whitelist": argument.scalar(True, column) if whitelist else None,
            "matchers": argument.list(items, column),
        }
        self._append(where, argument.map(column, entries))
        return name

    def _resolver(self, argument: _Argument, values: _Values, prefer: str) -> str:
        text, column = values.find("resolver")
        if not text:
            return ""
        values.drop("resolver")
        name = f"resolver-{len(self._lists.get('resolvers', []))}"
        servers = [
            argument.map(
                column,
                {
                    "addr": argument.scalar(each, column),
                    "prefer": argument.scalar(prefer, column) if prefer else None,
                },
            )
            for each in text.split(",")
            if each
        ]
        entries: dict[str, Tree | None] = {
            "name": argument.scalar(name, column),
            "nameservers": argument.list(servers, column),
        }
        self._append("resolvers", argument.map(column, entries))
        return name

    def _hosts(self, argument: _Argument, values: _Values) -> str:
        text, column = values.find("hosts")
        if not text:
            return ""
        values.drop("hosts")
        name = f"hosts-{len(self._lists.get('hosts', []))}"
        mappings = []
        for each in text.split(","):
            host, colon, ip = each.partition(":")
            if not colon:
                if each:
                    message = f"{each[:64]!r} is not NAME:ADDRESS and would be ignored"
                    self._complain(argument, column, "query.hosts", message, "url.value")
                continue
            mapping = {"ip": argument.scalar(ip, column), "hostname": argument.scalar(host, column)}
            mappings.append(argument.map(column, mapping))
        table: dict[str, Tree | None] = {
            "name": argument.scalar(name, column),
            "mappings": argument.list(mappings, column),
        }
        self._append("hosts", argument.map(column, table))
        return name

    # ---- -F ----
    def _hop(self, text: str, number: int) -> Map | None:
        argument = _Argument(Source(f"-F#{number}", "url"))
        if not text.strip():
            self.findings.append(Finding(argument.at(0), "url", "is empty", "url.syntax", fatal=True))
            return None
        url = self._split(text, argument, free_host=False)
        if url is None:
            return None
        values = _Values({pair.key: (pair.value, pair.column) for pair in url.query().values()})
        column = url.columns["host"]
        bypass = self._patterns(argument, values, "bypass", "bypasses")
        resolver = self._resolver(argument, values, "")
        hosts = self._hosts(argument, values)
        selector = self._selector(argument, values)
        interface = values.find("interface")[0]
        if interface:
            values.rename("interface", "hop.interface", interface)
        for key in ("so_mark", "proxyProtocol"):
            count = values.number(key)[0]
            if count > 0:
                values.rename(key, f"hop.{key}", count)
        parts = self._node_parts(argument, url, values)
        hop_metadata = self._metadata(argument, values, "hop.", ("node.", "connector.", "dialer."))
        for key in [key for key in values.values if key.startswith("hop.")]:
            values.drop(key)
        nodes = self._nodes(argument, url, values, parts)
        entries: dict[str, Tree | None] = {
            "name": argument.scalar(f"hop-{number - 1}", 1),
            "selector": selector,
            "bypass": argument.scalar(bypass, column) if bypass else None,
            "resolver": argument.scalar(resolver, column) if resolver else None,
            "hosts": argument.scalar(hosts, column) if hosts else None,
            "nodes": argument.list(nodes, column),
            "metadata": hop_metadata,
        }
        return argument.map(1, entries)

    def _node_parts(self, argument: _Argument, url: Url, values: _Values) -> _NodeParts:
        """Take what is not metadata from the values of a node: names, credentials, TLS."""
        connector, dialer = self._words(argument, url)
        path_like = bool(PATH_SCHEMES.intersection(url.parts))
        connector = self._component(argument, url, connector, "connector", "http")
        dialer = self._component(argument, url, dialer, "dialer", "udp" if connector == "ssu" else "tcp")
        auth = self._auth(argument, url, values)
        found = {
            "certFile": values.find(*_CERT),
            "keyFile": values.find(*_KEY),
            "caFile": values.find(*_CA),
            "secure": values.find("tls.secure", "secure"),
            "serverName": values.find("tls.servername", "servername"),
        }
        values.drop(*_CERT, *_KEY, *_CA, "tls.secure", "secure", "tls.servername", "serverName")
        if found["secure"][0]:
            try:
                secure = to_bool(found["secure"][0])
            except Unusable as exc:
                text, column = found["secure"]
                self._complain(argument, column, "query.secure", f"{text[:64]!r} is not {exc}", "url.value")
                secure = False
        else:
            secure = False
        return _NodeParts(connector, dialer, auth, found, secure, path_like)

    def _nodes(self, argument: _Argument, url: Url, values: _Values, parts: _NodeParts) -> list[Map]:
        column = url.columns["host"]
        if url.host or not parts.path_like:
            hosts = [each for each in url.host.split(",") if each]
        else:
            hosts = [url.path] if url.path else []
        if not hosts:
            message = "names no host, so the chain would have no node here; write direct://:0 to go without a proxy"
            self._complain(argument, column, "host", message, "url.host")
        if url.host and url.path.strip("/"):
            message = f"the path {url.path[:64]!r} of a node has no meaning and is ignored"
            place = argument.at(url.columns["path"])
            self.findings.append(Finding(place, "path", message, "url.path", "warning"))
        in_dialer = parts.dialer in ("ssh", "sshd")
        scheme = url.columns["scheme"]
        nodes = []
        for index, host in enumerate(hosts):
            connector = {
                "type": argument.scalar(parts.connector, scheme),
                "auth": None if in_dialer else parts.auth,
                "metadata": self._metadata(argument, values, "connector.", ("node.", "dialer.")),
            }
            dialer = {
                "type": argument.scalar(parts.dialer, scheme),
                "auth": parts.auth if in_dialer else None,
                "tls": self._node_tls(
                    argument, parts, "" if parts.path_like and not url.host else hostname(host), column
                ),
                "metadata": self._metadata(argument, values, "dialer.", ("node.", "connector.")),
            }
            entries: dict[str, Tree | None] = {
                "name": argument.scalar(f"node-{index}", 1),
                "addr": argument.scalar(host, column),
                "connector": argument.map(scheme, connector),
                "dialer": argument.map(scheme, dialer),
                "metadata": self._metadata(argument, values, "node.", ("connector.", "dialer.")),
            }
            nodes.append(argument.map(column, entries))
            column += len(host) + 1
        return nodes

    @staticmethod
    def _node_tls(argument: _Argument, parts: _NodeParts, host: str, column: int) -> Map | None:
        found = parts.tls
        name, name_column = found["serverName"]
        name, name_column = (name, name_column) if name else (host, column)
        if not (parts.secure or found["certFile"][0] or found["caFile"][0] or name):
            return None
        entries: dict[str, Tree | None] = {
            key: argument.scalar(*found[key]) if found[key][0] else None for key in ("certFile", "keyFile", "caFile")
        }
        if parts.secure:
            entries["secure"] = argument.scalar(True, found["secure"][1])
        if name:
            entries["serverName"] = argument.scalar(name, name_column)
        return argument.map(column, entries)

    @staticmethod
    def _metadata(argument: _Argument, values: _Values, own: str, others: tuple[str, ...]) -> Map | None:
        """Return the keys without a prefix, and those with our own, which loses it."""
        entries: dict[str, Tree | None] = {}
        first = 0
        for key, (value, column) in values.values.items():
            if key.startswith(others):
                continue
            name = key.removeprefix(own)
            first = first or column
            if isinstance(value, list):
                entries[name] = argument.list([argument.scalar(item, column) for item in value], column)
            else:
                entries[name] = argument.scalar(value, column)
        return argument.map(first, entries) if entries else None

    # ---- -L ----
    def _listen(self, text: str, number: int, chain: str) -> None:
        argument = _Argument(Source(f"-L#{number}", "url"))
        url = self._split(text, argument, free_host=True)
        if url is None:
            return
        values = _Values({pair.key: (pair.value, pair.column) for pair in url.query().values()})
        handler, listener, addresses, targets = self._addresses(argument, url)
        auth = self._auth(argument, url, values)
        tls = self._server_tls(argument, values)
        self._lift_to_service(values)
        selector = self._selector(argument, values)
        nodes = self._forward_nodes(argument, targets)
        for index, address in enumerate(addresses):
            mine = nodes
            if len(addresses) > 1 and len(nodes) > 1:
                mine = nodes[index : index + 1]
            self._service(argument, url, values, (handler, listener, address), mine, selector, auth, tls, chain)
        if len(addresses) > 1 and 1 < len(targets) != len(addresses):
            message = (
                f"{len(addresses)} ports and {len(targets)} targets do not pair up; what is left over has no effect"
            )
            severity: Severity = "error" if len(targets) < len(addresses) else "warning"
            place = argument.at(url.columns["path"])
            self.findings.append(Finding(place, "target", message, "url.targets", severity))

    def _addresses(self, argument: _Argument, url: Url) -> tuple[str, str, list[str], list[_Target]]:
        """Return handler, listener, listen addresses and forward targets."""
        handler, listener = self._words(argument, url)
        path_like = bool(PATH_SCHEMES.intersection(url.parts))
        path_is_address = path_like and not url.host
        if path_is_address:
            addresses, wrong = [url.path], ""
        elif path_like:
            addresses, wrong = [url.host], ""
            if re.search(r":[0-9]+(-[0-9]+)?$", url.host):
                addresses, wrong = expand_ports(url.host)
        else:
            addresses, wrong = expand_ports(url.host)
        if wrong:
            self._complain(argument, url.columns["host"], "port", wrong, "url.port")
        handler = self._component(argument, url, handler, "handler", "auto")
        listener = self._component(argument, url, listener, "listener", "udp" if handler == "ssu" else "tcp")
        targets: list[_Target] = []
        remotes = url.path.strip("/")
        if remotes and not path_is_address:
            targets = self._targets(argument, url, remotes)
            handler = self._forwarding(argument, url, handler, listener)
        elif listener == "stdio" and url.host:
            targets = [(url.host, url.columns["host"])]
            handler = "tcp" if handler == "auto" else handler
        return handler, listener, addresses, targets

    def _targets(self, argument: _Argument, url: Url, remotes: str) -> list[_Target]:
        targets: list[_Target] = []
        column = url.columns["path"] + len(url.path) - len(url.path.lstrip("/"))
        for each in remotes.split(","):
            found, wrong = expand_ports(each)
            if wrong:
                self._complain(argument, column, "target", wrong, "url.port")
            targets += [(address, column) for address in found]
            column += len(each) + 1
        return targets

    def _forwarding(self, argument: _Argument, url: Url, handler: str, listener: str) -> str:
        """Return the handler of a service with targets; GOST replaces the one that was asked for."""
        if handler == "relay":
            return handler
        forwarding = ("tcp", "udp", "rtcp", "rudp", "tun", "tap", "dns", "unix", "runix", "serial")
        chosen = listener if listener in forwarding else "forward"
        harmless = ("auto", "forward", "tcp", "udp", "rtcp", "rudp", "runix", "unix", "dns", "tun", "tap", "serial")
        if handler != chosen and handler not in harmless:
            message = f"a target makes this a {chosen!r} service; {handler!r} is not spoken"
            self._complain(argument, url.columns["path"], "target", message, "url.handler-replaced", "warning")
        return chosen

    @staticmethod
    def _server_tls(argument: _Argument, values: _Values) -> Map | None:
        cert, key, ca = values.find(*_CERT), values.find(*_KEY), values.find(*_CA)
        values.drop(*_CERT, *_KEY, *_CA)
        if not cert[0]:
            return None
        entries: dict[str, Tree | None] = {
            "certFile": argument.scalar(*cert),
            "keyFile": argument.scalar(*key) if key[0] else None,
            "caFile": argument.scalar(*ca) if ca[0] else None,
        }
        return argument.map(cert[1], entries)

    @staticmethod
    def _lift_to_service(values: _Values) -> None:
        servers, column = values.find("dns")
        if servers:
            values.values["dns"] = (servers.split(","), column)
        for key in ("interface", "netns", "netns.out"):
            found = values.find(key)[0]
            if found:
                values.rename(key, f"service.{key}", found)
        for key in ("so_mark", "proxyProtocol"):
            count = values.number(key)[0]
            if count > 0:
                values.rename(key, f"service.{key}", count)

    def _service(
        self,
        argument: _Argument,
        url: Url,
        values: _Values,
        names: tuple[str, str, str],
        nodes: list[Map],
        selector: Map | None,
        auth: Map | None,
        tls: Map | None,
        chain: str,
    ) -> None:
        handler, listener, address = names
        own = _Values(
            {
                key.removeprefix("handler."): value
                for key, value in values.values.items()
                if not key.startswith(("service.", "listener."))
            }
        )
        reverse = listener in ("rtcp", "rudp", "runix")
        in_listener = listener in ("ssh", "sshd")
        lifted = self._lift(argument, own)
        forwarder = None
        if nodes:
            column = url.columns["path"]
            forwarder = argument.map(column, {"nodes": argument.list(nodes, column), "selector": selector})
        column = url.columns["scheme"]
        handler_entries = {
            "type": argument.scalar(handler, column),
            "retries": lifted.pop("retries", None),
            "chain": argument.scalar(chain, column) if chain and not reverse else None,
            "auth": None if in_listener else auth,
            "metadata": self._metadata(argument, own, "", ()),
        }
        listener_entries = {
            "type": argument.scalar(listener, column),
            "chain": argument.scalar(chain, column) if chain and reverse else None,
            "auth": auth if in_listener else None,
            "tls": tls,
            "metadata": self._metadata(argument, values, "listener.", ("service.", "handler.")),
        }
        entries: dict[str, Tree | None] = {
            "name": argument.scalar(f"service-{self._services}", 1),
            "addr": argument.scalar(address, url.columns["host"]),
            **lifted,
            "handler": argument.map(column, handler_entries),
            "listener": argument.map(column, listener_entries),
            "forwarder": forwarder,
            "metadata": self._metadata(argument, values, "service.", ("handler.", "listener.")),
        }
        self._services += 1
        self._append("services", argument.map(1, entries))

    def _forward_nodes(self, argument: _Argument, targets: list[_Target]) -> list[Map]:
        nodes: list[Map] = []
        for address, column in targets:
            entries: dict[str, Tree | None] = {
                "name": argument.scalar(f"{self.prefix}target-{len(nodes)}", column),
                "addr": argument.scalar(address, column),
            }
            nodes.append(argument.map(column, entries))
        return nodes

    def _lift(self, argument: _Argument, values: _Values) -> dict[str, Tree | None]:
        """Make objects of the handler's keys that stand for some; return the service's fields that refer to them."""
        lifted: dict[str, Tree | None] = {}

        def refer(key: str, name: str) -> None:
            if name:
                lifted[key] = argument.scalar(name, 1)

        for key, parse in (("retries", to_int), ("climiter", to_int), ("rlimiter", to_float)):
            self._checked(argument, key, *values.find(key), parse)
        retries, column = values.number("retries")
        if retries > 0:
            values.drop("retries")
            lifted["retries"] = argument.scalar(retries, column)
        refer("admission", self._patterns(argument, values, "admission", "admissions"))
        refer("bypass", self._patterns(argument, values, "bypass", "bypasses"))
        refer("resolver", self._resolver(argument, values, values.find("prefer")[0]))
        refer("hosts", self._hosts(argument, values))
        refer("limiter", self._limiter(argument, values))
        connections, column = values.number("climiter")
        if connections > 0:
            refer("climiter", self._counter(argument, values, "climiter", str(connections), column))
        text, column = values.find("rlimiter")
        try:
            rate = to_float(text)
        except Unusable:
            rate = 0.0
        if rate > 0:
            refer("rlimiter", self._counter(argument, values, "rlimiter", plain_decimal(rate), column))
        return lifted

    def _counter(self, argument: _Argument, values: _Values, key: str, limit: str, column: int) -> str:
        values.drop(key)
        name = f"{key}-{len(self._lists.get(f'{key}s', []))}"
        limits = argument.list([argument.scalar(f"$ {limit}", column)], column)
        self._append(f"{key}s", argument.map(column, {"name": argument.scalar(name, column), "limits": limits}))
        return name

    def _limiter(self, argument: _Argument, values: _Values) -> str:
        keys = ("limiter.in", "limiter.out", "limiter.conn.in", "limiter.conn.out")
        found = [values.find(key) for key in keys]
        if not any(text for text, _ in found):
            return ""
        values.drop(*keys)
        column = max(column for _, column in found)
        lines = []
        for mark, (inward, _), (outward, _) in (("$", found[0], found[1]), ("$$", found[2], found[3])):
            if inward or outward:
                # GOST writes nothing for a missing inward limit, and then reads the outward one in its place.
                lines.append(argument.scalar(f"{mark} {inward or '0B'} {outward}", column))
        name = f"limiter-{len(self._lists.get('limiters', []))}"
        entries: dict[str, Tree | None] = {
            "name": argument.scalar(name, column),
            "limits": argument.list(lines, column),
        }
        self._append("limiters", argument.map(column, entries))
        return name


def service_address(text: str, source: Source, keys: Iterable[str]) -> Map:
    """Return the tree of `-api` or `-metrics`: address, credentials, and the keys of the query.

    `keys` are the section's own keys that the query may set, compared without case; any other stays, so that it is
    reported as unknown. Raise UrlError.
    """
    argument = _Argument(source)
    url = split(text, free_host=False)
    # GOST takes the empty host of unix:///path for an address, which is a random port on all interfaces.
    address = f"unix://{url.path}" if url.scheme == "unix" and not url.host else url.host
    entries: dict[str, Tree | None] = {"addr": argument.scalar(address, url.columns["host"])}
    own = {key.lower(): key for key in keys}
    for pair in url.query().values():
        # A key of the section that the query may not set must not slip in.
        name = own.get(pair.key.lower()) or (f"?{pair.key}" if pair.key.lower() in _NOT_IN_QUERY else pair.key)
        entries[name] = argument.scalar(pair.value, pair.column)
    if url.username is not None:
        column = url.columns["user"]
        entries["auth"] = argument.map(
            column,
            {
                "username": argument.scalar(url.username, column) if url.username else None,
                "password": argument.scalar(url.password, column) if url.password else None,
            },
        )
    return argument.map(1, entries)
