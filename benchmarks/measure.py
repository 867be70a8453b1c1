"""What a set of processes has used: CPU and memory, with all their descendants."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """Return the process and all its descendants that live."""
    found = [pid]
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except OSError:
            continue
        for child in children:
            found += tree(int(child))
    return found


def cpu(pids: Iterable[int]) -> float:
    """Return the CPU seconds that the trees have used, kernel included; those of the dead are with their parents."""
    ticks = 0
    for pid in pids:
        for member in tree(pid):
            try:
                fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            own_and_waited_for = fields[11:15]  # utime stime cutime cstime
            ticks += sum(map(int, own_and_waited_for))
    return ticks / _TICK


def machine_cpu() -> float:
    """Return the CPU seconds that the whole machine has been busy: work that no process is charged for included."""
    user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split(None, 9)[1:9])
    return (user + nice + system + irq + softirq) / _TICK


def memory(pids: Iterable[int]) -> int:
    """Return the resident KiB of the trees."""
    total = 0
    for pid in pids:
        for member in tree(pid):
            try:
                for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Rss:"):
                        total += int(line.split()[1])
            except OSError:
                continue
    return total


def listens(pid: int, port: int, protocol: str = "tcp") -> bool:
    """Tell whether somebody in the namespace of `pid` listens on the port (UDP: has bound it)."""
    for name in (protocol, f"{protocol}6"):
        try:
            rows = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, *_ = row.split()
            if int(local.rpartition(":")[2], 16) == port and (protocol == "udp" or state == "0A"):
                return True
    return False


def has_device(pid: int, device: str) -> bool:
    """Tell whether the namespace of `pid` has a network device of this name."""
    try:
        return f"{device}:" in Path(f"/proc/{pid}/net/dev").read_text()
    except OSError:
        return False
