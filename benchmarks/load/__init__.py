"""The load generator: compiled when first needed, run in a namespace, its result parsed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("load.c")
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra")


class NoCompiler(Exception):
    """The generator cannot be built here."""


def program() -> Path:
    """Return the path of the compiled generator, in the user's cache. Raise NoCompiler."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gostnet-benchmarks"
    path = cache / f"load-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    if path.exists():
        return path
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    if not compiler:
        raise NoCompiler("the load generator is written in C and no compiler is here: apt-get install gcc libc6-dev")
    cache.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    built = subprocess.run(
        [*compiler.split(), *FLAGS, "-o", str(fresh), str(SOURCE)], capture_output=True, text=True, check=False
    )
    if built.returncode:
        raise NoCompiler(f"{compiler} does not build the load generator: {built.stderr.strip()}")
    fresh.replace(path)
    return path


@dataclass(frozen=True, slots=True)
class Load:
    """What the client does: a mode of load.c and its options."""

    mode: str
    streams: int = 1
    size: int = 100
    window: int = 32

    def arguments(self, target: str, socks: str, seconds: float, warm: float, login: str = "") -> list[str]:
        """Return the program's arguments for a run against `target`, through a SOCKS5 proxy if given.

        `login` is the proxy's USER:PASSWORD, "" where it asks for none.
        """
        options = {"streams": self.streams, "size": self.size, "window": self.window, "seconds": seconds, "warm": warm}
        words = [self.mode, target, *(f"{name}={value}" for name, value in options.items())]
        if socks:
            words.append(f"socks={socks}")
        if login:
            words.append(f"login={login}")
        return words
