"""What is measured: groups, each with the loads that are put on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from .load import Load


class Group(Enum):
    """A way to use a proxy; a contender is started once per group and round."""

    SOCKS5 = "socks5"
    POLICIES = "policies"
    RED = "red"
    TLS = "tls"
    UDP = "udp"
    REDU = "redu"
    TUNGO = "tungo"
    TUN = "tun"


class Unit(Enum):
    """What a rate counts."""

    BITS = "Gb/s"
    CONNECTIONS = "connections/s"
    EXCHANGES = "exchanges/s"
    DATAGRAMS = "datagrams/s"
    MEMORY = "KiB/connection"


@dataclass(frozen=True, slots=True)
class Case:
    """One figure: a load on a group."""

    group: Group
    name: str
    load: Load
    title: str

    @property
    def id(self) -> str:
        """`group.name`, as `--cases` takes it."""
        return f"{self.group.value}.{self.name}"

    @property
    def unit(self) -> Unit:
        """What its rate counts."""
        return {
            "download": Unit.BITS,
            "upload": Unit.BITS,
            "short": Unit.CONNECTIONS,
            "exchange": Unit.EXCHANGES,
            "udp": Unit.DATAGRAMS,
            "idle": Unit.MEMORY,
        }[self.load.mode]

    @property
    def cpu_unit(self) -> str:
        """What its CPU figure counts: seconds for bytes, microseconds for operations."""
        return "s/GiB" if self.unit is Unit.BITS else "us"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _bulk(group: Group, streams: int, title: str) -> Case:
    return Case(group, f"bulk-{streams}", Load("download", streams=streams), f"{title}, {_count(streams, 'stream')}")


def _udp(group: Group, flows: int, window: int, size: int, title: str) -> Case:
    load = Load("udp", streams=flows, window=window, size=size)
    return Case(group, f"flows-{flows}", load, f"{title}, {_count(flows, 'flow')} of {size} B")


CASES: tuple[Case, ...] = (
    _bulk(Group.SOCKS5, 1, "SOCKS5"),
    _bulk(Group.SOCKS5, 50, "SOCKS5"),
    Case(Group.SOCKS5, "short", Load("short", streams=32), "SOCKS5, short connections, 32 at a time"),
    Case(Group.SOCKS5, "exchange", Load("exchange", streams=32), "SOCKS5, 100 B and back, 32 open"),
    Case(Group.SOCKS5, "latency", Load("exchange"), "SOCKS5, 100 B and back, 1 open"),
    Case(Group.SOCKS5, "idle", Load("idle", streams=2000), "SOCKS5, memory of an idle connection"),
    Case(Group.SOCKS5, "udp", Load("udp", streams=8, window=32, size=200), "SOCKS5, 8 associations, 200 B"),
    Case(
        Group.POLICIES,
        "short",
        Load("short", streams=32),
        "SOCKS5 with admission, user, bypass, statistics and a log line, short connections",
    ),
    _bulk(Group.RED, 1, "REDIRECT"),
    _bulk(Group.RED, 50, "REDIRECT"),
    Case(Group.RED, "short", Load("short", streams=32), "REDIRECT, short connections, 32 at a time"),
    _bulk(Group.TLS, 1, "TLS, both ends"),
    _bulk(Group.TLS, 16, "TLS, both ends"),
    Case(Group.TLS, "short", Load("short", streams=16), "TLS, both ends, new tunnels"),
    Case(Group.TLS, "exchange", Load("exchange", streams=16), "TLS, both ends, 100 B and back, 16 open"),
    _udp(Group.UDP, 1, 64, 1200, "UDP forward"),
    _udp(Group.UDP, 8, 32, 200, "UDP forward"),
    _udp(Group.UDP, 64, 4, 200, "UDP forward"),
    Case(Group.UDP, "latency", Load("udp", window=1), "UDP forward, 1 datagram and back"),
    _udp(Group.REDU, 8, 32, 200, "UDP by TPROXY"),
    Case(Group.TUNGO, "download", Load("download"), "TUN to SOCKS5, download"),
    Case(Group.TUNGO, "upload", Load("upload"), "TUN to SOCKS5, upload"),
    Case(Group.TUNGO, "short", Load("short", streams=16), "TUN to SOCKS5, short connections"),
    _bulk(Group.TUN, 1, "TUN over UDP"),
    _bulk(Group.TUN, 8, "TUN over UDP"),
    Case(Group.TUN, "exchange", Load("exchange", streams=32), "TUN over UDP, 100 B and back, 32 open"),
    Case(Group.TUN, "latency", Load("exchange"), "TUN over UDP, 100 B and back, 1 open"),
)


def choose(patterns: Iterable[str]) -> list[Case]:
    """Return the cases whose id or group one of the patterns fits. Raise ValueError for one that fits nothing."""
    chosen = set()
    for pattern in patterns:
        found = {case for case in CASES if fnmatchcase(case.id, pattern) or case.group.value == pattern}
        if not found:
            raise ValueError(f"no case fits {pattern!r}; there are {', '.join(case.id for case in CASES)}")
        chosen |= found
    return [case for case in CASES if case in chosen]
