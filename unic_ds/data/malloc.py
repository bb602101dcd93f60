"""Return memory that decoding has freed to the system (glibc).

Images of all sizes, decoded by many threads, leave holes in glibc's arenas, which it keeps: a
rank's resident memory grew by a fifth over its first epochs. With few arenas, trimmed once per
epoch (some 10 ms), it stays flat; a fixed M_MMAP_THRESHOLD would too, but page faults then take a
quarter of the speed of training on a CPU.
"""

from __future__ import annotations

import ctypes
from functools import cache

ARENAS = 2
M_ARENA_MAX = -8  # malloc.h


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def limit_arenas() -> None:
    """Make threads share arenas from now on; does nothing if the C library is not glibc."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().mallopt(M_ARENA_MAX, ARENAS)


def trim() -> None:
    """Return freed memory to the system; does nothing if the C library is not glibc."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)
