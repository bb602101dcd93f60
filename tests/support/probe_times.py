"""CPU seconds of a model's probes: `python tests/support/probe_times.py [--rows N] [--classes L]`.

Beside them scikit-learn's on NumPy arrays; its regression stops after 100 iterations, ours when it
has converged.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from planted_classes import Rows, knn, linear, planted
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from unic_ds.evaluate.linear import STRENGTHS, hold_out

ITERATIONS = 100


def seconds(body: Callable[[], float]) -> tuple[float, float]:
    """CPU time of a call, and what it returned."""
    began = time.process_time()
    found = body()
    return time.process_time() - began, found


def numpy_knn(rows: Rows) -> float:
    """The accuracy of scikit-learn's neighbours."""
    train, label, val, val_label = (x.numpy() for x in rows)
    model = KNeighborsClassifier(10, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine")
    return 100 * model.fit(train, label).score(val, val_label)


def numpy_linear(rows: Rows) -> float:
    """The accuracy of the same protocol on NumPy arrays."""
    train, label, val, val_label = (x.numpy() for x in rows)
    held = hold_out(label, 0)

    def fitted(strength: float, kept: object) -> object:
        steps = StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS)
        return make_pipeline(*steps).fit(train[kept], label[kept])

    best = max(STRENGTHS, key=lambda c: fitted(c, ~held).score(train[held], label[held]))
    return 100 * fitted(best, slice(None)).score(val, val_label)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, value in (("rows", 10_000), ("width", 1024), ("classes", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    size = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = planted(size.rows, size.rows // 5, size.width, size.classes, gap=4)
    for evaluator, other in ((knn, numpy_knn), (linear, numpy_linear)):
        spent, value = seconds(lambda e=evaluator: e(rows))
        before, same = seconds(lambda o=other: o(rows))
        line = f"{spent:.2f} s ({value:.2f} %); NumPy {before:.2f} s ({same:.2f} %)"
        print(f"{evaluator.__name__}: {line}")
