"""Options of services, hops and nodes: what GOST keeps in their metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.address import parse_ip
from ..core.errors import ConfigError
from ..core.options import Seconds, opt
from ..core.resources import MARK_MASK
from ..core.sockets import DEFAULT_KEEPALIVE, DialOptions, Keepalive


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """Keys of a service's metadata."""

    interface: str = opt("", "Interfaces or source addresses of outgoing connections, tried in order.")
    so_mark: int = opt(0, "SO_MARK of outgoing sockets.", key="so_mark")
    netns: str = opt("", "Network namespace of the listener, a name or a path.")
    netns_out: str = opt("", "Network namespace of outgoing connections.", key="netns.out")
    dial_timeout: Seconds = opt(15.0, "Deadline of one attempt to reach a target, all hops included.")
    ignore_chain: bool = opt(False, "Do not use the handler's chain.")
    limiter_scope: str = opt("", "Which limits apply: service, conn or client.", key="limiter.scope")


@dataclass(frozen=True, slots=True, kw_only=True)
class HopOptions:
    """Keys of a hop's metadata."""

    interface: str = opt("", "Interfaces or source addresses for connections to nodes that name none.")
    so_mark: int = opt(0, "SO_MARK of sockets to nodes that have none.", key="so_mark")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """Keys of a node's metadata."""

    interface: str = opt("", "Interfaces or source addresses for connections to the node.")
    so_mark: int = opt(0, "SO_MARK of sockets to the node.", key="so_mark")
    netns: str = opt("", "Network namespace for connections to the node.")
    weight: int = opt(1, "Share of the node under the strategy random.")
    backup: bool = opt(False, "Used only while no other node lives.")
    max_fails: int = opt(0, "Failures in a row after which the node counts as dead; 0 takes the selector's.")
    fail_timeout: Seconds = opt(0.0, "How long a dead node is left out; 0 takes the selector's.")


def dial_options(
    interface: str, mark: int, netns: str, own_mark: int, keepalive: Keepalive = DEFAULT_KEEPALIVE, path: str = ""
) -> Sequence[DialOptions]:
    """Return the ways to make outgoing sockets, tried in order: one for each item of `interface`.

    `own_mark` is OR-ed into the user's mark. Raise ConfigError for a mark that touches our bits.
    """
    if mark & MARK_MASK or not 0 <= mark <= 0xFFFFFFFF:
        raise ConfigError(
            f"{path}.metadata.so_mark",
            f"{mark:#x} uses bits of {MARK_MASK:#010x}, which are gostnet's own; use others",
            code="mark",
        )
    items = [word.strip() for word in interface.split(",") if word.strip()] or [""]
    found = []
    for word in items:
        strict = word.endswith("!")
        name = word.removesuffix("!")
        if name and parse_ip(name) is None and (len(name) > 15 or "/" in name):
            raise ConfigError(f"{path}.metadata.interface", f"{name!r} is neither an interface nor an address")
        found.append(DialOptions(mark | own_mark, name, strict, netns, keepalive))
    return found
