"""BPF without a compiler or libbpf: programs written down in Python, loaded and attached by bpf(2)."""

from __future__ import annotations

from .assembly import Assembly, At, Field, Helper, Register, Size, Test
from .objects import (
    Direction,
    Link,
    Map,
    MapKind,
    Program,
    Verdict,
    attached,
    attachment_problem,
    load,
    loading_problem,
)

__all__ = [
    "Assembly",
    "At",
    "Direction",
    "Field",
    "Helper",
    "Link",
    "Map",
    "MapKind",
    "Program",
    "Register",
    "Size",
    "Test",
    "Verdict",
    "attached",
    "attachment_problem",
    "load",
    "loading_problem",
]
