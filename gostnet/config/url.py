"""The URLs of the command line, in parts with their columns; a grammar of GOST's own that is nearly that of URLs.

-L  [scheme://][user[:password]@][host][:port[-port]][/target{,target}][?key=value{&key=value}]
-F  [scheme://][user[:password]@]host[:port]{,host[:port]}[?key=value{&key=value}]
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Final

from ..core.errors import ConfigError

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})?")
_USERINFO: Final = re.compile(r"[A-Za-z0-9\-._:~!$&'()*+,;=%@]*")
_HOST: Final = re.compile(r"[A-Za-z0-9\-._~!$&'()*+,;=:\"<>\[\]\x80-\U0010ffff]*")
_PATH_SAFE: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~!$&'()*+,;=:@/[]%")
_PATH_KEPT: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~$&+,/:;=@")
_PORTS: Final = re.compile(r"[0-9]{1,6}(?:-[0-9]{1,6})?")
MAX_PORT: Final = 65535


class UrlError(ConfigError):
    """An argument that is no URL at all, for GOST either; `column` says where."""

    code = "url.syntax"

    def __init__(self, column: int, part: str, message: str, code: str = "url.syntax") -> None:
        super().__init__(part, message, code=code)
        self.part = part
        self.column = column


@dataclass(frozen=True, slots=True)
class Pair:
    """One key of the query with its value, and the column of the key."""

    key: str
    value: str
    column: int


@dataclass(slots=True)
class Url:
    """An argument in parts; columns count from 1 in the argument as it was given."""

    scheme: str
    username: str | None
    password: str | None
    host: str
    path: str
    pairs: list[Pair]
    columns: dict[str, int]
    complaints: list[tuple[int, str, str, str]]
    """(column, part, message, code) of what GOST would pass over."""

    @property
    def parts(self) -> list[str]:
        """The words of the scheme."""
        return self.scheme.split("+")

    def query(self) -> dict[str, Pair]:
        """Return the first pair of each key."""
        found: dict[str, Pair] = {}
        for pair in self.pairs:
            found.setdefault(pair.key, pair)
        return found


def split(argument: str, *, free_host: bool) -> Url:
    """Split an argument. With `free_host` (-L) the host may hold anything up to `/` or `?`. Raise UrlError."""
    lead = len(argument) - len(argument.lstrip())
    text = argument.strip()
    control = re.search("[\x00-\x1f\x7f]", text)
    if control:
        raise UrlError(lead + control.start() + 1, "url", f"{control[0]!r} is not allowed")
    found = _SCHEME.match(text)
    scheme = "auto"
    start = 0
    if found:
        scheme, start = found[1].lower(), found.end()
    elif not text.startswith(":") and "://" in text:
        # `1http://h` or `h:1/http://x`: Go finds no scheme here, or one that nobody meant.
        raise UrlError(
            lead + 1, "scheme", "no valid scheme before '://'; begin with one, such as auto://", "url.scheme"
        )
    return _split_rest(text, start, lead, "http+tls" if scheme == "https" else scheme, free_host)


def _split_rest(text: str, start: int, lead: int, scheme: str, free_host: bool) -> Url:
    complaints: list[tuple[int, str, str, str]] = []
    end = min((at for at in (text.find(mark, start) for mark in "/?") if at >= 0), default=len(text))
    hash_at = text.find("#", start if not free_host else end)
    if not free_host and 0 <= hash_at < end:
        end = hash_at
    at = text.rfind("@", start, end)
    columns = {
        "scheme": lead + 1,
        "user": lead + start + 1,
        "host": lead + max(at + 1, start) + 1,
        "path": lead + end + 1,
    }
    if hash_at >= 0:
        message = "is cut off at '#'; write %23 for a '#' that belongs to a value"
        complaints.append((lead + hash_at + 1, "fragment", message, "url.fragment"))
        text = text[:hash_at]
    username = password = None
    host = text[start:end]
    if at >= 0:
        username, password = _userinfo(text[start:at], lead + start + 1)
        host = text[at + 1 : end]
    if not free_host:
        _check_host(host, columns["host"])
        # The zone of an IPv6 address is escaped in a URL: [fe80::1%25eth0].
        host = re.sub(r"\[[^\]]*\]", lambda found: found[0].replace("%25", "%"), host)
    rest = text[end:]
    path, mark, query = rest.partition("?")
    columns["query"] = lead + end + len(path) + 2 if mark else lead + len(text) + 1
    pairs = _pairs(query, columns["query"], complaints)
    return Url(scheme, username, password, host, _path(path, columns["path"]), pairs, columns, complaints)


def _userinfo(text: str, column: int) -> tuple[str, str | None]:
    bad = _USERINFO.match(text)
    if bad is None or bad.end() != len(text):
        offset = bad.end() if bad else 0
        raise UrlError(column + offset, "user", f"{text[offset]!r} must be written %{ord(text[offset]) & 0xFF:02X}")
    name, colon, word = text.partition(":")
    username = _unescape(name, column, "user")
    return username, _unescape(word, column + len(name) + 1, "password") if colon else None


def _unescape(text: str, column: int, part: str, plus: bool = False) -> str:
    """Decode %XX. Raise UrlError for a broken one."""
    if plus:
        text = text.replace("+", " ")
    if "%" not in text:
        return text
    for found in _ESCAPE.finditer(text):
        if found[1] is None:
            broken = text[found.start() : found.start() + 3]
            raise UrlError(column + found.start(), part, f"{broken!r} is not an escape such as %2F", "url.escape")
    raw = bytearray()
    position = 0
    for found in _ESCAPE.finditer(text):
        raw += text[position : found.start()].encode()
        raw.append(int(found[1], 16))
        position = found.end()
    raw += text[position:].encode()
    return raw.decode(errors="replace")


def _path(raw: str, column: int) -> str:
    """Return a path as GOST keeps it: escaped as given if that is a valid spelling, else escaped anew."""
    plain = _unescape(raw, column, "path")
    if all(letter in _PATH_SAFE for letter in raw):
        return raw
    return "".join(
        letter if letter in _PATH_KEPT else "".join(f"%{byte:02X}" for byte in letter.encode()) for letter in plain
    )


def _pairs(query: str, column: int, complaints: list[tuple[int, str, str, str]]) -> list[Pair]:
    found = []
    for part in query.split("&"):
        here = column
        column += len(part) + 1
        if not part:
            continue
        key, _, value = part.partition("=")
        if ";" in part:
            complaints.append((here, f"query.{key[:64]}", "is ignored because of the ';'; write %3B", "url.escape"))
            continue
        try:
            name = _unescape(key, here, "query", plus=True)
            found.append(Pair(name, _unescape(value, here + len(key) + 1, "query", plus=True), here))
        except UrlError as exc:
            complaints.append((exc.column, f"query.{key[:64]}", f"is ignored because {exc.reason}", "url.escape"))
    return found


def _check_host(host: str, column: int) -> None:
    """Refuse what Go's URL parser refuses in the host of a node, but allow a port for each of several hosts."""
    offset = 0
    for each in host.split(","):
        bare = each
        if each.startswith("["):
            name, bracket, bare = each[1:].partition("]")
            if not bracket:
                raise UrlError(column + offset, "host", f"{each!r} has no closing bracket")
            zone = name.partition("%")
            if not _HOST.fullmatch(zone[0]):
                raise UrlError(column + offset, "host", f"{name!r} is not an address")
            bare = "x" + bare
        if not _HOST.fullmatch(bare):
            raise UrlError(column + offset, "host", f"{each!r} is not a host name or address")
        _, colon, port = bare.partition(":")
        if colon and port and not (port.isascii() and port.isdigit()):
            hint = f"; write [{each}]:PORT for IPv6" if each.count(":") > 1 else ""
            raise UrlError(column + offset, "port", f"{port!r} is not a port between 0 and 65535{hint}", "url.port")
        offset += len(each) + 1


def expand_ports(address: str) -> tuple[list[str], str]:
    """Return the addresses of `host:port` or `host:low-high`, and what is wrong with the ports ("" if nothing).

    As in GOST, a port that is none becomes 0, and what has no port (or a scheme) is returned as it is.
    """
    if "://" in address:
        return [address], ""
    host, colon, ports = address.rpartition(":")
    bracketed = "[" in ports or "]" in ports
    if not colon or bracketed or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        return [address], ""
    if not ports:
        return [f"{host}:0"], ""
    if not _PORTS.fullmatch(ports):
        return [f"{host}:0"], f"{ports!r} is not a port between 0 and {MAX_PORT}"
    low_text, dash, high_text = ports.partition("-")
    low, high = int(low_text), int(high_text or low_text)
    if not dash:
        if low > MAX_PORT:
            return [f"{host}:0"], f"{ports!r} is not a port between 0 and {MAX_PORT}"
        return [f"{host}:{low}"], ""
    if low > high or high > MAX_PORT:
        return [address], f"{ports!r} is not a range of ports such as 8000-8003"
    return [f"{host}:{port}" for port in range(low, high + 1)], ""


def hostname(host: str) -> str:
    """Return the host of `host[:port]` without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def decode_base64(text: str) -> str | None:
    """Decode base64 as GOST does: the URL alphabet without padding, else the standard one with padding."""
    for alphabet, padded in ((b"-_", False), (b"+/", True)):
        if padded == ("=" in text) or (padded and len(text) % 4 == 0):
            try:
                filled = text if padded else text + "=" * (-len(text) % 4)
                return base64.b64decode(filled, altchars=alphabet, validate=True).decode(errors="replace")
            except (binascii.Error, ValueError):
                continue
    return None


def decode_pair(text: str) -> tuple[str, str] | None:
    decoded = decode_base64(text) if text else None
    if decoded is None or ":" not in decoded:
        return None
    method, _, password = decoded.partition(":")
    return method, password
