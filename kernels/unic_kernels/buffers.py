"""Large CPU buffers that are reused: a free list, like that of the CUDA caching allocator.

The operating system reclaims large blocks when they are freed and zeroes new pages at first touch,
one by one. For the activations that a ladder keeps, that costs more in every step than the pass
that fills them. Here a buffer returns to the free list once no tensor refers to it; the pool holds
at most twice the memory that was in use at one time.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

SMALL = 2**21
"""Bytes below which the ordinary allocator keeps its pages."""


class Pool:
    """Blocks of memory that were in use and are free, the longest free first."""

    def __init__(self) -> None:
        self.free: list[mmap.mmap] = []
        self.used = self.peak = 0

    def take(self, need: int) -> mmap.mmap:
        """Return the smallest free block that fits and is not twice too large, else a new one."""
        fitting = [block for block in self.free if need <= len(block) <= 2 * need]
        block = min(fitting, key=len, default=None)
        if block is None:
            block = mmap.mmap(-1, need)
        else:
            self.free.remove(block)
        self.used += len(block)
        self.peak = max(self.peak, self.used)
        while self.free and self.used + sum(map(len, self.free)) > 2 * self.peak:
            self.free.pop(0)
        return block

    def give_back(self, block: mmap.mmap) -> None:
        self.used -= len(block)
        self.free.append(block)


POOL = Pool()


def buffer(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor."""
    need = prod(shape) * dtype.itemsize
    if need < SMALL:
        return torch.empty(shape, dtype=dtype)
    block = POOL.take(need)
    lease = (ctypes.c_char * need).from_buffer(block)
    weakref.finalize(lease, POOL.give_back, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype).view(*shape)
