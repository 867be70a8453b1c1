"""The runner: contenders take turns in every round, each alone on the machine while it is measured."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gostnet.core.errors import GostnetError
from gostnet.testing.namespaces import Network
from gostnet.testing.processes import Process

from . import load, measure
from .cases import Case, Group, Unit
from .contenders import Command, Contender, Program, Setup
from .topology import ORIGIN_PORT, network

GIB = 1 << 30

READY = 20.0
"""Seconds for a program to listen."""

_LOOK = 0.02
_WARM = 0.4
"""Seconds before the measurement begins: connections are open, windows are wide."""


class Unfit(Exception):
    """A measurement that would not say what it claims to."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement.

    rate      in the case's unit
    cpu       of the contender's processes, s/GiB or us per operation
    machine   the same of the whole machine: client, server and the kernel's own work included
    p50, p99  us
    """

    rate: float
    cpu: float = 0.0
    machine: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    failed: int = 0
    lost: int = 0


@dataclass(slots=True)
class Results:
    """All samples by case and contender, in the order of the rounds, and what went wrong."""

    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, case: Case, contender: str, sample: Sample) -> None:
        """Note a sample."""
        self.samples.setdefault(case.id, {}).setdefault(contender, []).append(sample)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: cases, contenders with their binaries, how often and how long."""

    cases: Sequence[Case]
    contenders: Sequence[tuple[Contender, str]]
    rounds: int = 5
    seconds: float = 1.0


def run(plan: Plan, say: Callable[[str], None]) -> Results:
    """Measure everything in namespaces of its own, which are gone at the end. Raise KernelError without root."""
    results = Results()
    generator = str(load.program())
    groups = {case.group: [other for other in plan.cases if other.group is case.group] for case in plan.cases}
    with network() as net, tempfile.TemporaryDirectory(prefix="gostnet-bench-") as place:
        with Process([generator, "serve", str(ORIGIN_PORT)], net["server"], name="origin") as origin:
            origin.wait_for("serving")
            unfit: set[tuple[Group, str]] = set()
            for number in range(plan.rounds):
                for group, cases in groups.items():
                    for contender, binary in plan.contenders:
                        set_up = contender.groups.get(group)
                        taken = [case for case in cases if contender.takes(case)]
                        if set_up is None or not taken or (group, contender.name) in unfit:
                            continue
                        directory = Path(place, f"{contender.name}-{group.value}")
                        directory.mkdir(exist_ok=True)
                        try:
                            with _ready(net, set_up(binary, directory)) as (setup, measured):
                                for case in taken:
                                    if case.unit is Unit.MEMORY and not measured:
                                        continue  # the kernel's own forwarding has no process
                                    sample = _measure(net, generator, case, setup, measured, plan.seconds)
                                    results.add(case, contender.name, sample)
                                    say(
                                        f"{number + 1}/{plan.rounds} {case.id} {contender.name}: {_shown(case, sample)}"
                                    )
                        except (GostnetError, Unfit, OSError, subprocess.CalledProcessError) as exc:
                            problem = f"{contender.name}, {group.value}, round {number + 1}: {_reason(exc)}"
                            results.problems.append(problem)
                            say(problem)
                            if number == 0:
                                unfit.add((group, contender.name))
    return results


def _reason(exc: Exception) -> str:
    if isinstance(exc, subprocess.CalledProcessError):
        return f"{' '.join(exc.cmd)}: {exc.stderr.strip()}"
    return str(exc)


def _shown(case: Case, sample: Sample) -> str:
    failed = f", {sample.failed} failed" if sample.failed else ""
    lost = f", {sample.lost} lost" if sample.lost else ""
    cpu = f", CPU {sample.cpu:.3g} {case.cpu_unit}" if sample.cpu else ""
    return f"{sample.rate:.4g} {case.unit.value}{cpu}{failed}{lost}"


def _succeeds(net: Network, command: Command) -> bool:
    with net.inside(command.role):
        return subprocess.run(command.arguments, capture_output=True, check=False, timeout=20).returncode == 0


def _execute(net: Network, command: Command, *, check: bool = True) -> None:
    with net.inside(command.role):
        subprocess.run(command.arguments, input=command.text, capture_output=True, text=True, check=check, timeout=20)


@contextmanager
def _ready(net: Network, setup: Setup) -> Iterator[tuple[Setup, list[Process]]]:
    """Start a contender and wait until it works; yield the setup and the processes that count."""
    with ExitStack() as stack:
        measured = []
        for program in setup.programs:
            process = stack.enter_context(Process(program.arguments, net[program.role]))
            _await(net, process, program)
            if program.measured:
                measured.append(process)
        for command in setup.undo:
            stack.callback(_execute, net, command, check=False)
        for command in setup.prepare:
            _execute(net, command)
        _await_path(net, setup)
        yield setup, measured


def _await(net: Network, process: Process, program: Program) -> None:
    deadline = time.monotonic() + READY
    while True:
        if process.returncode is not None:
            raise Unfit(f"{process.name} ended at its start: {(process.errors or process.output).strip()[-300:]}")
        if program.device:
            ready = measure.has_device(process.pid, program.device)
        else:
            ready = measure.listens(process.pid, program.port, program.protocol)
        if ready and (not program.probe or _succeeds(net, Command(program.role, program.probe))):
            return
        if time.monotonic() > deadline:
            raise Unfit(f"{process.name} is not ready after {READY:g} s")
        time.sleep(_LOOK)


def _await_path(net: Network, setup: Setup) -> None:
    """Wait until an exchange with the origin succeeds by the way that will be measured: tunnels need a moment."""
    if not any(program.device for program in setup.programs):
        return
    arguments = [str(load.program()), *load.Load("exchange").arguments(setup.target, setup.socks, 0.01, 0.01)]
    deadline = time.monotonic() + READY
    while True:
        with Process(arguments, net["client"]) as process:
            try:
                process.wait_for('"end"', 1.0)
                if '"done":0,' not in process.output:
                    return
            except GostnetError:
                pass
        if time.monotonic() > deadline:
            raise Unfit(f"nothing passes after {READY:g} s")


def _measure(net: Network, generator: str, case: Case, setup: Setup, measured: list[Process], seconds: float) -> Sample:
    words = [generator, *case.load.arguments(setup.target, setup.socks, seconds, _WARM, setup.login)]
    pids = [process.pid for process in measured]
    if case.unit is Unit.MEMORY:
        sample = _idle(net, words, pids)
    else:
        sample = _loaded(net, words, case, pids, seconds)
    for process in measured:
        if process.returncode is not None:
            raise Unfit(f"{process.name} ended under {case.id}: {(process.errors or process.output).strip()[-300:]}")
    if measured and not setup.kernel_moves and case.unit is not Unit.MEMORY and not sample.cpu:
        raise Unfit(f"{measured[0].name} used no CPU under {case.id}: something else has been measured")
    return sample


def _loaded(net: Network, words: list[str], case: Case, pids: list[int], seconds: float) -> Sample:
    with Process(words, net["client"], name="load") as process:
        process.wait_for('"start"', 10.0)
        used, busy = measure.cpu(pids), measure.machine_cpu()
        line = process.wait_for('"end"', seconds + 20.0)
        used, busy = measure.cpu(pids) - used, measure.machine_cpu() - busy
    said = json.loads(line)
    moved = said["bytes"] if case.unit is Unit.BITS else said["done"]
    if not moved:
        raise Unfit(f"nothing passed under {case.id}")
    if case.unit is Unit.BITS:
        rate, each = moved * 8 / said["seconds"] / 1e9, GIB / moved
    else:
        rate, each = moved / said["seconds"], 1e6 / moved
    return Sample(
        rate=rate,
        cpu=used * each,
        machine=busy * each,
        p50=said["p50"],
        p99=said["p99"],
        failed=said["failed"],
        lost=said["lost"],
    )


def _idle(net: Network, words: list[str], pids: list[int]) -> Sample:
    before = measure.memory(pids)
    with Process(words, net["client"], name="load") as process:
        said = json.loads(process.wait_for('"end"', 60.0))
        time.sleep(0.5)  # what was allocated to open them is given back
        after = measure.memory(pids)
    return Sample(rate=(after - before) / max(1, said["held"]), failed=said["failed"])
