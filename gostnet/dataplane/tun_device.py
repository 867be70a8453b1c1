"""TUN and TAP devices: opened by one ioctl (or by python-pytun), read and written in batches.

A device is not persistent: it lives as long as its descriptor, so nothing is left of it however the process ends.

A device with a virtio header takes runs of TCP segments in one write (dataplane.tcp_runs). What it gives is cut and
summed up by the kernel: doing that here costs as much as reading each packet.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Literal, cast

from ..core.errors import ConfigError, ConnError, KernelError
from ..core.packets import NO_SETUP, Medium, Packets, Setup
from ..core.sockets import Readiness
from ..core.stream import Buffer
from .arena import slots
from .tcp_runs import HEADER_SIZE, Run, join_runs, packets_of

_PATH = "/dev/net/tun"
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
_IFF = {Medium.IP: 0x0001, Medium.ETHERNET: 0x0002}
_IFF_NO_PI, _IFF_VNET_HDR = 0x1000, 0x4000
_IFREQ = struct.Struct("16sH22x")
_SIOCSIFTXQLEN = 0x8943

QUEUE_LENGTH = 1000
"""Packets, as WireGuard has: a longer queue would add seconds of delay where a carrier is slow."""

_LARGEST = 65535
"""Bytes of the largest packet: the MTU may be raised behind our back, and a short buffer would cut packets."""

_GONE = (errno.EBADFD, errno.EBADF, errno.ENODEV)
"""What a descriptor says whose device has been deleted."""

Backend = Literal["ioctl", "pytun"]


def is_device_name(name: str) -> bool:
    """Return whether the kernel would take it: 1 to 15 bytes without blanks and slashes (dev_valid_name)."""
    return len(name.encode()) <= 15 and "/" not in name and name.split() == [name] and name not in (".", "..")


def open_device(
    name: str = "", medium: Medium = Medium.IP, backend: Backend = "ioctl", *, vnet_header: bool = False
) -> tuple[int, str]:
    """Create a device in the thread's network namespace; return (descriptor, name). It is down and has no address.

    An empty name lets the kernel choose (tun0, tun1, ...), `%d` in one is replaced by a free number. The descriptor
    is non-blocking and closed on exec; it is the caller's. With `vnet_header` every packet has a virtio_net_hdr in
    front, both ways, and no offload is on (`set_offload`). Raise KernelError, ConfigError for a name that cannot be.
    """
    if name and not is_device_name(name):
        raise ConfigError("", f"{name[:64]!r} is not the name of an interface", code="tun.name")
    shown = f"open {medium.value} device {name}".rstrip()
    try:
        flags = _IFF[medium] | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_header else 0)
        fd, name = _by_pytun(name, flags) if backend == "pytun" else _by_ioctl(name, flags)
        if vnet_header:
            try:
                fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("=i", HEADER_SIZE))
                set_offload(fd, 0)
                _lengthen_queue(name)
            except BaseException:
                os.close(fd)
                raise
    except OSError as exc:
        raise _refusal(shown, exc) from exc
    return fd, name


def set_offload(fd: int, features: int) -> bool:
    """Say what the reader of a device with a virtio header copes with (TUN_F_* of linux/if_tun.h).

    Return False if the kernel does not know one of them; then nothing has changed.
    """
    try:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, features)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return False
    return True


def _lengthen_queue(name: str) -> None:
    """Let more packets wait for the reader than the kernel's 500, which one sender at full speed overruns at once.

    The root of a user namespace may make a device and not do this to it: then the queue stays as it is.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, suppress(PermissionError):
        fcntl.ioctl(sock, _SIOCSIFTXQLEN, struct.pack("16si20x", name.encode(), QUEUE_LENGTH))


def _by_ioctl(name: str, flags: int) -> tuple[int, str]:
    fd = os.open(_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        answer = fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        return fd, answer[:16].rstrip(b"\0").decode()
    except BaseException:
        os.close(fd)
        raise


def _by_pytun(name: str, flags: int) -> tuple[int, str]:
    """Let python-pytun do it, and repair what it leaves out: its descriptor blocks and survives exec."""
    try:
        import pytun
    except ImportError as exc:
        raise ConfigError(
            "", "the device backend pytun needs the package python-pytun", hint="pip install gostnet[pytun]"
        ) from exc
    try:
        device = pytun.TunTapDevice(name=name, flags=flags)
    except pytun.Error as exc:
        # Its errors carry the arguments of an OSError without being one.
        raise OSError(*exc.args) from exc
    try:
        # The object closes its descriptor when it is collected, so it gives us one of our own.
        fd = fcntl.fcntl(device.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)
        os.set_blocking(fd, False)
        return fd, str(device.name)
    finally:
        device.close()


def _refusal(operation: str, exc: OSError) -> KernelError:
    number = exc.errno or errno.EIO
    hint = ""
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        detail, hint = f"{_PATH} is missing", "load the module: modprobe tun; in a container pass the device in"
        return KernelError(operation, number, detail, hint=hint)
    if number in (errno.EPERM, errno.EACCES):
        hint = "devices need CAP_NET_ADMIN"
    if number == errno.EBUSY:
        return KernelError(operation, number, "a device of this name exists already and is in use")
    if number == errno.EINVAL:
        return KernelError(operation, number, "an interface of this name exists already and is of another kind")
    return KernelError(operation, number, hint=hint)


class Descriptor:
    """What Readiness asks of a socket, for a bare descriptor."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """Return its number, -1 once it is closed."""
        return self._fd

    def close(self) -> None:
        """Close it. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class TunDevice(Packets):
    """A device that the process holds; closing it removes it from the kernel.

    Of a device with a virtio header (`joins`) the header is no concern of those who receive and send: they see packets
    without it, whole and summed up.

    received, sent, dropped    packets that came out of the kernel, went into it, and were refused by it
    joins                      runs of TCP segments go into the kernel in one piece
    closing                    called before it is closed: stops whoever else reads it
    """

    __slots__ = (
        "_fd",
        "_into",
        "_on_close",
        "_slots",
        "_views",
        "closing",
        "dropped",
        "joins",
        "readiness",
        "received",
        "sent",
    )

    BATCH = 64
    """Packets per `receive`: enough to amortise the wake-up, small enough to stay fair."""

    def __init__(
        self,
        fd: int,
        name: str,
        mtu: int,
        medium: Medium = Medium.IP,
        *,
        setup: Setup = NO_SETUP,
        joins: bool = False,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Take a non-blocking descriptor of a device, with `joins` one opened with a virtio header.

        It is ours to close from now on.
        """
        super().__init__(name, mtu, medium, setup=setup)
        self._fd = fd
        self._on_close = on_close
        self.readiness = Readiness(cast(socket.socket, Descriptor(fd)))
        self.joins = joins
        self.closing: Callable[[], None] | None = None
        self.received = 0
        self.sent = 0
        self.dropped = 0
        # Where packets are read to, each with the view of the last one: sizes repeat, and memory that no packet was
        # large enough for is never touched.
        header = [bytearray(HEADER_SIZE)] if joins else []
        self._slots = slots(self.BATCH, _LARGEST)
        self._into: list[list[bytearray | memoryview]] = [[*header, slot] for slot in self._slots]
        self._views = [slot[:0] for slot in self._slots]

    @property
    def closed(self) -> bool:
        """Whether we have closed it."""
        return self.readiness.fd < 0

    @property
    def fd(self) -> int:
        """The descriptor, which stays ours."""
        return self._fd

    def check(self) -> None:
        if not self.closed:
            try:
                fcntl.ioctl(self._fd, _TUNGETIFF, bytes(_IFREQ.size))
            except OSError as exc:
                raise self._error(exc) from exc

    async def receive(self) -> Sequence[Buffer]:
        while True:
            batch = self.receive_now()
            if batch or self.closed:
                return batch
            await self.readiness.readable()

    def receive_now(self) -> list[memoryview]:
        """Return the packets that wait, [] if there are none. They are valid until the next call."""
        batch: list[memoryview] = []
        if self.closed:
            return batch
        fd, read, views, places = self._fd, os.readv, self._views, self._slots
        offset = HEADER_SIZE if self.joins else 0
        count = 0
        try:
            for into in self._into:
                size = read(fd, into) - offset
                view = views[count]
                if len(view) != size:
                    view = views[count] = places[count][:size]
                batch.append(view)
                count += 1
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as exc:
            if not batch:
                raise self._error(exc) from exc
        self.received += count
        return batch

    async def send(self, batch: Sequence[Buffer]) -> None:
        self.send_now(batch)

    def send_now(self, batch: Sequence[Buffer]) -> None:
        """Give the kernel packets; it takes them at once or not at all."""
        if self.closed:
            raise ConnError("closed by this side")
        if self.joins:
            self.send_runs(join_runs(batch))
            return
        fd, write = self._fd, os.write
        refused = 0
        for packet in batch:
            try:
                write(fd, packet)
            except OSError as exc:
                if exc.errno in _GONE:
                    raise self._error(exc) from exc
                refused += 1  # the link is down, no memory, or it is no IP packet
        self.sent += len(batch) - refused
        self.dropped += refused

    def send_runs(self, runs: Iterable[Run]) -> None:
        """Give the kernel what `join_runs` made; only for a device that joins."""
        if self.closed:
            raise ConnError("closed by this side")
        fd, write = self._fd, os.writev
        count = refused = 0
        for run in runs:
            packets = packets_of(run)
            count += packets
            try:
                write(fd, run)
            except OSError as exc:
                if exc.errno in _GONE:
                    raise self._error(exc) from exc
                refused += packets
        self.sent += count - refused
        self.dropped += refused

    def _error(self, exc: OSError) -> ConnError:
        what = "is gone" if exc.errno in _GONE else os.strerror(exc.errno or 0)
        return ConnError(f"device {self.name} {what}")

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.closed:
            if self.closing is not None:
                self.closing()
            self.readiness.release()
            if self._on_close is not None:
                self._on_close()
            self._tell_closed()
