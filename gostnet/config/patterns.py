"""Small texts inside a configuration: patterns of addresses, lines of limits, addresses to listen on and to go to.

Each function returns what is wrong in words that follow the quoted text, "" if nothing is. GOST takes most of these
faults silently: a pattern never matches, a limit does not limit.
"""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Final

from ..core.address import parse_endpoint, parse_ip
from ..core.errors import ConfigError
from ..core.units import parse_size

_CIDR: Final = re.compile(r"([0-9A-Fa-f:.]+)/([0-9]{1,3})")
_NUMERIC: Final = re.compile(r"[0-9]+(\.[0-9]+)+")
_PORTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_COUNT: Final = re.compile(r"[-+]?[0-9]{1,18}")
_RATE: Final = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
SERVER_SCHEMES: Final = frozenset(("udp", "tcp", "tls", "dot", "https"))
"""How a name server can be asked."""


def is_network(text: str) -> bool:
    """True for an address with a prefix length, such as 10.0.0.0/8 (bits behind the prefix do not matter)."""
    if not _CIDR.fullmatch(text):
        return False
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def network(text: str) -> str:
    """Check a network or a single address."""
    return "" if is_network(text) or parse_ip(text) else "is not a network or address such as 10.0.0.0/8"


def ports(text: str) -> str:
    """Check a port or a range of ports."""
    found = _PORTS.fullmatch(text)
    if found is None or int(found[1]) > 65535 or int(found[2] or 0) > 65535:
        return "is not a port or a range such as 8000-8100"
    if found[2] and int(found[1]) > int(found[2]):
        return "is a range whose end is before its beginning"
    return ""


def _host_and_ports(text: str) -> tuple[str, str]:
    """Cut `host:ports` and `[host]:ports`; IPv6 without brackets has no ports."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        return host, rest.removeprefix(":")
    if text.count(":") == 1:
        host, _, rest = text.partition(":")
        return host, rest
    return text, ""


def _range(text: str) -> tuple[str, str] | None:
    low, dash, high = text.partition("-")
    low, high = low.strip(), high.strip()
    return (low, high) if dash and (parse_ip(low) or parse_ip(high)) else None


def bypass(text: str) -> str:
    """Check a pattern of destinations (rows B01-B41): network, glob, address or range of addresses, host[:ports]."""
    text = text.strip()
    if not text:
        return "is empty and matches nothing"
    if is_network(text):
        return ""
    host, port_text = _host_and_ports(text)
    if "/" in text:
        # 10.0.0.0/8:80 would be taken for a host name that nobody has (B20), 10.0.0.0/33 as well.
        return "is not a network such as 10.0.0.0/8; a network takes no port"
    pair = _range(text)
    if pair is not None:
        return _address_range(*pair)
    if text.endswith(":") or (port_text and ports(port_text)):
        # A bad port would mean any port (B07), a reversed range none (B06).
        return f"has a bad port: {port_text!r} {ports(port_text)}" if port_text else "ends in a colon without a port"
    if not host:
        return "has no host and matches nothing"
    if _NUMERIC.fullmatch(host) and parse_ip(host) is None:
        return "is not an IPv4 address and no host name either"
    if host.count(":") > 1 and parse_ip(host.partition("%")[0]) is None and not set("*?").intersection(host):
        return "is not an IPv6 address"
    return ""


def _address_range(low: str, high: str) -> str:
    first, last = parse_ip(low), parse_ip(high)
    if first is None or last is None or first.version != last.version:
        return "is not a range of addresses such as 10.0.0.1-10.0.0.9"
    if int(first) > int(last):
        return "is a range whose end is before its beginning"
    return ""


def admission(text: str) -> str:
    """Check a pattern of clients (rows A01-A06): network, address, or a host name that is resolved once."""
    text = text.strip()
    if not text:
        return "is empty and matches nothing"
    if is_network(text) or parse_ip(text):
        return ""
    if "/" in text:
        return "is not a network such as 10.0.0.0/8"
    if set("*?").intersection(text):
        return "holds a wildcard, which admissions do not know; use a network"
    if _range(text) is not None:
        return "is a range of addresses, which admissions do not know; use networks"
    if ":" in text:
        return "has a port, or is not an IPv6 address; clients are admitted by address only"
    return "is not an IPv4 address" if _NUMERIC.fullmatch(text) else ""


def _limit_key(key: str) -> str:
    if key in ("$", "$$") or parse_ip(key) or is_network(key):
        return ""
    return f"begins with {key!r}, which is not $, $$, an address or a network"


def traffic_limit(line: str) -> str:
    """Check `KEY IN [OUT [BURST]]`; rates are sizes per second (rows T01-T03). 0 is no limit."""
    words = line.split()
    if not 2 <= len(words) <= 4:
        return "is not KEY IN [OUT [BURST]], such as '$ 1MB 2MB'"
    wrong = _limit_key(words[0])
    for word in words[1:]:
        if wrong or word == "0":
            continue
        try:
            parse_size(word.removeprefix("-"))
        except ValueError:
            # Without a unit, or with a unit in the wrong case, GOST limits nothing (T02).
            wrong = f"says {word!r}, which is not a size such as 512KB, and would limit nothing"
    return wrong


def connection_limit(line: str) -> str:
    """Check `KEY N`."""
    words = line.split()
    if len(words) != 2:
        return "is not KEY N, such as '$ 1000'"
    return _limit_key(words[0]) or (
        "" if _COUNT.fullmatch(words[1]) else f"says {words[1]!r}, which is not a number, and would limit nothing"
    )


def rate_limit(line: str) -> str:
    """Check `KEY RATE`; requests per second."""
    words = line.split()
    if len(words) != 2:
        return "is not KEY RATE, such as '$ 10'"
    return _limit_key(words[0]) or (
        "" if _RATE.fullmatch(words[1]) else f"says {words[1]!r}, which is not a number, and would limit nothing"
    )


def limits_nothing(line: str) -> bool:
    """True for a well-formed line of connections or requests whose number is 0 or less."""
    return float(line.split()[1]) <= 0


def listen_address(text: str) -> str:
    """Check `[host]:port`; empty is any free port."""
    return _endpoint(text) if text else ""


def node_address(text: str) -> str:
    """Check `host:port`."""
    return _endpoint(text) if text else "is empty"


def target_address(text: str) -> str:
    """Check the target of a forwarder: the port may be missing where the other side knows it, a scheme may be there."""
    if not text:
        return "is empty"
    scheme, mark, rest = text.partition("://")
    if mark:
        return "" if scheme and rest else "is not SCHEME://HOST"
    if ":" not in text or parse_ip(text):
        return ""
    return _endpoint(text)


def _endpoint(text: str) -> str:
    try:
        parse_endpoint(text)
    except ConfigError as exc:
        return f"is not an address: {exc.reason}"
    return ""


def name_server(text: str) -> str:
    """Check `[scheme://]host[:port][/path]`."""
    scheme, mark, rest = text.partition("://")
    if mark and scheme.lower() not in SERVER_SCHEMES:
        return "has a scheme that is none of udp, tcp, tls, https"
    address = (rest if mark else text).partition("/")[0]
    if not address:
        return "names no server"
    if parse_ip(address):
        return ""
    try:
        parse_endpoint(address, default_port=53)
    except ConfigError as exc:
        return f"is not an address: {exc.reason}"
    return ""
