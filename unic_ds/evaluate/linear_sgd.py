"""UNIC's linear probe of large sets: SGD on features of unit length (arXiv 2408.05088, app. B).

Many pairs of rate and weight decay are trained at once on four fifths of the training rows, then
the best on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unic_ds.evaluate.features import FeatureSet
from unic_ds.evaluate.heads import Heads, Schedule, log_uniform
from unic_ds.evaluate.probe import (
    HELD_OUT,
    REMEDY,
    Probe,
    Split,
    classes_of,
    held_of_each_class,
    labels_of,
    unit_length,
)
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

EPOCHS, BATCH, PAIRS = 100, 1024, 40
RATES, DECAYS = (0.1, 100.0), (1e-12, 1e-4)
"""Bounds of the rates and weight decays, drawn log-uniformly."""
LOGITS = 2**28
"""Logits that are held at once, 1 GB: more pairs than fit are trained one group after another."""


def fit_sgd(
    train: FeatureSet,
    *,
    seed: int,
    device: torch.device,
    epochs: int = EPOCHS,
    pairs: int = PAIRS,
) -> dict[str, Probe]:
    """Model -> probe; every rank calls it with the same models, and rows that have labels.

    ValueError if the training rows are of one class or without one to hold out, or if no pair has a
    finite loss.
    """
    label_L = labels_of(train)
    held_N = held_of_each_class(train, seed)
    class_R = classes_of(train.label_R, label_L)
    rate_P, decay_P = (
        log_uniform(*bounds, count=pairs, seed=seed, name=f"linear {of}", device=device)
        for of, bounds in (("rate", RATES), ("decay", DECAYS))
    )
    rule = (
        f"SGD {epochs} epochs, batch {BATCH}, {pairs} log-uniform pairs of rate in"
        f" [{RATES[0]:g}, {RATES[1]:g}] and decay in [{DECAYS[0]:g}, {DECAYS[1]:g}] on"
        f" {HELD_OUT:.0%} held out, unit length"
    )
    found = {}
    for name, x_RC in train.cls.items():
        with raised_on_all_ranks(f"the linear probe of {name!r}", REMEDY):
            split = Split(unit_length(x_RC.to(device)), class_R.to(device))
        whole = Trial(split, train.place_R, Schedule(epochs, BATCH, len(held_N)), len(label_L))
        points = whole.tried(held_N, rate_P, decay_P, seed=seed)
        if max(points) < 0:
            raise ValueError(f"no linear probe of {name!r} has a finite loss")
        best = slice(points.index(max(points)), points.index(max(points)) + 1)
        heads = whole.heads(rate_P[best], decay_P[best], seed=seed)
        found[name] = Probe(heads.weight_PLD[0].T, label_L, unit_length, rule)
    return found


@dataclass(frozen=True)
class Trial:
    """Rows that heads are trained on."""

    split: Split
    place_R: Tensor
    """Places of this rank's rows among all."""
    schedule: Schedule
    classes: int

    def heads(self, rate_P: Tensor, decay_P: Tensor, *, seed: int) -> Heads:
        """Heads after all steps on the rows of all ranks."""
        width = self.split.x_RD.shape[1]
        heads = Heads(width, self.classes, rate_P=rate_P, decay_P=decay_P)
        step = 0
        for epoch in range(self.schedule.epochs):
            for row_B in self.schedule.batches(self.place_R, epoch, seed):
                x_BD, class_B = (x.index_select(0, row_B.to(x.device)) for x in self.split)
                heads.step(x_BD, class_B, factor=self.schedule.factor(step))
                step += 1
        return heads

    def tried(self, held_N: Tensor, rate_P: Tensor, decay_P: Tensor, *, seed: int) -> list[float]:
        """Accuracies in % on the held rows of heads that are trained on the others."""
        held_R = held_N[self.place_R]
        with raised_on_all_ranks("the linear probe", REMEDY):
            kept, held = (
                Split(*(x[m.to(x.device)] for x in self.split)) for m in (~held_R, held_R)
            )
        place_K = ((~held_N).cumsum(0) - 1)[self.place_R[~held_R]]  # numbered without the held
        schedule = replace(self.schedule, rows=int((~held_N).sum()))
        part = Trial(kept, place_K, schedule, self.classes)
        points: list[float] = []
        for at_p in torch.arange(len(rate_P)).split(max(1, LOGITS // (BATCH * self.classes))):
            points += part.heads(rate_P[at_p], decay_P[at_p], seed=seed).accuracies(held)
        return points
