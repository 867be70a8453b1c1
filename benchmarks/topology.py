"""The network of the benchmarks: client - gateway - server, in namespaces of this process, over veth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gostnet.core.errors import KernelError
from gostnet.testing.namespaces import Network, row, write_sysctl

ROLES = ("client", "gateway", "server")

CLIENT = "10.99.1.1"
GATEWAY = "10.99.1.2"
GATEWAY_OUT = "10.99.2.1"
SERVER = "10.99.2.2"

ORIGIN_PORT = 9000
ORIGIN = f"{SERVER}:{ORIGIN_PORT}"
"""The origin server: TCP and UDP."""

_SYSCTLS: dict[str, str | int] = {
    # Short connections are not to wait for ports: many of them, used again soon.
    "net/ipv4/ip_local_port_range": "2048 64999",
    "net/ipv4/tcp_tw_reuse": 1,
    "net/ipv4/tcp_max_tw_buckets": 2000,
    "net/core/somaxconn": 65535,
    "net/ipv4/tcp_max_syn_backlog": 65535,
    "net/ipv4/tcp_syncookies": 0,
    # BBR paces, which veth answers with noise.
    "net/ipv4/tcp_congestion_control": "reno",
}


@contextmanager
def network() -> Iterator[Network]:
    """Build the three hosts and take them away again. Raise KernelError without root."""
    with Network(row(*ROLES)) as built:
        for role in ROLES:
            for key, value in _SYSCTLS.items():
                try:
                    write_sysctl(built[role], key, value)
                except KernelError:
                    continue  # what this kernel does not have in namespaces is the same for all contenders
        yield built


def kernel() -> str:
    """Return the kernel's release."""
    return Path("/proc/sys/kernel/osrelease").read_text().strip()
