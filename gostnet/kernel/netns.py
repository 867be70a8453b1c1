"""Network namespaces: named ones as `ip netns` keeps them, anonymous ones held by a descriptor.

Work inside them is `core.netns`, whose names stand here too. Under an unprivileged user namespace everything here
works on namespaces which that user namespace owns; naming one needs a mount namespace of its own as well, with a
writable /run.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path

from ..core.netns import (
    CURRENT,
    DIRECTORY,
    Namespace,
    Place,
    go_back,
    inode,
    inside,
    open_namespace,
    path_of,
    refused,
    socket_in,
)

__all__ = [
    "CURRENT",
    "DIRECTORY",
    "Namespace",
    "Place",
    "anonymous",
    "create",
    "delete",
    "exists",
    "inode",
    "inside",
    "names",
    "open_namespace",
    "path_of",
    "socket_in",
]

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED = 0x1000, 0x4000, 1 << 20
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def anonymous() -> Namespace:
    """Make a namespace without a name; it ends when the object is closed and nothing else holds it.

    Loopback is down in it and nothing else exists.
    """
    with open_namespace() as home:
        if _libc.unshare(_CLONE_NEWNET):
            raise refused("make a network namespace", ctypes.get_errno())
        try:
            return open_namespace()
        finally:
            go_back(home)


def create(name: str) -> None:
    """Make a named namespace that `ip netns` lists. Raise KernelError (EEXIST) if the name is taken."""
    path = path_of(name)
    operation = f"create network namespace {name!r}"
    _prepare_directory(operation)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    except OSError as exc:
        raise refused(operation, exc.errno or 0) from exc
    try:
        # The mount is made by path, and only the thread's own entry in /proc is allowed to name its namespace.
        with anonymous() as namespace, inside(namespace):
            _mount(CURRENT, path, _MS_BIND, operation)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def delete(name: str, *, missing_ok: bool = False) -> None:
    """Remove a name; the namespace ends with its last process, socket and descriptor.

    Raise KernelError (ENOENT) for an unknown name unless `missing_ok`. A name left without its mount (by a process
    killed within `create`, or by a reboot of the machine around /run) is removed like any other.
    """
    path = path_of(name)
    operation = f"delete network namespace {name!r}"
    while not _libc.umount2(os.fsencode(path), _MNT_DETACH):
        pass  # one mount may lie on another; what is below comes to light by removing the upper one
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOENT):  # EINVAL: not a mount point (any more)
        raise refused(operation, number)
    try:
        path.unlink(missing_ok=missing_ok)
    except OSError as exc:
        raise refused(operation, exc.errno or 0) from exc


def exists(name: str) -> bool:
    """Tell whether the name is in use, be it by a namespace or by the remains of one."""
    return path_of(name).exists()


def names() -> list[str]:
    """Return the names in use, sorted."""
    try:
        return sorted(os.listdir(DIRECTORY))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise refused("list network namespaces", exc.errno or 0) from exc


def _prepare_directory(operation: str) -> None:
    """Make the directory a shared mount of its own, as `ip netns add` does.

    Shared, so that a namespace made or removed in one mount namespace (a service's private one, say) is so in all.
    """
    try:
        DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as exc:
        raise refused(operation, exc.errno or 0) from exc
    # Locked as iproute2 locks it: two first users at once would mount the directory twice.
    descriptor = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        flags = _MS_SHARED | _MS_REC
        if _libc.mount(b"", os.fsencode(DIRECTORY), b"none", flags, None) == 0:
            return
        number = ctypes.get_errno()
        if number != errno.EINVAL:  # EINVAL: the directory is no mount point yet
            raise refused(operation, number)
        _mount(DIRECTORY, DIRECTORY, _MS_BIND | _MS_REC, operation)
        _mount("", DIRECTORY, flags, operation)
    finally:
        os.close(descriptor)


def _mount(source: str | Path, target: Path, flags: int, operation: str) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), b"none", flags, None):
        raise refused(operation, ctypes.get_errno())
