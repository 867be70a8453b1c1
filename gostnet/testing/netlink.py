"""A small synchronous netlink socket: pyroute2 frames and parses the messages, this exchanges them.

It belongs to the tests' side: it needs no event loop, works within a running one, and shares no code with the
daemon's own provisioning, so that what judges the kernel's state is not what changed it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from gostnet.core.errors import KernelError
from gostnet.kernel import netns

ROUTE = socket.NETLINK_ROUTE
NETFILTER = 12

_REQUEST, _ACK, _DUMP, _DUMP_INTERRUPTED = 0x1, 0x4, 0x300, 0x10
CREATE = 0x400 | 0x200
"""NLM_F_CREATE and NLM_F_EXCL."""

_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_ATTEMPTS = 20


class Netlink:
    """One socket in one network namespace. A context manager."""

    __slots__ = ("_sequence", "_socket")

    def __init__(self, protocol: int, place: netns.Place = None) -> None:
        """Open a socket of `protocol` (ROUTE or NETFILTER) in a namespace, by default the thread's."""
        self._socket = netns.socket_in(place, socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._socket.bind((0, 0))
        # The kernel answers while it takes the request, so a blocking read never waits for anything else.
        self._socket.setblocking(True)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def change(self, operation: str, kind: int, message: Any, flags: int = 0) -> None:
        """Send one pyroute2 message of type `kind` and wait for its verdict. Raise KernelError named `operation`."""
        self._sequence += 1
        header = message["header"]
        header["type"], header["flags"], header["sequence_number"] = kind, _REQUEST | _ACK | flags, self._sequence
        message.encode()
        self._socket.send(message.data)
        for number, payload, _ in self._replies():
            if number == _ERROR:
                code = -int(struct.unpack_from("=i", payload, _HEADER.size)[0])
                if code:
                    raise KernelError(operation, code)
                return

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Return the raw messages, header included, that answer a dump request with this body.

        A dump that the kernel marks as interrupted by a change is asked for again. Raise KernelError, also when the
        state keeps changing.
        """
        for _ in range(_ATTEMPTS):
            self._sequence += 1
            head = _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, self._sequence, 0)
            self._socket.send(head + body)
            messages, interrupted = [], False
            for number, payload, flags in self._replies():
                interrupted |= bool(flags & _DUMP_INTERRUPTED)
                if number == _ERROR:
                    raise KernelError(f"dump {kind}", -int(struct.unpack_from("=i", payload, _HEADER.size)[0]))
                if number == _DONE:
                    break
                messages.append(payload)
            if not interrupted:
                return messages
        raise KernelError(f"dump {kind}", errno.EAGAIN, "the state keeps changing")

    def _replies(self) -> Iterator[tuple[int, bytes, int]]:
        """Yield (type, message, flags) of what answers the last request; the caller stops at the end."""
        while True:
            data = self._socket.recv(1 << 18)
            position = 0
            while position + _HEADER.size <= len(data):
                size, kind, flags, sequence, _ = _HEADER.unpack_from(data, position)
                if sequence == self._sequence:
                    yield kind, data[position : position + size], flags
                position += (size + 3) & ~3


def attributes(data: bytes, offset: int) -> list[tuple[int, bytes]]:
    """Split `data` from `offset` on into (type without its flag bits, payload); a malformed rest is left out."""
    found = []
    while offset + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, offset)
        if size < 4:
            break
        found.append((kind & 0x3FFF, data[offset + 4 : offset + size]))
        offset += (size + 3) & ~3
    return found


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface as the kernel lists it; `running` once its carrier has been taken note of."""

    index: int
    name: str
    running: bool


def interfaces(link: Netlink) -> list[Interface]:
    """Return the interfaces of a namespace."""
    found = []
    for message in link.dump(18, bytes(16)):  # RTM_GETLINK, struct ifinfomsg
        index = struct.unpack_from("=i", message, _HEADER.size + 4)[0]
        of = dict(attributes(message, _HEADER.size + 16))
        # IFLA_IFNAME, IFLA_OPERSTATE; IF_OPER_UP is 6
        found.append(Interface(index, os.fsdecode(of.get(3, b"").rstrip(b"\0")), of.get(16) == b"\x06"))
    return found
