"""The guard as a process; that it rolls back is shown in namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gostnet.core.errors import KernelError
from gostnet.kernel import guard, watch
from gostnet.kernel.journal import Header, Journal, Owner, boot_id, started

PATIENCE = 20


def test_dismissed_guard_is_gone_and_reaped(tmp_path: Path) -> None:
    watcher = watch.start(tmp_path / "1-x.journal", Owner.current())
    watcher.await_ready()
    assert watcher.alive
    watcher.dismiss()
    assert not watcher.alive
    assert not os.path.exists(f"/proc/{watcher.pid}")
    watcher.dismiss()


def test_guard_dismissed_before_it_is_ready_is_gone_too(tmp_path: Path) -> None:
    watcher = watch.start(tmp_path / "1-x.journal", Owner.current())
    watcher.dismiss()
    assert not os.path.exists(f"/proc/{watcher.pid}")


def test_guard_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(guard, "__file__", str(broken))
    watcher = watch.start(tmp_path / "1-x.journal", Owner.current())
    with pytest.raises(KernelError, match="start the guard: it did not start"):
        watcher.await_ready()
    assert not os.path.exists(f"/proc/{watcher.pid}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(KernelError, match="start the guard: No such file"):
        watch.start(tmp_path / "1-x.journal", Owner.current())


@pytest.mark.parametrize("written", ["nothing", "empty", "ours", "another's", "locked by another"])
def test_guard_of_a_dead_process_removes_its_journal_only(tmp_path: Path, written: str) -> None:
    path = tmp_path / "1-x.journal"
    program = "import sys; sys.stdin.readline()"
    daemon = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    owner = Owner(daemon.pid, started(daemon.pid))
    held: Journal | None = None
    if written != "nothing":
        held = Journal.open(path)
        assert held is not None
        if written in ("ours", "another's", "locked by another"):
            whose = owner if written == "ours" else Owner.current()
            held.begin(Header("x", whose, 0, 0, boot_id() + " of another day"))
        if written != "locked by another":
            held.close()
    watcher = watch.start(path, owner)
    watcher.await_ready()
    assert watcher.alive
    daemon.communicate(b"\n")
    assert watcher._process.wait(PATIENCE) == 0
    watcher.dismiss()
    assert path.exists() == (written in ("another's", "locked by another"))
    if held is not None:
        held.close()
