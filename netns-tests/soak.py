"""Mixed traffic for as long as is asked, with kills and reconnects: no byte wrong, and nothing that grows.

The lab's network and configurations: a gateway that captures TCP and UDP and keeps a VPN up, an exit that is killed,
ended and started again meanwhile. The gateway is what is watched: it must live through it all, and once the traffic is
over its descriptors must be as many as before, and its memory must not have grown since the first quarter of the time
(if the run is long enough to be warm by then).

    python netns-tests/soak.py --seconds 600
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET

import yaml

from gostnet.core.address import Endpoint
from gostnet.core.errors import GostnetError
from gostnet.lab import EXIT, GATEWAY, INTERNET, NAMES, TOPOLOGY, configurations
from gostnet.testing.certificates import Authority
from gostnet.testing.clients import connect, echo, echo_datagram, fetch, ping
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process, gostnet
from gostnet.testing.servers import pattern, serving_in_thread
from gostnet.testing.state import await_same, snapshot

LARGEST = 2_000_000
"""Bytes of the largest transfer."""

DATAGRAM = 1300
"""Bytes of the largest datagram."""

PATIENCE = 5.0
"""Seconds a client waits; while the exit is away it waits for nothing."""

QUIET = 40.0
"""Seconds for flows to end after the last client has gone: the longest is an association's idle time."""

WARM = 15.0
"""Seconds before which memory is not looked at: the first peaks of traffic make the heap what it is."""

GROWTH = 1.2, 16384
"""Factor and KiB by which memory may differ between a quarter of the time and the end: a higher peak of flows, as after
each kill, leaves the heap larger. What each flow would leave behind comes to ten times that in ten minutes."""


@dataclass
class Tally:
    """What the clients met. `wrong` is what must never be: bytes that are not those that were sent."""

    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Wrong(Exception):
    """Something arrived that was not sent."""


Job = Callable[[random.Random], None]


class Soak:
    """One run."""

    def __init__(self, seconds: float, workers: int, seed: int, every: float) -> None:
        self._seconds = seconds
        self._workers = workers
        self._random = random.Random(seed)
        self._every = every
        self._network = Network(TOPOLOGY)
        self._tally = Tally()
        self._stop = threading.Event()
        self.problems: list[str] = []

    def run(self) -> None:
        """Run it; what is wrong is in `problems` afterwards."""
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gostnet-soak-")))
            stack.enter_context(self._network)
            addresses = TOPOLOGY.addresses(INTERNET, "eth0") + TOPOLOGY.addresses(INTERNET, "eth1")
            stack.enter_context(
                serving_in_thread(self._network[INTERNET], addresses, zone=dict.fromkeys(NAMES, addresses))
            )
            self._configure(directory)
            before = snapshot(self._network[GATEWAY])
            self._exit = self._start(directory, EXIT)
            stack.callback(lambda: self._exit.stop())
            gateway = self._start(directory, GATEWAY)
            stack.callback(gateway.stop)
            self._traffic(gateway, directory)
            if (code := gateway.stop(15.0)) != 0:
                self.problems.append(f"the gateway ended with {code}: {gateway.errors[-1000:]}")
            self.problems += [f"trace: {line}" for line in await_same(before, self._network[GATEWAY])]
        self.problems += [f"wrong: {line}" for line in self._tally.wrong]

    def _configure(self, directory: Path) -> None:
        authority = Authority("soak")
        authority.issue("exit.lab").save(directory, "exit")
        (directory / "ca.crt").write_bytes(authority.certificate)
        for role, configuration in configurations(directory, TOPOLOGY.addresses(EXIT, "eth0", 4)[0], False).items():
            (directory / f"{role}.yaml").write_text(yaml.safe_dump(configuration))

    def _start(self, directory: Path, role: str) -> Process:
        process = gostnet("-C", str(directory / f"{role}.yaml"), "--instance", "soak", place=self._network[role])
        process.start()
        process.wait_ready()
        return process

    # ---- traffic ----------------------------------------------------------------------------------
    def _traffic(self, gateway: Process, directory: Path) -> None:
        self._await_way()
        idle = len(descriptors(gateway.pid))
        threads = [
            threading.Thread(target=self._work, args=(random.Random(self._random.random()),), name=f"client {n}")
            for n in range(self._workers)
        ]
        for thread in threads:
            thread.start()
        start, quarter = time.monotonic(), 0
        while (passed := time.monotonic() - start) < self._seconds and gateway.returncode is None:
            self._stop.wait(min(self._every, self._seconds - passed))
            event = self._disturb(gateway, directory)
            rss = resident(gateway.pid)
            if not quarter and passed >= max(self._seconds / 4, WARM):
                quarter = rss
            say(
                f"{time.monotonic() - start:6.0f} s  rss {rss:6} KiB  descriptors {len(descriptors(gateway.pid)):4}  "
                f"done {self._tally.done.total():6}  failed {self._tally.failed.total():5}  {event}"
            )
        self._stop.set()
        for thread in threads:
            thread.join()
        if gateway.returncode is not None:
            self.problems.append(f"the gateway died with {gateway.returncode}: {gateway.errors[-1000:]}")
            return
        self._judge(gateway, idle, quarter)

    def _judge(self, gateway: Process, idle: int, quarter: int) -> None:
        deadline = time.monotonic() + QUIET
        while len(descriptors(gateway.pid)) > idle and time.monotonic() < deadline:
            time.sleep(0.2)
        left = descriptors(gateway.pid)
        rss = resident(gateway.pid)
        say(f"at the end: rss {rss} KiB (at a quarter {quarter}), descriptors {len(left)} (idle before {idle})")
        for kind in sorted(self._tally.done | self._tally.failed):
            say(f"  {kind:14} done {self._tally.done[kind]:6}  failed {self._tally.failed[kind]:5}")
        if len(left) > idle:
            self.problems.append(f"{len(left)} descriptors instead of {idle}: {Counter(left).most_common(5)}")
        if quarter and rss > max(quarter * GROWTH[0], quarter + GROWTH[1]):
            self.problems.append(f"memory grew from {quarter} KiB to {rss} KiB")
        for kind, _ in self._jobs():
            if not self._tally.done[kind]:
                self.problems.append(f"{kind} never worked")

    def _await_way(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                for _, job in self._jobs():
                    job(random.Random(1))
                return
            except (OSError, ValueError, GostnetError) as exc:
                if time.monotonic() > deadline:
                    raise Wrong(f"nothing gets through: {exc}") from exc
                time.sleep(0.1)

    def _disturb(self, gateway: Process, directory: Path) -> str:
        """Do to the daemons what happens to daemons; return what was done."""
        what = self._random.choice(("kill", "end", "reload", "nothing"))
        if what == "reload":
            gateway.send(signal.SIGHUP)
        elif what in ("kill", "end"):
            if what == "kill":
                self._exit.kill()
            self._exit.stop()
            self._exit = self._start(directory, EXIT)
        return what

    def _work(self, source: random.Random) -> None:
        jobs = list(self._jobs())
        while not self._stop.is_set():
            kind, job = source.choice(jobs)
            try:
                job(source)
            except Wrong as exc:
                self._tally.wrong.append(f"{kind}: {exc}")
            except (OSError, ValueError, HTTPException, GostnetError):
                self._tally.failed[kind] += 1
                self._stop.wait(0.05)
            else:
                self._tally.done[kind] += 1

    def _jobs(self) -> Iterator[tuple[str, Job]]:
        """Yield what clients do: over IPv4 and IPv6, captured at the gateway, on the gateway, and by its VPN."""
        for version in (4, 6):
            web = TOPOLOGY.addresses(INTERNET, "eth0", version)[0]
            behind = TOPOLOGY.addresses(INTERNET, "eth1", version)[0]
            client, gateway = self._network["client"], self._network[GATEWAY]
            yield f"tcp{version}", transfers(client, web)
            yield f"abort{version}", aborts(client, web)
            yield f"http{version}", downloads(client, web)
            yield f"udp{version}", datagrams(client, web)
            yield f"own tcp{version}", transfers(gateway, web)
            yield f"own udp{version}", datagrams(gateway, web)
            yield f"vpn tcp{version}", transfers(gateway, behind)
            yield f"vpn udp{version}", datagrams(gateway, behind)
            yield f"vpn ping{version}", pings(gateway, behind)


def size_of(source: random.Random, largest: int) -> int:
    """Return a size, small ones as often as large ones."""
    return int(largest ** source.random())


def transfers(place: str, host: str) -> Job:
    """Return a job: an echo of a stream, ended by half-close."""

    def job(source: random.Random) -> None:
        data = source.randbytes(size_of(source, LARGEST))
        if echo(place, Endpoint(host, 7), data, timeout=PATIENCE) != data:
            raise Wrong(f"echo of {len(data)} bytes")

    return job


def aborts(place: str, host: str) -> Job:
    """Return a job: a connection that is reset with bytes on their way."""

    def job(source: random.Random) -> None:
        with connect(place, Endpoint(host, 7), timeout=PATIENCE) as sock:
            sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            sock.setblocking(False)
            try:
                sock.send(source.randbytes(size_of(source, LARGEST)))
            except BlockingIOError:
                pass

    return job


def downloads(place: str, host: str) -> Job:
    """Return a job: a download whose content is known, or an upload whose digest comes back."""

    def job(source: random.Random) -> None:
        target, size = Endpoint(host, 80), size_of(source, LARGEST)
        if source.random() < 0.5:
            reply = fetch(place, target, f"/bytes/{size}", timeout=PATIENCE)
            if reply.status == 200 and reply.body != pattern(size):
                raise Wrong(f"download of {size} bytes")
            return
        body = source.randbytes(size)
        reply = fetch(place, target, "/upload", method="POST", body=body, timeout=PATIENCE)
        if reply.status == 200 and reply.json()["sha256"] != hashlib.sha256(body).hexdigest():
            raise Wrong(f"upload of {size} bytes")

    return job


def datagrams(place: str, host: str) -> Job:
    """Return a job: an echo of a datagram, which may be lost but not changed."""

    def job(source: random.Random) -> None:
        data = source.randbytes(size_of(source, DATAGRAM))
        answer, sender = echo_datagram(place, Endpoint(host, 7), data, timeout=1.0)
        if answer != data or sender != Endpoint(host, 7):
            raise Wrong(f"datagram of {len(data)} bytes from {sender}")

    return job


def pings(place: str, host: str) -> Job:
    """Return a job: an ICMP echo."""

    def job(source: random.Random) -> None:
        data = source.randbytes(size_of(source, DATAGRAM))
        if ping(place, host, data, timeout=1.0) != data:
            raise Wrong(f"ping of {len(data)} bytes")

    return job


# ---- looking at a process -----------------------------------------------------------------------------
def resident(pid: int) -> int:
    """Return the resident memory of a process in KiB, 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")), 0)


def descriptors(pid: int) -> list[str]:
    """Return what a process has open, without inode numbers."""
    found = []
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                found.append(str(entry.readlink()).partition(":[")[0])
            except OSError:
                continue
    except OSError:
        return []
    return found


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description="Mixed traffic through a gateway for a long time.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--workers", type=int, default=8, help="clients at a time")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between disturbances")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(words)
    soak = Soak(options.seconds, options.workers, options.seed, options.every)
    soak.run()
    for problem in soak.problems:
        say(problem)
    say("failed" if soak.problems else "passed")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
