"""Held-out R^2 of one model's features from those of others, by ridge regression.

Half of the images fit, the other half judge. Channels are standardised on the half that fits, by
`fidelity.scale_of`; of more than `COMPONENTS` channels the first principal components stay. Each
target channel has the penalty of `PENALTIES` with the least leave-one-out error on that half
(generalised cross-validation, Golub, Heath and Wahba, Technometrics 21, 1979), by scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor

from unic_ds import rng
from unic_ds.evaluate.fidelity import scale_of
from unic_ds.evaluate.products import product

COMPONENTS = 256
"""Most principal components of a model's features."""
PENALTIES = tuple(10.0**power for power in (-2, 0, 1, 2, 3, 4, 5))

Features = Mapping[str, Mapping[str, Tensor]]
"""Model -> kind of token -> features (N, M, C) of M tokens of each of N images."""


class Halves(NamedTuple):
    """Reduced features of one model and kind of token, fp64 rows of both halves of the images."""

    fit_RZ: Tensor
    judge_QZ: Tensor


class Coverage:
    """Held-out R^2 of models' features from those of a subset of the models."""

    def __init__(self, features: Features, *, seed: int = 0):
        """ValueError for fewer than two images, or models of other images or kinds of token."""
        self.names = list(features)
        self.kinds = check_features(features)
        count = len(features[self.names[0]][self.kinds[0]])
        fits_N = half(count, seed)
        self.halves = {
            kind: {name: reduced(features[name][kind], fits_N) for name in self.names}
            for kind in self.kinds
        }
        self.explained = cache(self._explained)

    def _explained(self, chosen: frozenset[str], kind: str) -> dict[str, float]:
        """R^2 of each other model's features from those of a subset, side by side."""
        own = self.halves[kind]
        targets = {name: halves for name, halves in own.items() if name not in chosen}
        return held_out_r2(joined([own[name] for name in self.names if name in chosen]), targets)

    def r2(self, chosen: frozenset[str], target: str, kind: str) -> float:
        """R^2 of a model's features from those of a subset; 1 for a model of the subset."""
        return 1.0 if target in chosen else self.explained(chosen, kind)[target]

    def of(self, chosen: Sequence[str]) -> float:
        """Mean of R^2 over all models and kinds of token; a chosen model has 1. 0 without any."""
        if not chosen:
            return 0.0
        subset = frozenset(chosen)
        values = [self.r2(subset, name, kind) for name in self.names for kind in self.kinds]
        return float(np.nanmean(values))  # constant features have no R^2


def check_features(features: Features) -> list[str]:
    """The kinds of token; ValueError unless all models have the same kinds and images."""
    kinds = [list(of) for of in features.values()]
    counts = {len(x_NMC) for of in features.values() for x_NMC in of.values()}
    if not kinds or any(found != kinds[0] for found in kinds) or len(counts) != 1:
        raise ValueError("features must be of the same kinds of token and images for each model")
    if min(counts) < 2:
        raise ValueError(f"features are of {min(counts)} images; give 2 or more")
    return kinds[0]


def half(count: int, seed: int) -> Tensor:
    """True for the images, of `count`, that fit: a seeded half."""
    bits_N = rng.random_bits(seed, "halves of images", 1, np.arange(count))[:, 0]
    fits_N = torch.zeros(count, dtype=torch.bool)
    fits_N[torch.from_numpy(np.argsort(bits_N, kind="stable")[: (count + 1) // 2])] = True
    return fits_N


def reduced(x_NMC: Tensor, fits_N: Tensor) -> Halves:
    """Standardised features of both halves, or their principal components."""
    fit_RC, judge_QC = (x_NMC[at_N].flatten(0, 1).double() for at_N in (fits_N, ~fits_N))
    sums_3C = torch.stack([torch.ones_like(fit_RC), fit_RC, fit_RC.square()]).sum(1)
    scale = scale_of(sums_3C)
    fit_RC, judge_QC = ((z_RC - scale.mean_C) / scale.std_C for z_RC in (fit_RC, judge_QC))
    if fit_RC.shape[1] <= COMPONENTS:
        return Halves(fit_RC, judge_QC)
    square_CC = product(fit_RC.T.float(), fit_RC.T.float()).double()
    axis_CZ = torch.linalg.eigh(square_CC).eigenvectors[:, -COMPONENTS:]
    return Halves(fit_RC @ axis_CZ, judge_QC @ axis_CZ)


def joined(parts: Sequence[Halves]) -> Halves:
    """Features of several models side by side."""
    return Halves(*(torch.cat(side, 1) for side in zip(*parts, strict=True)))


def held_out_r2(source: Halves, targets: Mapping[str, Halves]) -> dict[str, float]:
    """R^2 of each target's features, its channels together, on the half that judges.

    1 for an exact prediction, about 0 for one that knows the mean alone; NaN for constant features.
    """
    if not targets:
        return {}
    wanted = joined(list(targets.values()))
    model = RidgeCV(alphas=PENALTIES, alpha_per_target=True)
    model.fit(source.fit_RZ.numpy(), wanted.fit_RZ.numpy())
    pred_QZ = torch.from_numpy(model.predict(source.judge_QZ.numpy())).view_as(wanted.judge_QZ)
    error_Z = (wanted.judge_QZ - pred_QZ).square().sum(0)
    total_Z = wanted.judge_QZ.square().sum(0)  # about the mean of the half that fits
    widths = [halves.judge_QZ.shape[1] for halves in targets.values()]
    sums = zip(error_Z.split(widths), total_Z.split(widths), strict=True)
    return {
        name: float(1 - error_z.sum() / total_z.sum())
        for name, (error_z, total_z) in zip(targets, sums, strict=True)
    }
