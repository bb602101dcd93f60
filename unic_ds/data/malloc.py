"""What decoding has freed goes back to the system.

Images of all sizes, decoded by many threads, leave glibc's heaps full of holes that it keeps: a
rank's resident memory grew by a fifth over its first epochs. Few heaps, given back once per epoch,
hold it flat for some 10 ms; a fixed M_MMAP_THRESHOLD would too, but training on a CPU then loses a
quarter of its speed to page faults.
"""

from __future__ import annotations

import ctypes
from functools import cache

HEAPS = 2
M_ARENA_MAX = -8  # malloc.h


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def limit_arenas() -> None:
    """Have threads share heaps from now on; nothing where the C library is not glibc."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().mallopt(M_ARENA_MAX, HEAPS)


def trim() -> None:
    """Return freed memory to the system; nothing where the C library is not glibc."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)
