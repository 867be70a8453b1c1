"""What the kernel holds for one network namespace, as text that can be compared and read.

`snapshot` before and after, `diff` between: an empty difference is the proof that nothing was left behind. Counters,
handles, timers and whatever else moves by itself is left out; everything is named rather than numbered.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from gostnet.core.errors import KernelError
from gostnet.kernel import bpf, netns

from .netlink import NETFILTER, ROUTE, Netlink, attributes, interfaces

_FAMILIES = {socket.AF_INET: "v4", socket.AF_INET6: "v6"}

_GETLINK, _GETADDR, _GETROUTE, _GETRULE, _GETQDISC = 18, 22, 26, 34, 38


@dataclass(frozen=True, slots=True)
class State:
    """Lines by section: links, addresses, routes, rules, qdiscs, bpf, nft, sysctls, files."""

    sections: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {line}" for name, lines in self.sections.items() for line in lines)


def snapshot(place: netns.Place = None, *, files: Sequence[str] = ("/etc/resolv.conf",)) -> State:
    """Observe a namespace, by default the thread's; `files` are read whole, a missing one is a line that says so.

    Of routes and rules both families and all tables; of nftables all families, sets with their elements included; of
    sysctls the whole /proc/sys/net. Raise KernelError.
    """
    with Netlink(ROUTE, place) as route:
        names = {i.index: i.name for i in interfaces(route)}
        sections = {
            "links": _links(route, names),
            "addresses": _addresses(route, names),
            "routes": _routes(route, names),
            "rules": _rules(route),
            "qdiscs": _qdiscs(route, names),
        }
    with Netlink(NETFILTER, place) as netfilter:
        sections["nft"] = list(_nft(netfilter))
    with netns.inside(place):
        sections["bpf"] = list(_programs(names))
        sections["sysctls"] = sorted(_sysctls("/proc/sys/net"))
    sections["files"] = [_file(path) for path in files]
    return State({name: tuple(lines) for name, lines in sections.items()})


def diff(before: State, after: State) -> list[str]:
    """Return what differs, a line each: `- section: what was` and `+ section: what is`; [] when nothing does.

    The order of rules within a chain counts, that of everything else does not.
    """
    found = []
    for name in {**before.sections, **after.sections}:
        old, new = before.sections.get(name, ()), after.sections.get(name, ())
        if name == "sysctls":
            old, new = _settled(old, new), _settled(new, old)
        gone, come = Counter(old) - Counter(new), Counter(new) - Counter(old)
        found += [f"- {name}: {line}" for line in gone.elements()]
        found += [f"+ {name}: {line}" for line in come.elements()]
    return found


def await_same(before: State, place: netns.Place = None, *, timeout: float = 1.0, **kwargs: Any) -> list[str]:
    """Observe until nothing differs from `before`, at most `timeout` seconds; return the last difference.

    Further arguments go to `snapshot`. Blocks the thread.
    """
    deadline = time.monotonic() + timeout
    while (difference := diff(before, snapshot(place, **kwargs))) and time.monotonic() < deadline:
        time.sleep(0.01)
    return difference


# ---- rtnetlink ----------------------------------------------------------------------------------
def _links(netlink: Netlink, names: Mapping[int, str]) -> list[str]:
    lines = []
    for message in _decoded(netlink, _GETLINK, bytes(16), ifinfmsg):
        kind = _get(_get(message, "IFLA_LINKINFO"), "IFLA_INFO_KIND")
        flags = message["flags"]
        words = [f"{names.get(message['index'], message['index'])}"]
        words += [word for bit, word in ((0x1, "up"), (0x100, "promisc"), (0x200, "allmulti")) if flags & bit]
        if kind is not None:
            words.append(f"kind {kind}")
        for key in ("MTU", "ADDRESS", "GROUP", "PROMISCUITY", "IFALIAS"):
            if (value := _get(message, f"IFLA_{key}")) not in (None, ""):
                words.append(f"{key.lower()} {value}")
        if (master := _get(message, "IFLA_MASTER")) is not None:
            words.append(f"master {names.get(master, master)}")
        if _get(_get(message, "IFLA_XDP"), "IFLA_XDP_ATTACHED"):
            words.append("xdp")
        lines.append(" ".join(words))
    return lines


def _addresses(netlink: Netlink, names: Mapping[int, str]) -> list[str]:
    lines = []
    for message in _decoded(netlink, _GETADDR, bytes(8), ifaddrmsg):
        flags = _get(message, "IFA_FLAGS") or message["flags"]
        flags &= ~(0x40 | 0x20 | 0x04 | 0x01)  # tentative, deprecated, optimistic, secondary: states, not settings
        lines.append(
            f"{names.get(message['index'], message['index'])} {_get(message, 'IFA_ADDRESS')}/{message['prefixlen']}"
            f" scope {message['scope']} flags {flags:#x}{_rest(message, names, _ADDRESS_SKIPPED)}"
        )
    return lines


_ADDRESS_SKIPPED = frozenset({"IFA_ADDRESS", "IFA_FLAGS", "IFA_CACHEINFO"})
_ROUTE_SKIPPED = frozenset({"RTA_DST", "RTA_TABLE", "RTA_CACHEINFO", "RTA_PAD", "RTA_EXPIRES"})
_RULE_SKIPPED = frozenset({"FRA_TABLE", "FRA_PAD"})
_CLONED = 0x200
_ROUTE_STATES = 0x1 | 0x2 | 0x8 | 0x10 | 0x4000  # dead, pervasive, offload, linkdown, trap


def _routes(netlink: Netlink, names: Mapping[int, str]) -> list[str]:
    lines = []
    for family, version in _FAMILIES.items():
        for message in _decoded(netlink, _GETROUTE, struct.pack("=B11x", family), rtmsg):
            if message["flags"] & _CLONED or message["family"] != family:
                continue  # what the kernel caches of a destination; without IPv6, a dump of it answers with IPv4
            lines.append(
                f"{version} table {_get(message, 'RTA_TABLE') or message['table']}"
                f" {_get(message, 'RTA_DST') or 'default'}/{message['dst_len']}"
                f" proto {message['proto']} scope {message['scope']} type {message['type']} tos {message['tos']}"
                f" flags {message['flags'] & ~_ROUTE_STATES:#x}{_rest(message, names, _ROUTE_SKIPPED)}"
            )
    return lines


def _rules(netlink: Netlink) -> list[str]:
    lines = []
    for family, version in _FAMILIES.items():
        for message in _decoded(netlink, _GETRULE, struct.pack("=B11x", family), fibmsg):
            if message["family"] != family:
                continue
            lines.append(
                f"{version} table {_get(message, 'FRA_TABLE') or message['table']} action {message['action']}"
                f" from/{message['src_len']} to/{message['dst_len']} tos {message['tos']} flags {message['flags']:#x}"
                f"{_rest(message, {}, _RULE_SKIPPED)}"
            )
    return lines


def _qdiscs(netlink: Netlink, names: Mapping[int, str]) -> list[str]:
    lines = []
    for message in _decoded(netlink, _GETQDISC, bytes(20), tcmsg):
        kind = _get(message, "TCA_KIND")
        lines.append(
            f"{names.get(message['index'], message['index'])} {kind} handle {message['handle']:#x}"
            f" parent {message['parent']:#x}"
        )
    return lines


def _decoded(netlink: Netlink, kind: int, body: bytes, form: type[Any]) -> Iterator[Any]:
    for data in netlink.dump(kind, body):
        message = form(data)
        message.decode()
        yield message


def _get(message: Any, attribute: str) -> Any:
    return None if message is None else message.get_attr(attribute)


def _rest(message: Any, names: Mapping[int, str], skipped: frozenset[str]) -> str:
    """Return all attributes but the skipped ones, interfaces by their names, sorted."""
    words = []
    for attribute, value in message["attrs"]:
        if attribute in skipped:
            continue
        if attribute in ("RTA_OIF", "RTA_IIF"):
            value = names.get(value, value)
        elif attribute == "RTA_MULTIPATH":
            value = [
                (names.get(hop["oif"], hop["oif"]), hop["hops"], hop.get_attr("RTA_GATEWAY"), hop.get_attr("RTA_VIA"))
                for hop in value
            ]
        elif hasattr(value, "get_attr"):
            value = sorted((name, str(inner)) for name, inner in value["attrs"])
        words.append(f"{attribute.partition('_')[2].lower()} {value}")
    return "".join(f" {word}" for word in sorted(words))


# ---- BPF ----------------------------------------------------------------------------------------
def _programs(names: Mapping[int, str]) -> Iterator[str]:
    """Yield the programs linked to devices; none where nobody may use bpf(), as there none can be."""
    for index, name in names.items():
        for direction in bpf.Direction:
            try:
                programs = bpf.attached(index, direction)
            except KernelError as exc:
                if exc.errno == errno.EPERM:
                    return
                if exc.errno == errno.ENODEV:
                    continue  # gone since
                raise
            for number in programs:
                yield f"{name} {direction.name.lower()} program {number}"


# ---- nftables -----------------------------------------------------------------------------------
# Read by the attribute numbers of linux/netfilter/nf_tables.h and kept as bytes: nothing that a table of names does
# not know can hide.
_NFT = 10 << 8
_NFT_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_BODY = 20  # netlink header and struct nfgenmsg


def _nft(netlink: Netlink) -> Iterator[str]:
    for family, of in _nft_dump(netlink, 1):
        flags = int.from_bytes(of.get(2, b""), "big")
        yield f"table {family} {_text(of[1])} flags {flags}"
    for family, of in _nft_dump(netlink, 4):
        words = f"chain {family} {_text(of[1])} {_text(of[3])}"
        if 4 in of:
            hook = dict(attributes(of[4], 0))
            words += f" hook {_number(hook[1])} priority {_number(hook[2], signed=True)}"
            words += "".join(f" dev {_text(hook[3])}" if 3 in hook else "")
            words += "".join(f" dev {_text(name)}" for _, name in attributes(hook.get(4, b""), 0))
            words += f" type {_text(of.get(7, b''))} policy {_number(of.get(5, b''))}"
        yield words
    places: Counter[str] = Counter()
    for family, of in _nft_dump(netlink, 7):
        chain = f"{family} {_text(of[1])} {_text(of[2])}"
        places[chain] += 1
        yield f"rule {chain} {places[chain]}: {_expressions(of.get(4, b''))}{_note(of.get(7))}"
    sets = _nft_dump(netlink, 10)
    for family, of in sets:
        described = " ".join(f"{kind}={of[kind].hex()}" for kind in sorted(of) if kind not in _SET_SKIPPED)
        yield f"set {family} {_text(of[1])} {_text(of[2])} {described}"
    for family, of in sets:
        yield from _elements(netlink, family, of[1], of[2])
    for kind, word in ((19, "object"), (23, "flowtable")):
        try:
            found = _nft_dump(netlink, kind)
        except KernelError:
            continue  # not built into this kernel
        for family, of in found:
            name = of[2]
            detail = f" type {_number(of[3])}" if kind == 19 and 3 in of else ""
            yield f"{word} {family} {_text(of[1])} {_text(name)}{detail}"


_SET_SKIPPED = frozenset({1, 2, 10, 14, 16, 17, 18, 19, 20})
"""Table, name, the transaction's id, padding, handle, counters to be attached, kind of storage, number of elements."""

_ELEMENT_SKIPPED = frozenset({5, 7, 8, 11})
"""Expiration, attached expression (a counter), padding, list of expressions."""

_COUNTING = frozenset({"counter", "quota", "last", "limit", "connlimit"})


def _elements(netlink: Netlink, family: str, table: bytes, name: bytes) -> Iterator[str]:
    number = next(key for key, word in _NFT_FAMILIES.items() if word == family)
    body = struct.pack("=BBH", number, 0, 0) + _tlv(1, table) + _tlv(2, name)
    lines = []
    for message in netlink.dump(_NFT | 13, body):
        of = dict(attributes(message, _BODY))
        for _, element in attributes(of.get(3, b""), 0):
            parts = [f"{k}={v.hex()}" for k, v in sorted(attributes(element, 0)) if k not in _ELEMENT_SKIPPED]
            lines.append(f"element {family} {_text(table)} {_text(name)} {' '.join(parts)}")
    yield from sorted(lines)  # a hash set has no order of its own


def _nft_dump(netlink: Netlink, kind: int) -> list[tuple[str, dict[int, bytes]]]:
    found = []
    for message in netlink.dump(_NFT | kind, struct.pack("=BBH", 0, 0, 0)):
        family = _NFT_FAMILIES.get(message[16], str(message[16]))
        found.append((family, dict(attributes(message, _BODY))))
    return found


def _expressions(data: bytes) -> str:
    words = []
    for _, expression in attributes(data, 0):
        of = dict(attributes(expression, 0))
        name = _text(of.get(1, b""))
        words.append(name if name in _COUNTING else f"{name} {of.get(2, b'').hex()}".rstrip())
    return ", ".join(words)


def _note(userdata: bytes | None) -> str:
    return "" if userdata is None else f" userdata {userdata!r}"


def _tlv(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="backslashreplace")


def _number(data: bytes, *, signed: bool = False) -> int:
    return int.from_bytes(data, "big", signed=signed)


# ---- sysctls and files --------------------------------------------------------------------------
_MOVING = re.compile(
    r"/(nf_conntrack_count|stable_secret|tcp_fastopen_key|tcp_available_\w+|bpf_jit_\w+|fib_multipath_hash_seed|flush"
    r"|router_solicitations_left|optimistic_dad_left)$"
)
"""Counts, generated secrets, and lists of loaded modules."""

_OF_MODULES = re.compile(r"net/(netfilter/|nf_conntrack)")
"""Settings that exist from the first use of connection tracking on."""


def _sysctls(directory: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _sysctls(entry.path)
            elif not _MOVING.search(entry.path):
                try:
                    with open(entry.path) as file:
                        value = " ".join(file.read().split())
                except OSError:
                    continue  # write-only, or not for us
                yield f"{entry.path[10:]} = {value}"


def _settled(lines: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    """Leave out settings of a module that was loaded between the two observations."""
    known = {line.partition(" = ")[0] for line in other}
    return tuple(line for line in lines if not _OF_MODULES.match(line) or line.partition(" = ")[0] in known)


def _file(path: str) -> str:
    try:
        target = f" -> {os.readlink(path)}" if os.path.islink(path) else ""
        with open(path, "rb") as file:
            return f"{path}{target}: {file.read()!r}"
    except OSError as exc:
        return f"{path}: {exc.strerror}"
