"""Plan, apply and roll back against a dict that plays the kernel, with a crash at every point.

A crash runs no clean-up: the objects are dropped where they stand, only what the kernel would close is closed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostnet.core.errors import KernelError
from gostnet.core.resources import (
    Address,
    Bridge,
    Key,
    Link,
    NftChain,
    NftTable,
    Port,
    Resource,
    Route,
    Rule,
    Sysctl,
)
from gostnet.kernel.journal import Journal, Owner
from gostnet.kernel.plan import Step
from gostnet.kernel.provision import Provisioner
from gostnet.kernel.recovery import recover

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where journals are kept whose lines need not outlast the machine: each is put on disk before it counts."""


class Crash(BaseException):
    """The process has died."""


class Fuse:
    """Counts points, and burns at the chosen one."""

    def __init__(self, points: int = 0) -> None:
        self.left = points
        self.passed = 0

    def point(self) -> None:
        self.passed += 1
        self.left -= 1
        if self.left == 0:
            raise Crash


class FakeKernel:
    """A kernel as a dict. `refuse` names keys whose changes fail."""

    def __init__(self, state: dict[Key, Resource], fuse: Fuse | None = None) -> None:
        self.state = state
        self.fuse = fuse or Fuse()
        self.refuse: set[Key] = set()

    def observe(self, item: Resource) -> Resource | None:
        there = self.state.get(item.key)
        if isinstance(there, NftTable):
            return NftTable(there.name, owner=there.owner, note=there.note, digest=there.digest)
        return there

    def put(self, item: Resource, before: Resource | None) -> None:
        self.fuse.point()
        if item.key in self.refuse:
            raise KernelError(f"put {item.key}", errno.EINVAL)
        if isinstance(item, Rule | Address) and item.key in self.state:
            raise KernelError(f"put {item.key}", errno.EEXIST)
        assert (self.state.get(item.key) is None) == (before is None), "what is replaced is known"
        assert not isinstance(item, NftTable) or item.content, "never a table without content"
        self.state[item.key] = item
        self.fuse.point()

    def drop(self, item: Resource) -> None:
        self.fuse.point()
        if item.key in self.refuse:
            raise KernelError(f"drop {item.key}", errno.EINVAL)
        if not isinstance(item, Sysctl | Link | Port):
            self.state.pop(item.key, None)
        self.fuse.point()

    def tables(self) -> list[object]:
        return []

    def rules(self) -> list[Rule]:
        return [item for item in self.state.values() if isinstance(item, Rule)]

    def routes(self) -> list[Route]:
        return [item for item in self.state.values() if isinstance(item, Route)]

    def has_ipv6(self) -> bool:
        return True

    def admit(self, table: str, additions: object) -> None:
        raise AssertionError("nothing here asks for it")

    def close(self) -> None:
        pass


class FakeGuard:
    alive = True

    def await_ready(self) -> None:
        pass

    def dismiss(self) -> None:
        pass


def fake_guard(path: Path, owner: Owner) -> FakeGuard:
    return FakeGuard()


@contextmanager
def crashing_disk(fuse: Fuse) -> Iterator[None]:
    """Let each write to a journal be cut short anywhere, and each sync be the last thing that happens."""
    write = os.pwrite

    def pwrite(descriptor: int, data: bytes, position: int) -> int:
        for cut in (0, 1, len(data) - 1):
            try:
                fuse.point()
            except Crash:
                write(descriptor, data[:cut], position)
                raise
        return write(descriptor, data, position)

    def fsync(descriptor: int) -> None:
        fuse.point()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gostnet.kernel.journal.os.pwrite", pwrite)
        patch.setattr("gostnet.kernel.journal.os.fsync", fsync)
        yield


def provisioner(kernel: FakeKernel, directory: Path) -> Provisioner:
    return Provisioner("test", state_dir=directory, kernel=kernel, start_guard=fake_guard)  # type: ignore[arg-type]


def die(dead: Provisioner) -> None:
    """Let go of what the kernel would close."""
    if dead._journal is not None:
        dead._journal.close()
    dead._namespace.close()


# ---- states -------------------------------------------------------------------------------------
def tables(name: str, owner: bool) -> st.SearchStrategy[NftTable]:
    chains = st.lists(st.sampled_from("abc"), min_size=1, unique=True)
    return chains.map(lambda names: NftTable(name, tuple(NftChain(n) for n in names), owner=owner))


resources = st.one_of(
    st.builds(Sysctl, st.sampled_from(["a", "b"]), st.sampled_from("012")),
    st.builds(Link, st.sampled_from(["e0", "e1"]), st.sampled_from([1280, 1500]), st.booleans()),
    st.builds(Bridge, st.just("br0")),
    st.builds(Port, st.sampled_from(["e0", "e1"]), st.sampled_from(["", "br0"])),
    st.builds(Address, st.sampled_from(["e0", "e1"]), st.sampled_from(["10.0.0.1/24", "10.0.0.2/24"])),
    st.builds(
        Route,
        st.sampled_from(["10.1.0.0/16", "10.2.0.0/16"]),
        st.sampled_from([254, 18254]),
        device=st.sampled_from(["e0", "e1"]),
        protocol=st.sampled_from([4, 250]),
    ),
    st.builds(Rule, st.just(4), st.sampled_from([1, 2]), st.just(18254), mark=st.sampled_from([1, 2])),
    tables("gostnet-test", False),
)


def by_key(items: list[Resource]) -> dict[Key, Resource]:
    return {item.key: item for item in items}


def lists(of: st.SearchStrategy[Resource]) -> st.SearchStrategy[list[Resource]]:
    return st.lists(of, max_size=8).map(lambda items: list(by_key(items).values()))


foreign = lists(
    resources.filter(lambda item: not isinstance(item, NftTable)).map(
        lambda item: replace(item, protocol=4) if isinstance(item, Rule | Route) else item
    )
)
settings_there = [
    Sysctl("a", "0"),
    Sysctl("b", "0"),
    Link("e0", 1500),
    Link("e1", 1500),
    Port("e0", ""),
    Port("e1", ""),
]
desired_lists = lists(resources)


# ---- properties ---------------------------------------------------------------------------------
@given(foreign, st.lists(desired_lists, min_size=1, max_size=3))
def test_apply_leads_to_what_is_desired_and_rollback_back(
    initial: list[Resource], stages: list[list[Resource]]
) -> None:
    start = by_key(settings_there) | by_key(initial)
    with TemporaryDirectory(dir=MEMORY) as name:
        kernel = FakeKernel(dict(start))
        with provisioner(kernel, Path(name)) as under_test:
            for desired in stages:
                planned = under_test.plan(desired)
                assert under_test.apply(desired) == planned
                expected = start | by_key(desired)
                assert kernel.state == expected
                assert under_test.plan(desired) == []
        assert kernel.state == start
        assert os.listdir(name) == []


@settings(max_examples=25)
@given(foreign, st.lists(desired_lists, min_size=1, max_size=2))
def test_recovery_restores_the_state_after_a_crash_at_any_point(
    initial: list[Resource], stages: list[list[Resource]]
) -> None:
    """Also a crash of the recovery itself, and a rollback that is cut short."""
    start = by_key(settings_there) | by_key(initial)
    point = 0
    while True:
        point += 1
        with TemporaryDirectory(dir=MEMORY) as name:
            fuse = Fuse(point)
            kernel = FakeKernel(dict(start), fuse)
            under_test = provisioner(kernel, Path(name))
            crashed = False
            try:
                with crashing_disk(fuse):
                    for desired in stages:
                        under_test.apply(desired)
                    under_test.rollback()
            except Crash:
                crashed = True
            die(under_test)
            if crashed and point % 3 == 0:
                kernel.fuse = Fuse(2)
                try:
                    recover(Path(name), kernel=kernel)  # type: ignore[arg-type]
                except Crash:
                    pass
            kernel.fuse = Fuse()
            steps, alive = recover(Path(name), kernel=kernel)  # type: ignore[arg-type]
            assert kernel.state == start, f"crash at point {point}"
            assert alive == []
            assert all(step.verb != "keep" for step in steps)
            assert os.listdir(name) == []
            if not crashed:
                assert steps == []
                return


@given(foreign, desired_lists, desired_lists, st.data())
def test_a_failed_step_leaves_what_was_there_before_the_call(
    initial: list[Resource], first: list[Resource], second: list[Resource], data: st.DataObject
) -> None:
    start = by_key(settings_there) | by_key(initial)
    with TemporaryDirectory(dir=MEMORY) as name:
        kernel = FakeKernel(dict(start))
        with provisioner(kernel, Path(name)) as under_test:
            under_test.apply(first)
            held = dict(kernel.state)
            steps = [step for step in under_test.plan(second) if step.verb in ("put", "change")]
            if not steps:
                return
            kernel.refuse = {data.draw(st.sampled_from(steps)).item.key}
            with pytest.raises(KernelError):
                under_test.apply(second)
            kernel.refuse = set()
            assert kernel.state == held
            assert under_test.plan(first) == []
            assert under_test.apply(second) is not None
            assert kernel.state == start | by_key(second)
        assert kernel.state == start


@given(foreign, desired_lists, resources)
def test_what_somebody_changed_meanwhile_stays_changed(
    initial: list[Resource], desired: list[Resource], meddling: Resource
) -> None:
    start = by_key(settings_there) | by_key(initial)
    with TemporaryDirectory(dir=MEMORY) as name:
        kernel = FakeKernel(dict(start))
        with provisioner(kernel, Path(name)) as under_test:
            under_test.apply(desired)
            kernel.state[meddling.key] = meddling
            steps = under_test.rollback()
        ours = by_key(desired).get(meddling.key)
        if ours is not None and ours == meddling and start.get(meddling.key) != meddling:
            assert kernel.state == start, "putting the same changes nothing"
        elif ours is not None and start.get(meddling.key) != ours and start.get(meddling.key) != meddling:
            assert kernel.state == start | {meddling.key: meddling}
            assert Step("keep", meddling, note="changed by somebody else, so it is left as it is").item.key in [
                step.item.key for step in steps if step.verb == "keep"
            ]
        else:
            assert kernel.state == start | {meddling.key: meddling}


@given(desired_lists)
def test_refused_rollback_is_reported_and_made_good_later(desired: list[Resource]) -> None:
    start = by_key(settings_there)
    with TemporaryDirectory(dir=MEMORY) as name:
        kernel = FakeKernel(dict(start))
        under_test = provisioner(kernel, Path(name))
        steps = under_test.apply(desired)
        kernel.refuse = {step.item.key for step in steps[::2]}
        kept = {step.item.key for step in under_test.rollback() if step.verb == "keep"}
        assert kept == kernel.refuse
        under_test.close()
        assert bool(os.listdir(name)) == bool(kept)
        kernel.refuse = set()
        recover(Path(name), kernel=kernel)  # type: ignore[arg-type]
        assert kernel.state == start
        assert os.listdir(name) == []


def test_disk_that_is_full_stops_the_step_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(by_key(settings_there))
    desired: list[Resource] = [Sysctl("a", "1"), Sysctl("b", "1")]
    with provisioner(kernel, tmp_path) as under_test:
        append = Journal._write

        def full(journal: Journal, line: bytes) -> None:
            if b'"name":"b"' in line:
                raise KernelError("write", errno.ENOSPC)
            append(journal, line)

        monkeypatch.setattr(Journal, "_write", full)
        with pytest.raises(KernelError):
            under_test.apply(desired)
        assert kernel.state == by_key(settings_there)
        assert not under_test.holds
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", [False, True])
def test_close_is_idempotent_and_apply_after_it_is_refused(tmp_path: Path, closed: bool) -> None:
    kernel = FakeKernel({})
    under_test = provisioner(kernel, tmp_path)
    if not closed:
        under_test.apply([Route("10.1.0.0/16", 254, device="e0")])
    under_test.close()
    under_test.close()
    assert kernel.state == {}
    with pytest.raises(KernelError, match="closed"):
        under_test.apply([])
