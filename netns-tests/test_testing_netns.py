"""Namespaces, named and anonymous, as `ip netns` knows them."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gostnet.core.errors import KernelError
from gostnet.kernel import netns
from gostnet.testing.namespaces import own_name
from gostnet.testing.processes import run_program

pytestmark = pytest.mark.netns


@pytest.fixture
def name() -> Iterator[str]:
    name = own_name("one")
    netns.create(name)
    yield name
    netns.delete(name, missing_ok=True)


def test_create_makes_a_namespace_that_ip_netns_lists(name: str, peer: Callable[[str], str]) -> None:
    ip = peer("ip")
    assert name in run_program([ip, "netns", "list"]).output.split()
    shown = run_program([ip, "netns", "exec", name, "readlink", "/proc/self/ns/net"]).output
    assert shown.strip() == f"net:[{netns.inode(name)}]"


def test_delete_removes_a_namespace_that_ip_netns_made(peer: Callable[[str], str]) -> None:
    made = own_name("theirs")
    run_program([peer("ip"), "netns", "add", made])
    assert netns.exists(made)
    netns.delete(made)
    assert not netns.exists(made)
    assert made not in netns.names()


def test_create_refuses_a_name_in_use(name: str) -> None:
    before = netns.inode(name)
    with pytest.raises(KernelError, match="File exists") as caught:
        netns.create(name)
    assert caught.value.errno == errno.EEXIST
    assert netns.inode(name) == before


def test_delete_says_when_there_is_nothing() -> None:
    with pytest.raises(KernelError) as caught:
        netns.delete(own_name("none"))
    assert caught.value.errno == errno.ENOENT
    netns.delete(own_name("none"), missing_ok=True)


def test_delete_removes_a_name_without_its_mount() -> None:
    remains = netns.path_of(own_name("remains"))
    remains.touch()
    netns.delete(remains.name)
    assert not remains.exists()


def test_delete_removes_all_of_several_mounts(name: str) -> None:
    run_program(["mount", "--bind", "/proc/self/ns/net", f"/run/netns/{name}"])
    netns.delete(name)
    assert not any(f"/{name} " in line for line in Path("/proc/self/mountinfo").read_text().splitlines())


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "a\0b", "x" * 256])
def test_names_are_checked(bad: str) -> None:
    with pytest.raises(KernelError, match="usable name"):
        netns.create(bad)


def test_inside_moves_the_thread_and_back(name: str) -> None:
    home = netns.inode()
    with netns.inside(name):
        assert netns.inode() == netns.inode(name) != home
        assert "eth0" not in [interface for _, interface in socket.if_nameindex()]
    assert netns.inode() == home


def test_inside_comes_back_after_an_error(name: str) -> None:
    home = netns.inode()
    with pytest.raises(ValueError, match="inside"), netns.inside(name):
        raise ValueError("inside")
    assert netns.inode() == home


def test_inside_nests(name: str) -> None:
    with netns.anonymous() as other, netns.inside(name), netns.inside(other):
        assert netns.inode() == other.inode
        with netns.inside(name):
            assert netns.inode() == netns.inode(name)
        assert netns.inode() == other.inode


def test_inside_moves_no_other_thread(name: str) -> None:
    home, seen = netns.inode(), []
    entered, asked = threading.Event(), threading.Event()

    def body() -> None:
        entered.wait()
        seen.append(netns.inode())
        asked.set()

    thread = threading.Thread(target=body)
    thread.start()
    with netns.inside(name):
        entered.set()
        asked.wait()
    thread.join()
    assert seen == [home]


def test_inside_of_an_unknown_name_does_not_move() -> None:
    home = netns.inode()
    with pytest.raises(KernelError, match="No such file"), netns.inside(own_name("none")):
        pass
    assert netns.inode() == home


def test_inside_of_something_else_does_not_move(tmp_path: Path) -> None:
    home = netns.inode()
    other = tmp_path / "file"
    other.touch()
    with pytest.raises(KernelError, match="enter network namespace"), netns.inside(other):
        pass
    assert netns.inode() == home


def test_places_may_be_paths_descriptors_and_none(name: str) -> None:
    number = netns.inode(name)
    with netns.open_namespace(name) as held:
        assert netns.inode(f"/run/netns/{name}") == number
        assert netns.inode(Path(f"/run/netns/{name}")) == number
        assert netns.inode(held) == number
        assert netns.inode(held.fileno()) == number
        assert netns.inode(None) == os.stat("/proc/thread-self/ns/net").st_ino


def test_socket_belongs_to_its_namespace(name: str) -> None:
    with netns.socket_in(name, socket.AF_INET, socket.SOCK_STREAM) as sock:
        assert not sock.getblocking()
        assert not os.get_inheritable(sock.fileno())
        with pytest.raises(OSError, match="unreachable"):  # loopback is down there, and nothing else exists
            sock.connect(("127.0.0.1", 9))


def test_socket_that_the_kernel_refuses_leaves_the_thread_at_home(name: str) -> None:
    home = netns.inode()
    with pytest.raises(KernelError, match="make a socket"):
        netns.socket_in(name, 999, socket.SOCK_STREAM)
    assert netns.inode() == home


def test_anonymous_namespaces_are_new_and_nameless() -> None:
    names = netns.names()
    with netns.anonymous() as one, netns.anonymous() as two:
        assert len({one.inode, two.inode, netns.inode()}) == 3
        assert netns.names() == names


def test_closed_namespace_cannot_be_used() -> None:
    namespace = netns.anonymous()
    namespace.close()
    namespace.close()
    with pytest.raises(KernelError, match="closed"):
        netns.inode(namespace)


def test_open_namespace_outlives_its_name(name: str) -> None:
    with netns.open_namespace(name) as held:
        netns.delete(name)
        with netns.socket_in(held, socket.AF_INET, socket.SOCK_DGRAM):
            pass


def test_creators_at_once_do_not_stack_mounts() -> None:
    names = [own_name(f"n{number}") for number in range(8)]
    threads = [threading.Thread(target=netns.create, args=(name,)) for name in names]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        assert mounts.count("/run/netns") == 1
        assert all(mounts.count(f"/run/netns/{name}") == 1 for name in names)
    finally:
        for name in names:
            netns.delete(name, missing_ok=True)
