"""What a lab does to its host is undone, also by the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gostnet.core.errors import GostnetError, KernelError
from gostnet.testing.world import ResolverFile, own_directory


def tree(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() if path.is_file() else "" for path in sorted(root.rglob("*"))}


@pytest.mark.parametrize("before", ["nothing", "root", "directory", "file", "other", "link"])
def test_resolver_file_is_put_back_as_it_was(tmp_path: Path, before: str) -> None:
    root = tmp_path / "netns"
    if before != "nothing":
        root.mkdir()
    if before in ("directory", "file", "other", "link"):
        (root / "gn-client").mkdir()
    if before == "file":
        (root / "gn-client/resolv.conf").write_text("nameserver 192.0.2.1\n")
    if before == "other":
        (root / "gn-client/hosts").write_text("192.0.2.1 host\n")
    if before == "link":
        (root / "gn-client/resolv.conf").symlink_to("/nonexistent")
    shown = tree(tmp_path)
    file = ResolverFile("gn-client", root)
    file.install("nameserver 10.77.3.2\n")
    assert file.path.read_text().startswith(ResolverFile.MARK)
    assert file.path.read_text().endswith("\nnameserver 10.77.3.2\n")
    # By another process, which knows nothing but what is on the disk.
    ResolverFile("gn-client", root).remove()
    assert tree(tmp_path) == shown
    assert (root / "gn-client/resolv.conf").is_symlink() == (before == "link")
    ResolverFile("gn-client", root).remove()
    assert tree(tmp_path) == shown


def test_resolver_file_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "gn-client").mkdir()
    (tmp_path / "gn-client/resolv.conf").write_text("nameserver 192.0.2.1\n")
    ResolverFile("gn-client", tmp_path).remove()
    assert (tmp_path / "gn-client/resolv.conf").read_text() == "nameserver 192.0.2.1\n"


def test_resolver_file_whose_writer_died_in_between_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "gn-client").mkdir()
    (tmp_path / "gn-client/resolv.conf.gostnet-saved").write_text("nameserver 192.0.2.1\n")
    ResolverFile("gn-client", tmp_path).remove()
    assert tree(tmp_path) == {"gn-client": "", "gn-client/resolv.conf": "nameserver 192.0.2.1\n"}


def test_directories_that_others_use_meanwhile_stay(tmp_path: Path) -> None:
    root = tmp_path / "netns"
    file = ResolverFile("gn-client", root)
    file.install("")
    (root / "other").mkdir()
    file.remove()
    assert tree(tmp_path) == {"netns": "", "netns/other": ""}


def test_own_directory_is_empty_private_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "lab"
    path.mkdir()
    (path / "left-over").write_text("of a lab that was killed")
    with own_directory(path):
        assert list(path.iterdir()) == []
        (path / "mine").write_text("")
    assert not path.exists()


def test_own_directory_of_another_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lab"
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from gostnet.testing.world import own_directory
with own_directory(Path({str(path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(GostnetError, match="another lab is running"):
            with own_directory(path):
                pass
        other.stdin.close()
    with own_directory(path):
        pass


def test_own_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="No such file"):
        with own_directory(tmp_path / "none" / "lab"):
            pass
