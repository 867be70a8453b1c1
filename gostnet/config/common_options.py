"""Metadata keys that do not belong to a component: of services, handlers in general, hops, nodes, chains, recorders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..core.options import Bytes, CommaList, Seconds, group, opt
from ..core.resources import MARK_MASK
from . import patterns


def mark_problem(mark: int) -> str:
    """Return what is wrong with a user's mark, "" if nothing is."""
    if not 0 <= mark < 1 << 32:
        return f"{mark} is not a mark of 32 bits"
    if mark & MARK_MASK:
        return f"{mark:#x} touches the bits {MARK_MASK:#010x}, which gostnet uses itself"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """How outgoing sockets leave the host."""

    interface: str = opt(
        "", "Interface or source address of outgoing connections; several are tried in order, a final ! ends the list."
    )
    so_mark: int = opt(0, "Mark of outgoing packets (SO_MARK).", key="so_mark")
    netns: str = opt("", "Network namespace: a name, or a path that begins with /.")
    proxy_protocol: int = opt(
        0, "PROXY protocol: accept its header (services), send one of this version (hops, nodes)."
    )

    def validate(self) -> Iterable[tuple[str, str]]:
        """Refuse marks that would collide with our own."""
        problem = mark_problem(self.so_mark)
        if problem:
            yield "so_mark", problem


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """Keys of a service's own metadata."""

    socket: SocketOptions = group(SocketOptions)
    netns_out: str = opt("", "Network namespace of outgoing connections.", key="netns.out")
    dial_timeout: Seconds = opt(15.0, "Time for one attempt to reach the target through the chain.")
    pre_up: list[str] = opt([], "Commands before the service accepts connections.")
    post_up: list[str] = opt([], "Commands once it accepts connections.")
    pre_down: list[str] = opt([], "Commands before it stops.")
    post_down: list[str] = opt([], "Commands after it has stopped.")
    engine: str = opt(
        "auto",
        "What moves the bytes of TCP flows: the best there is, or one to begin with (docs/engines.md); `kernel` as in"
        " the handler's metadata, for port forwards.",
        choices=("auto", "copy", "splice", "native", "kernel"),
    )
    ignore_chain: bool = opt(False, "Do not use the chain of handler and listener.")
    enable_stats: bool = opt(False, "Count connections and bytes for status and observer.")
    observer_period: Seconds = opt(
        5.0, "Period of reports to the observer, at least 1s.", key="observer.period", aliases=("observePeriod",)
    )
    observer_reset_traffic: bool = opt(
        False, "Report the bytes since the last report instead of all.", key="observer.resetTraffic"
    )
    limiter_refresh_interval: Seconds = opt(
        30.0, "How long an answer of the limiter is kept, at least 1s.", key="limiter.refreshInterval"
    )
    limiter_cleanup_interval: Seconds = opt(
        60.0, "Accepted for compatibility; unused limits are dropped at once.", key="limiter.cleanupInterval"
    )
    limiter_scope: str = opt(
        "", "Only limits of this scope hold.", key="limiter.scope", choices=("", "service", "conn", "client")
    )
    labels: dict[str, str] = opt({}, "Added to log entries and records.")


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerOptions:
    """Keys of every handler's metadata."""

    observer_period: Seconds = opt(
        5.0,
        "Period of reports on clients to the handler's observer, at least 1s.",
        key="observer.period",
        aliases=("observePeriod", "observer.observePeriod"),
    )
    observer_reset_traffic: bool = opt(
        False, "Report the bytes of clients since the last report instead of all.", key="observer.resetTraffic"
    )
    limiter_refresh_interval: Seconds = opt(
        30.0, "Accepted for compatibility; limits change when they are loaded.", key="limiter.refreshInterval"
    )
    limiter_cleanup_interval: Seconds = opt(
        60.0, "Accepted for compatibility; unused limits are dropped at once.", key="limiter.cleanupInterval"
    )
    skip_auth: CommaList = opt([], "Clients (addresses or networks) that need no credentials.", key="skipauth")
    cache_ttl: Seconds = opt(0.0, "How long a response may be cached.", key="cache.ttl")
    cache_serve_stale: bool = opt(False, "Serve expired responses when the origin fails.", key="cache.serveStale")
    cache_methods: list[str] = opt(["GET", "HEAD"], "Methods whose responses are cached.", key="cache.methods")
    cache_max_body: Bytes = opt(1 << 20, "Longest body that is cached.", key="cache.maxBodyBytes")

    def validate(self) -> Iterable[tuple[str, str]]:
        """Refuse what is no network: the client would have to log in after all."""
        for text in self.skip_auth:
            problem = patterns.network(text)
            if problem:
                yield "skipauth", f"{text!r} {problem}"


HANDLER_PREFIXES: Final = ("cache.status.",)
"""Beginnings of handler keys whose rest is free: `cache.status.404`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberOptions:
    """Keys of one of several that a selector chooses from."""

    backup: bool = opt(False, "Used only when everything else has failed.")
    weight: int = opt(1, "Share of the random strategy.")
    max_fails: int = opt(0, "Failures after which it is left out; 0 takes the selector's.", aliases=("max_fails",))
    fail_timeout: Seconds = opt(
        0.0, "How long it is left out after failures; 0 takes the selector's.", aliases=("fail_timeout",)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """Keys of a node's metadata."""

    socket: SocketOptions = group(SocketOptions)
    member: MemberOptions = group(MemberOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class HopOptions:
    """Keys of a hop's metadata, beside those that its nodes take over from it."""

    on_no_node: str = opt(
        "error",
        "What becomes of a flow that no node is for: an error, or `direct`, without this hop and what follows.",
        choices=("error", "direct"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderOptions:
    """Keys of a recorder's use by a service."""

    http_body: bool = opt(False, "Record HTTP bodies.", key="http.body")
    http_max_body: Bytes = opt(64 << 10, "Longest part of a body that is recorded.", key="http.maxBodySize")
    direction: bool = opt(False, "Mark the direction of serial data.")
    time_stamp_format: str = opt("", "Format of time stamps, as Go writes layouts.")
    hexdump: bool = opt(False, "Record serial data as a hex dump.")
