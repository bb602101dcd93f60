"""This rank's share of a run as batches on the device, or one pass over samples for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from unic_ds.config import Data
from unic_ds.data import malloc, order
from unic_ds.data.prefetch import Batch, Beside, Prefetcher, Slots
from unic_ds.data.reader import Reader
from unic_ds.data.source import Source


class Views(NamedTuple):
    """Which draws a run shows: those of `seed`, of every epoch or of the first `views` in turn."""

    seed: int
    views: int = 0  # 0: a new one in every epoch
    beside: Beside | None = None  # reads what is kept of a batch's samples and views

    def of(self, epoch_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """The view of each epoch."""
        return epoch_B % self.views if self.views else epoch_B


class Stream:
    """This rank's micro batches of a run, without end, from wherever `seek` says."""

    def __init__(
        self,
        source: Source,
        cfg: Data,
        *,
        seed: int,
        sizes: tuple[int, ...],
        batch_size: int,
        micro: int,
        rank: int,
        world: int,
        device: torch.device,
        views: Views | None = None,
    ):
        """`batch_size` images per optimiser step, of which a rank reads `micro` at a time.

        `views` are there where only some draws of each sample may be shown. `sizes` are sides
        in pixels, the student's first (blur is in its pixels). ValueError where the batch does not
        divide.
        """
        if not len(source):
            raise ValueError(f"no images to train on below {str(source.folder)!r}")
        if batch_size % (micro * world):
            raise ValueError(
                f"batch size {batch_size} is not a multiple of micro batch {micro} x {world} ranks"
            )
        self._reader, self._runs = Reader(source, cfg), source.runs(cfg.window)
        self._seed, self._sizes, self._device = seed, tuple(dict.fromkeys(sizes)), device
        self._batch_size, self._micro, self._rank, self._world = batch_size, micro, rank, world
        self._views = views or Views(seed)
        self._feed: Prefetcher | None = None
        self._step = 0
        self._left_out: order.Spans = ()
        self._waited_s = 0.0
        self._since_epoch = 0  # images since freed memory was given back

    @property
    def waited_s(self) -> float:
        """Seconds that iterating has waited for data since the last `seek`."""
        return self._waited_s + (self._feed.waited_s if self._feed else 0.0)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(name, reason) of the files this rank could not read and replaced."""
        return self._reader.listed()

    def seek(self, step: int, left_out: order.Spans = ()) -> None:
        """Go on with the first micro batch after `step` optimiser steps.

        The steps of the order that are `left_out` are not read, and those after them come earlier.
        """
        self.close()
        self._step, self._left_out, self._waited_s = step, left_out, 0.0

    def data_step(self, step: int) -> int:
        """The step of the order that optimiser step `step` (from 1) reads."""
        return order.data_step(step, self._left_out)

    def names(self, step: int, ranks: Iterable[int] = ()) -> dict[int, list[str]]:
        """The samples that those ranks, or all, see in optimiser step `step` (from 1)."""
        names = self._reader.source.names
        return {
            rank: [names[int(i)] for slots in self._slots(step, rank) for i in slots.index_B]
            for rank in ranks or range(self._world)
        }

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        if self._feed is None:
            self._feed = Prefetcher(
                self._reader,
                self._plan(self._step),
                seed=self._views.seed,
                sizes=self._sizes,
                batch=self._micro,
                device=self._device,
                beside=self._views.beside,
            )
        batch = next(self._feed)
        self._since_epoch += self._micro * self._world
        if self._since_epoch >= order.per_epoch(self._runs):
            self._since_epoch = 0
            malloc.trim()
        return batch

    def close(self) -> None:
        """Stop reading ahead; iterating again starts where `seek` last said."""
        if self._feed is not None:
            self._waited_s += self._feed.waited_s
            self._feed.close()
            self._feed = None

    def _plan(self, done: int) -> Iterator[Slots]:
        """Slots of this rank's micro batches after `done` optimiser steps."""
        for step in count(done + 1):
            yield from self._slots(step, self._rank)

    def _slots(self, step: int, rank: int) -> Iterator[Slots]:
        """Slots of a rank's micro batches in optimiser step `step` (from 1)."""
        before = (self.data_step(step) - 1) * self._batch_size
        for j in range(self._batch_size // (self._micro * self._world)):
            position_B = order.positions(j, rank=rank, world=self._world, micro=self._micro)
            first = before + int(position_B[0])
            index_B, epoch_B = order.batch(self._seed, self._runs, first, self._micro)
            yield Slots(index_B, self._views.of(epoch_B), position_B)


def drawn(
    source: Source,
    cfg: Data,
    *,
    seed: int,
    sizes: tuple[int, ...],
    batch: int,
    plan: Iterable[tuple[int, range]],
    device: torch.device,
) -> Iterator[list[Batch]]:
    """The batches of each (view, neighbouring samples) of the plan, augmented as in training."""
    cuts = [
        (view, [span[at : at + batch] for at in range(0, len(span), batch)]) for view, span in plan
    ]
    slots = (
        Slots(np.array(part), np.full(len(part), view), np.arange(len(part)))
        for view, parts in cuts
        for part in parts
    )
    sides = tuple(dict.fromkeys(sizes))
    feed = Prefetcher(
        Reader(source, cfg), slots, seed=seed, sizes=sides, batch=batch, device=device
    )
    try:
        for _, parts in cuts:
            yield [next(feed) for _ in parts]
    finally:
        feed.close()


def passes(
    source: Source,
    cfg: Data,
    *,
    sizes: tuple[int, ...],
    batch: int,
    indices: ArrayLike,
    device: torch.device,
) -> Iterator[Batch]:
    """The samples `indices` once, in order, as central squares; the last batch may be smaller."""
    index_N = np.asarray(indices, dtype=np.int64)
    at_N = np.arange(len(index_N), dtype=np.int64)
    plan = (
        Slots(index_N[at : at + batch], 0 * at_N[at : at + batch], at_N[at : at + batch])
        for at in range(0, len(index_N), batch)
    )
    reader = Reader(source, replace(cfg, augment="none"))
    feed = Prefetcher(
        reader, plan, seed=0, sizes=tuple(dict.fromkeys(sizes)), batch=batch, device=device
    )
    try:
        yield from feed
    finally:
        feed.close()
