"""Endpoints: a host and a port, and the forms in which users and kernels write them."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, NamedTuple

from .errors import ConfigError

IPAddress = IPv4Address | IPv6Address


@lru_cache(maxsize=8192)
def parse_ip(text: str) -> IPAddress | None:
    """Return the address that `text` spells, an IPv4-mapped IPv6 address as IPv4, or None for a name."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


class Endpoint(NamedTuple):
    """A host and a port (0..65535); a name is never resolved here.

    `host` is an IP address in its usual text form (no brackets, IPv4-mapped IPv6 already as IPv4), a name exactly
    as the peer or the user wrote it, or "" for "any". A link-local address has its zone, `%eth0` as users write it,
    `%2` as the kernel tells it: the number holds in every namespace. Text rather than address objects: the kernel
    gives and takes text, so a connection that no policy looks at never pays for parsing.
    """

    host: str
    port: int

    @property
    def ip(self) -> IPAddress | None:
        """The host as an address, None for a name or ""."""
        return parse_ip(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def from_sockaddr(cls, sockaddr: tuple[Any, ...]) -> Endpoint:
        """Make an endpoint of what `getpeername()` and its kin return (IPv4 or IPv6 families)."""
        host = sockaddr[0]
        if len(sockaddr) == 4:
            if host.startswith("::ffff:") and "." in host:
                host = host[7:]
            elif sockaddr[3]:
                host = f"{host.partition('%')[0]}%{sockaddr[3]}"
        return cls(host, sockaddr[1])


ANY = Endpoint("", 0)


def parse_endpoint(text: str, path: str = "", *, default_port: int | None = None) -> Endpoint:
    """Parse `host:port`, `[v6]:port`, `[v6%zone]:port` or `:port`.

    Raise ConfigError that names `path` for a missing or bad port, unless `default_port` stands in for a missing one.
    """
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port_text = rest[1:] if rest.startswith(":") else ""
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigError(path, f"{text!r} is not an address such as [::1]:8080", code="address")
        has_port = bool(rest)
        address, _, interface = host.partition("%25")
        if interface:  # as URLs have it (RFC 6874); alone it is the zone of number 25
            host = f"{address}%{interface}"
    elif text.count(":") > 1:
        if default_port is None or parse_ip(text) is None:
            raise ConfigError(path, f"{text!r} has too many colons; write [{text}]:PORT for IPv6", code="address")
        host, port_text, has_port = text, "", False
    else:
        host, colon, port_text = text.partition(":")
        has_port = bool(colon)
    if not has_port and default_port is not None:
        return Endpoint(host, default_port)
    if not has_port:
        raise ConfigError(path, f"{text!r} has no port; write {text}:PORT", code="address")
    if port_text == "":
        return Endpoint(host, default_port or 0)
    if not (port_text.isascii() and port_text.isdigit()) or int(port_text) > 65535:
        raise ConfigError(path, f"{port_text!r} is not a port between 0 and 65535", code="address")
    mapped = parse_ip(host) if host.startswith("::ffff:") else None
    return Endpoint(str(mapped) if mapped else host, int(port_text))
