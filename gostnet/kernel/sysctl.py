"""Settings under /proc/sys, those of networking in the namespace of the calling thread."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from gostnet.core.errors import KernelError

from .errors import kernel_error

_ROOT = Path("/proc/sys")


def path_of(name: str) -> Path:
    """Return the file of a setting named as sysctl(8) does: `net.ipv4.conf.eth0/1.rp_filter` is of `eth0.1`.

    Raise KernelError for a name that leads elsewhere.
    """
    parts = [part.replace("/", ".") for part in name.split(".")]
    if any(part in ("", ".", "..") for part in parts):
        raise KernelError(f"sysctl {name}", errno.EINVAL, "is not the name of a setting")
    return _ROOT.joinpath(*parts)


def read(name: str) -> str | None:
    """Return a setting with runs of blanks as one, None if the kernel has none of this name. Raise KernelError."""
    try:
        return " ".join(path_of(name).read_text().split())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise kernel_error(f"sysctl {name}", exc.errno or errno.EIO) from exc


def write(name: str, value: str) -> None:
    """Set it. Raise KernelError."""
    operation = f"sysctl -w {name}={value}"
    try:
        descriptor = os.open(path_of(name), os.O_WRONLY | os.O_CLOEXEC)  # never O_CREAT: /proc answers that with EACCES
        try:
            os.write(descriptor, f"{value}\n".encode())
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise kernel_error(operation, exc.errno or errno.EIO) from exc
