"""How outgoing sockets are made: from `interface`, `so_mark` and `netns` to socket options."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.common_options import mark_problem
from ..core.address import parse_ip
from ..core.errors import ConfigError
from ..core.sockets import DEFAULT_KEEPALIVE, DialOptions, Keepalive


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
