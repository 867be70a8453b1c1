"""Instances that want the same sysctl or bridge: the last that goes takes it away."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gostnet.core.errors import KernelError
from gostnet.core.resources import Bridge, Key, Link, Port, Resource, Route, Sysctl
from gostnet.kernel.journal import Owner
from gostnet.kernel.provision import Provisioner
from gostnet.kernel.recovery import recover

from .test_crash import FakeKernel, die, fake_guard

OFF = Sysctl("net.ipv4.ip_forward", "0")
ON = Sysctl("net.ipv4.ip_forward", "1")
BRIDGE = Bridge("br0")
ALONE = Port("eth1", "")
PORT = Port("eth1", "br0")
DEAD = Owner(2**22 + 1, 1)


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel({OFF.key: OFF, ALONE.key: ALONE})


def instance(name: str, kernel: FakeKernel, directory: Path) -> Provisioner:
    return Provisioner(name, state_dir=directory, kernel=kernel, start_guard=fake_guard)  # type: ignore[arg-type]


def route(number: int) -> Route:
    return Route(f"10.{number}.0.0/16", device="lo")


@pytest.mark.parametrize("item", [ON, BRIDGE, PORT], ids=["sysctl", "bridge", "port"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-first", "second-first"])
def test_the_last_instance_restores(kernel: FakeKernel, tmp_path: Path, item: Resource, order: tuple[int, int]) -> None:
    before = dict(kernel.state)
    instances = [instance(name, kernel, tmp_path) for name in ("one", "two")]
    assert len(instances[0].apply([item])) == 1
    assert instances[1].apply([item]) == []
    assert instances[1].holds
    assert instances[order[0]].rollback() == []
    assert kernel.state[item.key] == item
    assert len(instances[order[1]].rollback()) == 1
    assert kernel.state == before
    assert not list(tmp_path.iterdir())
    for one in instances:
        one.close()


def test_three_instances_come_and_go(kernel: FakeKernel, tmp_path: Path) -> None:
    one, two, three = (instance(name, kernel, tmp_path) for name in ("one", "two", "three"))
    one.apply([ON])
    two.apply([ON])
    one.close()
    three.apply([ON, route(3)])
    two.close()
    assert kernel.state[ON.key] == ON
    three.close()
    assert kernel.state == {OFF.key: OFF, ALONE.key: ALONE}


def test_a_reload_that_does_without_leaves_it_to_the_other(kernel: FakeKernel, tmp_path: Path) -> None:
    one, two = instance("one", kernel, tmp_path), instance("two", kernel, tmp_path)
    one.apply([ON, route(1)])
    two.apply([ON])
    assert one.apply([route(1)]) == []
    two.close()
    assert kernel.state == {OFF.key: OFF, ALONE.key: ALONE, route(1).key: route(1)}
    one.apply([ON, route(1)])
    assert kernel.state[ON.key] == ON
    one.close()
    assert kernel.state == {OFF.key: OFF, ALONE.key: ALONE}


def test_what_was_there_before_any_instance_is_nobodys(tmp_path: Path) -> None:
    kernel = FakeKernel({ON.key: ON, BRIDGE.key: BRIDGE})
    one, two = instance("one", kernel, tmp_path), instance("two", kernel, tmp_path)
    one.apply([ON, BRIDGE, route(1)])
    two.apply([ON, BRIDGE, route(2)])
    one.close()
    two.close()
    assert kernel.state == {ON.key: ON, BRIDGE.key: BRIDGE}


def test_a_failed_start_gives_up_its_claim(kernel: FakeKernel, tmp_path: Path) -> None:
    one, two = instance("one", kernel, tmp_path), instance("two", kernel, tmp_path)
    one.apply([ON])
    kernel.refuse.add(route(2).key)
    with pytest.raises(KernelError):
        two.apply([ON, route(2)])
    assert not two.holds
    one.close()
    two.close()
    assert kernel.state == {OFF.key: OFF, ALONE.key: ALONE}


def test_what_a_dead_instance_left_is_held_by_who_wants_it(
    kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, live = instance("dead", kernel, tmp_path), instance("live", kernel, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "current", classmethod(lambda cls: DEAD))
        dead.apply([ON, route(1)])
    die(dead)
    live.apply([ON])
    assert [str(step) for step in recover(tmp_path, kernel=kernel).steps if "route" not in str(step)] == []
    assert kernel.state == {ON.key: ON, ALONE.key: ALONE}
    live.close()
    assert kernel.state == {OFF.key: OFF, ALONE.key: ALONE}


def test_a_live_instance_outlasts_who_held_it_first(
    kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = instance("first", kernel, tmp_path), instance("second", kernel, tmp_path)
    first.apply([ON])
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "current", classmethod(lambda cls: DEAD))
        second.apply([ON])
    die(second)
    assert recover(tmp_path, kernel=kernel).steps == []
    first.close()
    assert kernel.state == {OFF.key: OFF, ALONE.key: ALONE}


def test_a_bridge_that_others_have_put_ports_in_stays_and_holds_nobody_up(tmp_path: Path) -> None:
    class Occupied(FakeKernel):
        def drop(self, item: Resource) -> None:
            if isinstance(item, Bridge):
                raise KernelError("ip link del br0 type bridge", errno.EBUSY, "it has ports that are not ours: eth2")
            super().drop(item)

    state: dict[Key, Resource] = {Link("eth1", 1500).key: Link("eth1", 1500), ("port", "eth1"): Port("eth1", "")}
    kernel = Occupied(dict(state))
    one = instance("one", kernel, tmp_path)
    one.apply([BRIDGE, Port("eth1", "br0")])
    assert kernel.state["port", "eth1"] == Port("eth1", "br0")
    kept = [step for step in one.rollback() if step.verb == "keep"]
    assert "eth2" in str(kept[0])
    assert kernel.state == {**state, BRIDGE.key: BRIDGE}
    assert not list(tmp_path.iterdir())
    one.close()
