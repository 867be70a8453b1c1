"""The command line: verbs, exit codes, and what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from . import __version__
from .config.argv import HELP, Invocation, UsageError, parse_args, version_line
from .config.dump import dump
from .config.load import Loader

OK, FAILED, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        invocation = parse_args(arguments)
    except UsageError as exc:
        print(f"gostnet: {exc}\n\n{HELP}", file=sys.stderr)
        return USAGE
    if invocation.workers:
        return _run_workers(invocation.workers)
    if invocation.help:
        print(HELP, end="")
        return OK
    if invocation.version:
        print(version_line(__version__))
        return OK
    try:
        return _VERBS[invocation.verb](invocation)
    except BrokenPipeError:
        # Whoever read our output has gone: nothing is left to say, and Python must not try to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _run(invocation: Invocation) -> int:
    if invocation.output:
        return _print_config(invocation)
    from .app.daemon import run_daemon

    return run_daemon(invocation)


def _print_config(invocation: Invocation) -> int:
    loaded = Loader(invocation).load()
    if loaded.broken:
        for finding in loaded.findings:
            print(finding, file=sys.stderr)
        return FAILED
    sys.stdout.write(dump(loaded.config, "json" if invocation.output == "json" else "yaml"))
    return OK


def _check(invocation: Invocation) -> int:
    from .app.checking import check_loaded

    loaded = Loader(invocation).load()
    findings = check_loaded(loaded, strict=True, lenient=invocation.lenient, building=True)
    errors = sum(1 for finding in findings if finding.severity == "error")
    warnings = len(findings) - errors
    if invocation.json:
        data = {"errors": errors, "warnings": warnings, "findings": [finding.as_data() for finding in findings]}
        print(json.dumps(data, ensure_ascii=False, indent=2))
    else:
        for finding in findings:
            print(finding)
        print(f"{errors} errors, {warnings} warnings")
    return FAILED if errors else OK


def _plan(invocation: Invocation) -> int:
    from .app.kernel import plan

    return plan(invocation)


def _rollback(invocation: Invocation) -> int:
    from .app.kernel import rollback

    return rollback(invocation)


def _doctor(invocation: Invocation) -> int:
    from .app.doctor import doctor

    return doctor(invocation)


def _lab(invocation: Invocation) -> int:
    from .lab import run_lab

    return run_lab(invocation.words)


_VERBS = {"run": _run, "check": _check, "plan": _plan, "rollback": _rollback, "doctor": _doctor, "lab": _lab}


def _run_workers(workers: Sequence[Sequence[str]]) -> int:
    """Run each part of the command line as a process of its own; the last failing status is ours.

    A signal that ends us ends them: GOST leaves its children running.
    """
    children: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    for index, words in enumerate(workers):
        environment = {**os.environ, "_GOST_ID": str(index)}
        children.append(subprocess.Popen([sys.executable, "-m", "gostnet", *words], env=environment))
    status = OK
    for child in children:
        status = child.wait() or status
    return status if status >= 0 else FAILED
