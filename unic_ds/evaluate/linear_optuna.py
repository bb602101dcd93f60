"""UNIC's linear probe of small sets: raw features, C found by Optuna (arXiv 2408.05088, app. B).

Softmax regression with L-BFGS as scikit-learn fits it, of all models at once. Optuna's first trials
do not depend on each other's results, so they are fitted at once too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unic_ds.evaluate import softmax
from unic_ds.evaluate.features import FeatureSet
from unic_ds.evaluate.probe import (
    HELD_OUT,
    REMEDY,
    Probe,
    Split,
    classes_of,
    held_of_each_class,
    labels_of,
    raw,
)
from unic_ds.evaluate.rank_errors import raised_on_all_ranks

if TYPE_CHECKING:
    import optuna

TRIALS = 40
LEAST, MOST = 1e-5, 1e6
"""Bounds of scikit-learn's C, drawn log-uniformly."""
SAMPLER_SEED = 22
FIRST = 10
"""Trials that TPE draws at random before it looks at results."""


def fit_optuna(
    train: FeatureSet, *, seed: int, device: torch.device, trials: int = TRIALS
) -> dict[str, Probe]:
    """Model -> probe; every rank calls it with the same models, and rows that have labels.

    C is the best of `trials` on a seeded 20 % of each class (at least one row); the regression is
    then fitted to all rows. ValueError if the training rows are of one class or without one to hold
    out, RuntimeError without Optuna.
    """
    label_L = labels_of(train)
    held_N = held_of_each_class(train, seed)
    class_R, held_R = classes_of(train.label_R, label_L), held_N[train.place_R]
    whole = splits(train, class_R, torch.ones_like(held_R), device)
    pair = splits(train, class_R, ~held_R, device), splits(train, class_R, held_R, device)
    strengths = [(best,) for best in search(*pair, classes=len(label_L), trials=trials)]
    weights = softmax.fit(whole, strengths, len(label_L), as_sklearn=True)
    rule = (
        f"softmax L2 C in [{LEAST:g}, {MOST:g}] by {trials} trials of TPE on {HELD_OUT:.0%} held"
        f" out, raw features, L-BFGS to a gradient of {softmax.GRADIENT:g} or"
        f" {softmax.ITERATIONS} steps"
    )
    return {
        name: Probe(weight_SN.view(-1, len(label_L)), label_L, raw, rule)
        for name, weight_SN in zip(train.cls, weights, strict=True)
    }


def splits(
    train: FeatureSet, class_R: Tensor, chosen_R: Tensor, device: torch.device
) -> list[Split]:
    """Some rows of each model, on the device."""
    with raised_on_all_ranks("the linear probe", REMEDY):
        class_S = class_R[chosen_R].to(device)
        return [Split(raw(x_RC[chosen_R].to(device)), class_S) for x_RC in train.cls.values()]


def search(kept: Sequence[Split], held: Sequence[Split], classes: int, trials: int) -> list[float]:
    """Each model's best C on the held rows; of equals the first tried."""
    with imported() as optuna:
        studies = [optuna.create_study(sampler=sampler(optuna), direction="maximize") for _ in kept]
        done = 0
        while done < trials:
            count = min(FIRST, trials) if done == 0 else 1
            asked = [[study.ask() for _ in range(count)] for study in studies]
            strengths = [[t.suggest_float("C", LEAST, MOST, log=True) for t in of] for of in asked]
            weights = softmax.fit(kept, strengths, classes, as_sklearn=True)
            points = softmax.accuracies(held, weights, classes)
            for study, found, values in zip(studies, asked, points, strict=True):
                for trial, value in zip(found, values, strict=True):
                    study.tell(trial, value)
            done += count
        return [float(study.best_params["C"]) for study in studies]


def sampler(optuna: ModuleType) -> optuna.samplers.TPESampler:
    """The sampler of the paper's Optuna 3; version 5 has other defaults."""
    return optuna.samplers.TPESampler(
        seed=SAMPLER_SEED, multivariate=False, constant_liar=False, n_startup_trials=FIRST
    )


@contextmanager
def imported() -> Iterator[ModuleType]:
    """Optuna, an optional package, silent for a while; RuntimeError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise RuntimeError("--eval.protocol unic needs Optuna; pip install -e '.[eval]'") from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(before)
