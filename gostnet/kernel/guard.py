"""The guard: a program that waits for the daemon's death and then gives the host back as it was.

`watch.start` runs it by exec with none of the daemon's descriptors but a pidfd. It watches before it has loaded
anything, then loads what rolls back: when the daemon dies nothing has to be found, and a machine that is short of
everything delays nothing. It runs in the network namespace that it cleans.

Arguments: descriptor of the pidfd, path of the journal, the daemon's process id, its start in ticks, then the
directories in which gostnet and its dependencies are found. Standard output gets a byte as soon as it watches;
standard input is a pipe from the daemon: a byte means that there is nothing left to do.
"""

import os
import select
import signal
import sys

TYPE_CHECKING = False  # typing takes longer to load than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable


def main(arguments: list[str]) -> int:
    """Watch until the daemon dismisses us (0) or dies; then roll back, 1 if that was not possible."""
    descriptor, path, pid, start, *directories = arguments
    # A service manager ends all processes of a service at once: the guard has to outlive the daemon.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    _write("/proc/self/comm", "gostnet-guard")
    _write("/proc/self/oom_score_adj", "-900")
    poll = select.poll()
    poll.register(int(descriptor), select.POLLIN)
    poll.register(0, select.POLLIN)
    try:
        os.write(1, b"w")
        os.close(1)
    except OSError:
        pass  # the daemon has died already
    sys.path += directories
    roll_back = _loaded(path, int(pid), int(start))
    while True:
        ready = dict(poll.poll())
        if int(descriptor) in ready:
            break
        # Only its last holder's death closes the pipe; a dying daemon does so before its pidfd tells.
        if 0 in ready and os.read(0, 1):
            return 0
        poll.unregister(0)
    return roll_back()


def _loaded(path: str, pid: int, start: int) -> "Callable[[], int]":
    """Load what rolls back, and return it ready to be called."""
    import syslog
    from pathlib import Path

    from gostnet.kernel.journal import Owner
    from gostnet.kernel.recovery import roll_back_of

    def roll_back() -> int:
        steps = roll_back_of(Path(path), Owner(pid, start))
        kept = [step for step in steps if step.verb == "keep"]
        if steps:
            syslog.openlog("gostnet", syslog.LOG_PID, syslog.LOG_DAEMON)
            syslog.syslog(syslog.LOG_NOTICE, f"process {pid} died; rolled back {len(steps) - len(kept)} steps")
        for step in kept:
            syslog.syslog(syslog.LOG_WARNING, str(step))
        return int(bool(kept))

    return roll_back


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        pass  # both are comfort


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
