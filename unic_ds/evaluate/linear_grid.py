"""Linear probe on standardised features, its penalty the best of a few on a hold-out.

All models and all penalties are fitted at once on all ranks, each with the images that it counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unic_ds.evaluate import softmax
from unic_ds.evaluate.features import FeatureSet
from unic_ds.evaluate.probe import (
    HELD_OUT,
    REMEDY,
    Probe,
    Split,
    Standardise,
    classes_of,
    hold_out,
    labels_of,
)
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates of scikit-learn's C, the inverse penalty of the summed loss, weakest model first."""


def fit_grid(train: FeatureSet, *, seed: int, device: torch.device) -> dict[str, Probe]:
    """Model -> probe; every rank calls it with the same models, and rows that have labels.

    C is chosen for each model on a seeded 20 % of the training rows; the regression is then fitted
    to all of them. ValueError if the training rows are of one class.
    """
    label_L = labels_of(train)
    class_R = classes_of(train.label_R, label_L)
    strengths, start = choose(train, class_R, seed=seed, classes=len(label_L), device=device)
    prepared = [standardised(name, x_RC, class_R, device) for name, x_RC in train.cls.items()]
    weights = softmax.fit([split for _, split in prepared], strengths, len(label_L), start)
    grid = ",".join(f"{strength:g}" for strength in STRENGTHS)
    rule = f"softmax L2 C={grid} on {HELD_OUT:.0%} held out, standardised"
    return {
        name: Probe(weight_SN.view(-1, len(label_L)), label_L, prepare, rule)
        for name, weight_SN, (prepare, _) in zip(train.cls, weights, prepared, strict=True)
    }


def choose(
    train: FeatureSet, class_R: Tensor, *, seed: int, classes: int, device: torch.device
) -> tuple[list[tuple[float, ...]], list[Tensor] | None]:
    """Each model's C, the most accurate on the hold-out, and the weights (1, D * L) fitted there.

    Of equals the strongest penalty; without a hold-out the middle one, and no weights.
    """
    held_N = torch.from_numpy(hold_out(train.label_N.numpy(), seed))
    if not held_N.any():
        return [(STRENGTHS[len(STRENGTHS) // 2],)] * len(train.cls), None
    held_R = held_N[train.place_R]
    kept, held = [], []
    for name, x_RC in train.cls.items():
        prepare, split = standardised(name, x_RC[~held_R], class_R[~held_R], device)
        kept.append(split)
        with raised_on_all_ranks("the linear probe", REMEDY):
            held.append(Split(prepare(x_RC[held_R].to(device)), class_R[held_R].to(device)))
    weights = softmax.fit(kept, [STRENGTHS] * len(kept), classes)
    points = softmax.accuracies(held, weights, classes)
    best = [values.index(max(values)) for values in points]  # the first of equals
    start = [weight_SN[at : at + 1] for at, weight_SN in zip(best, weights, strict=True)]
    return [(STRENGTHS[at],) for at in best], start


def standardised(
    name: str, x_RC: Tensor, class_R: Tensor, device: torch.device
) -> tuple[Standardise, Split]:
    """The preparation of features by the moments of all ranks' rows, and these rows prepared."""
    with raised_on_all_ranks(f"the linear probe of {name!r}", REMEDY):
        x_RC, class_R = x_RC.to(device), class_R.to(device)
    prepare = Standardise.to(x_RC)
    with raised_on_all_ranks("the linear probe", REMEDY):
        return prepare, Split(prepare(x_RC), class_R)
