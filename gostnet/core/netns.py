"""Work inside a network namespace: open it, move the calling thread there and back, make sockets that belong to it.

A network namespace belongs to a thread. `inside` moves the calling thread there and back, so whatever is made
meanwhile (sockets, TUN devices, writes to /proc/sys/net) belongs to the namespace and stays there; a move and back
costs about 0.2 ms and forks nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from .errors import KernelError

DIRECTORY = Path("/run/netns")
"""Where named namespaces are bind-mounted; iproute2 looks here (/var/run is a link to /run)."""

CURRENT = "/proc/thread-self/ns/net"
"""The namespace of the calling thread."""

_CLONE_NEWNET = 0x40000000
_HINT = "needs CAP_SYS_ADMIN: run as root, or inside a user namespace"

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """An open network namespace: it lives at least as long as this object is not closed. A context manager."""

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        """Take over an open descriptor of a namespace."""
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return the descriptor. Raise KernelError once it is closed."""
        if self._descriptor < 0:
            raise KernelError("use network namespace", errno.EBADF, "it is closed")
        return self._descriptor

    @property
    def inode(self) -> int:
        """The number that identifies the namespace on this host while it exists."""
        return os.fstat(self.fileno()).st_ino

    def close(self) -> None:
        """Let go. A namespace that nothing else holds ends with its devices soon afterwards. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


Place: TypeAlias = str | os.PathLike[str] | Namespace | int | None
"""A name (no slash), a path such as /proc/1/ns/net, an open namespace or its descriptor; None for the current one."""


def path_of(name: str) -> Path:
    """Return where the namespace `name` is mounted. Raise KernelError for a name that is none."""
    if not name or name in (".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
        raise KernelError("name network namespace", errno.EINVAL, f"{name[:64]!r} is not a usable name")
    return DIRECTORY / name


def open_namespace(place: Place = None) -> Namespace:
    """Open a namespace, so that it outlives its name. A descriptor given is duplicated, never taken over."""
    try:
        if isinstance(place, Namespace):
            return Namespace(os.dup(place.fileno()))
        if isinstance(place, int):
            return Namespace(os.dup(place))
        if place is None:
            path = CURRENT
        elif isinstance(place, str) and "/" not in place:
            path = str(path_of(place))
        else:
            path = os.fspath(place)
        return Namespace(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as exc:
        raise refused(f"open network namespace {_label(place)}", exc.errno or 0) from exc


def inode(place: Place = None) -> int:
    """Return the inode that identifies a namespace, by default the calling thread's."""
    with open_namespace(place) as namespace:
        return namespace.inode


@contextmanager
def inside(place: Place) -> Iterator[None]:
    """Move the calling thread into a namespace and back at the end. May be nested.

    Never await inside: the event loop would run other tasks in the wrong namespace. If the thread cannot come back,
    the process is aborted, since everything it did from then on would happen in the wrong network. Raise KernelError
    if the namespace does not exist or may not be entered; the thread has not moved then. Where the thread is already,
    it stays, which takes no privilege.
    """
    with open_namespace() as home, open_namespace(place) as there:
        if os.path.sameopenfile(home.fileno(), there.fileno()):
            yield
            return
        _enter(there, f"enter network namespace {_label(place)}")
        try:
            yield
        finally:
            go_back(home)


def socket_in(place: Place, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Make a non-blocking, close-on-exec socket that belongs to a namespace for as long as it lives.

    Raise KernelError if the namespace or the socket is refused.
    """
    with inside(place):
        try:
            return socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        except OSError as exc:
            raise refused(f"make a socket in network namespace {_label(place)}", exc.errno or 0) from exc


def _enter(namespace: Namespace, operation: str) -> None:
    if _libc.setns(namespace.fileno(), _CLONE_NEWNET):
        raise refused(operation, ctypes.get_errno())


def go_back(home: Namespace) -> None:
    """Move the thread back, or end the process: everything else would happen in the wrong network."""
    if _libc.setns(home.fileno(), _CLONE_NEWNET):
        os.abort()


def _label(place: Place) -> str:
    match place:
        case None:
            return "of this thread"
        case Namespace() | int():
            return "given by descriptor"
        case _:
            return repr(os.fspath(place))


def refused(operation: str, number: int) -> KernelError:
    """Return the error of an operation on namespaces, with the capability that it needs where that is what lacks."""
    return KernelError(operation, number, hint=_HINT if number in (errno.EPERM, errno.EACCES) else "")
