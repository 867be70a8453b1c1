"""Commands of a service: preUp, postUp, preDown, postDown. Rows S01-S03."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence

from ..core.log import Logger
from ..core.tasks import in_thread

TIMEOUT = 60.0
"""Seconds for one command; GOST would wait for ever."""


async def run_hooks(stage: str, commands: Sequence[str], log: Logger) -> None:
    """Run commands one after the other, without a shell; their output goes where ours goes. A failure is a warning."""
    for command in commands:
        problem = await in_thread(_run, command)
        if problem:
            log.warn(f"[{stage}] {command}: {problem}")


def _run(command: str) -> str:
    """Run one command and return what went wrong, "" if nothing did."""
    try:
        words = shlex.split(command)
    except ValueError as exc:
        return str(exc).lower()
    if not words:
        return ""
    try:
        status = subprocess.run(words, stdin=subprocess.DEVNULL, timeout=TIMEOUT, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"not finished within {TIMEOUT:g}s"
    except OSError as exc:
        return (exc.strerror or str(exc)).lower()
    return f"exit status {status}" if status else ""
