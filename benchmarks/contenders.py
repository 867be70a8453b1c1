"""Who is measured: how each contender is found, set up for a group, and asked for its version. All log errors only."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .cases import Case, Group
from .topology import CLIENT, GATEWAY, ORIGIN, ORIGIN_PORT, SERVER

PORT = 1080
BACK_PORT = 8600
UPSTREAM = f"{GATEWAY}:1190"
TUN_PORT = 8421
TUN_MTU = 1400
INSIDE = ("172.20.0.1", "172.20.0.2")
DEVICE = "gnbench0"


@dataclass(frozen=True, slots=True)
class Program:
    """A process of a contender. It is ready once it listens on `port`, or `device` is there, and `probe` succeeds.

    measured   its CPU and memory count
    """

    arguments: tuple[str, ...]
    role: str = "gateway"
    port: int = 0
    protocol: str = "tcp"
    device: str = ""
    probe: tuple[str, ...] = ()
    measured: bool = True


@dataclass(frozen=True, slots=True)
class Command:
    """Something to run to its end on a host; `text` is its standard input."""

    role: str
    arguments: tuple[str, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Setup:
    """A contender made ready for a group.

    target        where the client connects to, through the SOCKS5 proxy `socks` if given
    prepare       run once the programs are ready
    undo          run when they have ended
    kernel_moves  the kernel may do the work without the processes using CPU
    """

    target: str = ORIGIN
    socks: str = ""
    login: str = ""
    programs: tuple[Program, ...] = ()
    prepare: tuple[Command, ...] = ()
    undo: tuple[Command, ...] = ()
    kernel_moves: bool = False


SetUp = Callable[[str, Path], Setup]
"""Takes the contender's binary and a directory for its files."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One that is measured: its binary by an environment variable or on PATH ("" needs none), and what it can do.

    version   arguments that make it tell its version
    needs     other programs without which it cannot be measured
    only      patterns of the cases that it is measured under, of those of its groups
    """

    name: str
    binary: str
    variable: str
    version: tuple[str, ...]
    groups: dict[Group, SetUp]
    needs: tuple[str, ...] = field(default=())
    only: tuple[str, ...] = ("*",)

    def takes(self, case: Case) -> bool:
        """Tell whether it is measured under a case."""
        return case.group in self.groups and any(fnmatchcase(case.id, pattern) for pattern in self.only)

    def find(self) -> str | None:
        """Return the binary's path, None if it is not here."""
        if not self.binary:
            return ""
        found = os.environ.get(self.variable) or shutil.which(
            self.binary, path=os.environ.get("PATH", "") + ":/usr/sbin"
        )
        return found if found and all(shutil.which(need) for need in self.needs) else None

    def version_of(self, path: str) -> str:
        """Return what it says of its version, "" if it does not."""
        if not self.version:
            return ""
        try:
            done = subprocess.run([path, *self.version], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        words = (done.stdout or done.stderr).strip().splitlines()
        found = re.search(r"v?\d+(\.\d+)+\S*", words[0] if words else "")
        return found[0] if found else ""


# ---- what several need ---------------------------------------------------------------------------
def _write(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


def _json(directory: Path, name: str, content: dict[str, Any]) -> str:
    return _write(directory, name, json.dumps(content))


def _nft(role: str, rules: str) -> Command:
    return Command(role, ("nft", "-f", "-"), rules + "\n")


def _redirected(port: int) -> tuple[tuple[Command, ...], tuple[Command, ...]]:
    rules = f"""table ip bench {{
        chain pre {{
            type nat hook prerouting priority dstnat
            iifname lan0 tcp dport {ORIGIN_PORT} redirect to :{port}
        }}
    }}"""
    return (_nft("gateway", rules),), (_nft("gateway", "delete table ip bench"),)


def _ip(role: str, *words: str) -> Command:
    return Command(role, ("ip", *words))


def _tproxied(port: int) -> tuple[tuple[Command, ...], tuple[Command, ...]]:
    rules = f"""table ip bench {{
        chain pre {{
            type filter hook prerouting priority mangle
            iifname lan0 udp dport {ORIGIN_PORT} tproxy to :{port} meta mark set 1
        }}
    }}"""
    rule = ("fwmark", "1", "lookup", "100")
    local = ("local", "default", "dev", "lo", "table", "100")
    prepare = (_nft("gateway", rules), _ip("gateway", "rule", "add", *rule), _ip("gateway", "route", "add", *local))
    undo = (
        _nft("gateway", "delete table ip bench"),
        _ip("gateway", "rule", "del", *rule),
        _ip("gateway", "route", "del", *local),
    )
    return prepare, undo


def _route_into_device(address: str = "") -> tuple[Command, ...]:
    commands = (
        _ip("client", "link", "set", DEVICE, "up"),
        _ip("client", "route", "replace", f"{SERVER}/32", "dev", DEVICE),
    )
    return (_ip("client", "addr", "replace", address, "dev", DEVICE), *commands) if address else commands


_GOSTNET = (sys.executable, "-m", "gostnet")


def _upstream(directory: Path) -> Program:
    """The SOCKS5 server behind every TUN-to-SOCKS5 contender: always the same one.

    It declines TLS inside the dialogue, which some of them offer and others do not: what is measured is the device.
    """
    handler = {"type": "socks5", "metadata": {"notls": True}}
    service = {"name": "u", "addr": ":1190", "handler": handler, "listener": {"type": "tcp"}}
    config = _gost_config(directory, "upstream.json", [service])
    return Program((*_GOSTNET, "-C", config), port=1190, measured=False)


# ---- the kernel itself ---------------------------------------------------------------------------
def _direct(_: str, directory: Path) -> Setup:
    return Setup()


def _direct_tungo(_: str, directory: Path) -> Setup:
    """The limit of TUN to SOCKS5: a client that speaks SOCKS5 itself."""
    return Setup(socks=UPSTREAM, programs=(_upstream(directory),))


# ---- gost and gostnet: one configuration for both -------------------------------------------------
def _gost_config(
    directory: Path, name: str, services: list[dict[str, Any]], chain: dict[str, Any] | None = None
) -> str:
    content: dict[str, Any] = {"log": {"level": "error", "output": "none"}, "services": services}
    if chain is not None:
        content["chains"] = [{"name": "c", "hops": [{"name": "h", "nodes": [{"name": "n", **chain}]}]}]
    return _json(directory, name, content)


def _command(binary: str) -> tuple[str, ...]:
    return (binary,) if binary else _GOSTNET


def _service(handler: dict[str, Any], listener: dict[str, Any], port: int = PORT, **more: Any) -> dict[str, Any]:
    return {"name": "s", "addr": f":{port}", "handler": handler, "listener": listener, **more}


_FORWARD: dict[str, Any] = {"forwarder": {"nodes": [{"name": "t", "addr": ORIGIN}]}}


def _gost_socks5(binary: str, directory: Path) -> Setup:
    handler = {"type": "socks5", "metadata": {"udp": True}}
    config = _gost_config(directory, "socks5.json", [_service(handler, {"type": "tcp"})])
    program = Program((*_command(binary), "-C", config), port=PORT)
    return Setup(socks=f"{GATEWAY}:{PORT}", programs=(program,))


def _gost_policies(binary: str, directory: Path) -> Setup:
    """What a proxy for users has: who may connect, who they are, where they may not go, and what is noted of it."""
    user, password = "user", "a password"
    service = _service(
        {"type": "socks5", "auther": "users"},
        {"type": "tcp"},
        admission="lan",
        bypass="inside",
        metadata={"enableStats": True},
    )
    content = {
        "log": {"level": "info", "format": "json", "output": str(directory / "log")},
        "services": [service],
        "authers": [{"name": "users", "auths": [{"username": user, "password": password}]}],
        "admissions": [{"name": "lan", "whitelist": True, "matchers": ["127.0.0.0/8", "10.0.0.0/8"]}],
        "bypasses": [{"name": "inside", "matchers": ["192.168.0.0/16", "*.internal.example"]}],
    }
    program = Program((*_command(binary), "-C", _json(directory, "policies.json", content)), port=PORT)
    return Setup(socks=f"{GATEWAY}:{PORT}", login=f"{user}:{password}", programs=(program,))


def _gost_red(binary: str, directory: Path) -> Setup:
    config = _gost_config(directory, "red.json", [_service({"type": "red"}, {"type": "red"})])
    prepare, undo = _redirected(PORT)
    program = Program((*_command(binary), "-C", config), port=PORT)
    return Setup(programs=(program,), prepare=prepare, undo=undo)


_CAPTURING = ("nft", "list", "table", "inet", "gostnet-default")


def _gostnet_red(binary: str, directory: Path) -> Setup:
    """Captures by itself, as users have it, shortly after it listens."""
    metadata = {"capture": ["lan0"], "capture.ports": str(ORIGIN_PORT)}
    config = _gost_config(directory, "red.json", [_service({"type": "red"}, {"type": "red", "metadata": metadata})])
    return Setup(programs=(Program((*_command(binary), "-C", config), port=PORT, probe=_CAPTURING),))


def _gost_tls(binary: str, directory: Path) -> Setup:
    node = {"addr": f"{SERVER}:{BACK_PORT}", "connector": {"type": "relay"}, "dialer": {"type": "tls"}}
    front = _service({"type": "tcp", "chain": "c"}, {"type": "tcp"}, **_FORWARD)
    back = _service({"type": "relay"}, {"type": "tls"}, port=BACK_PORT)
    back_config = _gost_config(directory, "back.json", [back])
    front_config = _gost_config(directory, "front.json", [front], node)
    programs = (
        Program((*_command(binary), "-C", back_config), role="server", port=BACK_PORT),
        Program((*_command(binary), "-C", front_config), port=PORT),
    )
    return Setup(target=f"{GATEWAY}:{PORT}", programs=programs)


def _gost_udp(binary: str, directory: Path) -> Setup:
    listener = {"type": "udp", "metadata": {"keepalive": True, "ttl": "30s", "readQueueSize": 1024, "backlog": 1024}}
    config = _gost_config(directory, "udp.json", [_service({"type": "udp"}, listener, **_FORWARD)])
    program = Program((*_command(binary), "-C", config), port=PORT, protocol="udp")
    return Setup(target=f"{GATEWAY}:{PORT}", programs=(program,))


def _gost_redu(binary: str, directory: Path) -> Setup:
    config = _gost_config(directory, "redu.json", [_service({"type": "redu"}, {"type": "redu"})])
    prepare, undo = _tproxied(PORT)
    program = Program((*_command(binary), "-C", config), port=PORT, protocol="udp")
    return Setup(programs=(program,), prepare=prepare, undo=undo)


def _gostnet_redu(binary: str, directory: Path) -> Setup:
    metadata = {"capture": ["lan0"], "capture.ports": str(ORIGIN_PORT)}
    config = _gost_config(directory, "redu.json", [_service({"type": "redu"}, {"type": "redu", "metadata": metadata})])
    program = Program((*_command(binary), "-C", config), port=PORT, protocol="udp", probe=_CAPTURING)
    return Setup(programs=(program,))


_ROUTED_INTO_DEVICE = ("sh", "-c", f"ip route get {SERVER} | grep -q {DEVICE}")
"""Before the route is there the client would reach the origin past the device."""


def _gost_tungo(binary: str, directory: Path) -> Setup:
    """gost makes the device and leaves address and route to its user; gostnet sees to them."""
    metadata = {"name": DEVICE, "net": "172.19.0.1/30", "mtu": 1500, "route": f"{SERVER}/32"}
    service = {
        "name": "s",
        "addr": ":0",
        "handler": {"type": "tungo", "chain": "c"},
        "listener": {"type": "tungo", "metadata": metadata},
    }
    config = _gost_config(
        directory,
        "tungo.json",
        [service],
        {"addr": UPSTREAM, "connector": {"type": "socks5"}, "dialer": {"type": "tcp"}},
    )
    programs = (
        _upstream(directory),
        Program(
            (*_command(binary), "-C", config), role="client", device=DEVICE, probe=() if binary else _ROUTED_INTO_DEVICE
        ),
    )
    prepare = _route_into_device(address="172.19.0.1/30") if binary else ()
    return Setup(programs=programs, prepare=prepare)


def _gost_tun(binary: str, directory: Path) -> Setup:
    def side(role: str, addr: str, inside: str, **more: Any) -> Program:
        listener = {"type": "tun", "metadata": {"name": DEVICE, "net": f"{inside}/24", "mtu": TUN_MTU}}
        handler = {"type": "tun", "metadata": {"keepalive": True, "ttl": "1s"}}
        service = {"name": "s", "addr": addr, "handler": handler, "listener": listener, **more}
        config = _gost_config(directory, f"tun-{role}.json", [service])
        return Program((*_command(binary), "-C", config), role=role, device=DEVICE)

    to_server = {"forwarder": {"nodes": [{"name": "t", "addr": f"{SERVER}:{TUN_PORT}"}]}}
    programs = (side("server", f":{TUN_PORT}", INSIDE[1]), side("client", ":0", INSIDE[0], **to_server))
    return Setup(target=f"{INSIDE[1]}:{ORIGIN_PORT}", programs=programs, kernel_moves=not binary)


# ---- gostnet with several workers -----------------------------------------------------------------
_WORKERS = 2


def _by_workers(set_up: SetUp) -> SetUp:
    """The same by several workers, each of whom listens."""

    def made(binary: str, directory: Path) -> Setup:
        setup = set_up(binary, directory)
        return replace(setup, programs=tuple(map(_with_workers, setup.programs)))

    return made


def _with_workers(program: Program) -> Program:
    all_listen = f"test $(ss -Hltn sport = :{program.port} | wc -l) -eq {_WORKERS}"
    probe = ("sh", "-c", f"{shlex.join(program.probe or ('true',))} && {all_listen}")
    return replace(program, arguments=(*program.arguments, "--workers", str(_WORKERS)), probe=probe)


# ---- the others ----------------------------------------------------------------------------------
def _sing_box(
    binary: str, directory: Path, name: str, inbound: dict[str, Any], outbound: dict[str, Any]
) -> tuple[str, ...]:
    content = {"log": {"level": "error"}, "inbounds": [inbound], "outbounds": [outbound]}
    return (binary, "run", "-c", _json(directory, name, content))


_ANYWHERE = {"listen": "0.0.0.0", "listen_port": PORT}


def _sing_box_socks5(binary: str, directory: Path) -> Setup:
    words = _sing_box(binary, directory, "socks.json", {"type": "socks", **_ANYWHERE}, {"type": "direct"})
    return Setup(socks=f"{GATEWAY}:{PORT}", programs=(Program(words, port=PORT),))


def _sing_box_red(binary: str, directory: Path) -> Setup:
    words = _sing_box(binary, directory, "red.json", {"type": "redirect", **_ANYWHERE}, {"type": "direct"})
    prepare, undo = _redirected(PORT)
    return Setup(programs=(Program(words, port=PORT),), prepare=prepare, undo=undo)


def _sing_box_udp(binary: str, directory: Path) -> Setup:
    override = {"network": "udp", "override_address": SERVER, "override_port": ORIGIN_PORT}
    words = _sing_box(binary, directory, "udp.json", {"type": "direct", **_ANYWHERE, **override}, {"type": "direct"})
    return Setup(target=f"{GATEWAY}:{PORT}", programs=(Program(words, port=PORT, protocol="udp"),))


def _sing_box_redu(binary: str, directory: Path) -> Setup:
    inbound = {"type": "tproxy", "network": "udp", **_ANYWHERE}
    words = _sing_box(binary, directory, "redu.json", inbound, {"type": "direct"})
    prepare, undo = _tproxied(PORT)
    return Setup(programs=(Program(words, port=PORT, protocol="udp"),), prepare=prepare, undo=undo)


def _sing_box_tungo(binary: str, directory: Path) -> Setup:
    """Its fastest form: the mixed stack with a large MTU."""
    inbound = {
        "type": "tun",
        "interface_name": DEVICE,
        "address": ["172.19.0.1/30"],
        "mtu": 9000,
        "auto_route": False,
        "stack": "mixed",
    }
    host, _, port = UPSTREAM.rpartition(":")
    outbound = {"type": "socks", "server": host, "server_port": int(port)}
    words = _sing_box(binary, directory, "tun.json", inbound, outbound)
    programs = (_upstream(directory), Program(words, role="client", device=DEVICE))
    return Setup(programs=programs, prepare=_route_into_device())


def _tun2socks(binary: str, directory: Path) -> Setup:
    words = (binary, "--device", f"tun://{DEVICE}", "--proxy", f"socks5://{UPSTREAM}", "--loglevel", "error")
    programs = (_upstream(directory), Program((*words, "--mtu", "1500"), role="client", device=DEVICE))
    return Setup(programs=programs, prepare=_route_into_device(address="172.19.0.1/30"))


_HAPROXY = """global
  nbthread 2
  maxconn 4000
defaults
  mode tcp
  option splice-auto
  timeout connect 5s
  timeout client 300s
  timeout server 300s
listen f
  bind :{port}{bind}
  server s {server}
"""


def _haproxy_socks5(binary: str, directory: Path) -> Setup:
    """To a fixed target: it speaks no SOCKS5, so it saves itself and the client the dialogue."""
    config = _write(directory, "haproxy.cfg", _HAPROXY.format(port=PORT, bind="", server=ORIGIN))
    return Setup(target=f"{GATEWAY}:{PORT}", programs=(Program((binary, "-q", "-db", "-f", config), port=PORT),))


def _haproxy_tls(binary: str, directory: Path) -> Setup:
    both = directory / "both.pem"
    if not both.exists():
        key, cert = directory / "key.pem", directory / "cert.pem"
        words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        names = ["-subj", "/CN=bench", "-days", "2", "-keyout", str(key), "-out", str(cert)]
        subprocess.run([*words, *names], check=True, capture_output=True)
        both.write_text(cert.read_text() + key.read_text())
    back = _HAPROXY.format(port=BACK_PORT, bind=f" ssl crt {both}", server=ORIGIN)
    front = _HAPROXY.format(port=PORT, bind="", server=f"{SERVER}:{BACK_PORT} ssl verify none no-ssl-reuse")
    programs = (
        Program((binary, "-q", "-db", "-f", _write(directory, "back.cfg", back)), role="server", port=BACK_PORT),
        Program((binary, "-q", "-db", "-f", _write(directory, "front.cfg", front)), port=PORT),
    )
    return Setup(target=f"{GATEWAY}:{PORT}", programs=programs)


def _microsocks(binary: str, directory: Path) -> Setup:
    return Setup(socks=f"{GATEWAY}:{PORT}", programs=(Program((binary, "-p", str(PORT)), port=PORT),))


def _redsocks(binary: str, directory: Path) -> Setup:
    """With microsocks behind it on the same host, since it cannot connect by itself."""
    config = f"""base {{ log_debug = off; log_info = off; daemon = off; redirector = iptables; log = "stderr"; }}
    redsocks {{ local_ip = 0.0.0.0; local_port = {PORT}; ip = 127.0.0.1; port = 1083; type = socks5; }}
    """
    programs = (
        Program(("microsocks", "-p", "1083"), port=1083),
        Program((binary, "-c", _write(directory, "redsocks.conf", config)), port=PORT),
    )
    prepare, undo = _redirected(PORT)
    return Setup(programs=programs, prepare=prepare, undo=undo)


def _wireguard_go(binary: str, directory: Path) -> Setup:
    """Encrypts, which the others do not: what that costs is part of the picture."""
    devices = ("gnwg0", "gnwg1")  # one control socket per name and host, whatever the namespace
    roles, outside = ("client", "server"), (CLIENT, SERVER)
    keys = [subprocess.run(["wg", "genkey"], check=True, capture_output=True, text=True).stdout.strip() for _ in roles]
    public = [
        subprocess.run(["wg", "pubkey"], input=key, check=True, capture_output=True, text=True).stdout.strip()
        for key in keys
    ]
    programs, prepare = [], []
    for side, (role, device) in enumerate(zip(roles, devices, strict=True)):
        words = ("env", "WG_PROCESS_FOREGROUND=1", "LOG_LEVEL=error", binary, "-f", device)
        programs.append(Program(words, role=role, device=device))
        key = _write(directory, f"{role}.key", keys[side])
        peer = ("peer", public[1 - side], "allowed-ips", "172.20.0.0/24", "endpoint", f"{outside[1 - side]}:8500")
        prepare += [
            Command(role, ("wg", "set", device, "listen-port", "8500", "private-key", key, *peer)),
            _ip(role, "addr", "add", f"{INSIDE[side]}/24", "dev", device),
            _ip(role, "link", "set", device, "mtu", str(TUN_MTU), "up"),
        ]
    return Setup(target=f"{INSIDE[1]}:{ORIGIN_PORT}", programs=tuple(programs), prepare=tuple(prepare))


_GOST_GROUPS = {
    Group.SOCKS5: _gost_socks5,
    Group.POLICIES: _gost_policies,
    Group.RED: _gost_red,
    Group.TLS: _gost_tls,
    Group.UDP: _gost_udp,
    Group.REDU: _gost_redu,
    Group.TUNGO: _gost_tungo,
    Group.TUN: _gost_tun,
}

REFERENCE = "gost"
"""What ratios are to."""

LIMIT = "kernel"
"""The kernel's own forwarding: what no proxy can beat here."""

CONTENDERS: tuple[Contender, ...] = (
    Contender(LIMIT, "", "", (), {**dict.fromkeys(Group, _direct), Group.TUNGO: _direct_tungo}),
    Contender(REFERENCE, "gost", "GOST_BIN", ("-V",), {**_GOST_GROUPS}),
    Contender("gostnet", "", "", (), {**_GOST_GROUPS, Group.RED: _gostnet_red, Group.REDU: _gostnet_redu}),
    Contender(
        "gostnet x2",
        "",
        "",
        (),
        {
            Group.SOCKS5: _by_workers(_gost_socks5),
            Group.RED: _by_workers(_gostnet_red),
            Group.TLS: _by_workers(_gost_tls),
        },
        ("ss",),
        ("*.short", "tls.*"),
    ),
    Contender(
        "sing-box",
        "sing-box",
        "SING_BOX_BIN",
        ("version",),
        {
            Group.SOCKS5: _sing_box_socks5,
            Group.RED: _sing_box_red,
            Group.UDP: _sing_box_udp,
            Group.REDU: _sing_box_redu,
            Group.TUNGO: _sing_box_tungo,
        },
    ),
    Contender(
        "haproxy",
        "haproxy",
        "HAPROXY_BIN",
        ("-v",),
        {Group.SOCKS5: _haproxy_socks5, Group.TLS: _haproxy_tls},
        ("openssl",),
    ),
    Contender("microsocks", "microsocks", "MICROSOCKS_BIN", (), {Group.SOCKS5: _microsocks}),
    Contender("redsocks", "redsocks", "REDSOCKS_BIN", ("-v",), {Group.RED: _redsocks}, ("microsocks",)),
    Contender("tun2socks", "tun2socks", "TUN2SOCKS_BIN", ("--version",), {Group.TUNGO: _tun2socks}),
    Contender("wireguard-go", "wireguard-go", "WIREGUARD_GO_BIN", ("--version",), {Group.TUN: _wireguard_go}, ("wg",)),
)
