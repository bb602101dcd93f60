"""A fitted linear probe, and the rows that it is fitted to and tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist, rng
from unic_ds.evaluate.features import FeatureSet
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

HELD_OUT = 0.2
REMEDY = "lower --eval.max_train"
ROWS = 4096
"""Rows whose logits are computed at once."""

Preparation = Callable[[Tensor], Tensor]
"""Features (R, C) -> what the regression sees, (R, C + 1), whose last column is 1."""


class Split(NamedTuple):
    """A model's prepared features of this rank's rows, and their classes."""

    x_RD: Tensor
    """fp32 (R, C + 1); the last column is 1."""
    class_R: Tensor
    """Place of the row's label among the training labels, -1 if it is none of them."""


def raw(x_RC: Tensor) -> Tensor:
    """Features as they are, and a column of ones."""
    return F.pad(x_RC, (0, 1), value=1.0)


def unit_length(x_RC: Tensor) -> Tensor:
    """Features of length 1, and a column of ones."""
    return F.pad(F.normalize(x_RC), (0, 1), value=1.0)


@dataclass(frozen=True)
class FirstColumns:
    """The first columns of the features as they are, and a column of ones."""

    columns: int

    def __call__(self, x_RC: Tensor) -> Tensor:
        return raw(x_RC[:, : self.columns])


@dataclass(frozen=True)
class Standardise:
    """Scale channels to mean 0 and deviation 1; a channel of deviation infinity becomes 0."""

    mean_C: Tensor
    std_C: Tensor

    def __call__(self, x_RC: Tensor) -> Tensor:
        return F.pad((x_RC - self.mean_C) / self.std_C, (0, 1), value=1.0)

    @classmethod
    def to(cls, x_RC: Tensor) -> Standardise:
        """Moments of all ranks' rows.

        A channel that fp32 cannot tell from a constant gets a deviation of infinity.
        """
        with raised_on_all_ranks("the linear probe", REMEDY):
            sum_C = x_RC.sum(0, dtype=torch.float64)
            count = sum_C.new_tensor([len(x_RC)])
        sum_C, count = dist.all_reduce_sum(torch.cat([sum_C, count])).split([len(sum_C), 1])
        mean_C = sum_C / count
        with raised_on_all_ranks("the linear probe", REMEDY):
            square_C = torch.zeros_like(mean_C)
            for part_RC in x_RC.split(ROWS):
                square_C += (part_RC - mean_C).square().sum(0)
        std_C = (dist.all_reduce_sum(square_C) / count).sqrt()
        std_C[std_C <= torch.finfo(torch.float32).eps * mean_C.abs()] = torch.inf
        return cls(mean_C.float(), std_C.float())


@dataclass(frozen=True)
class Probe:
    """A fitted softmax regression on one model's features, the same on every rank."""

    weight_DL: Tensor
    """fp32 (C + 1, L) on the device of the evaluation; the last row are the biases."""
    classes: Tensor
    """Labels of the L classes, ascending, on the CPU."""
    prepare: Preparation
    rule: str
    """The way in which it was fitted, the start of a protocol."""

    @torch.inference_mode()
    def logits(self, feature_RC: Tensor) -> Tensor:
        """Logits (R, L), fp32 on the device of the evaluation, of features on any device."""
        parts = feature_RC.split(ROWS)
        to = self.weight_DL.device
        return torch.cat([self.prepare(part.to(to)) @ self.weight_DL for part in parts])


class Accuracy(NamedTuple):
    """Accuracies in % on all ranks' rows."""

    top1: float
    per_class: float
    """Unweighted mean over the classes of the tested rows."""


def accuracy(probe: Probe, tested: FeatureSet, model: str) -> Accuracy:
    """Accuracies of a probe on labelled rows; every rank calls it.

    A row of a class that the probe does not know counts as wrong.
    """
    label_M = tested.label_N.unique()
    with raised_on_all_ranks(f"the linear probe of {model!r}", REMEDY):
        found_R = torch.empty(0, dtype=torch.int64)
        if len(tested.label_R):
            found_R = probe.classes[probe.logits(tested.cls[model]).argmax(1).cpu()]
        class_R = torch.searchsorted(label_M, tested.label_R)
        hits_M = torch.bincount(class_R[found_R == tested.label_R], minlength=len(label_M))
    # Every row of `label_N` is on one rank: it needs no sum.
    count_M = torch.bincount(torch.searchsorted(label_M, tested.label_N), minlength=len(label_M))
    hits_M = dist.all_reduce_sum(hits_M)
    return Accuracy(
        100 * float(hits_M.sum()) / len(tested.label_N),
        100 * float((hits_M.double() / count_M).mean()),
    )


def labels_of(train: FeatureSet) -> Tensor:
    """Labels of the training rows, ascending; ValueError if they are of one class."""
    label_L = train.label_N.unique()
    if len(label_L) < 2:
        raise ValueError(
            "a linear probe wants training images of at least two classes; set --eval.on false"
        )
    return label_L


def classes_of(label_R: Tensor, label_L: Tensor) -> Tensor:
    """Places of labels in the ascending `label_L`, -1 for one that is not there."""
    class_R = torch.searchsorted(label_L, label_R).clamp(max=len(label_L) - 1)
    return class_R.where(label_L[class_R] == label_R, -1)


def hold_out(label_N: NDArray[np.integer], seed: int, *, floor: bool = False) -> NDArray[np.bool_]:
    """Mask of a seeded fifth of each class; one row of every class always stays.

    A fifth is rounded; with `floor` it is rounded down, and at least one row.
    """
    order_N = np.argsort(rng.uniform(seed, "linear", 1, np.arange(len(label_N)))[:, 0])
    held_N = np.zeros(len(label_N), dtype=bool)
    order_N = order_N[np.argsort(label_N[order_N], kind="stable")]  # class by class
    _, starts, counts = np.unique(label_N[order_N], return_index=True, return_counts=True)
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        fifth = max(1, int(HELD_OUT * count)) if floor else round(HELD_OUT * count)
        held_N[order_N[start : start + min(fifth, count - 1)]] = True
    return held_N


def held_of_each_class(train: FeatureSet, seed: int) -> Tensor:
    """Mask (N) of a seeded fifth of each class, at least one row; ValueError if it is empty."""
    held_N = torch.from_numpy(hold_out(train.label_N.numpy(), seed, floor=True))
    if not held_N.any():
        raise ValueError(
            "this linear probe wants two training images of a class or more, to hold one out; take"
            " --eval.protocol quick"
        )
    return held_N
