"""Evaluates as many models at a time as there are ranks: each on one rank, on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unic_ds import dist
from unic_ds.process import console, entry_point

Evaluator = Callable[[Tensor, Tensor, Tensor, Tensor], Iterator[tuple[str, float]]]
"""Yields (name, value) from training features and labels, validation features and labels."""
Rows = dict[str, dict[str, float]]
"""Model -> evaluator's name -> value."""


class Side(NamedTuple):
    """Features and labels of an image set whose images are dealt to the ranks by `dealt`."""

    share_RC: Tensor
    """This rank's rows on the CPU: the models' columns side by side, equally many rows a rank."""
    label_N: Tensor
    """Labels of all images, on every rank; rows of a negative one are left out."""

    def gather(self, columns: slice, owner: int) -> tuple[Tensor, ...]:
        """One model's features (N, C) and their labels (N) on rank `owner`, () on the others."""
        share_WRC = dist.gather_to_rank(self.share_RC[:, columns], owner)
        if share_WRC is None:
            return ()
        labelled_N = self.label_N >= 0
        return in_order(share_WRC, len(self.label_N))[labelled_N], self.label_N[labelled_N]


def dealt(count: int) -> NDArray[np.int64]:
    """Places of this rank's images, of `count` that are dealt to the ranks in turn.

    Equally many on every rank: if they do not come out even, the last place is one of another rank.
    """
    return np.arange(dist.rank(), -(-count // dist.world()) * dist.world(), dist.world()) % count


def in_order(share_WR: Tensor, count: int) -> Tensor:
    """The rows of all ranks' shares in the order in which they were dealt."""
    return share_WR.transpose(0, 1).flatten(0, 1)[:count]


def evaluate(
    train: Side,
    val: Side,
    widths: dict[str, int],
    evaluators: Sequence[Evaluator],
    device: torch.device,
) -> Rows:
    """The values of each model, in the order of `widths`, on every rank; every rank calls it.

    A model's features are gathered on its own rank alone. RuntimeError on every rank if one fails.
    """
    ends = dict(zip(widths, accumulate(widths.values()), strict=True))
    columns = {name: slice(ends[name] - width, ends[name]) for name, width in widths.items()}
    # Widest first: the models of a round take about as long as each other.
    names, world = sorted(widths, key=lambda name: -widths[name]), dist.world()
    rounds = [names[at : at + world] for at in range(0, len(names), world)]
    found: Rows = {}
    for models in console.track(rounds, len(rounds), "fitting probes"):
        mine: tuple[Tensor, ...] = ()
        for owner, name in enumerate(models):
            mine += tuple(x for side in (train, val) for x in side.gather(columns[name], owner))
        own = attempt(models[dist.rank()], mine, evaluators, device) if mine else ({}, "")
        for rows, failure in dist.all_gather_objects(own):
            if failure:
                raise RuntimeError(failure)
            found |= rows
    return {name: found[name] for name in widths}


def attempt(
    model: str, rows: tuple[Tensor, ...], evaluators: Sequence[Evaluator], device: torch.device
) -> tuple[Rows, str]:
    """The values of a model and "", or no values and the sentence that says why."""
    try:
        return {model: scores(model, rows, evaluators, device)}, ""
    except torch.OutOfMemoryError:
        count, width = rows[0].shape
        return {}, (
            f"the probes of {model!r} need more than the GPU's memory for {count:,} training images"
            f" x {width} features; lower --eval.max_train"
        )
    except (OSError, RuntimeError, ValueError) as error:
        if not entry_point.is_expected(error):
            raise
        return {}, str(error)


def scores(
    model: str, rows: tuple[Tensor, ...], evaluators: Sequence[Evaluator], device: torch.device
) -> dict[str, float]:
    """What the evaluators yield for a model; ValueError if its features are not all finite."""
    train_NC, train_label_N, val_NC, val_label_N = (x.to(device) for x in rows)
    if not (train_NC.isfinite().all() and val_NC.isfinite().all()):
        raise ValueError(f"features of {model!r} are NaN or infinite; set --eval.on false")
    values: dict[str, float] = {}
    for evaluator in evaluators:
        values |= evaluator(train_NC, train_label_N, val_NC, val_label_N)
    return values
