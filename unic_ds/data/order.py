"""Which sample comes when: a pure function of the seed, so a run's position is all it remembers.

A run reads epoch after epoch without a seam: sample g (from 0) of the run is place g % n of epoch
g // n. Optimiser step s (from 1) takes samples [(s-1) G, s G); within those G positions, micro
batch j of rank r takes [(j world + r) m, +m). So every epoch shows each sample once, whatever the
ranks, and no epoch has a ragged end.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from unic_ds import chance


@lru_cache(maxsize=2)  # this epoch and the next: a batch may straddle the two
def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of `n` samples in an epoch, read-only: a stable sort of chance words."""
    word_N = chance.words(seed, "order", 4, epoch, np.arange(-(-n // 4))).reshape(-1)[:n]
    index_N = np.argsort(word_N, kind="stable")
    index_N.setflags(write=False)
    return index_N


def batch(seed: int, n: int, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(index_B, epoch_B) of samples `first` .. `first + count - 1` of the run over `n` images."""
    g_B = np.arange(first, first + count, dtype=np.int64)
    epoch_B, place_B = np.divmod(g_B, n)
    index_B = np.empty_like(g_B)
    for epoch in range(first // n, (first + count - 1) // n + 1):
        here_B = epoch_B == epoch
        index_B[here_B] = permutation(seed, epoch, n)[place_B[here_B]]
    return index_B, epoch_B


def positions(micro_batch: int, *, rank: int, world: int, micro: int) -> NDArray[np.int64]:
    """Positions in the global batch of a rank's micro batch number `micro_batch` (from 0)."""
    return (micro_batch * world + rank) * micro + np.arange(micro, dtype=np.int64)
