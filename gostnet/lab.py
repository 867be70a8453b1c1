"""The lab: a gateway that captures a client's traffic and sends it out elsewhere, all in namespaces of this machine.

    gn-client 10.77.1.2 -- lan0 gn-gateway wan0 -- gn-exit -- gn-internet 10.77.3.2 web.lab, echo.lab, dns.lab
                                       vpn0 ....... vpn0  `-- 10.77.4.2 intra.lab

The gateway runs gostnet with listeners red and redu on `lan0`, the exit runs gostnet as a relay over TLS. Between them
is a VPN (`tun`), by which the gateway reaches the network behind the exit; what else the gateway's own programs send
goes through a device (`tungo`) and the relay. As root the namespaces have names; otherwise everything happens inside
one unprivileged user namespace. What a lab that was killed has left is removed by the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import yaml

from .core.address import Endpoint
from .core.errors import GostnetError
from .testing.certificates import Authority
from .testing.clients import connect, echo, echo_datagram, fetch, ping, resolve
from .testing.namespaces import End, Host, Link, Network, Route, Topology, has_ipv6
from .testing.processes import Process, ProcessFailed, gostnet
from .testing.servers import Servers, pattern, serving_in_thread
from .testing.state import State, await_same, snapshot
from .testing.world import HOLDER, ResolverFile, enter_own_world, make_place, own_directory, privileged

CLIENT, GATEWAY, EXIT, INTERNET = "client", "gateway", "exit", "internet"

TOPOLOGY = Topology(
    (
        Host(CLIENT, routes=(Route("default", "10.77.1.1"), Route("default", "fd77:1::1"))),
        Host(GATEWAY, forwarding=True, routes=(Route("default", "10.77.2.2"), Route("default", "fd77:2::2"))),
        Host(EXIT, forwarding=True, routes=(Route("10.77.1.0/24", "10.77.2.1"), Route("fd77:1::/64", "fd77:2::1"))),
        Host(INTERNET, routes=(Route("default", "10.77.3.1"), Route("default", "fd77:3::1"))),
    ),
    (
        Link(
            End(CLIENT, "eth0", ("10.77.1.2/24", "fd77:1::2/64")),
            End(GATEWAY, "lan0", ("10.77.1.1/24", "fd77:1::1/64")),
        ),
        Link(
            End(GATEWAY, "wan0", ("10.77.2.1/24", "fd77:2::1/64")),
            End(EXIT, "eth0", ("10.77.2.2/24", "fd77:2::2/64")),
        ),
        Link(
            End(EXIT, "eth1", ("10.77.3.1/24", "fd77:3::1/64")),
            End(INTERNET, "eth0", ("10.77.3.2/24", "fd77:3::2/64")),
        ),
        Link(
            End(EXIT, "eth2", ("10.77.4.1/24", "fd77:4::1/64")),
            End(INTERNET, "eth1", ("10.77.4.2/24", "fd77:4::2/64")),
        ),
    ),
)

NAMES = ("web.lab", "echo.lab", "dns.lab")

INTRANET = "intra.lab"
"""The name of what is reached by the VPN."""

VPN = {EXIT: ("10.77.9.1/24", "fd77:9::1/64"), GATEWAY: ("10.77.9.2/24", "fd77:9::2/64")}
"""The addresses inside the VPN."""

INSIDE = ("10.77.9.0/24", "fd77:9::/64")
"""The networks of the VPN itself."""

BEHIND = ("10.77.4.0/24", "fd77:4::/64")
"""The networks that the gateway routes into the VPN."""

SERVICES = ("http", "https", "echo/tcp", "echo/udp", "dns/tcp", "dns/udp")

Probe: TypeAlias = tuple[str, Callable[[], None]]
"""What is tried, in words, and the trial, which raises when it fails."""

DIRECTORY = Path("/run/gostnet-lab")
"""Configurations and keys of the lab that runs; its lock is the one on the directory."""

UDP_IDLE = "5s"
"""Short, since a flow of datagrams is shown when it has ended."""

_READY_TIMEOUT = 30.0


def run_lab(words: Sequence[str]) -> int:
    """Run the verb `lab` with its words; return the exit status: 0, 1 when something failed, 2 for wrong usage.

    Needs the main thread, whose signal handlers it sets for the time being.
    """
    try:
        options = _parser().parse_args(list(words))
    except SystemExit as exc:
        return int(exc.code or 0)
    try:
        rootless = not privileged()
        if rootless:
            enter_own_world()
        with _stop_on_signals() as stop, ExitStack() as stack:
            return _Lab(options, rootless, stop, stack).run()
    except GostnetError as exc:
        print(f"gostnet lab: {exc}", file=sys.stderr)
        if exc.hint:
            print(f"  {exc.hint}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gostnet lab",
        description="A client, a gateway that captures its traffic, an exit and an Internet with servers, all in "
        "network namespaces of this machine, with gostnet on the gateway and on the exit.",
    )
    parser.add_argument("--tproxy", action="store_true", help="capture TCP by TPROXY instead of REDIRECT")
    parser.add_argument("--check", action="store_true", help="try everything, print the results and end")
    parser.add_argument("--duration", type=float, default=0.0, metavar="SECONDS", help="end after so many seconds")
    parser.add_argument("--verbose", action="store_true", help="print the gateway's whole log")
    return parser


class _Lab:
    """One lab, from its lock to its last trace."""

    def __init__(self, options: argparse.Namespace, rootless: bool, stop: threading.Event, stack: ExitStack) -> None:
        self._options = options
        self._rootless = rootless
        self._stop = stop
        self._stack = stack
        self._network = Network(TOPOLOGY, lambda role: f"gn-{role}")
        self._authority = Authority("gostnet lab")

    def run(self) -> int:
        # 1. what is ours alone: the lock first, then what a killed lab left behind goes
        self._stack.enter_context(own_directory(DIRECTORY))
        resolver = ResolverFile(self._network[CLIENT])
        resolver.remove()
        self._network.down()
        # 2. the world: namespaces and servers
        self._stack.callback(self._network.down)
        self._network.up()
        servers = self._stack.enter_context(self._serve())
        # 3. gostnet on the exit and on the gateway
        before = snapshot(self._network[GATEWAY])
        self._write_configurations()
        exit_daemon = self._daemon(EXIT)
        gateway = self._daemon(GATEWAY, self._show)
        if self._stop.is_set():
            return 0
        # 4. the user's part, or the built-in one
        if self._options.check:
            return self._check(servers, gateway, before)
        self._introduce(resolver, gateway)
        return self._watch(exit_daemon, gateway)

    # ---- what there is ----------------------------------------------------------------------
    def _addresses(self, role: str, interface: str = "") -> list[str]:
        return [a for a in TOPOLOGY.addresses(role, interface) if has_ipv6() or ":" not in a]

    @contextmanager
    def _serve(self) -> Iterator[Servers]:
        zone = dict.fromkeys(NAMES, self._addresses(INTERNET, "eth0"))
        zone[INTRANET] = self._addresses(INTERNET, "eth1")
        addresses = [address for name in (NAMES[0], INTRANET) for address in zone[name]]
        with serving_in_thread(self._network[INTERNET], addresses, zone=zone, authority=self._authority) as servers:
            yield servers

    def _write_configurations(self) -> None:
        self._authority.issue("exit.lab").save(DIRECTORY, "exit")
        (DIRECTORY / "ca.crt").write_bytes(self._authority.certificate)
        (DIRECTORY / "resolv.conf").write_text(self._resolv_conf())
        files = configurations(DIRECTORY, TOPOLOGY.addresses(EXIT, "eth0", 4)[0], self._options.tproxy)
        for role, configuration in files.items():
            path = DIRECTORY / f"{role}.yaml"
            path.touch(mode=0o600)
            path.write_text(yaml.safe_dump(configuration, sort_keys=False))

    def _resolv_conf(self) -> str:
        servers = self._addresses(INTERNET, "eth0")
        return "".join(f"nameserver {address}\n" for address in servers) + "options timeout:2\n"

    def _daemon(self, role: str, on_line: Callable[[str], None] | None = None) -> Process:
        """Start gostnet on a host and wait until it is ready, or until the lab is to end."""
        daemon = gostnet(
            "-C", str(DIRECTORY / f"{role}.yaml"), place=self._network[role], name=f"gostnet on {role}", on_line=on_line
        )
        daemon.start()
        self._stack.callback(daemon.stop)
        _await_ready(daemon, self._stop)
        return daemon

    # ---- for people -------------------------------------------------------------------------
    def _show(self, line: str) -> None:
        shown = line if self._options.verbose else "" if self._options.check else flow_line(line)
        if shown:
            try:
                _say(shown)
            except OSError:  # nobody reads any more
                self._stop.set()

    def _introduce(self, resolver: ResolverFile, gateway: Process) -> None:
        holder = self._holder()
        enter = self._way_in(holder, resolver)
        how = "TPROXY" if self._options.tproxy else "REDIRECT"
        _say(
            f"gn-client 10.77.1.2 -- lan0 gn-gateway wan0 -- gn-exit -- gn-internet 10.77.3.2 {' '.join(NAMES)}\n"
            f"The gateway captures TCP by {how} and UDP by TPROXY, IPv4 and IPv6, and relays it over TLS to the exit.\n"
            f"By the VPN between gateway and exit (vpn0, tun over UDP) the gateway reaches {INTRANET}, 10.77.4.2.\n"
            "What else its own programs send goes into the device own0 (tungo) and through the same relay.\n"
            f"Configurations: {DIRECTORY}/gateway.yaml {DIRECTORY}/exit.yaml{' in there' if self._rootless else ''}"
        )
        if enter:
            _say("Try, in another terminal:")
            for command in _commands(enter):
                _say(f"  {command}")
            # In the namespaces of the gateway's daemon, where no names of the lab are known.
            enter = enter.replace(self._network[CLIENT], self._network[GATEWAY])
            for command in _commands_on_gateway(enter.replace(f"-t {holder.pid} ", f"-t {gateway.pid} ")):
                _say(f"  {command}")
        else:
            _say("To enter the namespaces, install iproute2 (ip netns exec) or util-linux (nsenter).")
        _say("Flows of the gateway, as they end (stop with Ctrl-C):")

    def _holder(self) -> Process:
        """Start what keeps a mount namespace for the client, in which /etc/resolv.conf is the lab's.

        `nsenter` gets in by its pid, with the names working.
        """
        if self._rootless:
            make_place(Path(os.path.realpath("/etc/resolv.conf")))
        holder = Process(
            [sys.executable, "-I", "-S", "-c", HOLDER, str(DIRECTORY / "resolv.conf")],
            self._network[CLIENT],
            name="client",
        )
        holder.start()
        self._stack.callback(holder.stop)
        holder.wait_for("holding")
        return holder

    def _way_in(self, holder: Process, resolver: ResolverFile) -> str:
        """Return what to write before a command so that it runs on the client, "" if nothing is installed for it."""
        nsenter = shutil.which("nsenter") is not None
        if self._rootless:
            return f"nsenter -t {holder.pid} -U -n -m --preserve-credentials" if nsenter else ""
        if shutil.which("ip"):
            try:
                self._stack.callback(resolver.remove)
                resolver.install(self._resolv_conf())
            except OSError as exc:
                if not nsenter:
                    _say(f"Names do not work on the client: {resolver.path}: {exc.strerror}")
                    return f"ip netns exec {self._network[CLIENT]}"
            else:
                return f"ip netns exec {self._network[CLIENT]}"
        return f"nsenter -t {holder.pid} -n -m" if nsenter else ""

    def _watch(self, *daemons: Process) -> int:
        """Wait for a signal, the end of the time or the end of a daemon."""
        end = time.monotonic() + self._options.duration if self._options.duration > 0 else float("inf")
        while not self._stop.wait(min(0.5, max(0.0, end - time.monotonic()))):
            for daemon in daemons:
                if daemon.returncode is not None:
                    raise ProcessFailed(f"{daemon.name} ended by itself\n{daemon.errors[-2000:]}")
            if time.monotonic() >= end:
                break
        return 0

    # ---- the built-in check -----------------------------------------------------------------
    def _check(self, servers: Servers, gateway: Process, before: State) -> int:
        probes = list(self._probes(servers))
        failed = 0
        for name, probe in probes:
            if self._stop.is_set():
                return 1
            failed += not _report(name, probe)
        # The gateway's end is part of the check: traffic flows as it did before the start.
        last: list[Probe] = [
            ("gateway ends in order", lambda: _expect(gateway.stop(10.0), 0)),
            ("gateway leaves no trace", lambda: _expect(await_same(before, self._network[GATEWAY]), [])),
        ]
        for source in self._addresses(CLIENT):
            target = self._target(servers, "http", source)
            last.append((f"traffic flows as before, from {source}", self._seen_from(target, source)))
        for name, probe in last:
            failed += not _report(name, probe)
        count = len(probes) + len(last)
        _say(f"{count - failed} of {count} passed")
        if failed:
            _say(f"the gateway's last words:\n{gateway.errors[-4000:]}")
        return 1 if failed else 0

    def _probes(self, servers: Servers) -> Iterator[Probe]:
        """Yield what the client tries: every service over both IP versions, seen to come from the exit."""
        for source in self._addresses(EXIT, "eth1"):
            at = {service: self._target(servers, service, source) for service in SERVICES}
            yield from self._probes_of(f"IPv{6 if ':' in source else 4}", at, source)
            yield from self._probes_of_own(f"IPv{6 if ':' in source else 4}", at, source)
        for source in self._addresses(EXIT, "eth2"):
            yield from self._probes_by_vpn(f"IPv{6 if ':' in source else 4}", source)

    def _probes_of(self, version: str, at: Mapping[str, Endpoint], source: str) -> Iterator[Probe]:
        place = self._network[CLIENT]
        tls = self._authority.client_context()
        http, tcp, udp = at["http"], at["echo/tcp"], at["echo/udp"]

        def whoami(server: Endpoint, by_tcp: bool) -> None:
            _expect(resolve(place, server, "whoami.lab", "TXT", tcp=by_tcp).records, (source,))

        def echoed(size: int) -> None:
            _expect(echo_datagram(place, udp, pattern(size)), (pattern(size), udp))

        yield f"{version} HTTP comes from the exit", self._seen_from(http, source)
        yield f"{version} HTTPS comes from the exit", self._seen_from(at["https"], source, tls)
        yield f"{version} download of 10 MB", partial(_expect_download, place, http, 10_000_000)
        yield f"{version} upload of 10 MB", partial(_expect_upload, place, http, 10_000_000)
        yield f"{version} slow answer", partial(_expect_slow, place, http)
        yield f"{version} TCP echo with half-close", partial(_expect_echo, place, tcp)
        yield f"{version} forty connections at once", partial(_expect_crowd, place, tcp, 40)
        yield f"{version} a closed port ends at once", partial(_expect_closed, place, http.host)
        for size in (1, 1200, 1400):
            yield f"{version} UDP echo of {size} bytes, answered from the address asked", partial(echoed, size)
        yield f"{version} DNS by UDP comes from the exit", partial(whoami, at["dns/udp"], False)
        yield f"{version} DNS by TCP comes from the exit", partial(whoami, at["dns/tcp"], True)
        yield f"{version} names resolve", partial(_expect_names, place, at["dns/udp"])

    def _probes_of_own(self, version: str, at: Mapping[str, Endpoint], source: str) -> Iterator[Probe]:
        """Yield what the gateway itself tries: its own programs are captured by the device."""
        place, http, udp = self._network[GATEWAY], at["http"], at["echo/udp"]

        def echoed() -> None:
            _expect(echo_datagram(place, udp, pattern(1200)), (pattern(1200), udp))

        def whoami() -> None:
            _expect(resolve(place, at["dns/udp"], "whoami.lab", "TXT").records, (source,))

        yield f"{version} gateway, HTTP comes from the exit", self._seen_from(http, source, place=GATEWAY)
        yield f"{version} gateway, download of 10 MB", partial(_expect_download, place, http, 10_000_000)
        yield f"{version} gateway, TCP echo with half-close", partial(_expect_echo, place, at["echo/tcp"])
        yield f"{version} gateway, UDP echo", echoed
        yield f"{version} gateway, DNS by UDP comes from the exit", whoami

    def _probes_by_vpn(self, version: str, source: str) -> Iterator[Probe]:
        place, names = self._network[GATEWAY], 6 if ":" in source else 4
        host = TOPOLOGY.addresses(INTERNET, "eth1", names)[0]
        web, udp = Endpoint(host, 80), Endpoint(host, 7)

        def echoed() -> None:
            try:
                answer = echo_datagram(place, udp, pattern(4000), timeout=1.0)
            except TimeoutError:
                # An answer in fragments too big for the VPN: of IPv6 the server is told so, and does better next time.
                answer = echo_datagram(place, udp, pattern(4000))
            _expect(answer, (pattern(4000), udp))

        yield f"{version} VPN, ping", lambda: _expect(ping(place, host, pattern(1000)), pattern(1000))
        yield f"{version} VPN, HTTP comes from the exit's inner address", self._seen_from(web, source, place=GATEWAY)
        yield f"{version} VPN, download of 10 MB", partial(_expect_download, place, web, 10_000_000)
        yield f"{version} VPN, UDP echo in fragments", echoed

    def _target(self, servers: Servers, service: str, like: str) -> Endpoint:
        return servers.endpoint(service, 6 if ":" in like else 4)

    def _seen_from(self, target: Endpoint, source: str, tls: Any = None, *, place: str = CLIENT) -> Callable[[], None]:
        def probe() -> None:
            reply = fetch(self._network[place], target, "/whoami", host="web.lab" if tls else "", tls=tls)
            _expect((reply.status, reply.json()["client"]), (200, source))

        return probe


# ---- configuration ------------------------------------------------------------------------------
def configurations(directory: Path, exit_address: str, tproxy: bool) -> dict[str, dict[str, Any]]:
    """Return the configurations of exit and gateway by role, with fresh credentials; files lie in `directory`."""
    auth = {"username": "lab", "password": secrets.token_urlsafe(18)}
    red: dict[str, Any] = {"capture": ["lan0"]}
    if tproxy:
        red["tproxy"] = True
    passphrase = secrets.token_urlsafe(12)
    vpn_address = f"{exit_address}:8421"
    exit_configuration = {
        "services": [
            {
                "name": "exit",
                "addr": ":8443",
                "handler": {"type": "relay", "auth": auth},
                "listener": {
                    "type": "tls",
                    "tls": {"certFile": str(directory / "exit.crt"), "keyFile": str(directory / "exit.key")},
                },
            },
            {
                "name": "vpn",
                "addr": ":8421",
                "handler": {"type": "tun", "metadata": {"passphrase": passphrase}},
                "listener": {"type": "tun", "metadata": {**_device(EXIT), "masquerade": True}},
            },
        ],
        "log": {"level": "info", "format": "json"},
    }
    handler: dict[str, Any] = {"type": "red", "chain": "out"}
    if tproxy:
        handler["metadata"] = {"tproxy": True}
    gateway_configuration = {
        "services": [
            {
                "name": "tcp",
                "addr": ":12345",
                "handler": handler,
                "listener": {"type": "red", "metadata": red},
            },
            {
                "name": "udp",
                "addr": ":12346",
                "handler": {"type": "redu", "chain": "out"},
                "listener": {"type": "redu", "metadata": {"capture": ["lan0"], "ttl": UDP_IDLE}},
            },
            {
                "name": "vpn",
                "addr": ":0",
                "handler": {
                    "type": "tun",
                    "metadata": {"passphrase": passphrase, "keepalive": True, "ttl": "1s"},
                },
                "listener": {"type": "tun", "metadata": {**_device(GATEWAY), "route": ",".join(BEHIND)}},
                "forwarder": {"nodes": [{"name": "exit", "addr": vpn_address}]},
            },
            {
                "name": "own",
                "addr": ":0",
                "handler": {"type": "tungo", "chain": "out", "metadata": {"udpTimeout": UDP_IDLE}},
                "listener": {
                    "type": "tungo",
                    "metadata": {"name": "own0", "capture": ["local"], "capture.exclude": [*BEHIND, *INSIDE]},
                },
            },
        ],
        "chains": [
            {
                "name": "out",
                "hops": [
                    {
                        "name": "hop",
                        "nodes": [
                            {
                                "name": "exit",
                                "addr": f"{exit_address}:8443",
                                "connector": {"type": "relay", "auth": dict(auth)},
                                "dialer": {
                                    "type": "tls",
                                    "tls": {
                                        "secure": True,
                                        "caFile": str(directory / "ca.crt"),
                                        "serverName": "exit.lab",
                                    },
                                },
                            }
                        ],
                    }
                ],
            }
        ],
        "log": {"level": "info", "format": "json"},
    }
    return {EXIT: exit_configuration, GATEWAY: gateway_configuration}


def _device(role: str) -> dict[str, Any]:
    return {"name": "vpn0", "net": ",".join(VPN[role])}


# ---- what is shown ------------------------------------------------------------------------------
def flow_line(line: str) -> str:
    """Turn a line of the daemon's log into what is shown of a flow that ended, "" for any other line.

    Warnings and errors are shown as they are.
    """
    try:
        record = json.loads(line)
    except ValueError:
        return line if line.strip() else ""
    if not isinstance(record, dict):
        return ""
    if record.get("level") in ("warn", "error", "fatal"):
        return f"{record['level']}: {record.get('msg', '')}"
    if record.get("kind") != "handler" or "duration" not in record:
        return ""
    target = record.get("dst", "?")
    if record.get("host"):
        target = f"{record['host']} ({target})"
    words = [f"{record.get('network', ''):3} {record.get('client', '?')} -> {target}"]
    if record.get("route"):
        words.append(f"via {record['route']}")
    words.append(_seconds(record["duration"] / 1e9))
    words.append(f"up {_size(record.get('inputBytes', 0))}, down {_size(record.get('outputBytes', 0))}")
    if record.get("error"):
        words.append(f"- {record['error']}")
    return "  ".join(words)


def _commands(enter: str) -> Iterator[str]:
    if shutil.which("curl"):
        yield f"{enter} curl http://web.lab/"
        if has_ipv6():
            yield f"{enter} curl -6 http://web.lab/whoami"
        yield f"{enter} curl --cacert {DIRECTORY}/ca.crt https://web.lab/"
        yield f"{enter} curl -o /dev/null http://web.lab/bytes/1000000000"
    else:
        code = "import urllib.request as u; print(u.urlopen('http://web.lab/').read().decode())"
        yield f'{enter} {sys.executable} -c "{code}"'
    if shutil.which("dig"):
        yield f"{enter} dig +short whoami.lab TXT"
    yield f"{enter} {os.environ.get('SHELL') or '/bin/sh'}"


def _commands_on_gateway(enter: str) -> Iterator[str]:
    if shutil.which("ping"):
        yield f"{enter} ping -c 3 10.77.4.2"
    if shutil.which("curl"):
        yield f"{enter} curl http://10.77.4.2/whoami"
        yield f"{enter} curl http://10.77.3.2/whoami"
    yield f"{enter} ip address" if shutil.which("ip") else f"{enter} cat /proc/net/dev"


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _say(text: str) -> None:
    print(text, flush=True)


# ---- expectations -------------------------------------------------------------------------------
class _Unexpected(GostnetError):
    code = "lab.probe"


def _report(name: str, probe: Callable[[], None]) -> bool:
    started = time.monotonic()
    try:
        probe()
    except (GostnetError, OSError, ValueError, KeyError) as exc:
        _say(f"FAIL {name}: {exc or type(exc).__name__}")
        return False
    _say(f"ok   {name} ({_seconds(time.monotonic() - started)})")
    return True


def _expect(got: object, wanted: object) -> None:
    if got != wanted:
        raise _Unexpected(f"got {repr(got)[:200]} instead of {repr(wanted)[:200]}")


def _expect_download(place: str, target: Endpoint, size: int) -> None:
    reply = fetch(place, target, f"/bytes/{size}", timeout=30.0)
    _expect((reply.status, len(reply.body), reply.body == pattern(size)), (200, size, True))


def _expect_upload(place: str, target: Endpoint, size: int) -> None:
    reply = fetch(place, target, "/upload", method="POST", body=pattern(size), timeout=30.0)
    _expect((reply.status, reply.json()["size"]), (200, size))


def _expect_slow(place: str, target: Endpoint) -> None:
    reply = fetch(place, target, "/slow/0.5")
    _expect((reply.status, reply.body[:11]), (200, b"hello, late"))


def _expect_echo(place: str, target: Endpoint) -> None:
    _expect(echo(place, target, pattern(1_000_000)) == pattern(1_000_000), True)


def _expect_names(place: str, server: Endpoint) -> None:
    for name in NAMES:
        for kind in ("A", "AAAA") if has_ipv6() else ("A",):
            records = resolve(place, server, name, kind).records
            version = 4 if kind == "A" else 6
            _expect(records, tuple(TOPOLOGY.addresses(INTERNET, "eth0", version)))
    _expect(resolve(place, server, "nowhere.lab").code, "NXDOMAIN")


def _expect_crowd(place: str, target: Endpoint, count: int) -> None:
    with ExitStack() as stack:
        socks = [stack.enter_context(connect(place, target)) for _ in range(count)]
        for number, sock in enumerate(socks):
            sock.sendall(b"number %03d" % number)
        for number, sock in enumerate(socks):
            data = b""
            while len(data) < 10 and (more := sock.recv(10 - len(data))):
                data += more
            _expect(data, b"number %03d" % number)


def _expect_closed(place: str, host: str) -> None:
    """A captured connection is accepted before its target is known: its end must follow at once."""
    try:
        with connect(place, Endpoint(host, 81), timeout=5.0) as sock:
            sock.sendall(b"hello?")
            _expect(sock.recv(1), b"")
    except ConnectionError:
        pass


# ---- signals and readiness -----------------------------------------------------------------------
@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that INT, TERM and HUP set; the handlers are put back at the end."""
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _await_ready(daemon: Process, stop: threading.Event) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT
    while not stop.is_set():
        try:
            daemon.wait_ready(0.2)
        except ProcessFailed:
            if daemon.returncode is not None or time.monotonic() > deadline:
                raise
        else:
            return
