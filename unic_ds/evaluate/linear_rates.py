"""DINOv2's linear probe: SGD with 13 rates at once (arXiv 2304.07193, appendix B.3).

Its inputs are the CLS token alone and beside the mean of the patch tokens, of the last block (the
paper also has those of the last four). Each rate has two heads: one leaves out the rows on which
the rate is chosen, the other, which is tested, is trained on all of them in the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unic_ds.evaluate.features import FeatureSet
from unic_ds.evaluate.heads import Heads, Schedule
from unic_ds.evaluate.probe import (
    HELD_OUT,
    REMEDY,
    FirstColumns,
    Probe,
    Split,
    classes_of,
    held_of_each_class,
    labels_of,
)
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Rates for a batch of 256, to whose size they are proportional."""
EPOCHS, STEPS = 10, 1250
SMALLEST, LARGEST = 32, 1024
"""A batch has so many images that an epoch has STEPS steps, within these bounds."""

EpochFeatures = Callable[[int], Mapping[str, Tensor]]
"""Epoch -> features (R, C) of this rank's rows by each model, on the CPU."""


def fit_rates(
    train: FeatureSet,
    shown: EpochFeatures | None = None,
    *,
    seed: int,
    device: torch.device,
    paired: Collection[str] = (),
) -> dict[str, Probe]:
    """Model -> probe; every rank calls it with the same models, and rows that have labels.

    Heads are trained on the features `shown` in each epoch, by default those of `train`, on which
    the rate is chosen. The features of the models `paired` are CLS and, as wide, mean patches. The
    same errors as `linear_sgd.fit_sgd`.
    """
    label_L = labels_of(train)
    held_N = held_of_each_class(train, seed)
    class_R, held_R = classes_of(train.label_R, label_L).to(device), held_N[train.place_R]
    rows = len(train.label_N)
    schedule = Schedule(EPOCHS, min(LARGEST, max(SMALLEST, -(-rows // STEPS))), rows)
    heads = {
        name: [
            heads_of(columns, len(label_L), batch=schedule.batch, device=device)
            for columns in inputs(x_RC.shape[1], name in paired)
        ]
        for name, x_RC in train.cls.items()
    }
    marked = Marked(train.place_R, class_R, held_R)
    train_all(heads, marked, shown or (lambda _: train.cls), schedule=schedule, seed=seed)
    held = on_device({name: x_RC[held_R] for name, x_RC in train.cls.items()}, device)
    held_class_R = class_R[held_R.to(device)]
    rule = rule_of(schedule.batch, augmented=shown is not None)
    found = {}
    for name, of_model in heads.items():
        best, weight_DL = chosen(of_model, Split(held[name], held_class_R), name)
        seen = "CLS and CLS+mean patches" if name in paired else "CLS"
        found[name] = Probe(weight_DL, label_L, FirstColumns(best), f"{rule}, {seen}")
    return found


class Marked(NamedTuple):
    """This rank's training rows."""

    place_R: Tensor
    """Places among all ranks' rows."""
    class_R: Tensor
    """Classes, on the device of the heads."""
    held_R: Tensor
    """True for rows on which the rate is chosen."""


def train_all(
    heads: Mapping[str, Sequence[Heads]],
    rows: Marked,
    shown: EpochFeatures,
    *,
    schedule: Schedule,
    seed: int,
) -> None:
    """Train the heads of all models on the features that each epoch shows."""
    device, step = rows.class_R.device, 0
    for epoch in range(schedule.epochs):
        features = on_device(shown(epoch), device)
        for row_B in schedule.batches(rows.place_R, epoch, seed):
            at_B, held_B = row_B.to(device), rows.held_R[row_B].to(device)
            for name, of_model in heads.items():
                x_BC, factor = features[name].index_select(0, at_B), schedule.factor(step)
                for one in of_model:
                    x_BD = FirstColumns(one.width - 1)(x_BC)
                    one.step(x_BD, rows.class_R[at_B], factor=factor, held_B=held_B)
            step += 1


def rule_of(batch: int, *, augmented: bool) -> str:
    """The start of a protocol."""
    return (
        f"SGD {EPOCHS} epochs, batch {batch}, {len(RATES)} rates in [{RATES[0]:g},"
        f" {RATES[-1]:g}] x batch/256 on {HELD_OUT:.0%} held out,"
        f" {'augmented views' if augmented else 'stored features'}"
    )


def inputs(width: int, paired: bool) -> list[int]:
    """Columns of each input of the heads: of features that are paired, the first half and all."""
    return [width // 2, width] if paired else [width]


def heads_of(columns: int, classes: int, *, batch: int, device: torch.device) -> Heads:
    """Two heads for each rate: the first RATES leave out the held rows."""
    rate_P = torch.tensor(RATES, device=device).repeat(2) * batch / 256
    spares_P = torch.arange(len(rate_P), device=device) < len(RATES)
    decay_P = torch.zeros_like(rate_P)
    return Heads(columns + 1, classes, rate_P=rate_P, decay_P=decay_P, spares_P=spares_P)


def chosen(heads: list[Heads], held: Split, name: str) -> tuple[int, Tensor]:
    """Columns of the best input, and the weights (D, L) of its best rate trained on all rows.

    Of equals the narrower input and the lower rate; ValueError if no head has a finite loss.
    `held`: features that are not prepared.
    """
    points = []
    for one in heads:
        x_RD = FirstColumns(one.width - 1)(held.x_RD)
        points.append(one.accuracies(Split(x_RD, held.class_R))[: len(RATES)])
    best = max(max(of_input) for of_input in points)
    if best < 0:
        raise ValueError(f"no linear probe of {name!r} has a finite loss")
    at = next(at for at, of_input in enumerate(points) if best in of_input)
    twin = points[at].index(best) + len(RATES)
    return heads[at].width - 1, heads[at].weight_PLD[twin].T


def on_device(features: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Features of this rank's rows on the device."""
    with raised_on_all_ranks("the linear probe", REMEDY):
        return {name: x_RC.to(device) for name, x_RC in features.items()}
