"""How outgoing sockets are made: from `interface`, `so_mark` and `netns` to socket options, tried before the start."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ..config.common_options import mark_problem
from ..core.address import parse_ip
from ..core.errors import ConfigError, KernelError
from ..core.sockets import DEFAULT_KEEPALIVE, DialOptions, Keepalive, make_socket

_ELSEWHERE: Final = "192.0.2.1"
"""Stands for a destination of IPv4 that an interface is bound for (RFC 5737); nothing is sent to it."""

_FORBIDDEN: Final = (errno.EPERM, errno.EACCES)


def dial_options(
    interface: str, mark: int, netns: str, own_mark: int, keepalive: Keepalive = DEFAULT_KEEPALIVE, path: str = ""
) -> Sequence[DialOptions]:
    """Return the ways to make outgoing sockets, tried in order: one for each item of `interface`.

    `own_mark` is OR-ed into the user's mark. Raise ConfigError for a mark that touches our bits.
    """
    if problem := mark_problem(mark):
        raise ConfigError(f"{path}.metadata.so_mark", problem, code="mark")
    items = [word.strip() for word in interface.split(",") if word.strip()] or [""]
    found = []
    for word in items:
        strict = word.endswith("!")
        name = word.removesuffix("!")
        if name and parse_ip(name) is None and (len(name) > 15 or "/" in name):
            raise ConfigError(f"{path}.metadata.interface", f"{name!r} is neither an interface nor an address")
        found.append(DialOptions(mark | own_mark, name, strict, netns, keepalive))
    return found


@dataclass(slots=True)
class Trials:
    """What is to be tried before the start: how each service and node makes its sockets, by its path."""

    ways: dict[str, Sequence[DialOptions]] = field(default_factory=dict)

    def run(self) -> None:
        """Make a socket in every way, and drop it. Raise ConfigError for a place where we may do it in none.

        What is not there (yet) is no fault: interfaces, addresses and namespaces come and go. Moves threads between
        namespaces, so it is for a thread.
        """
        for path, ways in self.ways.items():
            refusals = [_refusal(options) for options in dict.fromkeys(ways)]
            if refusals[0] is not None and all(refusals):
                message, hint = refusals[0]
                raise ConfigError(path, message, hint=hint, code="permission")


def _refusal(options: DialOptions) -> tuple[str, str] | None:
    """Return what we may not do, and what would help, where such a socket cannot be made; None where it can."""
    try:
        sock = make_socket(socket.AF_INET, socket.SOCK_DGRAM, options.netns)
    except KernelError as exc:
        if options.netns and exc.errno in _FORBIDDEN:
            return f"netns {options.netns!r} may not be entered", exc.hint
        return None
    except OSError:
        return None
    with sock:
        if options.mark:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, options.mark)
            except OSError as exc:
                if exc.errno in _FORBIDDEN:
                    hint = "run as root, or with CAP_NET_ADMIN (since Linux 5.17 CAP_NET_RAW will do)"
                    return f"so_mark {options.mark:#x} may not be put on sockets", hint
        try:
            options.apply(sock, _ELSEWHERE)
        except (OSError, KernelError) as exc:
            if options.interface and exc.errno in _FORBIDDEN:
                hint = "run as root, or with CAP_NET_RAW; since Linux 5.7 nothing is needed"
                return f"interface {options.interface!r} may not be bound to", hint
    return None
