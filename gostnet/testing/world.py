"""What a lab needs of the machine it runs on: privileges or a world of its own, a directory, a resolver file, a way in.

Everything here is undone at the end, or by the next lab when the one before was killed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gostnet.core.errors import GostnetError, KernelError
from gostnet.kernel import netns

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18

HOLDER = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
target = os.path.realpath("/etc/resolv.conf")
ok = libc.unshare(0x20000) == 0
ok = ok and libc.mount(b"none", b"/", None, 0x4000 | 1 << 19, None) == 0
ok = ok and libc.mount(os.fsencode(sys.argv[1]), os.fsencode(target), None, 0x1000, None) == 0
print("holding" if ok else "holding, without names: " + os.strerror(ctypes.get_errno()), flush=True)
while True:
    signal.pause()
"""
"""A mount namespace that follows the host's (MS_SLAVE), so that it holds nothing that is unmounted there."""


@contextmanager
def own_directory(path: Path) -> Iterator[None]:
    """Hold the directory: it is new, for us alone, and gone at the end. Raise GostnetError if another lab holds it."""
    while True:
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise KernelError(f"make {path}", exc.errno or 0) from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise GostnetError(f"another lab is running; it holds {path}") from None
        # The one before us may have removed the directory between our opening and our locking it.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    try:
        for left in path.iterdir():
            left.unlink()
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


class ResolverFile:
    """/etc/netns/NAME/resolv.conf, which `ip netns exec NAME` puts in place of /etc/resolv.conf.

    A file that was there is moved aside and put back; what was done is written into the file itself, so that another
    process can undo it.
    """

    MARK = "# made by gostnet lab, which removes it at its end"

    def __init__(self, name: str, root: Path = Path("/etc/netns")) -> None:
        self.path = root / name / "resolv.conf"
        self._saved = root / name / "resolv.conf.gostnet-saved"

    def install(self, text: str) -> None:
        """Write the file. Raise OSError."""
        self.remove()
        made = []
        for directory in (self.path.parent.parent, self.path.parent):
            if not directory.is_dir():
                directory.mkdir(mode=0o755)
                made.append(directory)
        if os.path.lexists(self.path):
            self.path.rename(self._saved)
        self.path.write_text("\n".join([self.MARK, *(f"# made {directory}" for directory in made), text]))

    def remove(self) -> None:
        """Undo `install`, whoever did it; anything else is left alone. Idempotent. Raise OSError."""
        try:
            lines = self.path.read_text().split("\n")
        except (FileNotFoundError, NotADirectoryError):
            lines = []
        made: list[Path] = []
        if lines and lines[0] == self.MARK:
            made = [Path(line.removeprefix("# made ")) for line in lines[1:] if line.startswith("# made ")]
            self.path.unlink()
        if os.path.lexists(self._saved) and not os.path.lexists(self.path):
            self._saved.rename(self.path)
        for directory in reversed(made):
            if directory in (self.path.parent, self.path.parent.parent):
                try:
                    directory.rmdir()
                except OSError as exc:
                    if exc.errno != errno.ENOTEMPTY:
                        raise


def privileged() -> bool:
    """Tell whether namespaces can be made here and now."""
    try:
        netns.anonymous().close()
    except KernelError:
        return False
    return True


def enter_own_world() -> None:
    """Move this process into a user, mount and network namespace of its own, in which it is root.

    Raise KernelError when the host does not allow it. The process must have one thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    hint = (
        "run as root, or allow unprivileged user namespaces (sysctls user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
    )

    def step(purpose: str, failed: int) -> None:
        if failed:
            raise KernelError(purpose, ctypes.get_errno(), hint=hint)

    step("make a user namespace", libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET))
    try:
        # An unprivileged process may map its group only after it has given up setting groups.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as exc:
        raise KernelError("map the user into its namespace", exc.errno or 0, hint=hint) from exc
    step("separate the mounts", libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    step("mount an own /run", libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, b"mode=755"))


def make_place(path: Path) -> None:
    """Make an empty file to mount on where it is missing, as under the new /run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        pass  # the names do not work then, and the holder says so
