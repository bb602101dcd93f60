"""Which sample comes when: a pure function of the seed, so a run's position is all it remembers.

A run reads epoch after epoch without a seam: slot g (from 0) of the run is place g % n of epoch
g // n. Optimiser step s (from 1) takes slots [(s-1) G, s G); within those G positions, micro batch
j of rank r takes [(j world + r) m, +m). So every epoch shows each sample once, whatever the ranks,
and no epoch has a ragged end. Steps whose data is left out are passed over: see `data_step`.

Samples in shards are shuffled on two levels: the shards, then the samples of a window of several
shards at a time, so that what is read soon lies in few files. In a mixture the slots of an epoch
are dealt to its sources by chance, and each source goes on through passes of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unic_ds import rng


class Run(NamedTuple):
    """Samples that are shuffled together: a whole source."""

    samples: int
    shards: tuple[int, ...] = ()  # samples of each shard in turn; none: no shards
    window: int = 0  # shards whose samples mix
    weight: float = 1.0  # times an epoch shows it

    @property
    def per_epoch(self) -> int:
        """Slots of an epoch that are its own."""
        return max(1, round(self.weight * self.samples))


Runs = tuple[Run, ...]


def per_epoch(runs: Runs) -> int:
    """Slots of an epoch."""
    return sum(run.per_epoch for run in runs)


def words(seed: int, name: str, epoch: int, n: int) -> NDArray[np.uint32]:
    """A chance word for each of `n` things: sorted by it they are shuffled."""
    return rng.random_bits(seed, name, 4, epoch, np.arange(-(-n // 4))).reshape(-1)[:n]


@lru_cache(maxsize=2)
def shuffled(seed: int, name: str, epoch: int, run: Run) -> NDArray[np.int32]:
    """The order of a source's samples in one of its passes, read-only."""
    word_N = words(seed, name, epoch, run.samples)
    if run.shards:
        word_S = words(seed, f"{name}/shards", epoch, len(run.shards))
        window_S = np.empty(len(word_S), dtype=np.uint64)
        window_S[np.argsort(word_S, kind="stable")] = np.arange(len(word_S)) // run.window
        word_N = np.repeat(window_S << np.uint64(32), run.shards) | word_N
    index_N = np.argsort(word_N, kind="stable").astype(np.int32)
    index_N.setflags(write=False)
    return index_N


@lru_cache(maxsize=2)  # this epoch and the next: a batch may straddle the two
def epoch_of(seed: int, epoch: int, runs: Runs) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(sample, pass) of each slot of an epoch; samples of all sources are numbered through."""
    if len(runs) == 1 and runs[0].weight == 1:
        index_N = shuffled(seed, "order", epoch, runs[0])
        return index_N, np.broadcast_to(np.int32(epoch), index_N.shape)
    n = per_epoch(runs)
    dealt_N = np.argsort(words(seed, "order/mix", epoch, n), kind="stable")
    source_N = np.repeat(np.arange(len(runs)), [run.per_epoch for run in runs])[dealt_N]
    index_N, pass_N = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.int32)
    first = 0
    for i, run in enumerate(runs):
        slot_M = np.flatnonzero(source_N == i)
        pass_M, place_M = np.divmod(epoch * run.per_epoch + np.arange(run.per_epoch), run.samples)
        for turn in range(int(pass_M[0]), int(pass_M[-1]) + 1):
            here_M = pass_M == turn
            own_N = shuffled(seed, f"order/{i}", turn, run)
            index_N[slot_M[here_M]] = first + own_N[place_M[here_M]]
        pass_N[slot_M] = pass_M
        first += run.samples
    return index_N, pass_N


def batch(
    seed: int, runs: Runs, first: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(index_B, pass_B) of slots `first` .. `first + count - 1` of the run.

    `pass_B` says how often a sample was shown before; without weights it is the epoch.
    """
    n = per_epoch(runs)
    at_B = np.arange(first, first + count, dtype=np.int64)
    epoch_B, place_B = np.divmod(at_B, n)
    index_B, pass_B = np.empty_like(at_B), np.empty_like(at_B)
    for epoch in range(first // n, (first + count - 1) // n + 1):
        here_B = epoch_B == epoch
        index_N, pass_N = epoch_of(seed, epoch, runs)
        index_B[here_B], pass_B[here_B] = index_N[place_B[here_B]], pass_N[place_B[here_B]]
    return index_B, pass_B


Spans = tuple[tuple[int, int], ...]
"""First and last of the steps that each span holds, ascending and apart."""


def joined(spans: Iterable[tuple[int, int]]) -> Spans:
    """The spans of all steps that are in any."""
    apart: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if apart and first <= apart[-1][1] + 1:
            apart[-1] = apart[-1][0], max(apart[-1][1], last)
        else:
            apart.append((first, last))
    return tuple(apart)


def data_step(step: int, left_out: Spans) -> int:
    """The step of the run's order that optimiser step `step` reads, both from 1.

    It is the `step`-th of those that are not left out.
    """
    for first, last in left_out:
        if step < first:
            break
        step += last - first + 1
    return step


def positions(micro_batch: int, *, rank: int, world: int, micro: int) -> NDArray[np.int64]:
    """Positions in the global batch of a rank's micro batch number `micro_batch` (from 0)."""
    return (micro_batch * world + rank) * micro + np.arange(micro, dtype=np.int64)
