"""How a number that the kernel answers with becomes a KernelError that a user can act on."""

from __future__ import annotations

import errno
import os

from gostnet.core.errors import KernelError

_HINTS = {
    errno.EPERM: "run as root, or give the program CAP_NET_ADMIN in the network namespace",
    errno.EACCES: "run as root, or give the program CAP_NET_ADMIN in the network namespace",
}


def kernel_error(operation: str, number: int, text: str = "") -> KernelError:
    """Make the error; `text` is what the kernel itself said beside the number.

    A refusal for missing privilege names the capability in the message.
    """
    detail = os.strerror(number)
    if number in _HINTS:
        detail += " (needs CAP_NET_ADMIN)"
    if text:
        detail += f": {text}"
    return KernelError(operation, number, detail, hint=_HINTS.get(number, ""))
