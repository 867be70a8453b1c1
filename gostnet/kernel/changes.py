"""Notices of the kernel about what changes in a network namespace: links, addresses, routes and rules."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Callable
from enum import Flag, auto
from typing import Self

from gostnet.core.resources import ROUTE_PROTOCOL

from . import netns

_HEADER = struct.Struct("=IHHII")
_RTMSG_PROTOCOL = _HEADER.size + 5
_BUFFER = 1 << 20
_LARGEST = 1 << 16


class Topic(Flag):
    """What may change."""

    LINKS = auto()
    ADDRESSES = auto()
    ROUTES = auto()
    OWN_ROUTES = auto()
    """Routes of ours that have gone, whoever has removed them."""


# struct sockaddr_nl takes groups as bits: link 1, IPv4 address 5, route 7, rule 8, IPv6 address 9, route 11, rule 19.
_ROUTES = 1 << 6 | 1 << 10
_RULES = 1 << 7 | 1 << 18
_GROUPS = {
    Topic.LINKS: 1,
    Topic.ADDRESSES: 1 << 4 | 1 << 8,
    Topic.ROUTES: _ROUTES | _RULES,
    Topic.OWN_ROUTES: _ROUTES,
}
_DELROUTE = 25
_OF_ROUTES = (24, _DELROUTE, 32, 33)


class Changes:
    """Calls back, on the event loop, when something of the given topics has changed; several changes may be one call.

    A context manager. What happened before it was made is not told.
    """

    def __init__(self, topics: Topic, tell: Callable[[], None], place: netns.Place = None) -> None:
        """Listen in a namespace, by default the thread's. Raise KernelError."""
        self._topics = topics
        self._tell = tell
        self._socket = netns.socket_in(place, socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            groups = 0
            for topic in topics:
                groups |= _GROUPS[topic]
            self._socket.bind((0, groups))
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, self._readable)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more. Idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _readable(self) -> None:
        changed = False
        while True:
            try:
                data = self._socket.recv(_LARGEST)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    break
                changed = True  # more than fits has happened
                continue
            changed = changed or self._concerns(data)
        if changed:
            self._tell()

    def _concerns(self, data: bytes) -> bool:
        if Topic.ROUTES in self._topics:
            return True
        position = 0
        while position + _HEADER.size <= len(data):
            size, kind, *_ = _HEADER.unpack_from(data, position)
            if kind not in _OF_ROUTES:
                return True
            if kind == _DELROUTE and data[position + _RTMSG_PROTOCOL] == ROUTE_PROTOCOL:
                return True
            position += max((size + 3) & ~3, _HEADER.size)
        return False
