"""The order of samples: a pure function of the seed, so a run's position is its step number.

A run reads epoch after epoch without a seam: slot g (from 0) of the run is place g % n of epoch
g // n. Optimiser step s (from 1) takes slots [(s-1) G, s G) for a global batch of G images; within
it, micro batch j of rank r takes positions [(j world + r) m, +m). So every epoch shows each sample
once on any number of ranks, and no epoch has a partial batch. Skipped steps are left out: see
`data_step`.

Samples in shards are shuffled on two levels: the shards, then the samples of a window of several
shards at a time, so that samples read at about the same time lie in few files. In a mixture the
slots of an epoch are distributed to its sources at random, and each source has passes of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unic_ds import rng


class SampleGroup(NamedTuple):
    """Samples that are shuffled together: those of one source."""

    samples: int
    shards: tuple[int, ...] = ()  # samples of each shard in turn; empty: no shards
    window: int = 0  # shards whose samples mix
    weight: float = 1.0  # times an epoch shows each sample

    @property
    def per_epoch(self) -> int:
        """Slots of an epoch that this group fills."""
        return max(1, round(self.weight * self.samples))


SampleGroups = tuple[SampleGroup, ...]


def per_epoch(groups: SampleGroups) -> int:
    """Slots of an epoch."""
    return sum(group.per_epoch for group in groups)


def random_words(seed: int, name: str, epoch: int, n: int) -> NDArray[np.uint32]:
    """Random sort keys of `n` items: sorting the items by them shuffles them."""
    return rng.random_bits(seed, name, 4, epoch, np.arange(-(-n // 4))).reshape(-1)[:n]


@lru_cache(maxsize=2)
def shuffled(seed: int, name: str, epoch: int, group: SampleGroup) -> NDArray[np.int32]:
    """The order of a group's samples in one of its passes, read-only."""
    key_N = random_words(seed, name, epoch, group.samples)
    if group.shards:
        key_S = random_words(seed, f"{name}/shards", epoch, len(group.shards))
        window_S = np.empty(len(key_S), dtype=np.uint64)
        window_S[np.argsort(key_S, kind="stable")] = np.arange(len(key_S)) // group.window
        key_N = np.repeat(window_S << np.uint64(32), group.shards) | key_N
    index_N = np.argsort(key_N, kind="stable").astype(np.int32)
    index_N.setflags(write=False)
    return index_N


@lru_cache(maxsize=2)  # this epoch and the next: a batch may contain samples of both
def epoch_order(
    seed: int, epoch: int, groups: SampleGroups
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(sample, pass) of each slot of an epoch; samples are numbered group after group."""
    if len(groups) == 1 and groups[0].weight == 1:
        index_N = shuffled(seed, "order", epoch, groups[0])
        return index_N, np.broadcast_to(np.int32(epoch), index_N.shape)
    n = per_epoch(groups)
    shuffle_N = np.argsort(random_words(seed, "order/mix", epoch, n), kind="stable")
    group_N = np.repeat(np.arange(len(groups)), [group.per_epoch for group in groups])[shuffle_N]
    index_N, pass_N = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.int32)
    first = 0
    for i, group in enumerate(groups):
        slot_M = np.flatnonzero(group_N == i)
        slots = np.arange(group.per_epoch)
        pass_M, place_M = np.divmod(epoch * group.per_epoch + slots, group.samples)
        for number in range(int(pass_M[0]), int(pass_M[-1]) + 1):
            in_pass_M = pass_M == number
            order_K = shuffled(seed, f"order/{i}", number, group)
            index_N[slot_M[in_pass_M]] = first + order_K[place_M[in_pass_M]]
        pass_N[slot_M] = pass_M
        first += group.samples
    return index_N, pass_N


def batch(
    seed: int, groups: SampleGroups, first: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(index_B, pass_B) of slots `first` .. `first + count - 1` of the run.

    `pass_B` is the number of times that a sample was shown before; without weights, the epoch.
    """
    n = per_epoch(groups)
    slot_B = np.arange(first, first + count, dtype=np.int64)
    epoch_B, place_B = np.divmod(slot_B, n)
    index_B, pass_B = np.empty_like(slot_B), np.empty_like(slot_B)
    for epoch in range(first // n, (first + count - 1) // n + 1):
        in_epoch_B = epoch_B == epoch
        index_N, pass_N = epoch_order(seed, epoch, groups)
        index_B[in_epoch_B] = index_N[place_B[in_epoch_B]]
        pass_B[in_epoch_B] = pass_N[place_B[in_epoch_B]]
    return index_B, pass_B


Spans = tuple[tuple[int, int], ...]
"""(first, last) step of each span, ascending, with a gap between any two."""


def joined(spans: Iterable[tuple[int, int]]) -> Spans:
    """The union of spans; those that overlap or touch become one."""
    apart: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if apart and first <= apart[-1][1] + 1:
            apart[-1] = apart[-1][0], max(apart[-1][1], last)
        else:
            apart.append((first, last))
    return tuple(apart)


def data_step(step: int, skipped: Spans) -> int:
    """The step of the order that optimiser step `step` reads, both counted from 1.

    It is the `step`-th of those that are not in a skipped span.
    """
    for first, last in skipped:
        if step < first:
            break
        step += last - first + 1
    return step


def positions(micro_batch: int, *, rank: int, world: int, micro: int) -> NDArray[np.int64]:
    """Positions in the global batch of a rank's micro batch number `micro_batch` (from 0)."""
    return (micro_batch * world + rank) * micro + np.arange(micro, dtype=np.int64)
