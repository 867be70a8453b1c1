"""What this host can do for gostnet, found out by trying: one table of capabilities, each with what depends on it.

Whatever a trial would change is changed in a network namespace made for it and gone afterwards. Where none can be made,
what needs one is not tried, and that is said.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, Literal

from gostnet.core.errors import GostnetError, KernelError
from gostnet.core.packets import Medium
from gostnet.core.resources import (
    FIRST_TABLE,
    MARK_DIVERTED,
    MARK_MASK,
    Link,
    NftChain,
    NftRule,
    NftSet,
    Route,
    Rule,
)
from gostnet.core.sockets import IPPROTO_MPTCP
from gostnet.dataplane.native import library
from gostnet.dataplane.pipes import PIPE_SIZE
from gostnet.dataplane.tun_device import open_device, set_offload

from . import netns, sysctl
from . import nft_expr as expr
from .bounce import Bounce, Method
from .bpf import loading_problem
from .live import LiveKernel
from .nft import Nft, Transaction

State = Literal["yes", "no", "unknown"]

_TABLE = "gostnet-doctor"
_DEVICE = "gn-doctor"
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_TCP_ULP = 31
_UDP_SEGMENT, _UDP_GRO = 103, 104
_TUN_F_CSUM, _TUN_F_TSO, _TUN_F_USO = 0x1, 0x2 | 0x4, 0x20 | 0x40
_F_SETPIPE_SZ = 1031
_DESCRIPTORS: Final = 65536
"""Two for each connection, and a file or two: what a busy service of 30,000 connections wants."""

_MODULE = "a kernel with the option {0}, and its module loaded (modprobe {1})"
_ADMIN = "run as root, or with CAP_NET_ADMIN (systemd: AmbientCapabilities=CAP_NET_ADMIN)"


class Missing(Exception):
    """A trial has failed; `str()` of it is the reason."""


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing that a host may be able to do.

    uses       what it is good for
    without    what happens where it is not there
    get        how it comes to be there
    attempt    tries; returns a detail to be shown, "" for none; raises Missing, OSError or GostnetError
    private    the trial makes changes: it is made in a namespace of its own
    """

    name: str
    uses: str
    without: str
    get: str
    attempt: Callable[[], str]
    private: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a trial; `detail` says more of a yes, and why of a no."""

    capability: Capability
    state: State
    detail: str = ""


# ---- privileges ---------------------------------------------------------------------------------
def _mark() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK_DIVERTED)
    return ""


def _raw() -> str:
    for family in (socket.AF_INET, socket.AF_INET6) if socket.has_ipv6 else (socket.AF_INET,):
        socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW).close()
    return ""


def _transparent() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
    return ""


def first_open_port() -> int:
    """Return the first port that takes no privilege to listen on."""
    return int(sysctl.read("net.ipv4.ip_unprivileged_port_start") or 1024)


def _low_ports() -> str:
    first = first_open_port()
    for port in range(first - 1, max(0, first - 33), -1):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
            else:
                break
    return f"below {first}" if first > 1 else "all ports are open to everybody"


def _namespace() -> str:
    netns.anonymous().close()
    return ""


def _pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return ""


def _descriptors() -> str:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < _DESCRIPTORS:
        raise Missing(f"the hard limit is {hard}")
    return "unlimited" if hard == resource.RLIM_INFINITY else str(hard)


# ---- nftables -----------------------------------------------------------------------------------
@contextmanager
def _owned() -> Iterator[Nft]:
    with Nft() as nft:
        transaction = Transaction()
        transaction.add_table(_TABLE, owner=True)
        nft.commit(transaction)
        yield nft


def _owner() -> str:
    with _owned() as nft:
        if not any(table.name == _TABLE and table.owner == nft.port for table in nft.tables()):
            raise Missing("the kernel does not say that the table is ours")
        port = nft.port
    with Nft() as other:
        if any(table.name == _TABLE for table in other.tables()):
            raise Missing(f"the table of socket {port} has outlived it")
    return ""


def _rule(chain: NftChain, *terms: expr.Term, sets: Sequence[NftSet] = ()) -> Callable[[], str]:
    """Return a trial of a rule made of terms."""

    def attempt() -> str:
        text, code = expr.compose(*terms)
        with _owned() as nft:
            transaction = Transaction()
            for of in sets:
                transaction.add_set(_TABLE, of)
            transaction.add_chain(_TABLE, chain)
            transaction.add_rule(_TABLE, NftRule(chain.name, text, code))
            nft.commit(transaction)
        return ""

    return attempt


def _sets() -> str:
    ranges = {"ipv4_addr": "192.0.2.0/24", "ipv6_addr": "2001:db8::/32", "inet_service": "8000-8100"}
    with _owned() as nft:
        for kind, element in ranges.items():
            transaction = Transaction()
            transaction.add_set(_TABLE, NftSet(kind, kind, (element,)))  # type: ignore[arg-type]  # one of the three
            nft.commit(transaction)
    return ""


def _timeouts() -> str:
    """Put an address into a set for a moment, twice, and see it go."""
    of = NftSet("names", "ipv4_addr", (), timeout=60, size=16)
    with _owned() as nft:
        transaction = Transaction()
        transaction.add_set(_TABLE, of)
        nft.commit(transaction)
        for seconds in (60.0, 0.001):
            transaction = Transaction()
            transaction.renew_elements(_TABLE, of.name, [(bytes((192, 0, 2, 1)), seconds)])
            nft.commit(transaction)
        deadline = time.monotonic() + 1.0
        while nft.elements(_TABLE, of.name):
            if time.monotonic() > deadline:
                raise Missing("an address stays longer than its timeout")
            time.sleep(0.001)
    return ""


_NAT = NftChain("c", "prerouting", "nat", -95)
_FILTER = NftChain("c", "prerouting", "filter", -95)
_SOURCES = NftChain("c", "postrouting", "nat", 100)
_FORWARDED = NftChain("c", "forward", "filter", -150)


# ---- routing and devices ------------------------------------------------------------------------
def _policy_routing() -> str:
    kernel = LiveKernel()
    try:
        versions: list[Literal[4, 6]] = [4, 6] if kernel.has_ipv6() else [4]
        kernel.put(Link("lo", 65536), None)
        for number in versions:
            kernel.put(Route("0.0.0.0/0" if number == 4 else "::/0", FIRST_TABLE, "local", "lo"), None)
            rule = Rule(number, FIRST_TABLE, FIRST_TABLE, MARK_DIVERTED, MARK_MASK, _DEVICE)
            kernel.put(rule, None)
            if kernel.observe(rule) != rule:
                raise Missing("a rule that was made is not there")
    finally:
        kernel.close()
    return "" if len(versions) == 2 else "IPv4 only"


def _device(medium: Medium, features: int = 0, words: str = "") -> Callable[[], str]:
    """Return a trial of a device, with offloads if there are `features`, which `words` names."""

    def attempt() -> str:
        descriptor, _ = open_device(_DEVICE, medium, vnet_header=bool(features))
        try:
            if features and not set_offload(descriptor, features):
                raise Missing(f"the kernel does not know {words}")
        finally:
            os.close(descriptor)
        return ""

    return attempt


def _bpf() -> str:
    problem = loading_problem()
    if problem:
        raise Missing(problem)
    return ""


def _bounce(method: Method) -> Callable[[], str]:
    def attempt() -> str:
        descriptor, name = open_device(_DEVICE)
        try:
            Bounce(name, method).close()
        finally:
            os.close(descriptor)
        return ""

    return attempt


# ---- bytes --------------------------------------------------------------------------------------
@contextmanager
def _connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        near = stack.enter_context(socket.create_connection(listening.getsockname(), timeout=2.0))
        far = stack.enter_context(listening.accept()[0])
        far.settimeout(2.0)
        yield near, far


def _splice() -> str:
    with _connected() as (near, far), ExitStack() as stack:
        read, write = os.pipe()
        stack.callback(os.close, read)
        stack.callback(os.close, write)
        near.sendall(b"through a pipe")
        far.recv(1, socket.MSG_PEEK)
        size = os.splice(far.fileno(), write, 100)
        os.splice(read, far.fileno(), size)
        if near.recv(100) != b"through a pipe":
            raise Missing("what came out is not what went in")
    return ""


def _pipes() -> str:
    read, write = os.pipe()
    try:
        fcntl.fcntl(write, _F_SETPIPE_SZ, PIPE_SIZE)
    finally:
        os.close(read)
        os.close(write)
    return f"{PIPE_SIZE >> 10} KiB each"


def _datagrams(option: int) -> Callable[[], str]:
    """Return a trial of one of the two: three datagrams, sent as one train (UDP_SEGMENT), or received as one too."""

    def attempt() -> str:
        joined = option == _UDP_GRO
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near,
        ):
            far.bind(("127.0.0.1", 0))
            far.settimeout(2.0)
            if joined:
                far.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
            near.connect(far.getsockname())
            near.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 100)
            near.send(bytes(300))
            size = len(far.recv(65535))
            if size != (300 if joined else 100):
                raise Missing(f"three datagrams of 100 bytes arrived as one of {size}")
        return ""

    return attempt


def _ktls() -> str:
    with _connected() as (near, _):
        near.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
    return ""


def _mptcp() -> str:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    return ""


def _ipv6() -> str:
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        sock.bind(("::1", 0))
    return ""


def _uvloop() -> str:
    try:
        import uvloop
    except ImportError as exc:
        raise Missing(str(exc)) from exc
    uvloop.new_event_loop().close()
    return version("uvloop")


def _native() -> str:
    found, reason = library.load()
    if found is None:
        raise Missing(reason)
    return ""


# ---- the table ----------------------------------------------------------------------------------
_CAPTURE = "every capture"
_REFUSED = "the service is refused at the start"

CAPABILITIES: Final[tuple[Capability, ...]] = (
    Capability("net-admin", "marks of own sockets, captures, devices", _REFUSED, _ADMIN, _mark),
    Capability(
        "raw-sockets",
        "answers to captured UDP, ping through tungo",
        _REFUSED,
        "run as root, or with CAP_NET_RAW",
        _raw,
    ),
    Capability(
        "low-ports",
        "services at ports that take a privilege (below 1024)",
        _REFUSED,
        "run as root, or with CAP_NET_BIND_SERVICE, or lower the sysctl net.ipv4.ip_unprivileged_port_start",
        _low_ports,
    ),
    Capability("transparent", "capture by TPROXY (IP_TRANSPARENT)", _REFUSED, _ADMIN, _transparent),
    Capability(
        "namespaces",
        "services in network namespaces; the lab; the trials here",
        "services with netns are refused; the lab makes a user namespace of its own where that is allowed",
        "run as root, or with CAP_SYS_ADMIN",
        _namespace,
    ),
    Capability("pidfd", "the guard that restores the host after kill -9", _REFUSED, "Linux 5.3", _pidfd),
    Capability(
        "nft-owner",
        f"{_CAPTURE}: a table that goes with the daemon",
        _REFUSED,
        "Linux 5.12, " + _MODULE.format("NF_TABLES_INET", "nf_tables"),
        _owner,
        True,
    ),
    Capability("nft-sets", f"{_CAPTURE}: lists of networks and ports", _REFUSED, "NF_TABLES", _sets, True),
    Capability(
        "nft-timeouts",
        "direct.names: addresses of names that go directly stay in the kernel",
        "engine kernel gives way to user: what goes directly by name goes through the daemon",
        "NF_TABLES",
        _timeouts,
        True,
    ),
    Capability(
        "nft-conntrack",
        f"{_CAPTURE}: replies and older connections are left alone",
        _REFUSED,
        _MODULE.format("NFT_CT, NF_CONNTRACK_MARK", "nft_ct"),
        _rule(_FILTER, expr.reply(), expr.set_connection_mark(1)),
        True,
    ),
    Capability(
        "nft-fib",
        f"{_CAPTURE}: what is for this host is left alone",
        _REFUSED,
        _MODULE.format("NFT_FIB_INET", "nft_fib_inet"),
        _rule(
            _FILTER,
            expr.address_type_in("here"),
            expr.accept(),
            sets=(NftSet("here", "fib_addrtype", ("local", "broadcast")),),
        ),
        True,
    ),
    Capability(
        "nft-redirect",
        "capture by REDIRECT (red)",
        "set tproxy: true",
        _MODULE.format("NFT_REDIR", "nft_redir"),
        _rule(_NAT, expr.protocol(expr.TCP), expr.redirect(1)),
        True,
    ),
    Capability(
        "nft-tproxy",
        "capture by TPROXY (redu, tungo, red with tproxy: true)",
        "TCP can be captured by REDIRECT; UDP cannot",
        _MODULE.format("NFT_TPROXY", "nft_tproxy"),
        _rule(_FILTER, expr.protocol(expr.TCP), expr.hand_over(1)),
        True,
    ),
    Capability(
        "nft-socket",
        "TCP by TPROXY: a connection stays with its socket",
        "set tproxy: false",
        _MODULE.format("NFT_SOCKET", "nft_socket"),
        _rule(_FILTER, expr.protocol(expr.TCP), expr.transparent_connection()),
        True,
    ),
    Capability(
        "nft-dnat",
        "port forwards by the kernel; red at one address",
        "use engine: user; let red listen at all addresses",
        _MODULE.format("NFT_NAT", "nft_nat"),
        _rule(_NAT, expr.ip_version(4), expr.protocol(expr.TCP), expr.redirect(1, "192.0.2.1")),
        True,
    ),
    Capability(
        "nft-masquerade",
        "masquerade of tun; direct: kernel; port forwards by the kernel",
        "the services that ask for it are refused",
        _MODULE.format("NFT_MASQ", "nft_masq"),
        _rule(_SOURCES, expr.masquerade()),
        True,
    ),
    Capability(
        "nft-clamp",
        "masquerade of tun: segments of forwarded TCP fit",
        "the services that ask for it are refused",
        "Linux 4.14, NF_TABLES_INET",
        _rule(_FORWARDED, expr.clamp_segments()),
        True,
    ),
    Capability(
        "policy-routing",
        "capture by TPROXY, routes into tungo",
        "TCP can be captured by REDIRECT; UDP cannot",
        "a kernel with IP_MULTIPLE_TABLES and IPV6_MULTIPLE_TABLES",
        _policy_routing,
        True,
    ),
    Capability("tun", "tun, tungo", _REFUSED, _MODULE.format("TUN", "tun"), _device(Medium.IP), True),
    Capability("tap", "tap", _REFUSED, _MODULE.format("TUN", "tun"), _device(Medium.ETHERNET), True),
    Capability(
        "tun-tso",
        "TCP in large pieces through a device (TSO with a virtio header)",
        "one packet at a time: several times the processor time",
        "Linux 2.6.27",
        _device(Medium.IP, _TUN_F_CSUM | _TUN_F_TSO, "TSO"),
        True,
    ),
    Capability(
        "tun-uso",
        "UDP in large pieces through a device",
        "one datagram at a time",
        "Linux 6.2",
        _device(Medium.IP, _TUN_F_CSUM | _TUN_F_TSO | _TUN_F_USO, "USO"),
        True,
    ),
    Capability(
        "bpf",
        "the engines tcx of tungo and kernel of tun",
        "engine tcx gives way to clsact or nat (tungo), kernel to pump (tun)",
        "run as root, or with CAP_BPF and CAP_NET_ADMIN; a kernel with BPF_SYSCALL",
        _bpf,
    ),
    Capability(
        "tcx",
        "the engines tcx of tungo and kernel of tun",
        "engine tcx gives way to clsact or nat (tungo), kernel to pump (tun)",
        "Linux 6.6 with NET_XGRESS, and bpf",
        _bounce("tcx"),
        True,
    ),
    Capability(
        "clsact",
        "the engine clsact of tungo",
        "engine clsact gives way to nat: packets pass through the daemon",
        _MODULE.format("NET_CLS_ACT, NET_CLS_U32, NET_ACT_MIRRED", "act_mirred"),
        _bounce("clsact"),
        True,
    ),
    Capability(
        "udp-segment",
        "UDP: many datagrams in one call",
        "one call for each datagram",
        "Linux 4.18",
        _datagrams(_UDP_SEGMENT),
    ),
    Capability(
        "udp-gro",
        "UDP: many datagrams in one call",
        "one call for each datagram",
        "Linux 5.0",
        _datagrams(_UDP_GRO),
    ),
    Capability(
        "splice",
        "TCP relay without copies",
        "engine splice gives way to copy: bytes pass through the daemon",
        "Linux 2.6.17; MPTCP sockets need a later one",
        _splice,
    ),
    Capability(
        "pipes",
        "TCP relay: pipes large enough for full speed",
        "pipes of 64 KiB: about half the rate; of less than 16 KiB: engine splice gives way to copy",
        "raise the sysctls fs.pipe-max-size and fs.pipe-user-pages-soft",
        _pipes,
    ),
    Capability(
        "native",
        "TCP relay and UDP sessions in threads of their own",
        "engine native gives way to splice for TCP, to copy for UDP: one processor, in the loop's thread",
        "a C compiler when gostnet is installed, or make native; GOSTNET_NATIVE not 0",
        _native,
    ),
    Capability("ktls", "nothing yet: TLS is in user space", "no difference", _MODULE.format("TLS", "tls"), _ktls),
    Capability(
        "mptcp",
        "listeners with mptcp: true",
        "plain TCP",
        "a kernel with MPTCP, and the sysctl net.mptcp.enabled=1",
        _mptcp,
    ),
    Capability(
        "ipv6",
        "IPv6",
        "IPv4 only; captured IPv6 is dropped",
        "the sysctls net.ipv6.conf.all.disable_ipv6=0 and net.ipv6.conf.lo.disable_ipv6=0",
        _ipv6,
    ),
    Capability("uvloop", "a faster event loop", "engine uvloop gives way to asyncio", "pip install uvloop", _uvloop),
    Capability(
        "descriptors",
        f"files: two a connection, {_DESCRIPTORS} wanted",
        "connections beyond the limit are refused",
        "ulimit -Hn, or LimitNOFILE= of the systemd unit",
        _descriptors,
    ),
)


def examine(capabilities: Sequence[Capability] = CAPABILITIES) -> list[Finding]:
    """Try every capability; nothing of the host is changed. Must not run inside an event loop: trials take 0.1 s."""
    findings = []
    with ExitStack() as stack:
        place: netns.Namespace | None = None
        problem = ""
        try:
            place = stack.enter_context(netns.anonymous())
        except KernelError as exc:
            problem = str(exc)
        for capability in capabilities:
            if not capability.private:
                findings.append(_try(capability))
            elif place is not None:
                with netns.inside(place):
                    findings.append(_try(capability))
            else:
                findings.append(_without_place(capability, problem))
    return findings


def _try(capability: Capability) -> Finding:
    try:
        return Finding(capability, "yes", capability.attempt())
    except (Missing, GostnetError) as exc:
        return Finding(capability, "no", str(exc))
    except OSError as exc:
        return Finding(capability, "no", os.strerror(exc.errno) if exc.errno else str(exc))


def _without_place(capability: Capability, problem: str) -> Finding:
    """Say no where the privilege for the thing itself is missing; with it, a trial would touch the host."""
    try:
        _mark()
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES):
            return Finding(capability, "no", "needs CAP_NET_ADMIN")
    return Finding(capability, "unknown", f"not tried, as that takes a network namespace of its own: {problem}")
