"""Names of components as the command line and the checks need them: schemes, aliases, what an address means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from ..core.registry import GOST_NAMES, Kind

ALIASES: Final[Mapping[Kind, Mapping[str, str]]] = {
    "handler": {
        "socks": "socks5",
        "socks4a": "socks4",
        "redir": "red",
        "redirect": "red",
        "tcp": "forward",
        "udp": "forward",
        "rudp": "rtcp",
        "runix": "rtcp",
    },
    "listener": {"redir": "red", "redirect": "red"},
    "connector": {"socks": "socks5", "socks4a": "socks4", "virtual": "direct"},
    "dialer": {"h3": "http3", "virtual": "direct"},
}
"""Names that stand for the same component as another one."""

PATH_SCHEMES: Final = frozenset(("unix", "runix", "serial"))
"""Schemes whose address is a path."""

Network: TypeAlias = Literal["tcp", "udp", "icmp", "path", "none"]

_UDP: Final = frozenset(("udp", "redu", "quic", "kcp", "dtls", "h3", "http3", "wt", "tun", "tap"))
_NONE: Final = frozenset(("rtcp", "rudp", "runix", "stdio", "tungo", "ftcp"))


def listen_network(listener: str, mode: str = "") -> Network:
    """Return what a listener's address is bound to; "none" if nothing of this host is bound to it.

    `mode` is the dns listener's metadata key.
    """
    if listener in ("unix", "serial"):
        return "path"
    if listener in ("icmp", "icmp6"):
        return "icmp"
    if listener in _NONE:
        return "none"
    if listener == "dns":
        return "tcp" if mode.lower() in ("tcp", "tls", "https") else "udp"
    return "udp" if listener in _UDP else "tcp"


def is_known(kind: Kind, name: str) -> bool:
    """True for a name of GOST's, built here or not."""
    return name in GOST_NAMES[kind]
