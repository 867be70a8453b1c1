"""The lab as its user meets it: a program that works, and leaves no trace however it ends."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gostnet.kernel import netns
from gostnet.lab import DIRECTORY
from gostnet.testing.processes import Process, ProcessFailed, run_program
from gostnet.testing.state import State, diff, snapshot

pytestmark = pytest.mark.netns

ROLES = ("client", "gateway", "exit", "internet")
ETC = Path("/etc/netns")
STARTED = "Flows of the gateway"

WITHOUT_SYS_ADMIN = """
import ctypes, os, sys
if ctypes.CDLL(None).prctl(24, 21):  # PR_CAPBSET_DROP, CAP_SYS_ADMIN
    sys.exit("cannot drop CAP_SYS_ADMIN")
os.execv(sys.executable, [sys.executable, "-m", "gostnet", *sys.argv[1:]])
"""
"""Root as an ordinary user is, as far as making namespaces goes: what a program is not given it cannot take."""

NO_USER_NAMESPACES = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000):
    sys.exit("cannot make a user namespace")
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write(f"0 {os.getuid()} 1")
open("/proc/sys/user/max_user_namespaces", "w").write("0")
libc.prctl(24, 21)
os.execv(sys.executable, [sys.executable, "-m", "gostnet", *sys.argv[1:]])
"""


class Machine:
    """What of the machine a lab could leave a trace in."""

    def __init__(self, place: netns.Namespace) -> None:
        self.place = place
        self._before = self._observe()

    def _observe(self) -> tuple[State, dict[str, str], list[str], bool]:
        files = {str(path): path.read_text() if path.is_file() else "" for path in ETC.rglob("*")}
        if ETC.exists():
            files[str(ETC)] = ""
        # Names of other test runs come and go; the lab's are fixed.
        names = [name for name in netns.names() if name in {f"gn-{role}" for role in ROLES}]
        return snapshot(self.place), files, names, DIRECTORY.exists()

    def traces(self) -> list[str]:
        """Return what differs from the start."""
        now = self._observe()
        found = diff(self._before[0], now[0])
        found += [
            f"{what} instead of {was}" for was, what in zip(self._before[1:], now[1:], strict=True) if was != what
        ]
        return found


@pytest.fixture
def machine() -> Iterator[Machine]:
    """The lab's host is a namespace of its own, so that nobody else changes it meanwhile."""
    with netns.anonymous() as place:
        machine = Machine(place)
        yield machine
        assert machine.traces() == []


Lab = Callable[..., Process]


@pytest.fixture
def lab(machine: Machine) -> Iterator[Lab]:
    """Start a lab with these words and wait for the text; another lab on the machine is waited for."""
    with ExitStack() as stack:

        def start(*words: str, until: str = STARTED, program: tuple[str, ...] = (), path: str = "") -> Process:
            deadline = time.monotonic() + 60
            while True:
                process = Process(
                    [sys.executable, *(program or ("-m", "gostnet")), "lab", *words],
                    machine.place,
                    env={"PATH": path} if path else None,
                    name="lab",
                )
                process.start()
                stack.callback(process.stop, 20.0)
                try:
                    process.wait_for(until, 40)
                except ProcessFailed:
                    if "another lab is running" not in process.errors or time.monotonic() > deadline:
                        raise
                    time.sleep(0.5)
                else:
                    return process

        yield start


def command(process: Process, wanted: str) -> str:
    """Return the line of what the lab says to try that contains the text."""
    return process.wait_for(lambda line: line.startswith("  ") and wanted in line).strip()


def descendants(process: Process, word: str) -> list[int]:
    """Return the pids of the lab's children whose command lines contain the word."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if word in Path(f"/proc/{pid}/cmdline").read_text()]


def await_end(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return not Path(f"/proc/{pid}").exists()


def tools(directory: Path, *names: str) -> str:
    """Return a PATH with these programs only."""
    directory.mkdir()
    for name in names:
        for place in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"):
            if Path(place, name).exists():
                (directory / name).symlink_to(Path(place, name))
                break
    return str(directory)


@pytest.mark.parametrize("words", [(), ("--tproxy",)], ids=["redirect", "tproxy"])
def test_check_passes_and_leaves_no_trace(lab: Lab, words: tuple[str, ...]) -> None:
    process = lab("--check", *words, until="passed")
    assert process.wait() == 0, process.output + process.errors
    lines = process.output.splitlines()
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1] == f"{len(lines) - 1} of {len(lines) - 1} passed"
    assert any(line.startswith("ok   IPv6 DNS by UDP comes from the exit") for line in lines)


def test_commands_that_are_shown_work_and_flows_are_shown(lab: Lab, peer: Callable[[str], str]) -> None:
    peer("ip")
    peer("curl")
    process = lab()
    output = run_program(shlex.split(command(process, "curl http://web.lab/"))).output
    assert output.startswith("hello: you came from")
    assert "[fd77:3::1]" in output or "10.77.3.1:" in output
    assert "hello" in run_program(shlex.split(command(process, "https://"))).output
    assert "By the VPN between gateway and exit (vpn0, tun over UDP) the gateway reaches intra.lab" in process.output
    assert "goes into the device own0 (tungo)" in process.output
    assert '"10.77.4.1"' in run_program(shlex.split(command(process, "curl http://10.77.4.2/whoami"))).output
    assert '"10.77.3.1"' in run_program(shlex.split(command(process, "curl http://10.77.3.2/whoami"))).output
    flow = process.wait_for(":80  via exit")
    assert flow.startswith("tcp ")
    assert "up " in flow
    process.send(signal.SIGINT)
    assert process.wait(20) == 0, process.errors


def test_names_work_on_the_client_and_nowhere_else(lab: Lab, peer: Callable[[str], str], machine: Machine) -> None:
    ip = peer("ip")
    before = Path("/etc/resolv.conf").read_bytes()
    made = not ETC.exists()
    (ETC / "gn-client").mkdir(parents=True)
    try:
        (ETC / "gn-client/resolv.conf").write_text("nameserver 192.0.2.1\n")
        process = lab()
        code = "import socket; print(socket.getaddrinfo('echo.lab', 7, type=socket.SOCK_STREAM)[0][4][0])"
        found = run_program([ip, "netns", "exec", "gn-client", sys.executable, "-c", code]).output.strip()
        assert found in ("10.77.3.2", "fd77:3::2")
        assert Path("/etc/resolv.conf").read_bytes() == before
        process.send(signal.SIGTERM)
        assert process.wait(20) == 0, process.errors
        assert (ETC / "gn-client/resolv.conf").read_text() == "nameserver 192.0.2.1\n"
    finally:
        (ETC / "gn-client/resolv.conf").unlink()
        (ETC / "gn-client").rmdir()
        if made:
            ETC.rmdir()


def test_lab_without_ip_and_curl_shows_what_works_there(lab: Lab, peer: Callable[[str], str], tmp_path: Path) -> None:
    peer("nsenter")
    process = lab(path=tools(tmp_path / "bin", "nsenter"))
    words = shlex.split(command(process, "http://web.lab/"))
    assert words[0] == "nsenter"
    assert sys.executable in words
    assert "hello: you came from" in run_program(words).output
    assert not (ETC / "gn-client").exists()


def test_lab_without_any_way_in_says_what_to_install(lab: Lab, tmp_path: Path) -> None:
    process = lab("--duration", "0.1", path=tools(tmp_path / "bin"))
    assert process.wait(20) == 0
    assert "install iproute2 (ip netns exec) or util-linux (nsenter)" in process.output


def test_lab_that_is_killed_takes_its_programs_along_and_the_next_one_cleans_up(lab: Lab) -> None:
    process = lab()
    children = [pid for role in ("gateway", "exit") for pid in descendants(process, f"{role}.yaml")]
    assert len(children) == 2
    process.kill()
    assert all(await_end(pid) for pid in children)
    assert netns.exists("gn-client")
    again = lab("--duration", "0.1")
    assert again.wait(20) == 0
    assert not netns.exists("gn-client")


def test_second_lab_is_refused(lab: Lab) -> None:
    lab()
    second = run_program([sys.executable, "-m", "gostnet", "lab"], check=False)
    assert second.returncode == 1
    assert "another lab is running" in second.errors
    assert netns.exists("gn-client")


def test_end_of_a_daemon_ends_the_lab_with_status_1(lab: Lab) -> None:
    process = lab()
    (gateway,) = descendants(process, "gateway.yaml")
    os.kill(gateway, signal.SIGKILL)
    assert process.wait(30) == 1
    assert "gostnet on gateway ended by itself" in process.errors


def test_lab_without_privileges_works_inside_a_user_namespace(lab: Lab) -> None:
    possible = run_program([sys.executable, "-c", WITHOUT_SYS_ADMIN, "-V"], check=False)
    assert possible.returncode == 0, possible.errors
    process = lab("--check", until="passed", program=("-c", WITHOUT_SYS_ADMIN))
    assert process.wait() == 0, process.output + process.errors
    assert "IPv6 UDP echo" in process.output


def test_commands_without_privileges_work_from_another_terminal(lab: Lab, peer: Callable[[str], str]) -> None:
    peer("nsenter")
    peer("curl")
    process = lab(program=("-c", WITHOUT_SYS_ADMIN))
    words = shlex.split(command(process, "curl http://web.lab/"))
    assert "-U" in words
    assert "hello: you came from" in run_program(words).output
    assert '"10.77.4.1"' in run_program(shlex.split(command(process, "curl http://10.77.4.2/whoami"))).output
    assert not any(netns.exists(f"gn-{role}") for role in ROLES)
    children = descendants(process, "yaml")
    process.kill()
    assert len(children) == 2
    assert all(await_end(pid) for pid in children)


def test_lab_where_nothing_is_allowed_is_refused(machine: Machine) -> None:
    refused = run_program([sys.executable, "-c", NO_USER_NAMESPACES, "lab"], check=False)
    assert refused.returncode == 1
    assert refused.errors.startswith("gostnet lab: make a user namespace: ")
    assert "run as root, or allow unprivileged user namespaces" in refused.errors
    assert refused.output == ""
