"""Whatever ends an instance, the host is as it was: the real kernel, real deaths."""

from __future__ import annotations

import errno
import os
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gostnet.core.errors import KernelError
from gostnet.core.resources import (
    FIRST_TABLE,
    ROUTE_PROTOCOL,
    Address,
    Bridge,
    Capture,
    Link,
    NftChain,
    NftRule,
    NftSet,
    NftTable,
    Port,
    Resource,
    Route,
    Rule,
    Sysctl,
)
from gostnet.kernel import journal, live, netns, nft_expr, nft_table, watch
from gostnet.kernel.journal import Journal, Owner
from gostnet.kernel.live import LiveKernel
from gostnet.kernel.nft import Nft
from gostnet.kernel.provision import Provisioner
from gostnet.kernel.recovery import recover
from gostnet.testing.namespaces import Network
from gostnet.testing.state import State, await_same, diff, snapshot

pytestmark = pytest.mark.netns

RED = Capture("red", "tcp", "redirect", 12345, ("lan0",), True)
TPROXY = Capture("red", "tcp", "tproxy", 12345, ("lan0",), True, exclude=("192.0.2.0/24",))
REDU = Capture("redu", "udp", "tproxy", 12346, ("lan0",))
FORWARDING = Sysctl("net.ipv4.ip_forward", "0")
"""The gateway forwards, so this is a change."""

DEATH = 1.0
"""Seconds after which nothing is left."""

PATIENCE = 20.0


@dataclass
class Place:
    """The gateway's namespace, the state before the test, and where journals are."""

    name: str
    before: State
    directory: Path

    def difference(self, timeout: float = DEATH) -> list[str]:
        return await_same(self.before, self.name, timeout=timeout)

    def provisioner(self, instance: str = "default") -> Provisioner:
        return Provisioner(instance, state_dir=self.directory, netns=self.name)

    def recover(self) -> tuple[list[str], list[str]]:
        steps, alive = recover(self.directory, netns=self.name)
        return [str(step) for step in steps], alive

    def holds(self, item: Resource, before: Resource | None = None) -> None:
        """Have the kernel hold something that is not of gostnet's making."""
        kernel = LiveKernel(self.name)
        kernel.put(item, before)
        kernel.close()

    def lacks(self, item: Resource) -> None:
        kernel = LiveKernel(self.name)
        kernel.drop(item)
        kernel.close()


@pytest.fixture
def place(three: Network, tmp_path: Path) -> Place:
    directory = tmp_path / "state"
    directory.mkdir()
    return Place(three["gateway"], snapshot(three["gateway"]), directory)


# ---- daemons ------------------------------------------------------------------------------------
class Killed(Exception):
    """The daemon has died before it was ready."""


class Daemon:
    """A process of its own that provisions, then waits for its death."""

    def __init__(self, place: Place, desired: list[Resource], instance: str = "default", die_at: int = 0) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reader)
                _live(place, desired, instance, die_at, writer)
            finally:
                os._exit(1)
        os.close(writer)
        self._reader = reader
        self._reaped = False
        self.guard = 0

    def await_ready(self) -> str:
        """Return what it says: its number of points, or the error. Raise Killed."""
        ready, _, _ = select.select([self._reader], [], [], PATIENCE)
        assert ready, "the daemon hangs"
        line = os.read(self._reader, 4096).decode()
        if not line:
            raise Killed
        guard, _, rest = line.partition(" ")
        self.guard = int(guard)
        return rest

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self._reaped:
            os.kill(self.pid, number)
            self.reap()

    def reap(self) -> None:
        if not self._reaped:
            os.waitpid(self.pid, 0)
            self._reaped = True
            os.close(self._reader)


def _live(place: Place, desired: list[Resource], instance: str, die_at: int, writer: int) -> None:
    """Provision; `die_at` > 0 ends the life by SIGKILL at the so-manieth point around whatever touches anything."""
    count = 0

    def point() -> None:
        nonlocal count
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: object, name: str) -> None:
        inner: Callable[..., object] = getattr(owner, name)

        def outer(*args: object, **kwargs: object) -> object:
            point()
            result = inner(*args, **kwargs)
            point()
            return result

        setattr(owner, name, outer)

    for owner, names in (
        (Journal, ("append", "begin")),
        (os, ("fsync", "ftruncate")),
        (LiveKernel, ("put",)),
        (Nft, ("commit",)),
        (watch.Guard, ("await_ready",)),
        (watch.subprocess, ("Popen",)),
    ):
        for name in names:
            around(owner, name)
    provisioner = place.provisioner(instance)
    try:
        provisioner.apply(desired)
    except KernelError as exc:
        os.write(writer, f"0 {exc}".encode())
    else:
        guard = provisioner._guard
        assert isinstance(guard, watch.Guard)
        os.write(writer, f"{guard.pid} {count}".encode())
    while True:
        signal.pause()


@pytest.fixture
def daemon(place: Place) -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def start(desired: list[Resource], **kwargs: object) -> Daemon:
        started.append(Daemon(place, desired, **kwargs))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.kill()
        await_end(one.guard)
        one.reap()


def await_end(pid: int) -> None:
    """Wait for the end of a process that is nobody's child here."""
    deadline = time.monotonic() + PATIENCE
    while pid and journal.started(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.005)


# ---- deaths -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "desired",
    [[RED], [TPROXY], [RED, REDU], [FORWARDING, REDU]],
    ids=["redirect", "tproxy", "both", "sysctl"],
)
def test_kill_leaves_no_trace(place: Place, daemon: Callable[..., Daemon], desired: list[Resource]) -> None:
    one = daemon(desired)
    one.await_ready()
    assert diff(place.before, snapshot(place.name)) != []
    one.kill()
    assert place.difference() == []
    await_end(one.guard)
    assert list(place.directory.iterdir()) == []


def test_kill_at_any_moment_of_the_start_leaves_no_trace(place: Place, daemon: Callable[..., Daemon]) -> None:
    one = daemon([FORWARDING, TPROXY])
    points = int(one.await_ready())
    one.kill()
    await_end(one.guard)
    assert points > 40
    for die_at in range(1, points + 1):
        one = daemon([FORWARDING, TPROXY], die_at=die_at)
        with pytest.raises(Killed):
            one.await_ready()
        one.reap()
        assert place.difference() == [], f"killed at point {die_at} of {points}"
    deadline = time.monotonic() + PATIENCE
    while list(place.directory.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.005)
    # Between the making of the file and the start of the guard nobody watches; the file alone is harmless.
    assert len(list(place.directory.iterdir())) <= 1
    assert place.recover() == ([], [])
    assert list(place.directory.iterdir()) == []


def test_recovery_makes_good_what_daemon_and_guard_left(place: Place, daemon: Callable[..., Daemon]) -> None:
    one = daemon([FORWARDING, TPROXY])
    one.await_ready()  # so that it has the first slot
    other = daemon([REDU], instance="other")
    other.await_ready()
    with_both = snapshot(place.name)
    assert place.recover() == ([], ["default", "other"])
    assert diff(with_both, snapshot(place.name)) == []
    os.kill(one.guard, signal.SIGKILL)
    one.kill()
    await_end(one.guard)
    steps, alive = place.recover()
    assert alive == ["other"]
    assert steps == [
        "- ip rule del pref 18254 fwmark 0x2000000/0x3000000 iif lan0 lookup 18254 protocol 250",
        "- ip rule del pref 18254 fwmark 0x3000000/0x3000000 iif lo lookup 18254 protocol 250",
        "- ip -6 rule del pref 18254 fwmark 0x2000000/0x3000000 iif lan0 lookup 18254 protocol 250",
        "- ip -6 rule del pref 18254 fwmark 0x3000000/0x3000000 iif lo lookup 18254 protocol 250",
        "- ip route del local 0.0.0.0/0 dev lo table 18254 proto 250",
        "- ip -6 route del local ::/0 dev lo table 18254 proto 250",
        "~ sysctl -w net.ipv4.ip_forward=1",
    ]
    assert place.recover() == ([], ["other"])
    other.kill()
    assert place.difference() == []


def test_a_new_start_makes_good_what_the_last_one_left(place: Place, daemon: Callable[..., Daemon]) -> None:
    one = daemon([FORWARDING, TPROXY])
    one.await_ready()
    os.kill(one.guard, signal.SIGKILL)
    one.kill()
    with place.provisioner() as provisioner:
        steps = provisioner.apply([REDU])
        assert {str(step)[0] for step in steps} == {"+"}
        held = [r for r in live_rules(place.name) if r.protocol == ROUTE_PROTOCOL]
        assert {(rule.priority, rule.iif) for rule in held} == {(FIRST_TABLE, "lan0")}
    assert place.difference(0) == []


def live_rules(name: str) -> list[Rule]:
    kernel = LiveKernel(name)
    try:
        return kernel.rules()
    finally:
        kernel.close()


def test_restart_right_after_kill(place: Place, daemon: Callable[..., Daemon]) -> None:
    """The guard of the dead one and the start of the next meet."""
    for _ in range(10):
        one = daemon([FORWARDING, TPROXY])
        assert one.await_ready().isdigit()
        one.kill()
    assert place.difference() == []
    await_end(one.guard)
    assert list(place.directory.iterdir()) == []


def test_guard_outlives_what_ends_all_processes_of_a_service(place: Place, daemon: Callable[..., Daemon]) -> None:
    one = daemon([TPROXY])
    one.await_ready()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(one.guard, number)
    one.kill()
    assert place.difference() == []


def test_guard_has_nothing_of_the_daemon_and_is_gone_after_rollback(place: Place) -> None:
    provisioner = place.provisioner()
    provisioner.apply([TPROXY])
    guard = provisioner._guard
    assert isinstance(guard, watch.Guard)
    links = {os.readlink(f"/proc/{guard.pid}/fd/{name}") for name in os.listdir(f"/proc/{guard.pid}/fd")}
    assert not any("socket" in link or "journal" in link or "/net" in link for link in links), links
    assert os.stat(f"/proc/{guard.pid}/ns/net").st_ino == netns.inode(place.name)
    assert os.readlink(f"/proc/{guard.pid}/cwd") == "/"
    assert Path(f"/proc/{guard.pid}/comm").read_text().strip() == "gostnet-guard"
    provisioner.rollback()
    assert not os.path.exists(f"/proc/{guard.pid}"), "neither a process nor a zombie"
    assert place.difference(0) == []
    provisioner.close()


def test_guard_that_was_killed_is_replaced_at_the_next_reload(place: Place) -> None:
    with place.provisioner() as provisioner:
        provisioner.apply([TPROXY])
        first = provisioner._guard
        assert isinstance(first, watch.Guard)
        os.kill(first.pid, signal.SIGKILL)
        await_end(first.pid)
        provisioner.apply([RED])
        second = provisioner._guard
        assert isinstance(second, watch.Guard)
        assert second.pid != first.pid
        assert second.alive
    assert place.difference(0) == []


# ---- instances ----------------------------------------------------------------------------------
def test_second_instance_of_a_name_is_refused_and_another_name_has_its_own_slot(
    place: Place, three: Network, daemon: Callable[..., Daemon]
) -> None:
    one = daemon([TPROXY])
    one.await_ready()
    held = snapshot(place.name)
    with place.provisioner() as twin:
        with pytest.raises(KernelError, match=rf"'default' runs already .* by process {one.pid}"):
            twin.apply([RED])
        assert [str(step).splitlines()[0] for step in twin.plan([TPROXY])] == [], "what the other holds is no change"
        assert any(str(step).startswith("- ip rule") for step in twin.plan([RED]))
    assert diff(held, snapshot(place.name)) == []
    with place.provisioner("second") as second:
        second.apply([REDU])
        assert {r.table for r in live_rules(place.name) if r.protocol == ROUTE_PROTOCOL} == {18254, 18255}
    assert diff(held, snapshot(place.name)) == []
    with Provisioner("default", state_dir=place.directory, netns=three["client"]) as elsewhere:
        assert elsewhere.apply([RED]) != []


def test_table_of_a_living_process_is_not_taken(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_OWNER_TIMEOUT", 0.05)
    owner = LiveKernel(place.name)
    owner.put(NftTable("gostnet-default", (NftChain("c", "forward"),)), None)
    with place.provisioner() as provisioner:
        with pytest.raises(KernelError, match="belongs to another process"):
            provisioner.apply([TPROXY])
        assert not provisioner.holds
    owner.close()
    assert place.difference(0) == []


def test_foreign_objects_survive(place: Place, daemon: Callable[..., Daemon]) -> None:
    ours = daemon([TPROXY])
    ours.await_ready()
    foreign: list[Resource] = [
        NftTable("admin", (NftChain("c", "forward"),), owner=False),
        Rule(4, FIRST_TABLE, FIRST_TABLE, 0x77, 0xFF, "lan0", protocol=99),
        Rule(6, 5000, 254, 0x77, 0xFF, "", protocol=99),
        Route("198.51.100.0/24", FIRST_TABLE, "local", "lo", protocol=99),
        Route("203.0.113.0/24", 254, "unicast", "wan0", protocol=99),
        Sysctl("net.ipv4.conf.lan0.rp_filter", "2"),
        Address("lan0", "198.51.100.1/32"),
    ]
    for item in foreign:
        place.holds(item)
    ours.kill()
    await_end(ours.guard)
    assert place.recover() == ([], [])
    clean = place.before
    kernel = LiveKernel(place.name)
    for item in foreign:
        assert kernel.observe(item) == item or isinstance(item, NftTable)
    assert "admin" in [table.name for table in kernel.tables()]
    for item in reversed(foreign):
        kernel.drop(item)
    kernel.put(Sysctl("net.ipv4.conf.lan0.rp_filter", "0"), None)
    kernel.close()
    assert diff(clean, snapshot(place.name)) == []


def test_what_somebody_changed_meanwhile_is_left_and_reported(place: Place) -> None:
    setting = Sysctl("net.ipv4.conf.lan0.rp_filter", "1")
    with place.provisioner() as provisioner:
        provisioner.apply([setting, REDU])
        place.holds(replace(setting, value="2"))
        place.lacks(Route("::/0", FIRST_TABLE, "local", "lo"))
        steps = [str(step) for step in provisioner.rollback()]
    assert "! sysctl net.ipv4.conf.lan0.rp_filter: changed by somebody else, so it is left as it is" in steps
    place.holds(replace(setting, value="0"))
    assert place.difference(0) == []
    assert list(place.directory.iterdir()) == []


def test_strays_without_a_journal_are_found_by_their_marks(place: Place) -> None:
    strays: list[Resource] = [
        Route("0.0.0.0/0", FIRST_TABLE, "local", "lo"),
        Route("2001:db8:7::/48", 254, "unicast", "wan0"),
        Rule(4, FIRST_TABLE, FIRST_TABLE, 0x02000000, 0x03000000, "lan0"),
        NftTable("gostnet-old", (NftChain("c", "forward"),), owner=False),
    ]
    for item in strays:
        place.holds(item)
    place.holds(NftTable("gostnet-old-lock", (NftChain("c", "forward"),), owner=False))
    steps, _ = place.recover()
    assert steps == [
        "- nft delete table inet gostnet-old",
        "- ip rule del pref 18254 fwmark 0x2000000/0x3000000 iif lan0 lookup 18254 protocol 250",
        "- ip route del local 0.0.0.0/0 dev lo table 18254 proto 250",
        "- ip -6 route del 2001:db8:7::/48 dev wan0 table 254 proto 250",
    ]
    place.lacks(NftTable("gostnet-old-lock"))
    assert place.difference(0) == []


def test_journal_of_another_boot_or_namespace_is_only_removed(
    place: Place, daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    for attribute, value in (("boot_id", "another"), ("namespace_cookie", 1)):
        one = daemon([FORWARDING])
        one.await_ready()
        os.kill(one.guard, signal.SIGKILL)
        one.kill()
        with monkeypatch.context() as patch:
            patch.setattr(f"gostnet.kernel.recovery.{attribute}", lambda value=value: value)
            assert place.recover() == ([], [])
        assert list(place.directory.iterdir()) == []
        place.holds(Sysctl("net.ipv4.ip_forward", "1"))


# ---- all or nothing -----------------------------------------------------------------------------
BROKEN = Route("198.51.100.0/24", 254, "unicast", "nowhere0")


def test_failed_start_leaves_nothing(place: Place) -> None:
    with place.provisioner() as provisioner:
        with pytest.raises(KernelError, match=r"ip route add 198\.51\.100\.0/24 .*no interface 'nowhere0'"):
            provisioner.apply([FORWARDING, TPROXY, BROKEN])
        assert not provisioner.holds
        assert place.difference(0) == []
        assert list(place.directory.iterdir()) == []
        provisioner.apply([FORWARDING, TPROXY])
        assert provisioner.holds
    assert place.difference(0) == []


def test_failed_reload_keeps_what_was_there(place: Place) -> None:
    with place.provisioner() as provisioner:
        provisioner.apply([FORWARDING, TPROXY])
        held = snapshot(place.name)
        with pytest.raises(KernelError):
            provisioner.apply([Sysctl("net.ipv4.ip_forward", "1"), RED, REDU, BROKEN])
        assert diff(held, snapshot(place.name)) == []
        assert provisioner.plan([FORWARDING, TPROXY]) == []
    assert place.difference(0) == []


def test_refused_statement_is_named_and_nothing_of_its_table_stays(place: Place) -> None:
    good = (NftSet("s", "ipv4_addr", ("192.0.2.0/24",)), NftChain("c", "forward"))
    broken = NftRule("c", *nft_expr.jump("missing"))
    kernel = LiveKernel(place.name)
    with pytest.raises(KernelError, match="nft add rule inet gostnet-x c jump missing: No such file") as caught:
        kernel.put(NftTable("gostnet-x", (*good, broken)), None)
    assert caught.value.errno == errno.ENOENT
    assert kernel.tables() == []
    table = NftTable("gostnet-x", good)
    kernel.put(table, None)
    held = snapshot(place.name)
    more = NftSet("t", "ipv4_addr", ("198.51.100.0/24",))
    with pytest.raises(KernelError):
        kernel.put(NftTable("gostnet-x", (*good, more, broken)), table)
    assert diff(held, snapshot(place.name)) == []
    kernel.close()
    assert place.difference(0) == []


def test_reload_through_every_kind_of_capture(place: Place) -> None:
    stages: list[list[Resource]] = [
        [RED],
        [RED, REDU],
        [TPROXY],
        [replace(TPROXY, interfaces=("wan0", "later0"), exclude=(), ports=((80, 90),))],
        [FORWARDING, replace(RED, sources=("10.0.0.0/8",))],
        [FORWARDING, TPROXY, REDU],
        [],
        [REDU],
    ]
    with place.provisioner() as provisioner:
        for desired in stages:
            planned = [str(step) for step in provisioner.plan(desired)]
            assert [str(step) for step in provisioner.apply(desired)] == planned
            assert provisioner.apply(desired) == []
            reloaded = snapshot(place.name)
            with_fresh = _fresh(place, provisioner, desired)
            assert diff(with_fresh, reloaded) == [], "a reload leads to what a start leads to"
    assert place.difference(0) == []


def _fresh(place: Place, provisioner: Provisioner, desired: list[Resource]) -> State:
    """Return the state that a start would lead to, and have the provisioner hold it again."""
    provisioner.rollback()
    assert place.difference(0) == []
    provisioner.apply(desired)
    return snapshot(place.name)


# ---- plan ---------------------------------------------------------------------------------------
def test_plan_changes_nothing(place: Place) -> None:
    with place.provisioner() as provisioner:
        assert provisioner.plan([TPROXY, REDU, FORWARDING]) != []
        assert provisioner.plan([]) == []
    assert place.difference(0) == []
    assert list(place.directory.iterdir()) == []


def test_plan_applied_by_hand_has_the_same_effect(place: Place, peer: Callable[[str], str]) -> None:
    nft, ip = peer("nft"), peer("ip")

    def state() -> list[str]:
        with netns.inside(place.name):
            listed = subprocess.run([nft, "list", "ruleset"], capture_output=True, text=True, check=True).stdout
        tables = [line.partition(" # progname")[0] for line in listed.splitlines()]
        return [*tables, *str(replace_nft(snapshot(place.name))).splitlines()]

    def replace_nft(of: State) -> State:
        return State({name: lines for name, lines in of.sections.items() if name != "nft"})

    stages: list[list[Resource]] = [
        [FORWARDING, TPROXY, replace(REDU, ports=((53, 53), (1000, 2000)))],
        [FORWARDING, replace(TPROXY, exclude=("2001:db8::/32",)), replace(REDU, local=True)],
        [replace(RED, sources=("10.0.0.0/8",))],
    ]
    by_hand: list[list[str]] = []
    by_us: list[list[str]] = []
    with place.provisioner() as provisioner:
        for desired in stages:
            by_hand.append([line[2:] for step in provisioner.plan(desired) for line in str(step).splitlines()])
            provisioner.apply(desired)
            by_us.append(state())
    assert place.difference(0) == []
    programs = {"ip": ip, "sysctl": "sysctl"}
    # Owned tables last as long as the nft that made them, so it runs on, as `nft -i` does.
    with netns.inside(place.name):
        interactive = subprocess.Popen([nft, "-i"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert interactive.stdin is not None
    assert interactive.stdout is not None
    try:
        for commands, wanted in zip(by_hand, by_us, strict=True):
            for command in commands:
                program, _, rest = command.partition(" ")
                if program == "nft":
                    interactive.stdin.write(rest + "\n")
                    continue
                with netns.inside(place.name):
                    if program == "sysctl":
                        name, _, value = rest.removeprefix("-w ").partition("=")
                        Path("/proc/sys", *name.split(".")).write_text(value)
                    else:
                        subprocess.run([programs[program], *shlex.split(rest)], check=True)
            interactive.stdin.write("list tables\n")
            interactive.stdin.flush()
            interactive.stdout.readline()
            assert state() == wanted
    finally:
        interactive.communicate("quit\n")
        interactive.wait()


# ---- privilege ----------------------------------------------------------------------------------
@pytest.mark.parametrize("desired", [[RED], [TPROXY]], ids=["redirect", "tproxy"])
def test_missing_privilege_is_named_at_once(place: Place, tmp_path: Path, desired: list[Resource]) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    place.directory.chmod(0o777)
    reader, writer = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            with netns.inside(place.name):
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                try:
                    Provisioner("default", state_dir=place.directory).apply(desired)
                    os.write(writer, b"no error")
                except KernelError as exc:
                    os.write(writer, f"{exc} | {exc.hint}".encode())
                os._exit(0)  # there is no way back into the other namespace
        finally:
            os._exit(1)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], PATIENCE)
    assert ready
    message = os.read(reader, 4096).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    assert "CAP_NET_ADMIN" in message
    assert message.startswith(("nft ", "ip route add")), message
    assert time.monotonic() - began < 5
    assert place.difference(0) == []
    assert list(place.directory.iterdir()) == []


# ---- resources one by one -----------------------------------------------------------------------
def test_link_address_and_sysctl_come_and_go(place: Place) -> None:
    desired: list[Resource] = [
        Link("lan0", 1400, True),
        Address("lan0", "198.51.100.1/24"),
        Address("lan0", "2001:db8:5::1/64"),
        Sysctl("net.ipv4.conf.lan0.forwarding", "0"),
        Route("203.0.113.0/24", 254, "unicast", "lan0", "198.51.100.2", 77),
        Route("2001:db8:6::/48", 254, "unicast", "lan0", "2001:db8:5::2"),
        Route("203.0.114.0/24", 254, "blackhole"),
    ]
    with place.provisioner() as provisioner:
        provisioner.apply(desired)
        kernel = LiveKernel(place.name)
        for item in desired:
            assert kernel.observe(item) == item
        kernel.close()
        assert provisioner.plan(desired) == []
    assert place.difference(0) == []


def test_setting_of_a_device_that_is_gone_is_no_matter(place: Place) -> None:
    with netns.inside(place.name):
        subprocess.run(["ip", "link", "add", "gone0", "type", "veth", "peer", "gone1"], check=True)
    with place.provisioner() as provisioner:
        provisioner.apply([Link("gone0", 1400), Sysctl("net.ipv4.conf.gone0.rp_filter", "1"), REDU])
        with netns.inside(place.name):
            subprocess.run(["ip", "link", "del", "gone0"], check=True)
        assert all(step.verb == "drop" for step in provisioner.rollback())
    assert place.difference() == []


def test_replaced_route_comes_back_with_everything_that_it_had(place: Place) -> None:
    with netns.inside(place.name):
        route = "203.0.113.0/24 via 10.99.2.2 dev wan0 src 10.99.2.1 mtu lock 1300 advmss 1200 proto static"
        subprocess.run(["ip", "route", "add", *route.split()], check=True)
    before = snapshot(place.name)
    desired = [Route("203.0.113.0/24", 254, "unicast", "lan0")]
    with place.provisioner() as provisioner:
        assert [step.verb for step in provisioner.apply(desired)] == ["change"]
        assert diff(before, snapshot(place.name)) != []
    assert diff(before, snapshot(place.name)) == []


def test_one_hundred_thousand_networks_are_excluded(place: Place) -> None:
    networks = tuple(f"{10 + n // 65536}.{n // 256 % 256}.{n % 256}.0/25" for n in range(100_000))
    with place.provisioner() as provisioner:
        provisioner.apply([replace(RED, exclude=networks)])
        assert len(provisioner.apply([replace(RED, exclude=networks[1:])])) == 1
    assert place.difference(0) == []


def test_calls_come_from_any_thread(place: Place) -> None:
    """The app calls from worker threads, which are in the namespace that the process was started in."""
    with place.provisioner() as provisioner:
        errors: list[BaseException] = []

        def call(desired: list[Resource]) -> None:
            try:
                provisioner.apply(desired)
            except BaseException as exc:
                errors.append(exc)

        for desired in ([FORWARDING, TPROXY], [RED], []):
            thread = threading.Thread(target=call, args=(desired,))
            thread.start()
            thread.join()
        assert errors == []
    assert place.difference(0) == []


def test_owner_is_told_from_another_process_with_its_id() -> None:
    me = Owner.current()
    assert me.alive
    assert not me._replace(start=me.start + 1).alive
    assert nft_table.digest_of(["content_1", "content_2"]) == ""


# ---- bridges ------------------------------------------------------------------------------------
def test_bridges_and_their_ports(place: Place) -> None:
    """One is made and taken away, ports go back to where they were; one that was there is left as it was."""
    with place.provisioner() as provisioner:
        steps = provisioner.apply([Bridge("br-own"), Port("lan0", "br-own"), Address("br-own", "10.55.0.1/24")])
        assert [str(step) for step in steps][:2] == [
            "+ ip link add br-own type bridge",
            "~ ip link set dev lan0 master br-own",
        ]
        assert provisioner.plan([Bridge("br-own"), Port("lan0", "br-own"), Address("br-own", "10.55.0.1/24")]) == []
        kernel = LiveKernel(place.name)
        kernel.put(Bridge("br-other"), None)
        kernel.close()
        provisioner.apply([Bridge("br-other"), Port("lan0", "br-other")])
        with pytest.raises(KernelError, match="no bridge"):
            provisioner.plan([Bridge("wan0")])
    assert [line for line in place.difference() if "br-other" not in line] == []
    place.lacks(Bridge("br-other"))
    assert place.difference() == []


def test_a_bridge_with_foreign_ports_stays(place: Place) -> None:
    provisioner = place.provisioner()
    provisioner.apply([Bridge("br-own"), Port("lan0", "br-own")])
    place.holds(Port("wan0", "br-own"), Port("wan0", ""))
    said = [str(step) for step in provisioner.rollback()]
    assert any("ports that are not ours: wan0" in line for line in said)
    provisioner.close()
    assert place.recover() == ([], [])
    place.holds(Port("wan0", ""), Port("wan0", "br-own"))
    place.lacks(Bridge("br-own"))
    assert place.difference() == []


def test_two_instances_with_one_bridge_of_which_one_is_killed(place: Place, daemon: Callable[..., Daemon]) -> None:
    first = daemon([Bridge("br-own"), Port("lan0", "br-own"), FORWARDING], instance="first")
    first.await_ready()
    with place.provisioner("second") as second:
        second.apply([Bridge("br-own"), Port("wan0", "br-own"), FORWARDING])
        (path,) = place.directory.glob("*-first.journal")
        first.kill()
        assert journal.await_release(path)
        kernel = LiveKernel(place.name)
        assert kernel.observe(Bridge("br-own")) == Bridge("br-own")
        assert kernel.observe(FORWARDING) == FORWARDING
        kernel.close()
    assert place.difference() == []
