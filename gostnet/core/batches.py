"""Datagrams by the batch: recvmmsg into memory that is there already, and addresses that are translated once.

The calls never wait, so they are made with the interpreter lock held (PyDLL): giving it up and taking it back would
cost more than they do.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from errno import EAGAIN, EINTR, ENOSYS
from functools import lru_cache
from typing import Any

from .address import Endpoint
from .hub import Hub

BATCH = 64
"""Datagrams of one call: enough to amortise a wake-up, few enough that the others get their turn soon."""

SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104

MOST_SEGMENTS = 64
"""Of one train: UDP_MAX_SEGMENTS up to Linux 6.8, twice as many since."""

LARGEST_TRAIN = 65000
"""Bytes: a datagram less the headers of IPv6 with some extension headers."""

IP_PKTINFO, IPV6_RECVPKTINFO, IPV6_PKTINFO = 8, 49, 50
IP_ORIGDSTADDR, IPV6_ORIGDSTADDR = 20, 74
"""Both as an option to be told, and as the kind of what is told then."""

_SLOT = 65536
_NAME = 32
_CONTROL = 128
_CACHED = 16384
"""Addresses kept in both forms: bounded, because anybody can make up some."""


class _Vector(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """`struct msghdr`."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_size", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Header(ctypes.Structure):
    """`struct mmsghdr`."""

    _fields_ = (("message", _Message), ("size", ctypes.c_uint32))


_STEP = ctypes.sizeof(_Header)
_SIZE_AT = _Header.size.offset // 4
_CONTROL_SIZE_AT = _Message.control_size.offset


class Arena:
    """Room for one batch. What a call has received is valid until the next one, whoever makes it."""

    __slots__ = ("_address", "_headers", "_image", "_memory", "_receive", "_receive_one", "_sizes", "_vectors")

    def __init__(self) -> None:
        # Payloads, then names, then control data. Pages that nothing was written to take no memory.
        self._memory = mmap.mmap(-1, BATCH * (_SLOT + _NAME + _CONTROL))
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._vectors = (_Vector * BATCH)()
        headers = (_Header * BATCH)()
        for index in range(BATCH):
            self._vectors[index].base, self._vectors[index].size = base + index * _SLOT, _SLOT
            header = headers[index].message
            header.name, header.name_size = base + BATCH * _SLOT + index * _NAME, _NAME
            header.vectors, header.count = ctypes.addressof(self._vectors[index]), 1
            header.control = base + BATCH * (_SLOT + _NAME) + index * _CONTROL
            header.control_size = _CONTROL
        self._address = ctypes.addressof(headers)
        self._headers = memoryview(headers).cast("B")
        self._sizes = self._headers.cast("I")
        self._image = bytes(self._headers)
        library = ctypes.PyDLL(None, use_errno=True)
        receive = library.recvmmsg
        receive.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
        self._receive: Callable[..., int] = receive
        one = library.recvmsg
        one.argtypes, one.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int), ctypes.c_ssize_t
        self._receive_one = one

    def receive(self, descriptor: int) -> int:
        """Take what is there; return how many datagrams, 0 for none. Raise OSError as the kernel tells of one."""
        count: int = self._receive(descriptor, self._address, BATCH, socket.MSG_DONTWAIT, None)
        if count < 0:
            error = ctypes.get_errno()
            if error in (EAGAIN, EINTR):
                return 0
            if error == ENOSYS:
                self._receive = self._one_by_one
                return self.receive(descriptor)
            raise OSError(error, "recvmmsg")
        return count

    def _one_by_one(self, descriptor: int, address: int, most: int, flags: int, _: None) -> int:
        """Do what recvmmsg does, where a kernel or its sandbox has none."""
        for index in range(most):
            size = self._receive_one(descriptor, address + index * _STEP, flags)
            if size < 0:
                return index or -1
            self._sizes[index * _STEP // 4 + _SIZE_AT] = size
        return most

    def payload(self, index: int) -> bytes:
        """Return a datagram's payload."""
        start = index * _SLOT
        return self._memory[start : start + self._sizes[index * _STEP // 4 + _SIZE_AT]]

    def name(self, index: int, size: int) -> bytes:
        """Return whom a datagram is from: a sockaddr of `size` bytes."""
        start = BATCH * _SLOT + index * _NAME
        return self._memory[start : start + size]

    def control(self, index: int) -> bytes:
        """Return a datagram's control data."""
        at = index * _STEP + _CONTROL_SIZE_AT
        size = int.from_bytes(self._headers[at : at + ctypes.sizeof(ctypes.c_size_t)], sys.byteorder)
        start = BATCH * (_SLOT + _NAME) + index * _CONTROL
        return self._memory[start : start + size]

    def reset(self, count: int) -> None:
        """Make the first `count` places ready again: those that the last call has filled."""
        size = count * _STEP
        self._headers[:size] = self._image[:size]


def arena(hub: Hub) -> Arena:
    """Return the arena of a hub, made on first use: its sockets are read one after the other."""
    found: Arena | None = hub.arena
    if found is None:
        found = hub.arena = Arena()
    return found


@lru_cache(maxsize=_CACHED)
def endpoint_of(name: bytes) -> Endpoint:
    """Return what a sockaddr_in (16 bytes) or sockaddr_in6 (28 bytes) says."""
    (port,) = struct.unpack_from("!H", name, 2)
    if len(name) == 16:
        return Endpoint(socket.inet_ntoa(name[4:8]), port)
    (scope,) = struct.unpack_from("=I", name, 24)
    return Endpoint.from_sockaddr((socket.inet_ntop(socket.AF_INET6, name[8:24]), port, 0, scope))


Ancillary = tuple[tuple[int, int, bytes], ...]


@lru_cache(maxsize=_CACHED)
def pinned(host: str, v6: bool) -> Ancillary:
    """Return the control data with which a datagram leaves from `host`, an address of this host (ip(7), ipv6(7)).

    in6_pktinfo: address at 0..16, interface at 16..20; in_pktinfo: interface at 0..4, source at 4..8, unused at 8..12
    """
    address, _, zone = host.partition("%")
    if v6:
        packed = socket.inet_pton(socket.AF_INET6, address if ":" in address else f"::ffff:{address}")
        return ((socket.IPPROTO_IPV6, IPV6_PKTINFO, packed + struct.pack("=I", int(zone or 0))),)
    return ((socket.SOL_IP, IP_PKTINFO, struct.pack("=I4sI", 0, socket.inet_aton(address), 0)),)


def pin(sock: socket.socket) -> None:
    """Let the kernel tell to which address of this host datagrams are sent. Raise OSError."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.SOL_IP, IP_PKTINFO, 1)


def _messages(control: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield level, type and data of what control data holds (cmsg(3))."""
    at, step = 0, struct.calcsize("N")
    while at + step + 8 <= len(control):
        size, level, kind = struct.unpack_from("@Nii", control, at)
        yield level, kind, control[at + step + 8 : at + size]
        at += max(size + step - 1 & -step, step + 8)


@lru_cache(maxsize=_CACHED)
def original_destination(control: bytes) -> Endpoint | None:
    """Return the destination that control data of a captured datagram names, None for none (ip(7), ipv6(7))."""
    for level, kind, data in _messages(control):
        if level == socket.SOL_IP and kind == IP_ORIGDSTADDR and len(data) >= 16:
            return endpoint_of(data[:16])
        if level == socket.IPPROTO_IPV6 and kind == IPV6_ORIGDSTADDR and len(data) >= 28:
            return endpoint_of(data[:24] + bytes(4))
    return None


@lru_cache(maxsize=_CACHED)
def asked_address(control: bytes) -> str:
    """Return the address that control data with a pktinfo names, "" for none that answers can leave from."""
    for level, kind, data in _messages(control):
        if level == socket.IPPROTO_IPV6 and kind == IPV6_PKTINFO and len(data) >= 20:
            (interface,) = struct.unpack_from("=I", data, 16)
            local = data[0] == 0xFE and data[1] & 0xC0 == 0x80
            text = socket.inet_ntop(socket.AF_INET6, data[:16])
            host = Endpoint.from_sockaddr((text, 0, 0, interface if local else 0)).host
            return "" if data[0] == 0xFF or ("." in host and data[12] >= 224) else host
        if level == socket.SOL_IP and kind == IP_PKTINFO and len(data) >= 12:
            return socket.inet_ntoa(data[4:8])
    return ""


def train_end(packets: Any, start: int, longest: int) -> int:
    """Return the end of the train that begins at `start`: packets of one size, up to `longest`, a shorter one last."""
    count, size, end = len(packets), len(packets[start]), start + 1
    if not 0 < size <= longest:
        return end
    last = min(count, start + MOST_SEGMENTS, start + LARGEST_TRAIN // size)
    while end < last:
        length = len(packets[end])
        if length != size:
            return end + 1 if 0 < length < size else end
        end += 1
    return end
