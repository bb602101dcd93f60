"""Linear probe: L-BFGS logistic regression on standardised features, C chosen on a hold-out.

scikit-learn's, through the array API: products and losses on the tensors' device, the L-BFGS update
on the host in fp64.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from unic_ds import rng

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates of sklearn's C, the inverse penalty, weakest model first."""
ITERATIONS = 100
HELD_OUT = 0.2


def linear(
    train_NC: Tensor, train_label_N: Tensor, val_NC: Tensor, val_label_N: Tensor, *, seed: int = 0
) -> Iterator[tuple[str, float]]:
    """Yield ("linear", accuracy in %).

    C is chosen on a seeded 20 % of the training rows; the model is refitted on all and tested once.
    ValueError if the training rows are of one class.
    """
    if len(train_label_N.unique()) < 2:
        raise ValueError(
            "a linear probe wants training images of at least two classes; set --eval.on false"
        )
    with tensors_taken():
        best = choose(train_NC.float(), train_label_N, seed)
        value = accuracy(fit(train_NC.float(), train_label_N, best), val_NC.float(), val_label_N)
    yield "linear", value


@contextmanager
def tensors_taken() -> Iterator[None]:
    """In the body scikit-learn computes on torch's tensors, on their device."""
    # It asks for this variable; SciPy, which does nothing on a device here, reads it at import.
    os.environ["SCIPY_ARRAY_API"] = "1"
    with config_context(array_api_dispatch=True):
        yield


def choose(x_NC: Tensor, label_N: Tensor, seed: int) -> float:
    """The C of the most accurate model on the hold-out, the middle one without a hold-out."""
    held_N = torch.from_numpy(hold_out(label_N.cpu().numpy(), seed)).to(x_NC.device)
    if not held_N.any():
        return STRENGTHS[len(STRENGTHS) // 2]
    kept, held = (x_NC[~held_N], label_N[~held_N]), (x_NC[held_N], label_N[held_N])
    # max() keeps the first of equals: the strongest penalty
    return max(STRENGTHS, key=lambda strength: accuracy(fit(*kept, strength), *held))


def hold_out(label_N: NDArray[np.integer], seed: int) -> NDArray[np.bool_]:
    """Mask of a seeded fifth of each class; one row of every class always stays."""
    order_N = np.argsort(rng.uniform(seed, "linear", 1, np.arange(len(label_N)))[:, 0])
    held_N = np.zeros(len(label_N), dtype=bool)
    for label in np.unique(label_N):
        rows = order_N[label_N[order_N] == label]
        held_N[rows[: min(round(HELD_OUT * len(rows)), len(rows) - 1)]] = True
    return held_N


def fit(x_NC: Tensor, label_N: Tensor, strength: float) -> Any:
    """Standardisation and logistic regression fitted on these rows."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS))
    with warnings.catch_warnings():
        # A weak penalty may run into ITERATIONS: stopped early, it is a candidate like the others.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x_NC, label_N)


def accuracy(model: Any, x_NC: Tensor, label_N: Tensor) -> float:
    """The share of rows, in %, that a fitted model gives their label."""
    return 100 * int((model.predict(x_NC) == label_N).sum()) / len(label_N)
