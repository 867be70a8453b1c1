"""Compile the C sources into the shared library beside them: `python gostnet/dataplane/native/build.py`.

Run when the package is built or installed, without gostnet being importable: it uses the standard library only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("relay.c", "datagrams.c", "tun.c"))
LIBRARY = Path(__file__).with_name("_relay.so")
FLAGS = ("-std=c11", "-O2", "-g0", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")


def compile_relay(library: Path = LIBRARY, flags: tuple[str, ...] = FLAGS) -> str:
    """Compile the library; return "" or why there is none. `CC` names the compiler."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    if not compiler:
        return "no C compiler"
    fresh = library.with_name(f"{library.name}.{os.getpid()}")
    command = [*compiler.split(), *flags, "-o", str(fresh), *map(str, SOURCES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{' '.join(command)}: {done.stderr.strip()[-2000:]}"
        fresh.replace(library)  # whoever has the old one loaded keeps it
    except OSError as exc:
        return f"{compiler}: {exc}"
    finally:
        fresh.unlink(missing_ok=True)
    return ""


if __name__ == "__main__":
    sys.exit(compile_relay() or 0)
