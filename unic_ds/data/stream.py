"""This rank's micro batches of a run, or one pass over samples for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from unic_ds.config import Data
from unic_ds.data import malloc, order
from unic_ds.data.prefetch import Batch, ExtrasReader, Prefetcher, Slots
from unic_ds.data.reader import Reader
from unic_ds.data.source import Source
from unic_ds.models.resolution import StepShape


class Views(NamedTuple):
    """The augmented views that a run shows: a new one every epoch, or `views` of them in turn."""

    seed: int
    views: int = 0  # 0: a new one every epoch
    extras: ExtrasReader | None = None  # reads cached features of a batch's samples and views

    def view_of(self, epoch_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """The view that each epoch shows."""
        return epoch_B % self.views if self.views else epoch_B


class Stream:
    """Endless iterator over this rank's micro batches of a run, from the step given to `seek`."""

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
        shape_of: Callable[[int], StepShape] | None = None,
    ):
        """`batch_size` images per optimiser step, of which a rank reads `micro` at a time.

        `sizes` are sides in pixels, the student's first (blur is in its pixels). `views` limits the
        augmented views of a sample. `shape_of` gives the shape of each step of the order, with as
        many sides and at most `micro` images; without it all have `sizes` and `micro`. ValueError
        if `batch_size` is no multiple of `micro * world`.
        """
        if not len(source):
            raise ValueError(f"no images to train on below {str(source.folder)!r}")
        if batch_size % (micro * world):
            raise ValueError(
                f"batch size {batch_size} is not a multiple of micro batch {micro} x {world} ranks"
            )
        self._reader, self._groups = Reader(source, cfg), source.groups(cfg.window)
        self._seed, self._device = seed, device
        self._sizes = sizes if shape_of else tuple(dict.fromkeys(sizes))
        self._batch_size, self._micro, self._rank, self._world = batch_size, micro, rank, world
        self._views = views or Views(seed)
        self._shape_of = shape_of or (lambda _: StepShape(self._sizes, micro))
        self._prefetcher: Prefetcher | None = None
        self._step = 0
        self._skipped: order.Spans = ()
        self._waited_s = 0.0
        self._since_epoch = 0  # images since freed memory was last returned to the system

    @property
    def waited_s(self) -> float:
        """Seconds that the iteration has waited for data since the last `seek`."""
        return self._waited_s + (self._prefetcher.waited_s if self._prefetcher else 0.0)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(name, reason) of the files that this rank could not read and replaced."""
        return self._reader.listed()

    def seek(self, step: int, skipped: order.Spans = ()) -> None:
        """Continue with the first micro batch after `step` optimiser steps.

        The `skipped` steps of the order are not read; those after them come earlier.
        """
        self.close()
        self._step, self._skipped, self._waited_s = step, skipped, 0.0

    def data_step(self, step: int) -> int:
        """The step of the order that optimiser step `step` (from 1) reads."""
        return order.data_step(step, self._skipped)

    def names(self, step: int, ranks: Iterable[int] = ()) -> dict[int, list[str]]:
        """Names of the samples of optimiser step `step` (from 1), by rank; all ranks by default."""
        names = self._reader.source.names
        return {
            rank: [names[int(i)] for slots in self._slots(step, rank) for i in slots.index_B]
            for rank in ranks or range(self._world)
        }

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(
                self._reader,
                self._plan(self._step),
                seed=self._views.seed,
                sizes=self._sizes,
                batch=self._micro,
                device=self._device,
                extras=self._views.extras,
            )
        batch = next(self._prefetcher)
        self._since_epoch += len(batch.index_B) * self._world
        if self._since_epoch >= order.per_epoch(self._groups):
            self._since_epoch = 0
            malloc.trim()
        return batch

    def close(self) -> None:
        """Stop reading ahead; iterating again starts at the step of the last `seek`."""
        if self._prefetcher is not None:
            self._waited_s += self._prefetcher.waited_s
            self._prefetcher.close()
            self._prefetcher = None

    def _plan(self, done: int) -> Iterator[Slots]:
        """Plan this rank's micro batches after `done` optimiser steps."""
        for step in count(done + 1):
            yield from self._slots(step, self._rank)

    def _slots(self, step: int, rank: int) -> Iterator[Slots]:
        """Plan a rank's micro batches of optimiser step `step` (from 1)."""
        data_step = self.data_step(step)
        before, shape = (data_step - 1) * self._batch_size, self._shape_of(data_step)
        for j in range(self._batch_size // (shape.micro * self._world)):
            position_B = order.positions(j, rank=rank, world=self._world, micro=shape.micro)
            first = before + int(position_B[0])
            index_B, epoch_B = order.batch(self._seed, self._groups, first, shape.micro)
            yield Slots(index_B, self._views.view_of(epoch_B), position_B, shape.sides)


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
    """The batches of each (view, range of samples) of the plan, augmented as in training."""
    cuts = [
        (view, [span[at : at + batch] for at in range(0, len(span), batch)]) for view, span in plan
    ]
    sides = tuple(dict.fromkeys(sizes))
    slots = (
        Slots(np.array(part), np.full(len(part), view), np.arange(len(part)), sides)
        for view, parts in cuts
        for part in parts
    )
    prefetcher = Prefetcher(
        Reader(source, cfg), slots, seed=seed, sizes=sides, batch=batch, device=device
    )
    try:
        for _, parts in cuts:
            yield [next(prefetcher) for _ in parts]
    finally:
        prefetcher.close()


def passes(
    source: Source,
    cfg: Data,
    *,
    sizes: tuple[int, ...],
    batch: int,
    indices: ArrayLike,
    device: torch.device,
    view: int | None = None,
    seed: int = 0,
) -> Iterator[Batch]:
    """One pass over the samples `indices`, in order, as central squares; no augmentation.

    With `view`: augmented as `cfg` says, as in that epoch of training. The last batch may be
    smaller.
    """
    index_N = np.asarray(indices, dtype=np.int64)
    at_N = np.arange(len(index_N), dtype=np.int64)
    sides = tuple(dict.fromkeys(sizes))
    plan = (
        Slots(
            index_N[at : at + batch],
            0 * at_N[at : at + batch] + (view or 0),
            at_N[at : at + batch],
            sides,
        )
        for at in range(0, len(index_N), batch)
    )
    reader = Reader(source, replace(cfg, augment="none") if view is None else cfg)
    prefetcher = Prefetcher(reader, plan, seed=seed, sizes=sides, batch=batch, device=device)
    try:
        yield from prefetcher
    finally:
        prefetcher.close()
