"""What the daemon hears of the system, and what it tells it: signals, and sd_notify(3)."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence

from ..core.tasks import Scope


class Signals:
    """TERM and INT ask to stop, a second one at once; HUP asks to reload, and so does the time.

    insisted    a second one has come
    """

    def __init__(self, period: float = 0.0) -> None:
        """Listen from now on, in the running loop; reload every `period` seconds if that is not 0."""
        self._period = period
        self._stop = asyncio.Event()
        self.insisted = asyncio.Event()
        self._reload = asyncio.Event()
        loop = asyncio.get_running_loop()
        actions: Sequence[tuple[int, Callable[[], None]]] = (
            (signal.SIGTERM, self._ask_to_stop),
            (signal.SIGINT, self._ask_to_stop),
            (signal.SIGHUP, self._reload.set),
        )
        for number, action in actions:
            loop.add_signal_handler(number, action)

    def _ask_to_stop(self) -> None:
        if self._stop.is_set():
            self.insisted.set()
        self._stop.set()

    async def stopped(self) -> bool:
        """Wait until asked to stop; always False: nothing goes on."""
        await self._stop.wait()
        return False

    async def serve(self, scope: Scope, reload: Callable[[bool], Awaitable[None]]) -> None:
        """Call `reload` when asked to, with True if only the time has asked; return when asked to stop."""
        while not self._stop.is_set():
            waiter = scope.start(self._stop.wait(), "stop")
            hup = scope.start(self._reload.wait(), "reload")
            await asyncio.wait((waiter, hup), timeout=self._period or None, return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            hup.cancel()
            if self._stop.is_set():
                return
            quiet = not self._reload.is_set()
            self._reload.clear()
            await reload(quiet)


def notify(state: str) -> None:
    """Tell systemd, where it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), address)
    except OSError:
        pass  # not being heard must not stop the daemon
