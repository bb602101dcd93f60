"""Linear probe: L-BFGS logistic regression on standardised features, C chosen on a hold-out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from unic_ds import chance

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates of sklearn's C, the inverse penalty, weakest model first."""
ITERATIONS = 100
HELD_OUT = 0.2


def linear(
    train_NC: Tensor, train_label_N: Tensor, val_NC: Tensor, val_label_N: Tensor, *, seed: int = 0
) -> Iterator[tuple[str, float]]:
    """Yield ("linear", accuracy in %).

    C is chosen on a seeded 20 % of the training rows; the model is refitted on all and tested once.
    ValueError where the training rows are of one class.
    """
    x_NC, label_N = train_NC.float().cpu().numpy(), train_label_N.cpu().numpy()
    if len(np.unique(label_N)) < 2:
        raise ValueError(
            "a linear probe wants training images of at least two classes; set --eval.on false"
        )
    held_N = hold_out(label_N, seed)

    def held_out_accuracy(strength: float) -> float:
        return fit(x_NC[~held_N], label_N[~held_N], strength).score(x_NC[held_N], label_N[held_N])

    # max() keeps the first of equals: the strongest penalty
    best = max(STRENGTHS, key=held_out_accuracy) if held_N.any() else STRENGTHS[len(STRENGTHS) // 2]
    model = fit(x_NC, label_N, best)
    yield (
        "linear",
        100 * float(model.score(val_NC.float().cpu().numpy(), val_label_N.cpu().numpy())),
    )


def hold_out(label_N: NDArray[np.integer], seed: int) -> NDArray[np.bool_]:
    """Mask of a seeded fifth of each class; one row of every class always stays."""
    order_N = np.argsort(chance.uniform(seed, "linear", 1, np.arange(len(label_N)))[:, 0])
    held_N = np.zeros(len(label_N), dtype=bool)
    for label in np.unique(label_N):
        rows = order_N[label_N[order_N] == label]
        held_N[rows[: min(round(HELD_OUT * len(rows)), len(rows) - 1)]] = True
    return held_N


def fit(x_NC: NDArray[np.float32], label_N: NDArray[np.integer], strength: float) -> Any:
    """Standardisation and logistic regression fitted on these rows."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS))
    with warnings.catch_warnings():
        # A weak penalty may run into ITERATIONS: stopped early, it is a candidate like the others.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x_NC, label_N)
