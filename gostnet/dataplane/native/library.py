"""The shared library of relay.c, datagrams.c and tun.c, called through ctypes.

All calls are short and never wait for the network, so they are made with the interpreter lock held (PyDLL): giving it
up and taking it back would cost more than most of them.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from typing import Final, NamedTuple

from .build import LIBRARY

VERSION = 4
"""Of the interface, as relay.c says it: a library left over from an older build is refused."""

OFF = "switched off by GOSTNET_NATIVE"
"""Why there is no library where nobody wants one."""

ENDED = 1
WANTS = 2
"""Bits of `news`: the flow has ended; direction 0 waits for leave (direction 1: twice the value)."""


class Record(NamedTuple):
    """What is told of one flow: `struct record` of relay.c. What comes in pairs is up, or of the client, first."""

    id: int
    news: int
    error: int
    failed_up: int
    failed_down: int
    first: int
    shut: int
    wanted_up: int
    wanted_down: int
    closed: int
    taken_up: int
    taken_down: int
    moved_up: int
    moved_down: int


_RECORD: Final = struct.Struct("=IIiiiiIIIIQQQQ")


class Records:
    """Room for what the library tells of up to `size` flows; fields are read all at once, which ctypes cannot."""

    __slots__ = ("_bytes", "place")

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size * _RECORD.size)
        self.place = (ctypes.c_char * len(self._bytes)).from_buffer(self._bytes)

    def read(self, count: int) -> list[Record]:
        """Return the first `count` records."""
        make, unpack = Record._make, _RECORD.unpack_from
        return [make(unpack(self._bytes, at)) for at in range(0, count * _RECORD.size, _RECORD.size)]


class Library:
    """The functions of the library, with their types."""

    def __init__(self, path: str) -> None:
        """Load the library. Raise OSError when it cannot be, or is of another version."""
        functions = ctypes.PyDLL(path)
        relay, number, unsigned, records = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p

        def function(name: str, result: object, *arguments: object) -> ctypes._NamedFuncPointer:
            found = functions[f"gostnet_{name}"]
            found.restype = result  # type: ignore[assignment]  # the stub knows types, this knows which
            found.argtypes = arguments  # type: ignore[assignment]
            return found

        try:
            version = function("relay_version", number)()
            if version != VERSION:
                raise OSError(f"{path} has version {version} of the interface, not {VERSION}")
            self.start = function("relay_start", relay, number)
            self.add = function("relay_add", ctypes.c_int64, relay, number, number, unsigned, unsigned, number)
            self.cancel = function("relay_cancel", None, relay, unsigned, records)
            self.grant = function("relay_grant", None, relay, unsigned, number, ctypes.c_uint64)
            self.news = function("relay_news", number, relay, records, number)
            self.refused = function("relay_refused", number, relay)
            self.count = function("relay_count", None, relay, unsigned, records)
            self.moved = function("relay_moved", number, relay, ctypes.POINTER(ctypes.c_uint32), records, number)
            mover, table = ctypes.c_void_p, ctypes.c_void_p
            self.udp_make = function("udp_make", mover, number)
            self.udp_start = function("udp_start", number, mover)
            self.udp_told = function("udp_told", unsigned, mover, unsigned)
            self.udp_open = function("udp_open", table, mover, number, number, number, number, number)
            self.udp_close = function("udp_close", None, table)
            self.udp_join = function("udp_join", number, table, ctypes.c_char_p, number)
            self.udp_part = function("udp_part", None, table, number, ctypes.c_void_p)
            self.udp_up = function("udp_up", number, table)
            self.udp_news = function("udp_news", None, table, *(ctypes.c_void_p,) * 3)
            self.udp_resume = function("udp_resume", None, table, number)
            tun, text = ctypes.c_void_p, ctypes.c_char_p
            self.tun_open = function("tun_open", tun, number, number, number, number)
            self.tun_start = function("tun_start", number, tun)
            self.tun_learn = function("tun_learn", number, tun, number, text, text, number)
            self.tun_forget = function("tun_forget", None, tun, number, text)
            self.tun_way = function("tun_way", number, tun, number, text, number, text)
            self.tun_strict = function("tun_strict", None, tun, number)
            self.tun_take = function("tun_take", number, tun, ctypes.c_void_p)
            self.tun_count = function("tun_count", None, tun, ctypes.c_void_p)
            self.tun_peer = function("tun_peer", number, tun, text, number, ctypes.c_void_p)
            # These wait for a thread, which may be in the middle of something: without the interpreter lock.
            unlocked = ctypes.CDLL(path)
            stop, udp_stop = unlocked["gostnet_relay_stop"], unlocked["gostnet_udp_stop"]
            tun_stop, tun_close = unlocked["gostnet_tun_stop"], unlocked["gostnet_tun_close"]
        except AttributeError as exc:
            raise OSError(f"{path}: {exc}") from exc
        for end in (stop, udp_stop, tun_stop, tun_close):
            end.restype, end.argtypes = None, (ctypes.c_void_p,)
        self.stop, self.udp_stop = stop, udp_stop
        self.tun_stop, self.tun_close = tun_stop, tun_close


@cache
def load() -> tuple[Library | None, str]:
    """Return (the library, ""), or (None, why there is none). `GOSTNET_NATIVE=0` switches it off."""
    if os.environ.get("GOSTNET_NATIVE", "") in ("0", "false", "no", "off"):
        return None, OFF
    if not LIBRARY.exists():
        return None, "not built: no C compiler was there when gostnet was installed"
    try:
        return Library(str(LIBRARY)), ""
    except OSError as exc:
        return None, str(exc)
