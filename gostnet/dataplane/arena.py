"""Places to read packets into: room for the largest there can be, memory for those there are."""

from __future__ import annotations

import mmap


def slots(count: int, size: int) -> list[memoryview]:
    """Return `count` writable places of `size` bytes; together they go back to the system with the last of them.

    A page that nothing has been written to takes no memory, unlike those of a bytearray, which are all zeroed at once.
    """
    stride = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = memoryview(mmap.mmap(-1, count * stride))
    return [whole[start : start + size] for start in range(0, count * stride, stride)]
