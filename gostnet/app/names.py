"""How the daemon itself resolves names where no resolver is configured.

Normally the C library is asked. Its questions cannot carry our mark, so while the host's own traffic may be
captured they would come back to us: then /etc/hosts and the servers of /etc/resolv.conf are asked by marked sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.address import Endpoint, parse_ip
from ..core.contracts import Resolver
from ..core.errors import ResolveError
from ..core.sockets import DialOptions
from ..pipeline.direct import Direct
from ..policies.entries import inline
from ..policies.hosts import HostTable, StaticHosts, compile_hosts
from ..policies.nameserver import NameServer
from ..policies.resolver import DNSResolver
from ..policies.system import SystemResolver

HOSTS = Path("/etc/hosts")
RESOLV_CONF = Path("/etc/resolv.conf")


def system_resolver(mark: int) -> Resolver:
    """Return the resolver for sockets that carry `mark`; 0 asks the C library."""
    return MarkedResolver((DialOptions(mark),)) if mark else SystemResolver()


class MarkedResolver:
    """Answers from the host's files and name servers, through sockets with given options."""

    def __init__(self, options: Sequence[DialOptions], hosts: Path = HOSTS, resolv_conf: Path = RESOLV_CONF) -> None:
        self._options = options
        self._hosts_file = hosts
        self._servers_file = resolv_conf
        self._stamp: tuple[float, float] = (-1.0, -1.0)
        self._hosts = StaticHosts(HostTable())
        self._dns = DNSResolver(())

    async def resolve(self, host: str, family: int = 0) -> list[str]:
        """Return the addresses of `host`. Raise ResolveError."""
        if parse_ip(host) is not None:
            return [host]
        self._refresh()
        found = self._hosts.lookup(host, family)
        if found:
            return found
        if not self._dns.servers:
            raise ResolveError(f"{host[:64]}: {self._servers_file} names no server")
        return await self._dns.resolve(host, family)

    def _refresh(self) -> None:
        """Read the files again when they have changed."""
        stamp = (_changed(self._hosts_file), _changed(self._servers_file))
        if stamp == self._stamp:
            return
        self._stamp = stamp
        lines = [line.partition("#")[0] for line in _lines(self._hosts_file)]
        table, _ = compile_hosts((), inline([line for line in lines if line.strip()], str(self._hosts_file)))
        self._hosts.replace(table)
        direct = Direct(_NoNames(), self._options)
        self._dns = DNSResolver([NameServer(address=Endpoint(server, 53), egress=direct) for server in self._servers()])

    def _servers(self) -> list[str]:
        found = []
        for line in _lines(self._servers_file):
            words = line.split()
            if len(words) >= 2 and words[0] == "nameserver" and parse_ip(words[1]) is not None:
                found.append(words[1])
        return found[:3]  # as many as the C library asks


class _NoNames:
    async def resolve(self, host: str, family: int = 0) -> list[str]:
        raise ResolveError(f"{host[:64]}: name servers are given by address")


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
