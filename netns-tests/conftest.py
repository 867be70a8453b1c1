"""Fixtures of the tests that need root and network namespaces.

Each test builds its own network and leaves nothing: namespaces, child processes and descriptors are compared with
what there was before it.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from gostnet.core.errors import KernelError
from gostnet.kernel import netns
from gostnet.testing.namespaces import Network, Topology, own_name, row, sweep
from gostnet.testing.processes import Process, gostnet, stop_all
from gostnet.testing.servers import Servers, serving_in_thread
from gostnet.testing.state import await_same, snapshot

PATIENCE = 120
"""Seconds after which a hanging test prints every thread's stack and ends the run."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs namespaces where none can be made."""
    try:
        netns.anonymous().close()
    except KernelError as exc:
        reason = f"{exc}; {exc.hint}"
        for item in items:
            if item.get_closest_marker("netns") is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    """Remove what runs that were killed left behind."""
    if os.geteuid() == 0:
        sweep()


@pytest.fixture(autouse=True)
def _no_hanging_test() -> Iterator[None]:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Assert that the test leaves no namespace, no child process and no descriptor."""
    gc.collect()
    descriptors = _descriptors()
    yield
    prefix = own_name("")
    left = [name for name in netns.names() if name.startswith(prefix)]
    for name in left:
        netns.delete(name, missing_ok=True)
    assert not left, f"namespaces left: {left}"
    assert not _children(), f"child processes left: {_children()}"
    gc.collect()
    more = {fd: what for fd, what in _descriptors().items() if descriptors.get(fd) != what}
    assert not more, f"descriptors left: {more}"


@pytest.fixture
def build() -> Iterator[Callable[[Topology], Network]]:
    """Build a topology; it is gone at the end of the test."""
    with ExitStack() as stack:
        yield lambda topology: stack.enter_context(Network(topology))


@pytest.fixture
def three(build: Callable[[Topology], Network]) -> Network:
    """Client, gateway and server in a row: 10.99.1.1 - lan0 10.99.1.2, wan0 10.99.2.1 - 10.99.2.2, and fd99 alike."""
    return build(row("client", "gateway", "server"))


@pytest.fixture
def servers(three: Network) -> Iterator[Servers]:
    """Run the small servers on both addresses of the server; their zone has web.lab."""
    addresses = [three.address("server", version) for version in (4, 6)]
    with serving_in_thread(three["server"], addresses, zone={"web.lab": addresses}) as found:
        yield found


@pytest.fixture
def two(build: Callable[[Topology], Network]) -> Network:
    """Client and server on one link."""
    return build(row("client", "server"))


@pytest.fixture
def star(build: Callable[[Topology], Network]) -> Network:
    """The server between two clients."""
    return build(row("client", "server", "other"))


Daemon = Callable[..., Process]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Start gostnet: `daemon(place, configuration)` or `daemon(place, "-L", "socks5://:1080")`, and wait until ready.

    `configuration` is a mapping or YAML text. With `ready=False` it is not waited for. Stopped at the end of the
    test; what it said is in the report of a failure.
    """
    started: list[Process] = []

    def start(
        place: netns.Place, *what: str | Mapping[str, Any], ready: bool = True, env: Mapping[str, str] | None = None
    ) -> Process:
        words: list[str] = []
        for item in what:
            if isinstance(item, str) and "\n" not in item:
                words.append(item)
                continue
            path = tmp_path / f"daemon-{len(started)}.yaml"
            path.write_text(item if isinstance(item, str) else yaml.safe_dump(dict(item), sort_keys=False))
            words += ["-C", str(path)]
        process = gostnet(*words, place=place, env=env)
        started.append(process)
        process.start()
        if ready:
            process.wait_ready()
        return process

    with ExitStack() as stack:
        stack.callback(lambda: [print(f"--- {p.name} {p.arguments[3:]}\n{p.errors}") for p in started])
        stack.callback(lambda: stop_all(started))
        yield start


Unchanged = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def unchanged() -> Unchanged:
    """Assert around a block that the kernel's state of a namespace is the same after it: `with unchanged(place):`.

    It has `timeout` seconds to become so; further arguments go to `snapshot`.
    """

    @contextmanager
    def compare(place: netns.Place, *, timeout: float = 1.0, **options: Any) -> Iterator[None]:
        before = snapshot(place, **options)
        yield
        difference = await_same(before, place, timeout=timeout, **options)
        assert not difference, "\n".join(["the kernel's state has changed:", *difference])

    return compare


@pytest.fixture
def peer() -> Callable[[str], str]:
    """Return the path of a Debian program; without it the test is skipped, under CI it fails."""

    def find(name: str) -> str:
        path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path is None:
            reason = f"{name} is not installed; scripts/peers installs it"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        return path

    return find


@pytest.fixture
def gost_bin() -> str:
    """Return the path of a real gost; without GOST_BIN the test is skipped."""
    path = os.environ.get("GOST_BIN", "")
    if not path:
        pytest.skip("GOST_BIN is not set: it is the path of a gost binary")
    if not os.access(path, os.X_OK):
        pytest.fail(f"GOST_BIN={path} is not a program")
    return path


@pytest.fixture
def launch(gost_bin: str) -> Iterator[Callable[..., Process]]:
    """Start gost or gostnet with `-L`/`-F` words (`launch("gost", place, ...)`) and wait until it listens."""
    running: list[Process] = []

    def start(which: str, place: str, *words: str) -> Process:
        process = Process([gost_bin, *words], place, name="gost") if which == "gost" else gostnet(*words, place=place)
        running.append(process)
        process.start()
        if which == "gost":
            process.wait_for(_seen("listening on", sum(word == "-L" for word in words)))
        else:
            process.wait_ready()
        return process

    yield start
    stop_all(running)
    for process in running:
        print(f"--- {process.name} {process.arguments[1:]}\n{process.output}{process.errors}")


def _seen(text: str, times: int) -> Callable[[str], bool]:
    """Return what is true of the line in which a text is seen for the last of so many times."""
    left = times

    def last(line: str) -> bool:
        nonlocal left
        left -= text in line
        return left <= 0

    return last


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the directory's own descriptor
    return found


def _children() -> list[str]:
    found = []
    for task in os.listdir("/proc/self/task"):
        for pid in Path(f"/proc/self/task/{task}/children").read_text().split():
            try:
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip() or pid)
            except OSError:
                continue
    return found
