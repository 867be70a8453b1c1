"""Maps, loaded programs and links, each a descriptor: what nobody holds any more is gone, however its holder ended.

The kernel makes these descriptors closed on exec.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys
from collections.abc import Iterator
from enum import Enum, IntEnum

from gostnet.core.errors import KernelError

from .assembly import Assembly

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "armv7l": 386, "armv6l": 386}
_NUMBERS |= {"i686": 357, "i586": 357, "s390x": 351, "ppc64le": 361, "ppc64": 361}
"""The number of the system call bpf by machine, as Python has no call for it."""

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT = 0, 1, 2, 3, 4
_PROG_LOAD, _PROG_TEST_RUN, _INFO, _PROG_QUERY, _LINK_CREATE, _LINK_DETACH = 5, 10, 15, 16, 28, 34
_SCHED_CLS = 3
_ATTRIBUTES = 128
"""Bytes given with each call; the kernel wants the ones that it does not know to be zero, which they are."""

_LINK_INFO = struct.Struct("=IIIxxxxI44x")
"""struct bpf_link_info of a tcx link: type, id, program, device."""

_LOG = 1 << 18
_LOG_SHOWN = 2000
_MOST_PROGRAMS = 64

_libc = ctypes.CDLL(None, use_errno=True)
_number = _NUMBERS.get(platform.machine(), -1)


class MapKind(IntEnum):
    """What a map is; the per-processor kinds hold a value for each processor."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11


_PER_PROCESSOR = (MapKind.PERCPU_HASH, MapKind.PERCPU_ARRAY)
_NO_PREALLOCATION = 1


class Direction(Enum):
    """Where a program meets packets: as a device receives them or as it sends them."""

    INGRESS = 46
    EGRESS = 47


class Verdict(IntEnum):
    """What a traffic control program answers with; NEXT asks the programs after it."""

    NEXT = -1
    PASS = 0
    DROP = 2
    REDIRECT = 7


class _Descriptor:
    """Something that exists as long as a descriptor of it is open. A context manager."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor, -1 once it is closed."""
        return self._fd

    def close(self) -> None:
        """Give it up. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> _Descriptor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _call(command: int, attributes: bytes | ctypes.Array[ctypes.c_char]) -> int:
    """Do it. Raise OSError; it is translated by who knows what was wanted."""
    if isinstance(attributes, bytes):
        attributes = ctypes.create_string_buffer(attributes, _ATTRIBUTES)
    if _number < 0:
        raise OSError(errno.ENOSYS, f"the system call bpf has no known number on {platform.machine()}")
    result = int(_libc.syscall(ctypes.c_long(_number), ctypes.c_int(command), attributes, ctypes.c_uint(_ATTRIBUTES)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _refused(operation: str, exc: OSError, detail: str = "") -> KernelError:
    number = exc.errno or errno.EIO
    hint = ""
    text = detail or os.strerror(number)
    if number == errno.EPERM:
        # Since Linux 5.11 EPERM has nothing to do with RLIMIT_MEMLOCK any more.
        text = "not permitted (needs CAP_BPF and CAP_NET_ADMIN outside of any user namespace)"
        hint = "run as root, not in an unprivileged container"
    elif number == errno.ENOSYS:
        text = "the kernel is without bpf"
    return KernelError(operation, number, text, hint=hint)


# ---- maps ---------------------------------------------------------------------------------------
class Map(_Descriptor):
    """A table that programs and this process share. Keys and values are bytes of fixed sizes.

    A key of an array is its index, 4 bytes in the host's order; its elements always exist and cannot be deleted. A key
    of LPM_TRIE is the length of the prefix in bits, 4 bytes in the host's order, and the address in network order; a
    look-up with the full length finds the longest prefix. The calls block nothing and may be made on an event loop.
    """

    __slots__ = ("_pair", "entries", "key_size", "kind", "name", "processors", "value_size")

    def __init__(self, kind: MapKind, key_size: int, value_size: int, entries: int, name: str = "") -> None:
        """Make a map for at most `entries`; `name` is what bpftool(8) shows, at most 15 letters, digits and _.

        Raise KernelError.
        """
        super().__init__(-1)
        flags = _NO_PREALLOCATION if kind is MapKind.LPM_TRIE else 0
        attributes = struct.pack("=7I16s", kind, key_size, value_size, entries, flags, 0, 0, _name(name))
        try:
            self._fd = _call(_MAP_CREATE, attributes)
        except OSError as exc:
            raise _refused(f"make BPF map {name}".rstrip(), exc) from exc
        self.kind = kind
        self.name = name
        self.entries = entries
        self.key_size = key_size
        self.value_size = value_size
        self.processors = _possible_processors() if kind in _PER_PROCESSOR else 1
        self._pair = (
            ctypes.create_string_buffer(key_size),
            ctypes.create_string_buffer(self._stride * self.processors),
        )

    @property
    def _stride(self) -> int:
        """Bytes from one processor's value to the next."""
        return (self.value_size + 7) & ~7 if self.kind in _PER_PROCESSOR else self.value_size

    def __enter__(self) -> Map:
        return self

    def lookup(self, key: bytes) -> bytes | None:
        """Return the value, of per-processor maps that of the first one; None if there is none. Raise KernelError."""
        values = self.lookup_each(key)
        return values[0] if values else None

    def lookup_each(self, key: bytes) -> list[bytes]:
        """Return the values of all processors (one, if the map is not of that kind), [] if there are none."""
        if not self._do(_MAP_LOOKUP, key):
            return []
        whole = self._pair[1].raw
        return [whole[n * self._stride :][: self.value_size] for n in range(self.processors)]

    def total(self, key: bytes) -> int:
        """Return the sum of counters of 8 bytes over all processors, 0 if there is no such element."""
        return sum(int.from_bytes(value[:8], sys.byteorder) for value in self.lookup_each(key))

    def update(self, key: bytes, value: bytes) -> None:
        """Set a value, for all processors alike. Raise KernelError (E2BIG: the map is full)."""
        if len(value) != self.value_size:
            raise ValueError(f"a value of {len(value)} bytes instead of {self.value_size}")
        self._pair[1].raw = value.ljust(self._stride, b"\0") * self.processors
        self._do(_MAP_UPDATE, key)

    def delete(self, key: bytes) -> bool:
        """Remove an element; return whether it was there. Raise KernelError."""
        return self._do(_MAP_DELETE, key)

    def keys(self) -> list[bytes]:
        """Return the keys there are; one that is changed meanwhile may be missing or stand twice."""
        found: list[bytes] = []
        key = ctypes.create_string_buffer(self.key_size)
        following = ctypes.create_string_buffer(self.key_size)
        start = 0  # no key at first: the kernel answers with the first one
        while len(found) < self.entries:  # where keys vanish the kernel begins anew, for ever if they keep doing so
            attributes = struct.pack("=IIQQQ", self._fd, 0, start, ctypes.addressof(following), 0)
            try:
                _call(_MAP_NEXT, attributes)
            except OSError as exc:
                if exc.errno == errno.ENOENT:
                    break
                raise _refused(f"list BPF map {self.name}".rstrip(), exc) from exc
            found.append(following.raw)
            key.raw = following.raw
            start = ctypes.addressof(key)
        return found

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values, those that are deleted meanwhile left out."""
        for key in self.keys():
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def _do(self, command: int, key: bytes) -> bool:
        """Run a command on an element; False if there is none."""
        if len(key) != self.key_size:
            raise ValueError(f"a key of {len(key)} bytes instead of {self.key_size}")
        first, second = self._pair
        first.raw = key
        value = ctypes.addressof(second) if command != _MAP_DELETE else 0
        try:
            _call(command, struct.pack("=IIQQQ", self._fd, 0, ctypes.addressof(first), value, 0))
        except OSError as exc:
            if exc.errno == errno.ENOENT and command != _MAP_UPDATE:
                return False
            full = "it is full" if exc.errno == errno.E2BIG else ""
            raise _refused(f"change BPF map {self.name}".rstrip(), exc, full) from exc
        return True


def _possible_processors() -> int:
    """Return for how many processors the kernel keeps values, those that may be plugged in later included."""
    with open("/sys/devices/system/cpu/possible") as file:
        text = file.read()
    return int(text.strip().rpartition("-")[2].rpartition(",")[2]) + 1


# ---- programs -----------------------------------------------------------------------------------
class Program(_Descriptor):
    """A loaded traffic control program. Maps that it uses live as long as it does."""

    __slots__ = ("name",)

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self.name = name

    def __enter__(self) -> Program:
        return self

    def run(self, packet: bytes) -> tuple[int, bytes]:
        """Run it once on a made-up Ethernet frame, as tests do; return (answer, the frame it left). Raise KernelError.

        Helpers that send the packet elsewhere only answer; of what the program does to the frame all is seen.
        """
        given = ctypes.create_string_buffer(packet, len(packet))
        back = ctypes.create_string_buffer(len(packet) + 512)
        attributes = ctypes.create_string_buffer(
            struct.pack("=4IQQ", self._fd, 0, len(packet), len(back), ctypes.addressof(given), ctypes.addressof(back)),
            _ATTRIBUTES,
        )
        try:
            _call(_PROG_TEST_RUN, attributes)
        except OSError as exc:
            raise _refused(f"run BPF program {self.name}".rstrip(), exc) from exc
        _, answer, _, size = struct.unpack_from("=IiII", attributes)
        return answer, back.raw[:size]

    def attach(self, device: str | int, direction: Direction) -> Link:
        """Attach behind the programs of the device, by its name or index, in the thread's network namespace.

        The link keeps the program; this object may be closed. Raise KernelError.
        """
        operation = f"attach BPF program {self.name} to the {direction.name.lower()} of {device}"
        try:
            index = socket.if_nametoindex(device) if isinstance(device, str) else device
        except OSError as exc:
            raise KernelError(operation, errno.ENODEV) from exc
        try:
            return Link(_call(_LINK_CREATE, struct.pack("=4I", self._fd, index, direction.value, 0)))
        except OSError as exc:
            raise _refused(operation, exc, _no_tcx(exc)) from exc


class Link(_Descriptor):
    """A program at work on a device; closing it takes the program off, as the end of the process does."""

    __slots__ = ()

    def __enter__(self) -> Link:
        return self

    @property
    def attached(self) -> bool:
        """Whether the program is still at work: not once the device has gone, or somebody has taken it off."""
        return self._fd >= 0 and self._information[1] > 0

    @property
    def program(self) -> int:
        """The program's id."""
        return self._information[0]

    @property
    def _information(self) -> tuple[int, int]:
        """Ask for the id of the program and the index of the device, which is 0 once it is off."""
        shown = ctypes.create_string_buffer(_LINK_INFO.size)
        try:
            _call(_INFO, struct.pack("=IIQ", self._fd, _LINK_INFO.size, ctypes.addressof(shown)))
        except OSError:
            return 0, 0
        _, _, program, device = _LINK_INFO.unpack(shown)
        return program, device

    def detach(self) -> None:
        """Take the program off, as others can who know the link's id; the link stays, without effect."""
        try:
            _call(_LINK_DETACH, struct.pack("=I", self._fd))
        except OSError as exc:
            raise _refused("detach a BPF program", exc) from exc


def load(code: Assembly | bytes, name: str = "") -> Program:
    """Load a traffic control program; `name` is what bpftool(8) shows, at most 15 letters, digits and _.

    Raise KernelError, with the end of what the verifier said if it refuses the program.
    """
    text = code.build() if isinstance(code, Assembly) else code
    instructions = ctypes.create_string_buffer(text, len(text))
    licence = ctypes.create_string_buffer(b"GPL")  # some helpers are for programs under the GPL only
    try:
        fd = _load(instructions, licence, name, None)
    except OSError as first:
        if first.errno not in (errno.EINVAL, errno.EACCES, errno.E2BIG, errno.EFAULT):
            raise _refused(f"load BPF program {name}".rstrip(), first) from first
        log = ctypes.create_string_buffer(_LOG)
        try:
            fd = _load(instructions, licence, name, log)
        except OSError as exc:
            said = log.value.decode(errors="backslashreplace").strip()[-_LOG_SHOWN:]
            detail = f"{os.strerror(exc.errno or 0)}; the verifier says: {said}" if said else ""
            raise _refused(f"load BPF program {name}".rstrip(), exc, detail) from exc
    return Program(fd, name)


def _load(
    instructions: ctypes.Array[ctypes.c_char],
    licence: ctypes.Array[ctypes.c_char],
    name: str,
    log: ctypes.Array[ctypes.c_char] | None,
) -> int:
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        _SCHED_CLS,
        len(instructions) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(licence),
        1 if log is not None else 0,
        len(log) if log is not None else 0,
        ctypes.addressof(log) if log is not None else 0,
        0,
        0,
        _name(name),
        0,
        0,
    )
    return _call(_PROG_LOAD, attributes)


def _name(name: str) -> bytes:
    """Return a name in the form of the kernel, which takes letters, digits, _ and dots only."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.") else "_" for c in name).encode()[:15]


# ---- what there is ------------------------------------------------------------------------------
def attached(index: int, direction: Direction) -> list[int]:
    """Return the ids of the programs on a device of the thread's namespace, [] if the kernel has no tcx.

    Raise KernelError.
    """
    identifiers = (ctypes.c_uint32 * _MOST_PROGRAMS)()
    attributes = ctypes.create_string_buffer(
        struct.pack("=4IQI", index, direction.value, 0, 0, ctypes.addressof(identifiers), _MOST_PROGRAMS), _ATTRIBUTES
    )
    try:
        _call(_PROG_QUERY, attributes)
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.ENOSYS):
            return []
        raise _refused(f"list the BPF programs of device {index}", exc) from exc
    count = int(struct.unpack_from("=I", attributes, 24)[0])
    return list(identifiers[:count])


def loading_problem() -> str:
    """Tell why traffic control programs cannot be loaded here, "" if they can. Tries it, and leaves nothing."""
    code = Assembly()
    code.leave(Verdict.NEXT)
    try:
        load(code, "probe").close()
    except KernelError as exc:
        return str(exc)
    return ""


def attachment_problem() -> str:
    """Tell why programs cannot be attached to devices of the thread's namespace, "" if they can."""
    problem = loading_problem()
    if problem:
        return problem
    try:
        # Without tcx the kernel does not know the place that is asked about.
        _call(_PROG_QUERY, struct.pack("=4I", socket.if_nametoindex("lo"), Direction.EGRESS.value, 0, 0))
    except OSError as exc:
        return str(_refused("ask for BPF programs of lo", exc, _no_tcx(exc)))
    return ""


def _no_tcx(exc: OSError) -> str:
    return "the kernel has no tcx, which came with Linux 6.6" if exc.errno == errno.EINVAL else ""
