"""The journal: whole lines count, whatever a crash leaves behind them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gostnet.core.errors import KernelError
from gostnet.core.resources import Address, Key, Link, NftChain, NftTable, Resource, Route, Rule, Sysctl
from gostnet.kernel import journal
from gostnet.kernel.journal import Header, Journal, Owner, journal_path, journals, read, started, state_directory
from gostnet.kernel.plan import Change

HEADER = Header("default", Owner(1234, 567890), 3, 2**63 + 1, "a-boot")
texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)
numbers = st.integers(0, 2**32 - 1)
resources = st.one_of(
    st.builds(Sysctl, texts, texts),
    st.builds(Link, texts, numbers, st.booleans()),
    st.builds(Address, texts, texts),
    st.builds(Route, texts, numbers, device=texts, gateway=texts, metric=numbers, raw=st.binary(max_size=8)),
    st.builds(Rule, st.sampled_from([4, 6]), numbers, numbers, numbers, numbers, texts, st.integers(0, 255)),
    st.builds(NftTable, texts, st.just((NftChain("c"),)), st.booleans(), texts),
)
changes = st.lists(st.builds(Change, st.none() | resources, resources), max_size=5)


def write(path: Path, records: list[Change]) -> None:
    path.unlink(missing_ok=True)
    opened = Journal.open(path)
    assert opened is not None
    opened.begin(HEADER)
    for record in records:
        opened.append(record)
    opened.close()


def without_repetitions(records: list[Change]) -> list[Change]:
    """Leave out what is just as the last change of its key."""
    latest: dict[Key, dict[str, object]] = {}
    left = []
    for record in records:
        if latest.get(record.key) != asdict(record):
            left.append(record)
        latest[record.key] = asdict(record)
    return left


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes)
def test_what_is_written_is_read_again(tmp_path: Path, records: list[Change]) -> None:
    path = tmp_path / "1-default.journal"
    write(path, records)
    header, found = read(path)
    assert header == HEADER
    records = without_repetitions(records)
    assert found == records
    raws = [getattr(c.after, "raw", None) for c in records]
    assert [getattr(c.after, "raw", None) for c in found] == raws


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(changes, resources, st.binary(max_size=5))
def test_a_torn_line_does_not_count_and_is_written_over(
    tmp_path: Path, records: list[Change], more: Resource, rubbish: bytes
) -> None:
    path = tmp_path / "1-default.journal"
    records = without_repetitions(records)
    write(path, records)
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == 10]
    for length in range(len(whole) + 1):
        path.unlink()  # overwritten, it would be put on disk each time (ext4)
        path.write_bytes(whole[:length] + rubbish.replace(b"\n", b""))
        count = sum(end <= length for end in ends)
        header, found = read(path)
        assert header == (HEADER if count else None)
        assert found == records[: max(0, count - 1)]
    path.write_bytes(whole + b'{"before":null,"aft')
    opened = Journal.open(path)
    assert opened is not None
    opened.append(Change(None, more))
    opened.close()
    assert read(path)[1] == [*records, Change(None, more)]


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"null\n", b"[]\n", b'{"version":2}\n', b"\xff\xfe\n", b'{"version":1}\n']
)
def test_what_is_no_journal_of_this_release_is_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "1-default.journal"
    path.write_bytes(content)
    assert read(path) == (None, [])


def test_file_is_for_its_owner_and_no_link_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "1-default.journal"
    opened = Journal.open(path)
    assert opened is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not os.get_inheritable(opened._descriptor)
    opened.remove()
    assert not path.exists()
    (tmp_path / "target").write_text("precious")
    path.symlink_to(tmp_path / "target")
    with pytest.raises(KernelError):
        Journal.open(path)
    assert (tmp_path / "target").read_text() == "precious"


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "1-default.journal"
    assert Journal.open(path, create=False) is None
    first = Journal.open(path)
    assert first is not None
    assert Journal.open(path) is None
    assert not journal.await_release(path, 0)
    first.close()
    assert journal.await_release(path, 0)
    second = Journal.open(path, create=False)
    assert second is not None
    second.remove()
    assert journal.await_release(path, 0)


def test_journals_of_one_namespace(tmp_path: Path) -> None:
    for name in ("7-b.journal", "7-a.journal", "77-a.journal", "7-a.other"):
        (tmp_path / name).touch()
    assert [path.name for path in journals(tmp_path, 7)] == ["7-a.journal", "7-b.journal"]
    assert journal_path(tmp_path, 7, "a") == tmp_path / "7-a.journal"
    assert journals(tmp_path / "missing", 7) == []


# ---- owners -------------------------------------------------------------------------------------
def test_dead_process_and_one_that_waits_to_be_reaped_are_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner(child.pid, started(child.pid))
    assert owner.alive
    assert not owner._replace(start=owner.start - 1).alive
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not owner.alive
    child.communicate()
    assert not owner.alive
    assert started(child.pid) == 0
    assert not Owner(child.pid, 0).alive


# ---- places -------------------------------------------------------------------------------------
def test_directory_without_root_is_in_the_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(KernelError, match="No such file"):
        state_directory(create=False)
    assert state_directory() == tmp_path / "gostnet"
    assert stat.S_IMODE((tmp_path / "gostnet").stat().st_mode) == 0o700
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(KernelError, match="XDG_RUNTIME_DIR is not set") as caught:
        state_directory()
    assert "XDG_RUNTIME_DIR" in caught.value.hint


def test_root_of_a_user_namespace_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(journal, "_RUN", tmp_path / "file" / "gostnet")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert state_directory() == tmp_path / "gostnet"


def test_note_counts_without_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "1-default.journal"
    write(path, [])
    opened = Journal.open(path)
    assert opened is not None
    change = Change(Sysctl("a", "0"), Sysctl("a", "1"))
    opened.append(change)
    opened.note(Change(change.after, change.before))
    assert opened.held[("sysctl", "a")].current == Sysctl("a", "0")
    opened.close()
    assert read(path)[1] == [change]
